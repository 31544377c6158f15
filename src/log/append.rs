//! The claim: one statement that finds what can be relayed, takes it, numbers it and appends it to the log.
//!
//! Correctness rests on one rule, "not visible in the last claim's own snapshot" (the design's notes on the relay have
//! the proof by attack and the counterexamples to simpler rules; `tests/it/relay.rs` keeps them): a row with id ≤ `low`
//! can be unclaimed only if its transaction was not visible to the last claim, or was left out by it. So a claim looks
//! above `low`, and by the index `(xid, id)` at exactly those transactions.
//!
//! Order: transactions by the highest outbox id that they own, then rows by id. A transaction with rows beyond the
//! window waits. SKIP LOCKED may pass over a row that somebody else has locked; the statement then takes only the
//! transactions that precede the torn one, so nothing overtakes it and nothing needs to be rolled back.
//!
//! Everything here runs on the leader's own connection (invariant I2), each claim as one autocommitted statement: its
//! result is complete only when the server has said that it is committed, because rows are read to the end.

use std::sync::OnceLock;

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};

pub use super::row::Interner;
use super::row::event;
use crate::cursor::Seq;
use crate::event::Event;
use crate::mutant::{self, Mutant};

/// Beyond every transaction id that Postgres will draw.
const LAST_XID: &str = "9223372036854775807";

/// What a term knows of the outbox between two claims. Changed by whole claims only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    low: i64,
    unseen: Vec<String>,
    newest_xid: String,
    sequence: i64,
}

impl Position {
    /// The beginning of a term, and of the sweep that turns whatever could be missed into a delay: everything is new.
    #[must_use]
    pub fn beginning() -> Self {
        // −2^63, not min(id) − 1: an uncommitted row may have a lower id than every visible one.
        Self { low: i64::MIN, unseen: Vec::new(), newest_xid: LAST_XID.to_owned(), sequence: i64::MIN }
    }
}

/// What one claim did.
#[derive(Debug, Default)]
pub struct Claim {
    /// Appended, in order.
    pub events: Vec<Event>,
    /// Somebody else holds a lock on a row that was to be taken: try again in a few milliseconds.
    pub torn: bool,
    /// More is waiting: claim again at once.
    pub more: bool,
    /// The first transaction in order is larger than a batch: relay it in parts.
    pub oversized: Option<String>,
    /// The window held only beginnings of large transactions: a wider one finds their ends sooner.
    pub widen: bool,
    /// Milliseconds from the oldest capture in the batch to its relay, by the database's clock.
    pub lag_ms: f64,
    /// Events whose rows could not be carried.
    pub poison: u64,
}

/// Why a claim failed. Every one ends the term.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Postgres refused, or the connection died.
    #[error("the claim failed: {0}")]
    Postgres(#[from] sqlx::Error),
    /// The numbers that came back are not the ones that were given.
    #[error("the claim numbered {got} where {want} was due")]
    Numbering {
        /// The seq that was due.
        want: Seq,
        /// The one that came.
        got: Seq,
    },
}

/// Bounds of one claim.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Rows looked at above the floor.
    pub window: i64,
    /// Rows taken.
    pub batch: i64,
    /// Largest row images, bytes; beyond, the event is relayed without them and kept in `dead_letters`.
    pub event_bytes: i64,
}

