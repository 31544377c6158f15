//! A pool for single statements: direct, or through a pooler that gives every transaction any session.
//!
//! Behind a transaction pooler nothing may outlast a transaction: no named statement, no session setting. sqlx sends even
//! an unnamed statement in two steps with a `Sync` between them, and between two transactions another client's unnamed
//! statement may take its place. So every statement there gets a transaction of its own, which begins with what a direct
//! connection is asked and told once: which database it is, and the settings, for this transaction alone. That makes four
//! round trips of two; a pooler is near.

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use sqlx::pool::PoolConnection;
use sqlx::postgres::{
    PgArguments, PgConnectOptions, PgConnection, PgPool, PgQueryResult, PgRow, PgStatement, PgTypeInfo,
};
use sqlx::{Either, Execute, Executor, Postgres, SqlStr};

use std::sync::Arc;

use super::{ConnectError, Identity, identity};

/// Connections for single statements. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Pool {
    inner: PgPool,
    way: Way,
}

#[derive(Clone, Debug)]
enum Way {
    /// Sessions of this pool alone, prepared when they connect.
    Direct,
    /// Sessions that other clients get between two transactions.
    Shared(Arc<Identity>),
}

impl From<PgPool> for Pool {
    /// A pool of direct connections.
    fn from(inner: PgPool) -> Self {
        Self { inner, way: Way::Direct }
    }
}

impl Pool {
    /// Through a transaction pooler; every transaction reports to `identity` which database it reached.
    pub(super) const fn shared(inner: PgPool, identity: Arc<Identity>) -> Self {
        Self { inner, way: Way::Shared(identity) }
    }

    /// How its connections are made.
    #[must_use]
    pub fn connect_options(&self) -> Arc<PgConnectOptions> {
        self.inner.connect_options()
    }

    /// Ends its connections.
    pub async fn close(&self) {
        self.inner.close().await;
    }

    /// One connection, and so one server, for several statements: behind a pooler in one transaction. Whoever does not
    /// [`Held::release`] it closes a pooler's connection.
    ///
    /// # Errors
    /// When there is no connection, or it leads to no primary of this cluster.
    pub async fn hold(&self) -> Result<Held, sqlx::Error> {
        let mut held = Held { connection: self.inner.acquire().await?, transaction: Transaction::None };
        if let Way::Shared(identity) = &self.way {
            held.transaction = Transaction::Open;
            match identity::begin(&mut held.connection).await? {
                Some(found) => {
                    identity.observe(&found).map_err(|error| sqlx::Error::Configuration(error.into()))?;
                }
                None => return Err(sqlx::Error::Configuration(ConnectError::OnlyStandbys.into())),
            }
        }
        Ok(held)
    }
}

/// A connection taken from a [`Pool`].
#[derive(Debug)]
pub struct Held {
    connection: PoolConnection<Postgres>,
    transaction: Transaction,
}

/// Whether a pooler's transaction is open: set by [`Pool::hold`], cleared by [`Held::release`], read when it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transaction {
    None,
    Open,
}

impl Held {
    /// Ends the transaction, if there is one.
    ///
    /// # Errors
    /// When the commit fails.
    pub async fn release(mut self) -> Result<(), sqlx::Error> {
        if self.transaction == Transaction::Open {
            sqlx::raw_sql("COMMIT").execute(&mut *self.connection).await?;
            self.transaction = Transaction::None;
        }
        Ok(())
    }

    /// Ends the transaction after `outcome`; a failed one is rolled back.
    async fn after<T>(self, outcome: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        let released = self.release().await;
        let value = outcome?;
        released.map(|()| value)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.transaction == Transaction::Open {
            // Cancelled, or failed, in the middle: the next to take it would find itself inside a transaction.
            self.connection.close_on_drop();
        }
    }
}

/// A statement that leaves no name behind in the session.
struct Unnamed<E>(E);

impl<'q, E: Execute<'q, Postgres>> Execute<'q, Postgres> for Unnamed<E> {
    fn sql(self) -> SqlStr {
        self.0.sql()
    }

    fn statement(&self) -> Option<&PgStatement> {
        self.0.statement()
    }

    fn take_arguments(&mut self) -> Result<Option<PgArguments>, sqlx::error::BoxDynError> {
        self.0.take_arguments()
    }

    fn persistent(&self) -> bool {
        false
    }
}

type Step = Either<PgQueryResult, PgRow>;

impl<'c> Executor<'c> for &'c mut Held {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Step, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let connection: &mut PgConnection = &mut self.connection;
        match self.transaction {
            Transaction::None => connection.fetch_many(query),
            Transaction::Open => connection.fetch_many(Unnamed(query)),
        }
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let connection: &mut PgConnection = &mut self.connection;
        match self.transaction {
            Transaction::None => connection.fetch_optional(query),
            Transaction::Open => connection.fetch_optional(Unnamed(query)),
        }
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [PgTypeInfo],
    ) -> BoxFuture<'e, Result<PgStatement, sqlx::Error>>
    where
        'c: 'e,
    {
        let connection: &mut PgConnection = &mut self.connection;
        connection.prepare_with(sql, parameters)
    }
}

impl<'p> Executor<'p> for &'_ Pool {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Step, sqlx::Error>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        if matches!(self.way, Way::Direct) {
            return self.inner.fetch_many(query);
        }
        let pool = self.clone();
        let steps = async move {
            let mut held = pool.hold().await?;
            let steps = held.fetch_many(query).try_collect::<Vec<_>>().await;
            let steps = held.after(steps).await?;
            Ok::<_, sqlx::Error>(stream::iter(steps.into_iter().map(Ok)))
        };
        stream::once(steps).try_flatten().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, sqlx::Error>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        if matches!(self.way, Way::Direct) {
            return self.inner.fetch_optional(query);
        }
        let pool = self.clone();
        Box::pin(async move {
            let mut held = pool.hold().await?;
            let row = held.fetch_optional(query).await;
            held.after(row).await
        })
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [PgTypeInfo],
    ) -> BoxFuture<'e, Result<PgStatement, sqlx::Error>>
    where
        'p: 'e,
    {
        self.inner.prepare_with(sql, parameters)
    }
}
