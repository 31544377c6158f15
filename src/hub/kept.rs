//! The memory of the frames that all groups keep, and which of them go first.
//!
//! Frames are kept so that those a little behind need not look at the events again. Without a common bound each
//! group's own bound counts once for every group, and how many there are is the clients' doing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::group::Group;
use crate::cursor::Seq;

/// Notes of who got frames when; with more, the oldest frames are let go of as if they were too many. 3 MiB.
const MAX_NOTES: usize = 128 << 10;

/// All kept frames of a node.
#[derive(Debug)]
pub(super) struct Kept {
    limit: usize,
    bytes: Arc<AtomicUsize>,
    // Who got frames up to which position, oldest first. A group that is gone has let go of its frames.
    order: Mutex<VecDeque<(Weak<Group>, Seq)>>,
}

impl Kept {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, bytes: Arc::default(), order: Mutex::default() }
    }

    /// What all kept frames hold, those included that a group has let go of and a reader still has.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// What [`Group::publish`] counts in.
    pub(super) fn counter(&self) -> &Arc<AtomicUsize> {
        &self.bytes
    }

    /// `group` has new frames up to `through`. Lets go of the oldest frames of any group while there are too many; gives how
    /// often. The newest of all are kept, or nobody who is up to date would find them.
    pub(super) fn add(&self, group: &Arc<Group>, through: Seq) -> u64 {
        let mut order = self.order.lock();
        order.push_back((Arc::downgrade(group), through));
        let mut evicted = 0;
        while (self.bytes() > self.limit || order.len() > MAX_NOTES) && order.len() > 1 {
            let Some((group, through)) = order.pop_front() else { break };
            if group.upgrade().is_some_and(|group| group.age(through)) {
                evicted += 1;
            }
        }
        evicted
    }

    /// What is up to `floor` was let go of otherwise.
    pub(super) fn forget(&self, floor: Seq) {
        let mut order = self.order.lock();
        while order.front().is_some_and(|(_, through)| *through <= floor) {
            order.pop_front();
        }
    }
}
