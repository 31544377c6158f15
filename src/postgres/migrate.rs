//! Brings a database's `tidewire` schema to the version of this program.
//!
//! Safe from any number of nodes at once: one migrates, the others wait for it (with a try-lock: a session blocked in
//! `pg_advisory_lock` would pin the database's xmin horizon) and find nothing left to do. An up-to-date database needs no
//! privilege but reading, a database of a newer program is refused rather than used. Runs on a connection of its own that
//! is closed at the end, whatever happens, so that the lock cannot stay behind in a pool.
//!
//! Must not know what the tables are for; `migrations/` says that.

use std::time::{Duration, Instant};

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, SqlSafeStr as _};

use super::{Session, identity};

/// The oldest server: 14 brought `idle_session_timeout`, `client_connection_check_interval` and lz4, and replaces triggers.
const MIN_SERVER_VERSION: i32 = 140_000;
/// Held by the one that migrates; next to the keys of the leader (…901) and of the parked relay (…902).
const MIGRATION_LOCK: i64 = 8_388_068_008_253_452_903;
/// How long to wait for another node's migration. Migrations are changes of catalogs, not of data.
const LOCK_WAIT: Duration = Duration::from_secs(60);
const LOCK_RETRY: Duration = Duration::from_millis(100);
/// A migration that waits longer for a table gives up: writers queue behind it.
/// And backslashes in it mean themselves, whatever the role or the database has set.
const SESSION: &str =
    "SELECT set_config('lock_timeout', '10s', false), set_config('standard_conforming_strings', 'on', false)";
const TABLE: &str = "tidewire.schema_migrations";

/// Number, name and text of every migration, in order. A landed one never changes.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "tables", include_str!("../../migrations/0001_tables.sql")),
    (2, "writing", include_str!("../../migrations/0002_writing.sql")),
    (3, "capture", include_str!("../../migrations/0003_capture.sql")),
    (4, "tracking", include_str!("../../migrations/0004_tracking.sql")),
    (5, "tickets", include_str!("../../migrations/0005_tickets.sql")),
    (6, "schema_events", include_str!("../../migrations/0006_schema_events.sql")),
    (7, "capture_safety", include_str!("../../migrations/0007_capture_safety.sql")),
    (8, "capture_bounds", include_str!("../../migrations/0008_capture_bounds.sql")),
    (9, "capture", include_str!("../../migrations/0009_capture.sql")),
    (10, "tracking", include_str!("../../migrations/0010_tracking.sql")),
    (11, "relay", include_str!("../../migrations/0011_relay.sql")),
    (12, "writers", include_str!("../../migrations/0012_writers.sql")),
    (13, "tracking", include_str!("../../migrations/0013_tracking.sql")),
];

/// What [`migrate`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The schema's version before; 0 for a database without Tidewire.
    pub from: i64,
    /// The schema's version now.
    pub to: i64,
}

