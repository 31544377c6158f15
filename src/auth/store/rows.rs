//! The rows of `tidewire.api_keys`: create, list, revoke, read.
//!
//! A trigger raises `version` and notifies `tidewire_keys` with the key's id whenever a row comes, goes or grants
//! something else; `last_used_at` alone does neither. An expiry outside the years 1 to 9999 (`infinity`) is one that is
//! not shown and never timed, since not every clock can hold it; the database still judges it.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::Row;
use sqlx::postgres::PgRow;

use crate::auth::key::{ApiKey, KeyHash, KeyId};
use crate::auth::scope::Scopes;
use crate::postgres::Pool;

/// Most keys that [`list`] returns.
pub const MAX_LISTED_KEYS: i64 = 10_000;
/// Longest name of a key, characters.
pub const MAX_KEY_NAME_CHARS: usize = 200;

/// A key as an administrator sees it: everything but its hash.
#[derive(Clone, Debug, Serialize)]
pub struct KeyInfo {
    /// The public part of the key.
    pub key_id: String,
    /// What its owner called it.
    pub name: String,
    /// The scopes as they are stored, readable for this version or not.
    pub scopes: serde_json::Value,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last let someone in; up to two minutes behind.
    pub last_used_at: Option<DateTime<Utc>>,
    /// False: revoked.
    pub is_active: bool,
    /// From then on it lets nobody in.
    pub expires_at: Option<DateTime<Utc>>,
}

/// What became of a wish to revoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Revocation {
    /// The key was active. Its sockets close within a second.
    Revoked,
    /// It was not.
    AlreadyRevoked,
    /// There is no such key.
    UnknownKey,
}

/// A key could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateKeyError {
    /// Blank, or above [`MAX_KEY_NAME_CHARS`].
    #[error("a key's name has 1 to {MAX_KEY_NAME_CHARS} characters: say what it is for")]
    BadName,
    /// The scopes have no JSON form.
    #[error("the scopes cannot be stored: {0}")]
    Scopes(#[from] serde_json::Error),
    /// Postgres refused, or is away.
    #[error("the key could not be stored: {0}")]
    Database(#[from] sqlx::Error),
}

/// Makes a key and stores its hash. The secret is in the returned key and nowhere else: show it once.
///
/// # Errors
/// A bad name; Postgres away.
pub async fn create_key(
    pool: &Pool,
    name: &str,
    scopes: &Scopes,
    expires_at: Option<DateTime<Utc>>,
) -> Result<ApiKey, CreateKeyError> {
    if name.trim().is_empty() || name.chars().count() > MAX_KEY_NAME_CHARS || name.contains('\0') {
        return Err(CreateKeyError::BadName);
    }
    let key = ApiKey::generate(&mut rand::rng());
    sqlx::query(
        "INSERT INTO tidewire.api_keys (key_id, name, key_hash, scopes, expires_at)
         VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(key.id().as_str())
    .bind(name)
    .bind(&key.hash().as_bytes()[..])
    .bind(serde_json::to_value(scopes)?)
    .bind(expires_at)
    .execute(pool)
    .await?;
    Ok(key)
}

/// The newest [`MAX_LISTED_KEYS`] keys, newest first, revoked and expired ones among them.
///
/// # Errors
/// Postgres away.
pub async fn list(pool: &Pool) -> Result<Vec<KeyInfo>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT key_id, name, scopes, created_at, last_used_at, is_active,
                CASE WHEN expires_at BETWEEN '0001-01-01' AND '9999-12-31' THEN expires_at END AS expires_at
         FROM tidewire.api_keys
         ORDER BY created_at DESC, key_id
         LIMIT $1",
    )
    .bind(MAX_LISTED_KEYS)
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(KeyInfo {
                key_id: row.try_get("key_id")?,
                name: row.try_get("name")?,
                scopes: row.try_get("scopes")?,
                created_at: row.try_get("created_at")?,
                last_used_at: row.try_get("last_used_at")?,
                is_active: row.try_get("is_active")?,
                expires_at: row.try_get("expires_at")?,
            })
        })
        .collect()
}

/// Revokes a key for good. Its row stays, so that its id is never given again and `list` tells its story.
///
/// # Errors
/// Postgres away.
pub async fn revoke(pool: &Pool, key_id: &KeyId) -> Result<Revocation, sqlx::Error> {
    let row = sqlx::query(
        "WITH revoked AS (
             UPDATE tidewire.api_keys SET is_active = false
             WHERE key_id = $1 AND is_active
             RETURNING key_id
         )
         SELECT EXISTS (SELECT FROM revoked) AS revoked,
                EXISTS (SELECT FROM tidewire.api_keys WHERE key_id = $1) AS known",
    )
    .bind(key_id.as_str())
    .fetch_one(pool)
    .await?;
    Ok(match (row.try_get("revoked")?, row.try_get("known")?) {
        (true, _) => Revocation::Revoked,
        (false, true) => Revocation::AlreadyRevoked,
        (false, false) => Revocation::UnknownKey,
    })
}

