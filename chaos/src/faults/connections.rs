//! Our backends terminated: F13.

use std::time::Duration;

use anyhow::Context as _;
use rand::seq::IndexedRandom;
use sqlx::{PgConnection, Row as _};
use tokio::time::Instant;

use super::act::{Act, until};

/// From the end of a leader's session to the next leader's first steps.
const ELECTION: Duration = Duration::from_millis(700);
/// What every node's `application_name` begins with.
pub(super) const OURS: &str = "tidewire %";
/// A terminated backend is gone within this.
const GONE: Duration = Duration::from_secs(5);
/// A role that moves is waited for.
const FOUND: Duration = Duration::from_secs(10);

/// A backend of a node.
#[derive(Clone, Debug)]
pub(super) struct Backend {
    pub(super) pid: i32,
    /// The node's name.
    pub(super) node: String,
}

/// The node that holds the leader's advisory lock.
const LEADER: &str = "SELECT a.pid, substr(a.application_name, 10) AS node
    FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.mode = 'ExclusiveLock'
      AND (l.classid::bigint << 32) | l.objid::bigint = 8388068008253452901 AND a.application_name LIKE $1";
/// Sessions that listen: their last statement was LISTEN, and they say nothing else.
const LISTENERS: &str = "SELECT pid, substr(application_name, 10) AS node FROM pg_stat_activity
    WHERE application_name LIKE $1 AND query ILIKE 'LISTEN %' AND backend_type = 'client backend'";
const ANY: &str = "SELECT pid, substr(application_name, 10) AS node FROM pg_stat_activity
    WHERE application_name LIKE $1 AND backend_type = 'client backend'";

pub(super) async fn leader(connection: &mut PgConnection) -> anyhow::Result<Vec<Backend>> {
    fetch(connection, LEADER).await
}

/// Ends the leader's session again and again, at most `times`, until `found` says yes; whether it did.
pub(super) async fn elect_until<F: Future<Output = bool>>(
    act: &Act<'_>,
    times: u32,
    found: impl Fn() -> F,
) -> anyhow::Result<bool> {
    let mut connection = act.cluster().admin().await?;
    for _ in 0..times {
        for backend in leader(&mut connection).await? {
            terminate(&mut connection, backend.pid).await?;
        }
        if until(Instant::now() + ELECTION, &found).await.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(super) async fn listeners(connection: &mut PgConnection) -> anyhow::Result<Vec<Backend>> {
    fetch(connection, LISTENERS).await
}

pub(super) async fn any(connection: &mut PgConnection) -> anyhow::Result<Vec<Backend>> {
    fetch(connection, ANY).await
}

async fn fetch(connection: &mut PgConnection, text: &'static str) -> anyhow::Result<Vec<Backend>> {
    let rows = sqlx::query(text).bind(OURS).fetch_all(connection).await?;
    rows.iter().map(|row| Ok(Backend { pid: row.try_get("pid")?, node: row.try_get("node")? })).collect()
}

/// F13: `pg_terminate_backend`.
pub(super) async fn terminate_backend(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut connection = act.cluster().admin().await?;
    let backend = choose(act, &mut connection).await?;
    act.on(&format!("{} backend of {}", act.fault.variant, backend.node));
    act.took = terminate(&mut connection, backend.pid).await?;
    act.off();
    act.hold().await;
    Ok(())
}

async fn choose(act: &mut Act<'_>, connection: &mut PgConnection) -> anyhow::Result<Backend> {
    let deadline = Instant::now() + FOUND;
    loop {
        let found = match act.fault.variant.as_str() {
            "leader" => leader(connection).await?,
            "listener" => listeners(connection).await?,
            _ => any(connection).await?,
        };
        if let Some(backend) = found.choose(&mut act.random) {
            return Ok(backend.clone());
        }
        (Instant::now() < deadline).then_some(()).context("no such backend")?;
        tokio::time::sleep(super::act::POLL).await;
    }
}

/// Terminates and waits until it is gone.
pub(super) async fn terminate(connection: &mut PgConnection, pid: i32) -> anyhow::Result<bool> {
    let told: bool =
        sqlx::query_scalar("SELECT pg_terminate_backend($1)").bind(pid).fetch_one(&mut *connection).await?;
    let deadline = Instant::now() + GONE;
    while Instant::now() < deadline {
        let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)")
            .bind(pid)
            .fetch_one(&mut *connection)
            .await?;
        if !there {
            return Ok(told);
        }
        tokio::time::sleep(super::act::POLL).await;
    }
    Ok(false)
}
