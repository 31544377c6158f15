//! Pure: does a history keep every promise of the product?
//!
//! A *violation* is a broken promise of safety: a change that was lost, invented, repeated, reordered or torn, a lie
//! about a position. *Late* is what came, but not in time. Figures are not judged here, and nothing is assumed of how
//! the server works: what was written, what clients saw, and what Postgres holds in the end must agree.

mod conduct;
mod gather;
mod log;
mod subscriptions;

use std::collections::BTreeMap;

use serde::Serialize;

use self::gather::Gathered;
use crate::history::{Line, Micros};

/// Violations of one rule that are kept; all are counted.
const KEPT: usize = 20;

/// Close codes that a server of the protocol may use (docs/PROTOCOL.md).
pub const CLOSE_CODES: [u16; 23] = [
    1000, 1001, 1002, 1003, 1007, 1009, 1011, 1012, 1013, 4004, 4008, 4010, 4012, 4013, 4014, 4400, 4401, 4403, 4406,
    4408, 4429, 4440, 4441,
];

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// The rule.
    pub rule: &'static str,
    /// When, on the run's clock.
    pub at: Micros,
    /// What was expected, what was seen, and which faults were at work.
    pub text: String,
}

/// What was checked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Events handed to handlers, each compared with the log.
    pub deliveries: u64,
    /// Transactions whose COMMIT was acknowledged.
    pub transactions_ok: u64,
    /// That were rolled back or refused.
    pub transactions_failed: u64,
    /// Whose COMMIT got no answer.
    pub transactions_unknown: u64,
    /// Of these, that turned out to have happened.
    pub unknown_that_happened: u64,
    /// With more than one change.
    pub transactions_of_several_rows: u64,
    /// Subscriptions, each restart of a client process anew.
    pub subscriptions: u64,
    /// By where the missed events came from.
    pub resumes: BTreeMap<String, u64>,
    /// By reason.
    pub resyncs: BTreeMap<String, u64>,
    /// By close code, HTTP status or `network`.
    pub disconnects: BTreeMap<String, u64>,
    /// Rows of the log.
    pub log_rows: u64,
    /// Rows that lossy failovers lost.
    pub lost_rows: u64,
    /// Leaderships.
    pub terms: u64,
    /// Incarnations of the log.
    pub epochs: u64,
    /// Conditions that Postgres itself evaluated over the log.
    pub conditions: u64,
    /// Faults by class; one that has no end is not counted.
    pub faults: BTreeMap<String, u64>,
    /// Violations by rule, those that are not kept included.
    pub violations: BTreeMap<String, u64>,
}

/// What the checker says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Broken promises of safety.
    pub violations: Vec<Violation>,
    /// Promises kept late.
    pub late: Vec<Violation>,
    /// What was checked.
    pub counts: Counts,
    /// Why the run proves less than it should.
    pub vacuous: Vec<String>,
}

/// Judges a history.
///
/// # Errors
/// Those of the reader.
pub fn check<E>(lines: impl Iterator<Item = Result<Line, E>>) -> Result<Verdict, E> {
    let mut gathered = Gathered::default();
    for line in lines {
        gathered.take(line?);
    }
    let mut findings = Findings { faults: gathered.windows(), ..Findings::default() };
    let mut counts = std::mem::take(&mut gathered.counts);
    let sent = log::check(&gathered, &mut counts, &mut findings);
    subscriptions::check(&gathered, &sent, &mut counts, &mut findings);
    conduct::check(&gathered, &mut counts, &mut findings);
    counts.violations = findings.counted.iter().map(|(rule, n)| ((*rule).to_owned(), *n as u64)).collect();
    Ok(Verdict { violations: findings.violations, late: findings.late, counts, vacuous: findings.vacuous })
}

/// What the rules found so far.
#[derive(Debug, Default)]
struct Findings {
    faults: Vec<(Micros, Micros, String)>,
    violations: Vec<Violation>,
    counted: BTreeMap<&'static str, usize>,
    late: Vec<Violation>,
    vacuous: Vec<String>,
}

impl Findings {
    fn violation(&mut self, rule: &'static str, at: Micros, text: impl Into<String>) {
        let n = self.counted.entry(rule).or_default();
        *n += 1;
        if *n <= KEPT {
            let text = self.with_faults(at, text.into());
            self.violations.push(Violation { rule, at, text });
        }
    }

    fn late(&mut self, rule: &'static str, at: Micros, text: impl Into<String>) {
        if self.late.iter().filter(|late| late.rule == rule).count() < KEPT {
            let text = self.with_faults(at, text.into());
            self.late.push(Violation { rule, at, text });
        }
    }

    fn with_faults(&self, at: Micros, text: String) -> String {
        let active: Vec<&str> = self
            .faults
            .iter()
            .filter(|(on, off, _)| at >= *on && at <= off.saturating_add(2_000_000))
            .map(|(_, _, name)| name.as_str())
            .collect();
        if active.is_empty() { text } else { format!("{text} (about then: {})", active.join(", ")) }
    }
}

#[cfg(test)]
mod tests;
