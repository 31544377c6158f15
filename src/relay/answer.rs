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
    durable(tokio::time::timeout(lease, with_warnings(work)).await)
}

/// As [`answered`]; longer as long as the server is at work for the backend `pid`, up to [`PATIENCE`].
pub(super) async fn worked<F: Future>(relay: &Relay, pid: i32, work: F) -> Result<F::Output, TermEnd> {
    worked_on(relay.options.lease, work, || is_at_work(relay, pid)).await
}

/// `is_at_work` may connect, and what a server says to everyone who connects (that its collations have another version, say) is
/// no word about the commit: only the work itself is listened to.
async fn worked_on<F: Future, W: Future<Output = bool>>(
    lease: Duration,
    work: F,
    is_at_work: impl Fn() -> W,
) -> Result<F::Output, TermEnd> {
    let began = Instant::now();
    let mut work = pin!(with_warnings(work));
    loop {
        match tokio::time::timeout(lease, &mut work).await {
            Err(elapsed) if began.elapsed() > PATIENCE || !is_at_work().await => return durable(Err(elapsed)),
            Err(_) => {}
            answer => return durable(answer),
        }
    }
}

async fn is_at_work(relay: &Relay, pid: i32) -> bool {
    let pool = relay.database.pool();
    matches!(tokio::time::timeout(WORD_TIMEOUT, at_work(&pool, pid)).await, Ok(Ok(true)))
}

fn durable<T>(answer: Result<(T, Vec<String>), tokio::time::error::Elapsed>) -> Result<T, TermEnd> {
    match answer {
        Err(_) => Err(TermEnd::Silence),
        Ok((_, warnings)) if !warnings.iter().all(|warning| harmless(warning)) => {
            Err(TermEnd::NotDurable(warnings.join("; ")))
        }
        Ok((output, _)) => Ok(output),
    }
}

/// Near the wraparound of transaction ids every writing transaction is told to vacuum: that says nothing of its commit, and
/// a relay that gave up for it would stand still while Postgres still works. Whatever else is told, in any language, may be
/// the wait for a standby that was cut off.
fn harmless(warning: &str) -> bool {
    warning.contains("must be vacuumed within")
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::util::SubscriberInitExt as _;

    use super::*;
    use crate::telemetry::tracing::NoticeLayer;

    const LEASE: Duration = Duration::from_millis(20);

    fn warns(what: &str) {
        tracing::warn!(target: "sqlx::postgres::notice", "{what}");
    }

    /// Found in review: a claim longer than a lease, on a server that warns at every connect, ended the term after a good commit.
    #[tokio::test]
    async fn a_warning_of_another_connection_says_nothing_about_the_commit() {
        let _guard = tracing_subscriber::registry().with(NoticeLayer).set_default();
        let connects = || async {
            warns("database has a collation version mismatch");
            true
        };
        let claim = async {
            tokio::time::sleep(LEASE * 5 / 2).await;
            7
        };
        assert!(matches!(worked_on(LEASE, claim, connects).await, Ok(7)));
        let cut_off = async {
            tokio::time::sleep(LEASE * 5 / 2).await;
            warns("canceling wait for synchronous replication due to user request");
        };
        assert!(matches!(worked_on(LEASE, cut_off, connects).await, Err(TermEnd::NotDurable(_))));
        let silent = std::future::pending::<()>();
        assert!(matches!(worked_on(LEASE, silent, || async { false }).await, Err(TermEnd::Silence)));
    }
}
