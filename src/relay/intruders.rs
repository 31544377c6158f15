//! Keeps an eye on the relay's locks: any role can take them, and what then stands still must have a name.
//!
//! One task on every node, whether it may lead or not: a look each [`LOOK_INTERVAL`] through the pool. A holder counts once it
//! is seen twice in a row, since a new leader has the lock for a moment before its term has begun. It is logged once, again
//! now and then while it stays ([`Repeats`]), and once when all are gone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{LEADER_LOCK, PARK_LOCK};
use crate::postgres::locks::{ForeignLock, foreign_locks};
use crate::postgres::{Database, within};
use crate::telemetry::metrics::{Metrics, gauge};
use crate::telemetry::repeats::Repeats;

/// Between two looks; the query costs about 0.2 ms.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
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
        let (mut before, told) = (Vec::new(), Repeats::default());
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = stop.cancelled() => return,
            }
            let pool = database.pool();
            let look = foreign_locks(&pool, LEADER_LOCK, PARK_LOCK);
            // No answer says nothing about the locks.
            let Ok(now) = within(LOOK_TIMEOUT, look).await else { continue };
            let lasting = lasting(&before, &now);
            before = now;
            metrics.foreign_locks.set(gauge(lasting.len()));
            if lasting.is_empty() && told.over() {
                tracing::info!("the relay's locks are in nobody else's hands any more");
            }
            for (one, repeated) in news(&told, &lasting, Instant::now()) {
                tracing::warn!(holder = one.holder, end = one.end, repeated, "somebody else {}", one.effect());
            }
            *self.0.lock() = lasting;
        }
    }
}

/// Those that were there before and are there now.
fn lasting(before: &[ForeignLock], now: &[ForeignLock]) -> Vec<ForeignLock> {
    let same = |one: &&ForeignLock| before.iter().any(|other| other.lock == one.lock && other.end == one.end);
    now.iter().filter(same).cloned().collect()
}

/// Those that are to be logged: each when it comes, and again now and then.
fn news<'a>(told: &Repeats, lasting: &'a [ForeignLock], now: Instant) -> Vec<(&'a ForeignLock, u64)> {
    let due = |one: &'a ForeignLock| Some((one, told.happened(now, &format!("{}: {}", one.lock, one.end))?));
    lasting.iter().filter_map(due).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(lock: &str, pid: u32, state: &str) -> ForeignLock {
        let (holder, end) = (format!("session {pid} ({state})"), format!("SELECT pg_terminate_backend({pid});"));
        ForeignLock { lock: lock.to_owned(), shared: false, holder, end }
    }

    /// Found in review: one that came within a minute of the first was not written.
    #[test]
    fn every_holder_is_logged_when_it_comes() {
        let (told, start) = (Repeats::default(), Instant::now());
        let ends = |lasting: &[ForeignLock], after: u64| {
            let news = news(&told, lasting, start + Duration::from_secs(after));
            news.into_iter().map(|(one, _)| format!("{} {}", one.lock, one.holder)).collect::<Vec<_>>()
        };
        let first = holder("leader", 1, "idle");
        assert_eq!(ends(std::slice::from_ref(&first), 2), ["leader session 1 (idle)"]);
        let (busy, second) = (holder("leader", 1, "active"), holder("park", 2, "idle"));
        assert_eq!(ends(&[busy.clone(), second.clone()], 4), ["park session 2 (idle)"]);
        assert_eq!(ends(&[busy, holder("park", 1, "idle")], 6), ["park session 1 (idle)"]);
        assert_eq!(ends(std::slice::from_ref(&first), 63), ["leader session 1 (idle)"], "it stays");
        assert_eq!(lasting(std::slice::from_ref(&first), &[second.clone(), first.clone()]), [first]);
        assert_eq!(lasting(&[], &[second]), []);
    }
}
