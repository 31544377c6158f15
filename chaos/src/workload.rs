//! Writers and clients of a run, and the truth that is read from Postgres when they have ended.
//!
//! Writers go straight to the primary; clients use the public client through the balancer. Both record what they do
//! and see, and judge nothing.

mod client;
mod schema;
pub mod truth;
mod want;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tidewire::client::Cursor;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

pub use self::schema::{connect, prepare};
use crate::history::{Recorder, Want};

/// From the end of the writers' plan to the last answer to a COMMIT.
const SETTLE: Duration = Duration::from_secs(20);
/// For clients to say goodbye.
const GOODBYE: Duration = Duration::from_secs(10);
/// One question to the primary.
const QUESTION: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);

/// How much is written and listened to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadPlan {
    /// Of everything drawn.
    pub seed: u64,
    /// Connections that write.
    pub writers: u32,
    /// Of all writers together.
    pub transactions_per_second: u32,
    /// Rows that are written to, over all tables.
    pub keys: u32,
    /// Client processes.
    pub clients: u32,
}

/// Where a subscription of a client stands.
#[derive(Clone, Debug)]
pub struct Position {
    /// The subscription, in the history's numbers.
    pub s: u32,
    /// The client.
    pub client: u32,
    /// After the last handled event; nothing before the first answer.
    pub cursor: Option<Cursor>,
    /// It has a connection, as far as it knows.
    pub connected: bool,
    /// It was refused for good.
    pub ended: bool,
    /// What it listens to.
    pub want: Want,
}

/// What a drain found.
#[derive(Clone, Debug, Default)]
pub struct Drained {
    /// Subscriptions that did not reach the log's head in time.
    pub behind: Vec<u32>,
    /// Rows that the relay did not take from the outbox in time.
    pub outbox: i64,
}

/// What all tasks of a workload share.
#[derive(Debug)]
struct Shared {
    recorder: Recorder,
    primary: watch::Receiver<String>,
    positions: Mutex<BTreeMap<(u32, u32), Position>>,
    wants: BTreeSet<Want>,
    next_subscription: AtomicU32,
    next_big: AtomicU64,
    delivered: AtomicU64,
    committed: AtomicU64,
    paused: watch::Sender<bool>,
    writers_end: CancellationToken,
    clients_end: CancellationToken,
}

/// Writers and clients at work.
#[derive(Debug)]
pub struct Workload {
    shared: Arc<Shared>,
    writers: tokio::sync::Mutex<JoinSet<()>>,
    clients: tokio::sync::Mutex<JoinSet<()>>,
}

impl Workload {
    /// Starts writers and clients. `url` is the balancer's, `primary` the way past everything to the primary.
    ///
    /// # Errors
    /// None yet: connections that fail are tried again.
    pub async fn start(
        plan: &WorkloadPlan,
        recorder: Recorder,
        url: String,
        api_key: String,
        primary: watch::Receiver<String>,
    ) -> anyhow::Result<Arc<Self>> {
        let clients = want::clients(plan);
        let shared = Arc::new(Shared {
            recorder,
            primary,
            positions: Mutex::default(),
            wants: clients.iter().flat_map(|client| client.wants.iter().cloned()).collect(),
            next_subscription: AtomicU32::new(0),
            next_big: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            committed: AtomicU64::new(0),
            paused: watch::Sender::new(false),
            writers_end: CancellationToken::new(),
            clients_end: CancellationToken::new(),
        });
        let mut tasks = JoinSet::new();
        for client in clients {
            let way = client::Way { url: url.clone(), api_key: api_key.clone() };
            tasks.spawn(client::live(client, way, Arc::clone(&shared)));
        }
        let mut writing = JoinSet::new();
        for w in 0..plan.writers {
            writing.spawn(writer::write(w, plan.clone(), Arc::clone(&shared)));
        }
        Ok(Arc::new(Self {
            shared,
            writers: tokio::sync::Mutex::new(writing),
            clients: tokio::sync::Mutex::new(tasks),
        }))
    }

    /// Where every subscription stands.
    #[must_use]
    pub fn positions(&self) -> Vec<Position> {
        self.shared.positions.lock().values().cloned().collect()
    }

    /// Everything that some client of this workload listens to.
    #[must_use]
    pub fn wants(&self) -> &BTreeSet<Want> {
        &self.shared.wants
    }

    /// Events in handlers, so far.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.shared.delivered.load(Ordering::Relaxed)
    }

    /// Acknowledged transactions, so far.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.shared.committed.load(Ordering::Relaxed)
    }

    /// No transaction begins until [`resume_writers`](Self::resume_writers).
    pub fn pause_writers(&self) {
        self.shared.paused.send_replace(true);
    }

    /// See [`pause_writers`](Self::pause_writers).
    pub fn resume_writers(&self) {
        self.shared.paused.send_replace(false);
    }

    /// One transaction of so many rows, recorded like any other; returns its xid.
    ///
    /// # Errors
    /// It certainly did not commit, or nobody knows; the history says which.
    pub async fn big_transaction(&self, rows: u32) -> anyhow::Result<u64> {
        writer::big(&self.shared, rows).await
    }

    /// Ends the writers, then waits until the relay has taken everything and every subscription has passed the log's
    /// head.
    pub async fn drain(&self, within: Duration) -> Drained {
        let until = Instant::now() + within;
        self.resume_writers();
        self.shared.writers_end.cancel();
        let mut writers = self.writers.lock().await;
        let settled = timeout(SETTLE, async { while writers.join_next().await.is_some() {} }).await;
        if settled.is_err() {
            writers.shutdown().await;
        }
        let mut drained = Drained::default();
        loop {
            let url = self.shared.primary.borrow().clone();
            if let Ok(Ok((outbox, head))) = timeout(QUESTION, truth::head(&url)).await {
                drained.outbox = outbox;
                drained.behind = self.behind(head);
                if outbox == 0 && drained.behind.is_empty() {
                    break;
                }
            }
            if Instant::now() >= until {
                break;
            }
            sleep(LOOK).await;
        }
        drained
    }

    /// Subscriptions that have not passed `seq`.
    #[must_use]
    pub fn behind(&self, seq: u64) -> Vec<u32> {
        let positions = self.shared.positions.lock();
        let behind = |position: &&Position| !position.ended && position.cursor.is_none_or(|cursor| cursor.seq < seq);
        positions.values().filter(behind).map(|position| position.s).collect()
    }

    /// Ends the clients.
    pub async fn stop(&self) {
        self.shared.writers_end.cancel();
        self.shared.clients_end.cancel();
        let mut clients = self.clients.lock().await;
        if timeout(GOODBYE, async { while clients.join_next().await.is_some() {} }).await.is_err() {
            clients.shutdown().await;
        }
    }
}
