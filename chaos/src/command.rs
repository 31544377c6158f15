//! The command line.

mod plans;
mod reports;
mod storm;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use chaos::campaign::{self, CampaignOptions};
use chaos::plan::{CLASSES, Plan, PlanOptions};
use chaos::preflight::{self, Abilities};
use chaos::report::RunSummary;
use chaos::run::{self, Outcome, RunOptions};
use chaos::sandbox::Place;
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};

use crate::build::{self, Servers};
use crate::watch::Screen;

/// Kills, pauses and cuts off a Tidewire cluster, and checks that nothing was lost, repeated or reordered
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Stay among the machine's other processes and networks; what needs root is skipped then
    #[arg(long, global = true)]
    no_sandbox: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One run: a plan from a seed, carried out and checked
    Run(RunArgs),
    /// Many runs, and one report on all of them
    Campaign(CampaignArgs),
    /// A plan again: by its seed, or from a file (a plan, or a history, which holds its plan)
    Replay(ReplayArgs),
    /// Judge and measure a history
    Check {
        /// The file
        history: PathBuf,
        /// Print the summary as JSON
        #[arg(long)]
        json: bool,
    },
    /// What this machine can do; the rest is skipped
    Preflight,
    /// Servers that are broken on purpose: each must be caught within five runs
    Mutants(MutantArgs),
    /// Thousands of clients lose their node at once: how soon they are back
    Storm(storm::StormArgs),
    /// One process of the storm's clients
    #[command(hide = true)]
    StormClients(storm::ClientsArgs),
    /// Kill what an earlier run left alive, and nothing else
    Clean {
        /// The earlier run's folder
        folder: PathBuf,
    },
}

#[derive(Args, Clone, Debug)]
struct Common {
    /// The server to test [default: built from these sources]
    #[arg(long, value_name = "PATH")]
    server: Option<PathBuf>,
    /// Data, logs and histories go here [default: a temporary folder, removed when all is well]
    #[arg(long, value_name = "PATH")]
    folder: Option<PathBuf>,
    /// Nodes of the cluster
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=3))]
    nodes: u16,
    /// Subscribing clients
    #[arg(long, default_value_t = 240)]
    clients: u32,
    /// Writing connections
    #[arg(long, default_value_t = 16)]
    writers: u32,
    /// Transactions a second
    #[arg(long, default_value_t = 600)]
    tps: u32,
    /// Rows that are written to
    #[arg(long, default_value_t = 1_200)]
    keys: u32,
    /// Only these classes, such as F2,F3
    #[arg(long, value_delimiter = ',', value_name = "CLASS", value_parser = PossibleValuesParser::new(CLASSES))]
    fault: Vec<String>,
    /// Few and short faults of the kinds that CI runs
    #[arg(long)]
    small: bool,
}

