//! Pages of the log, for those whose position the ring no longer reaches: one query serves all who need that range.

use std::sync::Arc;
use std::time::Duration;

use moka::future::Cache;

use crate::cursor::Seq;
use crate::event::Event;
use crate::log::read;
use crate::postgres::{Database, within};
use crate::telemetry::metrics::Metrics;

/// Events of a page.
pub const PAGE_EVENTS: u64 = 1_000;
/// And of bytes: of larger events a page has fewer.
const PAGE_BYTES: usize = 16 << 20;
/// Memory of cached pages, bytes.
const CACHE_BYTES: u64 = 64 << 20;
/// A page is read again after this: retention may have dropped it.
const CACHE_TTL: Duration = Duration::from_secs(30);

/// Longest wait for a page.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Consecutive events as the log has them.
pub type Page = Arc<Vec<Event>>;

/// Reads and shares pages.
#[derive(Clone, Debug)]
pub struct Pages {
    database: Arc<Database>,
    // (generation of the hub's epochs, first seq, last seq): the newest page grows, so its end is part of its name.
    cache: Cache<(u64, Seq, Seq), Page>,
    metrics: Arc<Metrics>,
}

impl Pages {
    /// An empty cache over `database`.
    #[must_use]
    pub fn new(database: Arc<Database>, metrics: Arc<Metrics>) -> Self {
        let cache = Cache::builder()
            .max_capacity(CACHE_BYTES)
            .weigher(|_, page: &Page| u32::try_from(page.iter().map(Event::bytes).sum::<usize>()).unwrap_or(u32::MAX))
            .time_to_live(CACHE_TTL)
            .build();
        Self { database, cache, metrics }
    }

    /// The page that holds `seq`, no further than `through`; events that retention dropped are missing at its front.
    /// `generation` keeps pages of different epochs apart.
    ///
    /// # Errors
    /// When Postgres refuses or is away; shared by all who waited for the same page.
    pub async fn holding(&self, seq: Seq, through: Seq, generation: u64) -> Result<Page, Arc<sqlx::Error>> {
        let first = (seq - 1) / PAGE_EVENTS * PAGE_EVENTS + 1;
        let last = (first + PAGE_EVENTS - 1).min(through);
        let page = self.page(first, last, generation).await?;
        if page.last().is_some_and(|end| end.seq < seq) {
            // It was full before it came to `seq`.
            return self.page(seq, last, generation).await;
        }
        Ok(page)
    }

    async fn page(&self, first: Seq, last: Seq, generation: u64) -> Result<Page, Arc<sqlx::Error>> {
        let read = Box::pin(async {
            self.metrics.log_queries_total.with_label_values(&["replay"]).inc();
            let limit = usize::try_from(PAGE_EVENTS).unwrap_or(usize::MAX);
            let pool = self.database.clients();
            within(READ_TIMEOUT, read::events(&pool, first - 1, last, limit, PAGE_BYTES)).await.map(Arc::new)
        });
        self.cache.try_get_with((generation, first, last), read).await
    }
}
