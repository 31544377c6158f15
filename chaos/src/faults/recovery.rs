//! After the heal: how long clients need, and putting right what a fault that broke off left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sqlx::{Connection as _, PgConnection, Row as _};
use tokio::time::Instant;

use super::act::{Act, Board, Mend, NODE_READY, POLL};
use super::{Scene, failover};
use crate::cluster::link::Link;

/// Everybody has caught up within this, or the fault counts as not recovered.
const RECOVERY_LIMIT: Duration = Duration::from_secs(60);
/// One question to the primary.
const QUESTION: Duration = Duration::from_secs(5);

/// How clients recovered.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Recovered {
    /// Something that was committed after the heal reached a client, and nobody was left behind.
    pub(super) progressed: bool,
    /// From the heal to the last client, microseconds.
    pub(super) caught_up: Option<u64>,
}

/// Waits until every subscription that lived at the heal has passed everything that was committed by then: the log's
/// head once no such transaction is left in the outbox. (The head at the heal itself would prove nothing of a fault in
/// which the relay stood still.)
/// `healed`: when the last fault of its slot was, which lets everybody catch up.
pub(super) async fn measure(act: &mut Act<'_>, healed: Instant) -> Recovered {
    let scene = act.scene();
    let deadline = Instant::now() + RECOVERY_LIMIT;
    let mut waiting: BTreeSet<u32> =
        scene.workload.positions().into_iter().filter(|position| !position.ended).map(|position| position.s).collect();
    let Ok(Ok(head)) = tokio::time::timeout_at(deadline, drained_head(scene)).await else {
        return Recovered::default();
    };
    act.micros("drained_us", healed.elapsed());
    let mut recovered = Recovered::default();
    while Instant::now() < deadline {
        // By epoch first: who stands in a lost tail stands beyond a head that it has not reached.
        let places: BTreeMap<u32, Option<(u32, u64)>> = scene
            .workload
            .positions()
            .into_iter()
            .filter(|position| !position.ended)
            .map(|position| (position.s, position.cursor.map(|cursor| (cursor.epoch, cursor.seq))))
            .collect();
        // One that is gone has ended by plan or was told to resync.
        waiting.retain(|s| places.get(s).is_some_and(|place| place.is_none_or(|place| place < head)));
        if waiting.is_empty() {
            let now = healed.elapsed().as_micros();
            recovered.caught_up.get_or_insert(u64::try_from(now).unwrap_or(u64::MAX));
            if places.values().flatten().any(|place| *place > head) {
                recovered.progressed = true;
                return recovered;
            }
        }
        tokio::time::sleep(POLL).await;
    }
    act.figure("behind_rows", waiting.len() as f64);
    recovered
}

/// The log's head, epoch and seq, when the outbox holds nothing that was committed before this call.
async fn drained_head(scene: &Scene) -> anyhow::Result<(u32, u64)> {
    let mut connection: Option<PgConnection> = None;
    let mut before: Option<String> = None;
    loop {
        match ask(scene, &mut connection, &mut before).await {
            Ok(Some(head)) => return Ok(head),
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(error = format!("{error:#}"), "the primary cannot be asked yet");
                connection = None;
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn ask(
    scene: &Scene,
    connection: &mut Option<PgConnection>,
    before: &mut Option<String>,
) -> anyhow::Result<Option<(u32, u64)>> {
    if connection.is_none() {
        *connection = Some(scene.cluster.admin().await?);
    }
    let Some(connection) = connection.as_mut() else { return Ok(None) };
    let xid = match before {
        Some(xid) => xid.clone(),
        None => {
            let asked = sqlx::query_scalar("SELECT pg_snapshot_xmax(pg_current_snapshot())::text");
            let xid: String = tokio::time::timeout(QUESTION, asked.fetch_one(&mut *connection)).await??;
            before.insert(xid).clone()
        }
    };
    let asked = sqlx::query(
        "SELECT coalesce((SELECT max(seq) FROM tidewire.event_log), 0) AS head,
                (SELECT coalesce(max(epoch), 0) FROM tidewire.epochs
                 WHERE start_seq < coalesce((SELECT max(seq) FROM tidewire.event_log), 0)) AS epoch,
                EXISTS (SELECT FROM tidewire.outbox WHERE xid < $1::xid8) AS waits",
    )
    .bind(xid);
    let row = tokio::time::timeout(QUESTION, asked.fetch_one(connection)).await??;
    let (head, epoch, waits): (i64, i32, bool) = (row.try_get("head")?, row.try_get("epoch")?, row.try_get("waits")?);
    Ok((!waits).then(|| (u32::try_from(epoch).unwrap_or_default(), u64::try_from(head).unwrap_or_default())))
}

/// The log's head now.
pub(super) async fn head(scene: &Scene) -> anyhow::Result<u64> {
    let mut connection = scene.cluster.admin().await?;
    let asked = sqlx::query_scalar("SELECT coalesce(max(seq), 0) FROM tidewire.event_log");
    let head: i64 = tokio::time::timeout(QUESTION, asked.fetch_one(&mut connection)).await??;
    let _ = connection.close().await;
    Ok(u64::try_from(head).unwrap_or_default())
}

/// Puts right whatever the fault may have touched. Errors are told and passed over: the next step may still help, and a
/// cluster that is not well is noticed at the slot's end.
pub(super) async fn mend(act: &mut Act<'_>) {
    let scene = act.scene();
    for mend in act.to_mend() {
        let mended = match mend {
            Mend::Node(index) => mend_node(scene, index).await,
            Mend::Clients => {
                scene.cluster.client_link().heal();
                Ok(())
            }
            Mend::Filter => scene.filter.as_ref().map_or(Ok(()), |filter| filter.clear()),
            Mend::Ways => {
                let ways = scene.cluster.nodes().iter().flat_map(|node| node.database_links());
                ways.for_each(Link::heal);
                Ok(())
            }
            Mend::Disks => scene.cluster.postgres().free_disks(),
            Mend::Postgres => mend_postgres(scene).await,
        };
        if let Err(error) = mended {
            tracing::warn!(f = act.fault.f, ?mend, error = format!("{error:#}"), "could not be mended");
        }
    }
}

async fn mend_node(scene: &Scene, index: usize) -> anyhow::Result<()> {
    let Some(node) = scene.cluster.nodes().get(index) else { return Ok(()) };
    for link in node.database_links() {
        link.heal();
    }
    node.front_link().heal();
    node.set_env(Vec::new());
    node.set_address_space(None);
    if node.running() {
        node.resume();
    } else {
        node.start()?;
    }
    node.wait_ready(NODE_READY).await
}

async fn mend_postgres(scene: &Scene) -> anyhow::Result<()> {
    let postgres = scene.cluster.postgres();
    let server = postgres.server(postgres.current());
    if !server.running() {
        server.start().await?;
    }
    postgres.heal_replication();
    Ok(())
}

/// A failover leaves no standby behind; unless F12 has seen to the old primary, this does, silently.
pub(super) async fn rebuild_pair(board: &Board<'_>) {
    let Some(old) = board.take_old_primary() else { return };
    if let Err(error) = failover::retire(board.scene, &old).await {
        board.give_up(format!("the standby could not be rebuilt: {error:#}"));
    }
}
