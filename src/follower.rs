//! The follower: from the feed and the log into the hub, contiguous or not at all.
//!
//! One task owns the LISTEN connection of the node. A chunk that continues the ring exactly, opens with its term's key
//! and comes from that term's announcing backend is used; everything else (gap, reconnect, silence, a chunk of another
//! epoch, doubt) is answered by reading the log. Other hints that arrive on the same connection are passed on.
//!
//! When a connection finds another incarnation of the database, delivery is *held* until the newest epoch names that
//! incarnation and a term of that epoch has begun (its commit vouches for what stands before it).

mod belief;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::belief::Belief;
use crate::backoff::Backoff;
use crate::cursor::{Epoch, Seq};
use crate::event::{Event, Operation};
use crate::failpoint;
use crate::feed::chunk::{ChunkError, Header, Kind, decode_events};
use crate::feed::seal::FeedKey;
use crate::hub::Hub;
use crate::log::append::Interner;
use crate::log::incarnation::{TermKey, epoch_has_term, epochs, term_key};
use crate::log::read;
use crate::mutant::{self, Mutant};
use crate::postgres::listen::{Heard, SCHEMA_CHANNEL, Wakeups, listen};
use crate::postgres::{Database, Incarnation, within};
use crate::relay::LEADER_CHANNEL;
use crate::schema::Registry;
use crate::telemetry::metrics::{Metrics, gauge};

/// Everything that a node listens to, on one connection.
const CHANNELS: &[&str] = &["tidewire_feed", "tidewire_wake", LEADER_CHANNEL, KEYS_CHANNEL, SCHEMA_CHANNEL];
const KEYS_CHANNEL: &str = "tidewire_keys";
/// Events of one reading of the log.
const READ_EVENTS: usize = 2_000;
/// And of bytes: rows of a megabyte must not take the node's memory.
const READ_BYTES: usize = 16 << 20;
/// The log's end is read at least this often, whatever the feed says.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(5);
/// While delivery is held, or after a failure: this often at first, and at most the interval above.
const RETRY_BASE: Duration = Duration::from_millis(50);
const RETRY_CAP: Duration = Duration::from_secs(1);
/// A leader is heard every second; after this silence Postgres is asked whether it is there: with [`STATEMENT_TIMEOUT`], a
/// node that is cut off knows within 5 s.
const QUIET: Duration = Duration::from_secs(2);
/// After this silence the LISTEN connection is not believed any more.
const SILENCE: Duration = Duration::from_secs(3);
/// The loop turns at least this often.
const TURN: Duration = Duration::from_millis(500);
/// Longest wait for one statement: shorter than [`PAUSE`](belief::PAUSE), so that a dead connection is not taken for one.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(2);
/// Events that a starting node takes from the log into its ring.
const WARM_EVENTS: u64 = 10_000;
/// Keys of terms that are kept.
const MAX_KEYS: usize = 16;
/// An unknown term is asked for at most this often: forged chunks must not become queries.
const KEY_LOOKUP_INTERVAL: Duration = Duration::from_millis(100);
/// Key changes that wait for the key store.
const KEY_QUEUE: usize = 1_024;

/// What others know of the follower.
#[derive(Clone, Debug)]
pub struct FollowerHandle {
    reconcile: mpsc::Sender<()>,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    listening: AtomicBool,
    belief: parking_lot::Mutex<Belief>,
    last_contact: parking_lot::Mutex<Option<Instant>>,
}

impl State {
    fn turn(&self) -> bool {
        self.belief.lock().turn(Instant::now())
    }
}

impl FollowerHandle {
    /// Asks for the log's end to be read soon. Coalesced: a request that waits already is enough.
    pub fn reconcile(&self) {
        let _ = self.reconcile.try_send(());
    }

    /// Whether the LISTEN connection stands.
    #[must_use]
    pub fn listening(&self) -> bool {
        self.state.listening.load(Ordering::Acquire)
    }

    /// Whether the ring has met the log's end since the last doubt.
    #[must_use]
    pub fn current(&self) -> bool {
        self.state.belief.lock().is_current(Instant::now())
    }

    /// Since when Postgres has not answered the follower; zero while it does.
    #[must_use]
    pub fn silence(&self) -> Duration {
        if self.listening() && self.current() {
            return Duration::ZERO;
        }
        self.state.last_contact.lock().map_or(Duration::MAX, |at| at.elapsed())
    }
}

