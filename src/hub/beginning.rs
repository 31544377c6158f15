//! Where the log begins, as far as this node knows.

use uuid::Uuid;

use super::Hub;
use crate::cursor::{Cursor, Seq};

/// The log's beginning.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beginning {
    /// The oldest seq that the log still has; 0: it never had any.
    oldest: Seq,
    /// The oldest position, and the id of its event.
    position: (Seq, Uuid),
}

impl Hub {
    /// The oldest seq that the log still has, if known.
    #[must_use]
    pub fn log_oldest(&self) -> Option<Seq> {
        self.beginning.lock().map(|beginning| beginning.oldest)
    }

    /// Takes note of it, and of the oldest position that lies between two transactions. What retention left may begin inside
    /// one: nothing tells, so its first transaction is left out.
    pub fn set_log_oldest(&self, oldest: Seq, position: (Seq, Uuid)) {
        *self.beginning.lock() = Some(Beginning { oldest, position });
    }

    /// The oldest position that can be resumed from, if known.
    #[must_use]
    pub fn oldest(&self) -> Option<Cursor> {
        let Beginning { position: (seq, id), .. } = (*self.beginning.lock())?;
        match self.epochs.read().of(seq) {
            0 => None,
            epoch if seq == 0 => Some(Cursor::origin(epoch)),
            epoch => Some(Cursor::at(epoch, seq, id)),
        }
    }

    /// Another log may begin elsewhere, or with another event.
    pub(super) fn forget_beginning(&self) {
        *self.beginning.lock() = None;
    }
}
