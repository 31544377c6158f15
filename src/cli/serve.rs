//! `tidewire serve`: one node.

use std::path::PathBuf;

use tokio::io::AsyncReadExt as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Settings;
use crate::node::Node;
use crate::telemetry;

/// Run one node
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tidewire serve --database-url postgres://tidewire@db/app
  tidewire serve --config /etc/tidewire.toml --node n1
  TIDEWIRE_DATABASE_URL=postgres://… tidewire serve --listen 127.0.0.1:8080")]
pub struct ServeArgs {
    /// TOML file with the settings below [default: tidewire.toml where it stands, if there is one]
    #[arg(long, env = "TIDEWIRE_CONFIG")]
    config: Option<PathBuf>,
    /// Print the effective configuration, without secrets, and end
    #[arg(long)]
    print_config: bool,
    /// End when standard input ends: for supervisors that may die
    #[arg(long, hide = true)]
    exit_on_stdin_eof: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Runs the node until it is told to stop.
///
/// # Errors
/// A configuration that is not valid, a port in use, a database that can never serve.
pub async fn run(args: ServeArgs) -> anyhow::Result<()> {
    let file = Settings::of_file(args.config.as_deref())?.map(|(_, settings)| settings);
    let config = args.settings.or(file.unwrap_or_default()).resolve()?;
    if args.print_config {
        print!("{}", config.shown());
        return Ok(());
    }
    let settings = &config.settings;
    let filter = settings.log.as_deref().unwrap_or("info");
    let json = settings.log_json.unwrap_or_default();
    let _telemetry = telemetry::tracing::init(filter, json, settings.otlp_endpoint.as_deref(), &config.node)?;
    #[cfg(feature = "chaos")]
    {
        tracing::warn!("built with the feature `chaos`: anybody who reaches the port can end this process");
        crate::mutant::choose().map_err(anyhow::Error::msg)?;
    }
    tracing::info!(node = %config.node, configuration = %config.shown().replace('\n', "; "), "starting");
    let node = Node::start(&config).await?;
    tracing::info!(address = %node.address(), "listening");
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        reason = node.failed() => {
            node.abort().await;
            anyhow::bail!(reason);
        }
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = stdin_ends(args.exit_on_stdin_eof) => {}
    }
    tokio::select! {
        () = node.stop() => {}
        // A second signal: at once.
        _ = terminate.recv() => node.abort().await,
        _ = interrupt.recv() => node.abort().await,
    }
    Ok(())
}

async fn stdin_ends(watched: bool) {
    if !watched {
        return std::future::pending().await;
    }
    let (mut stdin, mut byte) = (tokio::io::stdin(), [0u8; 64]);
    while !matches!(stdin.read(&mut byte).await, Ok(0) | Err(_)) {}
}
