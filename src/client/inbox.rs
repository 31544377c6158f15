//! The bounded queue between the connection's task and one subscription, and the two positions that matter.
//!
//! *Handed out* is where the application has got to see; a lost connection is resumed from there, and what was queued
//! behind it is thrown away and asked for again. *Handled* is where the application is done; that is the position to
//! keep on disk. Taking an item and moving the mark is one critical section, so a resume can neither lose nor repeat
//! the item that is being taken.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::client::delivery::Delivery;
use crate::cursor::Cursor;

/// Deliveries that may wait; beyond it the connection is not read.
const MAX_QUEUED: usize = 256;
/// Bytes of frames that may wait. One frame more may be in the queue, whatever its size.
const MAX_QUEUED_BYTES: usize = 4 * 1024 * 1024;

/// One subscription's queue; shared by the task and the `Subscription`.
#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    /// Rung when the task has something to look at: room again, or nobody reads any more.
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Delivery>,
    bytes: usize,
    handed_out: Option<Cursor>,
    handled: Option<Cursor>,
    waker: Option<Waker>,
    /// The last delivery is in the queue, or was taken.
    ended: bool,
    /// The subscription was dropped.
    abandoned: bool,
}

impl State {
    fn is_full(&self) -> bool {
        self.queue.len() >= MAX_QUEUED || self.bytes >= MAX_QUEUED_BYTES
    }
}

fn size(delivery: &Delivery) -> usize {
    match delivery {
        Delivery::Frame(frame) => frame.text().len(),
        _ => 0,
    }
}

impl Inbox {
    pub(super) fn new(changed: Arc<Notify>) -> Self {
        Self { state: Mutex::default(), changed }
    }

    /// Queues a delivery; whether the queue is full now.
    pub(super) fn push(&self, delivery: Delivery) -> bool {
        let mut state = self.state.lock();
        if state.ended || state.abandoned {
            return false;
        }
        state.ended = matches!(delivery, Delivery::Resync(_) | Delivery::End(_));
        // News that a later one of its kind outdates, so that silence and retries never fill the queue.
        let outdated = matches!(
            (state.queue.back(), &delivery),
            (Some(Delivery::Progress(_)), Delivery::Progress(_))
                | (Some(Delivery::Disconnected { .. }), Delivery::Disconnected { .. })
        );
        if outdated {
            state.queue.pop_back();
        }
        state.bytes += size(&delivery);
        state.queue.push_back(delivery);
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
        state.is_full()
    }

    /// Forgets what nobody has seen yet; the position to resume from.
    pub(super) fn rewind(&self) -> Option<Cursor> {
        let mut state = self.state.lock();
        if !state.ended {
            state.queue.clear();
            state.bytes = 0;
        }
        state.handed_out
    }

    /// Whether the task should stop reading.
    pub(super) fn is_full(&self) -> bool {
        let state = self.state.lock();
        !state.abandoned && state.is_full()
    }

    /// The subscription was dropped.
    pub(super) fn abandon(&self) {
        let mut state = self.state.lock();
        state.abandoned = true;
        state.queue.clear();
        state.bytes = 0;
        drop(state);
        self.changed.notify_one();
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.state.lock().abandoned
    }

