//! `tidewire track` and `tidewire untrack`: which tables are captured, and how.

use anyhow::bail;
use tracing::Level;

use crate::cli::connect::{DatabaseArgs, Reader, explained, heard};
use crate::cli::{print, print_json};
use crate::postgres::Pool;
use crate::table_name::TableName;

/// Capture every change of a table from now on
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Run again with other options, it changes the options to those given.

Examples:
  tidewire track public.orders
  tidewire track public.documents --except body --notify
  tidewire track app.metrics --key device --key at --no-before-image --bulk")]
pub struct TrackArgs {
    /// The table: name, schema.name; parts with dots, spaces, quotes or colons in double quotes
    table: TableName,
    /// Carry only this column, and the key (repeat for more)
    #[arg(long = "column", value_name = "COLUMN", conflicts_with = "except")]
    columns: Vec<String>,
    /// Leave this column out (repeat for more)
    #[arg(long, value_name = "COLUMN")]
    except: Vec<String>,
    /// The row's key where there is no primary key, or another one (repeat for more)
    #[arg(long, value_name = "COLUMN")]
    key: Vec<String>,
    /// Do not carry the row before the change (no transitions, no row conditions, no state in the past)
    #[arg(long)]
    no_before_image: bool,
    /// Also notify plain LISTEN users, on cdc_<table> (cdc_<schema>_<table> outside public)
    #[arg(long)]
    notify: bool,
    /// Capture by statement: half the cost for statements that change many rows
    #[arg(long, conflicts_with = "deferred")]
    bulk: bool,
    /// Capture at the end of the transaction: true order where other row triggers change rows of the same table
    #[arg(long)]
    deferred: bool,
    /// Capture what logical replication and restores write, too
    #[arg(long)]
    replica: bool,
    #[command(flatten)]
    database: DatabaseArgs,
    /// Print JSON for machines
    #[arg(long)]
    json: bool,
}

/// Stop capturing a table
#[derive(clap::Args, Clone, Debug)]
pub struct UntrackArgs {
    /// The table: name, schema.name
    table: TableName,
    #[command(flatten)]
    database: DatabaseArgs,
    /// Print JSON for machines
    #[arg(long)]
    json: bool,
}

/// Tracks a table.
///
/// # Errors
/// What Postgres says, with its hint.
pub async fn run(args: TrackArgs) -> anyhow::Result<()> {
    let pool = args.database.pool(Reader::of(args.json)).await?;
    let list = |names: &[String]| (!names.is_empty()).then(|| names.to_vec());
    let (schema, table) = parts(&args.table)?;
    let work = sqlx::query(
        "SELECT tidewire.track(format('%I.%I', $1::text, $2::text)::regclass, columns => $3, except_columns => $4, key => $5,
                before_image => $6, notify => $7, bulk => $8, deferred => $9, replica => $10)",
    )
    .bind(schema)
    .bind(table)
    .bind(list(&args.columns))
    .bind(list(&args.except))
    .bind(list(&args.key))
    .bind(!args.no_before_image)
    .bind(args.notify)
    .bind(args.bulk)
    .bind(args.deferred)
    .bind(args.replica)
    .execute(&pool);
    let mut warnings = told(&pool, work).await?;
    warnings.extend(hidden_by_row_security(&pool, &args.table).await?);
    answer(&pool, &args.table, true, &warnings, args.json).await
}

/// Untracks a table.
///
/// # Errors
/// What Postgres says, with its hint.
pub async fn run_untrack(args: UntrackArgs) -> anyhow::Result<()> {
    let pool = args.database.pool(Reader::of(args.json)).await?;
    let (schema, table) = parts(&args.table)?;
    let work = sqlx::query("SELECT tidewire.untrack(format('%I.%I', $1::text, $2::text)::regclass)")
        .bind(schema)
        .bind(table)
        .execute(&pool);
    let warnings = told(&pool, work).await?;
    answer(&pool, &args.table, false, &warnings, args.json).await
}

fn parts(name: &TableName) -> anyhow::Result<(String, String)> {
    let Some((schema, table)) = name.schema_and_table() else {
        bail!("{name} is a domain event: domain events need no tracking, they come from tidewire.emit()");
    };
    Ok((schema.into_owned(), table.into_owned()))
}

/// Why a key may see nothing of the table, though its scopes name it.
async fn hidden_by_row_security(pool: &Pool, name: &TableName) -> anyhow::Result<Option<String>> {
    let (schema, table) = parts(name)?;
    let row_security: bool = sqlx::query_scalar(
        "SELECT relrowsecurity FROM pg_catalog.pg_class WHERE oid = format('%I.%I', $1::text, $2::text)::regclass",
    )
    .bind(schema)
    .bind(table)
    .fetch_one(pool)
    .await?;
    Ok(row_security.then(|| {
        format!(
            "table {name} has row level security: only keys with a row condition for it may read it, `*` leaves it out for all \
             others; make one with: tidewire keys create --table {name} --condition …"
        )
    }))
}

/// The warnings that came with the answer.
async fn told<T>(pool: &Pool, work: impl Future<Output = Result<T, sqlx::Error>>) -> anyhow::Result<Vec<String>> {
    let (done, notices) = heard(work).await;
    if let Err(error) = done {
        return Err(explained(pool, error).await);
    }
    Ok(notices.into_iter().filter(|(level, _)| *level <= Level::WARN).map(|(_, text)| text).collect())
}

async fn answer(pool: &Pool, name: &TableName, tracked: bool, warnings: &[String], json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&serde_json::json!({ "table": name, "tracked": tracked, "warnings": warnings }));
    }
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    if !tracked {
        return print(&format!("{name} is not captured any more.\n"));
    }
    let key: Result<Option<Option<Vec<String>>>, _> =
        sqlx::query_scalar("SELECT key_columns FROM tidewire.tracked_tables WHERE table_name = $1")
            .bind(name.as_str())
            .fetch_optional(pool)
            .await;
    let Ok(key) = key else {
        // A role that may track its own tables may not read this list.
        return print(&format!("{name} is captured from now on.\n"));
    };
    print(&match key.flatten() {
        Some(key) => format!("{name} is captured from now on; its key is {}.\n", key.join(", ")),
        None => {
            format!("{name} is captured from now on, without a key: it has no primary key, and no --key was given.\n")
        }
    })
}
