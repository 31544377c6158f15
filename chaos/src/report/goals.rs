//! The figures to reach, by class of fault.

/// What of the values is compared with the goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// No value may exceed it.
    Max,
    /// 99 % may not exceed it.
    P99,
    /// Half may not exceed it.
    Median,
    /// Half must reach it.
    MedianAtLeast,
}

/// One figure to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// `F1`…; `*` for every class.
    pub class: &'static str,
    /// The name of the figure.
    pub figure: &'static str,
    /// What it says.
    pub text: &'static str,
    /// What is compared.
    pub measure: Measure,
    /// In the figure's own unit.
    pub value: f64,
}

const SECOND: f64 = 1e6;

const fn goal(class: &'static str, figure: &'static str, measure: Measure, value: f64, text: &'static str) -> Goal {
    Goal { class, figure, text, measure, value }
}

/// All of them, in the order of the classes.
#[must_use]
pub fn goals() -> &'static [Goal] {
    use Measure::{Max, Median, MedianAtLeast, P99};
    const {
        &[
            goal("F1", "losers_caught_up_us", P99, 5.0 * SECOND, "its clients caught up"),
            goal("F1", "others_silence_us", P99, 0.25 * SECOND, "longest silence of clients of other nodes"),
            goal("F2", "relay_silence_us", Max, SECOND, "kill to relaying again"),
            goal("F2", "relay_silence_us", Median, 0.3 * SECOND, "kill to relaying again"),
            goal("F2", "relay_silence_us", P99, 0.5 * SECOND, "kill to relaying again"),
            goal("F2", "others_silence_us", P99, SECOND, "longest silence of clients of other nodes"),
            goal("F3", "relay_silence_us", P99, 3.0 * SECOND, "pause to a new leader's first row"),
            goal("F4", "out_of_balancer_us", P99, 4.0 * SECOND, "paused node out of the balancer"),
            goal("F5", "relay_silence_us", P99, 3.0 * SECOND, "leader cut off to a new leader's first row"),
            goal("F5", "not_ready_us", P99, 5.0 * SECOND, "follower cut off to not ready"),
            goal("F6", "relay_silence_us", P99, 3.0 * SECOND, "leader cut off to a new leader's first row"),
            goal("F6", "not_ready_us", P99, 5.0 * SECOND, "follower cut off to not ready"),
            goal("F7", "losers_caught_up_us", P99, 30.0 * SECOND, "victims caught up, from the cut"),
            goal("F9", "relay_after_accept_us", P99, 2.0 * SECOND, "Postgres accepts to relaying"),
            goal("F9", "sockets_closed_n", Max, 0.0, "client sockets closed"),
            goal("F10", "relay_after_accept_us", P99, 3.0 * SECOND, "the new primary accepts to relaying"),
            goal("F11", "relay_after_accept_us", P99, 3.0 * SECOND, "the new primary accepts to relaying"),
            goal("F13", "relay_silence_us", P99, 0.5 * SECOND, "backend ended to relaying again"),
            goal("F14", "sockets_closed_n", Max, 0.0, "client sockets closed"),
            goal("F14", "drain_ratio_x", MedianAtLeast, 2.0, "backlog drained, times the writing"),
            goal("F16", "relay_silence_us", P99, SECOND, "longest silence of the relay"),
            goal("F18", "others_silence_us", P99, 0.25 * SECOND, "longest silence of other clients"),
            goal("F19", "losers_caught_up_us", P99, 15.0 * SECOND, "everybody caught up"),
            goal("F23", "revoked_us", P99, SECOND, "revoked to socket closed"),
            goal("F28", "others_silence_us", P99, 0.25 * SECOND, "longest silence of other clients"),
            goal("*", "caught_up_us", Max, 30.0 * SECOND, "healed to every client caught up"),
        ]
    }
}

impl Goal {
    /// The value that is compared, and whether the goal is met; nothing without values.
    #[must_use]
    pub fn judge(&self, values: &[f64]) -> Option<(f64, bool)> {
        let share = match self.measure {
            Measure::Max => 1.0,
            Measure::P99 => 0.99,
            Measure::Median | Measure::MedianAtLeast => 0.5,
        };
        let value = super::quantile(values, share)?;
        let met = if self.measure == Measure::MedianAtLeast { value >= self.value } else { value <= self.value };
        Some((value, met))
    }
}
