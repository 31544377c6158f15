//! Pages of the log, for those whose position the ring no longer reaches: one query serves all who need that range.
//!
//! A page is what its reader can send: whole transactions of about [`PAGE_BYTES`], or, of a transaction larger than a frame,
//! a part larger than a frame. So nobody ever holds one page while it waits for the next. All pages in memory, read or
//! cached, are within [`HISTORY_BYTES`]: who finds no room waits in turn, pages that nobody reads are let go of for it, and
//! whoever cannot send at the moment lets go of its own and reads it again.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moka::future::Cache;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

use crate::cursor::Seq;
use crate::event::Event;
use crate::log::read::{self, Extent, PageLimits};
use crate::postgres::{Database, within};
use crate::telemetry::metrics::{Metrics, gauge};

/// Events of a page, unless a transaction has more.
pub const PAGE_EVENTS: u64 = 1_000;
/// And of bytes, unless an event or a transaction is larger.
const PAGE_BYTES: usize = 1 << 20;
/// Memory of all pages of a node, bytes: 64 readers of the largest usual page at a time, or eight of the largest event.
pub const HISTORY_BYTES: usize = 64 << 20;
/// What the memory is counted in, bytes.
const UNIT_BYTES: usize = 1 << 10;
/// While someone waits for memory: between two inspections of what nobody reads any more.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(20);
/// A page that nobody reads is kept for this long, if nobody needs its memory.
const IDLE_AGE: Duration = Duration::from_secs(30);
/// Runs of ids that are remembered, of [`PAGE_EVENTS`] each: 6 MB.
const ID_RUNS: u64 = 256;
/// Longest wait for one answer of Postgres.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Consecutive events as the log has them. Their memory counts until the last reader lets go.
#[derive(Debug)]
pub struct Events {
    events: Vec<Event>,
    part: bool,
    held: Option<OwnedSemaphorePermit>,
}

/// A page, shared by its readers.
pub type Page = Arc<Events>;

impl Deref for Events {
    type Target = [Event];

    fn deref(&self) -> &[Event] {
        &self.events
    }
}

impl Events {
    /// The same without one event; what a defect would make of it.
    #[must_use]
    pub fn without(&self, index: usize) -> Self {
        let mut events = self.events.clone();
        events.remove(index);
        Self { events, part: self.part, held: None }
    }

    /// Whether it is the part of a transaction that is larger than a frame, which has no end in it.
    #[must_use]
    pub const fn is_part(&self) -> bool {
        self.part
    }
}

type Failure = Arc<sqlx::Error>;
// (generation of the hub's epochs, after, through): the newest page grows, so its end is part of its name.
type Name = (u64, Seq, Seq);

/// A page that is read or was. Who waits for it holds the slot, who reads it the page.
type Slot = Arc<OnceCell<Result<Page, Failure>>>;

/// Reads and shares pages.
#[derive(Clone, Debug)]
pub struct Pages {
    database: Arc<Database>,
    slots: Arc<Mutex<HashMap<Name, (Slot, Instant)>>>,
    memory: Arc<Semaphore>,
    ids: Cache<Name, Arc<Vec<(Seq, Uuid)>>>,
    frame_bytes: usize,
    metrics: Arc<Metrics>,
}

impl Pages {
    /// No pages yet, over `database`. `frame_bytes` is the protocol's limit of a frame.
    #[must_use]
    pub fn new(database: Arc<Database>, frame_bytes: usize, metrics: Arc<Metrics>) -> Self {
        Self {
            database,
            slots: Arc::default(),
            memory: Arc::new(Semaphore::new(HISTORY_BYTES / UNIT_BYTES)),
            ids: Cache::builder().max_capacity(ID_RUNS).time_to_live(IDLE_AGE).build(),
            frame_bytes,
            metrics,
        }
    }

    /// The page that follows `after`, no further than `through`; events that retention dropped are missing at its front.
    /// `generation` keeps pages of different epochs apart.
    ///
    /// # Errors
    /// When Postgres refuses or is away; shared by all who waited for the same page.
    pub async fn following(&self, after: Seq, through: Seq, generation: u64) -> Result<Page, Failure> {
        let name = (generation, after, through.min(after + PAGE_EVENTS));
        let slot = {
            let mut slots = self.slots.lock();
            let (slot, used) = slots.entry(name).or_insert_with(|| (Slot::default(), Instant::now()));
            *used = Instant::now();
            Arc::clone(slot)
        };
        let page = slot.get_or_init(|| self.read(after, through)).await.clone();
        let last = page.as_ref().ok().and_then(|page| page.last());
        if last.is_none_or(|last| !last.tx_end && last.seq >= through) {
            // An error, what is not there yet or no more, or a transaction whose end is not: nothing to remember.
            let mut slots = self.slots.lock();
            if slots.get(&name).is_some_and(|(known, _)| Arc::ptr_eq(known, &slot)) {
                slots.remove(&name);
            }
        }
        self.measure();
        page
    }

