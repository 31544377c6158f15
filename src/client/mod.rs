//! The Rust client: subscribe to changes, and keep hearing of them whatever happens to connections and nodes.
//!
//! It follows the client's rules of the protocol (`docs/PROTOCOL.md`): it resumes by itself on any node after the last
//! event that it handed out, checks that every frame follows on the one before, notices dead connections, leaves a
//! draining node at its slot, and ends with a clear error where trying again cannot help.
//!
//! ```no_run
//! use tidewire::client::{Client, ConnectOptions, Item, SubscribeOptions};
//!
//! # async fn example() -> Result<(), tidewire::client::ClientError> {
//! let options = ConnectOptions::new("http://127.0.0.1:7400").key("cdc_…");
//! let client = Client::connect(options).await?;
//! let paid = SubscribeOptions::tables(["public.orders"]).filter("status = 'paid'");
//! let mut orders = client.subscribe(paid).await?;
//! while let Some(item) = orders.next().await {
//!     match item? {
//!         Item::Batch(batch) => {
//!             for event in &batch.events {
//!                 println!("{} {} {:?}", event.op, event.table, event.after.text());
//!             }
//!             // The batch is handled once the next item is asked for. To go on from here in another process, keep
//!             // `batch.cursor` in the same transaction as what you made of the events.
//!         }
//!         Item::Resync(resync) => println!("start over: {}", resync.message),
//!         _ => {} // news: caught up, progress, a lost connection, a resume
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! One task owns the connection ([`Client`] and its [`Subscription`]s are handles); its protocol is a state machine
//! without IO (`machine`). Every buffer is bounded: whoever reads slowly is served slowly, and by nobody else's memory.

mod delivery;
mod dial;
mod driver;
mod error;
mod event;
mod frame;
mod inbox;
mod machine;
mod options;
mod requests;
mod subscription;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::task::TaskTracker;

pub use self::delivery::Resumed;
pub use self::error::{ClientError, Disconnect};
pub use self::event::{Event, Image, Op, Transition};
pub use self::frame::Frame;

pub use self::options::{ConnectOptions, DEFAULT_ATTEMPTS, DEFAULT_READ_BUFFER_BYTES, Start, SubscribeOptions};
pub use self::subscription::{Batch, Frames, Item, Subscription};
pub use crate::cursor::Cursor;
pub use crate::protocol::error::{ErrorCode, Retry, WireError};
pub use crate::protocol::message::{Limits, Resync, ResyncReason, Source, Welcome, Window};

use self::delivery::Delivery;
use self::dial::Credential;
use self::driver::{Command, Driver};
use self::inbox::Inbox;
use self::machine::Machine;

/// Requests of the application that may wait for the task.
const COMMAND_QUEUE: usize = 32;
/// The longest `sync`, by protocol.
const MAX_SYNC: Duration = Duration::from_secs(30);

/// A connection to the cluster that mends itself. Cheap to clone; it ends when every clone and every
/// [`Subscription`] is dropped.
#[derive(Clone, Debug)]
pub struct Client {
    commands: mpsc::Sender<Command>,
    changed: Arc<Notify>,
    shared: Arc<Shared>,
    tasks: TaskTracker,
}

/// What the task tells all handles.
#[derive(Debug, Default)]
struct Shared {
    server: Mutex<Option<Welcome>>,
    end: OnceLock<ClientError>,
    next_id: AtomicU64,
}

impl Shared {
    fn set_server(&self, welcome: Option<Welcome>) {
        *self.server.lock() = welcome;
    }

    fn end(&self, error: ClientError) {
        // Only the task ends, and it ends once.
        let _ = self.end.set(error);
    }

    fn why(&self) -> ClientError {
        self.end.get().cloned().unwrap_or(ClientError::Stopped)
    }
}

