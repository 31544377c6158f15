//! A node's memory of tracked tables.
//!
//! Postgres is asked about every table that is not remembered, so that one tracked a moment ago is known everywhere; those
//! who ask at the same time share one query, but never one that began before they asked. What is remembered is at most
//! [`REFRESH_INTERVAL`] old, and is forgotten when the log says that the table's shape has changed.
//!
//! A session that compiled a filter with a [`TableInfo`] and has then joined the hub asks [`Registry::is_current`]: if the
//! shape changed in between, the hub may have told the old subscriptions before this one was there to be told.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use tokio::sync::{OnceCell, watch};
use tokio_util::sync::CancellationToken;

use super::TableInfo;
use crate::filter::{Column, ColumnType};
use crate::postgres::Database;
use crate::postgres::listen::Wakeups;
use crate::table_name::TableName;

/// Between two looks at all tracked tables, for what no notification told.
pub const REFRESH_INTERVAL: Duration = Duration::from_secs(30);
/// Between two looks, however many notifications there are.
const REFRESH_PAUSE: Duration = Duration::from_millis(200);
/// After a look that failed.
const REFRESH_RETRY: Duration = Duration::from_secs(1);

/// What is known about a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// A tracked table.
    Tracked(Arc<TableInfo>),
    /// There is such a table (or view), but nothing captures its changes.
    NotTracked,
    /// There is no such table.
    Unknown,
}

/// Every tracked table that this node has heard of. One for each node.
#[derive(Debug)]
pub struct Registry {
    database: Arc<Database>,
    known: RwLock<Known>,
    channels: watch::Sender<Arc<HashMap<Arc<str>, String>>>,
    // Who asks next; closed when its query begins.
    next: Mutex<Arc<Round>>,
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    tables: HashMap<TableName, Arc<TableInfo>>,
    // What was read before a table was forgotten must not be remembered after.
    forgotten: u64,
}

/// Names that are asked for together.
#[derive(Debug, Default)]
struct Round {
    names: Mutex<BTreeSet<TableName>>,
    answer: OnceCell<Answer>,
}

type Answer = Result<HashMap<TableName, Lookup>, Arc<sqlx::Error>>;

