//! Reading the log: up to its end, where the feed alone does not lead.

use std::future::Future;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Follower, STATEMENT_TIMEOUT};
use crate::cursor::{Epochs, Seq};
use crate::failpoint;
use crate::log::incarnation::{epoch_has_term, epochs};
use crate::log::read;
use crate::postgres::within;
use crate::telemetry::metrics::gauge;

/// Events of one reading of the log.
const READ_EVENTS: usize = 2_000;
/// And of bytes: rows of a megabyte must not take the node's memory.
const READ_BYTES: usize = 16 << 20;
/// The log's end is read at least this often, whatever the feed says: a node that hears Postgres and is not heard by it finds
/// out in this and [`STATEMENT_TIMEOUT`], within 5 s.
const RECONCILE_INTERVAL: Duration = Duration::from_millis(2_500);
/// Events that a starting node takes from the log into its ring.
const WARM_EVENTS: u64 = 10_000;
/// Events that one statement looks through for the end of the log's first transaction.
const WHOLE_STEP: u64 = 100_000;

impl Follower {
    /// Reads the log up to its end; gives the wait until the next time.
    pub(super) async fn reconcile(&mut self, cause: &'static str) -> Duration {
        self.metrics.reconciles_total.with_label_values(&[cause]).inc();
        let doubts = self.state.belief.lock().doubts();
        match self.catch_up().await {
            Ok(true) => {
                self.retry.reset();
                self.state.belief.lock().answered(Instant::now());
                self.hub.tick(Instant::now());
                // The process may have stood still while it read: then the end that it met is of the past.
                if self.state.belief.lock().met_the_end(doubts) { RECONCILE_INTERVAL } else { Duration::ZERO }
            }
            Ok(false) => {
                self.state.belief.lock().answered(Instant::now());
                self.retry.next_wait(1.0)
            }
            Err(error) => {
                tracing::debug!(%error, cause, "the log could not be read");
                self.doubt();
                // Connections that were cut off silently keep their places in the pool: begin another.
                let _ = tokio::time::timeout(STATEMENT_TIMEOUT, self.database.renew()).await;
                self.state.turn();
                self.retry.next_wait(1.0)
            }
        }
    }

    /// True: the ring has met the log's end. False: delivery is held, the database's incarnation is not vouched for yet.
    async fn catch_up(&mut self) -> Result<bool, sqlx::Error> {
        failpoint::hit("feed.reconcile").await?;
        let mut pool = &self.database.pool();
        let (mut known, mut newest_epoch) = self.asked(epochs(pool)).await?;
        let fresh;
        if self.started && known != self.hub.epochs() {
            // Connections that were made before may still end at a primary that was left: new ones are refused there.
            let renewed =
                async { self.database.renew().await.map_err(|error| sqlx::Error::Configuration(error.into())) };
            self.asked(renewed).await?;
            fresh = self.database.pool();
            pool = &fresh;
            (known, newest_epoch) = self.asked(epochs(pool)).await?;
        }
        let seen = self.incarnation.borrow().clone();
        let vouched = match (&newest_epoch, &seen) {
            (Some(row), Some(seen)) => row.incarnation == *seen && self.asked(epoch_has_term(pool, row.epoch)).await?,
            _ => false,
        };
        if !vouched {
            if !self.hub.edge().held {
                tracing::warn!(
                    "the database is not the one it was: delivery is held until a leader vouches for the log"
                );
                self.hub.hold(true);
                let _ = self.database.renew().await;
            }
            self.doubt();
            return Ok(false);
        }
        self.metrics.epoch.set(i64::from(known.newest()));
        if known != self.hub.epochs() && self.started {
            failpoint::hit("feed.epoch").await?;
            let start = known.cut_since(&self.hub.epochs());
            let start_id = self.asked(read::event_id(pool, start)).await?;
            let whole = self.asked(read::whole_before(pool, start)).await?;
            self.keys.clear();
            self.hub.set_epochs(known.clone(), start_id, whole);
        }
        let bounds = self.asked(read::bounds(pool)).await?;
        self.metrics.log_newest_seq.set(gauge(bounds.newest));
        if !self.started || !self.continues(bounds).await? {
            self.begin(bounds, known).await?;
        }
        if self.hub.log_oldest() != Some(bounds.oldest) {
            // Needed by nobody who is served already: what it costs to look must not keep the node from the log's end.
            if let Err(error) = self.find_beginning(bounds).await {
                tracing::debug!(%error, "the log's beginning stays unknown until the next reading");
            }
        }
        self.read_through(bounds.newest).await?;
        self.hub.hold(false);
        Ok(true)
    }

