//! Pages of the log, for those whose position the ring no longer reaches: one query serves all who need that range.
//!
//! A page is what its reader can send: whole transactions of about [`PAGE_BYTES`], or, of a transaction larger than a frame,
//! a part larger than a frame. So nobody ever holds one page while it waits for the next. All pages in memory, read or
//! cached, are within [`HISTORY_BYTES`]: who finds no room waits in turn, pages that nobody reads are let go of for it, and
//! whoever cannot send at the moment lets go of its own and reads it again.
//!
//! A page is read in a task of its own, which waits for memory and for Postgres; its readers wait for the task. So a reader
//! that is not polled holds up none of the others. Once its last reader is gone the task ends and gives back what it has.

mod memory;

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use moka::future::Cache;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, watch};
use uuid::Uuid;

use self::memory::Memory;
use crate::cursor::Seq;
use crate::event::Event;
use crate::hub::ring::Whole;
use crate::lifecycle::Lifecycle;
use crate::log::read::{self, Extent, PageLimits};
use crate::postgres::{Database, within};
use crate::telemetry::metrics::{Metrics, gauge};

/// Events of a page, unless a transaction has more.
pub const PAGE_EVENTS: u64 = 1_000;
/// And of bytes, unless an event or a transaction is larger.
const PAGE_BYTES: usize = 1 << 20;
/// Events of a page that one pull inspects.
const TURN_EVENTS: usize = 1_000;
/// Memory of all pages of a node, bytes: 64 readers of the largest usual page at a time, or eight of the largest event.
pub const HISTORY_BYTES: usize = 64 << 20;
/// A reader takes a page as soon as it is polled; one that has not by then is not polled, and the page may go.
const TAKE_TIMEOUT: Duration = Duration::from_secs(1);
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

    /// What of it may go out together after `after`.
    #[must_use]
    pub fn whole_after(&self, after: Seq, frame_bytes: usize) -> Whole {
        let rest = || self.events.iter().filter(|event| event.seq > after);
        let whole = Whole::prefix(rest(), TURN_EVENTS, frame_bytes);
        if whole.events.is_empty() && self.part {
            // What is left of a part goes out as one: the page after it does not repeat it.
            return Whole { events: rest().cloned().collect(), open: true };
        }
        whole
    }

    /// Whether it is the part of a transaction that is larger than a frame, which has no end in it.
    #[must_use]
    pub const fn is_part(&self) -> bool {
        self.part
    }
}

/// A page that its reader has let go of. Until somebody needs its memory it is still there.
#[derive(Debug, Default)]
pub struct Left(Weak<Events>);

impl Left {
    /// A page that is about to be let go of.
    #[must_use]
    pub fn of(page: &Page) -> Self {
        Self(Arc::downgrade(page))
    }

    /// The page, if it is still there and has the event after `after`.
    #[must_use]
    pub fn again(&self, after: Seq) -> Option<Page> {
        let page = self.0.upgrade()?;
        let has = page.first()?.seq <= after + 1 && page.last()?.seq > after;
        has.then_some(page)
    }
}

type Failure = Arc<sqlx::Error>;
// (generation of the hub's epochs, after, through): the newest page grows, so its end is part of its name.
type Name = (u64, Seq, Seq);

/// A page that is being read or was. Whoever waits for it holds a receiver, who reads it the page.
type Slot = Arc<watch::Sender<Stage>>;

/// Set by the page's task, up to `Read`, and `LetGo` by whoever needs the memory.
#[derive(Debug)]
enum Stage {
    Reading,
    Read(Result<Page, Failure>),
    // A reader that comes to take it only now asks again.
    LetGo,
}

/// Reads and shares pages.
#[derive(Clone, Debug)]
pub struct Pages {
    database: Arc<Database>,
    slots: Arc<Mutex<HashMap<Name, (Slot, Instant)>>>,
    memory: Arc<Memory>,
    ids: Cache<Name, Arc<Vec<(Seq, Uuid)>>>,
    frame_bytes: usize,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
}