#[derive(Args, Debug)]
struct RunArgs {
    #[command(flatten)]
    common: Common,
    /// Gives writers, clients and faults; printed, and another one each time unless given
    #[arg(long)]
    seed: Option<u64>,
    /// Without the start and the drain, such as 120s or 5m
    #[arg(long, default_value = "120s", value_parser = plans::duration)]
    duration: Duration,
    /// Keep the history even if all is well
    #[arg(long)]
    keep: bool,
    /// The server with fail points, and faults of class FP
    #[arg(long)]
    failpoints: bool,
    /// A mutant to run as (see `mutants`)
    #[arg(long, value_name = "NAME")]
    mutant: Option<String>,
    /// Write the report into this folder
    #[arg(long, value_name = "PATH")]
    report: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct CampaignArgs {
    #[command(flatten)]
    common: Common,
    /// Runs begin until this long has passed
    #[arg(long)]
    minutes: u64,
    /// The runs' seeds follow from it
    #[arg(long)]
    seed: Option<u64>,
    /// Of each run
    #[arg(long, default_value = "150s", value_parser = plans::duration)]
    duration: Duration,
    /// Some runs with the server that has fail points
    #[arg(long)]
    failpoints: bool,
    /// Write the report into this folder
    #[arg(long, value_name = "PATH", default_value = "chaos/reports")]
    report: PathBuf,
}

#[derive(Args, Debug)]
struct ReplayArgs {
    #[command(flatten)]
    common: Common,
    /// A seed, or the file of a plan or of a history
    plan: String,
    /// With a seed: as the run had it (a campaign's have 150s)
    #[arg(long, default_value = "120s", value_parser = plans::duration)]
    duration: Duration,
    /// With a seed: the run had the server with fail points
    #[arg(long)]
    failpoints: bool,
    /// Try ever smaller plans as long as they fail, this many at most
    #[arg(long, value_name = "RUNS", default_value_t = 0)]
    shrink: u32,
}

#[derive(Args, Debug)]
struct MutantArgs {
    #[command(flatten)]
    common: Common,
    /// Only these
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// The runs' seeds follow from it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Of each run
    #[arg(long, default_value = "60s", value_parser = plans::duration)]
    duration: Duration,
    /// Write the result into this folder
    #[arg(long, value_name = "PATH")]
    report: Option<PathBuf>,
}

impl Common {
    fn plan_options(&self, duration: Duration) -> PlanOptions {
        PlanOptions {
            duration,
            nodes: self.nodes,
            only: (!self.fault.is_empty()).then(|| self.fault.iter().cloned().collect::<BTreeSet<_>>()),
            small: self.small,
            clients: self.clients,
            writers: self.writers,
            tps: self.tps,
            keys: self.keys,
            ..PlanOptions::default()
        }
    }
}

impl Cli {
    /// Builds what the command needs.
    pub(crate) fn servers(&self) -> anyhow::Result<Servers> {
        let (common, failpoints) = match &self.command {
            Command::Run(args) => (&args.common, args.failpoints || args.mutant.is_some()),
            Command::Campaign(args) => (&args.common, args.failpoints),
            Command::Replay(args) => (&args.common, args.failpoints || plans::needs_failpoints(&args.plan)),
            Command::Mutants(args) => (&args.common, true),
            Command::Storm(args) => return build::servers(args.server.as_deref(), false),
            Command::Check { .. } | Command::Preflight | Command::Clean { .. } | Command::StormClients(_) => {
                return Ok(Servers::default());
            }
        };
        build::servers(common.server.as_deref(), failpoints)
    }

    /// `check` and `clean` are about files and processes outside; the storm's clients are where the storm is.
    pub(crate) fn wants_sandbox(&self) -> bool {
        let outside = matches!(self.command, Command::Check { .. } | Command::Clean { .. } | Command::StormClients(_));
        !self.no_sandbox && !outside
    }

