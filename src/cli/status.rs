//! `tidewire status`: the cluster as its database knows it.
//!
//! Who leads is not a matter of record but of the leader's lock: a term whose connection no longer holds it is over,
//! whether anybody wrote that down or not.

use std::fmt::Write as _;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::cli::connect::{DatabaseArgs, Reader, explained};
use crate::cli::{print, print_json};
use crate::postgres::Pool;
use crate::postgres::locks::{ForeignLock, foreign_locks};
use crate::postgres::registry::{self, NodeInfo};
use crate::relay::{LEADER_LOCK, PARK_LOCK};

/// Outbox rows that are counted; beyond, "more than".
const MAX_COUNTED: i64 = 100_000;
/// A lock that is still there after this is not a passing one.
const LOCK_SAMPLE: Duration = Duration::from_millis(300);

/// Show nodes, leader, lag and the log
#[derive(clap::Args, Clone, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Print JSON for machines
    #[arg(long)]
    json: bool,
}

/// The cluster at one moment.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Status {
    /// Who leads; None: nobody does.
    pub leader: Option<Leader>,
    /// The log's incarnation; 0 before the first term.
    pub epoch: i32,
    /// The log's ends and size.
    pub log: Log,
    /// Who holds the relay's locks and is not the relay.
    pub foreign_locks: Vec<ForeignLock>,
    /// What waits to be relayed.
    pub outbox: Outbox,
    /// Use of Postgres's notification queue, 0 to 1.
    pub notify_queue: f64,
    /// Every node with a heartbeat in the last day.
    pub nodes: Vec<NodeInfo>,
}

/// The term that holds the lock.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Leader {
    /// The node's name.
    pub node: String,
    /// Its term.
    pub term: i64,
    /// Backend that holds the lock.
    pub pid: i32,
    /// Since when.
    pub acquired_at: DateTime<Utc>,
    /// It sleeps until a writer wakes it.
    pub parked: bool,
}

from_row!(Leader { node, term, pid, acquired_at, parked });

/// The log.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Log {
    /// Oldest seq; 0: the log is empty.
    pub oldest: i64,
    /// Newest seq.
    pub newest: i64,
    /// When the newest was relayed.
    pub newest_at: Option<DateTime<Utc>>,
    /// Partitions, the empty one ahead included.
    pub partitions: i64,
    /// On disk, bytes.
    pub bytes: i64,
}

from_row!(Log { oldest, newest, newest_at, partitions, bytes });

/// The outbox.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Outbox {
    /// Rows that are not relayed yet; counting stops at 100,000.
    pub events: i64,
    /// Age of the oldest of them, milliseconds; 0: there is none.
    pub lag_ms: i64,
}

from_row!(Outbox { events, lag_ms });

/// Runs the command.
///
/// # Errors
/// No database, or one without Tidewire's schema.
#[expect(clippy::disallowed_methods, reason = "the edge: ages are shown by the clock on the wall")]
pub async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let pool = args.database.pool(Reader::of(args.json)).await?;
    let status = match read(&pool).await {
        Ok(status) => status,
        Err(error) => return Err(explained(&pool, error).await),
    };
    if args.json { print_json(&status) } else { print(&shown(&status, Utc::now())) }
}

/// Reads the cluster's state.
///
/// # Errors
/// Postgres away, or without Tidewire's schema.
pub async fn read(pool: &Pool) -> Result<Status, sqlx::Error> {
    Ok(Status {
        leader: leader(pool).await?,
        epoch: sqlx::query_scalar("SELECT coalesce(max(epoch), 0) FROM tidewire.epochs").fetch_one(pool).await?,
        foreign_locks: foreign(pool).await?,
        log: log(pool).await?,
        outbox: outbox(pool).await?,
        notify_queue: sqlx::query_scalar("SELECT pg_notification_queue_usage()").fetch_one(pool).await?,
        nodes: registry::list(pool).await?,
    })
}

/// The newest term whose backend holds the leader's lock.
///
/// # Errors
/// Postgres away, or without Tidewire's schema.
pub async fn leader(pool: &Pool) -> Result<Option<Leader>, sqlx::Error> {
    // A bigint key stands in pg_locks as two halves, with objsubid 1.
    sqlx::query_as(
        "WITH held AS (
            SELECT pid, (classid::bigint << 32) | objid::bigint AS key
            FROM pg_catalog.pg_locks
            WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND mode = 'ExclusiveLock'
                AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()))
         SELECT node, term, t.pid, acquired_at, EXISTS (SELECT FROM held h WHERE h.pid = t.pid AND key = $2) AS parked
         FROM tidewire.terms t
         WHERE EXISTS (SELECT FROM held h WHERE h.pid = t.pid AND key = $1)
         ORDER BY term DESC LIMIT 1",
    )
    .bind(LEADER_LOCK)
    .bind(PARK_LOCK)
    .fetch_optional(pool)
    .await
}

/// Who holds the relay's locks for longer than a moment and is not the relay.
///
/// # Errors
/// Postgres away, or without Tidewire's schema.
pub async fn foreign(pool: &Pool) -> Result<Vec<ForeignLock>, sqlx::Error> {
    let mut found = foreign_locks(pool, LEADER_LOCK, PARK_LOCK).await?;
    if !found.is_empty() {
        // A leader that has not begun its term yet is none.
        tokio::time::sleep(LOCK_SAMPLE).await;
        let again = foreign_locks(pool, LEADER_LOCK, PARK_LOCK).await?;
        found.retain(|one| again.iter().any(|other| other.lock == one.lock && other.end == one.end));
    }
    Ok(found)
}