impl Pages {
    /// No pages yet, over `database`. `frame_bytes` is the protocol's limit of a frame; pages are read in tasks of `lifecycle`.
    #[must_use]
    pub fn new(database: Arc<Database>, frame_bytes: usize, lifecycle: Lifecycle, metrics: Arc<Metrics>) -> Self {
        Self {
            database,
            slots: Arc::default(),
            memory: Arc::new(Memory::new(Arc::clone(&metrics))),
            ids: Cache::builder().max_capacity(ID_RUNS).time_to_live(IDLE_AGE).build(),
            frame_bytes,
            lifecycle,
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
        loop {
            let mut answer = self.ask(name, through);
            let taken = match answer.wait_for(|stage| !matches!(stage, Stage::Reading)).await.as_deref() {
                Ok(Stage::Read(page)) => Some(page.clone()),
                Ok(_) => None,
                // Its task always answers.
                Err(_) => Some(Err(Arc::new(sqlx::Error::PoolClosed))),
            };
            self.measure();
            if let Some(page) = taken {
                return page;
            }
        }
    }

    /// A place among those who wait for this page. The first of them has it read.
    fn ask(&self, name: Name, through: Seq) -> watch::Receiver<Stage> {
        let mut fresh = None;
        let answer = {
            let mut slots = self.slots.lock();
            let (slot, used) = slots.entry(name).or_insert_with(|| {
                let slot = Slot::new(watch::Sender::new(Stage::Reading));
                fresh = Some(Arc::clone(&slot));
                (slot, Instant::now())
            });
            *used = Instant::now();
            slot.subscribe()
        };
        if let Some(slot) = fresh {
            let reading = Reading { pages: self.clone(), name, slot };
            self.lifecycle.spawn("page", reading.run(through));
        }
        answer
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
        self.slots.lock().retain(|_, (slot, used)| {
            let keep = !idle(slot, *used, now) || now.saturating_duration_since(*used) < IDLE_AGE;
            if !keep {
                slot.send_replace(Stage::LetGo);
            }
            keep
        });
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
        let held = Some(self.memory.reserve(bytes, |units| self.reclaim(units)).await?);
        let events = within(READ_TIMEOUT, read::through(&self.database.clients(), after, through)).await?;
        Ok(Arc::new(Events { events, part, held }))
    }

    /// Lets go of pages that nobody reads, the longest unused first, until `units` are free of them.
    fn reclaim(&self, units: usize) {
        let now = Instant::now();
        let mut slots = self.slots.lock();
        let mut unused: Vec<(Instant, Name, usize)> = slots
            .iter()
            .filter(|(_, (slot, used))| idle(slot, *used, now))
            .map(|(name, (slot, used))| (*used, *name, units_of(slot)))
            .collect();
        unused.sort_unstable();
        let mut freed = 0;
        for (_, name, of_page) in unused {
            if freed >= units {
                break;
            }
            freed += of_page;
            if let Some((slot, _)) = slots.remove(&name) {
                slot.send_replace(Stage::LetGo);
            }
        }
    }

    fn measure(&self) {
        self.metrics.history_pages.set(gauge(self.slots.lock().len()));
        self.memory.measure();
    }
}

/// A page while it is read.
struct Reading {
    pages: Pages,
    name: Name,
    slot: Slot,
}

impl Reading {
    /// Reads until there is an answer or nobody waits for it any more.
    async fn run(self, through: Seq) {
        let mut read = std::pin::pin!(self.pages.read(self.name.1, through));
        loop {
            tokio::select! {
                biased;
                page = &mut read => return self.answer(page, through),
                () = self.slot.closed() => {
                    // Who comes meanwhile takes its place under the lock.
                    let mut slots = self.pages.slots.lock();
                    if self.slot.receiver_count() == 0 {
                        self.forget(&mut slots);
                        return;
                    }
                }
            }
        }
    }

    fn answer(&self, page: Result<Page, Failure>, through: Seq) {
        let mut slots = self.pages.slots.lock();
        if let Some((_, used)) = slots.get_mut(&self.name) {
            *used = Instant::now();
        }
        let last = page.as_ref().ok().and_then(|page| page.last());
        if last.is_none_or(|last| !last.tx_end && last.seq >= through) {
            // An error, what is not there yet or no more, or a transaction whose end is not: nothing to remember.
            self.forget(&mut slots);
        }
        self.slot.send_replace(Stage::Read(page));
    }

    fn forget(&self, slots: &mut HashMap<Name, (Slot, Instant)>) {
        if slots.get(&self.name).is_some_and(|(known, _)| Arc::ptr_eq(known, &self.slot)) {
            slots.remove(&self.name);
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        // Without an answer when its last reader is gone or the task was torn down: nobody may wait for it forever.
        if matches!(*self.slot.borrow(), Stage::Reading) {
            self.forget(&mut self.pages.slots.lock());
            self.slot.send_replace(Stage::Read(Err(Arc::new(sqlx::Error::PoolClosed))));
        }
        self.pages.measure();
    }
}

/// Whether nobody reads it, nor will soon.
fn idle(slot: &Slot, used: Instant, now: Instant) -> bool {
    let Stage::Read(Ok(page)) = &*slot.borrow() else { return false };
    let unused = slot.receiver_count() == 0 || now.saturating_duration_since(used) > TAKE_TIMEOUT;
    unused && Arc::strong_count(page) == 1
}

fn units_of(slot: &Slot) -> usize {
    let Stage::Read(Ok(page)) = &*slot.borrow() else { return 0 };
    page.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
}
