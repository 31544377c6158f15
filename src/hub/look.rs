//! Looking at events for one group, one after the other, until there is an answer: what comes next for its readers.
//!
//! The same walk serves a reader that catches up and one whose group was passed over. What is cheap is done at once; what
//! is dear is done in slices, in a thread, between which others get theirs. A look can be left at any time: its reader's
//! position has not moved.

mod origin;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use self::origin::Desk;
#[cfg(test)]
pub(super) use self::origin::SEATS;
pub(super) use self::origin::{Origin, seats};
use super::group::{Assembly, Ended, FRAME_TARGET_BYTES, Found, Frame, Group, Place, Span};
use super::plan::Opened;
use super::ring::Whole;
use super::thread_time::ThreadTime;
use super::{Hub, Pull};
use crate::event::Event;
use crate::telemetry::metrics::Metrics;

/// A look that may cost more, in bytes read, is not done in a session's own task: some milliseconds.
const TASK_COST: usize = 4 << 20;
/// One turn of a thread. After it others get theirs, and a look that stands between transactions says what it has.
const SLICE: Duration = Duration::from_millis(50);
/// Processor time for one transaction, which is told whole or not at all; beyond, it is too expensive. A condition of the
/// greatest length takes some seconds for a row of 8 MB, unless it is made to be slow.
const TRANSACTION_LIMIT: Duration = Duration::from_secs(10);

/// Turns of threads: half the processors are for those who wait for what is cheap.
pub(super) fn threads() -> Arc<Semaphore> {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Arc::new(Semaphore::new((processors / 2).max(1)))
}

/// Whether looking at `whole` may take long, as far as its size tells.
pub(super) fn is_dear(group: &Group, whole: &Whole) -> bool {
    let (mut cost, mut shown) = (0_usize, 0);
    for event in &whole.events {
        let Some(plan) = group.plans.of(&event.table) else { continue };
        let bound = plan.bound(event);
        cost = cost.saturating_add(bound.sum());
        if cost > TASK_COST {
            return true;
        }
        // What is shown for certain fills a frame, and there the look ends.
        if bound.conditions == 0 {
            shown += event.body.len();
        }
        if shown > FRAME_TARGET_BYTES && event.tx_end {
            return false;
        }
    }
    false
}

/// A look at some events. `next` is where it stands.
#[derive(Debug)]
pub struct Look {
    hub: Arc<Hub>,
    group: Arc<Group>,
    desk: Desk,
    place: Place,
    next: usize,
    span: Span,
    assembly: Assembly,
    spent: Duration,
    limit: Duration,
}

/// What a slice has come to.
#[derive(Debug)]
pub enum Worked {
    /// The answer.
    Done(Pull),
    /// There is more to look at.
    More,
    /// One transaction takes longer than it may.
    TooExpensive,
    /// The one who asked is gone.
    Cancelled,
}

impl Look {
    pub(super) fn new(hub: &Arc<Hub>, group: &Arc<Group>, whole: Whole, place: Place, origin: Origin) -> Self {
        let epochs = hub.epochs.read().clone();
        let (hub, group, span) = (Arc::clone(hub), Arc::clone(group), Span::new(epochs));
        let (desk, assembly, spent) = (Desk::new(whole, origin), Assembly::default(), Duration::ZERO);
        Self { hub, group, desk, place, next: 0, span, assembly, spent, limit: TRANSACTION_LIMIT }
    }