/// The task.
#[derive(Debug)]
pub struct Follower {
    database: Arc<Database>,
    hub: Arc<Hub>,
    registry: Arc<Registry>,
    // What the hub's plans were made with.
    registry_version: u64,
    wakeups: Arc<Wakeups>,
    metrics: Arc<Metrics>,
    keys: HashMap<u64, (TermKey, Option<Arc<FeedKey>>)>,
    key_asked: Option<Instant>,
    key_changes: mpsc::Sender<Option<String>>,
    interner: Interner,
    requests: mpsc::Receiver<()>,
    state: Arc<State>,
    incarnation: watch::Receiver<Option<Incarnation>>,
    started: bool,
    retry: Backoff,
    heard: Instant,
    // The last silence that Postgres was asked in.
    asked: Instant,
}

/// What the loop wakes up for.
enum Wake {
    Heard(Heard),
    Turn,
    Request,
    Incarnation,
    Tick,
}

impl Follower {
    /// The task, its handle, and the ids of API keys that change (None: any may have).
    #[must_use]
    pub fn new(
        database: Arc<Database>,
        hub: Arc<Hub>,
        registry: Arc<Registry>,
        wakeups: Arc<Wakeups>,
        metrics: Arc<Metrics>,
    ) -> (Self, FollowerHandle, mpsc::Receiver<Option<String>>) {
        let (reconcile, requests) = mpsc::channel(1);
        let (key_changes, changed_keys) = mpsc::channel(KEY_QUEUE);
        let state = Arc::new(State::default());
        let incarnation = database.incarnation();
        let handle = FollowerHandle { reconcile, state: Arc::clone(&state) };
        let follower = Self {
            database,
            hub,
            registry_version: registry.version(),
            registry,
            wakeups,
            metrics,
            keys: HashMap::new(),
            key_asked: None,
            key_changes,
            interner: Interner::default(),
            requests,
            state,
            incarnation,
            started: false,
            retry: Backoff::new(RETRY_BASE, RETRY_CAP),
            heard: Instant::now(),
            asked: Instant::now(),
        };
        (follower, handle, changed_keys)
    }

