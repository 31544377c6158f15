//! A group: everyone on this node whose subscriptions are the same. Its frames are rendered once and shared.
//!
//! A group keeps its newest frames within a byte bound, and all groups together within another. Whoever has fallen behind
//! them reads the ring, then the log, by its own position; nothing is queued for anyone.
//!
//! A group may be passed over ([`Group::pass_over`]): what it would have got of some events is too dear to be found out
//! where everybody waits. There are then no frames of those events, so that each of its readers that comes to them is
//! `Behind` and looks at the events itself, until it is past them and takes frames again. What one of them finds is kept
//! for the others, who stand at the same position ([`Group::found`]).

mod assembly;
mod frame;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use futures_util::lock::Mutex as Turns;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

pub use self::assembly::{Assembly, FRAME_TARGET_BYTES, Span};
pub use self::frame::Frame;
use crate::cursor::{Cursor, Seq};
use crate::event::row::Row;
use crate::event::{Event, Operation};
use crate::hub::plan::TablePlan;
use crate::hub::shape::broken_by;
use crate::protocol::message::ResyncReason;

/// Memory of the frames that a group keeps for those a little behind, bytes.
pub const GROUP_BYTES: usize = 1 << 20;
/// Answers that readers at their own pace keep for those beside them. What a group was passed over for is some ten frames,
/// which its fastest reader goes through before the slowest begins.
const KEPT_ANSWERS: usize = 32;
/// Memory of these, bytes: as much as of frames, one frame at least.
const ANSWER_BYTES: usize = GROUP_BYTES;
/// Tables that a glob's memory of plans may hold; beyond, it is begun anew.
const MAX_REMEMBERED_PLANS: usize = 10_000;

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
    // Everything that matches after this position is in `frames`, but for what `passed_over` says.
    floor: Seq,
    // The newest stretch that the group was passed over for, after the first and through the second position. There is no
    // frame of it; older ones are from before, newer ones from after it.
    passed_over: (Seq, Seq),
    // What readers at their own pace have found, oldest first.
    found: VecDeque<(Place, Found)>,
    listeners: Vec<Arc<Signal>>,
}

/// Where a reader at its own pace stands: the hub's generation, and its position.
pub type Place = (u64, Seq);

/// What it finds there.
#[derive(Clone, Debug)]
pub enum Found {
    /// A frame.
    Frame(Arc<Frame>),
    /// Nothing up to this position.
    Nothing(Cursor),
    /// The transaction that comes next, up to here at least, takes longer than any may.
    TooExpensive(Seq),
}

impl Found {
    /// The end of what was looked at.
    pub(super) fn through(&self) -> Seq {
        match self {
            Self::Frame(frame) => frame.through,
            Self::Nothing(cursor) => cursor.seq,
            Self::TooExpensive(seq) => *seq,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Frame(frame) => frame.body.len(),
            Self::Nothing(_) | Self::TooExpensive(_) => 0,
        }
    }
}

impl Live {
    fn let_go_of_oldest(&mut self) {
        if let Some(old) = self.frames.pop_front() {
            self.bytes -= old.body.len();
            self.floor = old.through;
        }
    }
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
    /// What it is shown.
    pub plans: Plans,
    /// Held by the one who looks for what comes next at its own pace, while others wait for what it finds.
    pub turns: Turns<()>,
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
    pub fn new(key: Arc<str>, plans: Plans, floor: Seq) -> Self {
        let (frames, found) = (VecDeque::new(), VecDeque::new());
        let passed_over = (floor, floor);
        let live = Mutex::new(Live { frames, bytes: 0, floor, passed_over, found, listeners: Vec::new() });
        let (turns, newest, ended) = (Turns::new(()), AtomicU64::new(floor), OnceLock::new());
        Self { key, plans, turns, live, newest, ended }
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
        let (_, through) = live.passed_over;
        match live.frames.get(index) {
            Some(frame) if frame.first > through && after < through => Held::Behind,
            None if after < through => Held::Behind,
            None => Held::Nothing,
            Some(frame) if frame.first > after => Held::Frame(Arc::clone(frame)),
            Some(_) => Held::Behind,
        }
    }

    /// Takes new frames; what they hold counts in `kept`. Wakes nobody: that comes after the edge is moved
    /// ([`Group::wake_all`]), else a session could look in between, find itself at the old edge, and sleep on.
    pub fn publish(&self, frames: Vec<Frame>, kept: &Arc<AtomicUsize>) {
        let mut live = self.live.lock();
        for frame in frames {
            self.newest.store(frame.through, Ordering::Release);
            live.bytes += frame.body.len();
            frame.count(kept);
            live.frames.push_back(Arc::new(frame));
        }
        while live.bytes > GROUP_BYTES && live.frames.len() > 1 {
            live.let_go_of_oldest();
        }
    }

    /// It has nothing of the events after `after` and through `through`: its readers look at them themselves. Those who are
    /// further back still find the frames from before. Wakes nobody, as [`Group::publish`].
    pub fn pass_over(&self, after: Seq, through: Seq) {
        let mut live = self.live.lock();
        let (begin, end) = live.passed_over;
        if end < after {
            // One stretch is remembered: what lies behind the one before goes.
            while live.frames.front().is_some_and(|frame| frame.through <= end) {
                live.let_go_of_oldest();
            }
            live.floor = live.floor.max(end);
            live.passed_over = (after, through);
        } else {
            live.passed_over = (begin, through.max(end));
        }
        self.newest.fetch_max(through, Ordering::AcqRel);
    }

    /// What somebody at this place has found.
    #[must_use]
    pub fn found(&self, place: Place) -> Option<Found> {
        self.live.lock().found.iter().find(|(at, _)| *at == place).map(|(_, found)| found.clone())
    }

    /// How many listen.
    #[must_use]
    pub fn listeners(&self) -> usize {
        self.live.lock().listeners.len()
    }

    /// Keeps what was found at `place` for whoever comes there; a frame counts in `kept`. False: it has that already.
    pub fn keep(&self, place: Place, found: Found, kept: &Arc<AtomicUsize>) -> bool {
        let mut live = self.live.lock();
        if live.found.iter().any(|(at, _)| *at == place) {
            return false;
        }
        if let Found::Frame(frame) = &found {
            frame.count(kept);
        }
        live.found.push_back((place, found));
        let mut bytes: usize = live.found.iter().map(|(_, found)| found.bytes()).sum();
        while live.found.len() > KEPT_ANSWERS || bytes > ANSWER_BYTES && live.found.len() > 1 {
            let Some((_, old)) = live.found.pop_front() else { break };
            bytes -= old.bytes();
        }
        true
    }

    /// Lets go of the frames up to `floor`; whoever is still there reads the ring. True when there were any.
    pub fn age(&self, floor: Seq) -> bool {
        let mut live = self.live.lock();
        let before = live.frames.len() + live.found.len();
        while live.frames.front().is_some_and(|frame| frame.through <= floor) {
            live.let_go_of_oldest();
        }
        live.found.retain(|(_, found)| found.through() > floor);
        live.frames.len() + live.found.len() < before
    }

    /// Forgets all frames: what follows begins after `floor`. Wakes nobody, as [`Group::publish`].
    pub fn reset(&self, floor: Seq) {
        let mut live = self.live.lock();
        live.frames.clear();
        live.found.clear();
        live.bytes = 0;
        (live.floor, live.passed_over) = (floor, (floor, floor));
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
