//! The database that a command works on.

use std::io::Write as _;
use std::path::PathBuf;

use tracing::Level;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::Settings;
use crate::dev::{self, ClusterName};
use crate::postgres::Database;
use crate::postgres::Pool;
use crate::telemetry::tracing::{NoticeLayer, with_notices};

/// Connections of a command.
const POOL_SIZE: u32 = 2;

/// Which database
#[derive(Clone, clap::Args)]
pub struct DatabaseArgs {
    /// Postgres URL [default: that of the configuration file, else that of the `tidewire dev` that runs]
    #[arg(long, global = true, env = "TIDEWIRE_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// The database of the `tidewire dev` of this name, whatever else is set
    #[arg(long, global = true, value_name = "NAME")]
    pub dev: Option<ClusterName>,
    /// TOML file with `database_url`, as of `tidewire serve` [default: tidewire.toml where you are, if there is one]
    #[arg(long, global = true, env = "TIDEWIRE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

// The URL may hold a password.
impl std::fmt::Debug for DatabaseArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = self.database_url.as_deref().map(crate::config::without_password);
        f.debug_struct("DatabaseArgs").field("database_url", &shown).field("dev", &self.dev).finish_non_exhaustive()
    }
}

/// Who reads what a command prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Somebody at a terminal, who is told on standard error which cluster a command speaks to.
    Person,
    /// A script, which gets JSON and nothing beside it.
    Program,
}

impl Reader {
    /// By the flag `--json`.
    #[must_use]
    pub const fn of(json: bool) -> Self {
        if json { Self::Program } else { Self::Person }
    }
}

/// Tells a person which cluster the command speaks to.
pub(super) fn say_target(reader: Reader, target: &str) {
    if reader == Reader::Person {
        // A closed standard error is no reason to stop.
        let _ = writeln!(std::io::stderr(), "── {target}");
    }
}

impl DatabaseArgs {
    /// The database that was named, without a connection yet.
    ///
    /// # Errors
    /// When none is named, or several may be meant, with what to do.
    pub fn named(&self, reader: Reader) -> anyhow::Result<Database> {
        let (url, origin) = self.url()?;
        let database = Database::new(&url, None, "cli", POOL_SIZE)?;
        say_target(reader, &format!("{origin}: {}", crate::config::without_password(&url)));
        Ok(database)
    }

    /// The URL, and where it is from.
    fn url(&self) -> anyhow::Result<(String, String)> {
        if self.dev.is_none() {
            if let Some(url) = &self.database_url {
                return Ok((url.clone(), "database".to_owned()));
            }
            if let Some((path, settings)) = Settings::of_file(self.config.as_deref())?
                && let Some(url) = settings.database_url
            {
                return Ok((url, format!("database of {}", path.display())));
            }
        }
        match dev::choose(self.dev.as_ref())? {
            Some(running) => Ok((running.database_url, format!("database of `tidewire dev` {}", running.name))),
            None => anyhow::bail!(
                "no database named: give --database-url or TIDEWIRE_DATABASE_URL, write database_url into tidewire.toml, or \
                 start `tidewire dev`"
            ),
        }
    }

    /// Connects to the primary.
    ///
    /// # Errors
    /// When no database is named or none is reached, with what to do.
    pub async fn database(&self, reader: Reader) -> anyhow::Result<Database> {
        let database = self.named(reader)?;
        // A pooler first: what the rest does to its sessions would meet other people's statements.
        database.probe().await?;
        database.renew().await?;
        Ok(database)
    }

    /// The pool alone.
    ///
    /// # Errors
    /// As [`DatabaseArgs::database`].
    pub async fn pool(&self, reader: Reader) -> anyhow::Result<Pool> {
        Ok(self.database(reader).await?.pool())
    }
}

/// Does `work` and gives what the server said beside its answer, in its order.
pub async fn heard<F: Future>(work: F) -> (F::Output, Vec<(Level, String)>) {
    // Already there: whoever installed it shows them.
    let _ = tracing_subscriber::registry().with(NoticeLayer).try_init();
    with_notices(work).await
}

