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
//!
//! No content may stop it. What is too large, or cannot leave the server as text, is appended without its rows and kept in
//! `dead_letters`; a row that makes the statement fail all the same is found by halving and passed by [`set_aside`].

mod statements;

use std::sync::OnceLock;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;
use sqlx::{PgExecutor, Row as _};

pub use self::statements::CLAIM;
use self::statements::{PART, SET_ASIDE};
pub use super::row::Interner;
use super::row::event;
use crate::cursor::Seq;
use crate::event::Event;
use crate::feed::chunk::MAX_BODY_BYTES;
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

/// Bodies of one claim that are kept for the feed, bytes. What has more than that is read from the log by every node.
const KEPT_BYTES: usize = 16 << 20;

/// What one claim did.
#[derive(Debug, Default)]
pub struct Claim {
    /// Appended, in order. Those that no chunk of the feed could carry have an empty body, and so have all once the claim's
    /// bodies have [`KEPT_BYTES`]: a claim of large rows must not take the leader's memory.
    pub events: Vec<Event>,
    /// Bytes of the events, their whole bodies counted.
    pub bytes: usize,
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

/// Why a claim failed. Every one ends the term, but for those that have a [`Suspect`].
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
    /// Largest event, bytes: names, keys, headers and rows together. A larger one is relayed without its rows and kept in
    /// `dead_letters`.
    pub event_bytes: i64,
}

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
    let statement = sqlx::query(claim_text())
        .bind(newest.cast_signed())
        .bind(bounds.event_bytes)
        .bind(bounds.batch)
        .bind(position.low)
        .bind(bounds.window)
        .bind(&position.unseen)
        .bind(&position.newest_xid);
    let (kept, meta): (_, ClaimMeta) = take_apart(statement, connection, newest, intern).await?;
    let mut claim = Claim {
        events: kept.events,
        bytes: kept.bytes,
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

/// What made a statement fail, where that may be a value of a row: the statement is undone and the connection is sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspect {
    /// A row: the same statement would fail again. SQLSTATE classes 22 (data) and 54 (limits).
    Row,
    /// A row or the server, which only time tells apart. 53200 is a value too large for the server's memory, or a full lock
    /// table; class XX a value that is damaged or too large for one allocation, or a relation that cannot be opened at the
    /// moment; 57014 a value that takes longer than a statement may, or somebody who cancels.
    RowOrServer,
}

impl ClaimError {
    /// What may have made the statement fail; None: nothing that a row has to do with.
    #[must_use]
    pub fn suspect(&self) -> Option<Suspect> {
        let Self::Postgres(sqlx::Error::Database(error)) = self else { return None };
        let code = error.code();
        match code.as_deref().unwrap_or_default() {
            code if code.starts_with("22") || code.starts_with("54") => Some(Suspect::Row),
            code if code.starts_with("XX") || ["53200", "57014"].contains(&code) => Some(Suspect::RowOrServer),
            _ => None,
        }
    }
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
    let statement =
        sqlx::query(part_text()).bind(newest.cast_signed()).bind(bounds.event_bytes).bind(bounds.batch).bind(xid);
    part(statement, connection, newest, bounds.batch, intern).await
}

/// What of a row that cannot be processed can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readable {
    /// Nothing: its place is kept, as an event of the table `unknown`.
    Nothing = 0,
    /// Its table and operation.
    Names = 1,
    /// All of it can be copied.
    All = 2,
}

impl Readable {
    /// The next less; None: there is no less.
    #[must_use]
    pub const fn less(self) -> Option<Self> {
        match self {
            Self::All => Some(Self::Names),
            Self::Names => Some(Self::Nothing),
            Self::Nothing => None,
        }
    }
}

/// Relays the next event of the transaction `xid` without its content, which no statement could process for the reason
/// `why`; what of it can be read goes to `dead_letters`. `more` says whether another
/// event of the transaction follows.
///
/// # Errors
/// [`ClaimError`], as [`claim`].
pub async fn set_aside(
    connection: &mut PgConnection,
    xid: &str,
    newest: Seq,
    why: &str,
    readable: Readable,
    intern: &mut Interner,
) -> Result<Claim, ClaimError> {
    let statement = sqlx::query(SET_ASIDE).bind(newest.cast_signed()).bind(why).bind(xid).bind(readable as i32);
    part(statement, connection, newest, 1, intern).await
}

