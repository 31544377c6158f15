//! The users' tables.

use anyhow::Context;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection};

/// All of one shape, so that every filter fits every table.
pub(super) const TABLES: [&str; 3] = ["public.accounts", "public.orders", "public.notes"];
/// Postgres ends a statement after this; writers set a shorter limit for themselves.
const STATEMENT: &str = "120s";
/// Domain events.
pub(super) const EVENTS: &str = "event:bid";
/// `w` is drawn below this; filters pick their share of the rows by it.
pub(super) const WEIGHTS: u32 = 100;

/// Makes the tables and tracks them.
///
/// # Errors
/// Postgres refuses.
pub async fn prepare(primary_url: &str) -> anyhow::Result<()> {
    let mut connection = connect(&as_owner(primary_url)).await?;
    for table in TABLES {
        let statement = format!(
            "CREATE TABLE {table} (id bigint PRIMARY KEY, val text NOT NULL, prev text, w integer NOT NULL);
             SELECT tidewire.track('{table}')"
        );
        connection.execute(sqlx::AssertSqlSafe(statement)).await.with_context(|| format!("cannot track {table}"))?;
    }
    Ok(())
}

/// Writers are no superusers.
pub(super) fn as_owner(url: &str) -> String {
    url.replacen("postgres://postgres@", "postgres://app@", 1)
}

/// A connection of its own, whose statements Postgres ends if they take too long.
///
/// # Errors
/// Postgres cannot be reached.
pub async fn connect(url: &str) -> Result<PgConnection, sqlx::Error> {
    let options: sqlx::postgres::PgConnectOptions = url.parse()?;
    let options = options.application_name("writer").options([("statement_timeout", STATEMENT)]);
    PgConnection::connect_with(&options.disable_statement_logging()).await
}
