//! The leader's look at the shape of tracked tables, and the SCHEMA events that come of it.
//!
//! A look repairs what is safe to repair (`tidewire.refresh_tracked()`), then compares every table with the fingerprint of
//! the look before, by OID. Event and new fingerprint are written in one statement, only if the fingerprint is still the
//! one compared with: of two leaders that overlap, one writes. Events go through the outbox, so they are ordered with the
//! changes around them.
//!
//! Runs beside the relay on a connection of its own and can only fail by itself: what a look could not do, the next does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use sqlx::Row as _;
use sqlx::postgres::PgConnection;
use sqlx::postgres::types::Oid;

use super::diff::{Change, Fingerprint, changes, described};
use crate::postgres::Database;
use crate::postgres::listen::Wakeups;
use crate::telemetry::metrics::{Metrics, gauge};

/// Between two looks, for what no event trigger told.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// The same with so many tables that looks are long: about two milliseconds a table were measured, and no more than one
/// part in this many of a server's processor is to go into looking.
const LOOK_SHARE: u32 = 20;
/// And never longer than this.
const MAX_LOOK_INTERVAL: Duration = Duration::from_secs(30);
/// Between two looks, however many notifications there are.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// A look that takes longer is given up with its connection.
const LOOK_TIMEOUT: Duration = Duration::from_secs(20);

/// What one look found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Look {
    /// SCHEMA events written.
    pub events: usize,
    /// What is wrong with tables, by name.
    pub faults: BTreeMap<String, Vec<String>>,
}

/// Looks for ever; ends only with the term.
pub async fn watch(database: Arc<Database>, wakeups: Arc<Wakeups>, metrics: Arc<Metrics>) {
    let mut hints = wakeups.watch_schema();
    let mut reported = BTreeMap::new();
    let mut connection = None;
    let mut failed = false;
    loop {
        hints.mark_unchanged();
        let began = Instant::now();
        let looked = tokio::time::timeout(LOOK_TIMEOUT, look_on(&database, &mut connection)).await;
        match looked.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer for {LOOK_TIMEOUT:?}"))) {
            Ok(found) => {
                failed = false;
                metrics.schema_events_total.inc_by(found.events as u64);
                metrics.table_faults.set(gauge(found.faults.len()));
                report(&mut reported, found.faults);
            }
            Err(error) => {
                connection = None;
                // What nobody can look at may not be whole.
                metrics.table_faults.set(metrics.table_faults.get().max(1));
                if !std::mem::replace(&mut failed, true) {
                    tracing::warn!(error = format!("{error:#}"), "tracked tables could not be looked at; trying again");
                }
            }
        }
        let interval = (began.elapsed() * LOOK_SHARE).clamp(LOOK_INTERVAL, MAX_LOOK_INTERVAL);
        tokio::time::sleep(LOOK_PAUSE).await;
        let _ = tokio::time::timeout(interval, hints.changed()).await;
    }
}

async fn look_on(database: &Database, kept: &mut Option<PgConnection>) -> anyhow::Result<Look> {
    let connection = match kept {
        Some(connection) => connection,
        None => {
            let (mut connection, _) = database.connect().await?;
            // A lock that is not free soon is left for the next look: waiting for it would hold others up behind us.
            sqlx::query(
                "SELECT set_config('lock_timeout', '1s', false), set_config('statement_timeout', '15s', false),
                        set_config('jit', 'off', false)",
            )
            .execute(&mut connection)
            .await?;
            kept.insert(connection)
        }
    };
    Ok(look(connection).await?)
}

fn report(reported: &mut BTreeMap<String, Vec<String>>, faults: BTreeMap<String, Vec<String>>) {
    for (table, faults) in &faults {
        if reported.get(table) != Some(faults) {
            tracing::warn!(table, ?faults, "capture of the table is not whole: `tidewire doctor` says what to run");
        }
    }
    for table in reported.keys().filter(|table| !faults.contains_key(*table)) {
        tracing::info!(table, "capture of the table is whole again");
    }
    *reported = faults;
}

/// Looks once. Each change is one statement, so nothing may be open on `connection`.
///
/// # Errors
/// Postgres refused or the connection broke; what was written before that stays, and the rest is for the next look.
pub async fn look(connection: &mut PgConnection) -> Result<Look, sqlx::Error> {
    let (faults, broken) = refresh(connection).await?;
    let mut found = Look { events: forget_dropped(connection).await?, faults };
    let rows = sqlx::query(CHANGED).bind(sqlx::types::Json(&broken)).fetch_all(&mut *connection).await?;
    for row in &rows {
        let (relid, was, now): (Oid, Option<String>, String) =
            (row.try_get("relid")?, row.try_get("was")?, row.try_get("now")?);
        found.events += usize::from(note(connection, relid, was.as_deref(), &now).await?);
    }
    Ok(found)
}

type Faults = BTreeMap<String, Vec<String>>;

