//! `tidewire migrate`: brings the database's schema to the version of this program.

use crate::cli::connect::{DatabaseArgs, Reader, heard};
use crate::cli::{print, print_json};
use crate::postgres::migrate::migrate;

/// Create or upgrade Tidewire's schema in the database
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Safe to run from several places at once and again and again. `tidewire serve` does the same when it starts.

Example:
  tidewire migrate --database-url postgres://owner@db.example.com/app")]
pub struct MigrateArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Print JSON for machines
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// No database, or one that refuses; with the grant to run where one is missing.
pub async fn run(args: MigrateArgs) -> anyhow::Result<()> {
    let pool = args.database.pool(Reader::of(args.json)).await?;
    let (outcome, notices) = heard(migrate(&pool.connect_options())).await;
    let outcome = outcome?;
    // What a migration had to leave out begins so; what else a server says is about objects that exist already.
    let notes: Vec<_> = notices.iter().filter_map(|(_, text)| text.strip_prefix("tidewire: ")).collect();
    if args.json {
        return print_json(&serde_json::json!({ "from": outcome.from, "to": outcome.to, "notes": notes }));
    }
    for note in notes {
        eprintln!("note: {note}");
    }
    print(&if outcome.from == outcome.to {
        format!("The schema is up to date (version {}).\n", outcome.to)
    } else {
        format!("The schema was at version {} and is at {} now.\n", outcome.from, outcome.to)
    })
}
