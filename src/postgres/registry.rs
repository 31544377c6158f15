//! The registry of nodes: `tidewire.nodes`, and each node's connections by key in `tidewire.key_connections`.
//!
//! One statement a second and node writes and reads both. A node is *fresh* while its heartbeat is younger than
//! [`FRESH`] by the database's clock; the counts of any other node count for nothing. `key_connections` is unlogged and
//! may be empty after a crash: every heartbeat writes whatever is missing, so it mends itself.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::Row;
use uuid::Uuid;

use crate::auth::key::KeyId;
use crate::cursor::{Epoch, Seq};
use crate::postgres::Pool;

/// How old a node's heartbeat may be for its connections to count: five heartbeats.
pub const FRESH: Duration = Duration::from_secs(5);
/// A node whose heartbeat is older than this has missed one: it may have died.
pub const SILENT: Duration = Duration::from_millis(1_500);
/// When a node that says nothing is forgotten.
pub const FORGET_AFTER: Duration = Duration::from_hours(24);
/// Most nodes that [`list`] returns.
pub const MAX_LISTED_NODES: i64 = 1_000;

/// Who a node is, from its start to its end.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    /// Its name, unique in the cluster and the same after a restart.
    pub node: String,
    /// New with each start.
    pub instance: Uuid,
    /// Where clients reach it.
    pub url: Option<String>,
    /// The program's version.
    pub version: String,
}

/// How a node does, for `status` and `/v1/cluster`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Not yet ready for the first time.
    Starting,
    /// Takes new connections.
    Ready,
    /// Keeps its connections but takes no new ones: behind the log.
    Behind,
    /// Sends its clients away.
    Draining,
    /// Has said goodbye.
    Stopped,
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Behind => "behind",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        })
    }
}

/// What a node says about itself with each heartbeat.
#[derive(Clone, Copy, Debug)]
pub struct NodeReport {
    /// Epoch of its high water, once it knows one.
    pub epoch: Option<Epoch>,
    /// Newest seq it holds.
    pub high_water: Option<Seq>,
    /// Open connections.
    pub connections: u32,
    /// Open subscriptions.
    pub subscriptions: u32,
    /// How it does.
    pub state: NodeState,
}

/// A key's connections on all other fresh nodes together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Elsewhere {
    /// How many.
    pub connections: u32,
    /// Those of them on nodes that drain, or have been silent for [`SILENT`]: about to go, or gone already.
    pub leaving: u32,
}

/// What a heartbeat learned.
#[derive(Debug, Default)]
pub struct Heard {
    /// Connections by key.
    pub others: HashMap<KeyId, Elsewhere>,
    /// How many other fresh nodes there are.
    pub other_nodes: u32,
    /// Another live process wrote under this node's name a moment ago.
    pub rival: bool,
}

/// A node as its last heartbeat described it.
#[derive(Clone, Debug, Serialize)]
pub struct NodeInfo {
    /// Its name.
    pub node: String,
    /// Its last start.
    pub instance: Uuid,
    /// Where clients reach it.
    pub url: Option<String>,
    /// The program's version.
    pub version: String,
    /// When it started.
    pub started_at: DateTime<Utc>,
    /// Its last heartbeat.
    pub heartbeat_at: DateTime<Utc>,
    /// Whether that was within [`FRESH`], by the database's clock.
    pub fresh: bool,
    /// Epoch of its high water.
    pub epoch: Option<i32>,
    /// Newest seq it held.
    pub high_water: Option<i64>,
    /// Open connections.
    pub connections: i32,
    /// Open subscriptions.
    pub subscriptions: i32,
    /// How it did.
    pub state: String,
}

