//! Sessions: what one client and its node say to each other.
//!
//! [`machine`] is the protocol, sans-IO. [`start`] judges a subscription and finds where it begins. [`live`] drives one
//! machine: it reads what comes next for each subscription, asks Postgres where that must be, and says what is to be sent
//! next. [`socket`] carries that over a WebSocket; `http::sse` over an event stream.

pub mod live;
pub mod machine;
pub mod socket;
pub mod start;
pub mod sync;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use tokio::sync::watch;

use crate::auth::store::KeyStore;
use crate::auth::ticket::Tickets;
use crate::cluster::{ClusterStatus, ConnectionLimiter};
use crate::follower::FollowerHandle;
use crate::hub::Hub;
use crate::hub::pages::Pages;
use crate::lifecycle::Lifecycle;
use crate::postgres::Database;
use crate::protocol::message::Limits;
use crate::relay::intruders::Intruders;
use crate::schema::Registry;
use crate::telemetry::metrics::Metrics;

/// What every session of a node stands on. Shared, never changed.
#[derive(Debug)]
pub struct Context {
    /// The node's name.
    pub node: String,
    /// Window and routing.
    pub hub: Arc<Hub>,
    /// Pages of the log.
    pub pages: Pages,
    /// The way to Postgres.
    pub database: Arc<Database>,
    /// Tables and their columns.
    pub registry: Arc<Registry>,
    /// API keys.
    pub keys: Arc<KeyStore>,
    /// Tickets for event streams.
    pub tickets: Tickets,
    /// Connections of each key.
    pub limiter: Arc<ConnectionLimiter>,
    /// What the heartbeat learns.
    pub cluster: Arc<ClusterStatus>,
    /// Syncs of every session.
    pub syncs: sync::Syncs,
    /// The log's end and epochs, as Postgres has them, for cursors that this node has not reached.
    pub log_end: start::LogEnd,
    /// Who holds the relay's locks and is not the relay.
    pub intruders: Arc<Intruders>,
    /// The follower, to be asked for the log's end.
    pub follower: FollowerHandle,
    /// Where it counts.
    pub metrics: Arc<Metrics>,
    /// Times and limits.
    pub options: SessionOptions,
    /// Starting and stopping.
    pub lifecycle: Lifecycle,
    /// The drain, once it has begun.
    pub drain: watch::Receiver<Option<Drain>>,
    /// Live connections of every transport.
    pub connections: AtomicU32,
}

/// Times and limits of sessions.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Between two pings of the server.
    pub heartbeat: Duration,
    /// Longest silence of a caught-up subscription.
    pub progress: Duration,
    /// Wait for the first message of a connection without credentials.
    pub auth_timeout: Duration,
    /// A client that accepts nothing for this long is closed.
    pub slow_after: Duration,
    /// How long Postgres may be away before the node sends its clients elsewhere.
    pub stale_after: Duration,
    /// Age of events in memory, as `welcome` tells it at most.
    pub history: Duration,
    /// What a client must stay within.
    pub limits: Limits,
    /// Connections of one node.
    pub max_connections: u32,
    /// `Origin`s that browsers may connect from; empty: any.
    pub allowed_origins: Vec<String>,
}

/// A drain that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    /// When it began.
    pub began: std::time::Instant,
    /// Clients' slots are spread over this time.
    pub window: Duration,
    /// From the beginning: when the node is gone.
    pub deadline: Duration,
}
