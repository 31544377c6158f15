//! `tidewire migrate`: brings the database's schema to the version of this program.

use crate::cli::connect::DatabaseArgs;
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
    let pool = args.database.pool().await?;
    let outcome = migrate(&pool.connect_options()).await?;
    if args.json {
        println!("{}", serde_json::json!({ "from": outcome.from, "to": outcome.to }));
    } else if outcome.from == outcome.to {
        println!("The schema is up to date (version {}).", outcome.to);
    } else {
        println!("The schema was at version {} and is at {} now.", outcome.from, outcome.to);
    }
    Ok(())
}
