//! Connections to Postgres: the pool, connections of one's own, and which server this is.
//!
//! `database_url` may name several hosts; of those that are not in recovery, the one on the newest timeline is the
//! primary. Whatever connects says which incarnation of the database it found ([`Incarnation`]); an older timeline than
//! one seen before is refused, a different one is announced, so that the follower can hold delivery until the log's epoch
//! is known.
//!
//! A cancelled `Pool::begin` poisons the pooled connection (sqlx 0.9.0), so nothing here or above calls it: statements
//! through the pool are single ones, and whoever needs a transaction owns its connection.

pub mod identity;
pub mod listen;
pub mod locks;
pub mod migrate;
pub mod pool;
mod refusal;
pub mod registry;
pub mod rounds;
pub mod settings;
pub mod url;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _};
use tokio::sync::watch;

use identity::Session;
pub use identity::{Identity, Incarnation};
pub use pool::Pool;

/// How long one connection attempt may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long all hosts together may take: they are asked at once, and each is given up after [`CONNECT_TIMEOUT`].
const FIND_TIMEOUT: Duration = Duration::from_secs(6);
/// How long the other hosts may take once one has answered that it is a primary.
const OTHERS_PATIENCE: Duration = Duration::from_millis(250);
/// The same while nothing is known that would tell an old primary from the true one; less than a follower's statement may take.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);
/// How long a statement may wait for a pooled connection.
pub const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not a URL that names a Postgres.
    #[error("{0}")]
    Url(#[from] url::UrlError),
    /// No host answered, or none that will not soon.
    #[error("no Postgres reached: {}", refusal::shown(.0))]
    Unreachable(sqlx::Error),
    /// A Postgres answered and does not let this role into this database: only somebody who changes a setting helps.
    #[error("Postgres refuses the connection: {}", refusal::shown(.0))]
    Refused(sqlx::Error),
    /// Every host that answered is a standby.
    #[error("every host in database_url is in recovery (a standby); the primary must be among them")]
    OnlyStandbys,
    /// The database's timeline is older than the one already seen: an old primary came back.
    #[error(
        "this database is on timeline {found}, but timeline {seen} was seen already: an old primary that must be fenced"
    )]
    OldPrimary {
        /// The timeline seen before.
        seen: u32,
        /// That of this connection.
        found: u32,
    },
    /// Older than what is supported.
    #[error("this is Postgres {0}; Tidewire needs version 14 or later")]
    TooOld(i32),
    /// Behind a transaction pooler.
    #[error(
        "database_url goes through a transaction pooler ({0}); LISTEN and session locks need a direct connection: give the pooler's URL as --pooled-url and the server's own as --database-url"
    )]
    Pooler(&'static str),
}

impl ConnectError {
    /// Whether waiting cannot help: somebody has to change the configuration or the server.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Url(_) | Self::TooOld(_) | Self::Pooler(_) | Self::Refused(_))
    }

    /// Of two hosts' failures the one that counts: as long as one host may come back, waiting can help.
    fn or(self, other: Self) -> Self {
        match (&self, &other) {
            // What no host has said yet.
            (Self::OnlyStandbys, _) => other,
            (Self::Refused(_), Self::Unreachable(_)) => other,
            _ => self,
        }
    }
}

/// The node's way to its database.
#[derive(Debug)]
pub struct Database {
    hosts: Vec<PgConnectOptions>,
    pooled: Option<PgConnectOptions>,
    size: u32,
    // Replaced, not mended: sqlx gives a silently dead connection's place in the pool back to nobody.
    pool: ArcSwap<Pool>,
    // Apart from it what clients can ask for, so that the node's own statements never wait behind theirs.
    clients: Option<(u32, ArcSwap<Pool>)>,
    identity: Arc<Identity>,
}

