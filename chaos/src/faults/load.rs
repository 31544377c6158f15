//! Postgres without room for us: F14. Connections used up, the log locked, statements slowed down.

use std::time::Duration;

use anyhow::Context as _;
use rand::seq::IndexedRandom;
use sqlx::{Connection as _, PgConnection};
use tokio::time::Instant;

use super::act::Act;
use super::connections;

/// Most connections that are opened to use up the rest.
const HOG_LIMIT: usize = 1_000;
/// A lock on the log is granted within this.
const GRANTED: Duration = Duration::from_secs(10);
/// Statements wait for this long, and run free for as long.
const PULSE: Duration = Duration::from_millis(400);

/// F14.
pub(super) async fn starve(act: &mut Act<'_>) -> anyhow::Result<()> {
    match act.fault.variant.as_str() {
        "pool" => connections_used_up(act).await,
        "lock" => log_locked(act).await,
        _ => statements_slow(act).await,
    }
}

async fn connections_used_up(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut admin = act.cluster().admin().await?;
    let url = act.cluster().primary().borrow().clone();
    act.on("primary");
    let mut hogs = Vec::new();
    while hogs.len() < HOG_LIMIT && free_slots(&mut admin).await? > 0 {
        match PgConnection::connect(&url).await {
            Ok(hog) => hogs.push(hog),
            Err(error) if hogs.is_empty() => return Err(error).context("the first connection of the hog"),
            Err(_) => break,
        }
    }
    act.figure("hogged_connections", hogs.len() as f64);
    act.took = free_slots(&mut admin).await? <= 0;
    // Sessions that stand feel nothing. One is ended, so that a node must find its way without a new one.
    let leader: Vec<_> = connections::leader(&mut admin).await?.into_iter().map(|backend| backend.pid).collect();
    let others = connections::any(&mut admin).await?;
    let others: Vec<_> = others.iter().filter(|backend| !leader.contains(&backend.pid)).collect();
    if let Some(backend) = others.choose(&mut act.random)
        && connections::terminate(&mut admin, backend.pid).await?
        && let Ok(hog) = PgConnection::connect(&url).await
    {
        hogs.push(hog);
    }
    act.hold().await;
    for hog in hogs {
        let _ = hog.close().await;
    }
    act.off();
    Ok(())
}

/// Connections that roles without special rights may still make.
async fn free_slots(admin: &mut PgConnection) -> anyhow::Result<i64> {
    Ok(sqlx::query_scalar(
        "SELECT current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
             - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')",
    )
    .fetch_one(admin)
    .await?)
}

async fn log_locked(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut connection = act.cluster().admin().await?;
    act.on("tidewire.event_log");
    let mut transaction = connection.begin().await?;
    lock(&mut transaction).await?;
    act.took = true;
    act.hold().await;
    transaction.rollback().await?;
    act.off();
    Ok(())
}

async fn lock(connection: &mut PgConnection) -> anyhow::Result<()> {
    let locked = sqlx::query("LOCK TABLE tidewire.event_log IN ACCESS EXCLUSIVE MODE").execute(connection);
    tokio::time::timeout(GRANTED, locked).await.context("the lock was not granted")??;
    Ok(())
}

async fn statements_slow(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut connection = act.cluster().admin().await?;
    act.on("tidewire.event_log");
    let mut pulses = 0;
    while Instant::now() < act.until() {
        let mut transaction = connection.begin().await?;
        lock(&mut transaction).await?;
        tokio::time::sleep(PULSE).await;
        transaction.rollback().await?;
        tokio::time::sleep(PULSE).await;
        pulses += 1;
    }
    act.took = pulses > 0;
    act.off();
    Ok(())
}
