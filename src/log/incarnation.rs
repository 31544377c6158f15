//! Epochs and terms: which incarnation the log is, and who leads.

use sqlx::Row as _;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use crate::cursor::{Epoch, EpochStart, Epochs, Seq};
use crate::postgres::Incarnation;
use crate::postgres::Pool;

/// The newest epoch as the table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EpochRow {
    /// Its number.
    pub epoch: Epoch,
    /// The database that it belongs to.
    pub incarnation: Incarnation,
}

/// Every epoch of the log.
///
/// # Errors
/// When Postgres refuses.
pub async fn epochs(pool: &Pool) -> Result<(Epochs, Option<EpochRow>), sqlx::Error> {
    let rows = sqlx::query("SELECT epoch, start_seq, system_identifier, timeline FROM tidewire.epochs ORDER BY epoch")
        .fetch_all(pool)
        .await?;
    let mut starts = Vec::with_capacity(rows.len());
    let mut newest = None;
    for row in &rows {
        let epoch = row.try_get::<i32, _>(0)?.cast_unsigned();
        starts.push(EpochStart { epoch, start_seq: row.try_get::<i64, _>(1)?.cast_unsigned() });
        let timeline = u32::from_str_radix(row.try_get(3)?, 16).map_err(|error| sqlx::Error::Decode(error.into()))?;
        newest = Some(EpochRow { epoch, incarnation: Incarnation { system_identifier: row.try_get(2)?, timeline } });
    }
    Ok((Epochs::new(starts), newest))
}

/// Whether a term of `epoch` has been taken: its commit vouches for the log before it.
///
/// # Errors
/// When Postgres refuses.
pub async fn epoch_has_term(pool: &Pool, epoch: Epoch) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM tidewire.terms WHERE epoch = $1)")
        .bind(epoch.cast_signed())
        .fetch_one(pool)
        .await
}

/// A node's own knowledge of the log, to compare with what the database has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its high water.
    pub seq: Seq,
    /// The event there.
    pub event_id: Uuid,
}

/// What begins a term.
#[derive(Debug)]
pub struct Candidate<'a> {
    /// This node's name.
    pub node: &'a str,
    /// Backend that holds the lock.
    pub pid: i32,
    /// Backend that announces.
    pub feed_pid: i32,
    /// The term's feed key.
    pub feed_key: &'a [u8],
    /// The database, as the leader's connection found it.
    pub incarnation: &'a Incarnation,
    /// What this node has seen of the log.
    pub known: Option<Known>,
}

/// A term that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    /// Its number.
    pub term: u64,
    /// The epoch that it writes.
    pub epoch: Epoch,
    /// The newest seq of the log.
    pub newest: Seq,
    /// The transaction whose end is missing at the log's tail.
    pub open_xid: Option<String>,
}

/// Begins a term on the connection that holds the leader's lock, and a new epoch where the database is not the one it
/// was.
///
/// # Errors
/// When Postgres refuses; nothing has begun then.
pub async fn begin_term(connection: &mut PgConnection, candidate: &Candidate<'_>) -> Result<Term, sqlx::Error> {
    // By hand: the connection is the leader's own and is dropped on any error, which ends the transaction.
    sqlx::raw_sql("BEGIN").execute(&mut *connection).await?;
    let tail = sqlx::query("SELECT seq, xid::text, tx_end FROM tidewire.event_log ORDER BY seq DESC LIMIT 1")
        .fetch_optional(&mut *connection)
        .await?;
    let (newest, open_xid) = match tail {
        Some(row) => {
            let open = if row.try_get(2)? { None } else { Some(row.try_get(1)?) };
            (row.try_get::<i64, _>(0)?.cast_unsigned(), open)
        }
        None => (0, None),
    };
    let reason = new_epoch_reason(&mut *connection, candidate, newest).await?;
    if let Some(reason) = reason {
        tracing::warn!(reason, start_seq = newest, "a new epoch of the log begins");
        // After the first, seconds since 2026: two primaries that never heard of each other must not give one number to two
        // histories.
        sqlx::query(
            "INSERT INTO tidewire.epochs (epoch, system_identifier, timeline, start_seq, reason)
             SELECT CASE WHEN count(*) = 0 THEN 1
                         ELSE greatest(max(epoch) + 1, extract(epoch FROM now() - '2026-01-01 00:00Z'::timestamptz)::int)
                    END, $1, $2, $3, $4
             FROM tidewire.epochs",
        )
        .bind(candidate.incarnation.system_identifier)
        .bind(candidate.incarnation.timeline_text())
        .bind(newest.cast_signed())
        .bind(reason)
        .execute(&mut *connection)
        .await?;
    }
    let row = sqlx::query(
        "INSERT INTO tidewire.terms (term, epoch, node, pid, feed_pid, feed_key)
         SELECT COALESCE((SELECT max(term) FROM tidewire.terms), 0) + 1,
                (SELECT max(epoch) FROM tidewire.epochs), $1, $2, $3, $4
         RETURNING term, epoch",
    )
    .bind(candidate.node)
    .bind(candidate.pid)
    .bind(candidate.feed_pid)
    .bind(candidate.feed_key)
    .fetch_one(&mut *connection)
    .await?;
    let (term, epoch): (i64, i32) = (row.try_get(0)?, row.try_get(1)?);
    sqlx::raw_sql("COMMIT").execute(connection).await?;
    Ok(Term { term: term.cast_unsigned(), epoch: epoch.cast_unsigned(), newest, open_xid })
}