impl Database {
    /// Prepares connections; connects to nothing yet. `size` bounds the pool.
    ///
    /// # Errors
    /// [`ConnectError::Url`].
    pub fn new(database_url: &str, pooled_url: Option<&str>, node: &str, size: u32) -> Result<Self, ConnectError> {
        let name = |options: PgConnectOptions| {
            options.application_name(&format!("tidewire {node}")).disable_statement_logging()
        };
        let hosts: Vec<_> = url::hosts(database_url)?.into_iter().map(name).collect();
        let pooled = match pooled_url {
            // PgBouncer refuses a start-up parameter that it does not track.
            Some(text) => {
                url::hosts(text)?.into_iter().next().map(|options| name(options).extra_float_digits(None::<i8>))
            }
            None => None,
        };
        let identity = Arc::new(Identity::default());
        let first = hosts.first().ok_or(url::UrlError::NoHost)?;
        let pool = ArcSwap::from_pointee(begun(pooled.as_ref(), first, size, &identity));
        Ok(Self { hosts, pooled, size, pool, clients: None, identity })
    }

    /// With a pool of `size` connections apart for what clients ask for.
    #[must_use]
    pub fn with_clients(mut self, size: u32) -> Self {
        let begun = |first| ArcSwap::from_pointee(begun(self.pooled.as_ref(), first, size, &self.identity));
        self.clients = self.hosts.first().map(|first| (size, begun(first)));
        self
    }

    /// The pool for single statements of the node's own: the follower's, the heartbeat's, what is known of keys and tables.
    #[must_use]
    pub fn pool(&self) -> Pool {
        Pool::clone(&self.pool.load())
    }

    /// The pool for single statements that a client's request is the reason of: however many of them wait, nobody else does.
    #[must_use]
    pub fn clients(&self) -> Pool {
        self.clients.as_ref().map_or_else(|| self.pool(), |(_, pool)| Pool::clone(&pool.load()))
    }

    /// Which database the connections have found so far.
    #[must_use]
    pub fn incarnation(&self) -> watch::Receiver<Option<Incarnation>> {
        self.identity.watch()
    }

    /// Finds the primary and opens a connection of one's own to it.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(&self) -> Result<(PgConnection, Incarnation), ConnectError> {
        self.find(Session::Ours).await.map(|(connection, incarnation, _)| (connection, incarnation))
    }

    /// All hosts are asked at once, so that one that swallows everything holds up nobody, and of several that take writes the
    /// newest timeline counts: the others are primaries that were left.
    async fn find(&self, session: Session) -> Result<(PgConnection, Incarnation, PgConnectOptions), ConnectError> {
        let mut tries: FuturesUnordered<_> = self
            .hosts
            .iter()
            .map(|options| async move {
                let attempt = async {
                    let mut connection = PgConnection::connect_with(options).await?;
                    let found = identity::ask(&mut connection, session).await?;
                    Ok::<_, sqlx::Error>((connection, found))
                };
                (options, tokio::time::timeout(CONNECT_TIMEOUT, attempt).await)
            })
            .collect();
        let mut best: Option<(PgConnection, Incarnation, &PgConnectOptions)> = None;
        let mut failure = ConnectError::OnlyStandbys;
        let mut standby = false;
        let mut patience = std::pin::pin!(tokio::time::sleep(FIND_TIMEOUT));
        loop {
            let next = tokio::select! {
                next = tries.next() => next,
                () = &mut patience => None,
            };
            let Some((options, tried)) = next else { break };
            match tried {
                Ok(Ok((connection, Some(found)))) => {
                    // One that is known to be left may only be the nearest: it shortens nobody's time.
                    let others = match self.identity.is_current(&found) {
                        Some(true) => Some(OTHERS_PATIENCE),
                        Some(false) => None,
                        None => Some(FIRST_PATIENCE),
                    };
                    if best.as_ref().is_none_or(|(_, known, _)| found.timeline > known.timeline) {
                        best = Some((connection, found, options));
                    }
                    if let Some(others) = others {
                        patience.as_mut().reset(tokio::time::Instant::now() + others);
                    }
                }
                Ok(Ok((_, None))) => standby = true,
                Ok(Err(error)) => failure = failure.or(refusal::judged(error)),
                Err(_) => failure = failure.or(ConnectError::Unreachable(timed_out())),
            }
        }
        let Some((connection, found, options)) = best else {
            // A standby may be promoted, whatever another host says.
            let waits = standby && failure.is_final();
            return Err(if waits { ConnectError::OnlyStandbys } else { failure });
        };
        self.identity.observe(&found)?;
        Ok((connection, found, options.clone()))
    }

    /// How to connect to the primary of this moment.
    ///
    /// # Errors
    /// [`ConnectError`] when there is none.
    pub async fn primary(&self) -> Result<PgConnectOptions, ConnectError> {
        let (connection, _, options) = self.find(Session::Ours).await?;
        let _ = connection.close().await;
        Ok(options)
    }

    /// Begins a new pool at the primary of this moment. The old one, with every connection made before, ends when its last
    /// statement does.
    ///
    /// # Errors
    /// [`ConnectError`] when there is no primary; the pool is left alone then.
    pub async fn renew(&self) -> Result<(), ConnectError> {
        let (connection, _, options) = self.find(Session::Ours).await?;
        let begun = |size| Arc::new(begun(self.pooled.as_ref(), &options, size, &self.identity));
        if let Some((size, clients)) = &self.clients {
            clients.store(begun(*size));
        }
        self.pool.store(begun(self.size));
        let _ = tokio::time::timeout(CONNECT_TIMEOUT, connection.close()).await;
        Ok(())
    }

    /// A pool of one direct connection, for `LISTEN`.
    pub(crate) async fn listen_pool(&self) -> Result<PgPool, ConnectError> {
        let (connection, _, options) = self.find(Session::Ours).await?;
        let _ = connection.close().await;
        PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None)
            .acquire_timeout(CONNECT_TIMEOUT)
            // It is idle for as long as nothing is written.
            .after_connect(|connection, _| {
                Box::pin(async move { identity::ask(connection, Session::Ours).await.map(|_| ()) })
            })
            .connect_with(options)
            .await
            .map_err(refusal::judged)
    }

    /// Refuses a server that is too old and a transaction pooler on the direct URL, before anything is done to a session.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn probe(&self) -> Result<(), ConnectError> {
        let (mut connection, _, options) = self.find(Session::Untouched).await?;
        let version = identity::version(&mut connection).await.map_err(ConnectError::Unreachable)?;
        if version < 140_000 {
            return Err(ConnectError::TooOld(version / 10_000));
        }
        identity::refuse_pooler(&mut connection, &options).await?;
        let _ = connection.close().await;
        Ok(())
    }
}