/// Repairs, and says what is wrong: by name for people, by OID what keeps changes from being captured at all.
async fn refresh(connection: &mut PgConnection) -> Result<(Faults, BTreeMap<u32, Vec<String>>), sqlx::Error> {
    let rows = sqlx::query(
        "SELECT relid, tidewire.shown_name(table_name) AS table_name, problem, tidewire.shown_name(detail) AS detail
         FROM tidewire.refresh_tracked()",
    )
    .fetch_all(connection)
    .await?;
    let (mut faults, mut broken) = (Faults::new(), BTreeMap::<u32, Vec<String>>::new());
    for row in rows {
        let (relid, table): (Oid, String) = (row.try_get("relid")?, row.try_get("table_name")?);
        let (problem, detail): (String, Option<String>) = (row.try_get("problem")?, row.try_get("detail")?);
        let told = detail.map_or_else(|| problem.clone(), |detail| format!("{problem}: {detail}"));
        match problem.as_str() {
            "dropped" => continue,
            "trigger_missing" | "trigger_disabled" | "repair_refused" => {
                broken.entry(relid.0).or_default().push(told.clone())
            }
            _ => {}
        }
        faults.entry(table).or_default().push(told);
    }
    Ok((faults, broken))
}

/// Each event comes with its row's deletion (migration 6).
async fn forget_dropped(connection: &mut PgConnection) -> Result<usize, sqlx::Error> {
    let dropped = sqlx::query(
        "DELETE FROM tidewire.tracked_tables t
         WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = t.relid)",
    )
    .execute(connection)
    .await?
    .rows_affected();
    Ok(usize::try_from(dropped).unwrap_or(usize::MAX))
}

// $1 {"<oid>": ["<fault>"]}. Compared on the server: mostly nothing has changed, and the relay's thread has better things to
// do than to read hundreds of fingerprints. What has no form in UTF-8 cannot be read, and costs its own table alone: its events
// are sent as omitted, so that nobody takes them for whole.
const CHANGED: &str = "
    SELECT t.relid, t.fingerprint::text AS was, present.fingerprint::text AS now
    FROM tidewire.tracked_tables t
    CROSS JOIN LATERAL (
        SELECT tidewire.table_look(t.relid)
               || jsonb_build_object('faults', coalesce($1::jsonb -> t.relid::text, '[]')) AS fingerprint) AS present
    WHERE present.fingerprint IS NOT NULL AND t.fingerprint IS DISTINCT FROM present.fingerprint
        AND (getdatabaseencoding() = 'UTF8' OR tidewire.utf8_bytes(concat(t.fingerprint, present.fingerprint)) IS NOT NULL)
    ORDER BY t.relid";

/// Writes what changed, if nobody else has. True: an event was written.
async fn note(connection: &mut PgConnection, relid: Oid, was: Option<&str>, now: &str) -> Result<bool, sqlx::Error> {
    let decode = |error: serde_json::Error| sqlx::Error::Decode(error.into());
    let present: Fingerprint = serde_json::from_str(now).map_err(decode)?;
    let former: Option<Fingerprint> = was.map(serde_json::from_str).transpose().map_err(decode)?;
    let (event, mut to_keep): (Option<Value>, Value) = (
        former.as_ref().and_then(|former| event(former, &present, relid.0)),
        serde_json::from_str(now).map_err(decode)?,
    );
    if let (Some(was), None) = (was, &present.options) {
        // Without triggers the key cannot be told; what it was is kept until they are back.
        let was: Value = serde_json::from_str(was).map_err(decode)?;
        (to_keep["key"], to_keep["options"]) = (was["key"].clone(), was["options"].clone());
    }
    let table = former.map_or(present.name, |former| former.name);
    let written = sqlx::query(
        // Who alters the table's partitions holds its row until the commit: the next look sees what came of it.
        "WITH free AS (
            SELECT relid FROM tidewire.tracked_tables WHERE relid = $1 FOR UPDATE SKIP LOCKED),
         noted AS (
            UPDATE tidewire.tracked_tables SET fingerprint = $2
            WHERE relid = (SELECT relid FROM free) AND fingerprint IS NOT DISTINCT FROM $3::jsonb AND fingerprint IS DISTINCT FROM $2
            RETURNING relid)
         INSERT INTO tidewire.outbox (table_name, operation, after_data)
         SELECT $4, 'SCHEMA', $5::json FROM noted WHERE $5::json IS NOT NULL",
    )
    .bind(relid)
    .bind(&to_keep)
    .bind(was)
    .bind(&table)
    .bind(event.as_ref().map(Value::to_string))
    .execute(connection)
    .await?
    .rows_affected();
    if written > 0 {
        tracing::info!(table, relid = relid.0, "the table's shape has changed");
    }
    Ok(written > 0)
}

fn event(former: &Fingerprint, present: &Fingerprint, relid: u32) -> Option<Value> {
    let changes: Vec<Change> = changes(former, present);
    (!changes.is_empty()).then(|| described(&changes, present, relid))
}
