//! One fault while it is done: its records, its claims on nodes, what must be mended if it fails; and the board on which
//! the faults of a run see each other.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, bail};
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::IndexedRandom;
use tokio::time::Instant;

use super::failover::OldPrimary;
use super::{FaultEvent, Scene};
use crate::cluster::{Cluster, Node};
use crate::history::{FaultDone, FaultOn, Record};
use crate::plan::PlannedFault;

/// How long a role may be vacant before a fault that needs it gives up.
const ROLE_WAIT: Duration = Duration::from_secs(20);
/// A role that was asked for longer ago than this may have moved.
const ROLE_FRESH: Duration = Duration::from_millis(250);
/// Between two looks at something that is waited for.
pub(super) const POLL: Duration = Duration::from_millis(20);
/// A restarted node is ready within this.
pub(super) const NODE_READY: Duration = Duration::from_secs(45);

/// What the faults of a run know of each other.
pub(super) struct Board<'a> {
    pub(super) scene: &'a Scene,
    on_event: &'a (dyn Fn(&FaultEvent) + Sync),
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    claimed: BTreeSet<usize>,
    old_primary: Option<OldPrimary>,
    branches: u32,
    lost: Option<String>,
}

impl<'a> Board<'a> {
    pub(super) fn new(scene: &'a Scene, on_event: &'a (dyn Fn(&FaultEvent) + Sync)) -> Self {
        Self { scene, on_event, state: Mutex::default() }
    }

    /// Records that a fault was left out.
    pub(super) fn skip(&self, fault: &PlannedFault, why: &str) {
        let (f, class, why) = (fault.f, fault.class.clone(), why.to_owned());
        self.scene.recorder.record(Record::FaultSkipped { f, class: class.clone(), why: why.clone() });
        (self.on_event)(&FaultEvent::Skipped { f, class, why });
    }

    /// The primary that a failover left behind, if none has dealt with it.
    pub(super) fn take_old_primary(&self) -> Option<OldPrimary> {
        self.state.lock().old_primary.take()
    }

    pub(super) fn leave_old_primary(&self, old: OldPrimary) {
        self.state.lock().old_primary = Some(old);
    }

    /// The number of the next lossy failover, from 1.
    pub(super) fn next_branch(&self) -> u32 {
        let mut state = self.state.lock();
        state.branches += 1;
        state.branches
    }

    /// The cluster cannot be brought back: no further fault makes sense.
    pub(super) fn give_up(&self, reason: String) {
        self.state.lock().lost.get_or_insert(reason);
    }

    pub(super) fn lost(&self) -> Option<String> {
        self.state.lock().lost.clone()
    }

    fn claim(&self, node: usize) -> bool {
        self.state.lock().claimed.insert(node)
    }

    fn free(&self, node: usize) {
        self.state.lock().claimed.remove(&node);
    }
}

/// What has to be put right if the fault breaks off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mend {
    /// Its process, its settings and its links.
    Node(usize),
    /// The way of all clients.
    Clients,
    /// The packet filter.
    Filter,
    /// The nodes' ways to both Postgres servers.
    Ways,
    /// The current primary runs, replication flows.
    Postgres,
    /// The disks have space.
    Disks,
}

/// A role that a node can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Leader,
    Follower,
}

/// One fault under way.
pub(super) struct Act<'a> {
    pub(super) board: &'a Board<'a>,
    pub(super) fault: &'a PlannedFault,
    pub(super) random: Xoshiro256PlusPlus,
    pub(super) took: bool,
    pub(super) violations: Vec<String>,
    mends: BTreeSet<Mend>,
    figures: BTreeMap<String, f64>,
    on: Option<Instant>,
    off: Option<Instant>,
    resolved: Option<Instant>,
}

impl Drop for Act<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

impl<'a> Act<'a> {
    pub(super) fn new(board: &'a Board<'a>, fault: &'a PlannedFault) -> Self {
        Self {
            board,
            fault,
            random: Xoshiro256PlusPlus::seed_from_u64(fault.seed),
            took: false,
            violations: Vec::new(),
            mends: BTreeSet::new(),
            figures: BTreeMap::new(),
            on: None,
            off: None,
            resolved: None,
        }
    }

