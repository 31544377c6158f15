//! What does not go in one claim: transactions larger than a batch, and rows that Postgres cannot process.
//!
//! A statement that fails because of a row's content fails again, in this term and in the next. So it is tried with half the
//! rows, down to one; that one is sent without its content ([`set_aside`]) and kept in `dead_letters`, as it is where it can
//! be copied. What stands before and after it is relayed as ever.
//!
//! A failure that may as well be the server's ([`Suspect::RowOrServer`]) is given time: the same row must fail for
//! [`DOUBT`], with pauses, before its content is given up. A server that recovers meanwhile costs a delay and no content; one
//! that cannot even claim without reading a row ends the term.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::answer::worked;
use super::{KEEPALIVE, Leader, TORN_RETRY, TermEnd};
use crate::failpoint;
use crate::log::append::{Claim, ClaimError, Readable, Suspect, claim_part, set_aside};

/// Longest reason that is written into `dead_letters`, characters.
const MAX_REASON: usize = 1_000;
/// A row whose failure may be the server's is tried for this long before its content is given up, and again before less of it
/// is kept. Nothing is relayed meanwhile, so it is seconds: what a server needs to come out of a shortage that passes.
const DOUBT: Duration = Duration::from_secs(5);
/// Between two tries meanwhile. Less than [`KEEPALIVE`], within which the leader has to say something.
const DOUBT_RETRY: Duration = Duration::from_millis(250);
const _: () = assert!(DOUBT_RETRY.as_millis() < KEEPALIVE.as_millis());

/// A row whose failure may be the server's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Doubted {
    // It would get the seq after this one.
    after: u64,
    since: Instant,
}

impl Doubted {
    /// The same with another failure of the row that comes after `after`.
    fn again(before: Option<Self>, after: u64, now: Instant) -> Self {
        before.filter(|doubted| doubted.after == after).unwrap_or(Self { after, since: now })
    }

    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= DOUBT
    }
}

impl Leader<'_> {
    /// A transaction larger than a batch, in consecutive parts; nothing else in between. Where it stops, the next term goes
    /// on: the log's tail says that it is open.
    pub(super) async fn relay_in_parts(&mut self, xid: &str, stop: &CancellationToken) -> Result<(), TermEnd> {
        while !stop.is_cancelled() {
            failpoint::hit("relay.part").await.map_err(sqlx::Error::from)?;
            let bounds = self.bounds();
            let began = Instant::now();
            let work = claim_part(self.connection, xid, self.newest, bounds, &mut self.interner);
            let claim = match worked(self.relay, self.pid, work).await? {
                Err(error) => match error.suspect() {
                    None => return Err(error.into()),
                    Some(suspect) if self.fewer(&error, suspect).await || self.may_recover(suspect).await => continue,
                    Some(_) => self.pass(xid, &error).await?,
                },
                Ok(claim) => claim,
            };
            self.doubted = None;
            if claim.torn {
                self.report_torn().await?;
                tokio::time::sleep(TORN_RETRY).await;
                continue;
            }
            self.relay.metrics.relay_parts_total.inc();
            self.appended(&claim, began).await?;
            if !claim.more {
                break;
            }
        }
        Ok(())
    }

    /// After a statement that a row's content made fail: true when the next one takes fewer rows, false when it was one.
    pub(super) async fn fewer(&mut self, error: &ClaimError, suspect: Suspect) -> bool {
        let rows = self.portion.rows();
        if rows <= 1 {
            return false;
        }
        self.relay.metrics.relay_halvings_total.inc();
        tracing::debug!(%error, rows, "a claim could not be processed: trying with half the rows");
        self.portion.halve();
        if suspect == Suspect::RowOrServer {
            tokio::time::sleep(DOUBT_RETRY).await;
        }
        true
    }

    /// After one row alone has failed: true, after a pause, when the server may have been to blame.
    async fn may_recover(&mut self, suspect: Suspect) -> bool {
        let now = Instant::now();
        let doubted = Doubted::again(self.doubted, self.newest, now);
        self.doubted = Some(doubted);
        if suspect == Suspect::Row || doubted.is_over(now) {
            return false;
        }
        self.relay.metrics.relay_row_retries_total.inc();
        tokio::time::sleep(DOUBT_RETRY).await;
        true
    }

    /// The next row of `xid` cannot be processed, whatever is tried: it goes without its content.
    async fn pass(&mut self, xid: &str, error: &ClaimError) -> Result<Claim, TermEnd> {
        // ASCII: it has to go into databases of any encoding.
        let plain = |letter: char| if letter.is_ascii() { letter } else { '?' };
        let why: String = error.to_string().chars().take(MAX_REASON).map(plain).collect();
        let mut readable = Readable::All;
        self.doubted = None;
        loop {
            let work = set_aside(self.connection, xid, self.newest, &why, readable, &mut self.interner);
            match worked(self.relay, self.pid, work).await? {
                Ok(claim) => {
                    tracing::warn!(%why, xid, seq = self.newest + 1, "a row cannot be processed: relayed without its content");
                    return Ok(claim);
                }
                Err(error) => match (error.suspect(), readable.less()) {
                    (Some(suspect), Some(_)) if self.may_recover(suspect).await => {}
                    (Some(_), Some(less)) => {
                        tracing::warn!(%error, xid, ?readable, "a row cannot be copied into dead_letters: less of it is kept");
                        readable = less;
                    }
                    _ => return Err(error.into()),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_row_failing_for_long_is_given_up() {
        let start = Instant::now();
        let first = Doubted::again(None, 7, start);
        let later = Doubted::again(Some(first), 7, start + DOUBT / 2);
        assert!(!first.is_over(start) && !later.is_over(start + DOUBT - DOUBT_RETRY));
        assert!(Doubted::again(Some(later), 7, start + DOUBT).is_over(start + DOUBT));
        assert!(!Doubted::again(Some(later), 8, start + DOUBT).is_over(start + DOUBT), "another row");
    }
}
