//! The hub: a node's window on the log, and the routing of what comes in to the subscriptions that want it.
//!
//! One writer, the follower: it appends events, and everything up to the end of the last whole transaction becomes
//! deliverable. Readers are sessions: each is a position, and [`Hub::pull`] gives it what comes next from the cheapest
//! place that has it: its group's frames, the ring, the log. Nothing is queued for anyone (invariant I7), and going from
//! catch-up to live is nothing but reading on, so there is no window in between to lose an event in.
//!
//! The follower does not look at what is dear (a condition that reads megabytes, more rendering than memory allows): it
//! passes the group over, and its readers find the ring where their frames would be. Neither does a session's own task:
//! [`Pull::Dear`] gives the events and a [`Look`](look::Look) at them, which is done in a thread and within its
//! connection's budget (`session::live`). The position moves when the look is over, by its outcome, exactly as it does by
//! a frame; meanwhile the group may go on with frames for what follows, which the reader takes once it is there. So
//! whoever changes between the two ways misses nothing and sees nothing twice: there is one position, and both ways
//! answer the same question, "what comes after it".
//!
//! Lock order: routes, then a group. The edge is published after the groups have their frames, so a session that reads
//! the edge first and then finds nothing in its group knows that nothing up to the edge is for it.

mod beginning;
mod dispatch;
pub mod group;
mod kept;
pub mod look;
pub mod pages;
pub mod plan;
pub mod ring;
pub mod routes;
pub mod shape;
mod tap;
mod thread_time;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, watch};
use uuid::Uuid;

use self::beginning::Beginning;
use self::dispatch::{Call, Dispatched, Outcome, dispatch};
use self::kept::Kept;
use self::look::{Look, Origin};
use self::pages::{Page, Pages};
pub use self::tap::Tap;
use crate::cursor::{Cursor, Epochs, Seq};
use crate::event::{Event, Operation};
use crate::hub::group::{Ended, Found, Frame, Group, Held, Place, Plans, Signal};
use crate::hub::ring::{Gone, NotContiguous, Ring, Whole};
use crate::hub::routes::Routes;
use crate::log::incarnation::Known;
use crate::mutant::{self, Mutant};
use crate::telemetry::metrics::{Metrics, gauge};

/// Events that one pull looks at, so that a session that catches up shares its thread.
const PULL_EVENTS: usize = 1_000;
/// Events that are handed to the groups in one call, under the routes' lock; with [`dispatch`]'s bounds it is soon let go of.
const DISPATCH_EVENTS: usize = 2_000;
/// Events of one look in a thread, bytes.
const LOOK_BYTES: usize = 1 << 20;

/// A frame is kept for those a little behind for one to two of these; the ring has its events for longer.
const FRAME_AGE: Duration = Duration::from_secs(5);

/// How the hub works.
#[derive(Clone, Copy, Debug)]
pub struct HubOptions {
    /// Age of events in the ring.
    pub ring_window: Duration,
    /// Memory of events in the ring, bytes.
    pub ring_bytes: usize,
    /// Largest frame, bytes, unless a single event is larger.
    pub frame_bytes: usize,
    /// Memory of the rendered frames that all groups keep, bytes.
    pub frames_bytes: usize,
}

/// How far this node can deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// Everything up to here may be delivered; inside a transaction only when that is larger than a frame.
    pub deliverable: Cursor,
    /// The end of the last whole transaction.
    pub boundary: Cursor,
    /// Rises whenever positions must be judged anew: a new epoch of the log.
    pub generation: u64,
    /// Nothing is delivered: the database may not be the one it was.
    pub held: bool,
}

/// What comes next for a position.
#[derive(Debug)]
pub enum Pull {
    /// A frame.
    Frame(Arc<Frame>),
    /// Nothing up to this position is for it.
    Nothing(Cursor),
    /// It has everything that this node can deliver.
    Idle(Edge),
    /// What comes next is dear to find out: not here.
    Dear(Box<Look>),
    /// The ring no longer reaches back to it: read the log.
    Log,
    /// It has everything that is for it: the subscription cannot go on, and its client must be told why.
    Ended(Arc<Ended>),
}

