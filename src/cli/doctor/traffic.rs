//! What goes on right now: who relays, what waits, and which sessions stand in the way.

use std::time::Duration;

use sqlx::Row as _;

use super::{Finding, or_unasked, rows};
use crate::cli::status;
use crate::log::append::outbox_lock_holders;
use crate::postgres::Pool;
use crate::postgres::locks::ForeignLock;

/// An event that waits longer has nobody who relays it.
const LATE_MS: i64 = 10_000;
/// An outbox this large on disk with little in it is not being cleaned.
const LARGE_OUTBOX_BYTES: i64 = 1 << 30;
/// A lock on the outbox that is still there after this is not a passing one.
const LOCK_SAMPLE: Duration = Duration::from_millis(500);
/// Share of the notification queue from which nodes get ranges only, and from which they poll.
const QUEUE_WARNING: f64 = 0.02;
const QUEUE_PROBLEM: f64 = 0.2;

pub(super) async fn checks(pool: &Pool) -> Vec<Finding> {
    let mut findings = or_unasked("relay", relay(pool).await);
    findings.extend(or_unasked("foreign locks", foreign(pool).await));
    findings.extend(or_unasked("outbox", outbox(pool).await));
    findings.extend(or_unasked("outbox locks", locks(pool).await));
    findings.extend(or_unasked("xmin", xmin(pool).await));
    findings.extend(or_unasked("notify queue", queue(pool).await));
    findings.extend(or_unasked("prepared transactions", prepared(pool).await));
    findings.extend(or_unasked("dead letters", dead_letters(pool).await));
    findings
}

async fn relay(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let (leader, outbox) = (status::leader(pool).await?, status::outbox(pool).await?);
    Ok(vec![match leader {
        Some(leader) if outbox.lag_ms > LATE_MS => Finding::warning(
            "relay",
            format!("{} leads, but the oldest event waits for {} s: see its log", leader.node, outbox.lag_ms / 1000),
        ),
        Some(leader) => Finding::fine("relay", format!("{} leads, term {}", leader.node, leader.term)),
        None if outbox.events > 0 => {
            let what =
                format!("nobody leads and {} events wait, the oldest for {} s", outbox.events, outbox.lag_ms / 1000);
            Finding::problem("relay", what).run("tidewire serve")
        }
        None => Finding::note("relay", "nobody leads: no node runs").run("tidewire serve"),
    }])
}

/// The relay's advisory locks in others' hands.
async fn foreign(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let locks = status::foreign(pool).await?;
    if locks.is_empty() {
        return Ok(vec![Finding::fine("foreign locks", "none")]);
    }
    let finding = |lock: &ForeignLock| {
        let what = format!("{} {}", lock.holder, lock.effect());
        let finding = match lock.lock.as_str() {
            "leader" => Finding::problem("foreign locks", what),
            _ => Finding::warning("foreign locks", what),
        };
        finding.run(lock.end.clone())
    };
    Ok(locks.iter().map(finding).collect())
}

async fn outbox(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let waiting = status::outbox(pool).await?.events;
    let row = sqlx::query(
        "SELECT pg_total_relation_size('tidewire.outbox') AS bytes, n_dead_tup AS dead
         FROM pg_catalog.pg_stat_user_tables WHERE relid = 'tidewire.outbox'::regclass",
    )
    .fetch_one(pool)
    .await?;
    let (bytes, dead): (i64, i64) = (row.try_get("bytes")?, row.try_get("dead")?);
    let what = format!("{waiting} events wait, {} MiB on disk, {dead} dead rows", bytes >> 20);
    Ok(vec![match bytes > LARGE_OUTBOX_BYTES && waiting < 10_000 {
        true => Finding::warning("outbox", format!("{what}: vacuum cannot keep up; see xmin"))
            .run("VACUUM tidewire.outbox;"),
        false => Finding::fine("outbox", what),
    }])
}

/// Row locks that outlast a moment; a claim's own are gone within milliseconds.
async fn locks(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let leader = status::leader(pool).await?.map(|leader| format!("pid {} (", leader.pid));
    let before = outbox_lock_holders(pool).await?;
    if before.is_empty() {
        return Ok(vec![Finding::fine("outbox locks", "none")]);
    }
    tokio::time::sleep(LOCK_SAMPLE).await;
    let after = outbox_lock_holders(pool).await?;
    let foreign = after
        .into_iter()
        .filter(|holder| before.contains(holder) && leader.as_ref().is_none_or(|leader| !holder.starts_with(leader)));
    let findings: Vec<_> = foreign
        .map(|holder| {
            let pid = holder.trim_start_matches("pid ").split(' ').next().unwrap_or_default().to_owned();
            let what = format!("{holder} locks rows of the outbox: what follows them waits");
            Finding::problem("outbox locks", what).run(format!("SELECT pg_terminate_backend({pid});"))
        })
        .collect();
    Ok(if findings.is_empty() { vec![Finding::fine("outbox locks", "none that last")] } else { findings })
}

