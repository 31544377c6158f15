//! `sync`: an answer once every subscription has passed a transaction.

use std::time::{Duration, Instant};

use super::{Machine, Output};
use crate::cursor::{Cursor, Seq};
use crate::protocol::error::{ErrorCode, WireError};
use crate::protocol::message::ServerMessage;

/// Longest wait of `sync`, also when the client names none.
const MAX_SYNC: Duration = Duration::from_secs(30);
/// Syncs that may wait at once.
const MAX_SYNCS: usize = 16;

#[derive(Debug)]
pub(super) struct Sync {
    serial: u64,
    pub(super) tx: String,
    pub(super) until: Instant,
    target: Option<Cursor>,
}

impl Machine {
    pub(super) fn sync(&mut self, now: Instant, tx: String, timeout_ms: Option<u64>) {
        // Postgres's xid8 is 64 bits; ids below 3 are its own.
        let is_decimal = tx.bytes().all(|byte| byte.is_ascii_digit());
        let xid = tx.parse::<u64>().ok().filter(|xid| is_decimal && *xid >= 3 && *xid <= i64::MAX.cast_unsigned());
        let Some(xid) = xid else {
            let what = "sync's tx is the decimal text of pg_current_xact_id()";
            self.sync_error(tx, WireError::never(ErrorCode::BadMessage, what));
            return;
        };
        if self.syncs.len() >= MAX_SYNCS {
            let what = format!("at most {MAX_SYNCS} syncs wait at once");
            self.sync_error(tx, WireError::backoff(ErrorCode::RateLimited, what, 100));
            return;
        }
        let until = now + timeout_ms.map_or(MAX_SYNC, Duration::from_millis).min(MAX_SYNC);
        self.serial += 1;
        self.syncs.push(Sync { serial: self.serial, tx, until, target: None });
        self.outputs.push_back(Output::Sync { serial: self.serial, xid, until });
    }

    /// Everything of the transaction, or all that was there when it was found to have no events, lies up to `target`.
    pub fn sync_found(&mut self, serial: u64, target: Cursor) {
        for sync in self.syncs.iter_mut().filter(|sync| sync.serial == serial) {
            sync.target = Some(target);
        }
        self.settle_syncs();
    }

    /// The sync cannot be answered.
    pub fn sync_failed(&mut self, serial: u64, error: WireError) {
        // It may have been given up already, when its time was over.
        if let Some(index) = self.syncs.iter().position(|sync| sync.serial == serial) {
            let sync = self.syncs.remove(index);
            self.sync_error(sync.tx, error);
        }
    }

    /// Answers the syncs whose target every running subscription has passed. Call after each turn of delivery.
    pub fn settle_syncs(&mut self) {
        if self.syncs.is_empty() {
            return;
        }
        let starting = self.subscriptions.iter().any(|subscription| subscription.position.is_none());
        let passed = self.subscriptions.iter().map(|subscription| subscription.passed).min().unwrap_or(Seq::MAX);
        let done = |sync: &mut Sync| !starting && sync.target.is_some_and(|target| target.seq <= passed);
        for sync in self.syncs.extract_if(.., done).collect::<Vec<_>>() {
            if let Some(cursor) = sync.target {
                self.send(ServerMessage::Synced { tx: sync.tx, cursor });
            }
        }
    }

    /// Whether a sync waits for the subscriptions to get on.
    #[must_use]
    pub fn is_syncing(&self) -> bool {
        self.syncs.iter().any(|sync| sync.target.is_some())
    }
}
