//! The election: whoever holds the advisory lock leads.
//!
//! Candidates *try* the lock about ten times a second on a connection of their own; they never block in it (a blocked
//! waiter would pin the xmin horizon of the whole database and could win as a zombie). A leader that resigns rings, so a
//! successor takes over at once.

use std::time::{Duration, Instant};

use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::sync::{mpsc, watch};

use super::announce::Announcer;
use super::answer::answered;
use super::portion::Portion;
use super::upkeep::{Pace, trim_log};
use super::{ANNOUNCE_QUEUE, LEADER_LOCK, Leader, Relay, TermEnd};
use crate::failpoint;
use crate::feed::seal::{FeedKey, Sealer};
use crate::lifecycle::Lifecycle;
use crate::log::append::{Interner, Position};
use crate::log::incarnation::{Candidate, Term, begin_term, end_former_terms, end_term};
use crate::postgres::{Incarnation, settings};
use crate::schema::watch::watch;
use crate::telemetry::repeats::Repeats;

/// Mean wait between two tries of the lock; jittered by half.
const CANDIDACY_INTERVAL: Duration = Duration::from_millis(100);
/// Wait after a connection failed.
const CONNECT_RETRY: Duration = Duration::from_millis(250);
/// Longest goodbye.
const RESIGN_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs for leader until the soft stop.
pub async fn run(relay: Relay, lifecycle: Lifecycle) {
    let stop = lifecycle.soft().clone();
    let failures = Repeats::default();
    while !stop.is_cancelled() {
        match candidacy(&relay, &lifecycle, &failures).await {
            Ok(()) | Err(TermEnd::Resigned) => {}
            Err(error) => {
                if let Some(repeated) = failures.happened(Instant::now(), &error.to_string()) {
                    tracing::warn!(%error, repeated, "not leading; trying again");
                }
                tokio::select! {
                    () = tokio::time::sleep(CONNECT_RETRY.mul_f64(rand::random_range(0.5..1.5))) => {}
                    () = stop.cancelled() => {}
                }
            }
        }
    }
}

/// One connection's candidacy: tries until it leads, leads until its term ends, closes the connection.
async fn candidacy(relay: &Relay, lifecycle: &Lifecycle, failures: &Repeats) -> Result<(), TermEnd> {
    let stop = lifecycle.soft();
    let connect = async {
        let (mut connection, incarnation) =
            relay.database.connect().await.map_err(|error| sqlx::Error::Configuration(error.into()))?;
        answered(relay.options.lease, settings::lead(&mut connection, relay.options.lease)).await??;
        Ok::<_, TermEnd>((connection, incarnation))
    };
    let (mut connection, incarnation) = tokio::select! {
        connected = connect => connected?,
        () = stop.cancelled() => return Err(TermEnd::Resigned),
    };
    while !try_lock(&mut connection, relay).await? {
        let wait = CANDIDACY_INTERVAL.mul_f64(rand::random_range(0.5..1.5));
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = relay.wakeups.leadership.notified() => {}
            () = stop.cancelled() => return Err(TermEnd::Resigned),
        }
    }
    failpoint::hit("election.locked").await.map_err(sqlx::Error::from)?;
    let ended = lead(relay, lifecycle, &mut connection, &incarnation).await;
    if relay.metrics.leader.get() == 1 {
        // Why this term ended is news, whatever ended the one before.
        failures.over();
    }
    relay.metrics.leader.set(0);
    relay.metrics.relay_parked.set(0);
    relay.metrics.table_faults.set(0);
    relay.metrics.notify_queue_permille.set(0);
    relay.metrics.feed_backlog_batches.set(0);
    match ended {
        Ok(term) => {
            let goodbye = resign(connection, &term);
            let _ = tokio::time::timeout(RESIGN_TIMEOUT, goodbye).await;
            Ok(())
        }
        Err(error) => {
            relay.metrics.relay_errors_total.inc();
            // Hard: no goodbye on a connection in doubt. The server notices the closed socket and frees the lock.
            drop(connection);
            Err(error)
        }
    }
}

