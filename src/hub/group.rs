//! A group: everyone on this node whose subscriptions are the same. Its frames are rendered once and shared.
//!
//! A group keeps its newest frames within a byte bound. Whoever has fallen behind them reads the ring, then the log, by
//! its own position; nothing is queued for anyone.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::cursor::{Cursor, Epochs, Seq};
use crate::event::row::Row;
use crate::event::{Event, Operation};
use crate::hub::plan::TablePlan;
use crate::hub::shape::broken_by;
use crate::protocol::message::ResyncReason;

/// Frames are cut at the end of a transaction once they are this large, bytes.
pub const FRAME_TARGET_BYTES: usize = 64 << 10;
/// Memory of the frames that a group keeps for those a little behind, bytes.
pub const GROUP_BYTES: usize = 1 << 20;
/// Tables that a glob's memory of plans may hold; beyond, it is begun anew.
const MAX_REMEMBERED_PLANS: usize = 10_000;

/// Some consecutive events as one subscription sees them, rendered.
#[derive(Debug)]
pub struct Frame {
    /// The first event in it.
    pub first: Seq,
    /// Everything that matches up to here is in it or before it.
    pub through: Seq,
    /// The position after it.
    pub cursor: Cursor,
    /// How many events.
    pub count: usize,
    /// It ends inside a transaction.
    pub open: bool,
    /// The events, separated by commas.
    pub body: Bytes,
    message: OnceLock<(Cursor, Bytes)>,
}

impl Frame {
    /// The `events` message for a subscription `id` whose position is `prev`. Those who share a position share bytes.
    /// UTF-8.
    #[must_use]
    pub fn message(&self, id: &str, prev: &Cursor) -> Bytes {
        let (shared_prev, shared) = self.message.get_or_init(|| (*prev, self.compose(id, prev)));
        if shared_prev == prev { shared.clone() } else { self.compose(id, prev) }
    }

    fn compose(&self, id: &str, prev: &Cursor) -> Bytes {
        let mut out = String::with_capacity(self.body.len() + id.len() + 160);
        out.push_str("{\"type\":\"events\",\"id\":");
        crate::event::push_json_string(&mut out, id);
        let _ = fmt::Write::write_fmt(&mut out, format_args!(",\"prev\":\"{prev}\",\"cursor\":\"{}\"", self.cursor));
        if self.open {
            out.push_str(",\"open\":true");
        }
        out.push_str(",\"events\":[");
        let mut out = out.into_bytes();
        out.extend_from_slice(&self.body);
        out.extend_from_slice(b"]}");
        out.into()
    }
}

/// Finds a table's plan when the group has globs: tables tracked later are included.
pub type Resolve = Box<dyn Fn(&str) -> Option<Arc<TablePlan>> + Send + Sync>;

/// Whose events a group is shown.
pub enum Plans {
    /// Tables named outright.
    Exact(HashMap<Arc<str>, Arc<TablePlan>>),
    /// Tables by glob, found as they appear.
    Globs {
        /// Asked once for each table.
        resolve: Resolve,
        /// What it said.
        known: Mutex<HashMap<Arc<str>, Option<Arc<TablePlan>>>>,
    },
}

impl fmt::Debug for Plans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(plans) => f.debug_map().entries(plans).finish(),
            Self::Globs { .. } => f.write_str("Globs"),
        }
    }
}

impl Plans {
    /// The plan for a table's events; None: not for this group.
    #[must_use]
    pub fn of(&self, table: &Arc<str>) -> Option<Arc<TablePlan>> {
        match self {
            Self::Exact(plans) => plans.get(table).cloned(),
            Self::Globs { resolve, known } => {
                let mut known = known.lock();
                if let Some(plan) = known.get(table) {
                    return plan.clone();
                }
                if known.len() >= MAX_REMEMBERED_PLANS {
                    known.clear();
                }
                let plan = resolve(table);
                known.insert(Arc::clone(table), plan.clone());
                plan
            }
        }
    }

    /// Why a subscription cannot go on after `event`; None: it can. Globs take tables as they are.
    #[must_use]
    pub fn broken_by(&self, event: &Event) -> Option<(ResyncReason, String)> {
        let Self::Exact(plans) = self else { return None };
        if event.operation != Operation::Schema {
            return None;
        }
        let plan = plans.get(&event.table)?;
        let body = Row::parse(std::str::from_utf8(&event.body).ok()?).ok()?;
        broken_by(plan, body.get("after")?)
    }

    /// Forgets what was resolved: a table's shape has changed.
    pub fn forget(&self) {
        if let Self::Globs { known, .. } = self {
            known.lock().clear();
        }
    }
}

