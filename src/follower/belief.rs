//! Whether a node may believe that it has met the log's end: pure, and told the time.
//!
//! A process that was stopped does not know it. It finds out by the time between two turns of its loop; whatever it was
//! doing meanwhile, a reading of the log included, is of the past.

use std::time::{Duration, Instant};

use crate::mutant::{self, Mutant};

/// A longer pause between two turns means that the process was stopped.
pub(super) const PAUSE: Duration = Duration::from_secs(3);

/// What the node believes of its own place, and when it last had reason to.
#[derive(Debug)]
pub(super) struct Belief {
    current: bool,
    turned: Option<Instant>,
    /// From when on an answer of Postgres is missing: its last one, the start, or the end of a pause of this process.
    waiting_since: Instant,
    /// Rises with every reason to doubt: what was read before it is of the past.
    doubts: u64,
}

impl Belief {
    /// Of a node that starts at `now` and knows nothing.
    pub(super) const fn new(now: Instant) -> Self {
        Self { current: false, turned: None, waiting_since: now, doubts: 0 }
    }

    /// Takes note that the loop turns, at `now`; true when it had stood still. Then nothing is believed any more, whatever
    /// was under way.
    pub(super) fn turn(&mut self, now: Instant) -> bool {
        let before = self.turned.replace(now);
        let stood =
            before.is_some_and(|at| now.saturating_duration_since(at) > PAUSE) && !mutant::is(Mutant::StaleAfterPause);
        if stood {
            self.doubt();
        }
        if stood || before.is_none() {
            // Nobody asked while the process was stopped: that was no silence of Postgres. And when the loop begins,
            // Postgres has just been reached.
            self.waiting_since = now;
        }
        stood
    }

    /// Postgres has answered, whatever it was.
    pub(super) const fn answered(&mut self, now: Instant) {
        self.waiting_since = now;
    }

    /// How long Postgres has owed an answer at `now`. What came after the loop's last turn is unknown, so it is not counted:
    /// a process that was stopped does not know it before it turns again.
    pub(super) fn silence(&self, now: Instant) -> Duration {
        self.turned.unwrap_or(now).saturating_duration_since(self.waiting_since)
    }

    /// There is a reason not to believe: nothing counts but a reading that begins from here on.
    pub(super) fn doubt(&mut self) {
        self.current = false;
        self.doubts += 1;
    }

    /// The log's end was met by a reading that began when there had been `doubts`; false when there is a new one.
    pub(super) fn met_the_end(&mut self, doubts: u64) -> bool {
        self.current = self.doubts == doubts;
        self.current
    }

    /// The loop turns several times a second; when it has not, the process stood still and knows nothing.
    pub(super) fn is_current(&self, now: Instant) -> bool {
        self.current && self.turned.is_some_and(|at| now.saturating_duration_since(at) < PAUSE)
    }

    /// How often there was a reason to doubt, for [`met_the_end`](Self::met_the_end).
    pub(super) const fn doubts(&self) -> u64 {
        self.doubts
    }

    /// Met the log's end, and no reason to doubt since; whether the loop still turns is not asked.
    pub(super) const fn met(&self) -> bool {
        self.current
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_process_that_stood_still_between_two_turns_believes_nothing() {
        let start = Instant::now();
        let mut belief = Belief::new(start);
        assert!(!belief.turn(start));
        assert!(belief.met_the_end(belief.doubts()));
        assert!(belief.is_current(at(start, 1)));
        assert!(!belief.is_current(at(start, 10)), "before it has turned again");
        assert!(belief.turn(at(start, 10)));
        assert!(!belief.is_current(at(start, 10)));
    }

    /// Found by the chaos campaign: the statement's own turn hid the pause from the loop.
    #[test]
    fn a_process_that_stood_still_while_it_read_the_log_reads_it_again() {
        let start = Instant::now();
        let mut belief = Belief::new(start);
        belief.turn(start);
        let doubts = belief.doubts();
        // SIGSTOP while the statement is on its way; its answer comes after SIGCONT.
        belief.turn(at(start, 10));
        assert!(!belief.met_the_end(doubts));
        assert!(!belief.is_current(at(start, 10)));
        assert!(belief.met_the_end(belief.doubts()), "the next reading counts");
    }

    /// Silence was taken for endless until the first reading of the log had ended: a client that connected before it made
    /// the node send everybody away.
    #[test]
    fn silence_counts_from_the_start_and_never_over_a_pause() {
        let start = Instant::now();
        let mut belief = Belief::new(start);
        assert_eq!(belief.silence(at(start, 90)), Duration::from_secs(90), "Postgres is not reached");
        belief.turn(at(start, 100));
        assert_eq!(belief.silence(at(start, 100)), Duration::ZERO, "it was, just now");
        belief.turn(at(start, 102));
        assert_eq!(belief.silence(at(start, 102)), Duration::from_secs(2), "the first reading has not ended");
        belief.answered(at(start, 102));
        assert_eq!(belief.silence(at(start, 102)), Duration::ZERO);
        belief.turn(at(start, 104));
        // Stopped for a minute: the loop's next turn is the first to know.
        assert_eq!(belief.silence(at(start, 164)), Duration::from_secs(2));
        assert!(belief.turn(at(start, 164)));
        assert_eq!(belief.silence(at(start, 164)), Duration::ZERO);
        belief.turn(at(start, 165));
        assert_eq!(belief.silence(at(start, 165)), Duration::from_secs(1));
    }
}
