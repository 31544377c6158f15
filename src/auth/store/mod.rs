//! The store of API keys: judges tokens, remembers the judgement, and takes it back when the database says so.
//!
//! - A key's row is read once and cached for [`KEY_CACHE_TTL`]; a reconnect storm of one key makes one query. A token
//!   that opens nothing is remembered for [`UNKNOWN_KEY_TTL`], apart, so that a flood of guesses evicts no real key.
//! - The cache is asked for the whole token, never for the id alone: the wrong secret of a key that exists and is cached
//!   costs the same query, with the same empty answer, as an id that does not exist. So the time of a refusal says
//!   nothing about which ids there are.
//! - [`KeyStore::invalidate`] (on a notification of `tidewire_keys`) re-reads the key at once and ends every [`Access`]
//!   that no longer holds. [`KeyStore::recheck`] (every [`RECHECK_INTERVAL`], and after each LISTEN reconnect) compares
//!   the versions of all known keys in one query, so that a lost notification costs seconds.
//! - A read that a change overtakes is thrown away: whoever announces a change marks the key first and reads afterwards,
//!   whoever looks a key up adopts what it read only if the mark has not moved.
//! - Postgres away: cached keys go on until their time is up, others get [`AuthError::Unavailable`]; sockets stay.
//!
//! Must not know: sockets, HTTP, the wall clock (`now` is an argument).

mod access;
mod rows;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use chrono::{DateTime, Utc};
use moka::future::Cache;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::{MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;

pub use self::access::Access;
use self::access::Entry;
use self::rows::KeyRow;
pub use self::rows::{
    CreateKeyError, KeyInfo, MAX_KEY_NAME_CHARS, MAX_LISTED_KEYS, Revocation, create_key, list, revoke,
};
use crate::auth::key::{ApiKey, KeyHash, KeyId};
use crate::postgres::Database;
use crate::protocol::close::CloseCode;
use crate::telemetry::repeats::Repeats;

/// How long a key's row is believed without being read again.
pub const KEY_CACHE_TTL: Duration = Duration::from_mins(5);
/// Most tokens in the cache, and keys that came in by tickets; what is beyond is read again on its next use.
pub const MAX_CACHED_KEYS: u64 = 10_000;
/// How long a token that opens nothing is refused without a query.
pub const UNKNOWN_KEY_TTL: Duration = Duration::from_secs(10);
/// Most tokens remembered as unknown.
pub const MAX_UNKNOWN_KEYS: u64 = 10_000;
/// How often the versions of all known keys are compared.
pub const RECHECK_INTERVAL: Duration = Duration::from_secs(15);
/// How often times of last use are stored, in rechecks: once a minute.
const RECHECKS_PER_FLUSH: u32 = 4;
/// Longest wait for one answer of Postgres.
const QUERY_TIMEOUT: Duration = Duration::from_secs(4);
/// Longest judgement, a place among the lookups and their repetitions included.
const JUDGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Keys looked up at a time, so that a flood of unknown ids leaves connections to clients that are let in.
const MAX_LOOKUPS: usize = 2;
/// Reads that changes may overtake before the caller is told to come back.
const MAX_ATTEMPTS: usize = 5;
/// Most times of last use kept between two flushes; beyond it the newest are lost, which only ages a display.
const MAX_PENDING_USES: usize = 10_000;
/// Marks of change: ids share them by hash, a collision costs one more read.
const MARKS: usize = 256;

/// A token was not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// Not an API key: mistyped or cut off. Told to the client as [`AuthError::Unknown`] is.
    #[error("the API key is not valid: check that it was copied whole, or ask for a new one")]
    Malformed,
    /// No such key, or its secret is another.
    #[error("the API key is not valid: check that it was copied whole, or ask for a new one")]
    Unknown,
    /// The right secret of a revoked key.
    #[error("the API key has been revoked: ask for a new one")]
    Revoked,
    /// The right secret of an expired key.
    #[error("the API key has expired: ask for a new one")]
    Expired,
    /// The right secret of a key whose stored scopes this version cannot read.
    #[error("the API key's scopes cannot be read by this server: ask for a new key")]
    Unusable,
    /// Postgres did not answer, and nothing is cached.
    #[error("API keys cannot be checked right now: try again with backoff")]
    Unavailable,
}

impl AuthError {
    /// How a socket that is already open is closed for it.
    #[must_use]
    pub const fn close_code(&self) -> CloseCode {
        match self {
            Self::Malformed | Self::Unknown | Self::Unusable => CloseCode::Unauthenticated,
            Self::Revoked => CloseCode::KeyRevoked,
            Self::Expired => CloseCode::KeyExpired,
            Self::Unavailable => CloseCode::TryLater,
        }
    }
}

