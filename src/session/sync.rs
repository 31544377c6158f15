//! `sync`: where everything of a transaction has been numbered.

use std::time::{Duration, Instant};

use crate::cursor::Cursor;
use crate::log::read::{self, Transaction};
use crate::postgres::within;
use crate::protocol::error::{ErrorCode, WireError};
use crate::session::Context;
use crate::session::machine::unavailable;

/// Between two looks at a transaction that is not relayed yet: twice as long each time.
const SYNC_POLL: Duration = Duration::from_millis(20);
/// And at most this long: thousands may wait for one transaction.
const SYNC_POLL_CAP: Duration = Duration::from_millis(200);
/// Longest wait for one such look.
const SYNC_TIMEOUT: Duration = Duration::from_secs(5);

/// Where everything of a transaction has been numbered.
pub(super) async fn find_transaction(context: &Context, xid: u64, until: Instant) -> Result<Cursor, WireError> {
    let mut wait = SYNC_POLL;
    loop {
        let pool = context.database.pool();
        let found = within(SYNC_TIMEOUT, read::transaction(&pool, xid)).await;
        let seq = match found {
            Ok(Transaction::At(seq)) => Some(seq),
            Ok(Transaction::Nothing) => {
                within(SYNC_TIMEOUT, read::bounds(&pool)).await.ok().map(|bounds| bounds.newest)
            }
            Ok(Transaction::Future) => {
                let what = format!("transaction {xid} has not begun: sync's tx is the text of pg_current_xact_id()");
                return Err(WireError::never(ErrorCode::BadMessage, what));
            }
            Ok(Transaction::Running | Transaction::Waiting) | Err(_) => None,
        };
        if let Some(seq) = seq {
            let mut edges = context.hub.watch_edge();
            let reached = edges.wait_for(|edge| !edge.held && edge.boundary.seq >= seq);
            if let Ok(Ok(edge)) = tokio::time::timeout_at(until.into(), reached).await {
                return Ok(edge.boundary);
            }
        }
        if Instant::now() >= until {
            return Err(unavailable("the transaction is not over, or not relayed yet"));
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(SYNC_POLL_CAP);
    }
}
