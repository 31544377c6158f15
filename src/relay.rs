//! The relay: one term of the leader, from the lock to the resignation.
//!
//! Lock, claim, numbering and append run on **one** connection, the one that holds the leader's session advisory lock
//! (invariant I2). It never came from a pool and is closed on any error, timeout or doubt; the next leader's lock is
//! granted only after Postgres has ended this one's transaction, so two can never overlap. What is committed is handed to
//! the [`announce`] task, which has a connection of its own: a lost announcement is read from the log by the nodes.
//!
//! The loop: claim; while there was something, claim again; idle for a moment, poll; idle for longer, *park*: take the
//! park lock exclusively, scan once more, wait to be woken. A writer that saw "awake" holds that lock shared until its
//! rows are visible, so a wake-up cannot be lost.

mod announce;
mod answer;
pub mod election;
pub mod intruders;
mod parts;
mod portion;
mod upkeep;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::answer::{answered, worked};
use crate::failpoint;
use crate::log::append::{Bounds, Claim, ClaimError, Position, claim, outbox_lock_holders};
use crate::log::incarnation::Known;
use crate::log::retention;
use crate::postgres::Database;
use crate::postgres::listen::Wakeups;
use crate::telemetry::metrics::{Metrics, gauge};
use crate::telemetry::trace;

/// Session advisory lock of the leader. Drawn once; the migrations have it and [`PARK_LOCK`] too.
pub const LEADER_LOCK: i64 = 8_388_068_008_253_452_901;
/// Held exclusively while the relay is parked, shared by every writer that saw it awake.
pub const PARK_LOCK: i64 = LEADER_LOCK + 1;

/// Rung by a leader that resigns.
pub const LEADER_CHANNEL: &str = "tidewire_leader";

/// Wait between polls while awake without rows. An empty claim costs the server about 0.1 ms.
const POLL_INTERVAL: Duration = Duration::from_micros(500);
/// A claim of fewer events is followed by such a wait, too: each claim, announcement and wake-up of every node costs
/// about as much for one event as for twenty, and on a busy machine that cost is what events wait for.
const GATHER_EVENTS: usize = 32;
/// Wait after a writer in flight refused the park lock.
const PARK_RETRY: Duration = Duration::from_millis(4);
/// Wait before a claim that was held back by a foreign row lock is tried again.
const TORN_RETRY: Duration = Duration::from_millis(4);
/// The leader says something to Postgres at least this often, also when parked; it is the safety poll as well.
const KEEPALIVE: Duration = Duration::from_millis(500);
/// Everything is looked at anew this often, so that what could be missed is only late.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// The window grows by this factor while it holds only beginnings of large transactions, up to [`MAX_WINDOW`].
const WINDOW_GROWTH: i64 = 4;
/// Widest window, rows: three numbers each in the server's memory.
const MAX_WINDOW: i64 = 200_000;
/// Batches that wait to be announced; beyond, they are not announced and the nodes read the log.
const ANNOUNCE_QUEUE: usize = 8;
/// How long a batch waits for a place in that queue.
const ANNOUNCE_PATIENCE: Duration = Duration::from_millis(250);
/// A foreign row lock on the outbox is reported at most this often.
const TORN_REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// How the relay works.
#[derive(Clone, Debug)]
pub struct RelayOptions {
    /// This node's name.
    pub node: String,
    /// Most events a batch, 1 or more.
    pub batch: u32,
    /// Largest event, bytes: names, keys, headers and rows together.
    pub event_bytes: u64,
    /// Silence after which Postgres ends the leader's session, and the longest wait for an answer.
    pub lease: Duration,
    /// Time without a row before parking; zero never parks (for databases that use PREPARE TRANSACTION).
    pub park_after: Duration,
    /// How long the log is kept.
    pub retention: Duration,
    /// Whether relayed events become spans of their writers' traces.
    pub trace: bool,
}

/// What the relay needs from its node.
#[derive(Clone, Debug)]
pub struct Relay {
    /// How it works.
    pub options: RelayOptions,
    /// The database.
    pub database: Arc<Database>,
    /// What it is woken by.
    pub wakeups: Arc<Wakeups>,
    /// What this node has seen of the log.
    pub known: watch::Receiver<Option<Known>>,
    /// Tables with a public channel, and its name.
    pub channels: watch::Receiver<Arc<HashMap<Arc<str>, String>>>,
    /// Where it counts.
    pub metrics: Arc<Metrics>,
}

