//! Many runs: a campaign deals the faults evenly over fresh clusters and reports on all of them together; a validation
//! runs servers that are broken on purpose and demands that the checker notices.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::plan::{Plan, PlanOptions};
use crate::preflight::Abilities;
use crate::report::Report;
use crate::run::{self, Outcome, RunOptions, Watcher};

/// Runs that a mutant has to be caught in.
pub const MUTANT_RUNS: u32 = 5;
/// Runs that may fail for reasons of their own before a campaign gives up.
const NOT_CARRIED_OUT: usize = 3;
/// The round is kept in so many bits of a seed.
const ROUNDS: u64 = 0xff;
/// Every so many runs of a campaign, one is of the server with fail points, if there is one.
const FAILPOINTS_EVERY: u64 = 3;

/// A campaign.
#[derive(Clone, Debug)]
pub struct CampaignOptions {
    /// Runs begin until this long has passed.
    pub length: Duration,
    /// The seeds of its runs follow from it.
    pub seed: u64,
    /// The server as released.
    pub binary: PathBuf,
    /// The same with fail points compiled in.
    pub failpoints: Option<PathBuf>,
    /// Each run has a folder in it, which stays only if the run broke a promise.
    pub folder: PathBuf,
    /// What each plan is made from; its round is set here.
    pub plan: PlanOptions,
}

/// The seed of a campaign's run: 24 bits that depend on all bits of `seed` and `round` (SplitMix64), and in the lowest byte
/// which round of its deal it is, so that the seed alone gives the run again ([`round_of`]). Short enough to be typed.
#[must_use]
pub fn seed_of(seed: u64, round: u64, dealt: u64) -> u64 {
    let mut z = seed.wrapping_add(round.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) >> 40 << 8 | dealt & ROUNDS
}

/// Where in the deal of the classes the run of this seed stands.
#[must_use]
pub const fn round_of(seed: u64) -> u64 {
    seed & ROUNDS
}

/// Runs until the time is over. After every run `so_far` gets the report up to then, so that an interrupted campaign
/// leaves one too.
///
/// # Errors
/// A run could not be carried out, or `so_far` failed.
pub async fn campaign(
    options: &CampaignOptions,
    abilities: &Abilities,
    report: &mut Report,
    watcher: &impl Watcher,
    mut so_far: impl FnMut(&Report) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let began = Instant::now();
    for round in 0.. {
        if began.elapsed() >= options.length {
            break;
        }
        let failpoints = options.failpoints.as_ref().filter(|_| round % FAILPOINTS_EVERY == FAILPOINTS_EVERY - 1);
        // Each kind of server has a deal of its own, whose rounds follow on each other: else what the rounds of the other kind
        // would have dealt is left out, and some classes hardly come.
        let dealt = match (&options.failpoints, failpoints) {
            (None, _) => round,
            (_, Some(_)) => round / FAILPOINTS_EVERY,
            _ => round - round / FAILPOINTS_EVERY,
        };
        let seed = seed_of(options.seed, round, dealt);
        let plan = PlanOptions { round: round_of(seed), failpoints: failpoints.is_some(), ..options.plan.clone() };
        let plan = Plan::from_seed(seed, &plan);
        watcher.step(&format!("run {} of seed {seed}, {} faults", round + 1, plan.faults.len()));
        let folder = options.folder.join(format!("run-{round:03}-{seed}"));
        let run = RunOptions {
            folder: folder.clone(),
            binary: failpoints.unwrap_or(&options.binary).clone(),
            plan,
            mutant: None,
        };
        let outcome = run::run(&run, abilities, watcher).await;
        let Outcome { summary, .. } = match outcome {
            Ok(outcome) => outcome,
            // It says nothing about the server, but somebody has to look at it: its folder stays.
            Err(error) => {
                let why = format!("run {} (seed {seed}): {error:#}", round + 1);
                watcher.step(&format!("NOT CARRIED OUT: {why}; see {}", folder.display()));
                report.not_carried_out.push(why);
                so_far(report)?;
                ensure!(report.not_carried_out.len() <= NOT_CARRIED_OUT, "too many runs could not be carried out");
                continue;
            }
        };
        if summary.violations.is_empty() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        } else {
            watcher.step(&format!("seed {seed} broke {:?}; kept in {}", run::rules(&summary), folder.display()));
        }
        report.runs.push(summary);
        report.seconds = began.elapsed().as_secs_f64();
        so_far(report)?;
    }
    Ok(())
}