// The columns of the log that come from the outbox, with oversized images left out. Stored size first: it is known
// without reading the value, and what is small stored and large in truth is compressible text beyond our limit / 64.
macro_rules! append_rows {
    ($source:literal) => {
        concat!(
            "x AS MATERIALIZED (SELECT s.*,
                    (COALESCE(pg_column_size(s.before_data), 0) + COALESCE(pg_column_size(s.after_data), 0)
                        + COALESCE(pg_column_size(s.headers), 0) + COALESCE(pg_column_size(s.row_key), 0)) > $2 / 64
                    AND (COALESCE(octet_length(s.before_data::text), 0) + COALESCE(octet_length(s.after_data::text), 0)
                        + COALESCE(octet_length(s.headers::text), 0) + COALESCE(octet_length(s.row_key::text), 0)) > $2
                    AS too_large
                FROM ",
            $source,
            " s),
            dead AS (
                INSERT INTO tidewire.dead_letters (seq, reader, error, rows)
                SELECT $1 + rn, 'relay', format('the rows are larger than %s bytes', $2),
                       json_build_object('event_id', event_id, 'key', row_key, 'before', before_data, 'after', after_data)
                FROM x
                WHERE too_large
                RETURNING 1),
            ins AS (
                INSERT INTO tidewire.event_log (seq, xid, tx_end, omitted, event_id, table_name, operation, key_hash,
                    row_key, old_key, before_data, after_data, event_type, headers, created_at, relayed_at)
                SELECT $1 + rn, xid, tx_end, too_large, event_id, table_name, operation,
                       hashtextextended(row_key::text, 0),
                       CASE WHEN too_large AND pg_column_size(row_key) > 8192 THEN NULL ELSE row_key END,
                       CASE WHEN too_large AND pg_column_size(old_key) > 8192 THEN NULL ELSE old_key END,
                       CASE WHEN NOT too_large THEN before_data END, CASE WHEN NOT too_large THEN after_data END,
                       event_type, CASE WHEN NOT too_large THEN headers END, created_at, clock_timestamp()
                FROM x
                ORDER BY rn
                RETURNING *)"
        )
    };
}

// What goes back to the leader: the appended rows, and one row (seq NULL) that says how the claim went.
macro_rules! answer {
    ($meta:literal) => {
        concat!(
            "SELECT seq, xid::text::bigint, tx_end, omitted, event_id, table_name, operation, row_key, old_key,
                    before_data, after_data, event_type, headers, created_at, NULL::json AS meta
             FROM ins
             UNION ALL
             SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, ",
            $meta
        )
    };
}

