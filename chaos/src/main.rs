//! `chaos`: kills, pauses and cuts off a Tidewire cluster, and checks that nothing was lost, repeated or reordered.

mod build;
mod command;
mod watch;

use std::process::ExitCode;

use chaos::sandbox::{self, Place};
use clap::Parser;

use crate::command::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("CHAOS_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,sqlx=error,tidewire=error")),
        )
        .init();
    match start(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    // Outside: the sandbox has no network for a build that would fetch something.
    let servers = cli.servers()?;
    let place = sandbox::enter(cli.wants_sandbox(), &build::environment(&servers))?;
    if let Place::Done(_) = place {
        return Ok(place.into());
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(cli.execute(place, servers))
}