/// Why the database is not at this program's version. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// Postgres before 14.
    #[error("Postgres {found} is too old: Tidewire needs version 14 or later; upgrade the server")]
    ServerTooOld {
        /// Its `server_version`.
        found: String,
    },
    /// Postgres cannot convert between this encoding and UTF-8.
    #[error(
        "this database's encoding is {encoding}, which Postgres cannot convert to UTF-8, so nothing can be read from it: \
         move the data to a database of another encoding (UTF8; all but MULE_INTERNAL work)"
    )]
    Encoding {
        /// Its name in Postgres.
        encoding: String,
    },
    /// A server in recovery cannot be written to.
    #[error("this server is a standby (in recovery): point database_url at the primary")]
    Standby,
    /// A newer program has migrated the database.
    #[error(
        "the database is newer than this program: its schema is at version {found}, the program knows {known}; \
         upgrade the program (a newer node or `tidewire migrate` has already migrated it)"
    )]
    DatabaseNewer {
        /// The database's version.
        found: i64,
        /// The newest version that this program knows.
        known: i64,
    },
    /// The text of a migration that has run differs from ours.
    #[error(
        "migration {version} of the database is not the one this program was built with; was it built from another branch?"
    )]
    Changed {
        /// Its number.
        version: i64,
    },
    /// The role lacks a privilege; `grant` is the statement that gives it.
    #[error("role {role} may not {what}. A superuser or the owner can run: {grant}")]
    MissingPrivilege {
        /// The role that connected, quoted as in SQL.
        role: String,
        /// What it may not do.
        what: &'static str,
        /// The statement for a superuser or the owner.
        grant: String,
    },
    /// The migration lock was not free within [`LOCK_WAIT`].
    #[error(
        "another node has been migrating this database for {} s; see pg_stat_activity for what it waits for",
        LOCK_WAIT.as_secs()
    )]
    Busy,
    /// A migration's `lock_timeout` ran out.
    #[error(
        "a migration waited 10 s for a table that another transaction uses; end that transaction \
         (pg_stat_activity, pg_locks) and try again"
    )]
    TableInUse,
    /// A migration failed; it was rolled back.
    #[error("migrating the database: {0}")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// The database could not be asked.
    #[error("migrating the database: {0}")]
    Database(#[from] sqlx::Error),
}

impl MigrationError {
    /// Whether the same attempt may succeed later, without anybody changing the program or the database's owner.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Standby | Self::Busy | Self::TableInUse | Self::Database(_))
    }
}

/// The schema version that this program needs.
#[must_use]
pub fn version() -> i64 {
    MIGRATIONS.iter().map(|(version, ..)| *version).max().unwrap_or(0)
}

/// Migrates the database that `options` names (a direct connection, not one through a transaction pooler).
///
/// # Errors
/// See [`MigrationError`]; the database is then at the version where it was, or at one between (each migration is one
/// transaction), and trying again is safe.
pub async fn migrate(options: &PgConnectOptions) -> Result<Outcome, MigrationError> {
    let mut connection = options.connect().await.map_err(unconvertible)?;
    // Not what the role or the database has set: read-only transactions, say.
    identity::ask(&mut connection, Session::Ours).await.map_err(unconvertible)?;
    let outcome = migrate_on(&mut connection).await;
    // Closing ends the session and with it the lock. A failure to say goodbye changes nothing.
    let _ = connection.close().await;
    outcome
}

async fn migrate_on(connection: &mut PgConnection) -> Result<Outcome, MigrationError> {
    check_server(connection).await?;
    let from = applied(connection).await?;
    if from == version() {
        return Ok(Outcome { from, to: from });
    }
    check_privileges(connection).await?;
    lock(connection).await?;
    // Another node may have been at it meanwhile.
    let from = applied(connection).await?;
    if from < version() {
        sqlx::query(SESSION).execute(&mut *connection).await?;
        migrator(connection).await?.run_direct(None, &mut *connection, false).await.map_err(explain)?;
    }
    Ok(Outcome { from, to: version() })
}

async fn check_server(connection: &mut PgConnection) -> Result<(), MigrationError> {
    let (number, found, standby): (i32, String, bool) = sqlx::query_as(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'), pg_is_in_recovery()",
    )
    .fetch_one(connection)
    .await?;
    if number < MIN_SERVER_VERSION {
        return Err(MigrationError::ServerTooOld { found });
    }
    if standby {
        return Err(MigrationError::Standby);
    }
    Ok(())
}

