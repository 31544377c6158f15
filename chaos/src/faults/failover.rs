//! Postgres stopped, failed over, and the old primary's return: F9 to F12.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use sqlx::{Connection as _, PgConnection};
use tokio::time::Instant;

use super::act::{Act, Mend, until};
use super::{Scene, recovery};
use crate::cluster::Stop;
use crate::cluster::link::{Cut, Direction, Link};
use crate::workload::truth;

/// Postgres accepts connections again within this.
const ACCEPTS: Duration = Duration::from_secs(60);
/// A standby that was cut off has replayed what it has within this.
const REPLAYED: Duration = Duration::from_secs(10);
/// Nodes that can reach only the old primary have the time to make their mistake: three elections.
const TEMPTATION: Duration = Duration::from_secs(3);
const QUESTION: Duration = Duration::from_secs(5);

/// A primary that a failover left behind, stopped.
#[derive(Clone, Debug)]
pub(super) struct OldPrimary {
    pub(super) url: String,
    /// Of a lossy failover: its number, and the last seq that both logs have.
    pub(super) tail: Option<(u32, u64)>,
}

/// F9: immediate stop, restart.
pub(super) async fn restart_postgres(act: &mut Act<'_>) -> anyhow::Result<()> {
    act.mends(Mend::Postgres);
    let postgres = act.cluster().postgres();
    let server = postgres.server(postgres.current());
    act.on("primary");
    server.stop(Stop::Immediate).await?;
    act.took = !server.running();
    act.hold().await;
    let began = Instant::now();
    server.start().await?;
    until(Instant::now() + ACCEPTS, || server.accepts()).await.context("Postgres does not accept connections")?;
    act.micros("accepts_us", began.elapsed());
    act.stamp("accepted_at_us");
    act.off();
    Ok(())
}

/// F10: to a standby that has everything.
pub(super) async fn synchronous(act: &mut Act<'_>) -> anyhow::Result<()> {
    act.mends(Mend::Postgres);
    let postgres = act.cluster().postgres();
    postgres.make_synchronous(true).await?;
    let before = recovery::head(act.scene()).await?;
    let old = OldPrimary { url: postgres.url(postgres.current()), tail: None };
    act.on("primary");
    postgres.server(postgres.current()).stop(Stop::Immediate).await?;
    act.hold().await;
    promote(act, old).await?;
    let after = recovery::head(act.scene()).await?;
    act.took = true;
    if after < before {
        act.violation(format!("the synchronous standby's log ends at {after}, the primary's had reached {before}"));
    }
    Ok(())
}

/// F11: to a standby that lacks the end.
pub(super) async fn lossy(act: &mut Act<'_>) -> anyhow::Result<()> {
    act.mends(Mend::Postgres);
    let postgres = act.cluster().postgres();
    let slot = postgres.current();
    let standby = postgres.url(postgres.standby_slot());
    postgres.make_synchronous(false).await?;
    act.on("primary");
    postgres.cut_replication();
    act.hold().await;
    let last = recovery::head(act.scene()).await?;
    postgres.server(slot).stop(Stop::Immediate).await?;
    let fork = replayed_head(&standby).await?;
    let branch = act.board.next_branch();
    act.figure("branch", f64::from(branch));
    act.figure("lost_rows", last.saturating_sub(fork) as f64);
    act.took = last > fork;
    let old = OldPrimary { url: postgres.url(slot), tail: Some((branch, fork)) };
    promote(act, old).await?;
    postgres.heal_replication();
    Ok(())
}

/// The other one becomes the primary. From here on the old one has to be dealt with.
async fn promote(act: &mut Act<'_>, old: OldPrimary) -> anyhow::Result<()> {
    act.board.leave_old_primary(old);
    let postgres = act.cluster().postgres();
    let began = Instant::now();
    postgres.promote_standby().await?;
    let server = postgres.server(postgres.current());
    until(Instant::now() + ACCEPTS, || server.accepts())
        .await
        .context("the new primary does not accept connections")?;
    act.micros("promoted_us", began.elapsed());
    act.stamp("accepted_at_us");
    act.off();
    Ok(())
}