/// A row as the store judges by it.
#[derive(Clone, Debug)]
pub(super) struct KeyRow {
    pub(super) key_id: KeyId,
    pub(super) name: Arc<str>,
    /// None: the stored bytes are no hash, so no token matches.
    pub(super) hash: Option<KeyHash>,
    /// Why they cannot be read, where they cannot.
    pub(super) scopes: Result<Arc<Scopes>, Arc<str>>,
    pub(super) version: i64,
    pub(super) is_active: bool,
    pub(super) expires_at: Option<DateTime<Utc>>,
    /// By the database's clock, when the row was read.
    pub(super) expired: bool,
}

impl KeyRow {
    pub(super) fn grants_the_same_as(&self, other: &Self) -> bool {
        let same_hash = match (&self.hash, &other.hash) {
            (Some(one), Some(two)) => one.matches(two),
            (one, two) => one.is_none() && two.is_none(),
        };
        same_hash
            && self.scopes == other.scopes
            && self.is_active == other.is_active
            && self.expires_at == other.expires_at
            && self.expired == other.expired
    }

    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        let scopes: serde_json::Value = row.try_get("scopes")?;
        Ok(Self {
            key_id: KeyId::from_stored(row.try_get("key_id")?),
            name: row.try_get::<&str, _>("name")?.into(),
            hash: KeyHash::from_bytes(row.try_get("key_hash")?),
            scopes: serde_json::from_value(scopes).map(Arc::new).map_err(|error| error.to_string().into()),
            version: row.try_get("version")?,
            is_active: row.try_get("is_active")?,
            expires_at: row.try_get("expires_at")?,
            expired: row.try_get("expired")?,
        })
    }
}

/// The row of a key, if its hash is this one. None for the hash: whatever it is. One statement for a key that does not
/// exist and for another's secret, so that both are refused after the same work.
pub(super) async fn read_matching(
    pool: &Pool,
    key_id: &KeyId,
    hash: Option<&[u8; 32]>,
) -> Result<Option<KeyRow>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT key_id, name, key_hash, scopes, version, is_active,
                CASE WHEN expires_at BETWEEN '0001-01-01' AND '9999-12-31' THEN expires_at END AS expires_at,
                coalesce(expires_at <= clock_timestamp(), false) AS expired
         FROM tidewire.api_keys
         WHERE key_id = $1 AND ($2::bytea IS NULL OR key_hash = $2)",
    )
    .bind(key_id.as_str())
    .bind(hash.map(|hash| &hash[..]))
    .fetch_optional(pool)
    .await?;
    row.as_ref().map(KeyRow::read).transpose()
}

/// The rows of these keys that exist, in no order.
pub(super) async fn read(pool: &Pool, key_ids: &[KeyId]) -> Result<Vec<KeyRow>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT key_id, name, key_hash, scopes, version, is_active,
                CASE WHEN expires_at BETWEEN '0001-01-01' AND '9999-12-31' THEN expires_at END AS expires_at,
                coalesce(expires_at <= clock_timestamp(), false) AS expired
         FROM tidewire.api_keys
         WHERE key_id = ANY($1)",
    )
    .bind(texts(key_ids))
    .fetch_all(pool)
    .await?;
    rows.iter().map(KeyRow::read).collect()
}

/// Id, version and whether it has expired by the database's clock, of these keys that exist.
pub(super) async fn read_versions(pool: &Pool, key_ids: &[KeyId]) -> Result<Vec<(String, i64, bool)>, sqlx::Error> {
    sqlx::query_as(
        "SELECT key_id, version, coalesce(expires_at <= clock_timestamp(), false)
         FROM tidewire.api_keys
         WHERE key_id = ANY($1)",
    )
    .bind(texts(key_ids))
    .fetch_all(pool)
    .await
}

/// Stores when keys were last used, in one statement. Rows that someone else holds are left out: another node is
/// writing the same, or an administrator's change matters more.
pub(super) async fn store_last_used(pool: &Pool, uses: &[(KeyId, DateTime<Utc>)]) -> Result<(), sqlx::Error> {
    let (key_ids, times): (Vec<&str>, Vec<DateTime<Utc>>) = uses.iter().map(|(id, at)| (id.as_str(), *at)).unzip();
    sqlx::query(
        "WITH used AS (
             SELECT * FROM unnest($1::text[], $2::timestamptz[]) AS u (key_id, at)
         ), free AS (
             SELECT k.key_id, u.at
             FROM tidewire.api_keys AS k JOIN used AS u USING (key_id)
             WHERE k.last_used_at IS NULL OR k.last_used_at < u.at
             FOR NO KEY UPDATE OF k SKIP LOCKED
         )
         UPDATE tidewire.api_keys AS k
         SET last_used_at = free.at
         FROM free
         WHERE k.key_id = free.key_id",
    )
    .bind(key_ids)
    .bind(times)
    .execute(pool)
    .await?;
    Ok(())
}

fn texts(key_ids: &[KeyId]) -> Vec<&str> {
    key_ids.iter().map(KeyId::as_str).collect()
}