// $1 newest seq, $2 event bytes, $3 batch (as in every statement here); $4 low, $5 window, $6 unseen xids, $7 newest xid.
//
// `id + 0 <= $4`: without the `+ 0` a generic plan walks the id index over every dead row.
// A transaction that was left out before is looked at again only once its last row is inside the window; then at most
// one row more than a batch is read of it, and its highest id is one index probe.
/// The claim's text, for `EXPLAIN`. Reads and writes: run it through [`claim`] only.
pub const CLAIM: &str = concat!(
    "WITH w AS MATERIALIZED (
        SELECT ctid AS t, xid, id FROM tidewire.outbox WHERE id > $4 ORDER BY id LIMIT $5),
    lim AS MATERIALIZED (SELECT count(*) = $5 AS full_window, max(id) AS last FROM w),
    back AS MATERIALIZED (
        SELECT u.x,
               (SELECT full_window FROM lim)
               AND EXISTS (SELECT FROM tidewire.outbox o WHERE o.xid = u.x AND o.id > (SELECT last FROM lim)) AS skipped
        FROM unnest($6::text[]::xid8[]) AS u(x)
        WHERE pg_visible_in_snapshot(u.x, pg_current_snapshot())),
    c AS MATERIALIZED (
        SELECT t, xid, id FROM w
        UNION ALL
        SELECT r.t, r.xid, r.id
        FROM back
        CROSS JOIN LATERAL (
            SELECT o.ctid AS t, o.xid, o.id FROM tidewire.outbox o
            WHERE o.xid = back.x AND o.id + 0 <= $4 ORDER BY o.xid, o.id LIMIT $3 + 1) r
        WHERE NOT back.skipped
        UNION ALL
        SELECT ctid, xid, id FROM tidewire.outbox WHERE xid >= $7::text::xid8 AND id + 0 <= $4),
    t AS MATERIALIZED (
        SELECT xid, count(*) AS k,
               CASE WHEN count(*) > $3 THEN (SELECT max(o.id) FROM tidewire.outbox o WHERE o.xid = c.xid)
                    ELSE max(id) END AS m
        FROM c GROUP BY xid),
    ok AS MATERIALIZED (
        SELECT xid, m, k, sum(k) OVER (ORDER BY m) AS cum
        FROM t
        WHERE NOT ((SELECT full_window FROM lim)
            AND EXISTS (SELECT FROM tidewire.outbox o WHERE o.xid = t.xid AND o.id > (SELECT last FROM lim)))),
    take AS MATERIALIZED (SELECT xid, m, k FROM ok WHERE cum <= $3),
    pick AS MATERIALIZED (SELECT c.t, c.xid, take.m FROM c JOIN take USING (xid)),
    held AS MATERIALIZED (
        SELECT o.ctid AS t, o.xid FROM tidewire.outbox o
        WHERE o.ctid = ANY (ARRAY(SELECT t FROM pick)) FOR UPDATE SKIP LOCKED),
    bar AS MATERIALIZED (
        SELECT CASE WHEN (SELECT count(*) FROM held) < (SELECT count(*) FROM pick)
                    THEN (SELECT min(take.m) FROM take LEFT JOIN (SELECT xid, count(*) AS k FROM held GROUP BY xid) h
                              ON h.xid = take.xid
                          WHERE COALESCE(h.k, 0) < take.k) END AS m),
    d AS (
        DELETE FROM tidewire.outbox
        WHERE ctid = ANY (ARRAY(SELECT p.t FROM pick p WHERE (SELECT m FROM bar) IS NULL OR p.m < (SELECT m FROM bar)))
        RETURNING *),
    o AS (
        SELECT d.*, row_number() OVER v AS rn, lead(d.xid) OVER v IS DISTINCT FROM d.xid AS tx_end
        FROM d JOIN take USING (xid)
        WINDOW v AS (ORDER BY take.m, d.id)),
    ",
    append_rows!("o"),
    answer!(
        " json_build_object(
            'full', (SELECT full_window FROM lim), 'last', (SELECT last FROM lim),
            'candidates', (SELECT count(*) FROM c), 'ok', (SELECT count(*) FROM ok), 'take', (SELECT count(*) FROM take),
            'first', (SELECT xid::text FROM ok ORDER BY m LIMIT 1), 'torn', (SELECT m IS NOT NULL FROM bar),
            'left_out', (SELECT COALESCE(json_agg(xid::text), '[]') FROM t WHERE xid NOT IN (SELECT xid FROM ok)),
            'skipped', (SELECT COALESCE(json_agg(x::text), '[]') FROM back WHERE skipped),
            'snapshot', pg_current_snapshot()::text, 'sequence', (SELECT last_value FROM tidewire.outbox_id_seq),
            'poison', (SELECT count(*) FROM dead),
            'lag_ms', (SELECT extract(epoch FROM max(relayed_at - created_at)) * 1000 FROM ins))"
    )
);

// $4 xid: the next part of one large transaction. All of it is committed, so
// its rows do not change; nothing else is relayed in between.
const PART: &str = concat!(
    "WITH p AS MATERIALIZED (
        SELECT ctid AS t, id FROM tidewire.outbox WHERE xid = $4::text::xid8 ORDER BY xid, id LIMIT $3 + 1),
    pick AS MATERIALIZED (SELECT t FROM p ORDER BY id LIMIT $3),
    held AS MATERIALIZED (
        SELECT o.ctid AS t FROM tidewire.outbox o
        WHERE o.ctid = ANY (ARRAY(SELECT t FROM pick)) FOR UPDATE SKIP LOCKED),
    bar AS MATERIALIZED (SELECT (SELECT count(*) FROM held) < (SELECT count(*) FROM pick) AS torn),
    d AS (
        DELETE FROM tidewire.outbox
        WHERE ctid = ANY (ARRAY(SELECT t FROM held WHERE NOT (SELECT torn FROM bar))) RETURNING *),
    o AS (
        SELECT d.*, row_number() OVER (ORDER BY d.id) AS rn,
               row_number() OVER (ORDER BY d.id) = (SELECT count(*) FROM p) AS tx_end
        FROM d),
    ",
    append_rows!("o"),
    answer!(
        " json_build_object('torn', (SELECT torn FROM bar), 'rows', (SELECT count(*) FROM p),
            'poison', (SELECT count(*) FROM dead),
            'lag_ms', (SELECT extract(epoch FROM max(relayed_at - created_at)) * 1000 FROM ins))"
    )
);

