//! Keeps an eye on the relay's locks: any role can take them, and what then stands still must have a name.
//!
//! One task on every node, whether it may lead or not: a look each [`LOOK_INTERVAL`] through the pool. A holder counts once it
//! is seen twice in a row, since a new leader has the lock for a moment before its term has begun. It is logged once, again
//! each [`REPEAT_INTERVAL`] while it stays, and once when it is gone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{LEADER_LOCK, PARK_LOCK};
use crate::postgres::locks::{ForeignLock, foreign_locks};
use crate::postgres::{Database, within};
use crate::telemetry::metrics::{Metrics, gauge};

/// Between two looks; the query costs about 0.2 ms.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Between two log lines about the same holders.
const REPEAT_INTERVAL: Duration = Duration::from_secs(60);
/// Longest wait for an answer.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Foreign holders of the relay's locks as this node last saw them.
#[derive(Debug, Default)]
pub struct Intruders(parking_lot::Mutex<Vec<ForeignLock>>);

impl Intruders {
    /// Those that were there at both of the last two looks.
    #[must_use]
    pub fn seen(&self) -> Vec<ForeignLock> {
        self.0.lock().clone()
    }

    /// Looks until `stop`.
    pub async fn watch(self: Arc<Self>, database: Arc<Database>, metrics: Arc<Metrics>, stop: CancellationToken) {
        let (mut before, mut logged): (Vec<ForeignLock>, Option<Instant>) = (Vec::new(), None);
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = stop.cancelled() => return,
            }
            let pool = database.pool();
            let look = foreign_locks(&pool, LEADER_LOCK, PARK_LOCK);
            // No answer says nothing about the locks.
            let Ok(now) = within(LOOK_TIMEOUT, look).await else { continue };
            let same = |one: &ForeignLock| before.iter().any(|other| other.lock == one.lock && other.end == one.end);
            let lasting: Vec<ForeignLock> = now.iter().filter(|one| same(one)).cloned().collect();
            before = now;
            metrics.foreign_locks.set(gauge(lasting.len()));
            if lasting.is_empty() {
                if logged.take().is_some() {
                    tracing::info!("the relay's locks are in nobody else's hands any more");
                }
            } else if logged.is_none_or(|at| at.elapsed() > REPEAT_INTERVAL) {
                logged = Some(Instant::now());
                for one in &lasting {
                    tracing::warn!(holder = one.holder, end = one.end, "somebody else {}", one.effect());
                }
            }
            *self.0.lock() = lasting;
        }
    }
}
