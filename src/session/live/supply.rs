//! What a session's subscriptions have for it: from their groups, or from the log where those have moved on.

use std::sync::Arc;
use std::task::Context as TaskContext;
use std::time::{Duration, Instant};

use super::{Done, Emit, Place, Session};
use crate::cursor::Cursor;
use crate::failpoint;
use crate::hub::group::Found;
use crate::hub::pages::{Left, Page};
use crate::hub::{Edge, Hub, Pull};
use crate::mutant::{self, Mutant};
use crate::protocol::message::ResyncReason;
use crate::session::start;

/// Wait before the log is read again after a failure.
const LOG_RETRY: Duration = Duration::from_millis(500);
/// What one turn of a session skips (events that are not for it) before others get theirs.
const SKIPS_A_TURN: usize = 16;

impl Session {
    /// What comes next for any subscription, in turns.
    pub(super) fn next_events(&mut self, task: &TaskContext<'_>) -> Next {
        let mut skips = 0;
        // A look that begins moves the turn: this round goes on from where it began, or it would pass over somebody.
        let (begin, count) = (self.turn, self.places.len());
        for offset in 0..count {
            let index = (begin + offset) % count;
            loop {
                match self.next_of(index) {
                    Step::Emit(emit) => {
                        self.turn = (index + 1) % count;
                        return Next::Emit(emit);
                    }
                    Step::Said | Step::Begun => return Next::Again,
                    Step::Skipped if skips < SKIPS_A_TURN => skips += 1,
                    Step::Skipped => {
                        task.waker().wake_by_ref();
                        return Next::Nothing;
                    }
                    Step::Nothing => break,
                }
            }
        }
        Next::Nothing
    }

    fn next_of(&mut self, index: usize) -> Step {
        let now = Instant::now();
        let edge = self.context.hub.edge();
        let Some(place) = self.places.get_mut(index) else { return Step::Nothing };
        if place.generation != edge.generation {
            if edge.held {
                // Judged when the hold ends, which wakes it; until then nothing of the changed log counts.
                return Step::Nothing;
            }
            let before = std::mem::replace(&mut place.generation, edge.generation);
            return self.judge_anew(index, before).unwrap_or(Step::Skipped);
        }
        let waits = place.dear && self.looking && place.found.is_none();
        if place.reading || place.suspended || waits {
            return Step::Nothing;
        }
        if place.page.is_none() {
            place.page = place.left.again(place.passed);
        }
        if mutant::is(Mutant::ProgressTooEarly) {
            self.machine.reached(now, &place.id, edge.boundary);
        }
        let found = if edge.held { None } else { place.found.take() };
        let pull = match found {
            Some(pull) => pull,
            None if place.page.is_none() || edge.held => place.tap.pull(place.passed),
            None => self.pull_page(index),
        };
        if self.context.hub.edge().generation != edge.generation {
            // The log changed while this was taken from it: it may be half of the one and half of the other.
            return Step::Skipped;
        }
        let Some(place) = self.places.get_mut(index) else { return Step::Nothing };
        match pull {
            Pull::Frame(frame) => {
                place.passed = frame.through;
                place.let_go_of_passed();
                let Some(prev) = self.machine.events(now, &place.id, frame.cursor, frame.open) else {
                    return Step::Skipped;
                };
                self.context.metrics.events_delivered_total.inc_by(frame.count as u64);
                self.context.metrics.frames_delivered_total.inc();
                Step::Emit(Emit::Events { id: Arc::clone(&place.id), prev, frame })
            }
            Pull::Nothing(cursor) => {
                place.passed = cursor.seq;
                place.let_go_of_passed();
                self.machine.passed(&place.id, cursor.seq);
                Step::Skipped
            }
            Pull::Dear(look) => self.look(index, look, now),
            Pull::Idle(edge) => self.idle(index, edge.held, edge.boundary, now),
            Pull::Log if mutant::is(Mutant::HistoryIsSkipped) => {
                place.passed = edge.deliverable.seq;
                Step::Skipped
            }
            Pull::Log => {
                self.read_log(index, edge);
                // Look again: what was just begun must be polled once, or nothing would wake us when it is done.
                Step::Begun
            }
            Pull::Ended(ended) => {
                let id = place.id.to_string();
                self.machine.resync(start::resync(&self.context, id, ended.reason, ended.message.clone()));
                Step::Said
            }
        }
    }

    /// Everything that this node can deliver has been delivered.
    fn idle(&mut self, index: usize, held: bool, boundary: Cursor, now: Instant) -> Step {
        let Some(place) = self.places.get_mut(index) else { return Step::Nothing };
        // Whoever waits for news holds no memory.
        place.page = None;
        if !held {
            (place.fell_back, place.dear, place.over) = (false, false, None);
            place.passed = place.passed.max(boundary.seq);
            let id = Arc::clone(&place.id);
            self.machine.reached(now, &id, boundary);
        }
        Step::Nothing
    }

