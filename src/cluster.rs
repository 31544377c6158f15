//! This node among the others: its heartbeat, and the limit of connections for each key over the whole cluster.
//!
//! [`ConnectionLimiter`] knows this node's connections exactly and the others' as the last heartbeat read them. It
//! answers from memory and never waits for Postgres.
//!
//! **Connections that are gone and still count.** Those of a node that died count until it is no longer fresh, those of
//! one that drains until its next heartbeat; their clients come to the other nodes at once. Over HTTP they are answered
//! 429 and come back. A client that authenticates by message would be closed with 4429 and lose its connection: so it
//! waits ([`ConnectionLimiter::acquire`]) until the counts are true.
//!
//! **How far a limit can be exceeded.** Another node sees a connection after its node's next heartbeat and its own one
//! after that: within two [`HEARTBEAT_INTERVAL`]s and the time of two statements. So a key is over its limit by at most
//! the connections that the *other* nodes let in during those two seconds, and never by more than (nodes − 1) × limit.
//! What came in is not sent away; nothing more comes in until the sum is below the limit. While a node cannot reach
//! Postgres it goes on with the last counts it read, and after [`registry::FRESH`] the others no longer count its own.
//! A node that has not yet had a heartbeat counts only its own: be ready for clients after [`Cluster::status`] says
//! `heard`.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::auth::key::KeyId;
use crate::postgres::Database;
use crate::postgres::registry::{self, Elsewhere, Heard, NodeIdentity, NodeReport};

/// Between two heartbeats.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for a heartbeat's answer: the others believe this node dead after [`registry::FRESH`].
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);
/// Heartbeats between two sweeps of what dead nodes left behind.
const SWEEP_EVERY: u64 = 60;

/// So long after a key was found at its limit a node that had died by then may not be known as silent: it becomes so, and
/// the heartbeat after that reads it.
const DOUBT: Duration = Duration::from_secs(3);
/// The same for one that is known to leave: until it is no longer fresh, and the heartbeat after that.
const LEAVE: Duration = Duration::from_secs(7);

/// Connections by key, here and elsewhere. One for each node, shared in an `Arc`.
#[derive(Debug, Default)]
pub struct ConnectionLimiter {
    counts: Mutex<HashMap<KeyId, Count>>,
    // Told with each heartbeat that was heard.
    heard: watch::Sender<()>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    own: u32,
    others: Elsewhere,
}

/// One connection of a key; it counts until this is dropped.
#[derive(Debug)]
pub struct ConnectionGuard {
    limiter: Arc<ConnectionLimiter>,
    key_id: KeyId,
}

/// The key has as many connections as it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this key has {} connections on this node and {} on others, and may have {}: close some, or use another key",
    own,
    others.connections,
    limit
)]
pub struct OverLimit {
    /// Connections on this node.
    pub own: u32,
    /// On the others, as last read.
    pub others: Elsewhere,
    /// The key's limit.
    pub limit: u32,
}

impl OverLimit {
    /// How long what is over the limit may be connections that are gone.
    fn doubt(&self) -> Duration {
        let Self { own, others: Elsewhere { connections, leaving }, limit } = *self;
        match () {
            () if own >= limit => Duration::ZERO,
            () if own.saturating_add(connections.saturating_sub(leaving)) < limit => LEAVE,
            () => DOUBT,
        }
    }
}

impl ConnectionLimiter {
    /// No connections.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Counts one more connection of the key, unless it has `limit` over the whole cluster.
    ///
    /// # Errors
    /// [`OverLimit`].
    pub fn try_acquire(self: &Arc<Self>, key_id: &KeyId, limit: u32) -> Result<ConnectionGuard, OverLimit> {
        let mut counts = self.counts.lock();
        let Count { own, others } = counts.get(key_id).copied().unwrap_or_default();
        if own.saturating_add(others.connections) >= limit {
            return Err(OverLimit { own, others, limit });
        }
        counts.insert(key_id.clone(), Count { own: own + 1, others });
        drop(counts);
        Ok(ConnectionGuard { limiter: Arc::clone(self), key_id: key_id.clone() })
    }

    /// As [`ConnectionLimiter::try_acquire`], but waits while connections on other nodes that keep this one out may be
    /// gone: at most [`DOUBT`], or [`LEAVE`] where they are on nodes that drain or are silent.
    ///
    /// # Errors
    /// [`OverLimit`].
    pub async fn acquire(self: &Arc<Self>, key_id: &KeyId, limit: u32) -> Result<ConnectionGuard, OverLimit> {
        let mut heard = self.heard.subscribe();
        let began = Instant::now();
        loop {
            let over = match self.try_acquire(key_id, limit) {
                Ok(guard) => return Ok(guard),
                Err(over) => over,
            };
            // The sender is ours: it cannot be gone.
            if timeout_at(began + over.doubt(), heard.changed()).await.is_err() {
                return Err(over);
            }
        }
    }

