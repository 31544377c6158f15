//! What `tidewire dev` checks in a database of the user's before it changes anything there.
//!
//! Whatever would make the run fail later is a refusal here: a database that is refused stays as it was. What the
//! migration checks by itself before its first change (version, rights, encoding) is left to it.

use anyhow::{Context as _, bail, ensure};

use super::{DevOptions, demo};
use crate::auth::key::ApiKey;
use crate::postgres::Pool;
use crate::postgres::registry;

/// A node's pool and its own connections, at most (`--pool-size`, and eight beside it).
const CONNECTIONS_OF_A_NODE: i64 = 13;
/// Our own pool, the migration, and one person with `psql`.
const OTHER_CONNECTIONS: i64 = 6;

/// Refuses a database in which the run could not go well.
///
/// # Errors
/// The first reason, with what to do.
pub(super) async fn check(pool: &Pool, options: &DevOptions) -> anyhow::Result<()> {
    writable(pool).await?;
    nobody_else(pool).await?;
    room_for_nodes(pool, options.nodes).await?;
    if let Some(key) = &options.key {
        usable_key(pool, key).await?;
    }
    if !options.no_demo {
        demo::possible(pool).await?;
    }
    Ok(())
}

async fn writable(pool: &Pool) -> anyhow::Result<()> {
    let read_only: bool =
        sqlx::query_scalar("SELECT current_setting('transaction_read_only')::bool").fetch_one(pool).await?;
    ensure!(!read_only, "this database or role is read-only: ALTER ROLE … SET default_transaction_read_only = off;");
    Ok(())
}

/// A second cluster with nodes of the same names would be one with the first, and a later version would migrate the
/// first one's schema under it.
async fn nobody_else(pool: &Pool) -> anyhow::Result<()> {
    if !may_read(pool, "nodes").await? {
        return Ok(());
    }
    let nodes = registry::list(pool).await.context("the nodes of this database")?;
    let living: Vec<_> = nodes.into_iter().filter(|node| node.fresh).map(|node| node.node).collect();
    ensure!(
        living.is_empty(),
        "this database already has a cluster (nodes {}): stop it, or use another database; `tidewire serve --node <name>` adds \
         a node to it",
        living.join(", ")
    );
    Ok(())
}

async fn room_for_nodes(pool: &Pool, nodes: u16) -> anyhow::Result<()> {
    let needed = i64::from(nodes) * CONNECTIONS_OF_A_NODE + OTHER_CONNECTIONS;
    let (free, whose): (i64, String) = sqlx::query_as(
        "WITH sessions AS (SELECT usesysid, datid FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend')
         SELECT room.free, room.whose
         FROM (
             SELECT current_setting('max_connections')::bigint
                        - CASE WHEN current_setting('is_superuser')::bool THEN 0
                               ELSE current_setting('superuser_reserved_connections')::bigint END
                        - (SELECT count(*) FROM sessions) AS free,
                    'the server (max_connections)' AS whose
             UNION ALL
             SELECT datconnlimit - (SELECT count(*) FROM sessions WHERE datid = d.oid), 'the database (CONNECTION LIMIT)'
             FROM pg_catalog.pg_database d
             WHERE datname = current_database() AND datconnlimit >= 0
                 AND NOT current_setting('is_superuser')::bool
             UNION ALL
             SELECT rolconnlimit - (SELECT count(*) FROM sessions WHERE usesysid = r.oid), 'the role (CONNECTION LIMIT)'
             FROM pg_catalog.pg_roles r
             WHERE rolname = session_user AND rolconnlimit >= 0
                 AND NOT current_setting('is_superuser')::bool
         ) AS room
         ORDER BY room.free
         LIMIT 1",
    )
    .fetch_one(pool)
    .await?;
    ensure!(
        free >= needed,
        "{whose} has room for {} more connections, and {nodes} nodes take up to {needed}: raise that limit, end other \
         sessions, or start fewer with --nodes",
        free.max(0)
    );
    Ok(())
}

/// A key that was revoked here would let nobody in.
async fn usable_key(pool: &Pool, key: &ApiKey) -> anyhow::Result<()> {
    if !may_read(pool, "api_keys").await? {
        return Ok(());
    }
    let stored: Option<(Vec<u8>, bool)> =
        sqlx::query_as("SELECT key_hash, is_active FROM tidewire.api_keys WHERE key_id = $1")
            .bind(key.id().as_str())
            .fetch_optional(pool)
            .await?;
    match stored {
        Some((hash, _)) if hash[..] != key.hash().as_bytes()[..] => {
            bail!("this database has another key with the id {}: choose another --key", key.id())
        }
        Some((_, false)) => bail!("the key {} was revoked in this database: choose another --key", key.id()),
        Some((_, true)) | None => Ok(()),
    }
}

/// Whether the table of ours exists and may be read. Where it may not, the migration says what is missing, before its
/// first change.
async fn may_read(pool: &Pool, table: &str) -> sqlx::Result<bool> {
    sqlx::query_scalar(
        "SELECT coalesce(bool_or(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')), false)
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = 'tidewire' AND c.relname = $1",
    )
    .bind(table)
    .fetch_one(pool)
    .await
}
