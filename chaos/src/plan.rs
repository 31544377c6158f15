//! Which faults a run injects, and when: pure, from one seed.
//!
//! A plan names roles ("the leader"), never processes; who has the role is found out when the fault begins. The same
//! seed, options and [`VERSION`] give the same plan on every machine. Nothing here knows how a fault is done.
//!
//! A plan is a row of *slots*, one after the other: a fault alone, whose figures count, or a group of 2 to 4 that
//! overlap. A group is counted as F25 by an entry of its own, which comes first in the slot.

mod deck;
mod schedule;
mod shrink;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::deck::CLASSES;
pub use self::shrink::smaller;
use crate::workload::WorkloadPlan;

/// Rises when the same seed would give another plan, or an old plan would mean something else.
pub const VERSION: u32 = 3;

/// The class of a group's own entry.
pub const GROUP: &str = "F25";

/// What a plan is made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// Of the faults and the calm around them; the drain comes on top.
    pub duration: Duration,
    /// Nodes of the cluster, at least 1.
    pub nodes: u16,
    /// Only these classes. Groups are made only if [`GROUP`] is among them, of all classes if it is the only one.
    pub only: Option<BTreeSet<String>>,
    /// The number of the run in its campaign, from 0: classes are dealt evenly over consecutive rounds. A single run
    /// gives its seed.
    pub round: u64,
    /// Few and short ones, for CI.
    pub small: bool,
    /// The server was built with fail points: class FP is dealt too.
    pub failpoints: bool,
    /// Subscribing clients.
    pub clients: u32,
    /// Writing connections.
    pub writers: u32,
    /// Transactions a second, of all writers.
    pub tps: u32,
    /// Rows that the writers change.
    pub keys: u32,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(150),
            nodes: 3,
            only: None,
            round: 0,
            small: false,
            failpoints: false,
            clients: 200,
            writers: 16,
            tps: 500,
            keys: 1_000,
        }
    }
}

/// A run's plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`VERSION`].
    pub version: u32,
    /// It came from this one.
    pub seed: u64,
    /// Nodes of the cluster.
    pub nodes: u16,
    /// From the first write to the drain, milliseconds.
    pub duration_ms: u64,
    /// Writers and clients.
    pub workload: WorkloadPlan,
    /// The server must have been built with fail points.
    pub failpoints: bool,
    /// By [`slot`](PlannedFault::slot), then by [`at_ms`](PlannedFault::at_ms).
    pub faults: Vec<PlannedFault>,
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedFault {
    /// Its number, unique in the plan and kept when the plan shrinks.
    pub f: u32,
    /// From the run's beginning, milliseconds. It may begin later: slots wait for each other.
    pub at_ms: u64,
    /// `F1`…`F27`, or `FP`.
    pub class: String,
    /// What of the class.
    pub variant: String,
    /// From taking effect to the heal, milliseconds.
    pub hold_ms: u64,
    /// For what is drawn while it is done.
    pub seed: u64,
    /// Nothing else happens until it has recovered: its figures count.
    pub alone: bool,
    /// Faults of one slot may overlap; slots do not.
    pub slot: u32,
}

/// Why a plan cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The file.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is no plan.
    #[error(
        "{path} is not a plan: {error}. A plan is the JSON that a run prints, or the `plan` of a history's first line"
    )]
    Malformed {
        /// Which.
        path: PathBuf,
        /// Why.
        error: String,
    },
    /// Another version.
    #[error(
        "{path} is a plan of version {found}, this program makes and runs version {VERSION}: the same seed means other faults now. Run it with the chaos of its commit, or `chaos run --seed {seed}` for this version's plan of that seed"
    )]
    Version {
        /// Which.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Its seed.
        seed: u64,
    },
}

/// What every version has.
#[derive(Deserialize)]
struct Head {
    version: u32,
    seed: u64,
}

impl Plan {
    /// The plan of a seed.
    #[must_use]
    pub fn from_seed(seed: u64, options: &PlanOptions) -> Self {
        let workload = WorkloadPlan {
            seed,
            writers: options.writers,
            transactions_per_second: options.tps,
            keys: options.keys,
            clients: options.clients,
        };
        Self {
            version: VERSION,
            seed,
            nodes: options.nodes,
            duration_ms: millis(options.duration),
            workload,
            failpoints: options.failpoints,
            faults: schedule::lay_out(seed, options),
        }
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// The file, its form, or a plan of another version: the text says which and what to do.
    pub fn load(path: &Path) -> Result<Self, PlanError> {
        let text = std::fs::read_to_string(path).map_err(|error| PlanError::File { path: path.to_owned(), error })?;
        Self::parse(&text, path)
    }

    /// Reads a plan's text; `path` is for the error.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(text: &str, path: &Path) -> Result<Self, PlanError> {
        let malformed =
            |error: serde_json::Error| PlanError::Malformed { path: path.to_owned(), error: error.to_string() };
        let Head { version, seed } = serde_json::from_str(text).map_err(malformed)?;
        if version != VERSION {
            return Err(PlanError::Version { path: path.to_owned(), found: version, seed });
        }
        serde_json::from_str(text).map_err(malformed)
    }

    /// The faults of each slot, in their order.
    pub fn slots(&self) -> impl Iterator<Item = &[PlannedFault]> {
        self.faults.chunk_by(|one, next| one.slot == next.slot)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