/// Counts that stand already are not written again, not even locked, which ON CONFLICT … WHERE would do. A heartbeat
/// that a crash takes back is worth no wait (synchronous_commit).
const HEARTBEAT: &str = "
    WITH relaxed AS MATERIALIZED (
        SELECT set_config('synchronous_commit', 'off', true)
    ), before AS (
        SELECT instance <> $2 AND state <> 'stopped'
               AND heartbeat_at > clock_timestamp() - $3 * interval '1 second' AS rival
        FROM tidewire.nodes
        WHERE node = $1
    ), me AS (
        INSERT INTO tidewire.nodes AS n (node, instance, url, version, started_at, heartbeat_at,
                                         epoch, high_water, connections, subscriptions, state)
        SELECT $1, $2, $4, $5, clock_timestamp(), clock_timestamp(), $6, $7, $8, $9, $10
        FROM relaxed
        ON CONFLICT (node) DO UPDATE
        SET instance = EXCLUDED.instance, url = EXCLUDED.url, version = EXCLUDED.version,
            started_at = CASE WHEN n.instance = EXCLUDED.instance THEN n.started_at ELSE EXCLUDED.started_at END,
            heartbeat_at = EXCLUDED.heartbeat_at, epoch = EXCLUDED.epoch, high_water = EXCLUDED.high_water,
            connections = EXCLUDED.connections, subscriptions = EXCLUDED.subscriptions, state = EXCLUDED.state
    ), mine AS MATERIALIZED (
        SELECT * FROM unnest($11::text[], $12::integer[]) AS m (key_id, connections)
    ), gone AS (
        DELETE FROM tidewire.key_connections AS c
        WHERE c.node = $1 AND NOT EXISTS (SELECT FROM mine WHERE mine.key_id = c.key_id)
    ), changed AS (
        SELECT key_id, connections FROM mine
        EXCEPT
        SELECT key_id, connections FROM tidewire.key_connections WHERE node = $1
    ), written AS (
        INSERT INTO tidewire.key_connections (node, key_id, connections, updated_at)
        SELECT $1, key_id, connections, clock_timestamp() FROM changed
        ON CONFLICT (node, key_id) DO UPDATE
        SET connections = EXCLUDED.connections, updated_at = EXCLUDED.updated_at
    ), fresh AS MATERIALIZED (
        SELECT node, state = 'draining' OR heartbeat_at < clock_timestamp() - $13 * interval '1 second' AS leaving
        FROM tidewire.nodes
        WHERE node <> $1 AND state <> 'stopped'
              AND heartbeat_at > clock_timestamp() - $3 * interval '1 second'
    ), counts AS MATERIALIZED (
        SELECT key_id, sum(connections) AS connections, coalesce(sum(connections) FILTER (WHERE leaving), 0) AS leaving
        FROM tidewire.key_connections JOIN fresh USING (node)
        GROUP BY key_id
    )
    SELECT (SELECT count(*) FROM fresh) AS other_nodes,
           coalesce((SELECT rival FROM before), false) AS rival,
           (SELECT array_agg(key_id ORDER BY key_id) FROM counts) AS key_ids,
           (SELECT array_agg(connections ORDER BY key_id) FROM counts) AS connections,
           (SELECT array_agg(leaving ORDER BY key_id) FROM counts) AS leaving";

