//! [`Access`]: what a judged token lets its bearer do, and the word when that ends.
//!
//! Every access of a key on this node shares one [`Entry`], so one word ends them all. An entry never changes what it
//! grants: when the key's row says something else, the entry ends and a new one takes its place.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::time::Instant;

use super::rows::KeyRow;
use crate::auth::key::KeyId;
use crate::auth::scope::Scopes;
use crate::protocol::close::CloseCode;

/// Longest single sleep before a key's expiry; tokio's timer wheel ends at about 2.2 years.
const MAX_TIMER: Duration = Duration::from_hours(24);

/// What the bearer of a valid token may do, until [`Access::ended`] resolves. Cheap to clone.
#[derive(Clone)]
pub struct Access {
    /// The key.
    pub key_id: KeyId,
    /// What its owner called it; fit for logs.
    pub name: Arc<str>,
    /// What it may do.
    pub scopes: Arc<Scopes>,
    /// When it expires, by the clock of the one who asked.
    pub expires_at: Option<DateTime<Utc>>,
    deadline: Option<Instant>,
    entry: Arc<Entry>,
}

impl Access {
    /// `now` is the wall clock at this moment: from here on the expiry runs on the monotonic one.
    pub(super) fn new(entry: Arc<Entry>, scopes: Arc<Scopes>, now: DateTime<Utc>) -> Self {
        let row = &entry.row;
        let left = row.expires_at.map(|at| (at - now).to_std().unwrap_or_default());
        Self {
            key_id: row.key_id.clone(),
            name: Arc::clone(&row.name),
            scopes,
            expires_at: row.expires_at,
            deadline: left.and_then(|left| Instant::now().checked_add(left)),
            entry,
        }
    }

    /// Resolves when the socket must be closed, with the code: [`CloseCode::KeyRevoked`] (revoked or deleted),
    /// [`CloseCode::KeyExpired`], or [`CloseCode::TokenExpired`] (the key's scopes, secret or expiry changed: reconnect
    /// and be judged anew). Never resolves for a key that stays as it is. May be dropped and called again.
    pub async fn ended(&self) -> CloseCode {
        let mut ended = self.entry.ended.subscribe();
        loop {
            let timer = self.deadline.map(|at| at.min(Instant::now() + MAX_TIMER));
            tokio::select! {
                change = ended.wait_for(Option::is_some) => {
                    // The sender lives in the entry that `self` holds, so it is never gone.
                    return change.ok().and_then(|code| *code).unwrap_or(CloseCode::TokenExpired);
                }
                () = sleep_until(timer) => {
                    if self.deadline.is_some_and(|at| at <= Instant::now()) {
                        return CloseCode::KeyExpired;
                    }
                }
            }
        }
    }

    /// The same without waiting; none while the access stands.
    #[must_use]
    pub fn ended_now(&self) -> Option<CloseCode> {
        let expired = self.deadline.is_some_and(|at| at <= Instant::now());
        self.entry.ended().or(expired.then_some(CloseCode::KeyExpired))
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("key_id", &self.key_id)
            .field("name", &self.name)
            .field("ended", &self.ended_now())
            .finish_non_exhaustive()
    }
}

