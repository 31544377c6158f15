//! Reading the log by position.

use sqlx::Row as _;
use sqlx::postgres::{PgPool, PgRow};
use uuid::Uuid;

use super::row::{Interner, event, event_columns};
use crate::cursor::Seq;
use crate::event::Event;

/// Where the log begins and ends. `oldest` and `newest` are 0 and 0 when it never held anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// The oldest seq that is there.
    pub oldest: Seq,
    /// The newest.
    pub newest: Seq,
}

/// Where the log begins and ends now.
///
/// # Errors
/// When Postgres refuses.
pub async fn bounds(pool: &PgPool) -> Result<Bounds, sqlx::Error> {
    let row = sqlx::query("SELECT COALESCE(min(seq), 0), COALESCE(max(seq), 0) FROM tidewire.event_log")
        .fetch_one(pool)
        .await?;
    let (oldest, newest): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    Ok(Bounds { oldest: oldest.cast_unsigned(), newest: newest.cast_unsigned() })
}

const EVENTS: &str =
    concat!("SELECT ", event_columns!(), " FROM tidewire.event_log WHERE seq > $1 AND seq <= $2 ORDER BY seq LIMIT $3");

/// Events that are asked for while nothing is known of their size: they may be of the largest that the relay carries.
const FIRST_EVENTS: usize = 4;
/// Then at most so many times what has come: large ones may follow on small ones.
const GROWTH: usize = 8;

/// The events after `after` through `through`, at most `limit` and about `max_bytes` of them, in order; at least one if there
/// is one. What retention dropped is missing at the front.
///
/// # Errors
/// When Postgres refuses.
pub async fn events(
    pool: &PgPool,
    after: Seq,
    through: Seq,
    limit: usize,
    max_bytes: usize,
) -> Result<Vec<Event>, sqlx::Error> {
    // One connection, so one server, for all of it.
    let mut connection = pool.acquire().await?;
    let (mut intern, mut events, mut bytes) = (Interner::default(), Vec::new(), 0);
    let mut ask = FIRST_EVENTS.min(limit);
    loop {
        // Never more than is taken: what is left of an answer has to be read off the connection all the same.
        let rows = sqlx::query(EVENTS)
            .bind(events.last().map_or(after, |event: &Event| event.seq).cast_signed())
            .bind(i64::try_from(through).unwrap_or(i64::MAX))
            .bind(i64::try_from(ask).unwrap_or(i64::MAX))
            .fetch_all(&mut *connection)
            .await?;
        for row in &rows {
            let event = event(row, &mut intern)?;
            bytes += event.bytes();
            events.push(event);
        }
        if rows.len() < ask || events.len() >= limit || bytes >= max_bytes {
            return Ok(events);
        }
        let fit = (max_bytes - bytes) / (bytes / events.len()).max(1);
        ask = fit.min(events.len() * GROWTH).clamp(1, limit - events.len());
    }
}

/// The id of the event at `seq`, if it is still there.
///
/// # Errors
/// When Postgres refuses.
pub async fn event_id(pool: &PgPool, seq: Seq) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar("SELECT event_id FROM tidewire.event_log WHERE seq = $1")
        .bind(seq.cast_signed())
        .fetch_optional(pool)
        .await
}

/// The oldest event from `seq` through `through` that ends its transaction: its seq and id. None if there is none.
///
/// # Errors
/// When Postgres refuses.
pub async fn whole_after(pool: &PgPool, seq: Seq, through: Seq) -> Result<Option<(Seq, Uuid)>, sqlx::Error> {
    let found = sqlx::query(
        "SELECT seq, event_id FROM tidewire.event_log WHERE seq >= $1 AND seq <= $2 AND tx_end ORDER BY seq LIMIT 1",
    );
    place(found.bind(seq.cast_signed()).bind(through.cast_signed()).fetch_optional(pool).await?)
}

/// The newest event at or before `seq` that ends its transaction: its seq and id. None if there is none among the last
/// [`WHOLE_SEARCH_EVENTS`].
///
/// # Errors
/// When Postgres refuses.
pub async fn whole_before(pool: &PgPool, seq: Seq) -> Result<Option<(Seq, Uuid)>, sqlx::Error> {
    let found = sqlx::query(
        "SELECT seq, event_id FROM tidewire.event_log WHERE seq <= $1 AND seq > $1 - $2 AND tx_end ORDER BY seq DESC LIMIT 1",
    );
    place(found.bind(seq.cast_signed()).bind(WHOLE_SEARCH_EVENTS).fetch_optional(pool).await?)
}

/// How far back the beginning of an open transaction is looked for: there is no index on the ends, and a node has to start.
pub const WHOLE_SEARCH_EVENTS: i64 = 1_000_000;

fn place(row: Option<PgRow>) -> Result<Option<(Seq, Uuid)>, sqlx::Error> {
    let Some(row) = row else { return Ok(None) };
    Ok(Some((row.try_get::<i64, _>(0)?.cast_unsigned(), row.try_get(1)?)))
}

/// What became of a transaction, for `sync`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transaction {
    /// It lies beyond what Postgres has begun.
    Future,
    /// It still runs.
    Running,
    /// It is over, and its last event stands at this seq.
    At(Seq),
    /// It is committed, and the relay has yet to number its events.
    Waiting,
    /// It is over without an event in the log: aborted, or it changed nothing that is tracked.
    Nothing,
}

/// What became of the transaction `xid`.
///
/// # Errors
/// When Postgres refuses.
pub async fn transaction(pool: &PgPool, xid: u64) -> Result<Transaction, sqlx::Error> {
    // One snapshot for all of it: the relay moves rows from the outbox to the log in one transaction, so a committed
    // transaction's events are in exactly one of them. `pg_xact_status` is there for its error about the future only:
    // what it says may be newer than the snapshot. The log is searched from its end, as `sync` asks for news.
    let asked = sqlx::query(
        "SELECT pg_xact_status($1::text::xid8),
                NOT pg_visible_in_snapshot($1::text::xid8, pg_current_snapshot()) AS running,
                EXISTS (SELECT FROM tidewire.outbox WHERE xid = $1::text::xid8) AS waiting,
                (SELECT max(seq) FROM tidewire.event_log
                 WHERE seq > (SELECT max(seq) FROM tidewire.event_log) - $2 AND xid = $1::text::xid8) AS seq",
    )
    .bind(xid.to_string())
    .bind(SYNC_SEARCH_EVENTS)
    .fetch_one(pool)
    .await;
    let row = match asked {
        Ok(row) => row,
        // 22023: "transaction ID … is in the future".
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("22023") => {
            return Ok(Transaction::Future);
        }
        Err(error) => return Err(error),
    };
    if row.try_get("running")? {
        return Ok(Transaction::Running);
    }
    if row.try_get("waiting")? {
        return Ok(Transaction::Waiting);
    }
    let seq: Option<i64> = row.try_get("seq")?;
    Ok(seq.map_or(Transaction::Nothing, |seq| Transaction::At(seq.cast_unsigned())))
}

/// How far back `sync` looks for a transaction's events. An older one has been passed by every live subscription, and
/// the newest seq of the moment, which answers for "nothing found", lies after it.
const SYNC_SEARCH_EVENTS: i64 = 10_000;
