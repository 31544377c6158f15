//! A subscription's end of the hub.

use std::sync::Arc;

use super::group::{Group, Signal};
use super::{Hub, Pull};
use crate::cursor::Seq;
use crate::telemetry::metrics::gauge;

/// A subscription's place in the hub; leaving is dropping it.
#[derive(Debug)]
pub struct Tap {
    pub(super) hub: Arc<Hub>,
    pub(super) group: Arc<Group>,
    pub(super) signal: Arc<Signal>,
}

impl Tap {
    /// What it listens to.
    #[must_use]
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// What comes after `after`.
    #[must_use]
    pub fn pull(&self, after: Seq) -> Pull {
        self.hub.pull(&self.group, after)
    }

    /// Whether there may be news after `after`; cheap, for sessions with many subscriptions.
    #[must_use]
    pub fn has_news(&self, after: Seq) -> bool {
        self.group.newest() > after
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.hub.metrics.subscriptions.dec();
        let mut routes = self.hub.routes.lock();
        if self.group.unlisten(&self.signal) {
            routes.remove(&self.group);
            self.hub.metrics.filter_groups.set(gauge(routes.len()));
        }
    }
}
