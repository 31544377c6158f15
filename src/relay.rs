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
pub mod election;
pub mod intruders;
mod portion;
mod upkeep;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::event::Event;
use crate::failpoint;
use crate::log::append::{Bounds, Claim, ClaimError, Position, claim, claim_part, outbox_lock_holders};
use crate::log::incarnation::Known;
use crate::log::retention;
use crate::postgres::Database;
use crate::postgres::listen::Wakeups;
use crate::telemetry::metrics::{Metrics, gauge};
use crate::telemetry::trace;
use crate::telemetry::tracing::with_warnings;

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
    /// Largest row images of an event, bytes.
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
    position: Position,
    term: u64,
    newest: u64,
    partition_end: u64,
    pace: upkeep::Pace,
    window: i64,
    portion: portion::Portion,
    interner: crate::log::append::Interner,
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
        let bounds = self.bounds();
        let began = Instant::now();
        let work = claim(self.connection, &mut self.position, self.newest, bounds, &mut self.interner);
        let claim = answered(self.relay.options.lease, work).await??;
        self.window = match claim.widen {
            true => (self.window * WINDOW_GROWTH).min(MAX_WINDOW),
            false => i64::from(self.relay.options.batch),
        };
        failpoint::hit("relay.claimed").await.map_err(sqlx::Error::from)?;
        self.appended(&claim, began).await?;
        Ok(claim)
    }

    /// A transaction larger than a batch, in consecutive parts; nothing else in between. Where it stops, the next term goes
    /// on: the log's tail says that it is open.
    async fn relay_in_parts(&mut self, xid: &str, stop: &CancellationToken) -> Result<(), TermEnd> {
        while !stop.is_cancelled() {
            failpoint::hit("relay.part").await.map_err(sqlx::Error::from)?;
            let bounds = self.bounds();
            let began = Instant::now();
            let work = claim_part(self.connection, xid, self.newest, bounds, &mut self.interner);
            let claim = answered(self.relay.options.lease, work).await??;
            if claim.torn {
                self.report_torn().await?;
                tokio::time::sleep(TORN_RETRY).await;
                continue;
            }
            self.relay.metrics.relay_parts_total.inc();
            self.appended(&claim, began).await?;
            if !claim.more {
                break;
            }
        }
        Ok(())
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
                "rows too large to carry: relayed without them, kept in dead_letters"
            );
        }
        let Some(last) = claim.events.last() else { return Ok(()) };
        self.portion.claimed(claim.events.len(), claim.events.iter().map(Event::bytes).sum());
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
            let holders = answered(self.relay.options.lease, outbox_lock_holders(self.connection)).await??;
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

/// Waits for an answer at most a lease long. A warning that came with it means a commit that may not be durable.
async fn answered<F: Future>(lease: Duration, work: F) -> Result<F::Output, TermEnd> {
    match with_warnings(tokio::time::timeout(lease, work)).await {
        (Err(_), _) => Err(TermEnd::Silence),
        (Ok(_), warnings) if !warnings.iter().all(|warning| harmless(warning)) => {
            Err(TermEnd::NotDurable(warnings.join("; ")))
        }
        (Ok(output), _) => Ok(output),
    }
}

/// Near the wraparound of transaction ids every writing transaction is told to vacuum: that says nothing of its commit, and
/// a relay that gave up for it would stand still while Postgres still works. Whatever else is told, in any language, may be
/// the wait for a standby that was cut off.
fn harmless(warning: &str) -> bool {
    warning.contains("must be vacuumed within")
}

#[cfg(test)]
mod tests {
    use super::harmless;

    #[test]
    fn a_warning_of_the_wraparound_ends_no_term_and_a_cut_off_wait_does() {
        assert!(harmless("database \"app\" must be vacuumed within 39985967 transactions"));
        assert!(!harmless("canceling wait for synchronous replication due to user request"));
    }
}
