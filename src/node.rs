//! A node: every room built from the configuration, wired, started and stopped.
//!
//! The port is bound first and answers `/livez` and `/readyz` from then on, whatever Postgres does. The rest begins once the
//! database is reached and migrated; a database that can never serve (too old, a pooler, newer than this program) ends
//! the node with its reason.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use crate::auth::store::KeyStore;
use crate::auth::ticket::Tickets;
use crate::cluster::{Cluster, ConnectionLimiter};
use crate::config::{Config, Wake};
use crate::failpoint;
use crate::follower::Follower;
use crate::http;
use crate::hub::pages::Pages;
use crate::hub::{Hub, HubOptions};
use crate::lifecycle::Lifecycle;
use crate::postgres::listen::Wakeups;
use crate::postgres::migrate::{self, MigrationError};
use crate::postgres::registry::{NodeIdentity, NodeReport, NodeState};
use crate::postgres::{ConnectError, Database};
use crate::protocol::message::Limits;
use crate::relay::{Relay, RelayOptions, election};
use crate::schema::Registry;
use crate::session::start::LogEnd;
use crate::session::sync::Syncs;
use crate::session::{Context, Drain, SessionOptions};
use crate::telemetry::cause::told;
use crate::telemetry::metrics::Metrics;

/// Connections that wait to be accepted: a storm of clients comes within a second, and whoever finds no room tries again
/// only after one. The kernel's `net.core.somaxconn` (4096 on Linux) bounds it as well.
const BACKLOG: u32 = 4_096;
/// Pooled connections of the node's own: one for the follower, one for the heartbeat, one for what is known of keys and
/// tables. Beside those for clients, so that nothing that clients ask for keeps a node from the log.
const OWN_CONNECTIONS: u32 = 3;
/// Between two attempts to reach a database that was not there at the start.
const BOOT_RETRY: Duration = Duration::from_millis(500);
/// For the first answers of Postgres, migrations apart.
const BOOT_PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks whether Postgres has been away for too long, and whether a drain is over.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// Tasks that do not end by themselves after a hard stop are left behind after this.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// A running node.
#[derive(Debug)]
pub struct Node {
    address: SocketAddr,
    context: Arc<Context>,
    drain: watch::Sender<Option<Drain>>,
    drain_window: Duration,
    drain_deadline: Duration,
    fatal: watch::Receiver<Option<String>>,
    // The heartbeat ends last: a draining node's connections still count.
    heartbeat: tokio_util::sync::CancellationToken,
}

/// What starts once the database is there.
struct Tasks {
    follower: Follower,
    key_changes: mpsc::Receiver<Option<String>>,
    relay: Option<Relay>,
    cluster: Cluster,
    wakeups: Arc<Wakeups>,
    heartbeat: tokio_util::sync::CancellationToken,
}

/// Like `TcpListener::bind`, with room for a storm.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restarted node takes its port back from connections of its former life.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

