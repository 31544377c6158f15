//! A node's memory of tracked tables.
//!
//! Postgres is asked about every table that is not remembered, so that one tracked a moment ago is known everywhere; those
//! who ask at the same time share one query, but never one that began before they asked. What is remembered is at most
//! [`REFRESH_INTERVAL`] old, and doubted when the log says that the table's shape has changed.
//!
//! The follower makes sure that every table is known before an event of it is routed ([`Registry::acquaint`]), so that a
//! glob's plan for a table never rests on ignorance. What is known of a table that is gone is kept for its events that
//! are still to be shown.
//!
//! A session that compiled a filter with a [`TableInfo`] and has then joined the hub asks [`Registry::is_current`]: if the
//! shape changed in between, the hub may have told the old subscriptions before this one was there to be told.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use sqlx::Row as _;
use sqlx::postgres::{PgPool, PgRow};
use tokio::sync::{OnceCell, watch};
use tokio_util::sync::CancellationToken;

use super::TableInfo;
use crate::filter::{Column, ColumnType};
use crate::postgres::listen::Wakeups;
use crate::postgres::{Database, within};
use crate::table_name::{TableName, is_event};

/// Between two looks at all tracked tables, for what no notification told.
pub const REFRESH_INTERVAL: Duration = Duration::from_secs(30);
/// Between two looks, however many notifications there are.
const REFRESH_PAUSE: Duration = Duration::from_millis(200);
/// Tables that are gone, and names that are no tracked table, which are kept in mind; beyond, they are begun anew.
const MAX_GONE: usize = 10_000;
/// After a look that failed.
const REFRESH_RETRY: Duration = Duration::from_secs(1);
/// Longest name of a channel: Postgres refuses a longer one.
const MAX_CHANNEL_BYTES: usize = 63;
/// Names of one question to Postgres: more are asked for in the next.
const MAX_ROUND: usize = 1_000;
/// One question to Postgres. A network that swallowed it, and then the end of the connection, would be waited for for ever.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

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
    // Rises with every change of what is known.
    version: AtomicU64,
    channels: watch::Sender<Arc<HashMap<Arc<str>, String>>>,
    // Who asks next; closed when its query begins.
    next: Mutex<Arc<Round>>,
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    tables: HashMap<TableName, Entry>,
    // No tracked tables, as far as they were asked for.
    strangers: HashSet<TableName>,
    // What was read before a table was doubted must not be believed after.
    doubts: u64,
}

#[derive(Debug)]
struct Entry {
    info: Arc<TableInfo>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Current,
    /// Its shape has changed; nobody has asked since.
    Doubted,
    /// Dropped, renamed or untracked.
    Gone,
}

impl Known {
    /// True: this is news.
    fn learn(&mut self, info: &Arc<TableInfo>) -> bool {
        self.strangers.remove(info.name.as_str());
        match self.tables.get_mut(info.name.as_str()) {
            Some(entry) => {
                let same = *entry.info == **info && entry.state != State::Gone;
                entry.state = State::Current;
                if !same {
                    entry.info = Arc::clone(info);
                }
                !same
            }
            None => {
                self.tables.insert(info.name.clone(), Entry { info: Arc::clone(info), state: State::Current });
                true
            }
        }
    }

    /// True: this is news.
    fn lose(&mut self, name: &TableName) -> bool {
        if self.strangers.len() >= MAX_GONE {
            self.strangers.clear();
            self.tables.retain(|_, entry| entry.state != State::Gone);
        }
        self.strangers.insert(name.clone());
        let before = self.tables.get_mut(name).map(|entry| std::mem::replace(&mut entry.state, State::Gone));
        before.is_some_and(|before| before != State::Gone)
    }

