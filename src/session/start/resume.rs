//! Whether a cursor is a position of this log, and from where its events come.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::{NotStarted, RETRY, gone};
use crate::cursor::{Cursor, EpochFault, Epochs, Seq};
use crate::hub::Edge;
use crate::lifecycle::Lifecycle;
use crate::log::read;
use crate::mutant::{self, Mutant};
use crate::postgres::rounds::Rounds;
use crate::postgres::within;
use crate::protocol::error::WireError;
use crate::protocol::message::{ResyncReason, Source};
use crate::session::Context;
use crate::session::machine::unavailable;

/// Between two looks whether this node is current, which no edge tells.
const CURRENT_POLL: Duration = Duration::from_millis(50);

/// Waits until this node knows where the log is.
pub(super) async fn settled(context: &Context, until: Instant) -> Result<Edge, WireError> {
    let mut edges = context.hub.watch_edge();
    loop {
        let edge = *edges.borrow_and_update();
        // Current: this node has met the log's end since it last had reason to doubt, a pause of the process included.
        if !edge.held && edge.boundary.epoch > 0 && context.follower.current() {
            return Ok(edge);
        }
        if Instant::now() >= until {
            return Err(unavailable("this node does not know the log's state"));
        }
        let _ = tokio::time::timeout(CURRENT_POLL, edges.changed()).await;
    }
}

/// Whether the log continues after `cursor`, and from where it is read.
pub(super) async fn resume(
    context: &Context,
    cursor: Cursor,
    edge: Edge,
    until: Instant,
) -> Result<(Source, u64), NotStarted> {
    let mut edge = edge;
    // Or of an epoch that this node has not heard of yet.
    let unknown = context.hub.epochs().admit(&cursor) == Err(EpochFault::Unknown);
    if unknown || cursor.seq > edge.deliverable.seq {
        edge = after_reconcile(context, &cursor, until).await?;
    }
    if !mutant::is(Mutant::DivergedNotTold) {
        let admitted = timeout_at(until, admit(context, cursor, edge)).await;
        admitted.unwrap_or_else(|_| Err(unavailable("the log cannot be read").into()))?;
    }
    let memory = cursor.seq >= context.hub.ring_base();
    let source = match memory {
        _ if cursor.seq >= edge.deliverable.seq => Source::Live,
        true => Source::Memory,
        false => Source::History,
    };
    Ok((source, edge.generation))
}

/// The oldest position that lies between transactions, and from where its events come. Retention may take it away while it is
/// being checked: then the next one.
pub(super) async fn oldest(context: &Context, until: Instant) -> Result<(Cursor, Source, u64), NotStarted> {
    loop {
        let edge = settled(context, until).await?;
        if let Some(cursor) = context.hub.oldest() {
            match resume(context, cursor, edge, until).await {
                Ok((source, generation)) => return Ok((cursor, source, generation)),
                Err(NotStarted::Resync(_)) => {}
                Err(refused) => return Err(refused),
            }
        }
        if Instant::now() >= until {
            return Err(unavailable("this node does not know where the log begins").into());
        }
        context.follower.reconcile();
        tokio::time::sleep(RETRY).await;
    }
}

/// Whether the position is one of this log, as far as this node can tell; else the resync that says why not.
async fn admit(context: &Context, cursor: Cursor, edge: Edge) -> Result<(), NotStarted> {
    match context.hub.epochs().admit(&cursor) {
        Ok(()) => {}
        Err(EpochFault::Unknown) => {
            let what = "the cursor is of an epoch that this log never had: it belongs to another cluster, or to a primary that was left";
            return Err(gone(context, ResyncReason::CursorInvalid, what));
        }
        Err(EpochFault::Diverged) => {
            let what = "the database was rewound to before this position; what came after it never happened";
            return Err(gone(context, ResyncReason::HistoryDiverged, what));
        }
    }
    if cursor.seq > edge.deliverable.seq && cursor.seq > context.hub.high_water() {
        let what = "the cursor is beyond the end of the log: it belongs to another cluster";
        return Err(gone(context, ResyncReason::CursorInvalid, what));
    }
    match id_at(context, cursor.seq, edge).await? {
        Some(id) if !cursor.matches(id) => {
            let what = "another event stands at this position: the cursor is forged or the log has diverged";
            Err(gone(context, ResyncReason::HistoryDiverged, what))
        }
        _ => Ok(()),
    }
}

