//! Partitions of the log: created ahead of the writer, dropped whole behind it.
//!
//! Partition by seq; how many seqs one takes follows the pace of writing, so that a partition holds roughly
//! [`PARTITION_SPAN`] of it and their number stays small. The newest non-empty partition is never dropped: `max(seq)`
//! lives there. Lock order: parent before partition, as Postgres takes them itself.

use std::time::Duration;

use sqlx::AssertSqlSafe;
use sqlx::Row as _;
use sqlx::postgres::PgConnection;

use crate::cursor::Seq;

/// What one partition should hold: 24 hours of log are about a dozen partitions.
pub const PARTITION_SPAN: Duration = Duration::from_secs(2 * 3600);
/// Smallest partition, events.
pub const MIN_PARTITION_EVENTS: u64 = 1_000_000;
/// Largest partition, events: about 100 GB at 400 bytes.
pub const MAX_PARTITION_EVENTS: u64 = 250_000_000;

/// One partition: seqs `from` (inclusive) to `to` (exclusive).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its name within the schema.
    pub name: String,
    /// First seq.
    pub from: Seq,
    /// First seq of the next.
    pub to: Seq,
}

/// The partitions in order.
///
/// # Errors
/// When Postgres refuses.
pub async fn partitions(connection: &mut PgConnection) -> Result<Vec<Partition>, sqlx::Error> {
    let rows = sqlx::query(
        r"SELECT c.relname::text, b[1]::bigint, b[2]::bigint
          FROM pg_inherits i
          JOIN pg_class c ON c.oid = i.inhrelid
          CROSS JOIN LATERAL regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \(''?(-?\d+)''?\) TO \(''?(-?\d+)''?\)') b
          WHERE i.inhparent = 'tidewire.event_log'::regclass AND NOT i.inhdetachpending
          ORDER BY 2",
    )
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let (from, to): (i64, i64) = (row.try_get(1)?, row.try_get(2)?);
            Ok(Partition { name: row.try_get(0)?, from: from.cast_unsigned(), to: to.cast_unsigned() })
        })
        .collect()
}

/// How many events the next partition takes at a pace of `events_per_s`.
#[must_use]
pub fn partition_events(events_per_s: f64) -> u64 {
    let wanted = (events_per_s * PARTITION_SPAN.as_secs_f64()).clamp(0.0, MAX_PARTITION_EVENTS as f64) as u64;
    wanted.clamp(MIN_PARTITION_EVENTS, MAX_PARTITION_EVENTS)
}

/// Creates the partition that begins at `from` and takes `events`.
///
/// # Errors
/// When Postgres refuses; a partition that is there already is no error.
pub async fn create_partition(connection: &mut PgConnection, from: Seq, events: u64) -> Result<(), sqlx::Error> {
    // Made beside and attached: CREATE … PARTITION OF would take ACCESS EXCLUSIVE on the log. The CHECK spares the scan.
    let name = format!("event_log_{from}");
    let to = from + events;
    let text = format!(
        "CREATE TABLE IF NOT EXISTS tidewire.{name} (LIKE tidewire.event_log INCLUDING ALL,
             CONSTRAINT {name}_bounds CHECK (seq >= {from} AND seq < {to}))
             WITH (autovacuum_enabled = off, toast.autovacuum_enabled = off, toast_tuple_target = 8160);
         DO $$ BEGIN
             IF NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = 'tidewire.{name}'::regclass) THEN
                 EXECUTE format('ALTER TABLE tidewire.{name} OWNER TO %I',
                     (SELECT relowner::regrole FROM pg_class WHERE oid = 'tidewire.event_log'::regclass));
                 ALTER TABLE tidewire.event_log ATTACH PARTITION tidewire.{name} FOR VALUES FROM ({from}) TO ({to});
             END IF;
         END $$;"
    );
    // Numbers only are put into the text.
    sqlx::raw_sql(AssertSqlSafe(text)).execute(connection).await?;
    Ok(())
}

/// Drops partitions whose newest event was relayed more than `retention` ago; gives how many went.
/// `keep_after` is the position of the slowest durable reader that must be waited for.
///
/// # Errors
/// When Postgres refuses; what was dropped stays dropped.
pub async fn trim(
    connection: &mut PgConnection,
    retention: Duration,
    keep_after: Option<Seq>,
) -> Result<usize, sqlx::Error> {
    let all = partitions(connection).await?;
    let mut dropped = 0;
    finish_detached(connection).await?;
    for (index, partition) in all.iter().enumerate() {
        // The newest non-empty partition stays whatever its age; so does everything after it.
        let later: bool = match all.get(index + 1) {
            Some(next) => {
                sqlx::query_scalar("SELECT EXISTS (SELECT FROM tidewire.event_log WHERE seq >= $1)")
                    .bind(next.from.cast_signed())
                    .fetch_one(&mut *connection)
                    .await?
            }
            None => false,
        };
        let waited_for = keep_after.is_some_and(|seq| seq < partition.to - 1);
        if !later || waited_for || !expired(connection, partition, retention).await? {
            break;
        }
        // Outside a transaction block; waits for running readers without blocking new ones.
        let detach =
            format!("ALTER TABLE tidewire.event_log DETACH PARTITION tidewire.{} CONCURRENTLY", partition.name);
        sqlx::raw_sql(AssertSqlSafe(detach)).execute(&mut *connection).await?;
        drop_table(connection, &partition.name).await?;
        dropped += 1;
    }
    Ok(dropped)
}

async fn expired(
    connection: &mut PgConnection,
    partition: &Partition,
    retention: Duration,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT COALESCE((SELECT relayed_at < now() - make_interval(secs => $3) FROM tidewire.event_log
                          WHERE seq >= $1 AND seq < $2 ORDER BY seq DESC LIMIT 1), true)",
    )
    .bind(partition.from.cast_signed())
    .bind(partition.to.cast_signed())
    .bind(retention.as_secs_f64())
    .fetch_one(connection)
    .await
}

/// A former leader may have died between detaching and dropping.
async fn finish_detached(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let pending: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent = 'tidewire.event_log'::regclass AND i.inhdetachpending",
    )
    .fetch_all(&mut *connection)
    .await?;
    for name in pending {
        let finish = format!("ALTER TABLE tidewire.event_log DETACH PARTITION tidewire.{name} FINALIZE");
        sqlx::raw_sql(AssertSqlSafe(finish)).execute(&mut *connection).await?;
        drop_table(connection, &name).await?;
    }
    let orphans: Vec<String> = sqlx::query_scalar(
        r"SELECT c.relname::text FROM pg_class c
          WHERE c.relnamespace = 'tidewire'::regnamespace AND c.relkind = 'r' AND NOT c.relispartition
            AND c.relname ~ '^event_log_\d+$'",
    )
    .fetch_all(&mut *connection)
    .await?;
    for name in orphans {
        // Either detached by a former leader, or created and not attached yet by this one's own writer: the latter is
        // empty and is made again when it is needed.
        drop_table(connection, &name).await?;
    }
    Ok(())
}

async fn drop_table(connection: &mut PgConnection, name: &str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(format!("DROP TABLE IF EXISTS tidewire.{name}"))).execute(connection).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_partition_follows_the_pace_within_bounds() {
        assert_eq!(partition_events(0.0), MIN_PARTITION_EVENTS);
        assert_eq!(partition_events(1_000.0), 7_200_000);
        assert_eq!(partition_events(f64::INFINITY), MAX_PARTITION_EVENTS);
        assert_eq!(partition_events(f64::NAN), MIN_PARTITION_EVENTS);
    }
}