#[derive(Debug, serde::Deserialize)]
struct ClaimMeta {
    full: bool,
    last: Option<i64>,
    candidates: i64,
    ok: i64,
    take: i64,
    first: Option<String>,
    torn: bool,
    left_out: Vec<String>,
    skipped: Vec<String>,
    snapshot: String,
    sequence: i64,
    poison: u64,
    lag_ms: Option<f64>,
}

#[derive(Debug, serde::Deserialize)]
struct PartMeta {
    torn: bool,
    rows: i64,
    poison: u64,
    lag_ms: Option<f64>,
}

/// The claim as this process makes it: [`CLAIM`], but for mutants.
fn claim_text() -> &'static str {
    static BROKEN: OnceLock<String> = OnceLock::new();
    if mutant::is(Mutant::OrderById) {
        BROKEN.get_or_init(|| CLAIM.replace("ORDER BY take.m, d.id", "ORDER BY d.id"))
    } else if mutant::is(Mutant::OrderByXid) {
        BROKEN.get_or_init(|| CLAIM.replace("ORDER BY take.m, d.id", "ORDER BY d.xid DESC, d.id"))
    } else if mutant::is(Mutant::ClaimCutsTransactions) {
        BROKEN.get_or_init(|| CLAIM.replace("o.xid = t.xid AND o.id >", "false AND o.id >"))
    } else {
        CLAIM
    }
}

/// The part's text as this process sends it: [`PART`], but for a mutant.
fn part_text() -> &'static str {
    static BROKEN: OnceLock<String> = OnceLock::new();
    if mutant::is(Mutant::PartEndsEarly) {
        BROKEN.get_or_init(|| PART.replace("(SELECT count(*) FROM p) AS tx_end", "(SELECT count(*) FROM d) AS tx_end"))
    } else {
        PART
    }
}

/// Claims the next batch after `newest`, the highest seq in the log, and moves `position`.
///
/// # Errors
/// [`ClaimError`]; the claim is then not committed, or in doubt: the term must end.
pub async fn claim(
    connection: &mut PgConnection,
    position: &mut Position,
    newest: Seq,
    bounds: Bounds,
    intern: &mut Interner,
) -> Result<Claim, ClaimError> {
    let rows = sqlx::query(claim_text())
        .bind(newest.cast_signed())
        .bind(bounds.event_bytes)
        .bind(bounds.batch)
        .bind(position.low)
        .bind(bounds.window)
        .bind(&position.unseen)
        .bind(&position.newest_xid)
        .fetch_all(connection)
        .await?;
    let (events, meta): (_, ClaimMeta) = take_apart(&rows, newest, intern)?;
    let mut claim = Claim {
        events,
        torn: meta.torn,
        poison: meta.poison,
        lag_ms: meta.lag_ms.unwrap_or_default(),
        more: meta.full || meta.take < meta.ok,
        ..Claim::default()
    };
    if meta.torn {
        return Ok(claim);
    }
    if meta.take == 0 && meta.ok > 0 {
        claim.oversized = meta.first;
        return Ok(claim);
    }
    if meta.take < meta.ok {
        return Ok(claim);
    }
    claim.widen = meta.take == 0 && meta.candidates > 0;
    position.advance(&meta);
    Ok(claim)
}

