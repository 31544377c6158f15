//! What a run measured: pure functions of its history, so a figure can be computed again from the file alone.
//!
//! The relay's silences are read from the log's own stamps, the lag from the commit to the handler of a client. Only a
//! fault that was alone in its window, and that took, has figures that count; safety is the checker's and counts always.

mod faults;
mod timeline;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use self::timeline::Timeline;
use crate::history::{Line, Micros};

/// One second of the lag plot.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// Seconds since the run began.
    pub second: u32,
    /// Events handed over in this second.
    pub events: u32,
    /// Median from COMMIT sent to the handler, microseconds.
    pub p50: u64,
    /// 99th percentile, microseconds.
    pub p99: u64,
    /// The worst, microseconds.
    pub max: u64,
}

/// One fault, as it went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultFigures {
    /// Its number in the plan.
    pub f: u32,
    /// `F1`…
    pub class: String,
    /// The variant.
    pub variant: String,
    /// The target as it was resolved.
    pub target: String,
    /// When it began and when it was healed, microseconds on the run's clock.
    pub on: Micros,
    /// See `on`.
    pub off: Option<Micros>,
    /// The target held the role and the fault took effect.
    pub took: bool,
    /// Progress was seen after the heal.
    pub progressed: bool,
    /// No other fault was active from a moment before it until the clients had caught up.
    pub alone: bool,
    /// Why it was not done, if it was skipped.
    pub skipped: Option<String>,
    /// Name to value; names end in their unit.
    pub figures: BTreeMap<String, f64>,
}

/// Everything measured in one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Length of the recorded run, seconds.
    pub seconds: f64,
    /// Events handed to handlers.
    pub deliveries: u64,
    /// In the order of the plan.
    pub faults: Vec<FaultFigures>,
    /// Second by second.
    pub lag: Vec<Lag>,
    /// Lag of every delivery of the run in buckets of 2^(n/4) microseconds.
    pub lag_buckets: Vec<u64>,
}

/// Reads a history and measures it.
///
/// # Errors
/// Those of the reader.
pub fn measure<E>(lines: impl Iterator<Item = Result<Line, E>>) -> Result<Figures, E> {
    let mut timeline = Timeline::default();
    for line in lines {
        timeline.take(line?);
    }
    timeline.finish();
    let (lag, lag_buckets) = timeline.lag();
    Ok(Figures {
        seconds: timeline.end as f64 / 1e6,
        deliveries: timeline.deliveries.len() as u64,
        faults: faults::measure(&timeline),
        lag,
        lag_buckets,
    })
}

/// Upper edge of a bucket of [`Figures::lag_buckets`], microseconds.
#[must_use]
pub fn bucket_edge(bucket: usize) -> f64 {
    2f64.powf((bucket as f64 + 1.0) / BUCKETS_PER_OCTAVE)
}

/// Quarter octaves: an error of at most 19 %.
const BUCKETS_PER_OCTAVE: f64 = 4.0;

fn bucket(micros: u64) -> usize {
    if micros < 2 { 0 } else { ((micros as f64).log2() * BUCKETS_PER_OCTAVE) as usize }
}

#[cfg(test)]
mod tests;
