//! The memory of all pages of a node: who finds no room waits in turn.
//!
//! Only the first of those who wait has pages let go of that nobody reads any more. The others are asleep: a node with
//! thousands of them has no more to do than a node with one.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

use super::HISTORY_BYTES;
use crate::telemetry::metrics::{Metrics, gauge};

/// What the memory is counted in, bytes.
const UNIT_BYTES: usize = 1 << 10;
/// While someone waits for memory: between two inspections of what nobody reads any more.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct Memory {
    free: Arc<Semaphore>,
    // Held by the first in line.
    first: Mutex<()>,
    metrics: Arc<Metrics>,
}

impl Memory {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { free: Arc::new(Semaphore::new(HISTORY_BYTES / UNIT_BYTES)), first: Mutex::default(), metrics }
    }

    /// Waits for memory, in turn; a page larger than all of it takes it all. While there is too little, `reclaim` is called
    /// with what it wants, in [`UNIT_BYTES`].
    pub(super) async fn reserve(
        &self,
        bytes: usize,
        reclaim: impl Fn(usize),
    ) -> Result<OwnedSemaphorePermit, sqlx::Error> {
        let units = (bytes / UNIT_BYTES + 1).min(HISTORY_BYTES / UNIT_BYTES);
        let in_line = self.first.try_lock();
        if in_line.is_ok() && self.free.available_permits() < units {
            reclaim(units);
        }
        if in_line.is_err() || self.free.available_permits() < units {
            self.metrics.history_waits_total.inc();
        }
        let _first = match in_line {
            Ok(first) => first,
            Err(_) => self.first.lock().await,
        };
        let wanted = u32::try_from(units).unwrap_or(u32::MAX);
        let mut waiting = std::pin::pin!(Arc::clone(&self.free).acquire_many_owned(wanted));
        loop {
            if self.free.available_permits() < units {
                reclaim(units);
            }
            tokio::select! {
                biased;
                held = &mut waiting => return held.map_err(|_| sqlx::Error::PoolClosed),
                () = tokio::time::sleep(RECLAIM_INTERVAL) => {}
            }
        }
    }

    pub(super) fn measure(&self) {
        let free = self.free.available_permits() * UNIT_BYTES;
        self.metrics.history_bytes.set(gauge(HISTORY_BYTES.saturating_sub(free)));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::StreamExt as _;
    use futures_util::stream::FuturesUnordered;

    use super::*;

    /// Found in review: each of those who waited walked over the pages of all of them, every 20 ms.
    #[tokio::test(start_paused = true)]
    async fn those_who_wait_for_memory_inspect_the_pages_once_for_all() {
        const WAITING: usize = 500;
        const SECONDS: u32 = 2;
        let memory = Memory::new(Arc::new(Metrics::new().unwrap()));
        let all = memory.reserve(HISTORY_BYTES, |_| {}).await.unwrap();
        let inspections = AtomicUsize::new(0);
        let count = |_| {
            inspections.fetch_add(1, Ordering::Relaxed);
        };
        let mut waiting: FuturesUnordered<_> = (0..WAITING).map(|_| memory.reserve(1 << 20, count)).collect();
        let time = Duration::from_secs(SECONDS.into());
        assert!(tokio::time::timeout(time, waiting.next()).await.is_err(), "there is no memory");
        let most = usize::try_from(time.as_millis() / RECLAIM_INTERVAL.as_millis()).unwrap() + 2;
        let count = inspections.load(Ordering::Relaxed);
        assert!((most / 2..=most).contains(&count), "{count} inspections, not about {most}");
        assert_eq!(memory.metrics.history_waits_total.get(), WAITING as u64);
        drop(all);
        let mut served = 0;
        while let Some(held) = waiting.next().await {
            drop(held.unwrap());
            served += 1;
        }
        assert_eq!(served, WAITING);
    }

    /// Found in review: one reader alone was counted as waiting for each page, though the memory was its own old pages'.
    #[tokio::test(start_paused = true)]
    async fn memory_that_nobody_reads_is_taken_without_a_wait() {
        let memory = Memory::new(Arc::new(Metrics::new().unwrap()));
        let unread = parking_lot::Mutex::new(Some(memory.reserve(HISTORY_BYTES, |_| {}).await.unwrap()));
        let began = tokio::time::Instant::now();
        let held = memory.reserve(1 << 20, |_| drop(unread.lock().take())).await.unwrap();
        assert_eq!((began.elapsed(), memory.metrics.history_waits_total.get()), (Duration::ZERO, 0));
        drop(held);
    }

    #[tokio::test(start_paused = true)]
    async fn a_page_larger_than_all_memory_takes_it_all_and_one_who_leaves_the_line_is_passed() {
        let memory = Memory::new(Arc::new(Metrics::new().unwrap()));
        let all = memory.reserve(HISTORY_BYTES * 2, |_| {}).await.unwrap();
        memory.measure();
        assert_eq!(memory.metrics.history_bytes.get(), gauge(HISTORY_BYTES));
        let large = tokio::time::timeout(Duration::from_secs(1), memory.reserve(HISTORY_BYTES, |_| {})).await;
        assert!(large.is_err(), "it waited, and left");
        drop(all);
        let small = tokio::time::timeout(Duration::from_secs(1), memory.reserve(1, |_| {})).await;
        assert!(small.unwrap().is_ok());
    }
}