/// Through the pooler where there is one, else to the host `direct`.
fn begun(pooled: Option<&PgConnectOptions>, direct: &PgConnectOptions, size: u32, identity: &Arc<Identity>) -> Pool {
    let options = PgPoolOptions::new()
        .max_connections(size)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(Duration::from_secs(300))
        .max_lifetime(Duration::from_secs(1800));
    if let Some(pooled) = pooled {
        return Pool::shared(options.connect_lazy_with(pooled.clone()), Arc::clone(identity));
    }
    let identity = Arc::clone(identity);
    let options = options.after_connect(move |connection, _| {
        let identity = Arc::clone(&identity);
        Box::pin(async move {
            match identity::ask(connection, Session::Ours).await? {
                Some(found) => identity.observe(&found).map_err(|error| sqlx::Error::Configuration(error.into()))?,
                None => return Err(sqlx::Error::Configuration(ConnectError::OnlyStandbys.into())),
            }
            let limits =
                concat!("SELECT ", settings::limits!("false"), ", set_config('tcp_user_timeout', '5s', false)");
            sqlx::raw_sql(limits).execute(connection).await?;
            Ok(())
        })
    });
    options.connect_lazy_with(direct.clone()).into()
}

/// Waits for an answer at most `limit`: a connection that was cut off says nothing for ever.
///
/// # Errors
/// Those of `work`, or a timeout.
pub async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out()))
}

fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer in time"))
}

/// Whether the backend `pid` works on a statement, and waits neither for a lock nor for a standby.
///
/// # Errors
/// When Postgres refuses.
pub async fn at_work(pool: &Pool, pid: i32) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity
                        WHERE pid = $1 AND state = 'active'
                            AND (wait_event_type IS NULL OR wait_event_type IN ('IO', 'LWLock', 'BufferPin', 'Client')))",
    )
    .bind(pid)
    .fetch_one(pool)
    .await
}
