//! A relay's term in slow motion: the claim as the leader makes it, one step at a time, on a connection of its own.

use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use std::time::Duration;
use tidewire::event::Event;
use tidewire::log::append::{Bounds, Claim, ClaimError, Interner, Position, claim, claim_part};
use tidewire::postgres::settings;
use tidewire::relay::LEADER_LOCK;

use super::DEADLINE;

/// Claims of which none may move anything before a drained outbox counts as drained.
const QUIET_CLAIMS: usize = 3;
/// As the leader: the window grows by this while it holds only beginnings.
const WINDOW_GROWTH: i64 = 4;
const MAX_WINDOW: i64 = 200_000;

/// One term: the lock, the claims, the numbering.
#[derive(Debug)]
pub(crate) struct Term {
    pub(crate) connection: PgConnection,
    pub(crate) position: Position,
    pub(crate) newest: u64,
    /// The large transaction that is being relayed in parts.
    pub(crate) open: Option<String>,
    /// Everything appended by this term.
    pub(crate) appended: Vec<Event>,
    batch: i64,
    window: i64,
    interner: Interner,
}

impl Term {
    /// Waits for the lock, then finishes what the log's tail left open.
    pub(crate) async fn begin(url: &str, batch: i64) -> Result<Self, ClaimError> {
        Self::begin_with(url, batch, Duration::from_secs(20)).await
    }

    /// Like [`Term::begin`]; Postgres ends the session after `lease` of silence.
    pub(crate) async fn begin_with(url: &str, batch: i64, lease: Duration) -> Result<Self, ClaimError> {
        let mut connection = PgConnection::connect(url).await?;
        settings::lead(&mut connection, lease).await?;
        let lock = "SELECT pg_try_advisory_lock($1)";
        while !sqlx::query_scalar::<_, bool>(lock).bind(LEADER_LOCK).fetch_one(&mut connection).await? {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let tail: Option<(i64, String, bool)> =
            sqlx::query_as("SELECT seq, xid::text, tx_end FROM tidewire.event_log ORDER BY seq DESC LIMIT 1")
                .fetch_optional(&mut connection)
                .await?;
        let mut term = Self {
            connection,
            position: Position::beginning(),
            newest: tail.as_ref().map_or(0, |(seq, _, _)| seq.cast_unsigned()),
            open: None,
            appended: Vec::new(),
            batch,
            window: batch,
            interner: Interner::default(),
        };
        if let Some((_, xid, false)) = tail {
            term.open = Some(xid);
        }
        Ok(term)
    }

    fn take(&mut self, events: Vec<Event>) {
        self.newest += events.len() as u64;
        self.appended.extend(events);
    }

    /// One step of the leader's loop: the next part of a large transaction if one is open, else a claim.
    pub(crate) async fn step(&mut self) -> Result<Claim, ClaimError> {
        let bounds = Bounds { window: self.window, batch: self.batch, event_bytes: 4 << 20 };
        if let Some(xid) = self.open.clone() {
            let mut part = claim_part(&mut self.connection, &xid, self.newest, bounds, &mut self.interner).await?;
            self.take(std::mem::take(&mut part.events));
            if !part.more && !part.torn {
                self.open = None;
            }
            part.more = true;
            return Ok(part);
        }
        let mut claimed =
            claim(&mut self.connection, &mut self.position, self.newest, bounds, &mut self.interner).await?;
        self.window = if claimed.widen { (self.window * WINDOW_GROWTH).min(MAX_WINDOW) } else { self.batch };
        self.take(std::mem::take(&mut claimed.events));
        self.open.clone_from(&claimed.oversized);
        Ok(claimed)
    }

    /// Claims until several claims in a row move nothing and nothing is held back.
    pub(crate) async fn drain(&mut self) -> usize {
        let before = self.newest;
        let until = tokio::time::Instant::now() + DEADLINE * 4;
        let mut quiet = 0;
        while quiet < QUIET_CLAIMS {
            let newest = self.newest;
            let claimed = self.step().await.unwrap();
            let moved = self.newest > newest || claimed.more || claimed.torn;
            quiet = if moved { 0 } else { quiet + 1 };
            assert!(tokio::time::Instant::now() < until, "not dry: {claimed:?} at {:?}", self.position);
        }
        usize::try_from(self.newest - before).unwrap()
    }

    /// Looks at everything anew, as the leader does once a minute.
    pub(crate) fn sweep(&mut self) {
        self.position = Position::beginning();
    }

    pub(crate) async fn pid(&mut self) -> i32 {
        sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut self.connection).await.unwrap()
    }

    /// The last `count` events as `table after`.
    pub(crate) fn last(&self, count: usize) -> Vec<String> {
        let from = self.appended.len().saturating_sub(count);
        self.appended[from..].iter().map(label).collect()
    }
}

/// What tests write and look for: the text under `"n"` in the event's `after`, and `.` at a transaction's end.
pub(crate) fn label(event: &Event) -> String {
    let body: serde_json::Value = serde_json::from_slice(&event.body).unwrap();
    let name = &body["after"]["n"];
    let name = name.as_str().map_or_else(|| name.to_string(), str::to_owned);
    format!("{name}{}", if event.tx_end { "." } else { "" })
}

/// A connection that writes.
#[derive(Debug)]
pub(crate) struct Writer(pub(crate) PgConnection);

impl Writer {
    pub(crate) async fn connect(url: &str) -> Self {
        Self(PgConnection::connect(url).await.unwrap())
    }

    pub(crate) async fn run(&mut self, sql: &str) {
        self.attempt(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    pub(crate) async fn attempt(&mut self, sql: &str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut self.0).await.map(|_| ())
    }

    /// Writes one domain event whose `after` names it.
    pub(crate) async fn emit(&mut self, name: &str) {
        self.run(&emit(name)).await;
    }
}

/// The statement that writes a domain event of this name.
pub(crate) fn emit(name: &str) -> String {
    format!(r#"SELECT tidewire.emit('t', '1', 'e', '{{"n":"{name}"}}');"#)
}

/// What is wrong with the log, by the promises that hold for every log: dense, each event once, transactions contiguous
/// with their end on the last event only.
pub(crate) async fn faults(pool: &PgPool) -> Vec<String> {
    let sql = "
        WITH l AS (SELECT seq, xid, tx_end, event_id, lag(seq) OVER w AS p, lead(xid) OVER w AS n, lag(xid) OVER w AS q
                   FROM tidewire.event_log WINDOW w AS (ORDER BY seq))
        SELECT format('hole before %s', seq) FROM l WHERE seq <> coalesce(p, 0) + 1
        UNION ALL SELECT format('event %s twice', event_id) FROM l GROUP BY event_id HAVING count(*) > 1
        UNION ALL SELECT format('transaction %s in %s pieces', xid, count(*)) FROM l WHERE xid IS DISTINCT FROM q
            GROUP BY xid HAVING count(*) > 1
        UNION ALL SELECT format('tx_end of %s is %s', seq, tx_end) FROM l WHERE tx_end <> (n IS DISTINCT FROM xid)
        UNION ALL SELECT format('%s rows stay in the outbox', count(*)) FROM tidewire.outbox HAVING count(*) > 0
        LIMIT 20";
    sqlx::query_scalar(sql).fetch_all(pool).await.unwrap()
}