    /// Follows until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let suspect = Arc::new(tokio::sync::Notify::new());
        let (listening, mut heard) = listen(Arc::clone(&self.database), CHANNELS, Arc::clone(&suspect));
        let follow = async {
            self.follow(&mut heard, &suspect).await;
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = listening => {}
            () = follow => {}
        }
    }

    async fn follow(&mut self, notifications: &mut mpsc::Receiver<Heard>, suspect: &tokio::sync::Notify) {
        let mut next_reconcile = Instant::now();
        loop {
            if self.state.turn() {
                // Stopped, or starved: what we believe is of the past.
                tracing::warn!("this process stood still: reading the log before anything is answered");
                next_reconcile = Instant::now();
            }
            let wake = tokio::select! {
                Some(heard) = notifications.recv() => Wake::Heard(heard),
                () = tokio::time::sleep(TURN) => Wake::Turn,
                Some(()) = self.requests.recv() => Wake::Request,
                Ok(()) = self.incarnation.changed() => Wake::Incarnation,
                () = tokio::time::sleep_until(next_reconcile.into()) => Wake::Tick,
            };
            let cause = match wake {
                Wake::Turn => None,
                Wake::Heard(Heard::Lost) => {
                    self.set_listening(true);
                    Some("connect")
                }
                Wake::Heard(Heard::Down) => {
                    self.set_listening(false);
                    self.doubt();
                    None
                }
                Wake::Heard(Heard::Notification { channel, pid, payload }) => {
                    self.notification(&channel, pid, &payload).await
                }
                Wake::Request => Some("request"),
                Wake::Incarnation => Some("incarnation"),
                Wake::Tick => Some("tick"),
            };
            if matches!(cause, Some("connect")) {
                self.heard = Instant::now();
                let _ = self.key_changes.try_send(None);
                self.registry.forget_strangers();
            }
            let cause = cause.or_else(|| self.quiet());
            if self.heard.elapsed() > SILENCE && self.state.listening.load(Ordering::Acquire) {
                // No leader, or a connection that is dead without knowing it; a new one costs little.
                self.heard = Instant::now();
                suspect.notify_one();
            }
            if let Some(cause) = cause {
                next_reconcile = Instant::now() + self.reconcile(cause).await;
            }
        }
    }

    /// Some: nothing has been heard for a while, and Postgres was not asked since.
    fn quiet(&mut self) -> Option<&'static str> {
        let asks = self.asked <= self.heard && self.heard.elapsed() > QUIET;
        if asks {
            self.asked = Instant::now();
        }
        asks.then_some("quiet")
    }

    fn set_listening(&self, listening: bool) {
        let before = self.state.listening.swap(listening, Ordering::AcqRel);
        if before != listening {
            self.wakeups.set_listening(listening);
            self.metrics.postgres_up.set(i64::from(listening));
        }
    }

    fn doubt(&self) {
        self.state.belief.lock().doubt();
    }

    /// Some: the log is to be read.
    async fn notification(&mut self, channel: &str, pid: u32, payload: &str) -> Option<&'static str> {
        match channel {
            "tidewire_feed" if failpoint::hit("feed.heard").await.is_err() => {}
            "tidewire_feed" => return self.chunk(pid, payload).await,
            "tidewire_wake" => self.wakeups.outbox.notify_one(),
            LEADER_CHANNEL => self.wakeups.leadership.notify_one(),
            KEYS_CHANNEL => {
                // Full: everything is looked at anew, which covers what did not fit.
                let _ = self.key_changes.try_send(Some(payload.to_owned()));
            }
            SCHEMA_CHANNEL => {
                // At once, not with the refresh: the chunk that comes next may be of a table tracked just now.
                self.registry.forget_strangers();
                self.wakeups.schema_changed();
            }
            _ => {}
        }
        None
    }

    async fn chunk(&mut self, pid: u32, payload: &str) -> Option<&'static str> {
        let count = |outcome| self.metrics.feed_chunks_total.with_label_values(&[outcome]).inc();
        let Ok((header, text, sealed)) = Header::parse(payload) else {
            count("refused");
            return None;
        };
        let Some(key) = self.key(&header, pid).await else {
            self.metrics.feed_chunks_total.with_label_values(&["foreign"]).inc();
            return None;
        };
        let Ok(body) = opened(&key, &header, text, sealed) else {
            self.metrics.feed_chunks_total.with_label_values(&["refused"]).inc();
            return None;
        };
        self.heard = Instant::now();
        let newest = self.hub.high_water();
        let epoch = self.hub.epochs().newest();
        if says_more(&header, epoch, newest) {
            self.metrics.term.set(header.term.cast_signed());
            self.metrics.log_newest_seq.set(gauge(header.last));
        }
        if header.epoch != epoch || !self.state.belief.lock().met() || self.hub.edge().held {
            return Some("doubt");
        }
        let outcome = match header.kind {
            _ if header.last <= newest => "known",
            Kind::Events if header.first == newest + 1 => {
                match decode_events(&header, &body, |name| self.interner.share(name)) {
                    Ok(events) => match self.take(&events, "feed").await {
                        Ok(()) => "applied",
                        Err(error) => {
                            tracing::debug!(%error, "tables of the feed could not be looked up");
                            "gap"
                        }
                    },
                    Err(_) => "refused",
                }
            }
            _ => "gap",
        };
        self.metrics.feed_chunks_total.with_label_values(&[outcome]).inc();
        if outcome == "gap" {
            self.metrics.feed_gaps_total.inc();
        }
        matches!(outcome, "gap" | "refused").then_some("gap")
    }

    /// The key of a chunk's term, if the chunk comes from the backend that announces for it.
    async fn key(&mut self, header: &Header, pid: u32) -> Option<Arc<FeedKey>> {
        if !self.keys.contains_key(&header.term) {
            if self.key_asked.is_some_and(|at| at.elapsed() < KEY_LOOKUP_INTERVAL) {
                return None;
            }
            self.key_asked = Some(Instant::now());
            let found = self.asked(term_key(&self.database.pool(), header.term)).await.ok()??;
            let key = found.key.as_deref().and_then(FeedKey::new).map(Arc::new);
            if self.keys.len() >= MAX_KEYS
                && let Some(oldest) = self.keys.keys().min().copied()
            {
                self.keys.remove(&oldest);
            }
            self.keys.insert(header.term, (found, key));
        }
        let (term, key) = self.keys.get(&header.term)?;
        // A term's number may come twice after a lost tail: the key is that of one epoch only.
        let sender = term.feed_pid == pid || mutant::is(Mutant::FeedTrusted);
        (sender && term.epoch == header.epoch).then(|| key.clone()).flatten()
    }

    /// Hands events to the hub, once it is known what their tables are.
    async fn take(&mut self, events: &[Event], source: &str) -> Result<(), sqlx::Error> {
        for event in events.iter().filter(|event| event.operation == Operation::Schema) {
            self.registry.forget(&event.table);
        }
        self.asked(self.registry.acquaint(events.iter().map(|event| &event.table))).await?;
        let version = self.registry.version();
        if std::mem::replace(&mut self.registry_version, version) != version {
            self.hub.forget_plans();
        }
        self.metrics.events_received_total.with_label_values(&[source]).inc_by(events.len() as u64);
        if let Err(error) = self.hub.append(events, Instant::now()) {
            // Checked before; if it happens all the same, the next reading of the log mends it.
            tracing::error!(%error, "what was read is not contiguous");
            self.doubt();
        }
        Ok(())
    }

    /// Reads the log up to its end; gives the wait until the next time.
    async fn reconcile(&mut self, cause: &'static str) -> Duration {
        self.metrics.reconciles_total.with_label_values(&[cause]).inc();
        let doubts = self.state.belief.lock().doubts();
        match self.catch_up().await {
            Ok(true) => {
                self.retry.reset();
                *self.state.last_contact.lock() = Some(Instant::now());
                self.hub.tick(Instant::now());
                // The process may have stood still while it read: then the end that it met is of the past.
                if self.state.belief.lock().met_the_end(doubts) { RECONCILE_INTERVAL } else { Duration::ZERO }
            }
            Ok(false) => {
                *self.state.last_contact.lock() = Some(Instant::now());
                self.retry.next_wait(1.0)
            }
            Err(error) => {
                tracing::debug!(%error, cause, "the log could not be read");
                self.doubt();
                // Connections that were cut off silently keep their places in the pool: begin another.
                let _ = tokio::time::timeout(STATEMENT_TIMEOUT, self.database.renew()).await;
                self.state.turn();
                self.retry.next_wait(1.0)
            }
        }
    }

    /// True: the ring has met the log's end. False: delivery is held, the database's incarnation is not vouched for yet.
    async fn catch_up(&mut self) -> Result<bool, sqlx::Error> {
        failpoint::hit("feed.reconcile").await?;
        let mut pool = &self.database.pool();
        let (mut known, mut newest_epoch) = self.asked(epochs(pool)).await?;
        let fresh;
        if self.started && known != self.hub.epochs() {
            // Connections that were made before may still end at a primary that was left: new ones are refused there.
            let renewed =
                async { self.database.renew().await.map_err(|error| sqlx::Error::Configuration(error.into())) };
            self.asked(renewed).await?;
            fresh = self.database.pool();
            pool = &fresh;
            (known, newest_epoch) = self.asked(epochs(pool)).await?;
        }
        let seen = self.incarnation.borrow().clone();
        let vouched = match (&newest_epoch, &seen) {
            (Some(row), Some(seen)) => row.incarnation == *seen && self.asked(epoch_has_term(pool, row.epoch)).await?,
            _ => false,
        };
        if !vouched {
            if !self.hub.edge().held {
                tracing::warn!(
                    "the database is not the one it was: delivery is held until a leader vouches for the log"
                );
                self.hub.hold(true);
                let _ = self.database.renew().await;
            }
            self.doubt();
            return Ok(false);
        }
        self.metrics.epoch.set(i64::from(known.newest()));
        if known != self.hub.epochs() && self.started {
            failpoint::hit("feed.epoch").await?;
            let start = known.cut_since(&self.hub.epochs());
            let start_id = self.asked(read::event_id(pool, start)).await?;
            let whole = self.asked(read::whole_before(pool, start)).await?;
            self.keys.clear();
            self.hub.set_epochs(known.clone(), start_id, whole);
        }
        let bounds = self.asked(read::bounds(pool)).await?;
        self.metrics.log_newest_seq.set(gauge(bounds.newest));
        self.hub.set_log_oldest(bounds.oldest);
        if !self.started || !self.continues(bounds).await? {
            self.begin(bounds, known).await?;
        }
        self.read_through(bounds.newest).await?;
        self.hub.hold(false);
        Ok(true)
    }

    /// One statement, bounded; the loop turns with it.
    async fn asked<T>(&self, statement: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
        let answer = within(STATEMENT_TIMEOUT, statement).await;
        self.state.turn();
        answer
    }

    /// Whether the log still holds what the ring ends with.
    async fn continues(&self, bounds: read::Bounds) -> Result<bool, sqlx::Error> {
        let newest = self.hub.high_water();
        if newest > bounds.newest {
            // Shorter than what we have seen, without a new epoch: a leader will write one when it hears of us. Until
            // then nothing may be numbered on top.
            tracing::error!(seen = newest, log = bounds.newest, "the log is shorter than what this node has seen");
            return Err(sqlx::Error::Protocol("the log went back without a new epoch".into()));
        }
        if newest + 1 < bounds.oldest {
            return Ok(false);
        }
        let Some(ours) = self.hub.id_at(newest) else { return Ok(true) };
        match self.asked(read::event_id(&self.database.pool(), newest)).await? {
            Some(theirs) if theirs != ours => {
                tracing::error!(seq = newest, "the log differs from what this node has seen");
                Err(sqlx::Error::Protocol("the log diverged without a new epoch".into()))
            }
            _ => Ok(true),
        }
    }

    /// Begins the ring with the newest events of the log.
    async fn begin(&mut self, bounds: read::Bounds, known: crate::cursor::Epochs) -> Result<(), sqlx::Error> {
        let oldest = bounds.oldest.saturating_sub(1);
        let base = bounds.newest.saturating_sub(WARM_EVENTS).max(oldest);
        let pool = &self.database.pool();
        let next = match base {
            // Nothing is cut off there.
            0 => None,
            _ => self.asked(read::whole_after(pool, base.max(bounds.oldest))).await?,
        };
        if let Some((end, id)) = next {
            self.hub.restart(end, Some(id), None, known);
        } else {
            // The log ends with a transaction that is longer than what the ring begins with, and open.
            let base_id = self.asked(read::event_id(pool, base)).await?;
            let whole = self.asked(read::whole_before(pool, base)).await?;
            self.hub.restart(base, base_id, whole, known);
        }
        self.started = true;
        Ok(())
    }

    async fn read_through(&mut self, through: Seq) -> Result<(), sqlx::Error> {
        while self.hub.high_water() < through {
            let after = self.hub.high_water();
            self.metrics.log_queries_total.with_label_values(&["follow"]).inc();
            failpoint::hit("feed.read").await?;
            let pool = self.database.pool();
            let events = self.asked(read::events_within(&pool, after, through, READ_EVENTS, READ_BYTES)).await?;
            if events.first().is_none_or(|event| event.seq != after + 1) {
                // Retention overtook us while we read: begin anew with the next turn.
                self.started = false;
                return Err(sqlx::Error::Protocol("the log was trimmed while it was read".into()));
            }
            self.take(&events, "log").await?;
        }
        Ok(())
    }
}

