//! Where the events of a look come from, and who may hold them.
//!
//! A look waits for its turn in its group, then for one of the node's [`SEATS`], then for a thread. Until it has a seat it
//! holds no events, unless it need not wait: it reads them again once it is seated. So the memory of looks does not grow with
//! the number of connections, be the events from the ring, which has moved on meanwhile, or from the log.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::hub::group::Place;
use crate::hub::pages::{Left, Page, Pages};
use crate::hub::ring::Whole;
use crate::hub::{Hub, LOOK_BYTES, PULL_EVENTS};

/// Looks that hold events at a time: with the largest usual events, of 8 MiB, half of what pages of the log may hold. The
/// other half is for those who read what is cheap.
pub(crate) const SEATS: usize = 4;

pub(crate) fn seats() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(SEATS))
}

/// Where a look's events come from.
#[derive(Debug)]
pub(crate) enum Origin {
    Ring,
    // With the page that they count in, or what is left of it.
    Log { pages: Pages, page: Option<Page>, left: Left },
}

impl Origin {
    pub(crate) fn log(pages: &Pages, page: &Page) -> Self {
        Self::Log { pages: pages.clone(), page: Some(Arc::clone(page)), left: Left::of(page) }
    }

    /// The events themselves are no longer held.
    fn let_go(&mut self) {
        if let Self::Log { page, .. } = self {
            *page = None;
        }
    }

    /// The events after `place`. None: they are not to be had as they were; the next pull says why.
    async fn read_again(&mut self, hub: &Hub, place: Place) -> Option<Whole> {
        let ((generation, after), edge) = (place, hub.edge());
        if edge.held || edge.generation != generation {
            return None;
        }
        let (through, frame_bytes) = (edge.deliverable.seq, hub.options.frame_bytes);
        let mut whole = match self {
            Self::Ring => hub.ring.read().whole_after(after, through, PULL_EVENTS, frame_bytes).ok()?,
            Self::Log { pages, page, left } => {
                let again = match left.again(after) {
                    Some(again) => again,
                    None => pages.following(after, through, generation).await.ok()?,
                };
                let whole = again.whole_after(after, frame_bytes);
                (*left, *page) = (Left::of(&again), Some(again));
                whole
            }
        };
        whole.shorten(LOOK_BYTES);
        whole.events.first().filter(|first| first.seq == after + 1)?;
        Some(whole)
    }
}

/// A look's events and its seat.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) whole: Whole,
    origin: Origin,
    seat: Option<OwnedSemaphorePermit>,
}

impl Desk {
    pub(crate) const fn new(whole: Whole, origin: Origin) -> Self {
        Self { whole, origin, seat: None }
    }

    /// It waits: others may need the memory.
    pub(crate) fn let_go(&mut self) {
        self.whole = Whole::default();
        self.origin.let_go();
    }

    /// Takes a seat, and the events if they were let go of. False: these are not to be had.
    pub(crate) async fn sit_down(&mut self, hub: &Hub, place: Place) -> bool {
        let seat = match Arc::clone(&hub.seats).try_acquire_owned() {
            Ok(seat) => Ok(seat),
            Err(_) => {
                self.let_go();
                Arc::clone(&hub.seats).acquire_owned().await
            }
        };
        self.seat = seat.ok();
        if self.whole.events.is_empty() {
            match self.origin.read_again(hub, place).await {
                Some(whole) => self.whole = whole,
                None => return false,
            }
        }
        self.seat.is_some()
    }
}