    /// One statement, bounded; the loop turns with it.
    pub(super) async fn asked<T>(
        &self,
        statement: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let answer = within(STATEMENT_TIMEOUT, statement).await;
        self.state.turn();
        answer
    }

    /// Whether the log still holds what the ring ends with.
    async fn continues(&self, bounds: read::Bounds) -> Result<bool, sqlx::Error> {
        let newest = self.hub.high_water();
        if newest > bounds.newest {
            // Shorter than what we have seen, without a new epoch: a leader will write one when it hears of us. Until
            // then nothing may be numbered on top.
            tracing::error!(seen = newest, log = bounds.newest, "the log is shorter than what this node has seen");
            return Err(sqlx::Error::Protocol("the log went back without a new epoch".into()));
        }
        if newest + 1 < bounds.oldest {
            return Ok(false);
        }
        let Some(ours) = self.hub.id_at(newest) else { return Ok(true) };
        match self.asked(read::event_id(&self.database.pool(), newest)).await? {
            Some(theirs) if theirs != ours => {
                // Restored under our feet to a state of the same timeline, and grown past us: nobody knows where it parts.
                tracing::error!(
                    seq = newest,
                    "the log differs from what this node has seen: all its clients begin anew"
                );
                self.hub.replace();
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Finds the oldest position: the log's beginning, or the end of the first transaction of what retention left. Stays
    /// unknown while that is open.
    async fn find_beginning(&self, bounds: read::Bounds) -> Result<(), sqlx::Error> {
        let mut position = (bounds.oldest <= 1).then_some((0, Uuid::nil()));
        let mut from = bounds.oldest;
        // In steps, for one of millions of rows.
        while position.is_none() && from <= bounds.newest {
            let through = bounds.newest.min(from + WHOLE_STEP);
            position = self.asked(read::whole_after(&self.database.pool(), from, through)).await?;
            from = through + 1;
        }
        if let Some(position) = position {
            self.hub.set_log_oldest(bounds.oldest, position);
        }
        Ok(())
    }

    /// Begins the ring with the newest events of the log.
    async fn begin(&mut self, bounds: read::Bounds, known: Epochs) -> Result<(), sqlx::Error> {
        let oldest = bounds.oldest.saturating_sub(1);
        let base = bounds.newest.saturating_sub(WARM_EVENTS).max(oldest);
        let pool = &self.database.pool();
        let next = match base {
            // Nothing is cut off there.
            0 => None,
            _ => self.asked(read::whole_after(pool, base.max(bounds.oldest), bounds.newest)).await?,
        };
        // Until it has been read on: nobody's "now" is where the ring begins.
        self.hub.hold(true);
        if let Some((end, id)) = next {
            self.hub.restart(end, Some(id), None, known);
        } else {
            // The log ends with a transaction that is longer than what the ring begins with, and open.
            let base_id = self.asked(read::event_id(pool, base)).await?;
            let whole = self.asked(read::whole_before(pool, base)).await?;
            self.hub.restart(base, base_id, whole, known);
        }
        self.started = true;
        Ok(())
    }

    async fn read_through(&mut self, through: Seq) -> Result<(), sqlx::Error> {
        while self.hub.high_water() < through {
            let after = self.hub.high_water();
            self.metrics.log_queries_total.with_label_values(&["follow"]).inc();
            failpoint::hit("feed.read").await?;
            let pool = self.database.pool();
            let events = self.asked(read::events(&pool, after, through, READ_EVENTS, READ_BYTES)).await?;
            if events.first().is_none_or(|event| event.seq != after + 1) {
                // Retention overtook us while we read: begin anew with the next turn.
                self.started = false;
                return Err(sqlx::Error::Protocol("the log was trimmed while it was read".into()));
            }
            self.take(&events, "log").await?;
        }
        Ok(())
    }
}
