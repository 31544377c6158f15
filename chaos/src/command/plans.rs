//! Plans and seeds as they are given on the command line.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use chaos::campaign::round_of;
use chaos::history::{HistoryError, Line, Reader, Record, Run};
use chaos::plan::{Plan, PlanOptions};

/// `90s`, `5m`, `1h`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(char::is_alphabetic);
    let seconds = match &text[digits.len()..] {
        "s" | "" => 1,
        "m" => 60,
        "h" => 3_600,
        unit => return Err(format!("`{unit}` is no unit of time: use s, m or h, such as 120s")),
    };
    let count: u64 = digits.parse().map_err(|_| "a number and a unit are expected, such as 120s".to_owned())?;
    Ok(Duration::from_secs(count * seconds))
}

/// Short enough to be typed.
pub(super) fn fresh_seed() -> u64 {
    u64::from(rand::random::<u32>())
}

/// Of a seed, of a plan's file, or of the history of a run.
pub(super) fn of(given: &str, options: &PlanOptions) -> anyhow::Result<Plan> {
    if let Ok(seed) = given.parse() {
        return Ok(Plan::from_seed(seed, &PlanOptions { round: round_of(seed), ..options.clone() }));
    }
    let path = Path::new(given);
    if !path.exists() {
        bail!("`{given}` is neither a seed nor a file");
    }
    match first_line(path)? {
        Some(value) => {
            let copy = tempfile::NamedTempFile::new()?;
            serde_json::to_writer(&copy, &value)?;
            Plan::load(copy.path()).with_context(|| format!("the plan in {given}"))
        }
        None => Ok(Plan::load(path)?),
    }
}

/// The plan in a history's first line; nothing if it is no history.
fn first_line(path: &Path) -> anyhow::Result<Option<serde_json::Value>> {
    match Reader::open(path)?.next() {
        Some(Ok(Line(_, Record::Run(Run { mutant: Some(mutant), seed, .. })))) => bail!(
            "{} is of a run of the mutant {mutant}: `chaos run --seed {seed} --mutant {mutant}`, with its options, does it again",
            path.display()
        ),
        Some(Ok(Line(_, Record::Run(run)))) => Ok(Some(run.plan)),
        Some(Err(error @ HistoryError::Version { .. })) => Err(error.into()),
        _ => Ok(None),
    }
}

/// Whether the plan needs the server with fail points.
pub(super) fn needs_failpoints(given: &str) -> bool {
    of(given, &PlanOptions::default()).is_ok_and(|plan| plan.failpoints)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_units() {
        assert_eq!(duration("120s"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert!(duration("5 weeks").is_err());
    }

    #[test]
    fn what_is_neither_a_seed_nor_a_file_is_said_to_be_so() {
        let error = of("nonsense", &PlanOptions::default()).unwrap_err();
        assert!(error.to_string().contains("neither a seed nor a file"), "{error}");
    }
}