    pub(crate) async fn execute(self, place: Place, servers: Servers) -> anyhow::Result<ExitCode> {
        if let Command::Check { history, json } = &self.command {
            let summary = run::judge(history)?;
            if *json {
                println!("{}", serde_json::to_string_pretty(&summary)?);
            } else {
                reports::print(&summary);
            }
            return Ok(verdict(&summary));
        }
        if let Command::Clean { folder } = &self.command {
            let ended = preflight::clean(folder)?;
            ended.iter().for_each(|process| println!("killed {process}"));
            println!("{} processes of an earlier run were alive", ended.len());
            return Ok(ExitCode::SUCCESS);
        }
        preflight::raise_files()?;
        if let Command::StormClients(args) = &self.command {
            return storm::clients(args).await;
        }
        let abilities = preflight::probe(place);
        if place == Place::Outside {
            eprintln!("not in a sandbox: what needs root or namespaces of its own is SKIPPED");
        }
        match self.command {
            Command::Preflight => {
                print!("{abilities}");
                Ok(ExitCode::SUCCESS)
            }
            Command::Run(args) => one(args, &servers, &abilities).await,
            Command::Campaign(args) => many(args, servers, &abilities).await,
            Command::Replay(args) => replay(args, &servers, &abilities).await,
            Command::Mutants(args) => mutants(args, servers, &abilities).await,
            Command::Storm(args) => storm::storm(args, &servers).await,
            Command::Check { .. } | Command::Clean { .. } | Command::StormClients(_) => Ok(ExitCode::SUCCESS),
        }
    }
}

/// 1 for a broken promise, and for nothing else; 2 for a history that holds nothing to judge.
fn verdict(summary: &RunSummary) -> ExitCode {
    match summary {
        _ if !summary.violations.is_empty() => ExitCode::from(1),
        _ if summary.counts.log_rows == 0 || summary.counts.conditions == 0 => {
            eprintln!("the history holds no log or no conditions: it proves nothing");
            ExitCode::from(2)
        }
        _ => ExitCode::SUCCESS,
    }
}

/// The user's folder, or a temporary one that goes if all is well.
struct Folder {
    path: PathBuf,
    temporary: bool,
}

impl Folder {
    fn of(given: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(path) = given {
            std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
            return Ok(Self { path: path.canonicalize()?, temporary: false });
        }
        let path = tempfile::Builder::new().prefix("tidewire-chaos-").tempdir()?.keep();
        // Postgres runs under another account and has to get through.
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        // Whatever ends the run: whoever looks for what it left must know where.
        eprintln!("folder: {}", path.display());
        Ok(Self { path, temporary: true })
    }

    fn done(self, well: bool) {
        if well && self.temporary {
            let _ = std::fs::remove_dir_all(&self.path);
        } else {
            eprintln!("kept: {}", self.path.display());
        }
    }
}

async fn one(args: RunArgs, servers: &Servers, abilities: &Abilities) -> anyhow::Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(plans::fresh_seed);
    let failpoints = args.failpoints || args.mutant.is_some();
    let mut options = args.common.plan_options(args.duration);
    options.failpoints = args.failpoints;
    options.round = campaign::round_of(seed);
    let binary = if failpoints { servers.failpoints.clone() } else { None };
    let folder = Folder::of(args.common.folder.as_deref())?;
    let run = RunOptions {
        folder: folder.path.clone(),
        binary: binary.unwrap_or_else(|| servers.released.clone()),
        plan: Plan::from_seed(seed, &options),
        mutant: args.mutant,
    };
    eprintln!("seed {seed}, {} faults in {:?}", run.plan.faults.len(), args.duration);
    let began = chrono::Utc::now();
    let Outcome { summary, history } = run::run(&run, abilities, &Screen::new(args.duration)).await?;
    reports::print(&summary);
    let code = verdict(&summary);
    let well = summary.violations.is_empty() && !args.keep;
    if !well {
        eprintln!("history: {}", history.display());
    }
    if let Some(report) = &args.report {
        let mut page = reports::begin("Run", began, abilities, &servers.released);
        page.seconds = summary.figures.seconds;
        page.runs.push(summary);
        println!("report: {}", page.write(report, &format!("run-{seed}"))?.display());
    }
    folder.done(well);
    Ok(code)
}

async fn many(args: CampaignArgs, servers: Servers, abilities: &Abilities) -> anyhow::Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(plans::fresh_seed);
    let folder = Folder::of(args.common.folder.as_deref())?;
    let began = chrono::Utc::now();
    let options = CampaignOptions {
        length: Duration::from_secs(args.minutes * 60),
        seed,
        binary: servers.released.clone(),
        failpoints: servers.failpoints,
        folder: folder.path.clone(),
        plan: args.common.plan_options(args.duration),
    };
    eprintln!("campaign of seed {seed}, {} minutes", args.minutes);
    let mut report = reports::begin("Campaign", began, abilities, &servers.released);
    let name = format!("{}-{seed}", began.format("%Y-%m-%d"));
    let screen = Screen::new(args.duration);
    let result = campaign::campaign(&options, abilities, &mut report, &screen, |report| {
        report.write(&args.report, &name).map(drop)
    })
    .await;
    reports::print_all(&report);
    println!("report: {}", args.report.join(format!("{name}.md")).display());
    let (broken, undone) = (report.violations() > 0, !report.not_carried_out.is_empty());
    folder.done(result.is_ok() && !broken && !undone);
    result?;
    Ok(match (broken, undone) {
        (true, _) => ExitCode::from(1),
        (false, true) => ExitCode::from(2),
        (false, false) => ExitCode::SUCCESS,
    })
}

