//! Which database a connection reached: its system identifier and live timeline.

use sqlx::Row as _;
use sqlx::postgres::PgConnection;
use tokio::sync::watch;

use super::ConnectError;
use crate::mutant::{self, Mutant};

/// One incarnation of a database: a promotion or a restore to another point makes another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incarnation {
    /// `pg_control_system().system_identifier`.
    pub system_identifier: i64,
    /// The live timeline. `pg_control_checkpoint()` lags behind a promotion, the WAL file's name does not.
    pub timeline: u32,
}

impl Incarnation {
    /// The timeline as Postgres writes it: eight hexadecimal digits.
    #[must_use]
    pub fn timeline_text(&self) -> String {
        format!("{:08X}", self.timeline)
    }
}

/// The newest incarnation that any connection of this node has seen.
#[derive(Debug)]
pub struct Identity {
    seen: watch::Sender<Option<Incarnation>>,
}

impl Default for Identity {
    fn default() -> Self {
        Self { seen: watch::channel(None).0 }
    }
}

impl Identity {
    pub(super) fn watch(&self) -> watch::Receiver<Option<Incarnation>> {
        self.seen.subscribe()
    }

    /// Whether `found` is no older than the newest that was seen; None while nothing was.
    pub(super) fn is_current(&self, found: &Incarnation) -> Option<bool> {
        let seen = self.seen.borrow();
        seen.as_ref().map(|seen| seen.system_identifier != found.system_identifier || seen.timeline <= found.timeline)
    }

    /// Takes note of what a new connection found.
    pub(super) fn observe(&self, found: &Incarnation) -> Result<(), ConnectError> {
        let mut verdict = Ok(());
        self.seen.send_if_modified(|seen| match seen {
            Some(known) if known == found => false,
            Some(known)
                if known.system_identifier == found.system_identifier
                    && found.timeline < known.timeline
                    && !mutant::is(Mutant::OldPrimaryAccepted) =>
            {
                verdict = Err(ConnectError::OldPrimary { seen: known.timeline, found: found.timeline });
                false
            }
            _ => {
                *seen = Some(found.clone());
                true
            }
        });
        verdict
    }
}

/// Asks a connection; None from a server in recovery.
pub(super) async fn ask(connection: &mut PgConnection) -> Result<Option<Incarnation>, sqlx::Error> {
    // pg_walfile_name fails in recovery, hence the CASE. Every connection asks this first, so this is also where a backslash
    // comes to mean itself, whatever the role or the database has set.
    let row = sqlx::query(
        "SELECT (SELECT system_identifier FROM pg_control_system()),
                CASE WHEN NOT pg_is_in_recovery() THEN substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END,
                set_config('standard_conforming_strings', 'on', false)",
    )
    .persistent(false)
    .fetch_one(connection)
    .await?;
    let Some(timeline) = row.try_get::<Option<&str>, _>(1)? else { return Ok(None) };
    let timeline = u32::from_str_radix(timeline, 16).map_err(|error| sqlx::Error::Decode(error.into()))?;
    Ok(Some(Incarnation { system_identifier: row.try_get(0)?, timeline }))
}

/// `server_version_num`.
pub(super) async fn version(connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar("SELECT current_setting('server_version_num')::int").fetch_one(connection).await
}

/// A transaction pooler gives different sessions to one connection, or does not keep what a session holds.
pub(super) async fn refuse_pooler(connection: &mut PgConnection) -> Result<(), ConnectError> {
    let probe = async {
        // A key of our own for each probe, so that nodes that start together do not meet.
        let key: i64 = rand::random();
        sqlx::query("SELECT pg_try_advisory_lock($1)").bind(key).execute(&mut *connection).await?;
        let first: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *connection).await?;
        sqlx::query("SELECT set_config('tidewire.probe', $1, false)")
            .bind(key.to_string())
            .execute(&mut *connection)
            .await?;
        let second: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *connection).await?;
        let kept: Option<String> =
            sqlx::query_scalar("SELECT current_setting('tidewire.probe', true)").fetch_one(&mut *connection).await?;
        let unlocked: bool =
            sqlx::query_scalar("SELECT pg_advisory_unlock($1)").bind(key).fetch_one(&mut *connection).await?;
        Ok::<_, sqlx::Error>((first == second, kept == Some(key.to_string()), unlocked))
    };
    match probe.await.map_err(ConnectError::Unreachable)? {
        (false, ..) => Err(ConnectError::Pooler("two statements ran in two sessions")),
        (_, false, _) => Err(ConnectError::Pooler("a session setting was lost")),
        (.., false) => Err(ConnectError::Pooler("a session lock was lost")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incarnation(system_identifier: i64, timeline: u32) -> Incarnation {
        Incarnation { system_identifier, timeline }
    }

    #[test]
    fn an_old_primary_is_refused_and_a_promoted_one_announced() {
        let identity = Identity::default();
        let mut watch = identity.watch();
        assert!(identity.observe(&incarnation(7, 1)).is_ok());
        watch.mark_unchanged();
        assert!(identity.observe(&incarnation(7, 1)).is_ok());
        assert!(!watch.has_changed().unwrap());
        assert!(identity.observe(&incarnation(7, 2)).is_ok());
        assert!(watch.has_changed().unwrap());
        assert!(matches!(identity.observe(&incarnation(7, 1)), Err(ConnectError::OldPrimary { seen: 2, found: 1 })));
        assert_eq!(*watch.borrow(), Some(incarnation(7, 2)));
    }

    /// Found in review: an old primary nearby kept the true one, far away, from being waited for.
    #[test]
    fn nobody_is_waited_for_less_because_an_old_primary_has_answered() {
        let identity = Identity::default();
        assert_eq!(identity.is_current(&incarnation(7, 1)), None);
        assert!(identity.observe(&incarnation(7, 2)).is_ok());
        assert_eq!(identity.is_current(&incarnation(7, 1)), Some(false));
        for newer in [incarnation(7, 2), incarnation(7, 3), incarnation(8, 1)] {
            assert_eq!(identity.is_current(&newer), Some(true));
        }
    }

    #[test]
    fn another_system_is_announced_whatever_its_timeline() {
        let identity = Identity::default();
        assert!(identity.observe(&incarnation(7, 5)).is_ok());
        assert!(identity.observe(&incarnation(8, 1)).is_ok());
    }
}