/// What the store has done since it began, and how much it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyStoreCounts {
    /// Tokens judged.
    pub judged: u64,
    /// Of these, refused.
    pub refused: u64,
    /// Rows asked for because the cache did not have them.
    pub lookups: u64,
    /// Queries that failed or took longer than their limit.
    pub failures: u64,
    /// Keys cached or in use.
    pub known: u64,
}

/// Judges API keys; see the module. One for each node, shared in an `Arc`.
#[derive(Debug)]
pub struct KeyStore {
    database: Arc<Database>,
    cached: Cache<Credential, Arc<Entry>>,
    /// With the key's mark when that was found out.
    unknown: Cache<Credential, u64>,
    /// Every entry that the cache or an access holds: where a change finds them.
    entries: Mutex<HashMap<KeyId, Weak<Entry>>>,
    marks: [AtomicU64; MARKS],
    /// Refreshes take turns, so that an older answer never follows a newer one.
    refreshing: tokio::sync::Mutex<()>,
    lookups: Semaphore,
    uses: Mutex<HashMap<KeyId, DateTime<Utc>>>,
    counters: Counters,
    /// For the log.
    repeats: Repeats,
}

/// What someone comes with: a token, by the hash of its whole text; or, without, what stands for the key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Credential {
    key_id: KeyId,
    hash: Option<[u8; 32]>,
}

impl Credential {
    fn new(key_id: &KeyId, hash: Option<&KeyHash>) -> Self {
        Self { key_id: key_id.clone(), hash: hash.map(|hash| *hash.as_bytes()) }
    }
}

#[derive(Debug, Default)]
struct Counters {
    judged: AtomicU64,
    refused: AtomicU64,
    lookups: AtomicU64,
    failures: AtomicU64,
}

impl KeyStore {
    /// An empty store. Asks the database's pool of the moment, since a failover replaces it.
    #[must_use]
    pub fn new(database: Arc<Database>) -> Self {
        Self {
            database,
            cached: Cache::builder().max_capacity(MAX_CACHED_KEYS).time_to_live(KEY_CACHE_TTL).build(),
            unknown: Cache::builder().max_capacity(MAX_UNKNOWN_KEYS).time_to_live(UNKNOWN_KEY_TTL).build(),
            entries: Mutex::default(),
            marks: [const { AtomicU64::new(0) }; MARKS],
            refreshing: tokio::sync::Mutex::default(),
            lookups: Semaphore::new(MAX_LOOKUPS),
            uses: Mutex::default(),
            counters: Counters::default(),
            repeats: Repeats::default(),
        }
    }

    /// Judges a token. `now` is the wall clock. Takes at most five seconds.
    ///
    /// # Errors
    /// See [`AuthError`]. Only who holds the right secret learns that a key exists, was revoked or has expired.
    pub async fn authenticate(&self, token: &str, now: DateTime<Utc>) -> Result<Access, AuthError> {
        let judged = match ApiKey::parse(token) {
            Ok(key) => self.judge(key.id(), Some(&key.hash()), now).await,
            Err(_) => Err(AuthError::Malformed),
        };
        self.count(judged)
    }

    /// Lets in the bearer of something that stands for the key: a redeemed ticket.
    ///
    /// # Errors
    /// As [`KeyStore::authenticate`].
    pub async fn admit(&self, key_id: &KeyId, now: DateTime<Utc>) -> Result<Access, AuthError> {
        let judged = self.judge(key_id, None, now).await;
        self.count(judged)
    }

    /// A key has changed: reads it again, and ends every access that no longer holds. `key_id` is the payload of the
    /// notification; an empty one means that any key may have changed.
    ///
    /// # Errors
    /// Postgres away: the key is no longer cached, so nobody new comes in by it, and the next recheck catches up.
    pub async fn invalidate(&self, key_id: &str) -> Result<(), AuthError> {
        if key_id.is_empty() {
            return self.recheck().await;
        }
        let key_id = KeyId::from_stored(key_id);
        // Before anything is read: a lookup under way must not adopt what it saw before the change, and what was unknown
        // before counts no longer.
        self.mark(&key_id).fetch_add(1, Ordering::AcqRel);
        if self.known(&key_id).is_none() {
            return Ok(());
        }
        let _turn = self.refreshing.lock().await;
        self.refresh(std::slice::from_ref(&key_id)).await
    }