    /// Looks in a thread, slice after slice, each of which waits for its turn among all of the node. Gives the processor
    /// time that it took; none where another reader of the group had the answer. It must be polled whatever its asker waits for,
    /// since others of the group may wait for it. It may be dropped where it waits; a slice ends soon after `gone` is set.
    pub async fn run(mut self: Box<Self>, gone: Arc<AtomicBool>) -> (Worked, Duration) {
        let (hub, group) = (Arc::clone(&self.hub), Arc::clone(&self.group));
        let waiting = Waiting::begin(&hub.metrics);
        let _turn = match group.turns.try_lock() {
            Some(turn) => turn,
            None => {
                self.desk.let_go();
                group.turns.lock().await
            }
        };
        if let Some(worked) = self.known() {
            return (worked, Duration::ZERO);
        }
        if !self.desk.sit_down(&hub, self.place).await {
            return (Worked::More, Duration::ZERO);
        }
        drop(waiting);
        let mut took = Duration::ZERO;
        loop {
            let waiting = Waiting::begin(&hub.metrics);
            let permit = Arc::clone(&hub.lookers).acquire_owned().await;
            let Some(permit) = permit.ok().filter(|_| !gone.load(Ordering::Relaxed)) else {
                return (Worked::Cancelled, took);
            };
            drop(waiting);
            let cancelled = Arc::clone(&gone);
            let slice = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                let time = ThreadTime::begin();
                let worked = self.work(&cancelled);
                (self, worked, time.elapsed())
            });
            let Ok((look, worked, time)) = slice.await else { return (Worked::Cancelled, took + SLICE) };
            self = look;
            took += time;
            hub.metrics.filter_thread_ms_total.inc_by(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
            if !matches!(worked, Worked::More) {
                return (worked, took);
            }
        }
    }

    /// What another reader of the group has come to.
    fn known(&self) -> Option<Worked> {
        Some(match self.group.found(self.place)? {
            Found::Frame(frame) => Worked::Done(Pull::Frame(frame)),
            Found::Nothing(cursor) => Worked::Done(Pull::Nothing(cursor)),
            Found::TooExpensive(_) => Worked::TooExpensive,
        })
    }

    /// Looks at everything, here and now, unless another reader of the group has.
    pub(super) fn finish(&mut self) -> Pull {
        if let Some(Worked::Done(pull)) = self.known() {
            return pull;
        }
        loop {
            if let Some(pull) = self.step(None) {
                self.keep(&pull);
                return pull;
            }
        }
    }

    /// Works for one slice; a condition that takes long is left as soon as `cancelled`. Blocks its thread.
    pub(super) fn work(&mut self, cancelled: &AtomicBool) -> Worked {
        let (began, time) = (Instant::now(), ThreadTime::begin());
        let left = self.limit.saturating_sub(self.spent);
        let over = move || cancelled.load(Ordering::Relaxed) || time.exceeds(left);
        loop {
            let answer = self.step(Some(&over));
            if cancelled.load(Ordering::Relaxed) {
                return Worked::Cancelled;
            }
            if over() {
                let seq = self.desk.whole.events.get(self.next).map_or(self.place.1, |event| event.seq);
                self.hub.keep(&self.group, self.place, Found::TooExpensive(seq));
                return Worked::TooExpensive;
            }
            if let Some(pull) = answer {
                self.keep(&pull);
                return Worked::Done(pull);
            }
            if began.elapsed() < SLICE {
                continue;
            }
            if self.passed().is_some_and(|event| event.tx_end) {
                let pull = self.answer();
                self.keep(&pull);
                return Worked::Done(pull);
            }
            self.spent += time.elapsed();
            return Worked::More;
        }
    }

    /// As [`Look::run`], without threads.
    #[cfg(test)]
    pub(super) fn at_once(mut self) -> Pull {
        if let Some(Worked::Done(pull)) = self.known() {
            return pull;
        }
        loop {
            match self.work(&AtomicBool::new(false)) {
                Worked::Done(pull) => return pull,
                Worked::More => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// As if a transaction might take no longer than this.
    #[cfg(test)]
    pub(super) fn limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    fn keep(&self, pull: &Pull) {
        let found = match pull {
            Pull::Frame(frame) => Found::Frame(Arc::clone(frame)),
            Pull::Nothing(cursor) => Found::Nothing(*cursor),
            _ => return,
        };
        self.hub.keep(&self.group, self.place, found);
    }

    fn passed(&self) -> Option<&Event> {
        self.desk.whole.events.get(self.next.checked_sub(1)?)
    }

    /// Looks at one event; the answer, once there is one.
    pub(super) fn step(&mut self, stop: Option<&dyn Fn() -> bool>) -> Option<Pull> {
        let Some(event) = self.desk.whole.events.get(self.next) else { return Some(self.answer()) };
        if let Some(ended) = ended_before(&self.group, event) {
            return Some(if self.next == 0 { Pull::Ended(ended) } else { self.answer() });
        }
        if let Some(plan) = self.group.plans.of(&event.table) {
            let opened = match stop {
                Some(stop) => Opened::stopped_by(event, stop),
                None => Opened::new(event),
            };
            self.assembly.add(&plan, &opened, &self.span, self.hub.options.frame_bytes);
        }
        self.span.pass(event);
        self.next += 1;
        self.assembly.first().map(framed)
    }

    /// What the events looked at so far come to.
    fn answer(&mut self) -> Pull {
        let Some(last) = self.passed() else { return Pull::Idle(self.hub.edge()) };
        let (end, open) = (self.span.after(last), !last.tx_end);
        match std::mem::take(&mut self.assembly).finish(end, open).into_iter().next() {
            Some(frame) => framed(frame),
            None => Pull::Nothing(end),
        }
    }
}

/// A look that waits for its turn, a seat or a thread.
struct Waiting<'a>(&'a Metrics, Instant);

impl<'a> Waiting<'a> {
    fn begin(metrics: &'a Metrics) -> Self {
        metrics.looks_waiting.inc();
        Self(metrics, Instant::now())
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.looks_waiting.dec();
        self.0.look_wait_ms_total.inc_by(u64::try_from(self.1.elapsed().as_millis()).unwrap_or(u64::MAX));
    }
}

/// The one who waits for a look; dropping it ends the look.
#[derive(Debug, Default)]
pub struct Asker(Arc<AtomicBool>);

impl Asker {
    /// Set once it is gone.
    #[must_use]
    pub fn gone(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn framed(frame: Frame) -> Pull {
    Pull::Frame(Arc::new(frame))
}

/// Whether `event` is beyond a subscription's end, be it its group's or, for one that catches up, that of the table as it
/// was: its plan fits only what came after.
fn ended_before(group: &Group, event: &Event) -> Option<Arc<Ended>> {
    if let Some(ended) = group.ended().filter(|ended| ended.seq < event.seq) {
        return Some(Arc::clone(ended));
    }
    let (reason, message) = group.plans.broken_by(event)?;
    Some(Arc::new(Ended { seq: event.seq - 1, reason, message }))
}