impl Registry {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(database: Arc<Database>) -> Self {
        Self {
            database,
            known: RwLock::default(),
            channels: watch::channel(Arc::default()).0,
            next: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// What a table is now. A table that is not remembered is asked for, whatever was answered before. Not for domain
    /// events, which need no tracking.
    ///
    /// # Errors
    /// Postgres could not be asked. Bounded by the pool's and the statement's time-outs.
    pub async fn lookup(&self, name: &TableName) -> Result<Lookup, sqlx::Error> {
        if let Some(info) = self.cached(name.as_str()) {
            return Ok(Lookup::Tracked(info));
        }
        let round = {
            let next = self.next.lock();
            next.names.lock().insert(name.clone());
            Arc::clone(&next)
        };
        // Whoever comes first asks for all; if it is cancelled, another takes over.
        match round.answer.get_or_init(|| self.ask(&round)).await {
            Ok(found) => Ok(found.get(name).cloned().unwrap_or(Lookup::Unknown)),
            Err(error) => Err(sqlx::Error::Io(std::io::Error::other(Arc::clone(error)))),
        }
    }

    /// What is remembered of a table; no I/O.
    #[must_use]
    pub fn cached(&self, canonical: &str) -> Option<Arc<TableInfo>> {
        self.known.read().tables.get(canonical).cloned()
    }

    /// Whether a table still looks like this, as far as this node has heard.
    #[must_use]
    pub fn is_current(&self, info: &TableInfo) -> bool {
        self.known.read().tables.get(info.name.as_str()).is_some_and(|known| **known == *info)
    }

    /// Asks for every tracked table, in one query.
    ///
    /// # Errors
    /// Postgres could not be asked; what was remembered stays.
    pub async fn refresh(&self) -> Result<(), sqlx::Error> {
        let began = self.known.read().forgotten;
        let rows = sqlx::query(ALL_TRACKED).fetch_all(self.database.pool()).await?;
        let read = rows.iter().map(table_info).collect::<Result<Vec<_>, _>>()?;
        {
            let mut known = self.known.write();
            if known.forgotten != began {
                // Something changed meanwhile; the next look has it.
                return Ok(());
            }
            let mut former = std::mem::take(&mut known.tables);
            known.tables = read
                .into_iter()
                .map(|info| {
                    let kept = former.remove(info.name.as_str()).filter(|kept| **kept == info);
                    (info.name.clone(), kept.unwrap_or_else(|| Arc::new(info)))
                })
                .collect();
        }
        self.tell_channels();
        Ok(())
    }

    /// Forgets a table: its shape has changed.
    pub fn forget(&self, canonical: &str) {
        let mut known = self.known.write();
        known.forgotten += 1;
        known.tables.remove(canonical);
    }

    /// Tables with a public channel, and its name.
    #[must_use]
    pub fn public_channels(&self) -> watch::Receiver<Arc<HashMap<Arc<str>, String>>> {
        self.channels.subscribe()
    }

    /// Refreshes at once, at every notification of a schema change, and now and then.
    pub async fn run(self: Arc<Self>, wakeups: Arc<Wakeups>, stop: CancellationToken) {
        let mut changes = wakeups.watch_schema();
        loop {
            changes.mark_unchanged();
            let refreshed = tokio::select! {
                refreshed = self.refresh() => refreshed,
                () = stop.cancelled() => return,
            };
            let wait = match refreshed {
                Ok(()) => REFRESH_INTERVAL,
                Err(error) => {
                    tracing::debug!(%error, "tracked tables could not be read; trying again");
                    REFRESH_RETRY
                }
            };
            let due = async {
                tokio::time::sleep(REFRESH_PAUSE).await;
                let _ = tokio::time::timeout(wait, changes.changed()).await;
            };
            tokio::select! {
                () = due => {}
                () = stop.cancelled() => return,
            }
        }
    }

    async fn ask(&self, round: &Arc<Round>) -> Answer {
        let _turn = self.turn.lock().await;
        {
            let mut next = self.next.lock();
            if Arc::ptr_eq(&next, round) {
                *next = Arc::default();
            }
        }
        let names: Vec<TableName> = round.names.lock().iter().cloned().collect();
        self.read(names).await.map_err(Arc::new)
    }

    async fn read(&self, names: Vec<TableName>) -> Result<HashMap<TableName, Lookup>, sqlx::Error> {
        let began = self.known.read().forgotten;
        let (mut asked, mut schemas, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for name in names {
            if let Some((schema, table)) = name.schema_and_table() {
                schemas.push(schema.into_owned());
                tables.push(table.into_owned());
                asked.push(name);
            }
        }
        let rows = sqlx::query(NAMED).bind(&schemas).bind(&tables).fetch_all(self.database.pool()).await?;
        let mut found = HashMap::with_capacity(asked.len());
        for row in &rows {
            let position: i64 = row.try_get("position")?;
            let Some(name) = usize::try_from(position - 1).ok().and_then(|index| asked.get(index)) else { continue };
            let answer = match row.try_get::<bool, _>("tracked")? {
                true => Lookup::Tracked(Arc::new(table_info(row)?)),
                false => Lookup::NotTracked,
            };
            found.insert(name.clone(), answer);
        }
        {
            let mut known = self.known.write();
            if known.forgotten == began {
                for name in &asked {
                    match found.get(name) {
                        Some(Lookup::Tracked(info)) => known.tables.insert(name.clone(), Arc::clone(info)),
                        _ => known.tables.remove(name),
                    };
                }
            }
        }
        self.tell_channels();
        Ok(found)
    }

    fn tell_channels(&self) {
        let known = self.known.read();
        let channels: HashMap<Arc<str>, String> = known
            .tables
            .values()
            .filter_map(|info| Some((info.name.as_str().into(), info.notify_channel.clone()?)))
            .collect();
        self.channels.send_if_modified(|told| {
            let changed = **told != channels;
            if changed {
                *told = Arc::new(channels);
            }
            changed
        });
    }
}

// The triggers are the truth about how a table is captured; tidewire.tracked_tables speaks where they are gone.
macro_rules! described {
    ($from:literal) => {
        concat!(
            "SELECT c.oid AS relid, tidewire.table_text(c.oid) AS name, t.relid IS NOT NULL OR o.options IS NOT NULL AS tracked,
                    tidewire.table_fingerprint(c.oid)::text AS fingerprint,
                    CASE WHEN o.options IS NULL THEN t.key_columns ELSE tidewire.column_names(c.oid, o.options, 'key') END AS key_columns,
                    CASE WHEN o.options IS NULL THEN t.columns ELSE tidewire.column_names(c.oid, o.options, 'columns') END AS columns,
                    CASE WHEN o.options IS NULL THEN t.except_columns ELSE tidewire.column_names(c.oid, o.options, 'except_columns') END
                        AS except_columns,
                    coalesce((o.options ->> 'before_image')::boolean, t.before_image, true) AS before_image,
                    CASE WHEN coalesce((o.options ->> 'notify')::boolean, t.notify) THEN tidewire.notify_channel(c.oid) END AS notify_channel, ",
            $from,
            " LEFT JOIN LATERAL (SELECT CASE WHEN c.relispartition AND t.relid IS NULL THEN NULL
                                         ELSE tidewire.tracked_options(c.oid) END AS options) AS o ON true"
        )
    };
}

const ALL_TRACKED: &str =
    described!("0::bigint AS position FROM tidewire.tracked_tables t JOIN pg_catalog.pg_class c ON c.oid = t.relid");

// $1 schemas, $2 tables. The partitions of a tracked table carry its triggers, but are not tracked themselves.
const NAMED: &str = described!(
    "asked.position FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS asked (schema, name, position)
     JOIN pg_catalog.pg_namespace n ON n.nspname = asked.schema
     JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = asked.name AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
     LEFT JOIN tidewire.tracked_tables t ON t.relid = c.oid"
);

/// What is needed of `tidewire.table_fingerprint()`.
#[derive(serde::Deserialize)]
struct Shape {
    row_security: bool,
    columns: Vec<ShapeColumn>,
}

#[derive(serde::Deserialize)]
struct ShapeColumn {
    name: String,
    type_name: String,
    type_kind: String,
}

fn table_info(row: &PgRow) -> Result<TableInfo, sqlx::Error> {
    let fingerprint: String = row.try_get("fingerprint")?;
    let shape: Shape = serde_json::from_str(&fingerprint).map_err(|error| sqlx::Error::Decode(error.into()))?;
    let columns: Vec<Column> = shape
        .columns
        .into_iter()
        .map(|column| {
            let kind = column.type_kind.chars().next().unwrap_or('b');
            Column::new(column.name, ColumnType::from_postgres(&column.type_name, kind))
        })
        .collect();
    let key_columns: Option<Vec<String>> = row.try_get("key_columns")?;
    let listed: Option<Vec<String>> = row.try_get("columns")?;
    let excepted: Option<Vec<String>> = row.try_get("except_columns")?;
    let captured = match (listed, excepted) {
        // The key is always carried.
        (Some(listed), _) => {
            Some(listed.into_iter().chain(key_columns.iter().flatten().cloned()).map(String::into_boxed_str).collect())
        }
        (None, Some(excepted)) => Some(
            columns
                .iter()
                .filter(|column| !excepted.contains(&column.name))
                .map(|column| column.name.as_str().into())
                .collect(),
        ),
        (None, None) => None,
    };
    Ok(TableInfo {
        name: TableName::from_canonical(&row.try_get::<String, _>("name")?),
        relid: row.try_get::<sqlx::postgres::types::Oid, _>("relid")?.0,
        columns,
        captured,
        before_image: row.try_get("before_image")?,
        key_columns,
        row_security: shape.row_security,
        notify_channel: row.try_get("notify_channel")?,
    })
}