    /// Compares the versions of all known keys with the database's, and ends every access that no longer holds.
    ///
    /// # Errors
    /// Postgres away: everything stays as it is.
    pub async fn recheck(&self) -> Result<(), AuthError> {
        let _turn = self.refreshing.lock().await;
        let known = self.all_known();
        if known.is_empty() {
            return Ok(());
        }
        let key_ids: Vec<KeyId> = known.keys().cloned().collect();
        let versions = self.ask(rows::read_versions(&self.database.pool(), &key_ids)).await?;
        let now: HashMap<&str, (i64, bool)> =
            versions.iter().map(|(id, version, expired)| (id.as_str(), (*version, *expired))).collect();
        let mut changed = key_ids;
        changed.retain(|id| {
            known.get(id).is_some_and(|entry| now.get(id.as_str()) != Some(&(entry.version(), entry.row.expired)))
        });
        if changed.is_empty() {
            return Ok(());
        }
        for id in &changed {
            self.mark(id).fetch_add(1, Ordering::AcqRel);
        }
        self.refresh(&changed).await
    }

    /// Rechecks every [`RECHECK_INTERVAL`], stores times of last use once a minute and at the end.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(RECHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut since_flush = 0;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = ticks.tick() => {}
            }
            // A failure is counted and logged where it happens.
            let _ = self.recheck().await;
            since_flush += 1;
            if since_flush >= RECHECKS_PER_FLUSH {
                since_flush = 0;
                let _ = self.flush_last_used().await;
            }
        }
        let _ = self.flush_last_used().await;
    }

    /// Stores the times of last use that were collected, in one statement.
    ///
    /// # Errors
    /// Postgres away: they are kept for the next time.
    pub async fn flush_last_used(&self) -> Result<(), AuthError> {
        let uses: Vec<_> = std::mem::take(&mut *self.uses.lock()).into_iter().collect();
        if uses.is_empty() {
            return Ok(());
        }
        let stored = self.ask(rows::store_last_used(&self.database.pool(), &uses)).await;
        if stored.is_err() {
            for (key_id, at) in uses {
                self.note_use(&key_id, at);
            }
        }
        stored
    }

    /// For metrics.
    #[must_use]
    pub fn counts(&self) -> KeyStoreCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        KeyStoreCounts {
            judged: read(&self.counters.judged),
            refused: read(&self.counters.refused),
            lookups: read(&self.counters.lookups),
            failures: read(&self.counters.failures),
            known: u64::try_from(self.entries.lock().len()).unwrap_or(u64::MAX),
        }
    }

    async fn judge(&self, key_id: &KeyId, hash: Option<&KeyHash>, now: DateTime<Utc>) -> Result<Access, AuthError> {
        let credential = Credential::new(key_id, hash);
        let entry = timeout(JUDGE_TIMEOUT, self.entry(&credential)).await.map_err(|_| AuthError::Unavailable)??;
        let row = &entry.row;
        if hash.is_some_and(|hash| !row.hash.is_some_and(|stored| stored.matches(hash))) {
            return Err(AuthError::Unknown);
        }
        if !row.is_active {
            return Err(AuthError::Revoked);
        }
        if row.expired || row.expires_at.is_some_and(|at| at <= now) {
            return Err(AuthError::Expired);
        }
        let scopes = Arc::clone(row.scopes.as_ref().map_err(|reason| {
            tracing::warn!(%key_id, %reason, "a key's scopes cannot be read");
            AuthError::Unusable
        })?);
        self.note_use(key_id, now);
        Ok(Access::new(entry, scopes, now))
    }

    /// The standing entry that a credential opens, cached or read.
    async fn entry(&self, credential: &Credential) -> Result<Arc<Entry>, AuthError> {
        for _ in 0..MAX_ATTEMPTS {
            if self.is_unknown(credential).await {
                return Err(AuthError::Unknown);
            }
            let entry = self
                .cached
                .try_get_with_by_ref(credential, self.look_up(credential))
                .await
                .map_err(|error| AuthError::clone(&error))?;
            if entry.ended().is_none() {
                return Ok(entry);
            }
            // It ended between its lookup and its place in the cache.
            self.cached.invalidate(credential).await;
        }
        Err(AuthError::Unavailable)
    }

    /// Whether it was found to open nothing, and the key has not changed since.
    async fn is_unknown(&self, credential: &Credential) -> bool {
        let mark = self.unknown.get(credential).await;
        mark.is_some_and(|mark| mark == self.mark(&credential.key_id).load(Ordering::Acquire))
    }

    async fn look_up(&self, credential: &Credential) -> Result<Arc<Entry>, AuthError> {
        let _place = timeout(QUERY_TIMEOUT, self.lookups.acquire()).await.map_err(|_| AuthError::Unavailable)?;
        // Another may have found out while this one waited.
        if self.is_unknown(credential).await {
            return Err(AuthError::Unknown);
        }
        let Credential { key_id, hash } = credential;
        for _ in 0..MAX_ATTEMPTS {
            self.counters.lookups.fetch_add(1, Ordering::Relaxed);
            let mark = self.mark(key_id).load(Ordering::Acquire);
            match self.ask(rows::read_matching(&self.database.clients(), key_id, hash.as_ref())).await? {
                Some(row) => {
                    if let Some(entry) = self.adopt(row, mark) {
                        return Ok(entry);
                    }
                }
                None => {
                    self.unknown.insert(credential.clone(), mark).await;
                    if self.is_unknown(credential).await {
                        return Err(AuthError::Unknown);
                    }
                }
            }
        }
        Err(AuthError::Unavailable)
    }

    /// Makes a row that was read the key's entry, or finds the entry that says the same. None: a change overtook it.
    fn adopt(&self, row: KeyRow, mark: u64) -> Option<Arc<Entry>> {
        let mut entries = self.entries.lock();
        if self.mark(&row.key_id).load(Ordering::Acquire) != mark {
            return None;
        }
        let standing = entries.get(&row.key_id).and_then(Weak::upgrade).filter(|entry| entry.judge(Some(&row)));
        Some(standing.unwrap_or_else(|| {
            let entry = Arc::new(Entry::new(row));
            entries.insert(entry.row.key_id.clone(), Arc::downgrade(&entry));
            entry
        }))
    }

    /// Reads these keys and holds their entries against it. Only with the turn in hand.
    async fn refresh(&self, key_ids: &[KeyId]) -> Result<(), AuthError> {
        let read = self.ask(rows::read(&self.database.pool(), key_ids)).await;
        let now: HashMap<&str, &KeyRow> = read.iter().flatten().map(|row| (row.key_id.as_str(), row)).collect();
        for key_id in key_ids {
            // The cache holds what it has: without an entry nothing is cached.
            let Some(entry) = self.known(key_id) else { continue };
            if read.is_err() || !entry.judge(now.get(key_id.as_str()).copied()) {
                self.cached.invalidate(&Credential::new(key_id, entry.row.hash.as_ref())).await;
                self.cached.invalidate(&Credential::new(key_id, None)).await;
            }
        }
        read.map(|_| ())
    }

    async fn ask<T>(&self, query: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, AuthError> {
        let failed = match timeout(QUERY_TIMEOUT, query).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".to_owned(),
        };
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        if let Some(repeated) = self.repeats.happened(std::time::Instant::now(), &failed) {
            tracing::warn!(error = %failed, repeated, "API keys cannot be read or written");
        }
        Err(AuthError::Unavailable)
    }

    fn known(&self, key_id: &KeyId) -> Option<Arc<Entry>> {
        self.entries.lock().get(key_id).and_then(Weak::upgrade)
    }

    /// Every entry that someone still holds; forgets the others.
    fn all_known(&self) -> HashMap<KeyId, Arc<Entry>> {
        let mut known = HashMap::new();
        self.entries.lock().retain(|key_id, entry| {
            let entry = entry.upgrade().filter(|entry| entry.ended().is_none());
            entry.is_some_and(|entry| known.insert(key_id.clone(), entry).is_none())
        });
        known
    }

    fn mark(&self, key_id: &KeyId) -> &AtomicU64 {
        let mut hasher = DefaultHasher::new();
        key_id.hash(&mut hasher);
        let at = usize::try_from(hasher.finish() % self.marks.len() as u64).unwrap_or_default();
        &self.marks[at]
    }

    fn note_use(&self, key_id: &KeyId, at: DateTime<Utc>) {
        let mut uses = self.uses.lock();
        if let Some(last) = uses.get_mut(key_id) {
            *last = at.max(*last);
        } else if uses.len() < MAX_PENDING_USES {
            uses.insert(key_id.clone(), at);
        }
    }

    fn count(&self, judged: Result<Access, AuthError>) -> Result<Access, AuthError> {
        self.counters.judged.fetch_add(1, Ordering::Relaxed);
        if judged.is_err() {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
        }
        judged
    }
}
