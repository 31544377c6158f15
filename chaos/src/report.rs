//! The report of a run or of a campaign: the same summary as Markdown, as JSON and as SVG plots.
//!
//! Knows verdicts and figures, nothing of processes. A goal that was missed stands there as missed.

mod goals;
mod markdown;
mod plot;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use crate::checker::{Counts, Violation};
use crate::figures::{FaultFigures, Figures};

pub use self::goals::{Goal, Measure, goals};

/// One run, judged and measured.
#[derive(Clone, Debug, Serialize)]
pub struct RunSummary {
    /// Gives the run again.
    pub seed: u64,
    /// The mutant that it ran with.
    pub mutant: Option<String>,
    /// Whether the server had fail points.
    pub failpoints: bool,
    /// Broken promises.
    pub violations: Vec<Violation>,
    /// Promises kept late.
    pub late: Vec<Violation>,
    /// Why the run proves less than it should.
    pub vacuous: Vec<String>,
    /// What was checked.
    pub counts: Counts,
    /// What was measured.
    pub figures: Figures,
    /// Resident memory of all nodes together: at the start of the run and the most seen, bytes.
    pub node_bytes: (u64, u64),
}

/// Everything a report says.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// First line.
    pub title: String,
    /// Of the server and of this program.
    pub version: String,
    /// Commit of the sources, when they are at hand.
    pub commit: Option<String>,
    /// When it began, RFC 3339.
    pub began: String,
    /// Wall time from the first run's begin to the last one's end, seconds.
    pub seconds: f64,
    /// Processors, memory, kernel, versions of Postgres and HAProxy.
    pub machine: Vec<String>,
    /// Classes that this machine cannot do, with why.
    pub cannot: Vec<(String, String)>,
    /// The command that gives it again.
    pub command: String,
    /// In the order in which they ran.
    pub runs: Vec<RunSummary>,
    /// Runs that could not be carried out, with why: they prove nothing.
    pub not_carried_out: Vec<String>,
}

/// A class of faults over all runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ClassSummary {
    /// Begun.
    pub injected: u64,
    /// Held the role, took effect, and progress was checked afterwards.
    pub counted: u64,
    /// Of these, alone in their window: their figures count.
    pub alone: u64,
    /// Skipped, with the reasons.
    pub skipped: u64,
    /// Why.
    pub reasons: BTreeSet<String>,
    /// Variants that were seen.
    pub variants: BTreeSet<String>,
    /// Values of each figure, ascending.
    pub figures: BTreeMap<String, Vec<f64>>,
}

impl Report {
    /// Sums up the runs by class of fault.
    #[must_use]
    pub fn classes(&self) -> BTreeMap<String, ClassSummary> {
        let mut classes: BTreeMap<String, ClassSummary> = BTreeMap::new();
        for fault in self.runs.iter().filter(|run| run.mutant.is_none()).flat_map(|run| &run.figures.faults) {
            classes.entry(fault.class.clone()).or_default().add(fault);
        }
        for (class, why) in &self.cannot {
            classes.entry(class.clone()).or_default().reasons.insert(why.clone());
        }
        for class in classes.values_mut() {
            class.figures.values_mut().for_each(|values| values.sort_by(f64::total_cmp));
        }
        classes
    }

    /// Violations of all runs.
    #[must_use]
    pub fn violations(&self) -> usize {
        self.runs.iter().map(|run| run.violations.len()).sum()
    }

    /// Faults that held their role, took effect, and after which progress was checked.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.classes().values().map(|class| class.counted).sum()
    }

    /// Events whose delivery was checked.
    #[must_use]
    pub fn deliveries(&self) -> u64 {
        self.runs.iter().map(|run| run.figures.deliveries).sum()
    }

    /// Writes `<name>.md`, `<name>.json`, `<name>-lag.svg` and `<name>-failover.svg` into `folder` and returns the first.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, folder: &Path, name: &str) -> anyhow::Result<PathBuf> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let put = |suffix: &str, text: String| -> anyhow::Result<PathBuf> {
            let path = folder.join(format!("{name}{suffix}"));
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            Ok(path)
        };
        put(".json", self.to_json()?)?;
        put("-lag.svg", plot::lag(self))?;
        put("-failover.svg", plot::failover(self))?;
        put(".md", markdown::page(self, name))
    }

    /// The report for machines: without the second-by-second lag, which the plot shows.
    fn to_json(&self) -> anyhow::Result<String> {
        let mut lean = self.clone();
        for run in &mut lean.runs {
            run.figures.lag.clear();
        }
        let classes = serde_json::to_value(self.classes())?;
        let mut value = serde_json::to_value(lean)?;
        value["classes"] = classes;
        value["violations"] = self.violations().into();
        value["deliveries"] = self.deliveries().into();
        Ok(serde_json::to_string_pretty(&value)? + "\n")
    }
}

impl ClassSummary {
    fn add(&mut self, fault: &FaultFigures) {
        if let Some(why) = &fault.skipped {
            self.skipped += 1;
            self.reasons.insert(why.clone());
            return;
        }
        self.injected += 1;
        self.variants.insert(fault.variant.clone());
        if !(fault.took && fault.progressed) {
            return;
        }
        self.counted += 1;
        if !fault.alone {
            return;
        }
        self.alone += 1;
        for (name, value) in &fault.figures {
            self.figures.entry(name.clone()).or_default().push(*value);
        }
    }
}

/// The value below which `share` of the values lie; the values are in ascending order.
#[must_use]
pub fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let last = values.len().checked_sub(1)?;
    values.get((last as f64 * share).ceil() as usize).copied()
}

#[cfg(test)]
mod tests;
