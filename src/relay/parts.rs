//! What does not go in one claim: transactions larger than a batch, and rows that Postgres cannot process.
//!
//! A statement that fails because of a row's content fails again, in this term and in the next. So it is tried with half the
//! rows, down to one; that one is sent without its content ([`set_aside`]) and kept in `dead_letters`, as it is where it can
//! be copied. What stands before and after it is relayed as ever.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::answer::worked;
use super::{Leader, TORN_RETRY, TermEnd};
use crate::failpoint;
use crate::log::append::{Claim, ClaimError, Readable, claim_part, set_aside};

/// Longest reason that is written into `dead_letters`, characters.
const MAX_REASON: usize = 1_000;

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
                Err(error) if error.is_of_content() => match self.fewer(&error) {
                    true => continue,
                    false => self.pass(xid, &error).await?,
                },
                outcome => outcome?,
            };
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
    pub(super) fn fewer(&mut self, error: &ClaimError) -> bool {
        self.relay.metrics.relay_halvings_total.inc();
        let rows = self.portion.rows();
        tracing::debug!(%error, rows, "a claim could not be processed: trying with half the rows");
        self.portion.halve();
        rows > 1
    }

    /// The next row of `xid` cannot be processed, whatever is tried: it goes without its content.
    async fn pass(&mut self, xid: &str, error: &ClaimError) -> Result<Claim, TermEnd> {
        // ASCII: it has to go into databases of any encoding.
        let plain = |letter: char| if letter.is_ascii() { letter } else { '?' };
        let why: String = error.to_string().chars().take(MAX_REASON).map(plain).collect();
        for readable in [Readable::All, Readable::Names, Readable::Nothing] {
            let work = set_aside(self.connection, xid, self.newest, &why, readable, &mut self.interner);
            match worked(self.relay, self.pid, work).await? {
                Err(error) if error.is_of_content() && readable != Readable::Nothing => {
                    tracing::warn!(%error, xid, ?readable, "a row cannot be copied into dead_letters: less of it is kept");
                }
                outcome => {
                    tracing::warn!(%why, xid, seq = self.newest + 1, "a row cannot be processed: relayed without its content");
                    return Ok(outcome?);
                }
            }
        }
        Err(TermEnd::Silence)
    }
}
