//! A slot: its faults begin at their times, overlap, heal, and only when all are healed is recovery measured.

use std::sync::OnceLock;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::act::{Act, Board};
use super::{impossible, perform, recovery};
use crate::plan::{GROUP, PlannedFault};

/// What a fault may take beyond its hold: resolving a role, restarting, rebuilding a standby.
const BEYOND_HOLD: Duration = Duration::from_secs(120);
/// A cluster that is not well this long after a slot is lost.
const BACK_TO_HEALTH: Duration = Duration::from_secs(90);

pub(super) struct Slot<'a> {
    board: &'a Board<'a>,
    faults: &'a [PlannedFault],
    began: Instant,
    /// Faults that are not healed yet, the group's own entry apart.
    unhealed: watch::Sender<usize>,
    /// When the last of a group was healed.
    healed: OnceLock<Instant>,
    /// Beginning and heal of those that took effect.
    held: Mutex<Vec<(Instant, Instant)>>,
}

impl<'a> Slot<'a> {
    pub(super) fn new(board: &'a Board<'a>, faults: &'a [PlannedFault]) -> Self {
        let members = faults.iter().filter(|fault| fault.class != GROUP).count();
        Self {
            board,
            faults,
            began: Instant::now(),
            unhealed: watch::Sender::new(members),
            healed: OnceLock::new(),
            held: Mutex::default(),
        }
    }

    /// Runs it until the cluster is well again.
    pub(super) async fn run(&self) {
        if self.faults.iter().all(|fault| fault.alone) {
            // A failover and the return of the old primary: one after the other.
            for fault in self.faults {
                self.single(fault, true).await;
            }
        } else {
            join_all(self.faults.iter().map(|fault| self.member(fault))).await;
        }
        recovery::rebuild_pair(self.board).await;
    }

    async fn member(&self, fault: &'a PlannedFault) {
        let first = self.faults.first().map_or(0, |first| first.at_ms);
        let after = Duration::from_millis(fault.at_ms.saturating_sub(first));
        tokio::time::sleep_until(self.began + after).await;
        if fault.class == GROUP {
            self.group(fault).await;
        } else {
            self.single(fault, false).await;
        }
    }

    /// The group as a fault of its own: all of it, from the first beginning to the last heal.
    async fn group(&self, fault: &'a PlannedFault) {
        let mut act = Act::new(self.board, fault);
        act.on("group");
        self.all_healed().await;
        act.off();
        act.took = self.overlapped();
        self.finish(&mut act, true).await;
    }

    async fn single(&self, fault: &'a PlannedFault, alone: bool) {
        let refusal = impossible(fault).map(str::to_owned);
        let refusal = refusal.or_else(|| self.board.scene.abilities.allows(&fault.class, &fault.variant).err());
        if let Some(why) = refusal {
            self.board.skip(fault, &why);
            self.unhealed.send_modify(|left| *left = left.saturating_sub(1));
            return;
        }
        let mut act = Act::new(self.board, fault);
        let done = self.attempt(&mut act).await;
        if let Some(began) = act.began() {
            act.off();
            if act.took {
                self.held.lock().push((began, act.healed().unwrap_or_else(Instant::now)));
            }
        }
        act.release();
        self.unhealed.send_modify(|left| *left = left.saturating_sub(1));
        if let Err(error) = done
            && act.began().is_none()
        {
            self.board.skip(fault, &format!("{error:#}"));
            return;
        }
        if !alone {
            self.all_healed().await;
        }
        self.finish(&mut act, alone).await;
    }

    /// Does it, within bounds, and mends what an error left behind.
    async fn attempt(&self, act: &mut Act<'a>) -> anyhow::Result<()> {
        let limit = Duration::from_millis(act.fault.hold_ms) + BEYOND_HOLD;
        let done = match tokio::time::timeout(limit, perform(act)).await {
            Ok(done) => done,
            Err(_) => Err(anyhow::anyhow!("not done within {limit:?}")),
        };
        if let Err(error) = &done {
            let (class, variant) = (&act.fault.class, &act.fault.variant);
            tracing::warn!(f = act.fault.f, class, variant, error = format!("{error:#}"), "a fault broke off");
            act.took = false;
            recovery::mend(act).await;
        }
        done
    }

    /// Measures how clients recover, and with `all` waits until the cluster is well.
    async fn finish(&self, act: &mut Act<'a>, all: bool) {
        let own = act.healed().unwrap_or_else(Instant::now);
        let healed = self.healed.get().map_or(own, |last| own.max(*last));
        let recovered = recovery::measure(act, healed).await;
        if all && let Err(error) = self.board.scene.cluster.wait_healthy(BACK_TO_HEALTH).await {
            let reason = format!("the cluster was not well {BACK_TO_HEALTH:?} after the heal: {error:#}");
            act.violation(reason.clone());
            self.board.give_up(reason);
        }
        act.done(recovered.progressed, recovered.caught_up);
    }

    async fn all_healed(&self) {
        // The sender lives as long as the slot, so the wait ends with the last heal.
        let _ = self.unhealed.subscribe().wait_for(|left| *left == 0).await;
        self.healed.get_or_init(Instant::now);
    }

    /// Whether two held at once.
    fn overlapped(&self) -> bool {
        let held = self.held.lock();
        held.iter().enumerate().any(|(n, one)| held[n + 1..].iter().any(|other| one.0 < other.1 && other.0 < one.1))
    }
}
