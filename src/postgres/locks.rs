//! Who holds the relay's advisory locks without being the relay.
//!
//! Advisory locks ask for no right: any role of the database can take the leader's lock, and then nobody leads, or the park
//! lock, and then every writer notifies (taken exclusively) or the relay never parks (shared). Session locks of another kind
//! there are none (ADR 11), so the holder is named, with the statement that ends it.

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use crate::postgres::Pool;

/// One lock in foreign hands.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ForeignLock {
    /// `leader` or `park`.
    pub lock: String,
    /// Whether it is held shared.
    pub shared: bool,
    /// Session or prepared transaction, role, application and client address.
    pub holder: String,
    /// The statement that ends the holder.
    pub end: String,
}

impl ForeignLock {
    /// What it does to the cluster.
    #[must_use]
    pub fn effect(&self) -> &'static str {
        match (self.lock.as_str(), self.shared) {
            ("leader", _) => "holds the leader's lock: nobody can lead, so nothing is relayed",
            (_, false) => {
                "holds the park lock: every writing transaction notifies, which costs it a wait at its commit"
            }
            (_, true) => "holds the park lock shared without writing: the relay never parks and polls all the time",
        }
    }
}

/// Who holds `leader_lock` or `park_lock` and is neither the newest term's backend nor, for the shared park lock, a transaction
/// that has written to the outbox. A leader that is about to begin its term is among them for a moment: ask twice.
///
/// # Errors
/// When Postgres refuses.
pub async fn foreign_locks(pool: &Pool, leader_lock: i64, park_lock: i64) -> Result<Vec<ForeignLock>, sqlx::Error> {
    // A bigint key stands in pg_locks as two halves, with objsubid 1; the locks of a prepared transaction have no pid, but one
    // of them is that of its own xid.
    let rows = sqlx::query(
        "WITH held AS (
            SELECT pid, mode, virtualtransaction, (classid::bigint << 32) | objid::bigint AS key
            FROM pg_catalog.pg_locks
            WHERE locktype = 'advisory' AND objsubid = 1 AND granted
                AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()))
         SELECT CASE held.key WHEN $1 THEN 'leader' ELSE 'park' END AS lock, held.mode = 'ShareLock' AS shared,
                CASE WHEN held.pid IS NULL THEN format('the prepared transaction %L of role %s', p.gid, p.owner)
                     ELSE format('session %s of role %s (application %s, from %s, %s)', held.pid, a.usename,
                                 quote_literal(a.application_name), coalesce(host(a.client_addr), 'a local socket'),
                                 coalesce(a.state, 'state not shown to this role')) END AS holder,
                CASE WHEN held.pid IS NULL THEN format('ROLLBACK PREPARED %L;', p.gid)
                     ELSE format('SELECT pg_terminate_backend(%s);', held.pid) END AS end
         FROM held
         LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = held.pid
         LEFT JOIN pg_catalog.pg_locks x ON held.pid IS NULL AND x.pid IS NULL AND x.locktype = 'transactionid'
             AND x.virtualtransaction = held.virtualtransaction
         LEFT JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = x.transactionid
         WHERE held.key IN ($1, $2)
             AND (held.pid IS NULL
                  OR held.pid IS DISTINCT FROM (SELECT t.pid FROM tidewire.terms t ORDER BY term DESC LIMIT 1))
             AND NOT (held.key = $2 AND held.mode = 'ShareLock' AND EXISTS (
                 SELECT FROM pg_catalog.pg_locks o
                 WHERE o.virtualtransaction = held.virtualtransaction AND o.mode = 'RowExclusiveLock'
                     AND o.relation = 'tidewire.outbox'::regclass))
         ORDER BY held.key, held.pid
         LIMIT 10",
    )
    .bind(leader_lock)
    .bind(park_lock)
    .fetch_all(pool)
    .await?;
    let lock = |row: &PgRow| {
        Ok(ForeignLock {
            lock: row.try_get("lock")?,
            shared: row.try_get("shared")?,
            holder: row.try_get("holder")?,
            end: row.try_get("end")?,
        })
    };
    rows.iter().map(lock).collect()
}