/// The version that the database is at, after checking that it is one of ours.
async fn applied(connection: &mut PgConnection) -> Result<i64, MigrationError> {
    let exists: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
                        WHERE nspname = 'tidewire' AND relname = 'schema_migrations')",
    )
    .fetch_one(&mut *connection)
    .await?;
    if !exists {
        return Ok(0);
    }
    let rows: Result<Vec<(i64, Vec<u8>)>, _> =
        sqlx::query_as("SELECT version, checksum FROM tidewire.schema_migrations ORDER BY version")
            .fetch_all(&mut *connection)
            .await;
    let rows = match rows {
        Err(error) if is_insufficient_privilege(&error) => {
            return Err(missing_membership(connection).await?);
        }
        rows => rows?,
    };
    let newest = rows.last().map_or(0, |(version, _)| *version);
    if newest > version() {
        return Err(MigrationError::DatabaseNewer { found: newest, known: version() });
    }
    let known = known(Letters::All);
    for (version, checksum) in &rows {
        let ours = known.iter().find(|migration| migration.version == *version);
        if ours.is_none_or(|ours| ours.checksum[..] != checksum[..]) {
            return Err(MigrationError::Changed { version: *version });
        }
    }
    // A program of another branch may have left some out: they are made up for.
    let missing = known.iter().find(|ours| rows.iter().all(|(version, _)| *version != ours.version));
    Ok(missing.map_or(newest, |missing| newest.min(missing.version - 1)))
}

/// Says beforehand, with the statement that helps, what Postgres would refuse in the middle.
async fn check_privileges(connection: &mut PgConnection) -> Result<(), MigrationError> {
    let (role, database, may_create_schema, schema, may_use_schema, owner_or_absent): (
        String,
        String,
        bool,
        bool,
        bool,
        bool,
    ) = sqlx::query_as(
        "SELECT quote_ident(current_user), quote_ident(current_database()),
                    has_database_privilege(current_database(), 'CREATE'),
                    n.oid IS NOT NULL, coalesce(has_schema_privilege(n.oid, 'USAGE, CREATE'), false),
                    coalesce(pg_has_role(c.relowner, 'MEMBER'), true)
             FROM (SELECT 1) AS one
             LEFT JOIN pg_namespace n ON nspname = 'tidewire'
             LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = 'schema_migrations'",
    )
    .fetch_one(&mut *connection)
    .await?;
    if !owner_or_absent {
        return Err(missing_membership(connection).await?);
    }
    if !schema && !may_create_schema {
        let grant = format!("GRANT CREATE ON DATABASE {database} TO {role};");
        return Err(MigrationError::MissingPrivilege { role, what: "create the schema tidewire", grant });
    }
    if schema && !may_use_schema {
        let grant = format!("GRANT USAGE, CREATE ON SCHEMA tidewire TO {role};");
        return Err(MigrationError::MissingPrivilege { role, what: "create tables in the schema tidewire", grant });
    }
    Ok(())
}

/// The role must act for whoever owns Tidewire's tables.
async fn missing_membership(connection: &mut PgConnection) -> Result<MigrationError, sqlx::Error> {
    let (role, owner): (String, String) = sqlx::query_as(
        "SELECT quote_ident(current_user), quote_ident(pg_get_userbyid(relowner))
         FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
         WHERE nspname = 'tidewire' AND relname = 'schema_migrations'",
    )
    .fetch_one(connection)
    .await?;
    let grant = format!("GRANT {owner} TO {role};");
    Ok(MigrationError::MissingPrivilege { role, what: "use the tables of Tidewire in this database", grant })
}

async fn lock(connection: &mut PgConnection) -> Result<(), MigrationError> {
    let started = Instant::now();
    while started.elapsed() < LOCK_WAIT {
        let locked: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)")
            .bind(MIGRATION_LOCK)
            .fetch_one(&mut *connection)
            .await?;
        if locked {
            return Ok(());
        }
        tokio::time::sleep(LOCK_RETRY).await;
    }
    Err(MigrationError::Busy)
}

async fn migrator(connection: &mut PgConnection) -> Result<Migrator, sqlx::Error> {
    let (schema, utf8): (bool, bool) = sqlx::query_as(
        "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'tidewire'), getdatabaseencoding() = 'UTF8'",
    )
    .fetch_one(connection)
    .await?;
    let mut migrator = Migrator::with_migrations(known(if utf8 { Letters::All } else { Letters::Ascii }));
    migrator.dangerous_set_table_name(TABLE);
    // We hold a lock of our own.
    migrator.set_locking(false);
    // CREATE SCHEMA IF NOT EXISTS demands the privilege even where the schema exists.
    if !schema {
        migrator.create_schema("tidewire");
    }
    Ok(migrator)
}

