//! What a look really costs: processor time of its thread.
//!
//! A clock on the wall also runs while the process is stopped, or waits for a processor; it would charge a client with
//! what the machine does.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// Begun in one thread, and asked there.
#[derive(Clone, Copy, Debug)]
pub(super) struct ThreadTime {
    wall: Instant,
    // None: the system does not tell.
    processor: Option<Duration>,
}

impl ThreadTime {
    pub(super) fn begin() -> Self {
        Self { wall: Instant::now(), processor: processor() }
    }

    pub(super) fn elapsed(&self) -> Duration {
        match (self.processor, processor()) {
            (Some(begin), Some(now)) => now.saturating_sub(begin),
            _ => self.wall.elapsed(),
        }
    }

    /// Whether it is more than `limit`. Cheap while it is not: the clock on the wall is never behind.
    pub(super) fn exceeds(&self, limit: Duration) -> bool {
        self.wall.elapsed() > limit && self.elapsed() > limit
    }
}

fn processor() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_waits_is_not_charged_and_one_that_works_is() {
        const LIMIT: Duration = Duration::from_millis(20);
        let time = ThreadTime::begin();
        std::thread::sleep(LIMIT * 2);
        assert!(!time.exceeds(LIMIT), "{:?} for sleeping", time.elapsed());
        while !time.exceeds(LIMIT) {
            std::hint::spin_loop();
        }
        assert!(time.elapsed() > LIMIT);
    }
}