impl Client {
    /// Connects and waits for the server's welcome. A server that cannot be reached is tried a few times only, unless
    /// [`ConnectOptions::attempts`] says how often.
    ///
    /// # Errors
    /// The address or the key is unusable, the server refuses, or it cannot be reached.
    pub async fn connect(options: ConnectOptions) -> Result<Self, ClientError> {
        let endpoints = options.endpoints()?;
        let credential = Credential::bearer(options.key.as_deref())?;
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        let (ready, welcomed) = oneshot::channel();
        let (changed, shared) = (Arc::<Notify>::default(), Arc::<Shared>::default());
        let driver = Driver {
            endpoints,
            credential,
            read_buffer_bytes: options.read_buffer_bytes,
            machine: Machine::new(options.attempts, options.first_attempts),
            commands: receiver,
            changed: changed.clone(),
            shared: shared.clone(),
            ready: Some(ready),
            inboxes: BTreeMap::new(),
            syncs: BTreeMap::new(),
            pings: BTreeMap::new(),
            next_token: 0,
            welcomed: false,
            orphaned: false,
        };
        let tasks = TaskTracker::new();
        tasks.spawn(driver.run());
        tasks.close();
        let client = Self { commands, changed, shared, tasks };
        welcomed.await.unwrap_or_else(|_| Err(client.shared.why()))?;
        Ok(client)
    }

    /// Begins a subscription and waits until it stands: no change that commits after this returns can be missed.
    ///
    /// # Errors
    /// The server refuses it (the error has the code and what to do), its cursor cannot be resumed
    /// ([`ClientError::Resync`]), or the client has ended.
    pub async fn subscribe(&self, options: SubscribeOptions) -> Result<Subscription, ClientError> {
        let id = options.id.clone().unwrap_or_else(|| {
            let number = self.shared.next_id.fetch_add(1, Ordering::Relaxed) + 1;
            format!("s{number}")
        });
        let inbox = Arc::new(Inbox::new(self.changed.clone()));
        let abandon = Abandon(Some(&inbox));
        let command = Command::Subscribe { request: options.into_request(id.clone()), inbox: inbox.clone() };
        self.commands.send(command).await.map_err(|_| self.shared.why())?;
        let first = std::future::poll_fn(|context| inbox.poll_take(context)).await;
        match first {
            Some((Delivery::Started { cursor, source }, _)) => {
                abandon.disarm();
                Ok(Subscription::new(inbox.clone(), id, cursor, source))
            }
            Some((Delivery::Resync(resync), _)) => Err(ClientError::Resync(Box::new(resync))),
            Some((Delivery::End(error), _)) => Err(error),
            _ => Err(self.shared.why()),
        }
    }

    /// Waits until every event of the transaction `tx` (decimal `pg_current_xact_id()`) that matches this client's
    /// subscriptions was sent to it, and returns the position that holds them: once a subscription's
    /// [`position`](Subscription::position) is there, it has handled your own write. `timeout` is at most 30 s. Goes on
    /// over a lost connection.
    ///
    /// # Errors
    /// The transaction still runs, or is malformed or in the future; no answer in time; the client has ended.
    pub async fn sync(&self, tx: impl Into<String>, timeout: Duration) -> Result<Cursor, ClientError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Sync { tx: tx.into(), timeout: timeout.min(MAX_SYNC), reply };
        self.commands.send(command).await.map_err(|_| self.shared.why())?;
        answer.await.unwrap_or_else(|_| Err(self.shared.why()))
    }

    /// The time of a round trip to the node.
    ///
    /// # Errors
    /// There is no connection now, or it was lost before the answer.
    pub async fn ping(&self) -> Result<Duration, ClientError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Ping { reply }).await.map_err(|_| self.shared.why())?;
        answer.await.unwrap_or_else(|_| Err(self.shared.why()))
    }

    /// What the node that serves now said of itself; `None` while there is no connection.
    #[must_use]
    pub fn server(&self) -> Option<Welcome> {
        self.shared.server.lock().clone()
    }

    /// Ends the client and its subscriptions, and waits until the connection is closed.
    pub async fn close(self) {
        // A task that has ended already needs no telling.
        let _ = self.commands.send(Command::Close).await;
        self.tasks.wait().await;
    }
}

/// Unsubscribes when `subscribe` is cancelled or fails.
struct Abandon<'a>(Option<&'a Inbox>);

impl Abandon<'_> {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        if let Some(inbox) = self.0 {
            inbox.abandon();
        }
    }
}

#[cfg(test)]
mod tests;