    /// Takes the next delivery; asking for it says that the one before was handled. With the delivery comes the
    /// position before it. `None`: there will be none.
    pub(super) fn poll_take(&self, context: &mut Context<'_>) -> Poll<Option<(Delivery, Option<Cursor>)>> {
        let mut state = self.state.lock();
        state.handled = state.handed_out;
        let was_full = state.is_full();
        let Some(delivery) = state.queue.pop_front() else {
            if state.ended {
                return Poll::Ready(None);
            }
            if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                state.waker = Some(context.waker().clone());
            }
            return Poll::Pending;
        };
        state.bytes -= size(&delivery);
        let before = state.handed_out;
        match &delivery {
            Delivery::Started { cursor, .. } => {
                state.handed_out = Some(*cursor);
                state.handled = Some(*cursor);
            }
            Delivery::Frame(frame) => state.handed_out = Some(frame.cursor()),
            Delivery::CaughtUp(cursor) | Delivery::Progress(cursor) => state.handed_out = Some(*cursor),
            Delivery::Disconnected { .. } | Delivery::Resumed(_) | Delivery::Resync(_) | Delivery::End(_) => {}
        }
        let room = was_full && !state.is_full();
        drop(state);
        if room {
            self.changed.notify_one();
        }
        Poll::Ready(Some((delivery, before)))
    }

    /// Everything handed out is handled.
    pub(super) fn acknowledge(&self) {
        let mut state = self.state.lock();
        state.handled = state.handed_out;
    }

    /// The last position whose events were handled.
    pub(super) fn handled(&self) -> Option<Cursor> {
        self.state.lock().handled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::message::Source;

    fn cursor(seq: u64) -> Cursor {
        Cursor { epoch: 1, seq, check: 0 }
    }

    fn take(inbox: &Inbox) -> Option<Delivery> {
        let mut context = Context::from_waker(Waker::noop());
        match inbox.poll_take(&mut context) {
            Poll::Ready(delivery) => delivery.map(|delivery| delivery.0),
            Poll::Pending => None,
        }
    }

    fn started() -> Inbox {
        let inbox = Inbox::new(Arc::default());
        inbox.push(Delivery::Started { cursor: cursor(1), source: Source::Live });
        take(&inbox);
        inbox
    }

    #[test]
    fn an_item_is_handled_when_the_next_one_is_asked_for() {
        let inbox = started();
        inbox.push(Delivery::CaughtUp(cursor(2)));
        assert_eq!(inbox.handled(), Some(cursor(1)));
        take(&inbox);
        assert_eq!(inbox.handled(), Some(cursor(1)));
        assert!(take(&inbox).is_none());
        assert_eq!(inbox.handled(), Some(cursor(2)));
    }

    #[test]
    fn an_acknowledged_item_is_handled_at_once() {
        let inbox = started();
        inbox.push(Delivery::CaughtUp(cursor(2)));
        take(&inbox);
        inbox.acknowledge();
        assert_eq!(inbox.handled(), Some(cursor(2)));
    }

    #[test]
    fn a_resume_begins_after_what_was_handed_out_and_forgets_what_was_not() {
        let inbox = started();
        inbox.push(Delivery::CaughtUp(cursor(2)));
        inbox.push(Delivery::Progress(cursor(3)));
        take(&inbox);
        assert_eq!(inbox.rewind(), Some(cursor(2)));
        assert!(take(&inbox).is_none());
    }

    #[test]
    fn silence_never_fills_the_queue() {
        let inbox = started();
        for seq in 2..10_000 {
            assert!(!inbox.push(Delivery::Progress(cursor(seq))));
        }
        assert!(matches!(take(&inbox), Some(Delivery::Progress(last)) if last == cursor(9_999)));
        assert!(take(&inbox).is_none());
    }

    #[test]
    fn a_full_queue_says_so_until_there_is_room() {
        let inbox = started();
        let pushed = (0..MAX_QUEUED).filter(|_| !inbox.push(Delivery::CaughtUp(cursor(2)))).count();
        assert_eq!(pushed, MAX_QUEUED - 1);
        assert!(inbox.is_full());
        take(&inbox);
        assert!(!inbox.is_full());
    }

    #[test]
    fn the_last_word_survives_a_lost_connection() {
        let inbox = started();
        inbox.push(Delivery::CaughtUp(cursor(2)));
        inbox.push(Delivery::End(crate::client::ClientError::Stopped));
        inbox.rewind();
        assert!(matches!(take(&inbox), Some(Delivery::CaughtUp(_))));
        assert!(matches!(take(&inbox), Some(Delivery::End(_))));
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(inbox.poll_take(&mut context), Poll::Ready(None)));
    }
}
