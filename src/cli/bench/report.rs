//! What a run found: figures with their medians and spread, the machine and the versions they belong to.

use std::fmt::Write as _;
use std::fs;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::cli::{print, print_json};

/// Latencies are told apart between a microsecond and a minute.
const LONGEST_US: u64 = 60_000_000;

/// Where a figure should be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn is_reached(self, value: f64) -> bool {
        match self {
            Self::AtLeast(goal) => value >= goal,
            Self::AtMost(goal) => value <= goal,
        }
    }
}

/// One measured quantity, once for each run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figure {
    name: String,
    unit: &'static str,
    median: f64,
    min: f64,
    max: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    goal: Option<Goal>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reached: Option<bool>,
    runs: Vec<f64>,
}

/// Everything that one `tidewire bench` found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    bench: &'static str,
    command: String,
    machine: Machine,
    /// Of Tidewire and of Postgres, and the settings of the latter that decide about durability.
    versions: Vec<(String, String)>,
    figures: Vec<Figure>,
    notes: Vec<String>,
}

/// Where the figures were taken.
#[derive(Debug, Serialize)]
struct Machine {
    processor: String,
    cores: usize,
    memory_mb: u64,
    kernel: String,
}

impl Report {
    pub(super) fn new(bench: &'static str) -> Self {
        let mut report = Self {
            bench,
            command: format!("tidewire {}", std::env::args().skip(1).collect::<Vec<_>>().join(" ")),
            machine: Machine::this(),
            versions: vec![("tidewire".into(), env!("CARGO_PKG_VERSION").into())],
            figures: Vec::new(),
            notes: Vec::new(),
        };
        if cfg!(debug_assertions) {
            report.note("this is a debug build: its figures mean nothing");
        }
        report
    }

    pub(super) fn version(&mut self, what: &str, version: String) {
        self.versions.push((what.to_owned(), version));
    }

    /// One figure from its runs; none when nothing could be measured.
    pub(super) fn figure(&mut self, name: impl Into<String>, unit: &'static str, goal: Option<Goal>, runs: Vec<f64>) {
        let mut sorted = runs.clone();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first().copied(), sorted.last().copied()) else { return };
        let middle = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        } else {
            sorted[middle]
        };
        let reached = goal.map(|goal| goal.is_reached(median));
        self.figures.push(Figure { name: name.into(), unit, median, min, max, goal, reached, runs });
    }

    /// A figure that counts by its worst run, not by its median.
    pub(super) fn worst(&mut self, name: impl Into<String>, unit: &'static str, goal: Goal, runs: &[f64]) {
        let worst = match goal {
            Goal::AtLeast(_) => runs.iter().copied().min_by(f64::total_cmp),
            Goal::AtMost(_) => runs.iter().copied().max_by(f64::total_cmp),
        };
        self.figure(name, unit, Some(goal), worst.into_iter().collect());
    }

    pub(super) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// On standard output.
    pub(super) fn print(&self, json: bool) -> anyhow::Result<()> {
        if json { print_json(self) } else { print(&self.text()) }
    }

    fn text(&self) -> String {
        let Machine { processor, cores, memory_mb, kernel } = &self.machine;
        let mut text =
            format!("\nbench {}\n  {processor}, {cores} cores, {memory_mb} MB, Linux {kernel}\n", self.bench);
        let versions: Vec<_> = self.versions.iter().map(|(what, version)| format!("{what} {version}")).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {}\n", versions.join(", "));
        let width = self.figures.iter().map(|figure| figure.name.chars().count()).max().unwrap_or_default();
        for figure in &self.figures {
            let Figure { name, unit, median, min, max, goal, reached, runs } = figure;
            let _ = write!(text, "  {name:<width$}  {:>12} {unit:<14}", number(*median));
            if runs.len() > 1 {
                let _ = write!(text, " {} … {} in {} runs", number(*min), number(*max), runs.len());
            }
            match (goal, reached) {
                (Some(Goal::AtLeast(goal)), Some(reached)) => {
                    let _ = write!(text, "  goal ≥ {}: {}", number(*goal), verdict(*reached));
                }
                (Some(Goal::AtMost(goal)), Some(reached)) => {
                    let _ = write!(text, "  goal ≤ {}: {}", number(*goal), verdict(*reached));
                }
                _ => {}
            }
            text.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(text, "  · {note}");
        }
        text
    }
}

fn verdict(reached: bool) -> &'static str {
    if reached { "reached" } else { "NOT reached" }
}

/// Three digits that count, thousands apart.
fn number(value: f64) -> String {
    if value.abs() < 100.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && digit.is_ascii_digit() && (digits.len() - index).is_multiple_of(3) && !text.ends_with('-') {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl Machine {
    fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal").unwrap_or_default();
        Self {
            processor: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "an unknown processor".into()),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mb: memory.trim_end_matches("kB").trim().parse::<u64>().unwrap_or_default() / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }
}

/// An empty histogram of microseconds.
pub(super) fn latencies() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, LONGEST_US, 3)?)
}

/// One latency; what is longer than the histogram reaches counts as its end.
pub(super) fn record(histogram: &mut Histogram<u64>, micros: i64) {
    histogram.saturating_record(u64::try_from(micros).unwrap_or_default().clamp(1, LONGEST_US));
}

/// A quantile of it, milliseconds.
#[expect(clippy::cast_precision_loss, reason = "a minute in microseconds is far below 2^53")]
pub(super) fn quantile_ms(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_has_the_median_and_the_spread_of_its_runs() {
        let mut report = Report::new("relay");
        report.figure("drain", "events/s", Some(Goal::AtLeast(60_000.0)), vec![70_000.0, 50_000.0, 61_000.0]);
        report.figure("p99", "ms", Some(Goal::AtMost(1.0)), vec![1.0, 3.0]);
        let [drain, p99] = &report.figures[..] else { panic!("two figures") };
        assert_eq!((drain.median, drain.min, drain.max, drain.reached), (61_000.0, 50_000.0, 70_000.0, Some(true)));
        assert_eq!((p99.median, p99.reached), (2.0, Some(false)));
        assert!(report.text().contains("61,000"), "{}", report.text());
    }

    #[test]
    fn the_worst_run_decides_where_it_must() {
        let mut report = Report::new("leader");
        report.worst("silence", "ms", Goal::AtMost(500.0), &[100.0, 600.0]);
        assert_eq!((report.figures[0].median, report.figures[0].reached), (600.0, Some(false)));
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(number(1_234_567.0), "1,234,567");
        assert_eq!(number(1.5), "1.50");
        assert_eq!(number(-1234.0), "-1,234");
    }
}
