//! `chaos storm`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use chaos::storm::{self, Storm, StormOptions};
use clap::Args;

use super::Folder;
use crate::build::Servers;
use crate::watch::Screen;

#[derive(Args, Debug)]
pub(super) struct StormArgs {
    /// The server to test [default: built from these sources]
    #[arg(long, value_name = "PATH")]
    pub(super) server: Option<PathBuf>,
    /// Data and logs go here [default: a temporary folder, removed when all is well]
    #[arg(long, value_name = "PATH")]
    folder: Option<PathBuf>,
    /// Subscribing clients, over two balancers and two processes
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(2..=18_000))]
    clients: u32,
    /// How often each kind of storm comes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    storms: u32,
    /// Write the result into this folder
    #[arg(long, value_name = "PATH")]
    report: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(super) struct ClientsArgs {
    #[arg(long)]
    url: String,
    #[arg(long)]
    clients: u32,
    #[arg(long, env = "TIDEWIRE_KEY", hide_env_values = true)]
    key: String,
}

pub(super) async fn clients(args: &ClientsArgs) -> anyhow::Result<ExitCode> {
    storm::clients::serve(&args.url, &args.key, args.clients).await?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn storm(args: StormArgs, servers: &Servers) -> anyhow::Result<ExitCode> {
    let folder = Folder::of(args.folder.as_deref())?;
    let options = StormOptions {
        folder: folder.path.clone(),
        binary: servers.released.clone(),
        clients: args.clients,
        storms: args.storms,
    };
    let storms = storm::storms(&options, &Screen::new(Duration::ZERO)).await?;
    let page = page(args.clients, &storms);
    print!("{page}");
    if let Some(report) = &args.report {
        write(report, &page)?;
    }
    folder.done(true);
    // A time is never a failure, but whoever asked wants to know.
    Ok(ExitCode::SUCCESS)
}

fn write(folder: &Path, page: &str) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("storm.md"), page)?;
    Ok(())
}

/// The table of storms, as it is committed.
fn page(clients: u32, storms: &[Storm]) -> String {
    let mut page = format!(
        "# {clients} clients lose their node\n\n`cargo run --release -p chaos -- storm --clients {clients}`\n\n\
         | storm | clients that lost their connection | half back, ms | 99 % back, ms | last, ms | away | log queries | nodes' memory, MiB | goal |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---|\n"
    );
    for storm in storms {
        let (before, most) = storm.memory_bytes;
        let _ = writeln!(
            page,
            "| {} | {} | {} | {} | {} | {} | {} | {} → {} | 99 % in {} s, ≤ 1 query for 1,000: {} |",
            storm.kind.text(),
            storm.lost,
            storm.p50_ms,
            storm.p99_ms,
            storm.max_ms,
            storm.away,
            storm.log_queries,
            before >> 20,
            most >> 20,
            storm.kind.goal().as_secs(),
            if storm.reached() { "reached" } else { "**missed**" }
        );
    }
    page
}