/// Writes a heartbeat and this node's connections by key, and reads those of the others: one statement.
///
/// # Errors
/// Postgres away.
pub async fn heartbeat(
    pool: &Pool,
    identity: &NodeIdentity,
    report: &NodeReport,
    own: &[(KeyId, u32)],
) -> Result<Heard, sqlx::Error> {
    let (key_ids, connections): (Vec<&str>, Vec<i32>) =
        own.iter().map(|(key_id, count)| (key_id.as_str(), i32::try_from(*count).unwrap_or(i32::MAX))).unzip();
    let row = sqlx::query(HEARTBEAT)
        .bind(&identity.node)
        .bind(identity.instance)
        .bind(FRESH.as_secs_f64())
        .bind(&identity.url)
        .bind(&identity.version)
        .bind(report.epoch.map(|epoch| i32::try_from(epoch).unwrap_or(i32::MAX)))
        .bind(report.high_water.map(|seq| i64::try_from(seq).unwrap_or(i64::MAX)))
        .bind(i32::try_from(report.connections).unwrap_or(i32::MAX))
        .bind(i32::try_from(report.subscriptions).unwrap_or(i32::MAX))
        .bind(report.state.to_string())
        .bind(key_ids)
        .bind(connections)
        .bind(SILENT.as_secs_f64())
        .fetch_one(pool)
        .await?;
    let key_ids: Option<Vec<String>> = row.try_get("key_ids")?;
    let connections: Option<Vec<i64>> = row.try_get("connections")?;
    let leaving: Option<Vec<i64>> = row.try_get("leaving")?;
    let count = |count: i64| u32::try_from(count).unwrap_or(u32::MAX);
    let counts = connections.into_iter().flatten().zip(leaving.into_iter().flatten());
    let elsewhere =
        counts.map(|(connections, leaving)| Elsewhere { connections: count(connections), leaving: count(leaving) });
    Ok(Heard {
        others: key_ids.into_iter().flatten().map(|key_id| KeyId::from_stored(&key_id)).zip(elsewhere).collect(),
        other_nodes: u32::try_from(row.try_get::<i64, _>("other_nodes")?).unwrap_or(u32::MAX),
        rival: row.try_get("rival")?,
    })
}

/// Says goodbye: the node's connections count for nothing from now on. Does nothing once another process has the name.
///
/// # Errors
/// Postgres away; the node then goes stale by itself.
pub async fn leave(pool: &Pool, identity: &NodeIdentity) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH leaving AS (
             UPDATE tidewire.nodes
             SET state = 'stopped', connections = 0, subscriptions = 0
             WHERE node = $1 AND instance = $2
             RETURNING node
         )
         DELETE FROM tidewire.key_connections AS c USING leaving WHERE c.node = leaving.node",
    )
    .bind(&identity.node)
    .bind(identity.instance)
    .execute(pool)
    .await?;
    Ok(())
}

/// Forgets nodes without a heartbeat for [`FORGET_AFTER`], and the connections of all that are no longer fresh. A node
/// that was only paused writes its own again.
///
/// # Errors
/// Postgres away.
pub async fn sweep(pool: &Pool) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH forgotten AS (
             DELETE FROM tidewire.nodes WHERE heartbeat_at < clock_timestamp() - $1 * interval '1 second'
         )
         DELETE FROM tidewire.key_connections AS c
         WHERE NOT EXISTS (
             SELECT FROM tidewire.nodes AS n
             WHERE n.node = c.node AND n.heartbeat_at > clock_timestamp() - $2 * interval '1 second'
         )",
    )
    .bind(FORGET_AFTER.as_secs_f64())
    .bind(FRESH.as_secs_f64())
    .execute(pool)
    .await?;
    Ok(())
}

/// All nodes that are not forgotten, by name.
///
/// # Errors
/// Postgres away.
pub async fn list(pool: &Pool) -> Result<Vec<NodeInfo>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT node, instance, url, version, started_at, heartbeat_at, epoch, high_water, connections, subscriptions,
                state, state <> 'stopped' AND heartbeat_at > clock_timestamp() - $1 * interval '1 second' AS fresh
         FROM tidewire.nodes
         ORDER BY node
         LIMIT $2",
    )
    .bind(FRESH.as_secs_f64())
    .bind(MAX_LISTED_NODES)
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(NodeInfo {
                node: row.try_get("node")?,
                instance: row.try_get("instance")?,
                url: row.try_get("url")?,
                version: row.try_get("version")?,
                started_at: row.try_get("started_at")?,
                heartbeat_at: row.try_get("heartbeat_at")?,
                fresh: row.try_get("fresh")?,
                epoch: row.try_get("epoch")?,
                high_water: row.try_get("high_water")?,
                connections: row.try_get("connections")?,
                subscriptions: row.try_get("subscriptions")?,
                state: row.try_get("state")?,
            })
        })
        .collect()
}