    /// The log has a new epoch: does the position still belong to it?
    fn judge_anew(&mut self, index: usize, before: u64) -> Option<Step> {
        let place = self.places.get_mut(index)?;
        (place.page, place.left, place.found) = (None, Left::default(), None);
        let position = self.machine.position(&place.id)?;
        let epochs = self.context.hub.epochs();
        // An epoch that is no more was lost with its tail.
        let diverged = self.context.hub.replaced_since(before) || epochs.admit(&position).is_err();
        let diverged = diverged && !mutant::is(Mutant::DivergedNotTold);
        if diverged || mutant::is(Mutant::ResyncEverybody) {
            let what = "the database was rewound to before this position; what came after it never happened";
            let id = place.id.to_string();
            self.machine.resync(start::resync(&self.context, id, ResyncReason::HistoryDiverged, what.to_owned()));
            return Some(Step::Said);
        }
        // What was passed over silently beyond the cut did not happen either.
        place.passed = position.seq;
        self.machine.rewound(&place.id);
        None
    }

    fn pull_page(&mut self, index: usize) -> Pull {
        let edge = self.context.hub.edge();
        let Some(place) = self.places.get_mut(index) else { return Pull::Idle(edge) };
        let Some(page) = place.page.as_ref() else { return Pull::Idle(edge) };
        let (at, pages) = ((place.generation, place.passed), &self.context.pages);
        let pulled = self.context.hub.pull_page(place.tap.group(), page, pages, at);
        // Nothing whole: a page from here on has it, or nobody has.
        let all = page.last().is_some_and(|last| last.seq >= edge.deliverable.seq);
        pulled.unwrap_or(if all { Pull::Idle(edge) } else { Pull::Log })
    }

    fn read_log(&mut self, index: usize, edge: Edge) {
        let Some(place) = self.places.get_mut(index) else { return };
        if !std::mem::replace(&mut place.fell_back, true) {
            self.context.metrics.fallbacks_total.with_label_values(&["log"]).inc();
        }
        place.reading = true;
        // Nobody holds one page while it waits for another, and this one has nothing more for it.
        (place.page, place.left) = (None, Left::default());
        let after = place.passed;
        let (context, id) = (Arc::clone(&self.context), Arc::clone(&place.id));
        self.work.push(Box::pin(async move {
            let page = match failpoint::hit("resume.page").await {
                Ok(()) => context.pages.following(after, edge.deliverable.seq, edge.generation).await.map_err(|_| ()),
                Err(_) => Err(()),
            };
            if page.is_err() {
                // Postgres is away: the socket stays, the position waits.
                tokio::time::sleep(LOG_RETRY).await;
            }
            Done::Page(id, edge.generation, page)
        }));
    }

    pub(super) fn page_read(&mut self, id: &Arc<str>, generation: u64, page: Result<Page, ()>) {
        // By pointer: a later subscription of the same id is not the one that asked.
        let Some(place) = self.places.iter_mut().find(|place| Arc::ptr_eq(&place.id, id)) else { return };
        place.reading = false;
        // A page of the log as it was before a new epoch may hold a tail that is lost.
        let Some(page) = page.ok().filter(|_| generation == place.generation) else { return };
        let have = place.passed;
        let loses_one = mutant::is(Mutant::PageLosesOne) && page.len() > 2;
        let page = if loses_one { Arc::new(page.without(page.len() / 2)) } else { page };
        match page.iter().find(|event| event.seq > have) {
            Some(first) if first.seq == have + 1 => place.page = Some(page),
            Some(_) => {
                let what = "the position left the log while the client was connected: read the state anew";
                let id = id.to_string();
                self.machine.resync(start::resync(&self.context, id, ResyncReason::TooFarBehind, what.to_owned()));
            }
            None if self.context.hub.log_oldest().is_some_and(|oldest| have + 1 < oldest) => {
                let what = "the position left the log while the client was connected: read the state anew";
                let id = id.to_string();
                self.machine.resync(start::resync(&self.context, id, ResyncReason::TooFarBehind, what.to_owned()));
            }
            // Dropped by retention, and this node does not know it yet. Not again at once: the answer is remembered.
            None => {
                place.reading = true;
                let id = Arc::clone(id);
                self.work.push(Box::pin(async move {
                    tokio::time::sleep(LOG_RETRY).await;
                    Done::Page(id, generation, Err(()))
                }));
            }
        }
    }
}

impl Place {
    /// Others may need its memory meanwhile.
    pub(super) fn let_go_of_page(&mut self) {
        if let Some(page) = self.page.take() {
            self.left = Left::of(&page);
        }
    }

    /// Leaves what was found with the group: nobody reads at the moment.
    pub(super) fn leave(&self, hub: &Hub, found: Pull) {
        let found = match found {
            Pull::Frame(frame) => Found::Frame(frame),
            Pull::Nothing(cursor) => Found::Nothing(cursor),
            _ => return,
        };
        hub.leave(self.tap.group(), (self.generation, self.passed), found);
    }

    fn let_go_of_passed(&mut self) {
        let passed = self.passed;
        self.page.take_if(|page| page.last().is_none_or(|last| last.seq <= passed));
    }
}

/// What one subscription has.
pub(super) enum Step {
    Emit(Emit),
    // The machine has something to say, or work was begun.
    Said,
    Begun,
    Skipped,
    Nothing,
}

/// What all subscriptions have.
pub(super) enum Next {
    Emit(Emit),
    Again,
    Nothing,
}
