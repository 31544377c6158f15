//! `tidewire tables`: the tracked tables and whether their capture is whole.

use std::fmt::Write as _;

use crate::cli::connect::{DatabaseArgs, Reader, explained};
use crate::cli::{print, print_json};
use crate::postgres::Pool;

/// List the tracked tables with their options and health
#[derive(clap::Args, Clone, Debug)]
pub struct TablesArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Print JSON for machines
    #[arg(long)]
    json: bool,
}

/// A tracked table.
#[derive(Clone, Debug, serde::Serialize)]
pub struct TrackedTable {
    /// Canonical name.
    pub table: String,
    /// The columns of its key; None: it has no key.
    pub key: Option<Vec<String>>,
    /// That key is the table's primary key, and changes with it.
    pub primary: bool,
    /// Columns carried; None: all but `except`.
    pub columns: Option<Vec<String>>,
    /// Columns left out.
    pub except: Option<Vec<String>>,
    /// Events carry the row before.
    pub before_image: bool,
    /// Its public channel.
    pub channel: Option<String>,
    /// Captured by statement.
    pub bulk: bool,
    /// Captured at the end of the transaction.
    pub deferred: bool,
    /// Replicated writes are captured, too.
    pub replica: bool,
    /// What is wrong with its capture.
    pub faults: Vec<String>,
}

from_row!(TrackedTable {
    table,
    key,
    primary,
    columns,
    except,
    before_image,
    channel,
    bulk,
    deferred,
    replica,
    faults
});

/// Runs the command.
///
/// # Errors
/// No database, or one without Tidewire's schema.
pub async fn run(args: TablesArgs) -> anyhow::Result<()> {
    let pool = args.database.pool(Reader::of(args.json)).await?;
    let tables = match tracked_tables(&pool).await {
        Ok(tables) => tables,
        Err(error) => return Err(explained(&pool, error).await),
    };
    if args.json { print_json(&tables) } else { print(&shown(&tables)) }
}

/// Every tracked table, by name. Nothing is repaired by looking.
///
/// # Errors
/// Postgres away, or without Tidewire's schema.
pub async fn tracked_tables(pool: &Pool) -> Result<Vec<TrackedTable>, sqlx::Error> {
    sqlx::query_as(
        "SELECT coalesce(tidewire.table_text(t.relid), t.table_name) AS table, t.key_columns AS key,
                coalesce((coalesce(o.options, t.fingerprint -> 'options') -> 'primary')::boolean, false) AS primary, t.columns,
                t.except_columns AS except, t.before_image, t.bulk, t.deferred, t.replica,
                CASE WHEN t.notify THEN tidewire.notify_channel(t.relid) END AS channel,
                CASE WHEN c.oid IS NULL THEN ARRAY['dropped: the leader takes it off the list']
                     WHEN o.options IS NULL THEN ARRAY['trigger_missing: all']
                     ELSE ARRAY(SELECT 'trigger_' || f.fault || ': ' || f.name || ' on ' || tidewire.table_text(f.target)
                                FROM tidewire.trigger_faults(c.oid, o.options) f
                                UNION ALL
                                SELECT 'trigger_disabled: ' || g.tgname || ' on ' || tidewire.table_text(g.tgrelid)
                                FROM pg_catalog.pg_trigger g
                                WHERE g.tgparentid <> 0 AND g.tgfoid = 'tidewire.capture()'::regprocedure
                                    AND g.tgenabled <> CASE WHEN (o.options ->> 'replica')::boolean THEN 'A' ELSE 'O' END
                                    AND g.tgrelid IN (SELECT p.relid FROM pg_catalog.pg_partition_tree(c.oid) p)
                                UNION ALL
                                -- What the leader may not repair; it says so until it, or another, has.
                                SELECT refused
                                FROM jsonb_array_elements_text(t.fingerprint -> 'faults') refused
                                WHERE refused LIKE 'repair_refused%')
                END AS faults
         FROM tidewire.tracked_tables t
         LEFT JOIN pg_catalog.pg_class c ON c.oid = t.relid
         LEFT JOIN LATERAL (SELECT tidewire.tracked_options(c.oid) AS options) AS o ON true
         ORDER BY 1",
    )
    .fetch_all(pool)
    .await
}

fn shown(tables: &[TrackedTable]) -> String {
    if tables.is_empty() {
        return "No table is tracked. `tidewire track --help` shows how to begin.\n".to_owned();
    }
    let width = tables.iter().map(|table| table.table.chars().count()).max().unwrap_or(0).clamp(5, 60);
    let mut out = format!("{:width$}  {:20}  {:7}  OPTIONS\n", "TABLE", "KEY", "HEALTH");
    for table in tables {
        let key = table.key.as_ref().map_or_else(|| "none".to_owned(), |key| key.join(", "));
        let health = if table.faults.is_empty() { "whole" } else { "broken" };
        let _ = writeln!(out, "{:width$}  {key:20}  {health:7}  {}", table.table, options(table));
        for fault in &table.faults {
            let _ = writeln!(out, "{:width$}  {fault}", "");
        }
    }
    if tables.iter().any(|table| !table.faults.is_empty()) {
        out.push_str("`tidewire doctor` says what to run.\n");
    }
    out
}

fn options(table: &TrackedTable) -> String {
    let mut options = Vec::new();
    if let Some(columns) = &table.columns {
        options.push(format!("only {}", columns.join(", ")));
    }
    if let Some(except) = &table.except {
        options.push(format!("without {}", except.join(", ")));
    }
    if let Some(channel) = &table.channel {
        options.push(format!("notifies {channel}"));
    }
    let switches = [
        (!table.before_image, "no before image"),
        (table.bulk, "bulk"),
        (table.deferred, "deferred"),
        (table.replica, "replica"),
    ];
    options.extend(switches.iter().filter(|(on, _)| *on).map(|(_, name)| (*name).to_owned()));
    options.join("; ")
}
