//! Which database a connection reached: its system identifier and live timeline.

use sqlx::Row as _;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection as _};
use tokio::sync::watch;

use super::settings::{fit, limits};
use super::{CONNECT_TIMEOUT, ConnectError, within};
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

// pg_walfile_name fails in recovery, hence the CASE. All of it are simple queries: they leave no statement behind.
macro_rules! question {
    () => {
        "SELECT (SELECT system_identifier FROM pg_control_system()),
                CASE WHEN NOT pg_is_in_recovery() THEN substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END"
    };
}

/// What may be done to the session of a connection that is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Session {
    /// It is ours: whatever the role or the database has set, it gets the settings that our statements rest on.
    Ours,
    /// Whose it is is unknown yet.
    Untouched,
}

/// Asks a connection; None from a server in recovery.
pub(super) async fn ask(connection: &mut PgConnection, session: Session) -> Result<Option<Incarnation>, sqlx::Error> {
    // The isolation is stated: a serializable read-only deferrable one would wait for every writer's end.
    let asked = match session {
        Session::Ours => concat!(
            "BEGIN ISOLATION LEVEL READ COMMITTED; ",
            question!(),
            ", ",
            fit!("false"),
            ",
                set_config('default_transaction_isolation', 'read committed', false),
                set_config('default_transaction_deferrable', 'off', false),
                set_config('statement_timeout', '0', false),
                CASE WHEN current_setting('idle_session_timeout', true) IS NOT NULL
                     THEN set_config('idle_session_timeout', '0', false) END; COMMIT"
        ),
        Session::Untouched => question!(),
    };
    read(&sqlx::raw_sql(asked).fetch_all(connection).await?)
}

/// Begins a transaction on a session that is not ours, with the settings that our statements rest on for it alone, and asks
/// as [`ask`] does.
pub(super) async fn begin(connection: &mut PgConnection) -> Result<Option<Incarnation>, sqlx::Error> {
    let begin = concat!(
        "BEGIN ISOLATION LEVEL READ COMMITTED NOT DEFERRABLE; ",
        question!(),
        ", ",
        fit!("true"),
        ", ",
        limits!("true")
    );
    read(&sqlx::raw_sql(begin).fetch_all(connection).await?)
}

fn read(rows: &[PgRow]) -> Result<Option<Incarnation>, sqlx::Error> {
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let Some(timeline) = row.try_get::<Option<&str>, _>(1)? else { return Ok(None) };
    let timeline = u32::from_str_radix(timeline, 16).map_err(|error| sqlx::Error::Decode(error.into()))?;
    Ok(Some(Incarnation { system_identifier: row.try_get(0)?, timeline }))
}

/// `server_version_num`.
pub(super) async fn version(connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
    let row = sqlx::raw_sql("SELECT current_setting('server_version_num')::int").fetch_one(connection).await?;
    row.try_get(0)
}

/// How often a pooler gets the chance to show itself; a quiet one does the first time.
const POOLER_ROUNDS: usize = 3;

/// A transaction pooler gives one session to several connections, or several to one. A second connection looks for the mark
/// that the first left in its session, keeps that session busy if it got the same, and the first looks for its mark again.
pub(super) async fn refuse_pooler(
    connection: &mut PgConnection,
    options: &PgConnectOptions,
) -> Result<(), ConnectError> {
    let probe = async {
        let mut other = within(CONNECT_TIMEOUT, PgConnection::connect_with(options)).await?;
        // A mark of our own for each probe, so that nodes that start together do not meet.
        let mark = rand::random::<u64>().to_string();
        let mut found = None;
        for _ in 0..POOLER_ROUNDS {
            found = pooler_round(connection, &mut other, &mark).await?;
            if found.is_some() {
                break;
            }
        }
        let _ = other.close().await;
        Ok::<_, sqlx::Error>(found)
    };
    match probe.await.map_err(ConnectError::Unreachable)? {
        Some(how) => Err(ConnectError::Pooler(how)),
        None => Ok(()),
    }
}

const MARKED: &str = "SELECT pg_backend_pid(), current_setting('tidewire.probe', true)";

async fn pooler_round(
    one: &mut PgConnection,
    other: &mut PgConnection,
    mark: &str,
) -> Result<Option<&'static str>, sqlx::Error> {
    let set = format!("SELECT pg_backend_pid(), set_config('tidewire.probe', '{mark}', false)");
    let first = sqlx::raw_sql(AssertSqlSafe(set)).fetch_all(&mut *one).await?;
    let theirs = sqlx::raw_sql(AssertSqlSafe(format!("BEGIN; {MARKED}"))).fetch_all(&mut *other).await?;
    // A pooler that has no other session lets the first wait for the second's.
    let again = within(CONNECT_TIMEOUT, async { sqlx::raw_sql(MARKED).fetch_all(&mut *one).await });
    let seen = |rows: &[PgRow]| {
        let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        Ok::<_, sqlx::Error>((row.try_get::<i32, _>(0)?, row.try_get::<Option<String>, _>(1)?))
    };
    let (first, theirs) = (seen(&first)?, seen(&theirs)?);
    let how = if theirs.0 == first.0 || theirs.1.as_deref() == Some(mark) {
        Some("two connections share one session")
    } else {
        let again = seen(&again.await?)?;
        match (again.0 == first.0, again.1.as_deref() == Some(mark)) {
            (false, _) => Some("two statements ran in two sessions"),
            (_, false) => Some("a session setting was lost"),
            _ => None,
        }
    };
    // Whoever gets the session next finds no mark of ours.
    sqlx::raw_sql("SELECT set_config('tidewire.probe', '', false); COMMIT").execute(&mut *other).await?;
    Ok(how)
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