/// Which letters a migration's text may have when it is sent.
#[derive(Clone, Copy, Debug)]
enum Letters {
    All,
    /// Other encodings than UTF-8 may not have the rest; there are some in comments.
    Ascii,
}

fn known(letters: Letters) -> Vec<Migration> {
    let migration = |&(version, name, sql): &(i64, &'static str, &'static str)| {
        // The checksum is that of the text as it stands in the file, whatever is sent.
        let mut migration = Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false);
        if matches!(letters, Letters::Ascii) && !sql.is_ascii() {
            migration.sql = AssertSqlSafe(ascii(sql)).into_sql_str();
        }
        migration
    };
    MIGRATIONS.iter().map(migration).collect()
}

/// A migration's text without letters that a database's encoding may lack.
fn ascii(sql: &str) -> String {
    let mut out = String::with_capacity(sql.len());
    for letter in sql.chars() {
        match letter {
            '…' => out.push_str("..."),
            '–' | '—' | '−' => out.push('-'),
            '‘' | '’' | '“' | '”' => out.push('\''),
            '→' => out.push_str("->"),
            '≤' => out.push_str("<="),
            '≥' => out.push_str(">="),
            '×' => out.push('x'),
            'µ' => out.push('u'),
            letter if letter.is_ascii() => out.push(letter),
            _ => out.push('?'),
        }
    }
    out
}

/// A server that cannot talk UTF-8 about a database refuses the connection.
fn unconvertible(error: sqlx::Error) -> MigrationError {
    let refused = error.as_database_error().map(|refused| (refused.code(), refused.message()));
    match refused {
        Some((Some(code), message)) if code == "0A000" && message.contains("MULE_INTERNAL") => {
            MigrationError::Encoding { encoding: "MULE_INTERNAL".to_owned() }
        }
        _ => error.into(),
    }
}

fn explain(error: sqlx::migrate::MigrateError) -> MigrationError {
    match &error {
        sqlx::migrate::MigrateError::ExecuteMigration(sqlx::Error::Database(inner), _)
            if inner.code().as_deref() == Some("55P03") =>
        {
            MigrationError::TableInUse
        }
        _ => MigrationError::Migrate(error),
    }
}

fn is_insufficient_privilege(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|error| error.code()).as_deref() == Some("42501")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrations_are_numbered_without_gaps_and_every_file_is_embedded() {
        let numbers: Vec<i64> = MIGRATIONS.iter().map(|(number, ..)| *number).collect();
        assert_eq!(numbers, (1..=version()).collect::<Vec<_>>());
        let mut files: Vec<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations"))
            .expect("the folder of migrations")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        files.sort();
        let named: Vec<String> = MIGRATIONS.iter().map(|(number, name, _)| format!("{number:04}_{name}.sql")).collect();
        assert_eq!(files, named);
    }

    /// Three landed ones have an ellipsis in a comment, for which LATIN1 has no byte.
    #[test]
    fn what_is_sent_to_other_encodings_is_ascii_and_differs_in_comments_only() {
        for (plain, whole) in known(Letters::Ascii).iter().zip(known(Letters::All)) {
            assert_eq!(plain.checksum, whole.checksum);
            let (plain, whole) = (plain.sql.as_str(), whole.sql.as_str());
            assert!(plain.is_ascii());
            assert_eq!(plain.matches('?').count(), whole.matches('?').count(), "a letter that ascii() does not know");
            assert_eq!(plain.lines().count(), whole.lines().count());
            for (plain, whole) in plain.lines().zip(whole.lines()).filter(|(plain, whole)| plain != whole) {
                let code = |line: &str| line.split("--").next().unwrap_or_default().to_owned();
                assert_eq!(code(plain), code(whole), "outside a comment");
            }
        }
    }
}
