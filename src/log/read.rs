//! Reading the log by position.

use std::collections::{BTreeSet, HashMap};

use futures_util::TryStreamExt as _;
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::row::{Interner, event, event_columns};
use crate::cursor::Seq;
use crate::event::Event;
use crate::postgres::Pool;

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
pub async fn bounds(pool: &Pool) -> Result<Bounds, sqlx::Error> {
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
    pool: &Pool,
    after: Seq,
    through: Seq,
    limit: usize,
    max_bytes: usize,
) -> Result<Vec<Event>, sqlx::Error> {
    // One connection, so one server, for all of it.
    let mut held = pool.hold().await?;
    let (mut intern, mut events, mut bytes) = (Interner::default(), Vec::new(), 0);
    let mut ask = FIRST_EVENTS.min(limit);
    loop {
        // Never more than is taken: what is left of an answer has to be read off the connection all the same.
        let rows = sqlx::query(EVENTS)
            .bind(events.last().map_or(after, |event: &Event| event.seq).cast_signed())
            .bind(i64::try_from(through).unwrap_or(i64::MAX))
            .bind(i64::try_from(ask).unwrap_or(i64::MAX))
            .fetch_all(&mut held)
            .await?;
        for row in &rows {
            let event = event(row, &mut intern)?;
            bytes += event.bytes();
            events.push(event);
        }
        if rows.len() < ask || events.len() >= limit || bytes >= max_bytes {
            held.release().await?;
            return Ok(events);
        }
        let fit = (max_bytes - bytes) / (bytes / events.len()).max(1);
        ask = fit.min(events.len() * GROWTH).clamp(1, limit - events.len());
    }
}

/// What a page may be.
#[derive(Clone, Copy, Debug)]
pub struct PageLimits {
    /// Most events that are looked at in one go.
    pub events: u64,
    /// Bytes that a page of whole transactions may have.
    pub bytes: usize,
    /// A transaction larger than this may be cut inside.
    pub frame_bytes: usize,
}

/// How far a page reaches, and its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The last seq.
    pub through: Seq,
    /// Memory of its events, bytes, rounded up.
    pub bytes: usize,
    /// It is the part of a transaction that is larger than a frame.
    pub part: bool,
}

/// One event's size, for a page's extent.
#[derive(Clone, Copy, Debug)]
struct Size {
    seq: Seq,
    tx_end: bool,
    // Of the row's texts; the event is larger.
    texts: usize,
}

/// Sizes as Postgres stores them up to which rows are measured as they are sent: what is compressed has to be unpacked to
/// be measured, and a page is no larger than this unless it was.
const STORED_BYTES: i64 = 256 << 10;
/// What an event has beside the texts of its row: names of members, numbers, its place in memory.
const EVENT_FRAME_BYTES: usize = 512;

// The inner sizes cost a look at the row's header each, the outer ones reading the value.
const SIZES: &str = "
    SELECT seq, tx_end,
           octet_length(table_name)::bigint
              + COALESCE(octet_length(row_key::text), 0)
              + COALESCE(octet_length(old_key::text), 0)
              + COALESCE(octet_length(before_data::text), 0)
              + COALESCE(octet_length(after_data::text), 0)
              + COALESCE(octet_length(event_type), 0)
              + COALESCE(octet_length(headers::text), 0) AS texts
    FROM (
        SELECT l.*, sum(l.stored) OVER (ORDER BY l.seq) - l.stored AS stored_before
        FROM (
            SELECT e.*,
                   COALESCE(pg_column_size(e.row_key), 0)::bigint
                   + COALESCE(pg_column_size(e.before_data), 0)
                   + COALESCE(pg_column_size(e.after_data), 0)
                   + COALESCE(pg_column_size(e.headers), 0) AS stored
            FROM tidewire.event_log AS e
            WHERE e.seq > $1 AND e.seq <= $2
            ORDER BY e.seq
            LIMIT $3
        ) AS l
    ) AS measured
    WHERE stored_before < $4
    ORDER BY seq";

