//! From consecutive events to one group's frames.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use uuid::Uuid;

use super::frame::Frame;
use crate::cursor::{Cursor, Epochs, Seq};
use crate::event::Event;
use crate::hub::plan::{Opened, TablePlan};

/// Frames are cut at the end of a transaction once they are this large, bytes.
pub const FRAME_TARGET_BYTES: usize = 64 << 10;

/// A walk over consecutive events: where frames may end.
#[derive(Debug)]
pub struct Span {
    epochs: Epochs,
    boundary: (Seq, Uuid),
    previous: (Seq, Uuid),
}

impl Span {
    /// Before the first event.
    #[must_use]
    pub const fn new(epochs: Epochs) -> Self {
        Self { epochs, boundary: (0, Uuid::nil()), previous: (0, Uuid::nil()) }
    }

    /// After an event.
    pub const fn pass(&mut self, event: &Event) {
        self.previous = (event.seq, event.id);
        if event.tx_end {
            self.boundary = self.previous;
        }
    }

    /// The position after an event.
    #[must_use]
    pub fn after(&self, event: &Event) -> Cursor {
        self.cursor((event.seq, event.id))
    }

    fn cursor(&self, (seq, id): (Seq, Uuid)) -> Cursor {
        Cursor::at(self.epochs.of(seq), seq, id)
    }
}

/// Collects one group's frames from consecutive events.
#[derive(Debug, Default)]
pub struct Assembly {
    frames: Vec<Frame>,
    // All that was rendered into it.
    bytes: usize,
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
    /// Adds an event if it is shown; one that was looked at already is not looked at again. `frame_bytes` is the protocol's
    /// limit of a frame.
    pub fn add(&mut self, plan: &TablePlan, opened: &Opened<'_>, span: &Span, frame_bytes: usize) {
        let event = opened.event();
        if self.last.is_some_and(|(seq, _)| seq == event.seq) {
            return;
        }
        let begin = self.body.len();
        if begin > 0 {
            self.body.push(b',');
        }
        if !plan.render(opened, &mut self.body) {
            self.body.truncate(begin);
            return;
        }
        self.bytes += self.body.len() - begin;
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
            shared: OnceLock::new(),
            asked: AtomicU64::new(0),
            counted: OnceLock::new(),
        });
    }

    /// The first frame, once it is complete.
    pub fn first(&mut self) -> Option<Frame> {
        (!self.frames.is_empty()).then(|| self.frames.remove(0))
    }

    /// What was rendered into it, bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Ends at `end`, the position after the last event that was looked at.
    #[must_use]
    pub fn finish(mut self, end: Cursor, open: bool) -> Vec<Frame> {
        self.cut(end, open);
        self.frames
    }
}
