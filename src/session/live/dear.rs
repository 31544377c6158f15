//! What a connection's subscriptions may cost when they are dear.
//!
//! Looking at events for them is done in threads that all connections share ([`crate::hub::look`]), one look of a
//! connection at a time, and within a budget of thread time. Over it they wait: their positions stay behind, and nobody
//! else's. One that only falls further behind while it waits is ended, so that its client learns why it is late.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::supply::Step;
use super::{Done, Session};
use crate::cursor::Seq;
use crate::hub::group::Group;
use crate::hub::look::{Asker, Look, Worked};
use crate::protocol::error::{ErrorCode, WireError};

/// Thread time of one connection in each second.
const SHARE: f64 = 0.25;
/// Seconds of thread time that may come at once after a quiet time.
const BURST: f64 = 1.0;
/// A subscription that has waited this long for the budget, in all, without coming nearer to the log's end has no prospect.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection's thread time.
#[derive(Debug)]
pub(super) struct Budget {
    // Seconds; below zero: a debt.
    left: f64,
    at: Instant,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self { left: BURST, at: now }
    }

    /// How long to wait before the next look; None: not at all.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * SHARE).min(BURST);
        self.at = now;
        (self.left < 0.0).then(|| Duration::from_secs_f64(-self.left / SHARE))
    }

    /// Whether a whole burst is there: for some seconds it was not the budget that anybody waited for.
    fn is_full(&self) -> bool {
        self.left >= BURST
    }

    fn spend(&mut self, time: Duration) {
        self.left -= time.as_secs_f64();
    }
}

/// A subscription that waits because its connection is over the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Over {
    // For the budget alone: neither what its client takes nor a pause of the process counts.
    waited: Duration,
    // Events that it was behind when that began.
    behind: Seq,
}

impl Over {
    /// Where it stands with another wait; None: it has no prospect.
    fn again(before: Option<Self>, wait: Duration, behind: Seq) -> Option<Self> {
        match before {
            Some(over) if over.waited < PATIENCE => Some(Self { waited: over.waited + wait, ..over }),
            Some(over) if behind >= over.behind => None,
            _ => Some(Self { waited: wait, behind }),
        }
    }
}

impl Session {
    /// What comes next for this place is dear to find out.
    pub(super) fn look(&mut self, index: usize, look: Box<Look>, now: Instant) -> Step {
        let (newest, count) = (self.context.hub.edge().deliverable.seq, self.places.len().max(1));
        let Some(place) = self.places.get_mut(index) else { return Step::Nothing };
        place.dear = true;
        // Whoever waits holds no memory, nor does it hold a look's twice.
        place.let_go_of_page();
        if self.looking {
            return Step::Nothing;
        }
        if let Some(wait) = self.budget.wait(now) {
            place.over = Over::again(place.over, wait, newest.saturating_sub(place.passed));
            if place.over.is_none() {
                let why = "it has waited for this connection's share for a minute in all, and falls behind";
                return self.too_expensive(index, why);
            }
            self.looking = true;
            self.context.metrics.filter_waits_total.inc();
            self.work.push(Box::pin(async move {
                tokio::time::sleep(wait).await;
                Done::Rested
            }));
            return Step::Begun;
        }
        if self.budget.is_full() {
            // Whatever it is late by now, it is not by waiting for the budget.
            place.over = None;
        }
        (self.looking, place.reading) = (true, true);
        // The others of this connection have their turn before this one has another. (Not after a wait: it is this one that
        // waited.)
        self.turn = (index + 1) % count;
        let (id, group, generation) = (Arc::clone(&place.id), Arc::clone(place.tap.group()), place.generation);
        // In a task of its own: a session whose client does not read is not polled, and others may wait for this look.
        let (asker, (mut sender, receiver)) = (Asker::default(), oneshot::channel());
        let gone = asker.gone();
        self.context.lifecycle.spawn("look", async move {
            tokio::select! {
                looked = look.run(gone) => drop(sender.send(looked)),
                () = sender.closed() => {}
            }
        });
        self.work.push(Box::pin(async move {
            let _asker = asker;
            let (worked, took) = receiver.await.unwrap_or((Worked::Cancelled, Duration::ZERO));
            Done::Looked { id, generation, group, worked, took }
        }));
        Step::Begun
    }

    /// A look is over.
    pub(super) fn looked(
        &mut self,
        id: &Arc<str>,
        (generation, group): (u64, &Arc<Group>),
        worked: Worked,
        took: Duration,
    ) {
        self.looking = false;
        self.budget.spend(took);
        // By pointer: a later subscription of the same id is not the one that looked.
        let Some(index) = self.places.iter().position(|place| Arc::ptr_eq(&place.id, id)) else { return };
        let place = &mut self.places[index];
        place.reading = false;
        // What was found in the log as it was before a new epoch may be of a tail that is lost; what was found for another
        // group was found for another key.
        if generation != place.generation || !Arc::ptr_eq(place.tap.group(), group) {
            return;
        }
        match worked {
            Worked::Done(pull) => place.found = Some(pull),
            Worked::TooExpensive => {
                self.too_expensive(index, "one transaction takes it longer than any may");
            }
            Worked::More | Worked::Cancelled => {}
        }
    }

    /// Ends a subscription that costs too much, and says so.
    pub(super) fn too_expensive(&mut self, index: usize, why: &str) -> Step {
        let Some(place) = self.places.get(index) else { return Step::Nothing };
        let what = format!(
            "finding the events of this subscription costs this node too much: {why}; ask for less (LIKE with a wildcard \
             first reads whole texts, once for each such term) or test it in the client"
        );
        self.machine.refused(&place.id, WireError::never(ErrorCode::TooExpensive, what));
        Step::Said
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_over_its_thread_time_waits_until_it_is_paid() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        assert_eq!(budget.wait(start), None);
        budget.spend(Duration::from_secs(3));
        assert_eq!(budget.wait(start), Some(Duration::from_secs(8)));
        assert_eq!(budget.wait(start + Duration::from_secs(4)), Some(Duration::from_secs(4)));
        assert_eq!(budget.wait(start + Duration::from_secs(8)), None);
        // A quiet day is worth no more than a burst.
        assert_eq!(budget.wait(start + Duration::from_secs(86_400)), None);
        budget.spend(Duration::from_secs(2));
        assert!(budget.wait(start + Duration::from_secs(86_400)).is_some());
    }

    #[test]
    fn only_one_who_falls_behind_in_a_minute_of_waiting_has_no_prospect() {
        let seconds = Duration::from_secs;
        let first = Over::again(None, seconds(30), 100);
        let second = Over::again(first, seconds(30), 1_000);
        assert_eq!(second, Some(Over { waited: seconds(60), behind: 100 }), "not over a minute yet");
        assert_eq!(Over::again(second, seconds(1), 100), None);
        let nearer = Over::again(second, seconds(1), 99);
        assert_eq!(nearer, Some(Over { waited: seconds(1), behind: 99 }));
    }

    /// Found in review: a clock on the wall counted a client that does not read, and a process that was stopped.
    #[test]
    fn a_burst_that_nobody_used_says_that_the_budget_was_not_waited_for() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        budget.spend(Duration::from_secs(3));
        assert!(budget.wait(start + Duration::from_secs(8)).is_none() && !budget.is_full(), "just paid");
        assert!(budget.wait(start + Duration::from_secs(12)).is_none() && budget.is_full(), "left alone for a while");
    }
}