/// How far a page after `after` reaches, at most to `through`: whole transactions within the limits, or the first one where it
/// is larger, or of one that is larger than a frame, a part that is. None: there is no event.
///
/// # Errors
/// When Postgres refuses.
pub async fn extent(pool: &Pool, after: Seq, through: Seq, limits: PageLimits) -> Result<Option<Extent>, sqlx::Error> {
    let mut sizes: Vec<Size> = Vec::new();
    loop {
        let from = sizes.last().map_or(after, |size| size.seq);
        let rows = sqlx::query(SIZES)
            .bind(from.cast_signed())
            .bind(i64::try_from(through).unwrap_or(i64::MAX))
            .bind(i64::try_from(limits.events).unwrap_or(i64::MAX))
            .bind(STORED_BYTES)
            .fetch_all(pool)
            .await?;
        for row in &rows {
            let (seq, texts): (i64, i64) = (row.try_get("seq")?, row.try_get("texts")?);
            let texts = usize::try_from(texts).unwrap_or(usize::MAX);
            sizes.push(Size { seq: seq.cast_unsigned(), tx_end: row.try_get("tx_end")?, texts });
        }
        let end = rows.is_empty() || sizes.last().is_none_or(|last| last.seq >= through);
        if let Some(extent) = cut(&sizes, limits, end) {
            return Ok(Some(extent));
        }
        if end {
            return Ok(None);
        }
    }
}

/// Where a page of these events ends. None: that is open until more of them are known. `end`: there are no more.
fn cut(sizes: &[Size], limits: PageLimits, end: bool) -> Option<Extent> {
    let (mut bytes, mut texts, mut ends) = (0_usize, 0_usize, Vec::new());
    for size in sizes {
        texts = texts.saturating_add(size.texts);
        bytes = bytes.saturating_add(size.texts.saturating_add(EVENT_FRAME_BYTES));
        if bytes > limits.bytes && !ends.is_empty() {
            break;
        }
        let extent = Extent { through: size.seq, bytes, part: false };
        if size.tx_end {
            ends.push(extent);
        } else if ends.is_empty() && texts > limits.frame_bytes {
            // By the texts alone: what is called a part must be larger than a frame.
            return Some(Extent { part: true, ..extent });
        }
    }
    let Some(last) = ends.last() else {
        return sizes.last().filter(|_| end).map(|last| Extent { through: last.seq, bytes, part: false });
    };
    // Where there is a choice, at a round number: readers that began at different places come to share pages.
    let after = sizes.first().map_or(0, |first| first.seq.saturating_sub(1));
    let round = [1_000, 100, 10].map(|grid| last.through / grid * grid).into_iter().find(|round| *round > after);
    let rounded = round.and_then(|round| ends.iter().rfind(|extent| extent.through <= round));
    Some(*rounded.unwrap_or(last))
}

/// The events after `after` through `through`, in order; what retention dropped is missing. Rows are let go of one by one.
///
/// # Errors
/// When Postgres refuses.
pub async fn through(pool: &Pool, after: Seq, through: Seq) -> Result<Vec<Event>, sqlx::Error> {
    let mut rows = sqlx::query(EVENTS)
        .bind(after.cast_signed())
        .bind(i64::try_from(through).unwrap_or(i64::MAX))
        .bind(i64::MAX)
        .fetch(pool);
    let (mut intern, mut events) = (Interner::default(), Vec::new());
    while let Some(row) = rows.try_next().await? {
        events.push(event(&row, &mut intern)?);
    }
    Ok(events)
}