/// Why a term ended. None is fatal for the node: it becomes a candidate again.
#[derive(Debug, thiserror::Error)]
pub enum TermEnd {
    /// Asked to.
    #[error("resigned")]
    Resigned,
    /// Claiming failed.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// Postgres refused something else, or the connection died.
    #[error("{0}")]
    Postgres(#[from] sqlx::Error),
    /// No answer for a whole lease.
    #[error("no answer from Postgres for a whole lease")]
    Silence,
    /// A commit whose wait for a standby was cancelled: visible, perhaps not replicated.
    #[error("a commit came back with a warning, so it may not be durable: {0}")]
    NotDurable(String),
    /// The announcing connection is gone.
    #[error("the announcing connection failed: {0}")]
    Announce(String),
}

/// One term's loop over the lock connection.
struct Leader<'a> {
    relay: &'a Relay,
    connection: &'a mut PgConnection,
    announce: mpsc::Sender<announce::Batch>,
    /// Whether the notification queue has room enough for writers' wake-ups.
    may_park: watch::Receiver<bool>,
    /// The backend of `connection`.
    pid: i32,
    position: Position,
    term: u64,
    newest: u64,
    partition_end: u64,
    pace: upkeep::Pace,
    window: i64,
    portion: portion::Portion,
    interner: crate::log::append::Interner,
    /// A row of the first transaction in order cannot be processed: nothing but that transaction is relayed next.
    careful: bool,
    /// A row that failed alone, perhaps for a reason that passes.
    doubted: Option<parts::Doubted>,
    parked: bool,
    swept: Instant,
    torn_reported: Option<Instant>,
}