async fn sleep_until(timer: Option<Instant>) {
    match timer {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// A key's row as this node knows it, shared by all who came in by it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) row: KeyRow,
    // A change of what grants nothing (the name) raises the version alone.
    version: AtomicI64,
    ended: watch::Sender<Option<CloseCode>>,
}

impl Entry {
    pub(super) fn new(row: KeyRow) -> Self {
        Self { version: AtomicI64::new(row.version), row, ended: watch::Sender::new(None) }
    }

    pub(super) fn version(&self) -> i64 {
        self.version.load(Ordering::Acquire)
    }

    pub(super) fn ended(&self) -> Option<CloseCode> {
        *self.ended.borrow()
    }

    /// The first code stays.
    pub(super) fn end(&self, code: CloseCode) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            *ended = ended.or(Some(code));
            first
        });
    }

    /// Holds the entry against what the database says now (none: no such row); whether it still stands.
    pub(super) fn judge(&self, now: Option<&KeyRow>) -> bool {
        let code = match now {
            None => CloseCode::KeyRevoked,
            Some(row) if self.row.grants_the_same_as(row) => {
                self.version.store(row.version, Ordering::Release);
                return self.ended().is_none();
            }
            Some(row) if !row.is_active => CloseCode::KeyRevoked,
            Some(row) if row.expired => CloseCode::KeyExpired,
            Some(_) => CloseCode::TokenExpired,
        };
        self.end(code);
        false
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;
    use crate::auth::key::KeyHash;

    fn row(expires_at: Option<DateTime<Utc>>) -> KeyRow {
        KeyRow {
            key_id: KeyId::from_stored("abc"),
            name: "test".into(),
            hash: KeyHash::from_bytes(&[0; 32]),
            scopes: Ok(Arc::new(Scopes::all(1))),
            version: 1,
            is_active: true,
            expires_at,
            expired: false,
        }
    }

    fn access(row: KeyRow, now: DateTime<Utc>) -> Access {
        Access::new(Arc::new(Entry::new(row)), Arc::new(Scopes::all(1)), now)
    }

    #[tokio::test]
    async fn an_access_ends_when_its_key_expires() {
        let now = DateTime::UNIX_EPOCH;
        let access = access(row(Some(now + TimeDelta::milliseconds(20))), now);
        assert_eq!(access.ended().await, CloseCode::KeyExpired);
        assert_eq!(access.ended_now(), Some(CloseCode::KeyExpired));
    }

    #[tokio::test]
    async fn an_access_stands_as_long_as_its_key() {
        let now = DateTime::UNIX_EPOCH;
        // Beyond tokio's longest timer, and beyond what an `Instant` can hold.
        for expires_at in [None, Some(now + TimeDelta::days(1_500)), Some(DateTime::<Utc>::MAX_UTC)] {
            let access = access(row(expires_at), now);
            let ended = tokio::time::timeout(Duration::from_millis(20), access.ended()).await;
            assert!(ended.is_err(), "{expires_at:?}");
        }
    }

    #[tokio::test]
    async fn each_change_of_the_row_ends_an_access_with_its_own_code() {
        let changed = |change: &dyn Fn(&mut KeyRow)| {
            let mut now = KeyRow { version: 2, ..row(None) };
            change(&mut now);
            let access = access(row(None), DateTime::UNIX_EPOCH);
            access.entry.judge(Some(&now));
            access.ended_now()
        };
        assert_eq!(changed(&|row| row.name = "other".into()), None);
        assert_eq!(changed(&|row| row.is_active = false), Some(CloseCode::KeyRevoked));
        assert_eq!(changed(&|row| row.expired = true), Some(CloseCode::KeyExpired));
        assert_eq!(changed(&|row| row.hash = KeyHash::from_bytes(&[1; 32])), Some(CloseCode::TokenExpired));
        assert_eq!(changed(&|row| row.scopes = Ok(Arc::new(Scopes::all(2)))), Some(CloseCode::TokenExpired));
        assert_eq!(changed(&|row| row.expires_at = Some(DateTime::UNIX_EPOCH)), Some(CloseCode::TokenExpired));
        let access = access(row(None), DateTime::UNIX_EPOCH);
        access.entry.judge(None);
        assert_eq!(access.ended().await, CloseCode::KeyRevoked);
        access.entry.end(CloseCode::TokenExpired);
        assert_eq!(access.ended_now(), Some(CloseCode::KeyRevoked), "the first word stays");
    }

    #[test]
    fn debug_shows_no_hash() {
        let shown = format!("{:?} {:?}", Entry::new(row(None)), access(row(None), DateTime::UNIX_EPOCH));
        assert!(!shown.contains("0, 0"), "{shown}");
    }
}