/// The ids of the events after `after` through `through`, by seq, in order.
///
/// # Errors
/// When Postgres refuses.
pub async fn ids(pool: &Pool, after: Seq, through: Seq) -> Result<Vec<(Seq, Uuid)>, sqlx::Error> {
    let rows = sqlx::query("SELECT seq, event_id FROM tidewire.event_log WHERE seq > $1 AND seq <= $2 ORDER BY seq")
        .bind(after.cast_signed())
        .bind(i64::try_from(through).unwrap_or(i64::MAX))
        .fetch_all(pool)
        .await?;
    rows.into_iter().filter_map(|row| place(Some(row)).transpose()).collect()
}

/// The id of the event at `seq`, if it is still there.
///
/// # Errors
/// When Postgres refuses.
pub async fn event_id(pool: &Pool, seq: Seq) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar("SELECT event_id FROM tidewire.event_log WHERE seq = $1")
        .bind(seq.cast_signed())
        .fetch_optional(pool)
        .await
}

/// The oldest event from `seq` through `through` that ends its transaction: its seq and id. None if there is none.
///
/// # Errors
/// When Postgres refuses.
pub async fn whole_after(pool: &Pool, seq: Seq, through: Seq) -> Result<Option<(Seq, Uuid)>, sqlx::Error> {
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
pub async fn whole_before(pool: &Pool, seq: Seq) -> Result<Option<(Seq, Uuid)>, sqlx::Error> {
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

/// What became of some transactions, and the newest seq of that moment; 0: the log never had an event.
#[derive(Clone, Debug, Default)]
pub struct Transactions {
    found: HashMap<u64, Transaction>,
    /// The newest seq.
    pub newest: Seq,
}

impl Transactions {
    /// What became of one that was asked for.
    #[must_use]
    pub fn of(&self, xid: u64) -> Transaction {
        self.found.get(&xid).copied().unwrap_or(Transaction::Running)
    }
}

// One snapshot for all of it: the relay moves rows from the outbox to the log in one transaction, so a committed
// transaction's events are in exactly one of them. The log is searched from its end, as `sync` asks for news.
const TRANSACTIONS: &str = "
    WITH asked AS MATERIALIZED (
        SELECT DISTINCT xid::xid8 AS xid
        FROM unnest($1::text[]) AS given (xid)
    ), logged AS MATERIALIZED (
        SELECT l.xid, max(l.seq) AS seq
        FROM tidewire.event_log AS l
        WHERE l.seq > (SELECT max(seq) FROM tidewire.event_log) - $2
          AND l.xid IN (SELECT xid FROM asked)
        GROUP BY l.xid
    )
    SELECT asked.xid::text AS xid,
           asked.xid >= pg_snapshot_xmax(pg_current_snapshot()) AS unbegun,
           NOT pg_visible_in_snapshot(asked.xid, pg_current_snapshot()) AS running,
           EXISTS (SELECT FROM tidewire.outbox AS o WHERE o.xid = asked.xid) AS waiting,
           logged.seq,
           (SELECT COALESCE(max(seq), 0) FROM tidewire.event_log) AS newest
    FROM asked
    LEFT JOIN logged ON logged.xid = asked.xid";

/// What became of the transactions `xids`, in one statement however many they are; a few more where some of them may not
/// have begun.
///
/// # Errors
/// When Postgres refuses.
pub async fn transactions(pool: &Pool, xids: &BTreeSet<u64>) -> Result<Transactions, sqlx::Error> {
    let texts: Vec<String> = xids.iter().map(u64::to_string).collect();
    let rows = sqlx::query(TRANSACTIONS).bind(&texts).bind(SYNC_SEARCH_EVENTS).fetch_all(pool).await?;
    let mut all = Transactions::default();
    let mut unbegun = Vec::new();
    for row in &rows {
        let xid: u64 = row.try_get::<&str, _>("xid")?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        let seq: Option<i64> = row.try_get("seq")?;
        let became = match seq {
            _ if row.try_get("running")? => Transaction::Running,
            _ if row.try_get("waiting")? => Transaction::Waiting,
            Some(seq) => Transaction::At(seq.cast_unsigned()),
            None => Transaction::Nothing,
        };
        if row.try_get("unbegun")? {
            unbegun.push(xid);
        }
        all.newest = row.try_get::<i64, _>("newest")?.cast_unsigned();
        all.found.insert(xid, became);
    }
    unbegun.sort_unstable();
    let begun = begun_among(pool, &unbegun).await?;
    all.found.extend(unbegun.into_iter().skip(begun).map(|xid| (xid, Transaction::Future)));
    Ok(all)
}

/// How many of these, in order, have begun: a transaction that runs may lie beyond every snapshot. All of them or none is
/// the rule, and found out with one or two questions.
async fn begun_among(pool: &Pool, xids: &[u64]) -> Result<usize, sqlx::Error> {
    let (mut low, mut high) = (0, xids.len());
    let mut next = 0;
    while low < high {
        if has_begun(pool, xids[next]).await? {
            low = next + 1
        } else {
            high = next
        }
        // The first, the last, then halves.
        next = if low == 1 && high == xids.len() { high - 1 } else { usize::midpoint(low, high) };
    }
    Ok(low)
}

async fn has_begun(pool: &Pool, xid: u64) -> Result<bool, sqlx::Error> {
    let asked = sqlx::query("SELECT pg_xact_status($1::text::xid8)").bind(xid.to_string()).fetch_one(pool).await;
    match asked {
        Ok(_) => Ok(true),
        // 22023: "transaction ID … is in the future".
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("22023") => Ok(false),
        Err(error) => Err(error),
    }
}

/// How far back `sync` looks for a transaction's events. An older one has been passed by every live subscription, and
/// the newest seq of the moment, which answers for "nothing found", lies after it.
const SYNC_SEARCH_EVENTS: i64 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PageLimits = PageLimits { events: 1_000, bytes: 100_000, frame_bytes: 50_000 };

    /// Events after `after`: bytes of their texts, a negative one is the end of a transaction. Gives where the page ends,
    /// and whether it is a part.
    fn cut_of(after: Seq, sizes: &[i64], end: bool) -> Option<(Seq, bool)> {
        let sizes: Vec<Size> = (after + 1..)
            .zip(sizes)
            .map(|(seq, size)| Size { seq, tx_end: *size < 0, texts: usize::try_from(size.abs()).unwrap() })
            .collect();
        cut(&sizes, LIMITS, end).map(|extent| (extent.through, extent.part))
    }

    #[test]
    fn a_page_is_whole_transactions_or_a_part_that_is_larger_than_a_frame() {
        let small = [10; 500];
        let small_and_end = [&small[..], &[-10]].concat();
        for (after, sizes, end, want) in [
            (0, &[-10, -10, -10][..], true, Some((3, false))),
            // Within the bytes, and at a round number.
            (0, &[-60_000, -30_000, -30_000], false, Some((2, false))),
            (17, &[-10, -10, -10, -10, -10], false, Some((20, false))),
            (20, &[-10, -10, -10], true, Some((23, false))),
            // One event, or one transaction, may be larger.
            (0, &[-500_000, -10], false, Some((1, false))),
            (0, &[30_000, -30_000, -50_000], false, Some((2, false))),
            // A part of one that is larger than a frame; less of it is not enough, unless there is no more.
            (0, &[30_000, 30_000, 30_000, -30_000], false, Some((2, true))),
            (0, &[10, 10], false, None),
            (0, &[10, 10], true, Some((2, false))),
            (0, &[-10, 10, 10], false, Some((1, false))),
            (0, &[], true, None),
            // Many small events: their memory is more than a frame, what is sent of them is not.
            (0, &small, false, None),
            (0, &small_and_end, false, Some((501, false))),
        ] {
            assert_eq!(cut_of(after, sizes, end), want, "{after} {} sizes, end: {end}", sizes.len());
        }
    }
}