/// A way to break the server, as the server itself lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Mutant {
    /// The value of `TIDEWIRE_MUTANT`.
    pub name: String,
    /// What it does wrong.
    pub breaks: String,
    /// Classes of faults that bring it out.
    pub faults: Vec<String>,
}

/// How a mutant fared.
#[derive(Clone, Debug, Serialize)]
pub struct Caught {
    /// Its name.
    pub name: String,
    /// What it does wrong.
    pub breaks: String,
    /// The run that caught it, from 1; nothing if none did.
    pub run: Option<u32>,
    /// The seed of that run.
    pub seed: Option<u64>,
    /// The rules that noticed.
    pub rules: Vec<String>,
}

/// Asks a server with fail points for its mutants.
///
/// # Errors
/// It was built without them, or does not run.
pub fn mutants(binary: &PathBuf) -> anyhow::Result<Vec<Mutant>> {
    let output = Command::new(binary).arg("chaos-mutants").output().context("the server does not run")?;
    ensure!(
        output.status.success(),
        "{} lists no mutants: build it with `--features chaos` ({})",
        binary.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let text = String::from_utf8(output.stdout)?;
    text.lines().map(|line| serde_json::from_str(line).context("the server's list of mutants")).collect()
}

/// Runs one mutant until a run breaks a promise, at most [`MUTANT_RUNS`] times.
///
/// # Errors
/// A run could not be carried out for a reason that is not the mutant's.
pub async fn hunt(
    mutant: &Mutant,
    options: &CampaignOptions,
    abilities: &Abilities,
    watcher: &impl Watcher,
) -> anyhow::Result<Caught> {
    let binary = options.failpoints.clone().context("mutants need the server with fail points")?;
    let mut caught =
        Caught { name: mutant.name.clone(), breaks: mutant.breaks.clone(), run: None, seed: None, rules: Vec::new() };
    for round in 0..MUTANT_RUNS {
        let seed = seed_of(options.seed, u64::from(round), u64::from(round));
        let only = (!mutant.faults.is_empty()).then(|| mutant.faults.iter().cloned().collect());
        let plan = PlanOptions { only, round: u64::from(round), ..options.plan.clone() };
        let folder = options.folder.join(format!("{}-{round}", mutant.name));
        let run = RunOptions {
            folder: folder.clone(),
            binary: binary.clone(),
            plan: Plan::from_seed(seed, &plan),
            mutant: Some(mutant.name.clone()),
        };
        watcher.step(&format!("mutant {}, run {}", mutant.name, round + 1));
        let outcome = run::run(&run, abilities, watcher).await;
        match outcome {
            Ok(Outcome { summary, .. }) if !summary.violations.is_empty() => {
                caught.run = Some(round + 1);
                caught.seed = Some(seed);
                caught.rules = run::rules(&summary).into_keys().map(str::to_owned).collect();
                let _ = fs::remove_dir_all(&folder);
                break;
            }
            Ok(_) => drop(fs::remove_dir_all(&folder)),
            // A broken server may well break the run: that catches nobody, the next run may.
            Err(error) => watcher.step(&format!("mutant {}: {error:#}", mutant.name)),
        }
    }
    Ok(caught)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_of_a_campaign_have_seeds_of_their_own_and_always_the_same() {
        let seeds: Vec<u64> = (0..100).map(|round| seed_of(7, round, round)).collect();
        let distinct: std::collections::BTreeSet<&u64> = seeds.iter().collect();
        assert_eq!(distinct.len(), 100);
        assert_eq!(seeds[3], seed_of(7, 3, 3));
        assert_ne!(seeds[3], seed_of(8, 3, 3));
        assert_eq!(round_of(seed_of(7, 3, 2)), 2);
    }
}
