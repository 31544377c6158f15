//! How long the leader waits for Postgres.
//!
//! An answer comes within a lease, or something is wrong: with the network, or with the server. One thing is not: a statement
//! that copies hundreds of megabytes. If a term ended for it, the next would meet the same rows. So when a lease is over
//! without an answer to a claim, the server is asked, on another connection, whether it is at work on it.

use std::pin::pin;
use std::time::{Duration, Instant};

use super::{Relay, TermEnd};
use crate::postgres::at_work;
use crate::telemetry::tracing::with_warnings;

/// Longest claim: a transaction of one row of a gigabyte takes about that on a slow disk. Less than the session's
/// `statement_timeout`.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest wait for the word of another connection.
const WORD_TIMEOUT: Duration = Duration::from_millis(500);

/// Waits for an answer at most a lease long. A warning that came with it means a commit that may not be durable.
pub(super) async fn answered<F: Future>(lease: Duration, work: F) -> Result<F::Output, TermEnd> {
    durable(with_warnings(tokio::time::timeout(lease, work)).await)
}

/// As [`answered`]; longer as long as the server is at work for the backend `pid`, up to [`PATIENCE`].
pub(super) async fn worked<F: Future>(relay: &Relay, pid: i32, work: F) -> Result<F::Output, TermEnd> {
    let began = Instant::now();
    let patient = async {
        let mut work = pin!(work);
        loop {
            match tokio::time::timeout(relay.options.lease, &mut work).await {
                Err(elapsed) if began.elapsed() > PATIENCE || !is_at_work(relay, pid).await => return Err(elapsed),
                Err(_) => {}
                Ok(output) => return Ok(output),
            }
        }
    };
    durable(with_warnings(patient).await)
}

async fn is_at_work(relay: &Relay, pid: i32) -> bool {
    let pool = relay.database.pool();
    matches!(tokio::time::timeout(WORD_TIMEOUT, at_work(&pool, pid)).await, Ok(Ok(true)))
}

fn durable<T>((answer, warnings): (Result<T, tokio::time::error::Elapsed>, Vec<String>)) -> Result<T, TermEnd> {
    match answer {
        Err(_) => Err(TermEnd::Silence),
        Ok(_) if !warnings.iter().all(|warning| harmless(warning)) => Err(TermEnd::NotDurable(warnings.join("; "))),
        Ok(output) => Ok(output),
    }
}

/// Near the wraparound of transaction ids every writing transaction is told to vacuum: that says nothing of its commit, and
/// a relay that gave up for it would stand still while Postgres still works. Whatever else is told, in any language, may be
/// the wait for a standby that was cut off.
fn harmless(warning: &str) -> bool {
    warning.contains("must be vacuumed within")
}