async fn replay(args: ReplayArgs, servers: &Servers, abilities: &Abilities) -> anyhow::Result<ExitCode> {
    let options = PlanOptions { failpoints: args.failpoints, ..args.common.plan_options(args.duration) };
    let mut plan = plans::of(&args.plan, &options)?;
    let binary = if plan.failpoints { servers.failpoints.clone() } else { None };
    let binary = binary.unwrap_or_else(|| servers.released.clone());
    let folder = Folder::of(args.common.folder.as_deref())?;
    let run = async |plan: Plan, n: u32| {
        let length = Duration::from_millis(plan.duration_ms);
        let folder = folder.path.join(format!("replay-{n}"));
        let options = RunOptions { folder, binary: binary.clone(), plan, mutant: None };
        run::run(&options, abilities, &Screen::new(length)).await
    };
    let Outcome { summary, .. } = run(plan.clone(), 0).await?;
    reports::print(&summary);
    let code = verdict(&summary);
    let mut left = if summary.violations.is_empty() { 0 } else { args.shrink };
    let mut n = 0;
    'smaller: while left > 0 {
        for smaller in chaos::plan::smaller(&plan.clone()) {
            if left == 0 {
                break 'smaller;
            }
            left -= 1;
            n += 1;
            // One that cannot be carried out did not fail in the way that is looked for.
            if run(smaller.clone(), n).await.is_ok_and(|outcome| !outcome.summary.violations.is_empty()) {
                eprintln!("{} faults are enough", smaller.faults.len());
                plan = smaller;
                continue 'smaller;
            }
        }
        break;
    }
    if args.shrink > 0 {
        let path = folder.path.join("smallest-plan.json");
        std::fs::write(&path, serde_json::to_vec_pretty(&plan)?)?;
        println!("smallest plan that failed: {}", path.display());
    }
    folder.done(summary.violations.is_empty() && args.shrink == 0);
    Ok(code)
}

async fn mutants(args: MutantArgs, servers: Servers, abilities: &Abilities) -> anyhow::Result<ExitCode> {
    let binary = servers.failpoints.clone().context("no server with fail points")?;
    let all = campaign::mutants(&binary)?;
    let known: Vec<&str> = all.iter().map(|mutant| mutant.name.as_str()).collect();
    if let Some(unknown) = args.only.iter().find(|name| !known.contains(&name.as_str())) {
        anyhow::bail!("there is no mutant {unknown}; there are: {}", known.join(", "));
    }
    let folder = Folder::of(args.common.folder.as_deref())?;
    let options = CampaignOptions {
        length: Duration::ZERO,
        seed: args.seed,
        binary: servers.released,
        failpoints: servers.failpoints,
        folder: folder.path.clone(),
        plan: args.common.plan_options(args.duration),
    };
    let screen = Screen::new(args.duration);
    let mut caught = Vec::new();
    for mutant in all.iter().filter(|mutant| args.only.is_empty() || args.only.contains(&mutant.name)) {
        let result = campaign::hunt(mutant, &options, abilities, &screen).await?;
        reports::print_caught(&result);
        caught.push(result);
        if let Some(report) = &args.report {
            reports::write_caught(report, &caught)?;
        }
    }
    let escaped = caught.iter().filter(|mutant| mutant.run.is_none()).count();
    println!("{} of {} mutants caught", caught.len() - escaped, caught.len());
    folder.done(escaped == 0);
    Ok(if escaped == 0 { ExitCode::SUCCESS } else { ExitCode::from(3) })
}
