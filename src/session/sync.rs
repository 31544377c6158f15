//! `sync`: where everything of a transaction has been numbered.
//!
//! All syncs of a node that wait for Postgres ask together: one statement at a time, at a bounded rate, on one of the
//! connections for clients.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cursor::Cursor;
use crate::lifecycle::Lifecycle;
use crate::log::read::{self, Transaction, Transactions};
use crate::postgres::rounds::Rounds;
use crate::postgres::within;
use crate::protocol::error::{ErrorCode, WireError};
use crate::session::Context;
use crate::session::machine::unavailable;
use crate::telemetry::metrics::Metrics;

/// Between two inspections of a transaction that is not relayed yet: twice as long each time.
const SYNC_POLL: Duration = Duration::from_millis(20);
/// And at most this long: thousands may wait for one transaction.
const SYNC_POLL_CAP: Duration = Duration::from_millis(200);
/// Longest wait for one such inspection.
const SYNC_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two statements, however many syncs wait.
const SYNC_PAUSE: Duration = Duration::from_millis(10);
/// Syncs of all connections of a node that wait at once: 256 connections at their own limit. A statement about as many
/// transactions takes some 20 ms.
pub const MAX_NODE_SYNCS: i64 = 4_096;

/// The syncs of a node.
#[derive(Debug)]
pub struct Syncs {
    rounds: Rounds<u64, Option<Arc<Transactions>>>,
    metrics: Arc<Metrics>,
}

/// One sync that waits; it counts until this is dropped.
struct Waiting<'a>(&'a Metrics);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.syncs_waiting.dec();
    }
}

impl Syncs {
    /// None wait.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>, lifecycle: Lifecycle) -> Self {
        Self { rounds: Rounds::new(lifecycle, SYNC_PAUSE, MAX_NODE_SYNCS.unsigned_abs() as usize), metrics }
    }

    fn enter(&self) -> Result<Waiting<'_>, WireError> {
        self.metrics.syncs_waiting.inc();
        let waiting = Waiting(&self.metrics);
        if self.metrics.syncs_waiting.get() > MAX_NODE_SYNCS {
            let what = format!("{MAX_NODE_SYNCS} syncs wait on this node: try again with backoff, or on another node");
            return Err(WireError::backoff(ErrorCode::RateLimited, what, 1_000));
        }
        Ok(waiting)
    }

    async fn ask(&self, context: &Context, xid: u64) -> Option<Arc<Transactions>> {
        let (database, metrics) = (Arc::clone(&context.database), Arc::clone(&self.metrics));
        let question = async move |xids: BTreeSet<u64>| {
            metrics.sync_queries_total.inc();
            within(SYNC_TIMEOUT, read::transactions(&database.clients(), &xids)).await.ok().map(Arc::new)
        };
        self.rounds.ask(xid, question).await.flatten()
    }
}

/// Where everything of a transaction has been numbered.
pub(super) async fn find_transaction(context: &Context, xid: u64, until: Instant) -> Result<Cursor, WireError> {
    let _waiting = context.syncs.enter()?;
    let mut wait = SYNC_POLL;
    loop {
        let answer = context.syncs.ask(context, xid).await;
        let seq = match answer.as_ref().map(|answer| (answer.of(xid), answer.newest)) {
            Some((Transaction::At(seq), _)) => Some(seq),
            Some((Transaction::Nothing, newest)) => Some(newest),
            Some((Transaction::Future, _)) => {
                let what = format!("transaction {xid} has not begun: sync's tx is the text of pg_current_xact_id()");
                return Err(WireError::never(ErrorCode::BadMessage, what));
            }
            Some((Transaction::Running | Transaction::Waiting, _)) | None => None,
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