/// A node's window and routing. Shared by the follower, which writes, and every session.
#[derive(Debug)]
pub struct Hub {
    options: HubOptions,
    ring: RwLock<Ring>,
    routes: Mutex<Routes>,
    edge: watch::Sender<Edge>,
    epochs: RwLock<Epochs>,
    known: watch::Sender<Option<Known>>,
    beginning: Mutex<Option<Beginning>>,
    // The generation in which a log began that has nothing to do with the one before.
    replaced: AtomicU64,
    // When groups' frames were let go, and what had been delivered then.
    aged: Mutex<(Instant, Seq)>,
    kept: Kept,
    // Threads that look at what is dear, for all connections.
    lookers: Arc<Semaphore>,
    // Looks that hold events.
    seats: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl Hub {
    /// A hub that knows nothing yet and is held.
    #[must_use]
    pub fn new(options: HubOptions, metrics: Arc<Metrics>) -> Self {
        let start = Cursor::origin(0);
        let edge = Edge { deliverable: start, boundary: start, generation: 0, held: true };
        Self {
            ring: RwLock::new(Ring::new(0, None, options.ring_window, options.ring_bytes)),
            options,
            routes: Mutex::default(),
            edge: watch::channel(edge).0,
            epochs: RwLock::default(),
            known: watch::channel(None).0,
            beginning: Mutex::default(),
            replaced: AtomicU64::new(0),
            aged: Mutex::new((Instant::now(), 0)),
            kept: Kept::new(options.frames_bytes),
            lookers: look::threads(),
            seats: look::seats(),
            metrics,
        }
    }

    /// How far this node can deliver.
    #[must_use]
    pub fn edge(&self) -> Edge {
        *self.edge.borrow()
    }

    /// Tells of every change of the edge.
    #[must_use]
    pub fn watch_edge(&self) -> watch::Receiver<Edge> {
        self.edge.subscribe()
    }

    /// The newest event that this node has, for whoever begins a term.
    #[must_use]
    pub fn watch_known(&self) -> watch::Receiver<Option<Known>> {
        self.known.subscribe()
    }

    /// The epochs of the log.
    #[must_use]
    pub fn epochs(&self) -> Epochs {
        self.epochs.read().clone()
    }

    /// The newest seq in the ring, deliverable or not.
    #[must_use]
    pub fn high_water(&self) -> Seq {
        self.ring.read().newest()
    }

    /// How far back the ring reaches.
    #[must_use]
    pub fn ring_age(&self) -> Duration {
        self.ring.read().age(Instant::now())
    }

    /// The position before the ring's first event.
    #[must_use]
    pub fn ring_base(&self) -> Seq {
        self.ring.read().base()
    }

    /// The id of the event at `seq`, if the ring has it.
    #[must_use]
    pub fn id_at(&self, seq: Seq) -> Option<Uuid> {
        self.ring.read().id_at(seq)
    }

    /// The cursor of an event.
    #[must_use]
    pub fn cursor_at(&self, seq: Seq, id: Uuid) -> Cursor {
        Cursor::at(self.epochs.read().of(seq), seq, id)
    }

    /// Begins anew after `base`: the log does not continue what the ring held (or it never held anything). `whole` is the
    /// newest end of a transaction at or before `base`, if known: `base` may lie inside one, and no client is told such
    /// a position.
    pub fn restart(&self, base: Seq, base_id: Option<Uuid>, whole: Option<(Seq, Uuid)>, epochs: Epochs) {
        let routes = self.routes.lock();
        let held = self.change();
        self.forget_beginning();
        let start = Cursor::at(epochs.of(base), base, base_id.unwrap_or_default());
        let boundary = whole.map_or(start, |(seq, id)| Cursor::at(epochs.of(seq), seq, id));
        *self.epochs.write() = epochs;
        *self.ring.write() = Ring::new(base, base_id, self.options.ring_window, self.options.ring_bytes);
        self.kept.forget(Seq::MAX);
        for group in routes.iter() {
            group.reset(base);
        }
        self.edge.send_modify(|edge| {
            (edge.deliverable, edge.boundary) = (start, boundary);
            edge.held = held;
        });
        routes.iter().for_each(|group| group.wake_all());
        drop(routes);
        self.tell_known();
    }

    /// Before a [`restart`](Self::restart) on a log that is not the one it was, without an epoch that says where they part: no
    /// position of before counts, and everybody is told.
    pub fn replace(&self) {
        self.replaced.store(self.edge().generation + 1, Ordering::Release);
    }

    /// Whether a position of `generation` is one of a log that was replaced since.
    #[must_use]
    pub fn replaced_since(&self, generation: u64) -> bool {
        generation < self.replaced.load(Ordering::Acquire)
    }

    /// Takes the epochs as they are now. Where a new one began before our newest event, the tail behind it is forgotten
    /// and every position is judged anew. `start_id` is the id of the event at [`Epochs::cut_since`], if any; `whole` the
    /// newest end of a transaction at or before that, as in [`restart`](Self::restart).
    pub fn set_epochs(&self, epochs: Epochs, start_id: Option<Uuid>, whole: Option<(Seq, Uuid)>) {
        if *self.epochs.read() == epochs {
            return;
        }
        let routes = self.routes.lock();
        let held = self.change();
        self.forget_beginning();
        let start = epochs.cut_since(&self.epochs.read());
        *self.epochs.write() = epochs;
        let (newest, id) = {
            let mut ring = self.ring.write();
            if start < ring.base() {
                *ring = Ring::new(start, start_id, self.options.ring_window, self.options.ring_bytes);
            } else {
                ring.cut_after(start);
            }
            let newest = ring.newest();
            (newest, ring.id_at(newest).or(start_id))
        };
        self.kept.forget(Seq::MAX);
        for group in routes.iter() {
            group.reset(newest);
        }
        let end = self.cursor_at(newest, id.unwrap_or_default());
        let boundary = whole.map_or(end, |(seq, id)| self.cursor_at(seq, id));
        self.edge.send_modify(|edge| {
            if edge.deliverable.seq > newest {
                edge.deliverable = end;
                // One before the cut stands: it was the end of a transaction, and still is.
                if edge.boundary.seq > newest {
                    edge.boundary = boundary;
                }
            }
            edge.held = held;
        });
        routes.iter().for_each(|group| group.wake_all());
        drop(routes);
        self.tell_known();
    }

    /// Before the log is exchanged for another: nothing is delivered, and what was taken until then is told from what comes
    /// after by its generation. Whether delivery was held before, to be put back at the end.
    fn change(&self) -> bool {
        let mut held = true;
        self.edge.send_modify(|edge| {
            held = std::mem::replace(&mut edge.held, true);
            edge.generation += 1;
        });
        held
    }

    /// Stops or allows delivery.
    pub fn hold(&self, held: bool) {
        let changed = self.edge.send_if_modified(|edge| std::mem::replace(&mut edge.held, held) != held);
        if changed {
            for group in self.routes.lock().iter() {
                group.wake_all();
            }
        }
    }

    /// Takes the events that follow the newest, and delivers what is whole.
    ///
    /// # Errors
    /// [`NotContiguous`]; what came before the gap is in.
    pub fn append(&self, events: &[Event], now: Instant) -> Result<(), NotContiguous> {
        let verdict = self.ring.write().append(events, now);
        for event in events.iter().filter(|event| event.operation == Operation::Schema) {
            tracing::debug!(table = %event.table, seq = event.seq, "the table's shape changed");
        }
        self.deliver();
        self.tell_known();
        self.tick(now);
        verdict
    }

    /// Has globs find their plans anew: what is known of tables has changed.
    pub fn forget_plans(&self) {
        for group in self.routes.lock().iter() {
            group.plans.forget();
        }
    }

    /// Lets the ring age while nothing comes in, and groups' frames.
    pub fn tick(&self, now: Instant) {
        let delivered = self.edge().deliverable.seq;
        self.ring.write().trim(now, delivered);
        self.measure(now);
        let floor = {
            let mut aged = self.aged.lock();
            if now.saturating_duration_since(aged.0) < FRAME_AGE {
                return;
            }
            std::mem::replace(&mut *aged, (now, delivered)).1
        };
        for group in self.routes.lock().iter() {
            group.age(floor);
        }
        self.kept.forget(floor);
        self.metrics.frames_bytes.set(gauge(self.kept.bytes()));
    }

    fn measure(&self, now: Instant) {
        let ring = self.ring.read();
        self.metrics.ring_events.set(gauge(ring.len()));
        self.metrics.ring_bytes.set(gauge(ring.bytes()));
        self.metrics.ring_age_ms.set(gauge(ring.age(now).as_millis()));
    }

    fn tell_known(&self) {
        let known = {
            let ring = self.ring.read();
            let seq = ring.newest();
            ring.id_at(seq).map(|event_id| Known { seq, event_id })
        };
        self.known.send_replace(known);
    }

    /// Hands everything new and whole to the groups, then publishes the edge.
    fn deliver(&self) {
        loop {
            let mut routes = self.routes.lock();
            let edge = self.edge();
            let ring = self.ring.read();
            let Ok(mut whole) =
                ring.whole_after(edge.deliverable.seq, ring.newest(), DISPATCH_EVENTS, self.options.frame_bytes)
            else {
                return;
            };
            drop(ring);
            let Some(last) = whole.events.last() else { return };
            let epochs = self.epochs.read().clone();
            let end = Cursor::at(epochs.of(last.seq), last.seq, last.id);
            if mutant::is(Mutant::FrameDropsLast) && whole.events.len() > 10 {
                whole.events.pop();
            }
            // All of a call together may be half of what is kept: the other half is what was there.
            let render_bytes = self.options.frames_bytes / 2;
            let Call { groups, end } = dispatch(&routes, &whole, &epochs, end, self.options.frame_bytes, render_bytes);
            let mut news = Vec::with_capacity(groups.len());
            for Dispatched { group, outcome, ended } in groups {
                match outcome {
                    Outcome::Frames(frames) if frames.is_empty() => {}
                    Outcome::Frames(frames) => self.publish(&group, frames),
                    Outcome::PassedOver => {
                        let through = ended.as_ref().map_or(end.seq, |ended| ended.seq);
                        group.pass_over(edge.deliverable.seq, through);
                        self.metrics.filters_passed_over_total.inc();
                    }
                }
                news.push(Arc::clone(&group));
                if let Some(ended) = ended {
                    group.end(ended);
                    // Whoever joins from now on gets a group of its own; listeners keep this one's frames.
                    routes.retire(&group);
                    self.metrics.filter_groups.set(gauge(routes.len()));
                }
            }
            self.edge.send_modify(|edge| {
                edge.deliverable = end;
                if !whole.open {
                    edge.boundary = end;
                }
            });
            if !whole.open && edge.boundary.seq != edge.deliverable.seq {
                // Whoever waits inside the transaction that ends here may have its beginning in hand.
                routes.iter().for_each(|group| group.wake_all());
            }
            drop(routes);
            for group in news {
                group.wake_all();
            }
        }
    }

    /// Gives a group its frames, and lets go of the oldest of all groups' where they are too many.
    fn publish(&self, group: &Arc<Group>, frames: Vec<Frame>) {
        let through = frames.last().map_or(0, |frame| frame.through);
        group.publish(frames, self.kept.counter());
        let evicted = self.kept.add(group, through);
        self.metrics.frames_evicted_total.inc_by(evicted);
        self.metrics.frames_bytes.set(gauge(self.kept.bytes()));
    }

    /// Keeps what was found for others of the group, if there are others.
    fn keep(&self, group: &Arc<Group>, place: Place, found: Found) {
        if group.listeners() > 1 {
            self.leave(group, place, found);
        }
    }

    /// Leaves what a reader has found with its group, since it cannot take it now: among all kept frames, the oldest of which
    /// go where there are too many.
    pub fn leave(&self, group: &Arc<Group>, place: Place, found: Found) {
        let through = found.through();
        if group.keep(place, found, self.kept.counter()) {
            self.metrics.frames_evicted_total.inc_by(self.kept.add(group, through));
            self.metrics.frames_bytes.set(gauge(self.kept.bytes()));
        }
    }

    /// Adds a subscription's interest; its group is made when it is the first of its kind.
    pub fn join(self: &Arc<Self>, key: &str, signal: &Arc<Signal>, plans: impl FnOnce() -> Plans) -> Tap {
        let mut routes = self.routes.lock();
        let group = match routes.find(key) {
            Some(group) => Arc::clone(group),
            None => {
                let floor = self.edge().deliverable.seq;
                let group = Arc::new(Group::new(key.into(), plans(), floor));
                routes.add(&group);
                self.metrics.filter_groups.set(gauge(routes.len()));
                group
            }
        };
        group.listen(signal);
        drop(routes);
        self.metrics.subscriptions.inc();
        Tap { hub: Arc::clone(self), group, signal: Arc::clone(signal) }
    }

    /// What comes after `after` for a group, from its frames or the ring.
    #[must_use]
    pub fn pull(self: &Arc<Self>, group: &Arc<Group>, after: Seq) -> Pull {
        // First the edge, then the frames: see the head.
        let edge = self.edge();
        if edge.held {
            return Pull::Idle(edge);
        }
        let ended = group.ended();
        if let Some(ended) = ended.filter(|ended| ended.seq <= after) {
            return Pull::Ended(Arc::clone(ended));
        }
        match group.held(after) {
            // Frames are published just before the edge, and whoever waits is woken by the frame.
            Held::Frame(frame) => Pull::Frame(frame),
            // It had ended before we looked for frames, so there are no others.
            Held::Nothing if let Some(ended) = ended => Pull::Ended(Arc::clone(ended)),
            _ if after >= edge.deliverable.seq => Pull::Idle(edge),
            Held::Nothing if edge.boundary.seq > after => Pull::Nothing(edge.boundary),
            // The rest of an open transaction, none of it for this group so far.
            Held::Nothing => Pull::Idle(edge),
            Held::Behind => {
                let read =
                    self.ring.read().whole_after(after, edge.deliverable.seq, PULL_EVENTS, self.options.frame_bytes);
                match read {
                    Ok(whole) => {
                        let place = (edge.generation, after);
                        self.frame_of(group, whole, place, Origin::Ring).unwrap_or(Pull::Idle(edge))
                    }
                    Err(Gone) => Pull::Log,
                }
            }
        }
    }

    /// The first frame for a group in `page` after `place`; None when nothing whole follows there. The place's generation is
    /// one from before the page was read.
    #[must_use]
    pub fn pull_page(self: &Arc<Self>, group: &Arc<Group>, page: &Page, pages: &Pages, place: Place) -> Option<Pull> {
        let whole = page.whole_after(place.1, self.options.frame_bytes);
        self.frame_of(group, whole, place, Origin::log(pages, page))
    }

    /// The first frame for a group among `whole`, which follows `place`; None when that is empty. The place's generation is
    /// one from before `whole` was read.
    fn frame_of(self: &Arc<Self>, group: &Arc<Group>, mut whole: Whole, place: Place, origin: Origin) -> Option<Pull> {
        whole.events.last()?;
        if look::is_dear(group, &whole) {
            whole.shorten(LOOK_BYTES);
            return Some(Pull::Dear(Box::new(Look::new(self, group, whole, place, origin))));
        }
        let mut look = Look::new(self, group, whole, place, origin);
        // The rest is for later pulls: memory stays bounded.
        Some(look.finish())
    }
}

#[cfg(test)]
mod tests;
