//! The bench's own statements: what it asks of the log, and how it stops and starts the relay.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

/// The advisory lock that the leader holds.
const LEADER_KEY: i64 = 8_388_068_008_253_452_901;
/// How long the relay may need to be beaten to its lock.
const TAKE_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// A connection of an application's kind, with a clear error.
pub(super) async fn connect(database_url: &str) -> anyhow::Result<PgConnection> {
    PgConnection::connect(database_url).await.context("the database cannot be reached: check --database-url")
}

/// Runs one statement.
pub(super) async fn execute(connection: &mut PgConnection, sql: impl Into<String>) -> anyhow::Result<u64> {
    // Without parameters and in the simple protocol: a DO block that commits must not stand in a transaction.
    Ok(sqlx::raw_sql(AssertSqlSafe(sql.into())).execute(connection).await?.rows_affected())
}

/// The version, and what decides whether a commit is durable.
pub(super) async fn versions(connection: &mut PgConnection) -> anyhow::Result<Vec<(String, String)>> {
    let sql = "SELECT name, setting FROM pg_settings
        WHERE name IN ('server_version', 'fsync', 'synchronous_commit', 'shared_buffers') ORDER BY name DESC";
    let settings: Vec<(String, String)> = sqlx::query_as(sql).fetch_all(connection).await?;
    let name = |name: String| if name == "server_version" { "postgres".to_owned() } else { name };
    Ok(settings.into_iter().map(|(setting, value)| (name(setting), value)).collect())
}

/// The newest seq of the log; 0 when it is empty.
pub(super) async fn last_seq(connection: &mut PgConnection) -> anyhow::Result<i64> {
    Ok(sqlx::query_scalar("SELECT coalesce(max(seq), 0) FROM tidewire.event_log").fetch_one(connection).await?)
}

/// The newest term and the node that holds it.
pub(super) async fn newest_term(connection: &mut PgConnection) -> anyhow::Result<(i64, String)> {
    let sql = "SELECT term, node FROM tidewire.terms ORDER BY term DESC LIMIT 1";
    Ok(sqlx::query_as(sql).fetch_one(connection).await?)
}

/// Waits until nothing waits in the outbox.
pub(super) async fn drained(connection: &mut PgConnection, limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    let sql = "SELECT EXISTS (SELECT FROM tidewire.outbox)";
    while sqlx::query_scalar::<_, bool>(sql).fetch_one(&mut *connection).await? {
        if Instant::now() > deadline {
            bail!("the outbox is not empty after {} s: does a relay run?", limit.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// The relay stands still for as long as this lives: we hold the lock that makes a leader.
#[derive(Debug)]
pub(super) struct Standstill {
    connection: PgConnection,
}

impl Standstill {
    /// Ends the leader's connection and takes its lock before any candidate does: who waits for a lock gets it when it
    /// is freed, who only tries comes later.
    pub(super) async fn begin(database_url: &str) -> anyhow::Result<Self> {
        let (mut holder, mut other) = tokio::try_join!(connect(database_url), connect(database_url))?;
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut holder).await?;
        let take = sqlx::query("SELECT pg_advisory_lock($1)").bind(LEADER_KEY);
        let both = async { tokio::try_join!(async { Ok(take.execute(&mut holder).await?) }, evict(&mut other, pid)) };
        tokio::time::timeout(TAKE_LIMIT, both).await.context("the leader's lock was not freed")??;
        Ok(Self { connection: holder })
    }

    /// Lets the relay go on.
    pub(super) async fn end(self) -> anyhow::Result<()> {
        Ok(self.connection.close().await?)
    }
}

/// Once the backend `pid` waits for the leader's lock (or has it), ends whoever holds it.
async fn evict(connection: &mut PgConnection, pid: i32) -> anyhow::Result<()> {
    let (high, low) = (LEADER_KEY >> 32, LEADER_KEY & 0xffff_ffff);
    let is_ours = "locktype = 'advisory' AND objsubid = 1 AND classid::bigint = $1 AND objid::bigint = $2
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let asked = format!("SELECT EXISTS (SELECT FROM pg_locks WHERE {is_ours} AND pid = $3)");
    loop {
        let asked = sqlx::query_scalar::<_, bool>(AssertSqlSafe(asked.clone())).bind(high).bind(low).bind(pid);
        if asked.fetch_one(&mut *connection).await? {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    let end = format!("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE {is_ours} AND granted AND pid <> $3");
    sqlx::query(AssertSqlSafe(end)).bind(high).bind(low).bind(pid).execute(connection).await?;
    Ok(())
}
