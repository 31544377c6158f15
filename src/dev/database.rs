//! The database of `tidewire dev`: a private server's or the user's, migrated, with a key; and who leads in it.

use anyhow::Context as _;

use crate::auth::key::ApiKey;
use crate::auth::scope::Scopes;
use crate::auth::store;
use crate::postgres::Pool;
use crate::postgres::{Database, migrate};

/// For the demo, the look at the leader, and the end.
const POOL_CONNECTIONS: u32 = 4;
/// The key is for benches and other people's tests too.
const KEY_CONNECTIONS: u32 = 100_000;
const KEY_NAME: &str = "tidewire dev";

/// Who leads, as the database knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Leader {
    /// Its term.
    pub(super) term: i64,
    /// The node's name.
    pub(super) node: String,
}

/// Connects to the primary that `url` names. It may hold a password; errors do not show it.
///
/// # Errors
/// When there is no usable primary.
pub(super) async fn connect(url: &str) -> anyhow::Result<Pool> {
    let database = Database::new(url, None, "dev", POOL_CONNECTIONS)?;
    database.probe().await?;
    database.renew().await?;
    Ok(database.pool())
}

/// Brings the schema up to date.
///
/// # Errors
/// Those of the migration.
pub(super) async fn migrate(pool: &Pool) -> anyhow::Result<()> {
    migrate::migrate(&pool.connect_options()).await.context("cannot migrate the database")?;
    Ok(())
}

/// Makes an API key with every scope. The secret is in it alone.
///
/// # Errors
/// When the database fails.
pub(super) async fn create_key(pool: &Pool) -> anyhow::Result<ApiKey> {
    let scopes = Scopes::all(KEY_CONNECTIONS);
    store::create_key(pool, KEY_NAME, &scopes, None).await.context("cannot create an API key")
}

/// Stores this key with every scope, unless it is there from an earlier run.
///
/// # Errors
/// It was revoked in this database, or another one has its id; when the database fails.
pub(super) async fn adopt_key(pool: &Pool, key: &ApiKey) -> anyhow::Result<()> {
    let scopes = serde_json::to_value(Scopes::all(KEY_CONNECTIONS))?;
    let usable: bool = sqlx::query_scalar(
        "WITH stored AS (
             INSERT INTO tidewire.api_keys (key_id, name, key_hash, scopes)
             VALUES ($1, $2, $3, $4)
             ON CONFLICT (key_id) DO NOTHING
             RETURNING true)
         SELECT EXISTS (SELECT FROM stored)
             OR EXISTS (SELECT FROM tidewire.api_keys WHERE key_id = $1 AND key_hash = $3 AND is_active)",
    )
    .bind(key.id().as_str())
    .bind(KEY_NAME)
    .bind(&key.hash().as_bytes()[..])
    .bind(scopes)
    .fetch_one(pool)
    .await
    .context("cannot store the API key")?;
    anyhow::ensure!(usable, "the key {} was revoked in this database: choose another --key", key.id());
    Ok(())
}

/// Takes back a key that the next run is given again: a revoked one could not come back.
///
/// # Errors
/// When the database fails.
pub(super) async fn remove_key(pool: &Pool, key: &ApiKey) -> anyhow::Result<()> {
    sqlx::query("DELETE FROM tidewire.api_keys WHERE key_id = $1 AND name = $2")
        .bind(key.id().as_str())
        .bind(KEY_NAME)
        .execute(pool)
        .await?;
    Ok(())
}

/// Ends the key.
///
/// # Errors
/// When the database fails.
pub(super) async fn revoke_key(pool: &Pool, key: &ApiKey) -> anyhow::Result<()> {
    store::revoke(pool, key.id()).await?;
    Ok(())
}

/// The leader of the newest term, if its lock's backend still lives. (A leader that was killed leaves its term
/// unreleased; a later backend may have the same process id, but started after the term.)
///
/// # Errors
/// When the database fails.
pub(super) async fn leader(pool: &Pool) -> sqlx::Result<Option<Leader>> {
    let row: Option<(i64, String)> = sqlx::query_as(
        "SELECT t.term, t.node
         FROM (SELECT term, node, pid, acquired_at, released_at FROM tidewire.terms ORDER BY term DESC LIMIT 1) t
         JOIN pg_stat_activity a ON a.pid = t.pid AND a.backend_start <= t.acquired_at
         WHERE t.released_at IS NULL",
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|(term, node)| Leader { term, node }))
}