    /// The ids of the events around `seq`, no further than `through`, by seq.
    ///
    /// # Errors
    /// As [`Pages::following`].
    pub async fn ids(&self, seq: Seq, through: Seq, generation: u64) -> Result<Arc<Vec<(Seq, Uuid)>>, Failure> {
        let after = seq.saturating_sub(1) / PAGE_EVENTS * PAGE_EVENTS;
        let through = through.min(after + PAGE_EVENTS);
        let read = Box::pin(async {
            self.metrics.log_queries_total.with_label_values(&["replay"]).inc();
            within(READ_TIMEOUT, read::ids(&self.database.clients(), after, through)).await.map(Arc::new)
        });
        self.ids.try_get_with((generation, after, through), read).await
    }

    /// Lets go of what nobody has read for a while.
    pub fn sweep(&self) {
        let now = Instant::now();
        self.slots.lock().retain(|_, (slot, used)| !idle(slot) || now.saturating_duration_since(*used) < IDLE_AGE);
        self.measure();
    }

    async fn read(&self, after: Seq, through: Seq) -> Result<Page, Failure> {
        self.metrics.log_queries_total.with_label_values(&["replay"]).inc();
        let limits = PageLimits { events: PAGE_EVENTS, bytes: PAGE_BYTES, frame_bytes: self.frame_bytes };
        let pool = self.database.clients();
        let extent = within(READ_TIMEOUT, read::extent(&pool, after, through, limits)).await?;
        let Some(Extent { through, bytes, part }) = extent else {
            return Ok(Arc::new(Events { events: Vec::new(), part: false, held: None }));
        };
        // No connection is held meanwhile.
        let held = Some(self.reserve(bytes).await?);
        let events = within(READ_TIMEOUT, read::through(&self.database.clients(), after, through)).await?;
        Ok(Arc::new(Events { events, part, held }))
    }

    /// Waits for memory, in turn.
    async fn reserve(&self, bytes: usize) -> Result<OwnedSemaphorePermit, sqlx::Error> {
        let units = (bytes / UNIT_BYTES + 1).min(HISTORY_BYTES / UNIT_BYTES);
        if self.memory.available_permits() < units {
            self.metrics.history_waits_total.inc();
            self.reclaim(units);
        }
        let wanted = u32::try_from(units).unwrap_or(u32::MAX);
        let mut waiting = std::pin::pin!(Arc::clone(&self.memory).acquire_many_owned(wanted));
        loop {
            tokio::select! {
                biased;
                held = &mut waiting => return held.map_err(|_| sqlx::Error::PoolClosed),
                () = tokio::time::sleep(RECLAIM_INTERVAL) => self.reclaim(units),
            }
        }
    }

    /// Lets go of pages that nobody reads, the longest unused first, until `units` are free of them.
    fn reclaim(&self, units: usize) {
        let mut slots = self.slots.lock();
        let mut unused: Vec<(Instant, Name, usize)> = slots
            .iter()
            .filter(|(_, (slot, _))| idle(slot))
            .map(|(name, (slot, used))| (*used, *name, units_of(slot)))
            .collect();
        unused.sort_unstable();
        let mut freed = 0;
        for (_, name, of_page) in unused {
            if freed >= units {
                break;
            }
            freed += of_page;
            slots.remove(&name);
        }
    }

    fn measure(&self) {
        let free = self.memory.available_permits() * UNIT_BYTES;
        self.metrics.history_bytes.set(gauge(HISTORY_BYTES.saturating_sub(free)));
    }
}

/// Whether nobody waits for it and nobody reads it.
fn idle(slot: &Slot) -> bool {
    let read = slot.get().is_some_and(|page| page.as_ref().is_ok_and(|page| Arc::strong_count(page) == 1));
    read && Arc::strong_count(slot) == 1
}

fn units_of(slot: &Slot) -> usize {
    let page = slot.get().and_then(|page| page.as_ref().ok());
    page.and_then(|page| page.held.as_ref()).map_or(0, OwnedSemaphorePermit::num_permits)
}
