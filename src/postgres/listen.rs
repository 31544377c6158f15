//! LISTEN, as messages that admit loss.
//!
//! A listener says [`Heard::Lost`] after every (re)connect, since whatever was sent in between is gone; the first
//! thing that a listener ever says is therefore `Lost`, once its LISTEN is in force. Correct use: on `Lost`, read the
//! truth; then trust what follows until the next `Lost`.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use sqlx::postgres::PgListener;
use tokio::sync::mpsc;

use super::{ConnectError, Database};
use crate::backoff::Backoff;

/// Rung when a tracked table may have changed, or which tables are tracked.
pub const SCHEMA_CHANNEL: &str = "tidewire_schema";

/// How long a connection that listens may take: to find the primary, then to connect to it.
const OPEN_TIMEOUT: Duration = Duration::from_secs(6);
/// Longest wait between attempts to connect.
const RECONNECT_CAP: Duration = Duration::from_secs(1);
const RECONNECT_BASE: Duration = Duration::from_millis(50);

/// What came in.
#[derive(Debug)]
pub enum Heard {
    /// LISTEN is in force anew; anything may have been missed.
    Lost,
    /// Postgres is not reached; it is being tried again.
    Down,
    /// A notification.
    Notification {
        /// Its channel.
        channel: String,
        /// Backend that sent it.
        pid: u32,
        /// What it says.
        payload: String,
    },
}

/// Messages that wait for whoever listens; beyond, they wait in the connection and in Postgres's queue.
const QUEUE: usize = 256;

/// Listens in a task of its own, so that connecting is never cut short by whatever else its reader waits for. `suspect`
/// lets go of a connection that stands: it may be dead without knowing it.
pub fn listen(
    database: Arc<Database>,
    channels: &'static [&'static str],
    suspect: Arc<tokio::sync::Notify>,
) -> (impl Future<Output = ()> + Send, mpsc::Receiver<Heard>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let task = async move {
        let mut listener = Listener::new(&database, channels);
        loop {
            let heard = tokio::select! {
                heard = listener.next() => heard.unwrap_or_else(|error| {
                    tracing::debug!(%error, "not listening");
                    Heard::Down
                }),
                () = suspect.notified(), if listener.live.is_some() => {
                    listener.live = None;
                    continue;
                }
                () = sender.closed() => return,
            };
            if matches!(heard, Heard::Lost) {
                // What was suspected is not this connection.
                let _ = suspect.notified().now_or_never();
            }
            if sender.send(heard).await.is_err() {
                return;
            }
        }
    };
    (task, receiver)
}

/// One LISTEN connection that mends itself.
#[derive(Debug)]
struct Listener<'a> {
    database: &'a Database,
    channels: &'static [&'static str],
    live: Option<PgListener>,
    backoff: Backoff,
}

impl<'a> Listener<'a> {
    fn new(database: &'a Database, channels: &'static [&'static str]) -> Self {
        Self { database, channels, live: None, backoff: Backoff::new(RECONNECT_BASE, RECONNECT_CAP) }
    }

    async fn next(&mut self) -> Result<Heard, ConnectError> {
        let Some(live) = self.live.as_mut() else {
            return self.connect().await;
        };
        match live.try_recv().await {
            Ok(Some(notification)) => Ok(heard(notification)),
            // It reconnects by itself after None, but a fresh one costs the same and is in a known state.
            Ok(None) | Err(_) => {
                self.live = None;
                self.connect().await
            }
        }
    }

    async fn connect(&mut self) -> Result<Heard, ConnectError> {
        if self.backoff.attempts() > 0 {
            tokio::time::sleep(self.backoff.next_wait(rand::random())).await;
        }
        match self.open().await {
            Ok(live) => {
                self.live = Some(live);
                self.backoff.reset();
                Ok(Heard::Lost)
            }
            Err(error) => {
                let _ = self.backoff.next_wait(0.0);
                Err(error)
            }
        }
    }

    async fn open(&self) -> Result<PgListener, ConnectError> {
        let open = async {
            let pool = self.database.listen_pool().await?;
            let mut live = PgListener::connect_with(&pool).await.map_err(ConnectError::Unreachable)?;
            live.eager_reconnect(false);
            live.ignore_pool_close_event(true);
            live.listen_all(self.channels.iter().copied()).await.map_err(ConnectError::Unreachable)?;
            Ok(live)
        };
        let timed_out = |_| ConnectError::Unreachable(super::timed_out());
        tokio::time::timeout(OPEN_TIMEOUT, open).await.map_err(timed_out)?
    }
}

fn heard(notification: sqlx::postgres::PgNotification) -> Heard {
    Heard::Notification {
        channel: notification.channel().to_owned(),
        pid: notification.process_id(),
        payload: notification.payload().to_owned(),
    }
}

/// Coalesced hints that arrive on the node's LISTEN connection, for whoever waits for them. A hint that comes while
/// nobody waits is kept (one of each kind).
#[derive(Debug, Default)]
pub struct Wakeups {
    /// A writer found the relay parked.
    pub outbox: tokio::sync::Notify,
    /// A leader resigned.
    pub leadership: tokio::sync::Notify,
    // Counts what may be changes of tracked tables; several wait for them.
    schema: tokio::sync::watch::Sender<u64>,
    listening: std::sync::atomic::AtomicBool,
}

impl Wakeups {
    /// Whether hints can arrive at all: while not, nobody may rely on being woken.
    #[must_use]
    pub fn listening(&self) -> bool {
        self.listening.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Says whether LISTEN is in force. When it comes back, everything may have been missed: all are woken.
    pub fn set_listening(&self, listening: bool) {
        self.listening.store(listening, std::sync::atomic::Ordering::Release);
        if listening {
            self.outbox.notify_one();
            self.leadership.notify_one();
            self.schema_changed();
        }
    }

    /// The set of tracked tables, or one of them, may have changed.
    pub fn schema_changed(&self) {
        self.schema.send_modify(|count| *count += 1);
    }

    /// Tells of every [`Wakeups::schema_changed`] from now on.
    #[must_use]
    pub fn watch_schema(&self) -> tokio::sync::watch::Receiver<u64> {
        self.schema.subscribe()
    }
}