/// What Postgres said, with its hint; where a right is missing, with the statement that gives it.
pub async fn explained(pool: &Pool, error: sqlx::Error) -> anyhow::Error {
    let sqlx::Error::Database(database) = &error else { return error.into() };
    let Some(postgres) = database.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() else { return error.into() };
    let message = postgres.message();
    match (postgres.code(), postgres.hint()) {
        ("3F000" | "42883" | "42P01", _) if message.contains("tidewire") => {
            anyhow::anyhow!("{message}: run `tidewire migrate` first")
        }
        (_, Some(hint)) => anyhow::anyhow!("{message}. {hint}"),
        (INSUFFICIENT_PRIVILEGE, None) => match missing_right(pool, message).await {
            Ok(remedy) => anyhow::anyhow!("{message}. {remedy}"),
            // What Postgres said is still true.
            Err(_) => anyhow::anyhow!("{message}"),
        },
        (_, None) => anyhow::anyhow!("{message}"),
    }
}

const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// Which statement gives the right that `message` says is missing. Asks catalogs only, which every role may read.
async fn missing_right(pool: &Pool, message: &str) -> Result<String, sqlx::Error> {
    let (role, owner, is_owner, may_use, app): (String, Option<String>, bool, bool, bool) = sqlx::query_as(
        "SELECT quote_ident(current_user), quote_ident(pg_get_userbyid(relation.relowner)),
                coalesce(pg_has_role(relation.relowner, 'USAGE'), false),
                coalesce(has_schema_privilege(schema.oid, 'USAGE'), false),
                -- Without CREATEROLE the migration made no such role, or one of another database has nothing here.
                coalesce((SELECT has_schema_privilege(app.oid, schema.oid, 'USAGE')
                          FROM pg_catalog.pg_roles app WHERE app.rolname = 'tidewire_app'), false)
         FROM (SELECT 1) AS one
         LEFT JOIN pg_catalog.pg_namespace schema ON schema.nspname = 'tidewire'
         LEFT JOIN pg_catalog.pg_class relation ON relation.relnamespace = schema.oid AND relation.relname = 'outbox'",
    )
    .fetch_one(pool)
    .await?;
    let owner = owner.unwrap_or_else(|| "tidewire_owner".to_owned());
    let emitting = if app { Emitting::Role } else { Emitting::Functions };
    Ok(remedy(message, &role, &owner, is_owner, may_use, emitting))
}

/// What a role needs to write domain events, set by how the schema was migrated.
#[derive(Clone, Copy, Debug)]
enum Emitting {
    /// Membership in `tidewire_app`.
    Role,
    /// The rights themselves, as that role is not there or has no rights in this database.
    Functions,
}

impl Emitting {
    fn grant(self, role: &str) -> String {
        match self {
            Self::Role => format!("GRANT tidewire_app TO {role};"),
            Self::Functions => format!(
                "GRANT USAGE ON SCHEMA tidewire TO {role}; GRANT EXECUTE ON FUNCTION \
                 tidewire.emit(text, text, text, json, json), tidewire.emit(text, text, text, jsonb, jsonb), \
                 tidewire.emit(text, text, text, text, json) TO {role};"
            ),
        }
    }
}

fn remedy(message: &str, role: &str, owner: &str, is_owner: bool, may_use: bool, emitting: Emitting) -> String {
    if let Some(table) = message.strip_prefix("must be owner of ") {
        return format!(
            "A table is tracked by its owner: run this as the owner of {table}, or have a superuser run: GRANT <that owner> TO {role};"
        );
    }
    if is_owner {
        return format!("Have the owner of what is named here grant the right to {role}");
    }
    if message.contains("function track")
        || message.contains("function untrack")
        || (!may_use && message.contains("schema"))
    {
        return format!(
            "To track its own tables, {role} needs, from a member of {owner}: SELECT tidewire.grant_tracking('{}'); to \
             administer or run nodes: GRANT {owner} TO {role}; to write events with tidewire.emit(): {}",
            role.replace('\'', "''"),
            emitting.grant(role)
        );
    }
    format!("A superuser or a member of {owner} can run: GRANT {owner} TO {role};")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_right_comes_with_the_statement_that_gives_it() {
        let of = |message| remedy(message, "app", "tidewire_owner", false, false, Emitting::Role);
        assert!(of("permission denied for schema tidewire").contains("GRANT tidewire_app TO app;"));
        assert!(of("permission denied for function track").contains("SELECT tidewire.grant_tracking('app');"));
        assert!(of("permission denied for table api_keys").ends_with("GRANT tidewire_owner TO app;"));
        assert!(of("must be owner of table orders").contains("as the owner of table orders"));
    }
}