/// The last seq of a standby that receives nothing more, once it has replayed all that it has: its promotion adds none.
async fn replayed_head(url: &str) -> anyhow::Result<u64> {
    let mut connection = connect(url).await?;
    let deadline = Instant::now() + REPLAYED;
    loop {
        let behind: bool = sqlx::query_scalar(
            "SELECT coalesce(pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn(), false)
                 OR EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')",
        )
        .fetch_one(&mut connection)
        .await?;
        // The receiver may not have noticed the cut: what it cannot receive does not matter.
        if !behind || Instant::now() > deadline {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(log_end(&mut connection).await?.0)
}

async fn connect(url: &str) -> anyhow::Result<PgConnection> {
    Ok(tokio::time::timeout(QUESTION, PgConnection::connect(url)).await??)
}

/// The last seq, and how many rows the log has.
async fn log_end(connection: &mut PgConnection) -> anyhow::Result<(u64, u64)> {
    let asked = sqlx::query_as("SELECT coalesce(max(seq), 0), count(*) FROM tidewire.event_log");
    let (seq, rows): (i64, i64) = tokio::time::timeout(ACCEPTS, asked.fetch_one(connection)).await??;
    Ok((u64::try_from(seq)?, u64::try_from(rows)?))
}

async fn takes_writes(connection: &mut PgConnection) -> anyhow::Result<bool> {
    let asked = sqlx::query_scalar("SELECT NOT pg_is_in_recovery()");
    Ok(tokio::time::timeout(QUESTION, asked.fetch_one(connection)).await??)
}

async fn last_term(connection: &mut PgConnection) -> anyhow::Result<i64> {
    let asked = sqlx::query_scalar("SELECT coalesce(max(term), 0) FROM tidewire.terms");
    Ok(tokio::time::timeout(QUESTION, asked.fetch_one(connection)).await??)
}

/// F12: the old primary comes back and would take writes; nodes must not relay there.
pub(super) async fn old_primary_returns(act: &mut Act<'_>) -> anyhow::Result<()> {
    let old = act.board.take_old_primary().context("no failover left an old primary behind")?;
    act.on("old primary");
    // If anything fails from here on, the slot's end still rebuilds the pair.
    act.board.leave_old_primary(old.clone());
    act.mends(Mend::Ways);
    let seen = tempt(act.scene(), &old).await?;
    act.took = seen.accepted && seen.met;
    act.figure("lost_rows", seen.lost as f64);
    if let Some(text) = seen.relayed {
        act.violation(text);
    }
    let postgres = act.cluster().postgres();
    postgres.server(postgres.standby_slot()).stop(Stop::Immediate).await?;
    // The copy is made at the slot's end: it is no part of the recovery.
    act.board.leave_old_primary(OldPrimary { tail: None, ..old });
    act.off();
    Ok(())
}

/// What happened while the old primary ran.
struct Temptation {
    /// It takes writes.
    accepted: bool,
    /// A node came.
    met: bool,
    lost: u64,
    relayed: Option<String>,
}

/// Starts the old primary with a row in its outbox, lets the nodes reach nothing else for a while, and looks whether one of
/// them relayed there. Then reads the tail that a lossy failover lost. It is stopped again by whoever rebuilds it.
async fn tempt(scene: &Scene, old: &OldPrimary) -> anyhow::Result<Temptation> {
    let postgres = scene.cluster.postgres();
    let (true_way, wrong_way) = (postgres.current(), postgres.standby_slot());
    let ways = |slot: usize| scene.cluster.nodes().iter().map(move |node| node.database_links()[slot]);
    ways(wrong_way).for_each(|link| link.cut(Cut::Reset, Direction::Both));
    postgres.start_old_primary().await?;
    let mut connection = connect(&old.url).await.context("the old primary")?;
    let accepted = takes_writes(&mut connection).await?;
    let lure = sqlx::query("SELECT tidewire.emit('chaos', '0', 'lure', '{}'::jsonb)").execute(&mut connection);
    tokio::time::timeout(QUESTION, lure).await??;
    let before = (log_end(&mut connection).await?, last_term(&mut connection).await?);
    let asked = || ways(wrong_way).map(|link| link.bytes().0).sum::<u64>();
    let unasked = asked();
    ways(true_way).for_each(|link| link.cut(Cut::Reset, Direction::Both));
    ways(wrong_way).for_each(Link::heal);
    tokio::time::sleep(TEMPTATION).await;
    ways(true_way).for_each(Link::heal);
    let after = (log_end(&mut connection).await?, last_term(&mut connection).await?);
    let relayed = (before != after).then(|| {
        format!("a node led on the old primary: from {before:?} to {after:?} ((last seq, rows of its log), last term)")
    });
    let lost = match old.tail {
        Some((branch, fork)) => truth::lost_tail(&old.url, &scene.recorder, branch, fork).await?,
        None => 0,
    };
    let _ = connection.close().await;
    Ok(Temptation { accepted, met: asked() > unasked, lost, relayed })
}

/// Without a fault that records it: reads the lost tail if there is one, and makes a standby of the old primary.
pub(super) async fn retire(scene: &Scene, old: &OldPrimary) -> anyhow::Result<()> {
    let postgres = scene.cluster.postgres();
    // An F12 that broke off may have left it running.
    postgres.server(postgres.standby_slot()).stop(Stop::Immediate).await?;
    if let Some((branch, fork)) = old.tail {
        let ways = || scene.cluster.nodes().iter().map(|node| node.database_links()[postgres.standby_slot()]);
        ways().for_each(|link| link.cut(Cut::Reset, Direction::Both));
        let read = lost_tail(scene, old, branch, fork).await;
        ways().for_each(Link::heal);
        read?;
    }
    postgres.heal_replication();
    postgres.rebuild_standby().await
}

async fn lost_tail(scene: &Scene, old: &OldPrimary, branch: u32, fork: u64) -> anyhow::Result<()> {
    scene.cluster.postgres().start_old_primary().await?;
    let mut connection = connect(&old.url).await.context("the old primary")?;
    ensure!(takes_writes(&mut connection).await?, "the old primary is in recovery: its tail cannot be what was lost");
    truth::lost_tail(&old.url, &scene.recorder, branch, fork).await?;
    Ok(())
}
