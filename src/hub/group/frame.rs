//! A frame, and the messages made of it.

use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use crate::cursor::{Cursor, Seq};

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
    pub(super) shared: OnceLock<Shared>,
    // The id and position that were asked for last, hashed: a message is kept for those who are at least two.
    pub(super) asked: AtomicU64,
    pub(super) counted: OnceLock<Counted>,
}

/// A whole message, kept for the subscriptions of one id that stand at one position.
#[derive(Debug)]
pub(super) struct Shared {
    id: Box<str>,
    prev: Cursor,
    message: Bytes,
}

/// Memory of frames that groups keep, bytes; each counts until the last who holds it lets go.
#[derive(Debug)]
pub(super) struct Counted {
    kept: Arc<AtomicUsize>,
    bytes: AtomicUsize,
}

impl Counted {
    fn add(&self, bytes: usize) {
        self.kept.fetch_add(bytes, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.kept.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

impl Frame {
    /// The `events` message for a subscription `id` whose position is `prev`. UTF-8. Of a frame that a group keeps, those who
    /// share id and position share bytes; for others it is a copy that lives as long as it is being written.
    #[must_use]
    pub fn message(&self, id: &str, prev: &Cursor) -> Bytes {
        if let Some(shared) = self.shared.get() {
            let same = shared.prev == *prev && *shared.id == *id;
            return if same { shared.message.clone() } else { self.compose(id, prev) };
        }
        let message = self.compose(id, prev);
        let asked = {
            let mut hasher = DefaultHasher::new();
            (id, prev).hash(&mut hasher);
            hasher.finish()
        };
        if let Some(counted) = self.counted.get()
            && self.asked.swap(asked, Ordering::Relaxed) == asked
        {
            let shared = Shared { id: id.into(), prev: *prev, message: message.clone() };
            if self.shared.set(shared).is_ok() {
                counted.add(message.len());
            }
        }
        message
    }

    /// Counts it among the frames that are kept.
    pub(super) fn count(&self, kept: &Arc<AtomicUsize>) {
        let fresh = || Counted { kept: Arc::clone(kept), bytes: AtomicUsize::new(0) };
        let mut first = false;
        let counted = self.counted.get_or_init(|| {
            first = true;
            fresh()
        });
        if first {
            counted.add(self.body.len());
        }
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
