//! What is done to the cluster: a plan is carried out, and each fault leaves its records in the history.
//!
//! Slots follow each other; the faults of one slot overlap. Each resolves its role when it begins, says what it took,
//! holds, heals, and then measures how long clients needed. An error inside a fault never ends a run: what it touched is
//! mended and the fault counts as not taken. Nothing here decides whether a promise was kept, except where only the
//! fault can see it.

mod act;
mod clients;
mod clock;
mod connections;
mod disks;
mod failover;
mod failpoints;
mod feed;
mod keys;
mod load;
mod memory;
mod neighbour;
mod partitions;
mod processes;
mod raw;
mod recovery;
mod slot;
mod tracking;
mod transactions;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use self::act::{Act, Board};
use self::slot::Slot;
use crate::cluster::Cluster;
use crate::cluster::packet_filter::PacketFilter;
use crate::history::{FaultDone, FaultOn, Recorder};
use crate::plan::{Plan, PlannedFault};
use crate::preflight::Abilities;
use crate::workload::Workload;

/// A slot that would begin later than this after its time is left out: the run would not end.
const LATE_LIMIT: Duration = Duration::from_secs(120);

/// What faults are done to.
#[expect(missing_debug_implementations, reason = "its parts are processes and sockets")]
pub struct Scene {
    /// The processes.
    pub cluster: Arc<Cluster>,
    /// Its clients tell who has caught up.
    pub workload: Arc<Workload>,
    /// Takes the records.
    pub recorder: Recorder,
    /// What the machine can do.
    pub abilities: Abilities,
    /// Where the sandbox has one.
    pub filter: Option<PacketFilter>,
}

/// News for whoever watches a run.
#[derive(Clone, Debug, PartialEq)]
pub enum FaultEvent {
    /// A fault begins.
    On(FaultOn),
    /// It is healed.
    Off {
        /// Its number.
        f: u32,
    },
    /// It is over.
    Done(FaultDone),
    /// It was left out.
    Skipped {
        /// Its number.
        f: u32,
        /// Its class.
        class: String,
        /// Why.
        why: String,
    },
}

/// Runs the whole plan. Every fault leaves `FaultOn`, `FaultOff` and `FaultDone`, or `FaultSkipped`, in the recorder.
///
/// Why it ended early, if it did: the cluster did not come back after a fault. What happened until then is recorded, and must
/// be judged.
pub async fn inject(scene: &Scene, plan: &Plan, on_event: impl Fn(&FaultEvent) + Sync) -> Option<String> {
    let board = Board::new(scene, &on_event);
    let began = Instant::now();
    for faults in plan.slots() {
        let Some(first) = faults.first() else { continue };
        let at = began + Duration::from_millis(first.at_ms);
        tokio::time::sleep_until(at).await;
        if at.elapsed() > LATE_LIMIT {
            for fault in faults {
                board.skip(fault, "earlier faults took longer than planned: no time is left");
            }
            continue;
        }
        Slot::new(&board, faults).run().await;
        if let Some(reason) = board.lost() {
            return Some(reason);
        }
    }
    None
}

/// Does one fault up to its heal.
async fn perform(act: &mut Act<'_>) -> anyhow::Result<()> {
    match act.fault.class.as_str() {
        "F1" | "F2" => processes::kill(act).await,
        "F3" => processes::pause_leader(act).await,
        "F4" => processes::pause_follower(act).await,
        "F5" | "F6" => partitions::node_and_postgres(act).await,
        "F7" => partitions::clients_and_nodes(act).await,
        "F8" => partitions::slow_network(act).await,
        "F9" => failover::restart_postgres(act).await,
        "F10" => failover::synchronous(act).await,
        "F11" => failover::lossy(act).await,
        "F12" => failover::old_primary_returns(act).await,
        "F13" => connections::terminate_backend(act).await,
        "F14" => load::starve(act).await,
        "F15" => disks::fill(act).await,
        "F16" => transactions::trouble(act).await,
        "F17" | "F26" => feed::trouble(act).await,
        "F18" => clients::slow(act).await,
        "F19" => clients::storm(act).await,
        "F20" => processes::rolling_restart(act).await,
        "F21" => clock::jump(act).await,
        "F23" if matches!(act.fault.variant.as_str(), "untrack" | "gap") => tracking::missing(act).await,
        "F23" => keys::revoke(act).await,
        "F24" => clients::hostile(act).await,
        "F27" => memory::cap(act).await,
        "F28" => neighbour::noisy(act).await,
        "FP" => failpoints::set(act).await,
        other => anyhow::bail!("nobody knows how to do {other}"),
    }
}

/// Why this release cannot do a fault on any machine.
fn impossible(fault: &PlannedFault) -> Option<&'static str> {
    match (fault.class.as_str(), fault.variant.as_str()) {
        ("F22", _) => Some("there is no Kafka sink yet"),
        ("F20", "mixed versions") => Some("there is no second release to mix with"),
        _ => None,
    }
}
