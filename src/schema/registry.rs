//! A node's memory of tracked tables.
//!
//! Postgres is asked about every table that is not remembered, so that one tracked a moment ago is known everywhere; those
//! who ask at the same time share one query, but never one that began before they asked. What is remembered is at most
//! [`REFRESH_INTERVAL`] old, and doubted when the log says that the table's shape has changed. Whoever needs the table as it
//! is at this moment, or is about to refuse somebody for what is remembered, asks ([`Registry::look_again`]).
//!
//! The follower makes sure that every table is known before an event of it is routed ([`Registry::acquaint`]), so that a
//! glob's plan for a table never rests on ignorance. What is known of a table that is gone is kept for its events that
//! are still to be shown.
//!
//! A session that compiled a filter with a [`TableInfo`] and has then joined the hub asks [`Registry::is_current`]: if the
//! shape changed in between, the hub may have told the old subscriptions before this one was there to be told.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{TableInfo, described};
use crate::filter::Server;
use crate::lifecycle::Lifecycle;
use crate::postgres::Pool;
use crate::postgres::listen::Wakeups;
use crate::postgres::rounds::Rounds;
use crate::postgres::{Database, within};
use crate::table_name::{TableName, is_event};

/// Between two looks at all tracked tables, for what no notification told.
pub const REFRESH_INTERVAL: Duration = Duration::from_secs(30);
/// Between two looks, however many notifications there are.
const REFRESH_PAUSE: Duration = Duration::from_millis(200);
/// Tables that are gone, and names that are no tracked table, which are kept in mind; beyond, they are begun anew.
const MAX_GONE: usize = 10_000;
/// As long may a change's SCHEMA event take after the change is known here: the leader looks every two seconds, and a new
/// leader has to be elected first.
const SETTLED_AFTER: Duration = Duration::from_secs(10);
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
    rounds: Rounds<TableName, Answer>,
    server: RwLock<Option<Server>>,
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
    // When it was first seen like this.
    since: Instant,
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
                    entry.since = Instant::now();
                }
                !same
            }
            None => {
                let entry = Entry { info: Arc::clone(info), state: State::Current, since: Instant::now() };
                self.tables.insert(info.name.clone(), entry);
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

type Answer = Result<Arc<HashMap<TableName, Lookup>>, Arc<sqlx::Error>>;

impl Registry {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(database: Arc<Database>, lifecycle: Lifecycle) -> Self {
        Self {
            database,
            known: RwLock::default(),
            version: AtomicU64::new(0),
            channels: watch::channel(Arc::default()).0,
            rounds: Rounds::new(lifecycle, Duration::ZERO, MAX_ROUND),
            server: RwLock::default(),
        }
    }

    /// What a table is now. A table that is not remembered is asked for, whatever was answered before. Not for domain
    /// events, which need no tracking.
    ///
    /// # Errors
    /// Postgres could not be asked. Bounded by the pool's and the statement's time-outs.
    pub async fn lookup(self: &Arc<Self>, name: &TableName) -> Result<Lookup, sqlx::Error> {
        if let Some(entry) = self.known.read().tables.get(name)
            && entry.state == State::Current
        {
            return Ok(Lookup::Tracked(Arc::clone(&entry.info)));
        }
        self.look_again(name).await
    }

    /// The same, whatever is remembered.
    ///
    /// # Errors
    /// As [`Registry::lookup`].
    pub async fn look_again(self: &Arc<Self>, name: &TableName) -> Result<Lookup, sqlx::Error> {
        let registry = Arc::clone(self);
        let question = async move |names: BTreeSet<TableName>| {
            let pool = registry.database.clients();
            registry.read_known(names.into_iter().collect(), &pool).await.map(Arc::new).map_err(Arc::new)
        };
        match self.rounds.ask(name.clone(), question).await {
            Some(Ok(found)) => Ok(found.get(name).cloned().unwrap_or(Lookup::Unknown)),
            Some(Err(error)) => Err(sqlx::Error::Io(std::io::Error::other(error))),
            None => Err(sqlx::Error::WorkerCrashed),
        }
    }

    /// What was last known of a table, also of one that is gone; no I/O.
    #[must_use]
    pub fn cached(&self, canonical: &str) -> Option<Arc<TableInfo>> {
        self.known.read().tables.get(canonical).map(|entry| Arc::clone(&entry.info))
    }

    /// The server that answers now, as far as its answers tell.
    ///
    /// # Errors
    /// It never answered, and could not be asked.
    pub async fn server(&self) -> Result<Server, sqlx::Error> {
        if let Some(server) = *self.server.read() {
            return Ok(server);
        }
        let server = within(ASK_TIMEOUT, described::server_of(&self.database.clients())).await?;
        *self.server.write() = Some(server);
        Ok(server)
    }

    /// The same, if it ever answered.
    #[must_use]
    pub fn known_server(&self) -> Option<Server> {
        *self.server.read()
    }

    /// The tracked tables whose capture is broken, and by what, as far as this node has heard.
    #[must_use]
    pub fn faults(&self) -> BTreeMap<String, Vec<String>> {
        let known = self.known.read();
        let present = known.tables.values().filter(|entry| entry.state != State::Gone && !entry.info.faults.is_empty());
        present.map(|entry| (entry.info.name.as_str().to_owned(), entry.info.faults.clone())).collect()
    }

    /// Whether a table still looks like this, as far as this node has heard.
    #[must_use]
    pub fn is_current(&self, info: &TableInfo) -> bool {
        let known = self.known.read();
        known.tables.get(info.name.as_str()).is_some_and(|entry| entry.state == State::Current && *entry.info == *info)
    }

    /// Whether a table has looked like this only for a while, so that the SCHEMA event of its last change may be on its way.
    #[must_use]
    pub fn is_recent(&self, info: &TableInfo) -> bool {
        let known = self.known.read();
        known.tables.get(info.name.as_str()).is_none_or(|entry| entry.since.elapsed() < SETTLED_AFTER)
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
        self.read_known(unknown.into_iter().collect(), &self.database.pool()).await.map(|_| ())
    }

    /// Asks for every tracked table, in one query.
    ///
    /// # Errors
    /// Postgres could not be asked; what was known stays.
    pub async fn refresh(&self) -> Result<(), sqlx::Error> {
        let began = self.known.read().doubts;
        let read = within(ASK_TIMEOUT, described::tracked(&self.database.pool())).await?;
        let read: Vec<Arc<TableInfo>> = read.into_iter().map(Arc::new).collect();
        self.note_server(read.first().map(|info| info.server));
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

    async fn read_known(&self, names: Vec<TableName>, pool: &Pool) -> Result<HashMap<TableName, Lookup>, sqlx::Error> {
        match self.read(names.clone(), pool).await {
            Err(error) if is_of_encoding(&error) => self.read_each(names, pool).await,
            answer => answer,
        }
    }

    /// Somebody asked for a name that the database's encoding cannot write, so that there is no such table, or a column's name
    /// cannot be read. Others share the question: it must not fail for them.
    async fn read_each(&self, names: Vec<TableName>, pool: &Pool) -> Result<HashMap<TableName, Lookup>, sqlx::Error> {
        let mut all = HashMap::with_capacity(names.len());
        for name in names {
            match self.read(vec![name.clone()], pool).await {
                Ok(found) => all.extend(found),
                Err(error) if is_of_encoding(&error) => {
                    self.known.write().lose(&name);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    async fn read(&self, names: Vec<TableName>, pool: &Pool) -> Result<HashMap<TableName, Lookup>, sqlx::Error> {
        let began = self.known.read().doubts;
        let described = within(ASK_TIMEOUT, described::describe(pool, &names)).await?;
        self.note_server(described.values().next().map(|described| described.info.server));
        let answers = described.into_iter().map(|(name, described)| {
            let tracked = described.tracked.then(|| Lookup::Tracked(Arc::new(described.info)));
            (name, tracked.unwrap_or(Lookup::NotTracked))
        });
        let found: HashMap<TableName, Lookup> = answers.collect();
        let mut news = false;
        {
            let mut known = self.known.write();
            if known.doubts == began {
                for name in names.iter().filter(|name| !name.is_event()) {
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

    /// An upgrade may have exchanged it.
    fn note_server(&self, answered: Option<Server>) {
        if answered.is_some() && *self.server.read() != answered {
            *self.server.write() = answered;
        }
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

/// A character that the database's encoding has not, or a byte that is none of UTF-8.
fn is_of_encoding(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| code == "22P05" || code == "22021")
}