/// The id of the event at `seq`; None where it was dropped but the next one is there. One question answers for all who ask
/// about the same range.
async fn id_at(context: &Context, seq: Seq, edge: Edge) -> Result<Option<Uuid>, NotStarted> {
    if seq == 0 {
        let first = page(context, 1, edge).await;
        return match first {
            Ok(Some(1)) => Ok(Some(Uuid::nil())),
            Ok(None) if edge.deliverable.seq == 0 => Ok(Some(Uuid::nil())),
            Ok(_) => Err(expired(context)),
            Err(refused) => Err(refused),
        };
    }
    if let Some(id) = context.hub.id_at(seq) {
        return Ok(Some(id));
    }
    let read = context.pages.ids(seq, edge.deliverable.seq, edge.generation).await;
    let ids = read.map_err(|_| unavailable("the log cannot be read"))?;
    if let Some((_, id)) = ids.iter().find(|(known, _)| *known == seq) {
        return Ok(Some(*id));
    }
    match self::page(context, seq + 1, edge).await? {
        // The oldest position there is: its own event has just been dropped.
        Some(first) if first == seq + 1 => Ok(None),
        _ => Err(expired(context)),
    }
}

/// The first seq at or after `seq` that the log still has, near it.
async fn page(context: &Context, seq: Seq, edge: Edge) -> Result<Option<Seq>, NotStarted> {
    if seq > edge.deliverable.seq {
        return Ok(None);
    }
    let read = context.pages.ids(seq, edge.deliverable.seq, edge.generation).await;
    let ids = read.map_err(|_| unavailable("the log cannot be read"))?;
    Ok(ids.iter().map(|(found, _)| *found).find(|found| *found >= seq))
}

/// The log's newest seq and its epochs as Postgres has them, asked by all who need them as one: whoever sends cursors that
/// nobody has given out makes the node ask no more often for that.
#[derive(Debug)]
pub struct LogEnd(Rounds<(), Option<(Seq, Epochs)>>);

/// Between two such questions of a node.
const LOG_END_PAUSE: Duration = Duration::from_millis(20);
/// Longest wait for each of its two answers.
const LOG_END_TIMEOUT: Duration = Duration::from_secs(1);

impl LogEnd {
    /// Nobody has asked yet.
    #[must_use]
    pub fn new(lifecycle: Lifecycle) -> Self {
        Self(Rounds::new(lifecycle, LOG_END_PAUSE, 1))
    }

    async fn ask(&self, context: &Context) -> Option<(Seq, Epochs)> {
        let (follower, database) = (context.follower.clone(), Arc::clone(&context.database));
        let question = async move |_| {
            follower.reconcile();
            let pool = database.clients();
            let bounds = within(LOG_END_TIMEOUT, read::bounds(&pool)).await.ok()?;
            let (epochs, _) = within(LOG_END_TIMEOUT, crate::log::incarnation::epochs(&pool)).await.ok()?;
            Some((bounds.newest, epochs))
        };
        self.0.ask((), question).await.flatten()
    }
}

/// Asks the follower for the log's end and waits until this node has reached the cursor, or knows that the log has not, or
/// has lost it. A new epoch alone says none of that: the node may have heard of it and not have read on yet.
async fn after_reconcile(context: &Context, cursor: &Cursor, until: Instant) -> Result<Edge, WireError> {
    let mut edges = context.hub.watch_edge();
    loop {
        let edge = *edges.borrow_and_update();
        let known = context.hub.epochs();
        let admitted = known.admit(cursor);
        match admitted {
            Err(EpochFault::Diverged) if !edge.held => return Ok(edge),
            Ok(()) if !edge.held && edge.deliverable.seq >= cursor.seq => return Ok(edge),
            _ => {}
        }
        // The truth is asked apart from the follower: only the log's own end can say that the cursor lies beyond it.
        if let Ok(Some((newest, epochs))) = timeout_at(until, context.log_end.ask(context)).await {
            let same = epochs == known;
            let nowhere = admitted == Err(EpochFault::Unknown) || newest < cursor.seq;
            let edge = context.hub.edge();
            if same && nowhere && !edge.held {
                return Ok(edge);
            }
        }
        if Instant::now() >= until {
            return Err(unavailable("this node has not reached the cursor's position"));
        }
        let _ = tokio::time::timeout(RETRY, edges.changed()).await;
    }
}

fn expired(context: &Context) -> NotStarted {
    let what = "the position is older than the log keeps: read the state anew, then subscribe from now";
    gone(context, ResyncReason::CursorExpired, what)
}
