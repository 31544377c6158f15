//! Exponential back-off with full jitter.
//!
//! Pure: the random number is an argument.

use std::time::Duration;

/// Growth from `base` by doubling up to `cap`; each wait is drawn uniformly below the current bound.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempt: u32,
}

impl Backoff {
    /// Begins at `base`, never waits longer than `cap`.
    #[must_use]
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, attempt: 0 }
    }

    /// The next wait; `fraction` in 0..1 is the jitter.
    pub fn next_wait(&mut self, fraction: f64) -> Duration {
        // 2^20 × any base is beyond every cap in use; more would overflow.
        let bound = self.base.saturating_mul(1 << self.attempt.min(20)).min(self.cap);
        self.attempt = self.attempt.saturating_add(1);
        bound.mul_f64(fraction.clamp(0.0, 1.0))
    }

    /// How many waits were drawn since the last success.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempt
    }

    /// After a success: begin anew.
    pub const fn reset(&mut self) {
        self.attempt = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let waits: Vec<u128> = (0..6).map(|_| backoff.next_wait(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next_wait(0.5).as_millis(), 50);
    }

    #[test]
    fn many_attempts_do_not_overflow() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        for _ in 0..100 {
            assert!(backoff.next_wait(0.999) <= Duration::from_secs(30));
        }
    }
}