/// Why the log is not the one it was; None when it is.
async fn new_epoch_reason(
    connection: &mut PgConnection,
    candidate: &Candidate<'_>,
    newest: Seq,
) -> Result<Option<&'static str>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT system_identifier, timeline, (SELECT max(high_water) FROM tidewire.nodes WHERE epoch = e.epoch)
         FROM tidewire.epochs e ORDER BY epoch DESC LIMIT 1",
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else { return Ok(Some("first start")) };
    if row.try_get::<i64, _>(0)? != candidate.incarnation.system_identifier {
        return Ok(Some("another database system"));
    }
    if row.try_get::<String, _>(1)? != candidate.incarnation.timeline_text() {
        return Ok(Some("another timeline"));
    }
    let reported = row.try_get::<Option<i64>, _>(2)?.unwrap_or_default().cast_unsigned();
    if reported > newest {
        return Ok(Some("the log is shorter than a node has seen"));
    }
    let Some(known) = candidate.known else { return Ok(None) };
    if known.seq > newest {
        return Ok(Some("the log is shorter than this node has seen"));
    }
    let id: Option<Uuid> = sqlx::query_scalar("SELECT event_id FROM tidewire.event_log WHERE seq = $1")
        .bind(known.seq.cast_signed())
        .fetch_optional(connection)
        .await?;
    Ok(id.is_some_and(|id| id != known.event_id).then_some("the log differs from what this node has seen"))
}

/// Ends a term in the books. Best done before the lock is released; a killed leader's term is ended by its successor.
///
/// # Errors
/// When Postgres refuses.
pub async fn end_term(connection: &mut PgConnection, term: u64, reason: &str) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE tidewire.terms SET released_at = now(), reason = $2, feed_key = NULL WHERE term = $1 AND released_at IS NULL")
        .bind(term.cast_signed())
        .bind(reason)
        .execute(connection)
        .await?;
    Ok(())
}

/// Closes the books of every term before `term`; their keys are of no use any more. Keeps the newest thousand terms.
///
/// # Errors
/// When Postgres refuses.
pub async fn end_former_terms(connection: &mut PgConnection, term: u64) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH gone AS (DELETE FROM tidewire.terms WHERE term < $1 - 1000)
         UPDATE tidewire.terms SET released_at = now(), reason = 'lost'
         WHERE term < $1 AND released_at IS NULL",
    )
    .bind(term.cast_signed())
    .execute(connection)
    .await?;
    Ok(())
}

/// The key of a term's feed and the backend that announces.
#[derive(Clone)]
pub struct TermKey {
    /// The epoch that the term writes.
    pub epoch: Epoch,
    /// Backend that announces.
    pub feed_pid: u32,
    /// The key; gone once the term has ended in order.
    pub key: Option<Vec<u8>>,
}

// The key must not reach a log.
impl std::fmt::Debug for TermKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TermKey").field("epoch", &self.epoch).field("feed_pid", &self.feed_pid).finish_non_exhaustive()
    }
}

/// What opens the chunks of `term`, if there is such a term.
///
/// # Errors
/// When Postgres refuses.
pub async fn term_key(pool: &Pool, term: u64) -> Result<Option<TermKey>, sqlx::Error> {
    let row = sqlx::query("SELECT epoch, feed_pid, feed_key FROM tidewire.terms WHERE term = $1")
        .bind(i64::try_from(term).unwrap_or(-1))
        .fetch_optional(pool)
        .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(TermKey {
        epoch: row.try_get::<i32, _>(0)?.cast_unsigned(),
        feed_pid: row.try_get::<Option<i32>, _>(1)?.unwrap_or_default().cast_unsigned(),
        key: row.try_get(2)?,
    }))
}