/// What keeps vacuum from cleaning the outbox. The relay itself stays fast.
async fn xmin(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let held = rows(
        pool,
        "SELECT format('session %s of %s (%s, %s) has had a transaction open for %s s', pid, usename, application_name, state,
                       extract(epoch FROM clock_timestamp() - xact_start)::bigint) AS what,
                format('SELECT pg_terminate_backend(%s);', pid) AS run
         FROM pg_catalog.pg_stat_activity
         WHERE backend_type = 'client backend' AND datname = current_database() AND pid <> pg_backend_pid()
             AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND xact_start < clock_timestamp() - interval '60 s'
         UNION ALL
         SELECT format('prepared transaction %L has been waiting for %s s', gid,
                       extract(epoch FROM clock_timestamp() - prepared)::bigint), format('ROLLBACK PREPARED %L;', gid)
         FROM pg_catalog.pg_prepared_xacts
         WHERE database = current_database() AND prepared < clock_timestamp() - interval '60 s'
         UNION ALL
         SELECT format('replication slot %I is %s transactions behind', slot_name, age(xmin)),
                format('SELECT pg_drop_replication_slot(%L); -- if nothing uses it any more', slot_name)
         FROM pg_catalog.pg_replication_slots WHERE age(xmin) > 1000000
         UNION ALL
         SELECT format('standby %s holds back vacuum by %s transactions (hot_standby_feedback)', application_name, age(backend_xmin)),
                'end the long query on that standby'
         FROM pg_catalog.pg_stat_replication WHERE age(backend_xmin) > 1000000",
    )
    .await?;
    if held.is_empty() {
        return Ok(vec![Finding::fine("xmin", "nothing keeps vacuum from cleaning the outbox")]);
    }
    held.iter()
        .map(|row| {
            let what = format!("{}: vacuum cannot clean the outbox meanwhile", row.try_get::<String, _>("what")?);
            Ok(Finding::warning("xmin", what).run(row.try_get::<String, _>("run")?))
        })
        .collect()
}

/// The queue is one for the whole server, and pinned by any session that stays in a transaction after LISTEN. Postgres does
/// not say which that is; it is among those whose transaction is the oldest.
async fn queue(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let used: f64 = sqlx::query_scalar("SELECT pg_notification_queue_usage()").fetch_one(pool).await?;
    let suspects = rows(
        pool,
        r"SELECT format('%s of %s in database %s (%s), in a transaction for %s s', pid, usename, datname, application_name,
                        extract(epoch FROM clock_timestamp() - xact_start)::bigint) AS who, pid,
                 query ~* '^\s*listen\M' AS listened
          FROM pg_catalog.pg_stat_activity
          WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND xact_start < clock_timestamp() - interval '5 s'
          ORDER BY xact_start LIMIT 5",
    )
    .await?;
    let percent = format!("{:.1} % of the notification queue is in use", used * 100.0);
    let mut findings = vec![match used {
        ..QUEUE_WARNING => Finding::fine("notify queue", percent),
        ..QUEUE_PROBLEM => {
            Finding::warning("notify queue", format!("{percent}: nodes read the log instead of the feed"))
        }
        _ => Finding::problem(
            "notify queue",
            format!("{percent}: the feed is silent; at 100 % every NOTIFY on this server fails at COMMIT"),
        ),
    }];
    for row in &suspects {
        let (who, pid, listened): (String, i32, bool) =
            (row.try_get("who")?, row.try_get("pid")?, row.try_get("listened")?);
        let end = format!("SELECT pg_terminate_backend({pid});");
        if listened {
            let what = format!("session {who} listens and stays in a transaction: it holds the queue");
            findings.push(Finding::warning("notify queue", what).run(end));
        } else if used >= QUEUE_WARNING {
            let what = format!("session {who} holds the queue if it ever said LISTEN");
            findings.push(Finding::note("notify queue", what).run(end));
        }
    }
    Ok(findings)
}

/// PREPARE TRANSACTION refuses a transaction that has notified, as writers do that find the relay parked.
async fn prepared(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT current_setting('max_prepared_transactions')::int AS allowed, tidewire.wake_mode() AS mode,
                (SELECT count(*) FROM pg_catalog.pg_prepared_xacts WHERE database = current_database()) AS present",
    )
    .fetch_one(pool)
    .await?;
    let (allowed, mode, present): (i32, String, i64) =
        (row.try_get("allowed")?, row.try_get("mode")?, row.try_get("present")?);
    let remedy = "set wake = \"poll\" for every node (TIDEWIRE_WAKE=poll), or: SELECT tidewire.set_wake('poll');";
    Ok(vec![match (mode.as_str(), allowed, present) {
        ("poll", ..) => Finding::fine("prepared transactions", "writers never notify (wake mode poll)"),
        (_, 0, _) => Finding::fine("prepared transactions", "not in use on this server"),
        (_, _, 0) => {
            let what = "allowed on this server: a transaction that writes events and is then prepared may be refused";
            Finding::note("prepared transactions", what).run(remedy)
        }
        (_, _, present) => {
            let what = format!("{present} are there: one that writes events while the relay is parked is refused");
            Finding::warning("prepared transactions", what).run(remedy)
        }
    }])
}

async fn dead_letters(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let asked = rows(
        pool,
        "SELECT reader, count(*) AS letters, max(at)::text AS newest FROM tidewire.dead_letters GROUP BY reader ORDER BY reader",
    )
    .await?;
    if asked.is_empty() {
        return Ok(vec![Finding::fine("dead letters", "none")]);
    }
    asked
        .iter()
        .map(|row| {
            let (reader, letters): (String, i64) = (row.try_get("reader")?, row.try_get("letters")?);
            let newest: String = row.try_get("newest")?;
            let what = format!("{letters} events that {reader} could not carry, the newest of {newest}");
            let look = "SELECT seq, reader, error, at FROM tidewire.dead_letters ORDER BY id DESC;";
            Ok(Finding::warning("dead letters", what).run(look))
        })
        .collect()
}