impl Node {
    /// Binds the port and starts everything.
    ///
    /// # Errors
    /// When the port cannot be bound, with what to do.
    pub async fn start(config: &Config) -> anyhow::Result<Self> {
        let listener = listen(config.listen).with_context(|| {
            format!("cannot listen on {}: is it in use? choose another with --listen", config.listen)
        })?;
        let address = listener.local_addr()?;
        let (drain, drained) = watch::channel(None);
        let heartbeat = tokio_util::sync::CancellationToken::new();
        let (context, tasks) = build(config, address, drained, heartbeat.clone())?;
        let lifecycle = context.lifecycle.clone();
        lifecycle.spawn("http", http::serve::serve(listener, Arc::clone(&context)));
        let (fatality, fatal) = watch::channel(None);
        let (booted, settings) = (Arc::clone(&context), config.clone());
        lifecycle.spawn("boot", async move {
            if let Err(error) = boot(&booted, &settings, tasks).await {
                let _ = fatality.send(Some(told(&error)));
            }
            // Kept until the end: a closed channel would look like an end.
            booted.lifecycle.hard().cancelled().await;
        });
        let drain_window = Config::millis(config.settings.drain_window_ms);
        let drain_deadline = Config::millis(config.settings.drain_deadline_ms);
        lifecycle
            .spawn("staleness", watch_staleness(Arc::clone(&context), drain.clone(), drain_window, drain_deadline));
        Ok(Self { address, context, drain, drain_window, drain_deadline, fatal, heartbeat })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What its sessions stand on; for tests and the program's own looks.
    #[must_use]
    pub const fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Resolves when the node cannot serve, with the reason.
    pub async fn failed(&self) -> String {
        let mut fatal = self.fatal.clone();
        let reason = fatal.wait_for(Option::is_some).await.map(|reason| reason.clone());
        reason.ok().flatten().unwrap_or_else(|| "the node has ended".to_owned())
    }

    /// Drains: resigns, sends every client away in its slot, ends what is left at the deadline.
    pub async fn stop(&self) {
        let began = Instant::now();
        let (window, deadline) = (self.drain_window, self.drain_deadline);
        let connections = self.context.connections.load(Ordering::Relaxed);
        tracing::info!(connections, "draining");
        self.drain.send_replace(Some(Drain { began, window, deadline }));
        // There is nobody to tell: armed to fail, it only goes on.
        let _ = failpoint::hit("drain.began").await;
        self.context.lifecycle.stop();
        while self.context.connections.load(Ordering::Relaxed) > 0 && began.elapsed() < deadline {
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
        self.end().await;
    }

    /// Ends at once, without a word to clients; for tests of sudden death within one process.
    pub async fn abort(&self) {
        self.end().await;
    }

    async fn end(&self) {
        // The relay's goodbye first: it hands over to a successor at once.
        self.context.lifecycle.stop();
        self.heartbeat.cancel();
        let resigned = async {
            while self.context.metrics.leader.get() == 1 {
                tokio::time::sleep(WATCH_INTERVAL).await;
            }
        };
        let _ = tokio::time::timeout(END_TIMEOUT, resigned).await;
        self.context.lifecycle.abort();
        if !self.context.lifecycle.finished(END_TIMEOUT).await {
            tracing::warn!("some tasks did not end in time");
        }
        tracing::info!("stopped");
    }
}

fn build(
    config: &Config,
    address: SocketAddr,
    drain: watch::Receiver<Option<Drain>>,
    heartbeat: tokio_util::sync::CancellationToken,
) -> anyhow::Result<(Arc<Context>, Tasks)> {
    let settings = &config.settings;
    let metrics = Arc::new(Metrics::new()?);
    metrics.register_process()?;
    let pooled = settings.pooled_url.as_deref();
    let size = settings.pool_size.unwrap_or(5);
    let database = Database::new(&config.database_url, pooled, &config.node, OWN_CONNECTIONS)?.with_clients(size);
    let database = Arc::new(database);
    let options = session_options(config);
    let hub = Arc::new(Hub::new(
        HubOptions {
            ring_window: Duration::from_secs(settings.ring_window_s.unwrap_or_default()),
            ring_bytes: settings.ring_bytes.unwrap_or_default(),
            frame_bytes: options.limits.frame_bytes,
            frames_bytes: settings.frames_bytes.unwrap_or_default(),
        },
        Arc::clone(&metrics),
    ));
    let wakeups = Arc::new(Wakeups::default());
    let lifecycle = Lifecycle::new();
    let registry = Arc::new(Registry::new(Arc::clone(&database), lifecycle.clone()));
    let (follower, handle, key_changes) = Follower::new(
        Arc::clone(&database),
        Arc::clone(&hub),
        Arc::clone(&registry),
        Arc::clone(&wakeups),
        Arc::clone(&metrics),
    );
    let relay = settings.relay.unwrap_or(true).then(|| Relay {
        options: relay_options(config),
        database: Arc::clone(&database),
        wakeups: Arc::clone(&wakeups),
        known: hub.watch_known(),
        channels: registry.public_channels(),
        metrics: Arc::clone(&metrics),
    });
    let limiter = ConnectionLimiter::new();
    let identity = NodeIdentity {
        node: config.node.clone(),
        instance: Uuid::new_v4(),
        url: Some(settings.advertise_url.clone().unwrap_or_else(|| format!("http://{address}"))),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let reported: Arc<std::sync::OnceLock<std::sync::Weak<Context>>> = Arc::default();
    let source = Arc::clone(&reported);
    let cluster = Cluster::new(Arc::clone(&database), identity, Arc::clone(&limiter), move || {
        report(source.get().and_then(std::sync::Weak::upgrade).as_deref())
    });
    let context = Arc::new(Context {
        node: config.node.clone(),
        pages: Pages::new(Arc::clone(&database), options.limits.frame_bytes, lifecycle.clone(), Arc::clone(&metrics)),
        registry,
        keys: Arc::new(KeyStore::new(Arc::clone(&database))),
        tickets: Tickets::new(Arc::clone(&database)),
        limiter,
        cluster: cluster.status(),
        syncs: Syncs::new(Arc::clone(&metrics), lifecycle.clone()),
        log_end: LogEnd::new(lifecycle.clone()),
        intruders: Arc::default(),
        follower: handle,
        hub,
        database,
        metrics,
        options,
        lifecycle,
        drain,
        connections: AtomicU32::new(0),
    });
    let _ = reported.set(Arc::downgrade(&context));
    Ok((context, Tasks { follower, key_changes, relay, cluster, wakeups, heartbeat }))
}

fn session_options(config: &Config) -> SessionOptions {
    let settings = &config.settings;
    let origins = settings.allowed_origins.as_deref().unwrap_or("");
    SessionOptions {
        heartbeat: Config::millis(settings.heartbeat_ms),
        progress: Config::millis(settings.progress_ms),
        auth_timeout: Config::millis(settings.auth_timeout_ms),
        slow_after: Config::millis(settings.slow_after_ms),
        stale_after: Duration::from_secs(settings.stale_after_s.unwrap_or_default()),
        history: Duration::from_secs(settings.retention_s.unwrap_or_default()),
        limits: Limits {
            message_bytes: settings.message_bytes.unwrap_or_default(),
            subscriptions: settings.subscriptions.unwrap_or_default(),
            filter_bytes: settings.filter_bytes.unwrap_or_default(),
            messages_per_s: settings.messages_per_s.unwrap_or_default(),
            frame_bytes: settings.frame_bytes.unwrap_or_default(),
        },
        max_connections: settings.max_connections.unwrap_or_default(),
        allowed_origins: origins.split(',').map(str::trim).filter(|one| !one.is_empty()).map(str::to_owned).collect(),
    }
}

fn relay_options(config: &Config) -> RelayOptions {
    let settings = &config.settings;
    RelayOptions {
        node: config.node.clone(),
        batch: settings.relay_batch.unwrap_or(1),
        event_bytes: settings.event_bytes.unwrap_or_default(),
        lease: Config::millis(settings.lease_ms),
        park_after: match settings.wake {
            Some(Wake::Poll) => Duration::ZERO,
            _ => Config::millis(settings.park_after_ms),
        },
        retention: Duration::from_secs(settings.retention_s.unwrap_or_default()),
        trace: settings.otlp_endpoint.is_some(),
    }
}

fn report(context: Option<&Context>) -> NodeReport {
    let Some(context) = context else {
        let state = NodeState::Stopped;
        return NodeReport { epoch: None, high_water: None, connections: 0, subscriptions: 0, state };
    };
    let epoch = Some(context.hub.epochs().newest()).filter(|epoch| *epoch > 0);
    let state = match http::health::unready(context) {
        None => NodeState::Ready,
        Some("draining") => NodeState::Draining,
        Some(_) if epoch.is_none() => NodeState::Starting,
        Some(_) => NodeState::Behind,
    };
    NodeReport {
        epoch,
        high_water: epoch.map(|_| context.hub.high_water()),
        connections: context.connections.load(Ordering::Relaxed),
        subscriptions: u32::try_from(context.metrics.subscriptions.get()).unwrap_or_default(),
        state,
    }
}

/// Reaches and migrates the database, then starts what needs it. An error is final.
async fn boot(context: &Arc<Context>, config: &Config, tasks: Tasks) -> anyhow::Result<()> {
    let stop = context.lifecycle.soft().clone();
    let mut is_told = false;
    loop {
        let error = match prepare(context, config).await {
            Ok(()) => break,
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => error,
        };
        if !std::mem::replace(&mut is_told, true) {
            tracing::warn!(error = told(&error), "waiting for Postgres");
        }
        tokio::select! {
            () = tokio::time::sleep(BOOT_RETRY) => {}
            () = stop.cancelled() => return Ok(()),
        }
    }
    let lifecycle = &context.lifecycle;
    let hard = lifecycle.hard();
    lifecycle.spawn("follower", tasks.follower.run(hard.clone()));
    let watch =
        Arc::clone(&context.intruders).watch(Arc::clone(&context.database), Arc::clone(&context.metrics), hard.clone());
    lifecycle.spawn("locks", watch);
    lifecycle.spawn("schema", Arc::clone(&context.registry).run(tasks.wakeups, hard.clone()));
    lifecycle.spawn("keys", Arc::clone(&context.keys).run(hard.clone()));
    lifecycle.spawn("key changes", follow_keys(Arc::clone(&context.keys), tasks.key_changes));
    lifecycle.spawn("heartbeat", tasks.cluster.run(tasks.heartbeat));
    if let Some(relay) = tasks.relay {
        lifecycle.spawn("relay", election::run(relay, lifecycle.clone()));
    }
    Ok(())
}

async fn prepare(context: &Context, config: &Config) -> anyhow::Result<()> {
    let reached = async {
        context.database.probe().await?;
        context.database.renew().await
    };
    tokio::time::timeout(BOOT_PATIENCE, reached).await.context("Postgres does not answer")??;
    if config.settings.migrate.unwrap_or(true) {
        let outcome = migrate::migrate(&context.database.primary().await?).await?;
        if outcome.from != outcome.to {
            tracing::info!(from = outcome.from, to = outcome.to, "migrated the database");
        }
    }
    let mode = match config.settings.wake.unwrap_or_default() {
        Wake::Notify => "notify",
        Wake::Poll => "poll",
    };
    crate::postgres::settings::wake(&context.database.pool(), mode).await?;
    // Before the first subscription: what a glob shows of a table rests on what is known of it.
    context.registry.refresh().await?;
    Ok(())
}

/// Whether waiting cannot help.
fn is_final(error: &anyhow::Error) -> bool {
    if let Some(error) = error.downcast_ref::<ConnectError>() {
        return error.is_final();
    }
    match error.downcast_ref::<MigrationError>() {
        Some(error) => !error.is_transient(),
        None => false,
    }
}

async fn follow_keys(keys: Arc<KeyStore>, mut changes: mpsc::Receiver<Option<String>>) {
    while let Some(key_id) = changes.recv().await {
        // A failure is counted and logged there, and mended by the next recheck.
        let _ = keys.invalidate(key_id.as_deref().unwrap_or("")).await;
    }
}

/// A node that has not heard of Postgres for long sends its clients to others, and takes clients again once it has.
async fn watch_staleness(
    context: Arc<Context>,
    drain: watch::Sender<Option<Drain>>,
    window: Duration,
    deadline: Duration,
) {
    let hard = context.lifecycle.hard().clone();
    loop {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
            () = hard.cancelled() => return,
        }
        if context.lifecycle.soft().is_cancelled() {
            continue;
        }
        let stale =
            context.follower.silence() > context.options.stale_after && context.connections.load(Ordering::Relaxed) > 0;
        if stale && drain.borrow().is_none() {
            tracing::warn!("Postgres has been away for long: sending clients to other nodes");
            drain.send_replace(Some(Drain { began: Instant::now(), window, deadline }));
        } else if drain.borrow().is_some_and(|drain| drain.began.elapsed() > deadline)
            && context.follower.silence().is_zero()
        {
            tracing::info!("Postgres is back: taking clients again");
            drain.send_replace(None);
        }
        context.pages.sweep();
        context.metrics.ready.set(i64::from(http::health::unready(&context).is_none()));
    }
}