/// Wakes one session, however many of its groups have news.
#[derive(Debug, Default)]
pub struct Signal {
    waker: AtomicWaker,
}

impl Signal {
    /// Registers who is to be woken. Register first, then look for news.
    pub fn register(&self, waker: &std::task::Waker) {
        self.waker.register(waker);
    }

    /// Wakes.
    pub fn wake(&self) {
        self.waker.wake();
    }
}

#[derive(Debug)]
struct Live {
    frames: VecDeque<Arc<Frame>>,
    bytes: usize,
    // Everything that matches after this position is in `frames`.
    floor: Seq,
    listeners: Vec<Arc<Signal>>,
}

/// That and why a subscription cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What comes after this is not for it any more.
    pub seq: Seq,
    /// Why.
    pub reason: ResyncReason,
    /// Why, in words.
    pub message: String,
}

/// Everyone with the same subscription.
#[derive(Debug)]
pub struct Group {
    /// What makes subscriptions the same.
    pub key: Arc<str>,
    /// The subscription's id: part of its frames' bytes.
    pub id: Arc<str>,
    /// What it is shown.
    pub plans: Plans,
    live: Mutex<Live>,
    newest: AtomicU64,
    ended: OnceLock<Arc<Ended>>,
}

/// What a group has after a position.
#[derive(Debug)]
pub enum Held {
    /// The next frame.
    Frame(Arc<Frame>),
    /// Nothing that matches.
    Nothing,
    /// The position is older than, or inside, what is held: read the events themselves.
    Behind,
}

impl Group {
    /// A group whose frames begin after `floor`.
    #[must_use]
    pub fn new(key: Arc<str>, id: Arc<str>, plans: Plans, floor: Seq) -> Self {
        let live = Live { frames: VecDeque::new(), bytes: 0, floor, listeners: Vec::new() };
        Self { key, id, plans, live: Mutex::new(live), newest: AtomicU64::new(floor), ended: OnceLock::new() }
    }

    /// Ends it: whoever has everything up to there is to be told why. The first end counts. Wakes everyone.
    pub fn end(&self, ended: Ended) {
        let _ = self.ended.set(Arc::new(ended));
        self.wake_all();
    }

    /// Where and why it ended.
    #[must_use]
    pub fn ended(&self) -> Option<&Arc<Ended>> {
        self.ended.get()
    }

    /// Tells `signal` of news from now on.
    pub fn listen(&self, signal: &Arc<Signal>) {
        self.live.lock().listeners.push(Arc::clone(signal));
    }

    /// Stops telling; true when nobody listens any more.
    pub fn unlisten(&self, signal: &Arc<Signal>) -> bool {
        let mut live = self.live.lock();
        if let Some(index) = live.listeners.iter().position(|listener| Arc::ptr_eq(listener, signal)) {
            live.listeners.swap_remove(index);
        }
        live.listeners.is_empty()
    }

    /// The position after the newest frame: a cheap way to see that there is nothing new.
    #[must_use]
    pub fn newest(&self) -> Seq {
        self.newest.load(Ordering::Acquire)
    }

    /// What comes after `after`.
    #[must_use]
    pub fn held(&self, after: Seq) -> Held {
        let live = self.live.lock();
        if after < live.floor {
            return Held::Behind;
        }
        let index = live.frames.partition_point(|frame| frame.through <= after);
        match live.frames.get(index) {
            None => Held::Nothing,
            Some(frame) if frame.first > after => Held::Frame(Arc::clone(frame)),
            Some(_) => Held::Behind,
        }
    }

    /// Takes new frames. Wakes nobody: that comes after the edge is moved ([`Group::wake_all`]), else a session could look
    /// in between, find itself at the old edge, and sleep on.
    pub fn publish(&self, frames: Vec<Frame>) {
        let mut live = self.live.lock();
        for frame in frames {
            self.newest.store(frame.through, Ordering::Release);
            live.bytes += frame.body.len();
            live.frames.push_back(Arc::new(frame));
        }
        while live.bytes > GROUP_BYTES && live.frames.len() > 1 {
            if let Some(old) = live.frames.pop_front() {
                live.bytes -= old.body.len();
                live.floor = old.through;
            }
        }
    }

    /// Lets go of the frames up to `floor`; whoever is still there reads the ring. Gives the memory of those that stay, bytes.
    pub fn age(&self, floor: Seq) -> usize {
        let mut live = self.live.lock();
        while let Some(old) = live.frames.pop_front_if(|frame| frame.through <= floor) {
            live.bytes -= old.body.len();
            live.floor = old.through;
        }
        live.bytes
    }

