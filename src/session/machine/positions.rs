//! Where each subscription stands, and what the client is told of it: `prev` and `cursor` of events, and `progress`.

use std::time::Instant;

use super::{Machine, Phase};
use crate::cursor::{Cursor, Seq};
use crate::protocol::message::ServerMessage;

impl Machine {
    /// An `events` frame that ends at `cursor`, inside a transaction if `open`, goes out for `id`; gives the position before
    /// it. None: it must not go, because the subscription is over or the frame would go back.
    pub fn events(&mut self, now: Instant, id: &str, cursor: Cursor, open: bool) -> Option<Cursor> {
        if self.phase == Phase::Closed {
            return None;
        }
        let subscription = self.find(id)?;
        let before = subscription.position?;
        if cursor <= before && cursor.seq <= before.seq {
            return None;
        }
        subscription.position = Some(cursor);
        subscription.passed = cursor.seq;
        subscription.open = open;
        subscription.last_said = now;
        Some(before)
    }

    /// Nothing up to `seq` was for `id`.
    pub fn passed(&mut self, id: &str, seq: Seq) {
        if let Some(subscription) = self.find(id) {
            subscription.passed = subscription.passed.max(seq);
        }
    }

    /// `id` has everything up to `boundary`, the end of the newest whole transaction.
    pub fn reached(&mut self, now: Instant, id: &str, boundary: Cursor) {
        let Some(subscription) = self.find(id) else { return };
        subscription.passed = subscription.passed.max(boundary.seq);
        subscription.reached = Some(boundary);
        let Some(position) = subscription.position else { return };
        // Inside an open transaction there is nothing to say yet.
        if !subscription.caught_up && boundary.seq >= position.seq {
            let cursor = if boundary.seq > position.seq { boundary } else { position };
            subscription.caught_up = true;
            subscription.open &= cursor == position;
            subscription.position = Some(cursor);
            subscription.last_said = now;
            self.send(ServerMessage::CaughtUp { id: id.to_owned(), cursor });
        }
    }

    /// The log was rewound to behind what `id` had passed over in silence; its position still stands.
    pub fn rewound(&mut self, id: &str) {
        if let Some(subscription) = self.find(id) {
            subscription.reached = None;
            subscription.passed = subscription.position.map_or(0, |position| position.seq);
        }
    }

    /// Says `progress` for every caught-up subscription that was silent for long: how far it has everything. Not
    /// `current`: the node cannot tell, and the positions are repeated.
    pub fn progress(&mut self, now: Instant, current: bool) {
        if self.phase == Phase::Closed {
            return;
        }
        let silent = self.timing.progress / 2;
        let mut said: Vec<(Cursor, Vec<String>)> = Vec::new();
        for subscription in &mut self.subscriptions {
            let Some(position) = subscription.position.filter(|_| subscription.caught_up) else { continue };
            if now.saturating_duration_since(subscription.last_said) < silent {
                continue;
            }
            subscription.last_said = now;
            // Never the node's own end: a subscription that is behind has events on their way before that.
            let reached = subscription.reached.filter(|reached| current && reached.seq > position.seq);
            if subscription.open && reached.is_none() {
                // Progress stands between transactions.
                continue;
            }
            let cursor = reached.unwrap_or(position);
            subscription.position = Some(cursor);
            subscription.open = false;
            match said.iter_mut().find(|(at, _)| *at == cursor) {
                Some((_, ids)) => ids.push(subscription.id.to_string()),
                None => said.push((cursor, vec![subscription.id.to_string()])),
            }
        }
        for (cursor, ids) in said {
            self.send(ServerMessage::Progress { ids, cursor });
        }
    }

    /// Whether `progress` is due.
    #[must_use]
    pub fn progress_due(&self, now: Instant) -> bool {
        self.progress_at().is_some_and(|at| at <= now)
    }

    pub(super) fn progress_at(&self) -> Option<Instant> {
        let running = self.subscriptions.iter().filter(|subscription| subscription.caught_up);
        running.map(|subscription| subscription.last_said + self.timing.progress).min()
    }
}