async fn log(pool: &Pool) -> Result<Log, sqlx::Error> {
    sqlx::query_as(
        "SELECT coalesce(min(seq), 0) AS oldest, coalesce(max(seq), 0) AS newest,
                (SELECT relayed_at FROM tidewire.event_log ORDER BY seq DESC LIMIT 1) AS newest_at,
                (SELECT count(*) FROM pg_catalog.pg_inherits WHERE inhparent = 'tidewire.event_log'::regclass) AS partitions,
                (SELECT coalesce(sum(pg_total_relation_size(inhrelid)), 0)::bigint
                 FROM pg_catalog.pg_inherits WHERE inhparent = 'tidewire.event_log'::regclass) AS bytes
         FROM tidewire.event_log",
    )
    .fetch_one(pool)
    .await
}

/// What waits to be relayed.
///
/// # Errors
/// Postgres away, or without Tidewire's schema.
pub async fn outbox(pool: &Pool) -> Result<Outbox, sqlx::Error> {
    sqlx::query_as(
        "SELECT count(*) AS events,
                coalesce(extract(epoch FROM clock_timestamp() - min(created_at)) * 1000, 0)::bigint AS lag_ms
         FROM (SELECT created_at FROM tidewire.outbox ORDER BY id LIMIT $1) AS waiting",
    )
    .bind(MAX_COUNTED)
    .fetch_one(pool)
    .await
}

fn shown(status: &Status, now: DateTime<Utc>) -> String {
    let mut out = String::new();
    let ago = |at: DateTime<Utc>| span((now - at).num_milliseconds());
    match &status.leader {
        Some(leader) => {
            let Leader { node, term, pid, .. } = leader;
            let parked = if leader.parked { ", parked until a writer wakes it" } else { "" };
            let _ =
                writeln!(out, "Leader   {node}, term {term}, for {} (backend {pid}){parked}", ago(leader.acquired_at));
        }
        None => {
            let fresh = status.nodes.iter().filter(|node| node.fresh).count();
            let what = match fresh {
                0 => "no node runs: start one with `tidewire serve`".to_owned(),
                fresh => format!("{fresh} nodes run: one of them takes over within a second, or its log says why not"),
            };
            let _ = writeln!(out, "Leader   none: nothing is relayed; {what}");
        }
    }
    for lock in &status.foreign_locks {
        let _ = writeln!(out, "Locks    {} {}; end it: {}", lock.holder, lock.effect(), lock.end);
    }
    let Log { oldest, newest, partitions, bytes, .. } = status.log;
    let when = status.log.newest_at.map_or_else(|| "empty".to_owned(), |at| format!("newest {} ago", ago(at)));
    let _ = writeln!(
        out,
        "Log      epoch {}, seq {oldest} to {newest}, {when}, {partitions} partitions, {} MiB",
        status.epoch,
        bytes >> 20
    );
    let Outbox { events, lag_ms } = status.outbox;
    let more = if events == MAX_COUNTED { "more than " } else { "" };
    let _ = writeln!(out, "Outbox   {more}{events} events wait, the oldest for {}", span(lag_ms));
    let _ = writeln!(out, "Notify   {:.1} % of the queue in use", status.notify_queue * 100.0);
    if status.nodes.is_empty() {
        return out;
    }
    let width = status.nodes.iter().map(|node| node.node.chars().count()).max().unwrap_or(0).clamp(4, 40);
    let _ = writeln!(
        out,
        "\n{:width$}  {:8}  {:>9}  {:>11}  {:>13}  {:>9}  URL",
        "NODE", "STATE", "LAG SEQS", "CONNECTIONS", "SUBSCRIPTIONS", "HEARTBEAT"
    );
    for node in &status.nodes {
        let state = if node.fresh || node.state == "stopped" { node.state.as_str() } else { "silent" };
        let lag = match (node.fresh, node.high_water) {
            (true, Some(high_water)) => (newest - high_water).max(0).to_string(),
            _ => "?".to_owned(),
        };
        let _ = writeln!(
            out,
            "{:width$}  {state:8}  {lag:>9}  {:>11}  {:>13}  {:>9}  {}",
            node.node,
            node.connections,
            node.subscriptions,
            ago(node.heartbeat_at),
            node.url.as_deref().unwrap_or("")
        );
    }
    out
}

/// A time that people read at a glance.
fn span(ms: i64) -> String {
    match ms.max(0) {
        ms @ ..1_000 => format!("{ms} ms"),
        ms @ ..120_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        ms @ ..7_200_000 => format!("{} min", ms / 60_000),
        ms @ ..172_800_000 => format!("{} h", ms / 3_600_000),
        ms => format!("{} days", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_without_a_leader_says_so_and_what_to_do() {
        let status = Status {
            leader: None,
            epoch: 1,
            foreign_locks: vec![ForeignLock {
                lock: "leader".to_owned(),
                shared: false,
                holder: "session 7 of role app".to_owned(),
                end: "SELECT pg_terminate_backend(7);".to_owned(),
            }],
            log: Log { oldest: 1, newest: 7, newest_at: None, partitions: 1, bytes: 0 },
            outbox: Outbox { events: 3, lag_ms: 90_000 },
            notify_queue: 0.0,
            nodes: Vec::new(),
        };
        let text = shown(&status, DateTime::UNIX_EPOCH);
        assert!(text.contains("none: nothing is relayed; no node runs"), "{text}");
        assert!(
            text.contains("session 7 of role app holds the leader's lock") && text.contains("backend(7);"),
            "{text}"
        );
        assert!(text.contains("3 events wait, the oldest for 90.0 s"), "{text}");
    }

    #[test]
    fn a_span_is_short() {
        for (ms, text) in
            [(-5, "0 ms"), (999, "999 ms"), (1_250, "1.2 s"), (600_000, "10 min"), (259_200_000, "3 days")]
        {
            assert_eq!(span(ms), text);
        }
    }
}
