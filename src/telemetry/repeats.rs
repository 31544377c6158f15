//! Failures that repeat, as one log line for many.
//!
//! Pure: time is an argument.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Between two lines of one failure that goes on: often enough to see that it does, rare enough to leave the rest of the
/// log readable through an outage of hours.
const REPEAT_INTERVAL: Duration = Duration::from_secs(60);
/// Different failures that are written within it: another cause is news, but a text that is never the same twice is not.
const MAX_CAUSES: usize = 8;

/// One kind of failure: which causes of it were written down lately, and how many lines were left out since the last.
#[derive(Debug, Default)]
pub struct Repeats(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    // Hashes of the causes, and when each was written: at most [`MAX_CAUSES`].
    written: Vec<(u64, Instant)>,
    left_out: u64,
}

impl Repeats {
    /// It happened, for this cause. Some: write it down, with how many were left out since the last line.
    pub fn happened(&self, now: Instant, cause: &str) -> Option<u64> {
        let mut hasher = DefaultHasher::new();
        cause.hash(&mut hasher);
        let cause = hasher.finish();
        let mut state = self.0.lock();
        state.written.retain(|(_, written)| now.saturating_duration_since(*written) < REPEAT_INTERVAL);
        if state.written.len() >= MAX_CAUSES || state.written.iter().any(|(known, _)| *known == cause) {
            state.left_out += 1;
            return None;
        }
        state.written.push((cause, now));
        Some(std::mem::take(&mut state.left_out))
    }

    /// It is over: the next time is news. True: something was written of it.
    pub fn over(&self) -> bool {
        let mut state = self.0.lock();
        state.left_out = 0;
        !std::mem::take(&mut state.written).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found in use: an outage wrote four lines a second.
    #[test]
    fn an_outage_of_minutes_is_a_line_a_minute_with_its_count() {
        let (repeats, start) = (Repeats::default(), Instant::now());
        let tick = |tick| repeats.happened(start + Duration::from_millis(250) * tick, "refused");
        let lines: Vec<_> = (0..600).filter_map(tick).collect();
        assert_eq!(lines, [0, 239, 239]);
    }

    /// Found in review: within a minute of one failure, another was left out.
    #[test]
    fn another_cause_and_one_after_the_end_are_news() {
        let (repeats, start) = (Repeats::default(), Instant::now());
        assert_eq!(repeats.happened(start, "refused"), Some(0));
        assert_eq!(repeats.happened(start, "refused"), None);
        assert_eq!(repeats.happened(start, "no such role"), Some(1));
        assert_eq!(repeats.happened(start, "no such role"), None);
        assert!(repeats.over() && !repeats.over());
        assert_eq!(repeats.happened(start, "refused"), Some(0));
    }

    #[test]
    fn texts_that_are_never_the_same_are_bounded_too() {
        let (repeats, start) = (Repeats::default(), Instant::now());
        let lines = (0..1_000).filter_map(|number| repeats.happened(start, &format!("port {number}"))).count();
        assert_eq!(lines, MAX_CAUSES);
        assert_eq!(repeats.happened(start + REPEAT_INTERVAL, "port 0"), Some(992));
    }
}