    /// Connections of a key: on this node, and on the others as last read.
    #[must_use]
    pub fn connections(&self, key_id: &KeyId) -> (u32, u32) {
        let Count { own, others } = self.counts.lock().get(key_id).copied().unwrap_or_default();
        (own, others.connections)
    }

    /// This node's connections by key, without zeros.
    fn own(&self) -> Vec<(KeyId, u32)> {
        let counts = self.counts.lock();
        counts.iter().filter(|(_, count)| count.own > 0).map(|(key_id, count)| (key_id.clone(), count.own)).collect()
    }

    /// Takes over what the others have; a key that is not named has none there.
    fn set_others(&self, mut others: HashMap<KeyId, Elsewhere>) {
        let mut counts = self.counts.lock();
        counts.retain(|key_id, count| {
            count.others = others.remove(key_id).unwrap_or_default();
            count.own > 0 || count.others.connections > 0
        });
        counts.extend(others.into_iter().map(|(key_id, others)| (key_id, Count { own: 0, others })));
        drop(counts);
        self.heard.send_replace(());
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let mut counts = self.limiter.counts.lock();
        if let Some(count) = counts.get_mut(&self.key_id) {
            count.own = count.own.saturating_sub(1);
            if count.own == 0 && count.others.connections == 0 {
                counts.remove(&self.key_id);
            }
        }
    }
}

/// What the heartbeat has to tell, for metrics and readiness.
#[derive(Debug, Default)]
pub struct ClusterStatus {
    heard: AtomicBool,
    other_nodes: AtomicU32,
    heartbeats: AtomicU64,
    failures: AtomicU64,
    failing: AtomicBool,
    rival: AtomicBool,
}

impl ClusterStatus {
    /// Whether a heartbeat has succeeded since the start, so that the others' connections are known.
    #[must_use]
    pub fn heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }

    /// Other nodes that were alive at the last heartbeat.
    #[must_use]
    pub fn other_nodes(&self) -> u32 {
        self.other_nodes.load(Ordering::Relaxed)
    }

    /// Heartbeats that succeeded.
    #[must_use]
    pub fn heartbeats(&self) -> u64 {
        self.heartbeats.load(Ordering::Relaxed)
    }

    /// Heartbeats that failed.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Whether another live process uses this node's name: an error of configuration, both count wrongly.
    #[must_use]
    pub fn has_rival(&self) -> bool {
        self.rival.load(Ordering::Relaxed)
    }
}

/// The owner of this node's heartbeat.
pub struct Cluster {
    database: Arc<Database>,
    identity: NodeIdentity,
    limiter: Arc<ConnectionLimiter>,
    report: Box<dyn Fn() -> NodeReport + Send + Sync>,
    status: Arc<ClusterStatus>,
}

impl Cluster {
    /// `report` is asked before each heartbeat; it must not wait.
    #[must_use]
    pub fn new(
        database: Arc<Database>,
        identity: NodeIdentity,
        limiter: Arc<ConnectionLimiter>,
        report: impl Fn() -> NodeReport + Send + Sync + 'static,
    ) -> Self {
        Self { database, identity, limiter, report: Box::new(report), status: Arc::default() }
    }

    /// What the heartbeat learns.
    #[must_use]
    pub fn status(&self) -> Arc<ClusterStatus> {
        Arc::clone(&self.status)
    }

