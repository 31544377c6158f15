//! Transactions that are hard to relay: F16. Idle writers, held snapshots, burnt ids, very large ones.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use sqlx::{Connection as _, PgConnection};
use tokio::time::Instant;

use super::act::Act;
use super::recovery;

/// The relay's head is looked at this often.
const LOOK: Duration = Duration::from_millis(100);
/// The head may stand for as long as a new leader needs; longer, while others commit, is a violation.
const STANDSTILL_LIMIT: Duration = Duration::from_secs(3);
/// Fewer commits than this during a standstill prove nothing.
const COMMITS_THAT_PROVE: u64 = 100;
/// A large transaction is relayed within this.
const RELAYED: Duration = Duration::from_secs(90);
/// The relay's speed before the fault is taken over this time.
const BEFORE: Duration = Duration::from_secs(2);

/// F16.
pub(super) async fn trouble(act: &mut Act<'_>) -> anyhow::Result<()> {
    let word = act.fault.variant.split(' ').next().unwrap_or_default();
    match word {
        "idle" => idle_writer(act).await,
        "snapshot" => held_snapshot(act).await,
        "rollbacks" => burnt_ids(act).await,
        "big" => large(act).await,
        other => anyhow::bail!("no such transaction: {other}"),
    }
}

/// Draws an id and sits on it. It is rolled back in the end, so that nothing comes of it.
async fn idle_writer(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut connection = act.cluster().admin().await?;
    let speed = speed_before(act).await?;
    act.on("primary");
    let mut transaction = connection.begin().await?;
    emit(&mut transaction).await?;
    act.took = true;
    watch_head(act, speed).await?;
    transaction.rollback().await?;
    act.off();
    Ok(())
}

async fn held_snapshot(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut connection = act.cluster().admin().await?;
    let speed = speed_before(act).await?;
    act.on("primary");
    let mut transaction = connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
    sqlx::query("SELECT count(*) FROM tidewire.epochs").execute(&mut *transaction).await?;
    act.took = true;
    watch_head(act, speed).await?;
    transaction.rollback().await?;
    act.off();
    Ok(())
}

async fn burnt_ids(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut connection = act.cluster().admin().await?;
    act.on("primary");
    let mut burnt = 0;
    while Instant::now() < act.until() {
        let mut transaction = connection.begin().await?;
        emit(&mut transaction).await?;
        sqlx::query(
            "SELECT count(nextval(pg_get_serial_sequence('tidewire.outbox', 'id'))) FROM generate_series(1, 500)",
        )
        .execute(&mut *transaction)
        .await?;
        transaction.rollback().await?;
        burnt += 501;
        tokio::time::sleep(LOOK).await;
    }
    act.took = burnt > 0;
    act.figure("burnt_ids", f64::from(burnt));
    act.off();
    Ok(())
}

/// An event that the caller rolls back.
async fn emit(connection: &mut PgConnection) -> anyhow::Result<()> {
    sqlx::query("SELECT tidewire.emit('chaos', '0', 'rolled-back', '{}'::jsonb)").execute(connection).await?;
    Ok(())
}

/// Many rows in one transaction: they must be neighbours in the log.
async fn large(act: &mut Act<'_>) -> anyhow::Result<()> {
    let rows: u32 = act.fault.variant.split(' ').nth(1).context("rows of a big transaction")?.parse()?;
    let before = recovery::head(act.scene()).await?;
    act.on("primary");
    let xid = act.scene().workload.big_transaction(rows).await?;
    let committed = Instant::now();
    act.off();
    let mut connection = act.cluster().admin().await?;
    let deadline = Instant::now() + RELAYED;
    loop {
        let (count, span, ended) = in_log(&mut connection, xid, before).await?;
        if ended {
            act.micros("relayed_us", committed.elapsed());
            act.took = count >= i64::from(rows);
            if count != span {
                act.violation(format!("transaction {xid} has {count} rows in the log, spread over {span}"));
            }
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{rows} rows were not relayed within {RELAYED:?}");
        tokio::time::sleep(LOOK).await;
    }
}

async fn in_log(connection: &mut PgConnection, xid: u64, after: u64) -> anyhow::Result<(i64, i64, bool)> {
    Ok(sqlx::query_as(
        "SELECT count(*), coalesce(max(seq) - min(seq) + 1, 0), coalesce(bool_or(tx_end), false)
         FROM tidewire.event_log WHERE seq > $2 AND xid = $1::xid8",
    )
    .bind(xid.to_string())
    .bind(i64::try_from(after)?)
    .fetch_one(connection)
    .await?)
}

/// Rows a second that the log grows by without the fault.
async fn speed_before(act: &Act<'_>) -> anyhow::Result<f64> {
    let (before, began) = (recovery::head(act.scene()).await?, Instant::now());
    tokio::time::sleep(BEFORE).await;
    let after = recovery::head(act.scene()).await?;
    Ok(after.saturating_sub(before) as f64 / began.elapsed().as_secs_f64())
}

/// Until the hold is over: does the head rise while others commit?
async fn watch_head(act: &mut Act<'_>, speed_before: f64) -> anyhow::Result<()> {
    let workload = &act.scene().workload;
    let (began, first) = (Instant::now(), recovery::head(act.scene()).await?);
    let (mut head, mut since, mut commits) = (first, began, workload.committed());
    let mut longest = Duration::ZERO;
    while Instant::now() < act.until() {
        tokio::time::sleep(LOOK).await;
        // The primary may be away for a moment by another fault of the group.
        let Ok(now) = recovery::head(act.scene()).await else { continue };
        if now > head {
            (head, since, commits) = (now, Instant::now(), workload.committed());
        } else if workload.committed() >= commits + COMMITS_THAT_PROVE {
            longest = longest.max(since.elapsed());
        }
    }
    act.micros("standstill_us", longest);
    let speed = head.saturating_sub(first) as f64 / began.elapsed().as_secs_f64();
    if speed_before > 0.0 {
        act.figure("speed_permille", 1_000.0 * speed / speed_before);
    }
    if longest > STANDSTILL_LIMIT && act.fault.alone {
        act.violation(format!("the relay stood still for {longest:?} while others committed"));
    }
    Ok(())
}
