//! The follower: from the feed and the log into the hub, contiguous or not at all.
//!
//! One task owns the LISTEN connection of the node. A chunk that continues the ring exactly, opens with its term's key
//! and comes from that term's announcing backend is used; everything else (gap, reconnect, silence, a chunk of another
//! epoch, doubt) is answered by reading the log. Other hints that arrive on the same connection are passed on.
//!
//! When a connection finds another incarnation of the database, delivery is *held* until the newest epoch names that
//! incarnation and a term of that epoch has begun (its commit vouches for what stands before it).

mod belief;
mod chunk;
mod lookup;
mod reading;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::belief::Belief;
use self::lookup::Lookups;
use crate::backoff::Backoff;
use crate::event::{Event, Operation};
use crate::failpoint;
use crate::feed::seal::FeedKey;
use crate::hub::Hub;
use crate::log::append::Interner;
use crate::log::incarnation::TermKey;
use crate::postgres::listen::{Heard, SCHEMA_CHANNEL, Wakeups, listen};
use crate::postgres::{Database, Incarnation};
use crate::relay::LEADER_CHANNEL;
use crate::schema::Registry;
use crate::telemetry::metrics::Metrics;

/// Everything that a node listens to, on one connection.
const CHANNELS: &[&str] = &["tidewire_feed", "tidewire_wake", LEADER_CHANNEL, KEYS_CHANNEL, SCHEMA_CHANNEL];
const KEYS_CHANNEL: &str = "tidewire_keys";
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
/// Key changes that wait for the key store.
const KEY_QUEUE: usize = 1_024;

/// What others know of the follower.
#[derive(Clone, Debug)]
pub struct FollowerHandle {
    reconcile: mpsc::Sender<()>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    listening: AtomicBool,
    belief: parking_lot::Mutex<Belief>,
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

    /// How long Postgres has not answered the follower while it asked; zero while it answers. Before it is reached for the
    /// first time it counts from the start of this node.
    #[must_use]
    pub fn silence(&self) -> Duration {
        if self.listening() && self.current() {
            return Duration::ZERO;
        }
        self.state.belief.lock().silence(Instant::now())
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
    lookups: Lookups,
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
    /// Since when LISTEN is not in force, after it was.
    lost_at: Option<Instant>,
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
        let belief = parking_lot::Mutex::new(Belief::new(Instant::now()));
        let state = Arc::new(State { listening: AtomicBool::new(false), belief });
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
            lookups: Lookups::default(),
            key_changes,
            interner: Interner::default(),
            requests,
            state,
            incarnation,
            started: false,
            retry: Backoff::new(RETRY_BASE, RETRY_CAP),
            heard: Instant::now(),
            asked: Instant::now(),
            lost_at: None,
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

    fn set_listening(&mut self, listening: bool) {
        let before = self.state.listening.swap(listening, Ordering::AcqRel);
        if before != listening {
            match (listening, self.lost_at) {
                (false, _) => {
                    self.lost_at = Some(Instant::now());
                    tracing::warn!("Postgres is lost: changes wait in it until it is reached again");
                }
                (true, Some(lost_at)) => {
                    tracing::info!(away_ms = lost_at.elapsed().as_millis(), "Postgres is back");
                }
                (true, None) => {}
            }
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
}