async fn try_lock(connection: &mut PgConnection, relay: &Relay) -> Result<bool, TermEnd> {
    let work = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)").bind(LEADER_LOCK).fetch_one(connection);
    Ok(answered(relay.options.lease, work).await??)
}

/// One term. Ok: asked to stop, the lock is still held.
async fn lead(
    relay: &Relay,
    lifecycle: &Lifecycle,
    connection: &mut PgConnection,
    incarnation: &Incarnation,
) -> Result<Term, TermEnd> {
    let (mut feed, _) = relay.database.connect().await.map_err(|error| TermEnd::Announce(error.to_string()))?;
    answered(relay.options.lease, settings::announce(&mut feed)).await??;
    let feed_pid = answered(relay.options.lease, backend_pid(&mut feed)).await??;
    let pid = answered(relay.options.lease, backend_pid(connection)).await??;
    let key = FeedKey::draw();
    let candidate = Candidate {
        node: &relay.options.node,
        pid,
        feed_pid,
        feed_key: &key,
        incarnation,
        known: *relay.known.borrow(),
    };
    let term = answered(relay.options.lease, begin_term(connection, &candidate)).await??;
    failpoint::hit("election.began").await.map_err(sqlx::Error::from)?;
    let sealer = Sealer::new(&key, term.epoch, term.term)
        .ok_or_else(|| TermEnd::Announce("the feed key has a wrong length".to_owned()))?;
    relay.metrics.leader.set(1);
    relay.metrics.term.set(term.term.cast_signed());
    tracing::info!(term = term.term, epoch = term.epoch, newest = term.newest, "leading");
    let (sender, batches) = mpsc::channel(ANNOUNCE_QUEUE);
    let (parking, may_park) = watch::channel(true);
    let mut announcer = Announcer {
        connection: feed,
        sealer,
        batches,
        may_park: parking,
        channels: relay.channels.clone(),
        metrics: relay.metrics.clone(),
        newest: term.newest,
        queue_permille: 0,
    };
    let mut leader = Leader {
        relay,
        connection,
        announce: sender,
        may_park,
        pid,
        position: Position::beginning(),
        term: term.term,
        newest: term.newest,
        partition_end: 0,
        pace: Pace::new(Instant::now()),
        window: i64::from(relay.options.batch),
        portion: Portion::new(relay.options.batch, relay.options.event_bytes),
        interner: Interner::default(),
        careful: false,
        doubted: None,
        parked: false,
        swept: Instant::now(),
        torn_reported: None,
    };
    answered(relay.options.lease, end_former_terms(leader.connection, term.term)).await??;
    let open = term.open_xid.clone();
    tokio::select! {
        ended = leader.run(open, lifecycle.soft()) => ended?,
        ended = announcer.run() => {
            ended.map_err(|error| TermEnd::Announce(error.to_string()))?;
            return Err(TermEnd::Announce("ended by itself".to_owned()));
        }
        () = trim_log(relay.database.clone(), relay.options.retention, relay.metrics.clone()) => {}
        () = watch(relay.database.clone(), relay.wakeups.clone(), relay.metrics.clone()) => {}
    }
    // What was committed last is still to be announced.
    drop(leader);
    let _ = tokio::time::timeout(RESIGN_TIMEOUT, announcer.run()).await;
    Ok(term)
}

async fn backend_pid(connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(connection).await
}

async fn resign(mut connection: PgConnection, term: &Term) -> Result<(), sqlx::Error> {
    failpoint::hit("election.resigning").await?;
    end_term(&mut connection, term.term, "resigned").await?;
    sqlx::query("SELECT pg_advisory_unlock($1)").bind(LEADER_LOCK).execute(&mut connection).await?;
    sqlx::query("SELECT pg_notify('tidewire_leader', '')").execute(&mut connection).await?;
    tracing::info!(term = term.term, "resigned");
    connection.close().await
}
