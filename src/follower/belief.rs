//! Whether a node may believe that it has met the log's end: pure, and told the time.
//!
//! A process that was stopped does not know it. It finds out by the time between two turns of its loop; whatever it was
//! doing meanwhile, a reading of the log included, is of the past.

use std::time::{Duration, Instant};

use crate::mutant::{self, Mutant};

/// A longer pause between two turns means that the process was stopped.
pub(super) const PAUSE: Duration = Duration::from_secs(3);

/// What the node believes of its own place, and when it last had reason to.
#[derive(Debug, Default)]
pub(super) struct Belief {
    current: bool,
    turned: Option<Instant>,
    /// Rises with every reason to doubt: what was read before it is of the past.
    doubts: u64,
}

impl Belief {
    /// Takes note that the loop turns, at `now`; true when it had stood still. Then nothing is believed any more, whatever
    /// was under way.
    pub(super) fn turn(&mut self, now: Instant) -> bool {
        let stood = self.turned.replace(now).is_some_and(|at| now.saturating_duration_since(at) > PAUSE)
            && !mutant::is(Mutant::StaleAfterPause);
        if stood {
            self.doubt();
        }
        stood
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
        let mut belief = Belief::default();
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
        let mut belief = Belief::default();
        belief.turn(start);
        let doubts = belief.doubts();
        // SIGSTOP while the statement is on its way; its answer comes after SIGCONT.
        belief.turn(at(start, 10));
        assert!(!belief.met_the_end(doubts));
        assert!(!belief.is_current(at(start, 10)));
        assert!(belief.met_the_end(belief.doubts()), "the next reading counts");
    }
}