    /// Forgets all frames: what follows begins after `floor`. Wakes nobody, as [`Group::publish`].
    pub fn reset(&self, floor: Seq) {
        let mut live = self.live.lock();
        live.frames.clear();
        live.bytes = 0;
        live.floor = floor;
        self.newest.store(floor, Ordering::Release);
        self.plans.forget();
    }

    /// Wakes everyone, to look at something else than frames.
    pub fn wake_all(&self) {
        for listener in &self.live.lock().listeners {
            listener.wake();
        }
    }
}

/// A walk over consecutive events: where frames may end.
#[derive(Debug)]
pub struct Span<'a> {
    epochs: &'a Epochs,
    boundary: (Seq, Uuid),
    previous: (Seq, Uuid),
}

impl<'a> Span<'a> {
    /// Before the first event.
    #[must_use]
    pub const fn new(epochs: &'a Epochs) -> Self {
        Self { epochs, boundary: (0, Uuid::nil()), previous: (0, Uuid::nil()) }
    }

    /// After an event.
    pub const fn pass(&mut self, event: &Event) {
        self.previous = (event.seq, event.id);
        if event.tx_end {
            self.boundary = self.previous;
        }
    }

    fn cursor(&self, (seq, id): (Seq, Uuid)) -> Cursor {
        Cursor::at(self.epochs.of(seq), seq, id)
    }
}

/// Collects one group's frames from consecutive events.
#[derive(Debug, Default)]
pub struct Assembly {
    frames: Vec<Frame>,
    body: Vec<u8>,
    count: usize,
    first: Seq,
    last: Option<(Seq, u64)>,
    // Where the newest transaction begins in the body.
    transaction: Mark,
}

/// A place between two events of a frame's body.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    // Of the comma; 0 is the body's beginning.
    at: usize,
    // Events before it.
    count: usize,
    // The seq after it.
    first: Seq,
}

impl Assembly {
    /// Adds `event` if it is shown; an event that was looked at already is not looked at again. `frame_bytes` is the
    /// protocol's limit of a frame.
    pub fn add(&mut self, plans: &Plans, event: &Event, span: &Span<'_>, frame_bytes: usize) {
        if self.last.is_some_and(|(seq, _)| seq == event.seq) {
            return;
        }
        let Some(plan) = plans.of(&event.table) else { return };
        let begin = self.body.len();
        if begin > 0 {
            self.body.push(b',');
        }
        if !plan.render(event, &mut self.body) {
            self.body.truncate(begin);
            return;
        }
        let inside = self.last.is_some_and(|(_, xid)| xid == event.xid);
        let mut here = Mark { at: begin, count: self.count, first: event.seq };
        if !inside {
            self.transaction = here;
        }
        if self.count == 0 {
            self.first = event.seq;
        }
        self.count += 1;
        self.last = Some((event.seq, event.xid));
        let before = self.transaction;
        if before.at > 0 && (self.body.len() > frame_bytes || (!inside && begin >= FRAME_TARGET_BYTES)) {
            self.split(before, span.cursor(span.boundary), false);
            here.at = here.at.saturating_sub(before.at + 1);
            here.count -= before.count;
        }
        // Only a transaction larger than a frame is cut inside.
        if inside && here.at > 0 && self.body.len() > frame_bytes {
            self.split(here, span.cursor(span.previous), true);
        }
    }

    /// Makes a frame of what is before `mark`.
    fn split(&mut self, mark: Mark, cursor: Cursor, open: bool) {
        let (rest, after) = (self.body.split_off(mark.at + 1), self.count - mark.count);
        self.body.truncate(mark.at);
        self.count = mark.count;
        self.cut(cursor, open);
        (self.body, self.count, self.first) = (rest, after, mark.first);
        self.transaction = Mark::default();
    }

    fn cut(&mut self, cursor: Cursor, open: bool) {
        if self.count == 0 {
            return;
        }
        self.frames.push(Frame {
            first: self.first,
            through: cursor.seq,
            cursor,
            count: std::mem::take(&mut self.count),
            open,
            body: std::mem::take(&mut self.body).into(),
            message: OnceLock::new(),
        });
    }

    /// The first frame, once it is complete.
    pub fn take_first(&mut self) -> Option<Frame> {
        (!self.frames.is_empty()).then(|| self.frames.swap_remove(0))
    }

    /// Ends at `end`, the position after the last event that was looked at.
    #[must_use]
    pub fn finish(mut self, end: Cursor, open: bool) -> Vec<Frame> {
        self.cut(end, open);
        self.frames
    }
}
