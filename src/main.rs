//! The `tidewire` program: commands and nothing else.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tidewire::cli;
use tidewire::dev::{self, DevOptions};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Live, resumable change feeds from Postgres
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 110)]
#[command(after_help = "Begin with `tidewire dev`: it brings its own Postgres, three nodes and a demo table.")]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start Postgres, three nodes and a demo on this machine
    Dev(DevOptions),
    Serve(Box<cli::serve::ServeArgs>),
    Tail(Box<cli::tail::TailArgs>),
    Keys(KeysCommand),
    Migrate(cli::migrate::MigrateArgs),
    Track(cli::track::TrackArgs),
    Untrack(cli::track::UntrackArgs),
    Tables(cli::tables::TablesArgs),
    Status(cli::status::StatusArgs),
    Doctor(cli::doctor::DoctorArgs),
    Bench(Box<cli::bench::BenchArgs>),
    /// Print this test build's mutants
    #[cfg(feature = "chaos")]
    ChaosMutants,
}

/// Create, list and revoke API keys
#[derive(Debug, clap::Args)]
struct KeysCommand {
    #[command(flatten)]
    database: cli::connect::DatabaseArgs,
    #[command(flatten)]
    keys: cli::keys::KeysArgs,
}

fn main() -> ExitCode {
    let program = Program::parse();
    if let Err(error) = tidewire::raise_file_limit() {
        eprintln!("tidewire: the limit of open files stays as it is: {error}");
    }
    // sqlx and tungstenite both use rustls; without a process-wide provider whichever asks first decides.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("tidewire: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(program.command));
    // A blocked read of standard input must not hold the end up.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tidewire: {}", tidewire::telemetry::cause::told(&error));
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Dev(options) => dev::run(options).await,
        Command::Serve(args) => cli::serve::run(*args).await,
        Command::Tail(args) => cli::tail::run(*args).await,
        Command::Keys(KeysCommand { database, keys }) => {
            let pool = database.pool(cli::connect::Reader::of(keys.json)).await?;
            cli::keys::run(keys, &pool).await
        }
        Command::Migrate(args) => cli::migrate::run(args).await,
        Command::Track(args) => cli::track::run(args).await,
        Command::Untrack(args) => cli::track::run_untrack(args).await,
        Command::Tables(args) => cli::tables::run(args).await,
        Command::Status(args) => cli::status::run(args).await,
        #[cfg(feature = "chaos")]
        Command::ChaosMutants => {
            print!("{}", tidewire::mutant::list());
            Ok(())
        }
        Command::Doctor(args) => cli::doctor::run(args).await,
        Command::Bench(args) => cli::bench::run(*args).await,
    }
}
