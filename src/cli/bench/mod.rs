//! `tidewire bench`: the figures of `docs/BENCHMARKS.md`, measured on this machine.
//!
//! Each bench plays the applications that write and the clients that read, against a cluster that it starts with
//! `tidewire dev` (fsync on, as Postgres comes) or against a given one. What it writes are domain events of its own
//! aggregate types and tables of its own schema `tidewire_bench`; it is the one place above the first floor that holds
//! SQL, because here it is the application's.

mod cluster;
mod connections;
mod database;
mod fanout;
mod latency;
mod leader;
mod listeners;
mod load;
mod process;
mod relay;
mod report;
mod writers;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use self::cluster::Cluster;
use self::report::Report;

/// Measure this machine: how fast, how soon, how many.
#[derive(Args, Debug)]
#[command(after_help = "\
Without --database-url and --url, `tidewire dev` starts a cluster for the run and removes it afterwards.

Examples:
  tidewire bench latency
  tidewire bench fanout --subscribers 500 --json
  tidewire bench relay --held
  tidewire bench leader --kills 30")]
pub struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
    #[command(flatten)]
    common: Common,
}

#[derive(Subcommand, Debug)]
enum Bench {
    /// How fast the relay drains a backlog; with --sustained, what it keeps up with
    Relay(relay::RelayArgs),
    /// From the INSERT to the client
    Latency(latency::LatencyArgs),
    /// One node, many subscribers of the same rows
    Fanout(fanout::FanoutArgs),
    /// What an idle subscribed connection costs
    Connections(connections::ConnectionsArgs),
    /// What capture costs the writers
    Writers(writers::WritersArgs),
    /// kill -9 of the leader: how long nothing is relayed
    Leader(leader::LeaderArgs),
}

/// What all benches take.
#[derive(Args, Debug)]
pub(super) struct Common {
    /// Database of a given cluster, to write to; use none whose data matter
    #[arg(long, global = true, value_name = "URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Nodes (or the balancer) of a given cluster, to read from
    #[arg(long, global = true, value_name = "URL", value_delimiter = ',')]
    url: Vec<String>,
    /// API key of a given cluster
    #[arg(long, global = true, env = "TIDEWIRE_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Where an own cluster keeps its data: choose the disk to measure
    #[arg(long, global = true, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
    /// How often to measure
    #[arg(long, global = true, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// One line of JSON instead of text
    #[arg(long, global = true)]
    json: bool,
}

/// Measures, prints, and leaves nothing behind.
///
/// # Errors
/// The cluster cannot be started or reached, or does not do what is measured.
pub async fn run(args: BenchArgs) -> anyhow::Result<()> {
    let BenchArgs { bench, common } = args;
    let nodes = match &bench {
        Bench::Relay(_) | Bench::Fanout(_) | Bench::Connections(_) => 1,
        Bench::Latency(_) | Bench::Writers(_) | Bench::Leader(_) => 3,
    };
    let spinner = spinner("starting a cluster");
    let cluster = Cluster::of(&common, nodes).await?;
    spinner.finish_and_clear();
    let outcome = tokio::select! {
        outcome = measure(&bench, &common, &cluster) => outcome,
        signal = tokio::signal::ctrl_c() => signal.map_err(Into::into).and_then(|()| Err(anyhow::anyhow!("interrupted"))),
    };
    cluster.stop().await;
    outcome?.print(common.json)
}

async fn measure(bench: &Bench, common: &Common, cluster: &Cluster) -> anyhow::Result<Report> {
    let mut report = match bench {
        Bench::Relay(args) => Box::pin(relay::run(args, common, cluster)).await,
        Bench::Latency(args) => Box::pin(latency::run(args, common, cluster)).await,
        Bench::Fanout(args) => Box::pin(fanout::run(args, common, cluster)).await,
        Bench::Connections(args) => Box::pin(connections::run(args, common, cluster)).await,
        Bench::Writers(args) => Box::pin(writers::run(args, common, cluster)).await,
        Bench::Leader(args) => Box::pin(leader::run(args, cluster)).await,
    }?;
    let mut database = database::connect(&cluster.database_url).await?;
    for (what, version) in database::versions(&mut database).await? {
        report.version(&what, version);
    }
    Ok(report)
}

/// A bar on standard error, on terminals only.
fn bar(length: u64, what: impl Into<String>) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:32} {wide_bar} {pos}/{len} {eta:>5}");
    let bar = ProgressBar::new(length).with_message(what.into());
    // The template is a constant; with a wrong one the default style would do.
    if let Ok(style) = style { bar.with_style(style) } else { bar }
}

fn spinner(what: impl Into<String>) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what.into());
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

/// Lets time pass, visibly.
async fn wait(duration: Duration, what: &str) {
    let bar = bar(duration.as_secs(), what);
    for _ in 0..duration.as_secs() {
        tokio::time::sleep(Duration::from_secs(1)).await;
        bar.inc(1);
    }
    bar.finish_and_clear();
}

/// Microseconds since 1970 on this machine's clock, which is also the database's.
#[expect(clippy::disallowed_methods, reason = "latency is measured against the time that the INSERT read")]
fn now_us() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        bench: super::BenchArgs,
    }

    #[test]
    fn the_commands_of_the_examples_are_understood() {
        Program::command().debug_assert();
        for words in
            ["latency", "fanout --subscribers 500 --json", "relay --held", "relay --sustained", "leader --kills 30"]
        {
            assert!(Program::try_parse_from(["bench"].into_iter().chain(words.split(' '))).is_ok(), "{words}");
        }
    }
}