    /// Beats until `shutdown`, then says goodbye. Let it run until the last connection is closed: a draining node's
    /// connections still count.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(HEARTBEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut beats: u64 = 0;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = ticks.tick() => {}
            }
            self.beat().await;
            beats += 1;
            if beats.is_multiple_of(SWEEP_EVERY) {
                let swept = timeout(HEARTBEAT_TIMEOUT, registry::sweep(&self.database.pool())).await;
                if let Ok(Err(error)) = swept {
                    tracing::debug!(%error, "what dead nodes left behind stays for now");
                }
            }
        }
        let _ = timeout(HEARTBEAT_TIMEOUT, registry::leave(&self.database.pool(), &self.identity)).await;
    }

    async fn beat(&self) {
        let (report, own) = ((self.report)(), self.limiter.own());
        let pool = self.database.pool();
        let heard = timeout(HEARTBEAT_TIMEOUT, registry::heartbeat(&pool, &self.identity, &report, &own)).await;
        match heard {
            Ok(Ok(heard)) => self.hear(heard),
            Ok(Err(error)) => self.fail(&error),
            Err(_) => self.fail(&"no answer in time"),
        }
    }

    fn hear(&self, heard: Heard) {
        self.limiter.set_others(heard.others);
        self.status.other_nodes.store(heard.other_nodes, Ordering::Relaxed);
        self.status.heartbeats.fetch_add(1, Ordering::Relaxed);
        self.status.failing.store(false, Ordering::Relaxed);
        // A quick restart finds the heartbeat of its own predecessor once; only a living rival writes again.
        let first = !self.status.heard.swap(true, Ordering::Relaxed);
        let rival = heard.rival && !first;
        if !self.status.rival.swap(rival, Ordering::Relaxed) && rival {
            tracing::error!(node = %self.identity.node, "another process uses this node's name: give each its own");
        }
    }

    fn fail(&self, error: &dyn fmt::Display) {
        self.status.failures.fetch_add(1, Ordering::Relaxed);
        // One line for each outage.
        if !self.status.failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "no heartbeat: connections of keys on other nodes are as last read");
        }
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("identity", &self.identity)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> KeyId {
        KeyId::from_stored(text)
    }

    fn elsewhere(connections: u32, leaving: u32) -> Elsewhere {
        Elsewhere { connections, leaving }
    }

    fn heard(limiter: &ConnectionLimiter, key_id: &str, others: Elsewhere) {
        limiter.set_others(HashMap::from([(key(key_id), others)]));
    }

    #[test]
    fn a_limit_counts_here_and_elsewhere_and_a_dropped_connection_no_more() {
        let limiter = ConnectionLimiter::new();
        limiter.set_others(HashMap::from([(key("a"), elsewhere(2, 0)), (key("b"), elsewhere(5, 0))]));
        let first = limiter.try_acquire(&key("a"), 4).unwrap();
        let _second = limiter.try_acquire(&key("a"), 4).unwrap();
        assert_eq!(
            limiter.try_acquire(&key("a"), 4).unwrap_err(),
            OverLimit { own: 2, others: elsewhere(2, 0), limit: 4 }
        );
        assert_eq!(
            limiter.try_acquire(&key("b"), 5).unwrap_err(),
            OverLimit { own: 0, others: elsewhere(5, 0), limit: 5 }
        );
        drop(first);
        let third = limiter.try_acquire(&key("a"), 4).unwrap();
        assert_eq!(limiter.connections(&key("a")), (2, 2));
        assert_eq!(limiter.own(), vec![(key("a"), 2)]);
        drop(third);
    }

    #[test]
    fn a_lowered_limit_lets_nobody_in_and_sends_nobody_away() {
        let limiter = ConnectionLimiter::new();
        let guards: Vec<_> = (0..3).map(|_| limiter.try_acquire(&key("a"), 10).unwrap()).collect();
        assert!(limiter.try_acquire(&key("a"), 2).is_err());
        assert_eq!(limiter.connections(&key("a")), (3, 0));
        drop(guards);
    }

    #[test]
    fn keys_without_connections_are_not_remembered() {
        let limiter = ConnectionLimiter::new();
        drop(limiter.try_acquire(&key("a"), 1).unwrap());
        heard(&limiter, "b", elsewhere(1, 0));
        let kept = limiter.try_acquire(&key("c"), 1).unwrap();
        limiter.set_others(HashMap::new());
        assert_eq!(limiter.counts.lock().len(), 1);
        drop(kept);
        assert!(limiter.counts.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_of_a_node_that_died_waits_until_its_connections_count_for_nothing() {
        let limiter = ConnectionLimiter::new();
        heard(&limiter, "a", elsewhere(4, 0));
        // Not silent yet, then silent, then no longer fresh. The clock is paused: nobody waits.
        let told = [elsewhere(4, 0), elsewhere(4, 3), elsewhere(4, 3), elsewhere(4, 3), elsewhere(1, 0)];
        let heartbeats = async {
            for others in told {
                tokio::time::sleep(HEARTBEAT_INTERVAL).await;
                heard(&limiter, "a", others);
            }
        };
        let began = Instant::now();
        let admitted = async {
            let guard = limiter.acquire(&key("a"), 4).await;
            (guard.is_ok(), began.elapsed().as_secs())
        };
        assert_eq!(tokio::join!(admitted, heartbeats).0, (true, 5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_is_at_its_limit_in_truth_lets_nobody_wait_for_long() {
        let limiter = ConnectionLimiter::new();
        let refused_after = async |key_id: &str| {
            let began = Instant::now();
            limiter.acquire(&key(key_id), 4).await.unwrap_err();
            began.elapsed().as_secs()
        };
        heard(&limiter, "a", elsewhere(5, 1));
        assert_eq!(refused_after("a").await, DOUBT.as_secs(), "whoever leaves makes too little room");
        heard(&limiter, "a", elsewhere(5, 2));
        assert_eq!(refused_after("a").await, LEAVE.as_secs());
        let _guards: Vec<_> = (0..4).map(|_| limiter.try_acquire(&key("b"), 4).unwrap()).collect();
        assert_eq!(refused_after("b").await, 0, "all of them are here");
    }

    #[test]
    fn a_refused_connection_leaves_no_trace() {
        let limiter = ConnectionLimiter::new();
        assert!(limiter.try_acquire(&key("a"), 0).is_err());
        assert!(limiter.counts.lock().is_empty());
    }
}