impl Leader<'_> {
    /// Relays until asked to stop or until anything fails.
    async fn run(&mut self, open_xid: Option<String>, stop: &CancellationToken) -> Result<(), TermEnd> {
        self.ensure_partition().await?;
        if let Some(xid) = open_xid {
            tracing::info!(xid, "finishing the transaction that the log's tail left open");
            self.relay_in_parts(&xid, stop).await?;
        }
        let mut last_event = Instant::now();
        while !stop.is_cancelled() {
            let claim = self.claim().await?;
            if !claim.events.is_empty() {
                last_event = Instant::now();
            }
            if let Some(xid) = &claim.oversized {
                self.unpark().await?;
                self.relay_in_parts(xid, stop).await?;
                self.careful = false;
            } else if claim.torn {
                self.report_torn().await?;
                tokio::time::sleep(TORN_RETRY).await;
            } else if claim.more || claim.events.len() >= GATHER_EVENTS {
                self.unpark().await?;
            } else if !claim.events.is_empty() {
                self.unpark().await?;
                rest().await;
            } else {
                self.idle(last_event.elapsed(), stop).await?;
            }
        }
        self.unpark().await
    }

    async fn claim(&mut self) -> Result<Claim, TermEnd> {
        if self.swept.elapsed() > SWEEP_INTERVAL {
            self.swept = Instant::now();
            self.position = Position::beginning();
        }
        failpoint::hit("relay.claim").await.map_err(sqlx::Error::from)?;
        let mut bounds = self.bounds();
        if self.careful {
            // No row fits: the claim reads none, and names the first transaction.
            bounds.batch = 0;
        }
        let began = Instant::now();
        let work = claim(self.connection, &mut self.position, self.newest, bounds, &mut self.interner);
        let claim = match worked(self.relay, self.pid, work).await? {
            Err(error) => match error.suspect().filter(|_| !self.careful) {
                Some(suspect) => {
                    self.careful = !self.fewer(&error, suspect).await;
                    return Ok(Claim { more: true, ..Claim::default() });
                }
                None => return Err(error.into()),
            },
            Ok(claim) => claim,
        };
        self.careful &= claim.oversized.is_some() || claim.torn;
        self.window = match claim.widen {
            true => (self.window * WINDOW_GROWTH).min(MAX_WINDOW),
            false => i64::from(self.relay.options.batch),
        };
        failpoint::hit("relay.claimed").await.map_err(sqlx::Error::from)?;
        self.appended(&claim, began).await?;
        Ok(claim)
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            window: self.window,
            batch: i64::from(self.portion.rows()),
            event_bytes: i64::try_from(self.relay.options.event_bytes).unwrap_or(i64::MAX),
        }
    }

    /// After a commit: count, announce, make room ahead.
    async fn appended(&mut self, claim: &Claim, began: Instant) -> Result<(), TermEnd> {
        let metrics = &self.relay.metrics;
        metrics.relay_poison_total.inc_by(claim.poison);
        if claim.poison > 0 {
            tracing::warn!(
                events = claim.poison,
                "events that cannot be carried: relayed without their rows, kept in dead_letters"
            );
        }
        let Some(last) = claim.events.last() else { return Ok(()) };
        self.portion.claimed(claim.events.len(), claim.bytes);
        failpoint::hit("relay.appended").await.map_err(sqlx::Error::from)?;
        metrics.relay_batch_ms.observe(began.elapsed().as_secs_f64() * 1000.0);
        metrics.relay_batch_events.observe(claim.events.len() as f64);
        metrics.events_relayed_total.inc_by(claim.events.len() as u64);
        metrics.event_lag_ms.observe(claim.lag_ms);
        self.newest = last.seq;
        if self.relay.options.trace {
            trace::relayed(&claim.events, self.term);
        }
        self.pace.appended(claim.events.len(), Instant::now());
        let batch = announce::Batch { events: claim.events.clone() };
        // Full: the nodes find the gap by the next chunk or heartbeat and read the log.
        let _ = self.announce.send_timeout(batch, ANNOUNCE_PATIENCE).await;
        metrics.feed_backlog_batches.set(gauge(self.announce.max_capacity() - self.announce.capacity()));
        self.ensure_partition().await
    }

    async fn ensure_partition(&mut self) -> Result<(), TermEnd> {
        let ahead = u64::from(self.relay.options.batch) * 20;
        while self.newest + ahead >= self.partition_end {
            let all = answered(self.relay.options.lease, retention::partitions(self.connection)).await??;
            self.partition_end = all.last().map_or(1, |partition| partition.to);
            self.relay.metrics.log_partitions.set(gauge(all.len()));
            if self.newest + ahead >= self.partition_end {
                failpoint::hit("relay.partition").await.map_err(sqlx::Error::from)?;
                let events = retention::partition_events(self.pace.events_per_s());
                let work = retention::create_partition(self.connection, self.partition_end, events);
                match answered(self.relay.options.lease, work).await? {
                    // Somebody holds a lock on the log (ANALYZE, say): there is room still, and the next batch tries again.
                    Err(sqlx::Error::Database(error))
                        if error.code().as_deref() == Some("55P03") && self.newest + ahead / 2 < self.partition_end =>
                    {
                        tracing::warn!(%error, "the next partition of the log cannot be made yet");
                        return Ok(());
                    }
                    outcome => outcome?,
                }
            }
        }
        Ok(())
    }

    async fn idle(&mut self, idle: Duration, stop: &CancellationToken) -> Result<(), TermEnd> {
        let may_park = self.may_park();
        if self.parked && !may_park {
            self.unpark().await?;
        }
        if !self.parked {
            if idle < self.relay.options.park_after || !may_park {
                rest().await;
            } else if self.try_park().await? {
                // The scan after taking the lock is the next turn of the loop; hints that come from here on count.
            } else {
                tokio::time::sleep(PARK_RETRY).await;
            }
            return Ok(());
        }
        tokio::select! {
            () = self.relay.wakeups.outbox.notified() => self.unpark().await?,
            () = tokio::time::sleep(KEEPALIVE) => {}
            () = stop.cancelled() => {}
        }
        Ok(())
    }

    fn may_park(&self) -> bool {
        !self.relay.options.park_after.is_zero() && self.relay.wakeups.listening() && *self.may_park.borrow()
    }

    async fn try_park(&mut self) -> Result<bool, TermEnd> {
        let work =
            sqlx::query_scalar("SELECT pg_try_advisory_lock($1)").bind(PARK_LOCK).fetch_one(&mut *self.connection);
        self.parked = answered(self.relay.options.lease, work).await??;
        self.relay.metrics.relay_parked.set(i64::from(self.parked));
        Ok(self.parked)
    }

    async fn unpark(&mut self) -> Result<(), TermEnd> {
        if !self.parked {
            return Ok(());
        }
        let work = sqlx::query("SELECT pg_advisory_unlock($1)").bind(PARK_LOCK).execute(&mut *self.connection);
        answered(self.relay.options.lease, work).await??;
        self.parked = false;
        self.relay.metrics.relay_parked.set(0);
        Ok(())
    }

    async fn report_torn(&mut self) -> Result<(), TermEnd> {
        self.relay.metrics.relay_torn_claims_total.inc();
        if self.torn_reported.is_none_or(|at| at.elapsed() > TORN_REPORT_INTERVAL) {
            self.torn_reported = Some(Instant::now());
            let holders = answered(self.relay.options.lease, outbox_lock_holders(&mut *self.connection)).await??;
            tracing::warn!(
                ?holders,
                "somebody holds a row lock on the outbox: what follows it waits; end that session"
            );
        }
        Ok(())
    }
}

/// Waits for [`POLL_INTERVAL`]. The runtime's timers count whole milliseconds and round up: every event would wait for them.
async fn rest() {
    // Fails only when the runtime shuts down.
    let _ = tokio::task::spawn_blocking(|| std::thread::sleep(POLL_INTERVAL)).await;
}
