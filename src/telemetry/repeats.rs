//! Failures that repeat, as one log line for many.
//!
//! Pure: time is an argument.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines of one failure that goes on: often enough to see that it does, rare enough to leave the rest of the
/// log readable through an outage of hours.
const REPEAT_INTERVAL: Duration = Duration::from_secs(60);

/// One kind of failure: when it was last written down, and how often it happened since.
#[derive(Debug, Default)]
pub struct Repeats(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    written: Option<Instant>,
    left_out: u64,
}

impl Repeats {
    /// It happened. Some: write it down, with how many were left out since the last line.
    pub fn happened(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = state.written.is_none_or(|written| now.duration_since(written) >= REPEAT_INTERVAL);
        if !is_due {
            state.left_out += 1;
            return None;
        }
        state.written = Some(now);
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found in use: an outage wrote four lines a second.
    #[test]
    fn an_outage_of_minutes_is_a_line_a_minute_with_its_count() {
        let (repeats, start) = (Repeats::default(), Instant::now());
        let lines: Vec<_> =
            (0..600).filter_map(|tick| repeats.happened(start + Duration::from_millis(250) * tick)).collect();
        assert_eq!(lines, [0, 239, 239]);
    }
}