    pub(super) fn scene(&self) -> &'a Scene {
        self.board.scene
    }

    pub(super) fn cluster(&self) -> &'a Cluster {
        &self.board.scene.cluster
    }

    /// Records the beginning.
    pub(super) fn on(&mut self, target: &str) {
        let on = FaultOn {
            f: self.fault.f,
            class: self.fault.class.clone(),
            variant: self.fault.variant.clone(),
            target: target.to_owned(),
        };
        self.on = Some(Instant::now());
        self.scene().recorder.record(Record::FaultOn(on.clone()));
        (self.board.on_event)(&FaultEvent::On(on));
    }

    /// Records the heal; the first call counts.
    pub(super) fn off(&mut self) {
        if self.off.is_none() {
            self.off = Some(Instant::now());
            self.scene().recorder.record(Record::FaultOff { f: self.fault.f });
            (self.board.on_event)(&FaultEvent::Off { f: self.fault.f });
        }
    }

    pub(super) fn began(&self) -> Option<Instant> {
        self.on
    }

    pub(super) fn healed(&self) -> Option<Instant> {
        self.off
    }

    /// When the planned hold is over.
    pub(super) fn until(&self) -> Instant {
        self.on.unwrap_or_else(Instant::now) + Duration::from_millis(self.fault.hold_ms)
    }

    pub(super) async fn hold(&self) {
        tokio::time::sleep_until(self.until()).await;
    }

    /// The variant contains the word.
    pub(super) fn says(&self, word: &str) -> bool {
        self.fault.variant.split(' ').any(|other| other == word)
    }

    pub(super) fn figure(&mut self, name: &str, value: f64) {
        self.figures.insert(name.to_owned(), value);
    }

    pub(super) fn micros(&mut self, name: &str, duration: Duration) {
        self.figure(name, duration.as_micros() as f64);
    }

    /// The run's clock, for what another part subtracts from.
    pub(super) fn stamp(&mut self, name: &str) {
        let now = self.scene().recorder.now();
        self.figure(name, now as f64);
    }

    pub(super) fn violation(&mut self, text: impl Into<String>) {
        self.violations.push(text.into());
    }

    pub(super) fn mends(&mut self, mend: Mend) {
        self.mends.insert(mend);
    }

    pub(super) fn to_mend(&self) -> Vec<Mend> {
        self.mends.iter().copied().collect()
    }

    /// Waits for a node that has the role and that no other fault has, and claims it.
    pub(super) async fn claim(&mut self, role: Role) -> anyhow::Result<&'a Node> {
        let deadline = Instant::now() + ROLE_WAIT;
        loop {
            if let Some(node) = self.try_claim(role).await {
                return Ok(node);
            }
            if Instant::now() > deadline {
                bail!("no node that is free was {role:?} within {ROLE_WAIT:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Claims any running node.
    pub(super) async fn claim_any(&mut self) -> anyhow::Result<&'a Node> {
        let nodes = self.cluster().nodes();
        let order = nodes.sample(&mut self.random, nodes.len()).collect::<Vec<_>>();
        let free = order.into_iter().find(|node| node.running() && self.board.claim(node.index()));
        let node = free.context("no node is free")?;
        self.claimed(node);
        Ok(node)
    }

    async fn try_claim(&mut self, role: Role) -> Option<&'a Node> {
        let leader = self.cluster().leader().await.ok()??;
        let nodes = self.cluster().nodes();
        let fits = |node: &&Node| node.running() && (node.index() == leader) == (role == Role::Leader);
        let candidates: Vec<_> = nodes.iter().filter(fits).collect();
        let order = candidates.sample(&mut self.random, candidates.len()).copied().collect::<Vec<_>>();
        let node = order.into_iter().find(|node| self.board.claim(node.index()))?;
        self.claimed(node);
        Some(node)
    }

    fn claimed(&mut self, node: &Node) {
        self.mends.insert(Mend::Node(node.index()));
        self.resolved = Some(Instant::now());
    }

    /// The target was found to have its role so recently that it had it when the fault began.
    pub(super) fn role_held(&self) -> bool {
        match (self.resolved, self.on) {
            (Some(resolved), Some(on)) => on.saturating_duration_since(resolved) <= ROLE_FRESH,
            _ => false,
        }
    }

    /// Gives claimed nodes back to the other faults.
    pub(super) fn release(&self) {
        for mend in &self.mends {
            if let Mend::Node(index) = mend {
                self.board.free(*index);
            }
        }
    }

    /// Records how it went.
    pub(super) fn done(&mut self, progressed: bool, caught_up: Option<u64>) {
        let done = FaultDone {
            f: self.fault.f,
            class: self.fault.class.clone(),
            took: self.took,
            progressed,
            caught_up,
            figures: std::mem::take(&mut self.figures),
            violations: std::mem::take(&mut self.violations),
        };
        self.scene().recorder.record(Record::FaultDone(done.clone()));
        (self.board.on_event)(&FaultEvent::Done(done));
    }
}

/// Looks until `found` says yes or the time is up; says how long it took.
pub(super) async fn until<F: Future<Output = bool>>(
    deadline: Instant,
    mut found: impl FnMut() -> F,
) -> Option<Duration> {
    let began = Instant::now();
    loop {
        if tokio::time::timeout_at(deadline + POLL, found()).await.unwrap_or(false) {
            return Some(began.elapsed());
        }
        if Instant::now() >= deadline {
            return None;
        }
        tokio::time::sleep(POLL).await;
    }
}