async fn part(
    statement: Query<'_, sqlx::Postgres, PgArguments>,
    connection: &mut PgConnection,
    newest: Seq,
    batch: i64,
    intern: &mut Interner,
) -> Result<Claim, ClaimError> {
    let (kept, meta): (_, PartMeta) = take_apart(statement, connection, newest, intern).await?;
    Ok(Claim {
        events: kept.events,
        bytes: kept.bytes,
        torn: meta.torn,
        poison: meta.poison,
        lag_ms: meta.lag_ms.unwrap_or_default(),
        more: meta.rows > batch,
        ..Claim::default()
    })
}

/// Events of an answer, with the bodies that the feed may want.
#[derive(Debug, Default)]
struct Kept {
    events: Vec<Event>,
    bytes: usize,
    kept_bytes: usize,
}

impl Kept {
    fn push(&mut self, mut event: Event) {
        self.bytes += event.bytes();
        if event.body.len() > MAX_BODY_BYTES || self.kept_bytes + event.body.len() > KEPT_BYTES {
            event.body = Bytes::new();
        }
        self.kept_bytes += event.body.len();
        self.events.push(event);
    }
}

/// Runs a statement and reads its answer row by row to the end, which is when it is committed.
async fn take_apart<M: serde::de::DeserializeOwned>(
    statement: Query<'_, sqlx::Postgres, PgArguments>,
    connection: &mut PgConnection,
    newest: Seq,
    intern: &mut Interner,
) -> Result<(Kept, M), ClaimError> {
    let (mut kept, mut meta) = (Kept::default(), None);
    let mut wrong = None;
    let mut rows = statement.fetch(connection);
    while let Some(row) = rows.try_next().await? {
        if let Some(text) = row.try_get_unchecked::<Option<&str>, _>(14)? {
            meta = Some(serde_json::from_str(text).map_err(|error| sqlx::Error::Decode(error.into()))?);
            continue;
        }
        let mut event = event(&row, intern)?;
        event.tx_end |= mutant::is(Mutant::EveryEventEnds);
        let want = newest + 1 + kept.events.len() as u64;
        if event.seq != want {
            wrong.get_or_insert(ClaimError::Numbering { want, got: event.seq });
        }
        kept.push(event);
    }
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    let meta = meta.ok_or_else(|| sqlx::Error::Protocol("the claim came back without its summary".into()))?;
    Ok((kept, meta))
}

/// Who holds locks on outbox rows: backend pids and what they are, for the log and for `doctor`.
///
/// # Errors
/// When Postgres refuses.
pub async fn outbox_lock_holders(executor: impl PgExecutor<'_>) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT format('pid %s (%s, %s, %s)', a.pid, a.usename, a.application_name, a.state)
         FROM pg_locks l
         JOIN pg_stat_activity a USING (pid)
         WHERE l.relation = 'tidewire.outbox'::regclass AND l.mode = 'RowShareLock' AND l.pid <> pg_backend_pid()
         LIMIT 10",
    )
    .fetch_all(executor)
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Operation;

    fn event(seq: Seq, bytes: usize) -> Event {
        Event {
            seq,
            id: uuid::Uuid::nil(),
            xid: 1,
            operation: Operation::Insert,
            tx_end: false,
            omitted: false,
            table: "t".into(),
            body: vec![b'x'; bytes].into(),
        }
    }

    #[test]
    fn a_claim_keeps_every_event_and_no_more_bodies_than_its_bound() {
        let mut kept = Kept::default();
        for seq in 1..=10 {
            kept.push(event(seq, 3 << 20));
        }
        // No chunk could carry it; a small one that comes later is kept again.
        kept.push(event(11, MAX_BODY_BYTES + 1));
        kept.push(event(12, 100));
        assert_eq!(kept.events.iter().map(|event| event.seq).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
        let bodies: usize = kept.events.iter().map(|event| event.body.len()).sum();
        assert_eq!(bodies, (15 << 20) + 100);
        assert!(bodies <= KEPT_BYTES && kept.bytes > 34 << 20, "all are counted");
    }
}
