//! The database that a command works on.

use sqlx::PgPool;
use tracing::Level;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::dev;
use crate::postgres::Database;
use crate::telemetry::tracing::{NoticeLayer, with_notices};

/// Connections of a command.
const POOL_SIZE: u32 = 2;

/// Which database
#[derive(Clone, clap::Args)]
pub struct DatabaseArgs {
    /// Postgres URL [default: that of a running `tidewire dev`]
    #[arg(long, env = "TIDEWIRE_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

// The URL may hold a password.
impl std::fmt::Debug for DatabaseArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = self.database_url.as_deref().map(crate::config::without_password);
        f.debug_struct("DatabaseArgs").field("database_url", &shown).finish()
    }
}

impl DatabaseArgs {
    /// The database that was named, without a connection yet.
    ///
    /// # Errors
    /// When none is named, with what to do.
    pub fn named(&self) -> anyhow::Result<Database> {
        let url = match &self.database_url {
            Some(url) => url.clone(),
            None => match dev::running() {
                Some(running) => running.database_url,
                None => anyhow::bail!(
                    "no database named: give --database-url or TIDEWIRE_DATABASE_URL, or start `tidewire dev`"
                ),
            },
        };
        Ok(Database::new(&url, None, "cli", POOL_SIZE)?)
    }

    /// Connects to the primary.
    ///
    /// # Errors
    /// When no database is named or none is reached, with what to do.
    pub async fn database(&self) -> anyhow::Result<Database> {
        let database = self.named()?;
        database.renew().await?;
        Ok(database)
    }

    /// The pool alone.
    ///
    /// # Errors
    /// As [`DatabaseArgs::database`].
    pub async fn pool(&self) -> anyhow::Result<PgPool> {
        Ok(self.database().await?.pool())
    }
}

/// Does `work` and gives what the server said beside its answer, in its order.
pub async fn heard<F: Future>(work: F) -> (F::Output, Vec<(Level, String)>) {
    // Already there: whoever installed it shows them.
    let _ = tracing_subscriber::registry().with(NoticeLayer).try_init();
    with_notices(work).await
}

/// What Postgres said, with its hint.
#[must_use]
pub fn explained(error: sqlx::Error) -> anyhow::Error {
    let sqlx::Error::Database(database) = &error else { return error.into() };
    let Some(postgres) = database.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() else { return error.into() };
    match (postgres.code(), postgres.hint()) {
        ("3F000" | "42883" | "42P01", _) if postgres.message().contains("tidewire") => {
            anyhow::anyhow!("{}: run `tidewire migrate` first", postgres.message())
        }
        (_, Some(hint)) => anyhow::anyhow!("{}. {hint}", postgres.message()),
        (_, None) => anyhow::anyhow!("{}", postgres.message()),
    }
}
