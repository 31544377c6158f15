//! Which chunks of terms that this node does not know may ask Postgres for a key: pure, and told the time.
//!
//! NOTIFY asks for no right, so anybody can make chunks of any number of terms up. What nobody can make up is the pid of the
//! backend that sends. So each backend has a budget of its own: a leader's is a new one, and its first chunk is looked up at
//! once, whatever others send. Many backends share one more budget; who comes after it is used up is not looked up, but the
//! log is read, so that a new term is noticed within [`INTERVAL`] all the same.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A backend whose chunk was of no term, or of another's, is looked up again after this. Longer than what a burst of chunks of
/// one batch takes, shorter than the heartbeat of a leader.
pub(super) const INTERVAL: Duration = Duration::from_millis(100);
/// Lookups of new backends in one [`INTERVAL`]. Each costs about 0.3 ms of the follower: a tenth of its time at most.
pub(super) const BUDGET: u32 = 32;
/// Backends that are remembered; more than a server has connections. Beyond, they are forgotten and only the common budget
/// bounds them.
const MAX_SENDERS: usize = 10_000;

/// What to do with a chunk of a term that is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Ask Postgres.
    Ask,
    /// Do not ask; read the log, which tells what there is.
    ReadLog,
    /// Ignore it.
    Ignore,
}

/// Who has asked lately.
#[derive(Debug, Default)]
pub(super) struct Lookups {
    refused: HashMap<u32, Instant>,
    began: Option<Instant>,
    used: u32,
    read_log: bool,
}

impl Lookups {
    /// Whether a chunk that the backend `pid` sent is worth a question at `now`.
    pub(super) fn judge(&mut self, pid: u32, now: Instant) -> Verdict {
        let fresh = |at: Instant| now.saturating_duration_since(at) < INTERVAL;
        if self.refused.get(&pid).is_some_and(|at| fresh(*at)) {
            return Verdict::Ignore;
        }
        if !self.began.is_some_and(fresh) {
            self.began = Some(now);
            self.used = 0;
            self.read_log = false;
        }
        if self.used < BUDGET {
            self.used += 1;
            return Verdict::Ask;
        }
        match std::mem::replace(&mut self.read_log, true) {
            false => Verdict::ReadLog,
            true => Verdict::Ignore,
        }
    }

    /// The backend `pid` announces for no term that it named.
    pub(super) fn refuse(&mut self, pid: u32, now: Instant) {
        if self.refused.len() >= MAX_SENDERS {
            self.refused.clear();
        }
        self.refused.insert(pid, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_backend_is_asked_for_at_once_while_another_floods() {
        let start = Instant::now();
        let mut lookups = Lookups::default();
        let mut asked = 0;
        for millisecond in 0..1_000 {
            let now = start + Duration::from_millis(millisecond);
            for _ in 0..100 {
                if lookups.judge(7, now) == Verdict::Ask {
                    asked += 1;
                    lookups.refuse(7, now);
                }
            }
        }
        assert_eq!(asked, 10, "one an interval");
        assert_eq!(lookups.judge(8, start + Duration::from_secs(1)), Verdict::Ask);
    }

    #[test]
    fn any_number_of_forging_backends_costs_a_budget_and_one_reading_an_interval() {
        let start = Instant::now();
        let mut lookups = Lookups::default();
        let (mut asked, mut read) = (0, 0);
        for pid in 0..50_000 {
            // A second in all.
            let now = start + Duration::from_micros(u64::from(pid) * 20);
            match lookups.judge(pid, now) {
                Verdict::Ask => {
                    asked += 1;
                    lookups.refuse(pid, now);
                }
                Verdict::ReadLog => read += 1,
                Verdict::Ignore => {}
            }
        }
        assert_eq!((asked, read), (10 * BUDGET, 10));
        assert!(lookups.refused.len() <= MAX_SENDERS);
    }
}