impl Position {
    /// After a claim that took every complete transaction of its window.
    fn advance(&mut self, meta: &ClaimMeta) {
        // `sequence` was read by the claim before: whoever draws a higher id later is above `low`. It may make `low` go
        // back (after a sweep); keeping the larger one would reorder.
        self.low = match (meta.full, meta.last) {
            (true, Some(last)) => last,
            _ => self.sequence,
        };
        self.sequence = meta.sequence;
        let mut parts = meta.snapshot.splitn(3, ':');
        let (_, newest, running) = (parts.next(), parts.next(), parts.next());
        self.newest_xid = newest.unwrap_or(LAST_XID).to_owned();
        let running = if mutant::is(Mutant::FloorPassesRunning) { None } else { running };
        self.unseen = running.unwrap_or("").split(',').filter(|xid| !xid.is_empty()).map(str::to_owned).collect();
        self.unseen.extend(meta.left_out.iter().chain(&meta.skipped).cloned());
        // One that was skipped and has rows in the window is left out, too. Twice in the list, its rows would be picked
        // twice, and the claim would take it for torn for ever.
        self.unseen.sort_unstable();
        self.unseen.dedup();
    }
}

/// Relays the next part of the transaction `xid`, at most `bounds.batch` rows. `more` says whether another follows.
///
/// # Errors
/// [`ClaimError`], as [`claim`].
pub async fn claim_part(
    connection: &mut PgConnection,
    xid: &str,
    newest: Seq,
    bounds: Bounds,
    intern: &mut Interner,
) -> Result<Claim, ClaimError> {
    let rows = sqlx::query(part_text())
        .bind(newest.cast_signed())
        .bind(bounds.event_bytes)
        .bind(bounds.batch)
        .bind(xid)
        .fetch_all(connection)
        .await?;
    let (events, meta): (_, PartMeta) = take_apart(&rows, newest, intern)?;
    Ok(Claim {
        events,
        torn: meta.torn,
        poison: meta.poison,
        lag_ms: meta.lag_ms.unwrap_or_default(),
        more: meta.rows > bounds.batch,
        ..Claim::default()
    })
}

fn take_apart<M: serde::de::DeserializeOwned>(
    rows: &[PgRow],
    newest: Seq,
    intern: &mut Interner,
) -> Result<(Vec<Event>, M), ClaimError> {
    let mut events = Vec::with_capacity(rows.len().saturating_sub(1));
    let mut meta = None;
    for row in rows {
        if let Some(text) = row.try_get_unchecked::<Option<&str>, _>(14)? {
            meta = Some(serde_json::from_str(text).map_err(|error| sqlx::Error::Decode(error.into()))?);
        } else {
            let mut event = event(row, intern)?;
            event.tx_end |= mutant::is(Mutant::EveryEventEnds);
            events.push(event);
        }
    }
    let numbered = |(event, want): (&Event, Seq)| (event.seq != want).then_some((want, event.seq));
    if let Some((want, got)) = events.iter().zip(newest + 1..).find_map(numbered) {
        return Err(ClaimError::Numbering { want, got });
    }
    let meta = meta.ok_or_else(|| sqlx::Error::Protocol("the claim came back without its summary".into()))?;
    Ok((events, meta))
}

/// Who holds locks on outbox rows: backend pids and what they are, for the log and for `doctor`.
///
/// # Errors
/// When Postgres refuses.
pub async fn outbox_lock_holders(connection: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT format('pid %s (%s, %s, %s)', a.pid, a.usename, a.application_name, a.state)
         FROM pg_locks l
         JOIN pg_stat_activity a USING (pid)
         WHERE l.relation = 'tidewire.outbox'::regclass AND l.mode = 'RowShareLock' AND l.pid <> pg_backend_pid()
         LIMIT 10",
    )
    .fetch_all(connection)
    .await
}