/// Whether a chunk knows more of the log's end than a node that has it up to `newest`. One that waited while the node was
/// paused comes when the log has been read: it must not put the node back in anybody's eyes.
const fn says_more(header: &Header, epoch: Epoch, newest: Seq) -> bool {
    header.epoch == epoch && header.last >= newest
}

/// What the chunk says, if the term's leader sealed it.
fn opened(key: &FeedKey, header: &Header, text: &str, sealed: &str) -> Result<Bytes, ChunkError> {
    match key.open(header, text, sealed) {
        Err(_) if mutant::is(Mutant::FeedTrusted) => {
            STANDARD_NO_PAD.decode(sealed).map(Bytes::from).map_err(|_| ChunkError::Body)
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found by the chaos campaign: a woken node read the log, said ready, and then showed the numbers of what it had
    /// slept through, one old chunk after the other.
    #[test]
    fn a_chunk_that_waited_does_not_put_the_logs_end_back() {
        let chunk = |epoch, last| Header { epoch, term: 1, first: last, last, kind: Kind::Heartbeat, nonce: 0 };
        assert!(says_more(&chunk(1, 20), 1, 19));
        assert!(says_more(&chunk(1, 20), 1, 20));
        assert!(!says_more(&chunk(1, 20), 1, 28));
        assert!(!says_more(&chunk(1, 20), 2, 10), "of a tail that is lost");
    }
}