    fn is_known(&self, canonical: &str) -> bool {
        self.strangers.contains(canonical)
            || self.tables.get(canonical).is_some_and(|entry| entry.state == State::Current)
    }
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
            version: AtomicU64::new(0),
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
        if let Some(entry) = self.known.read().tables.get(name)
            && entry.state == State::Current
        {
            return Ok(Lookup::Tracked(Arc::clone(&entry.info)));
        }
        let round = loop {
            let full = {
                let next = self.next.lock();
                let mut names = next.names.lock();
                if names.len() < MAX_ROUND || names.contains(name) {
                    names.insert(name.clone());
                    drop(names);
                    break Arc::clone(&next);
                }
                drop(names);
                Arc::clone(&next)
            };
            // Its question is as long as it may be: there is room in the one after it.
            let _ = full.answer.get_or_init(|| self.ask(&full)).await;
        };
        // Whoever comes first asks for all; if it is cancelled, another takes over.
        match round.answer.get_or_init(|| self.ask(&round)).await {
            Ok(found) => Ok(found.get(name).cloned().unwrap_or(Lookup::Unknown)),
            Err(error) => Err(sqlx::Error::Io(std::io::Error::other(Arc::clone(error)))),
        }
    }

    /// What was last known of a table, also of one that is gone; no I/O.
    #[must_use]
    pub fn cached(&self, canonical: &str) -> Option<Arc<TableInfo>> {
        self.known.read().tables.get(canonical).map(|entry| Arc::clone(&entry.info))
    }

    /// Whether a table still looks like this, as far as this node has heard.
    #[must_use]
    pub fn is_current(&self, info: &TableInfo) -> bool {
        let known = self.known.read();
        known.tables.get(info.name.as_str()).is_some_and(|entry| entry.state == State::Current && *entry.info == *info)
    }

    /// Rises with every change of what [`Registry::cached`] says.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Makes sure that each of these tables is either known or known to be none. Costs nothing where that is so already.
    ///
    /// # Errors
    /// Postgres could not be asked.
    pub async fn acquaint(&self, tables: impl IntoIterator<Item = &Arc<str>>) -> Result<(), sqlx::Error> {
        let unknown: BTreeSet<TableName> = {
            let known = self.known.read();
            let mut last: Option<&Arc<str>> = None;
            tables
                .into_iter()
                // Mostly runs of one table.
                .filter(|table| !last.replace(table).is_some_and(|last| Arc::ptr_eq(last, table)))
                .filter(|table| !is_event(table) && !known.is_known(table))
                .map(|table| TableName::from_canonical(table))
                .collect()
        };
        if unknown.is_empty() {
            return Ok(());
        }
        // On the node's own connection and apart from the rounds: the follower waits for no client's question.
        self.read(unknown.into_iter().collect(), &self.database.pool()).await.map(|_| ())
    }

    /// Asks for every tracked table, in one query.
    ///
    /// # Errors
    /// Postgres could not be asked; what was known stays.
    pub async fn refresh(&self) -> Result<(), sqlx::Error> {
        let began = self.known.read().doubts;
        let rows = within(ASK_TIMEOUT, sqlx::query(ALL_TRACKED).fetch_all(&self.database.pool())).await?;
        let read = rows.iter().map(|row| table_info(row).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        let mut news = false;
        {
            let mut known = self.known.write();
            if known.doubts != began {
                // Something changed meanwhile; the next look has it.
                return Ok(());
            }
            known.strangers.clear();
            for info in &read {
                news |= known.learn(info);
            }
            let there: HashSet<&TableName> = read.iter().map(|info| &info.name).collect();
            let lost: Vec<_> = known.tables.keys().filter(|name| !there.contains(name)).cloned().collect();
            for name in &lost {
                news |= known.lose(name);
            }
        }
        self.tell(news);
        Ok(())
    }

    /// A table's shape has changed: it is asked for when it is next needed.
    pub fn forget(&self, canonical: &str) {
        let mut known = self.known.write();
        known.doubts += 1;
        known.strangers.remove(canonical);
        if let Some(entry) = known.tables.get_mut(canonical)
            && entry.state == State::Current
        {
            entry.state = State::Doubted;
        }
    }

    /// Names that were no tracked tables may be some now.
    pub fn forget_strangers(&self) {
        let mut known = self.known.write();
        known.doubts += 1;
        known.strangers.clear();
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
        self.read(names, &self.database.clients()).await.map_err(Arc::new)
    }

    async fn read(&self, names: Vec<TableName>, pool: &PgPool) -> Result<HashMap<TableName, Lookup>, sqlx::Error> {
        let began = self.known.read().doubts;
        let (mut asked, mut schemas, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for name in names {
            if let Some((schema, table)) = name.schema_and_table() {
                schemas.push(schema.into_owned());
                tables.push(table.into_owned());
                asked.push(name);
            }
        }
        let asking = sqlx::query(NAMED).bind(&schemas).bind(&tables).fetch_all(pool);
        let rows = within(ASK_TIMEOUT, asking).await?;
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
        let mut news = false;
        {
            let mut known = self.known.write();
            if known.doubts == began {
                for name in &asked {
                    news |= match found.get(name) {
                        Some(Lookup::Tracked(info)) => known.learn(info),
                        _ => known.lose(name),
                    };
                }
            }
        }
        self.tell(news);
        Ok(found)
    }

    fn tell(&self, news: bool) {
        if !news {
            return;
        }
        self.version.fetch_add(1, Ordering::AcqRel);
        let known = self.known.read();
        let present = known.tables.values().filter(|entry| entry.state != State::Gone);
        // A table renamed since may have one that Postgres refuses, and with it the feed's chunks in the same statement.
        let channels: HashMap<Arc<str>, String> = present
            .filter_map(|entry| Some((entry.info.name.as_str().into(), entry.info.notify_channel.clone()?)))
            .filter(|(_, channel)| channel.len() <= MAX_CHANNEL_BYTES)
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
