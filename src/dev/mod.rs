//! `tidewire dev`: a whole cluster on one machine, from nothing, gone without a trace.
//!
//! A private Postgres (or the user's own), nodes as processes of this program behind a small balancer, a demo. It
//! knows how to start, watch and stop all this, and nothing of how a node works: it tells nodes by their `/readyz`
//! and the leader by `tidewire.terms`.
//!
//! The end goes backwards: demo, nodes, balancer, what was made in the database, the database. Whatever happens to
//! this process, its pipes to nodes and watchdog end, and so do they.

mod account;
mod announcement;
mod balancer;
mod binaries;
mod database;
mod demo;
mod port;
pub mod postgres;
mod preflight;
mod run_folder;
pub mod shell;
mod supervisor;

use std::convert::Infallible;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::auth::key::ApiKey;
use crate::postgres::Pool;

use self::announcement::Claim;
pub use self::announcement::{AnnouncedNode, Announcement, ChooseError, ClusterName, choose, running};
use self::balancer::{Balancer, Health, health_of};
use self::database::Leader;
use self::port::{free_port, loopback};
use self::postgres::{PrivateServer, Profile, ServerOptions};
use self::run_folder::RunFolder;
use self::supervisor::{Happening, NodeProcess};

/// Nodes are processes; a machine for development has room for these.
const MAX_NODES: i64 = 16;
/// Nodes' pools, benches and people.
const MAX_CONNECTIONS: u16 = 300;
/// A node is ready within a second of Postgres; machines under load are slow.
const READY_LIMIT: Duration = Duration::from_secs(60);
const READY_POLL_INTERVAL: Duration = Duration::from_millis(25);
const LEADER_POLL_INTERVAL: Duration = Duration::from_millis(500);
/// The key of a kept folder, so that clients go on with it after a restart.
const KEY_FILE: &str = "api-key";
/// For the last statements, in a database that may be gone.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(5);

/// A whole cluster on this machine, from nothing: Postgres, nodes, a load balancer, a demo. Ctrl-C removes it all
#[derive(Debug, Clone, clap::Args)]
pub struct DevOptions {
    /// Its name, for --dev of the other commands (default: dev, or dev2 and so on where that runs)
    #[arg(long, value_name = "NAME")]
    pub name: Option<ClusterName>,
    /// API key to use, of the form that this command prints (default: a new one; with --data-dir the one of the last run)
    #[arg(long, value_name = "KEY", value_parser = ApiKey::parse)]
    pub key: Option<ApiKey>,
    /// Found by no other command
    #[arg(long, hide = true)]
    pub unlisted: bool,
    /// How many nodes to start
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=MAX_NODES))]
    pub nodes: u16,
    /// No demo table and nobody who writes to it
    #[arg(long)]
    pub no_demo: bool,
    /// Keep data and logs in this folder (default: a temporary one, removed at the end)
    #[arg(long, value_name = "FOLDER", conflicts_with = "database_url")]
    pub data_dir: Option<PathBuf>,
    /// Use this database instead of a private one; it gets the schema `tidewire`
    #[arg(long, value_name = "URL")]
    pub database_url: Option<DatabaseUrl>,
    /// Folder of the Postgres programs to run (default: searched for, else fetched once)
    #[arg(long, value_name = "FOLDER", conflicts_with = "database_url")]
    pub pg_bin: Option<PathBuf>,
    /// Port of the balancer on 127.0.0.1 (default: a free one)
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Print one line of JSON when ready, and nothing else, on standard output
    #[arg(long)]
    pub json: bool,
}

/// A URL that may hold a password; Debug does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// The text, with the password. Not for logs.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl FromStr for DatabaseUrl {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl std::fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DatabaseUrl(…)")
    }
}

/// Runs the cluster until Ctrl-C, SIGTERM or SIGHUP; a second one does not wait for anything.
///
/// # Errors
/// When something cannot be started or does not become ready; nothing is left behind then either.
pub async fn run(options: DevOptions) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    raise_file_limit();
    let cancel = CancellationToken::new();
    let voice = Voice { json: options.json };
    let mut work = pin!(whole_run(options, voice, cancel.clone()));
    tokio::select! {
        done = &mut work => return done,
        () = signals.next() => {}
    }
    voice.say("\nstopping (again to stop at once)");
    cancel.cancel();
    tokio::select! {
        done = &mut work => done,
        // Dropping the work kills what it holds.
        () = signals.next() => bail!("stopped at once"),
    }
}

/// From nothing to nothing.
async fn whole_run(options: DevOptions, voice: Voice, cancel: CancellationToken) -> anyhow::Result<()> {
    let claim = match options.unlisted {
        true => None,
        false => Some(Claim::take(options.name.as_ref())?),
    };
    if let Some(port) = options.port {
        // Before anything is started or changed; it is bound for good later.
        drop(bind_balancer(Some(port), Vec::new()).await?);
    }
    let Some(base) = cancel.run_until_cancelled(Box::pin(Base::prepare(&options, voice))).await else { return Ok(()) };
    let mut base = base?;
    let done = match cancel.run_until_cancelled(base.furnish(&options)).await {
        None => Ok(()),
        Some(Err(error)) => Err(error),
        Some(Ok(())) => cluster(&base, &options, claim, voice, &cancel).await,
    };
    base.leave().await;
    done
}

/// What nodes stand on.
struct Base {
    // In this order: the pool before the server, the server before its folder.
    pool: Pool,
    server: Option<PrivateServer>,
    /// Of a run without a server.
    folder: Option<RunFolder>,
    url: DatabaseUrl,
    key: Option<ApiKey>,
    key_kept: KeyKept,
}

/// What becomes of the run's key at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KeyKept {
    /// It was made for this run: revoked.
    No,
    /// It was given, and may be given again: taken out of the database.
    Given,
    /// The database is kept with it.
    WithDatabase,
}

impl Base {
    async fn prepare(options: &DevOptions, voice: Voice) -> anyhow::Result<Self> {
        let (server, folder, url) = match &options.database_url {
            Some(url) => (None, Some(RunFolder::for_logs()?), url.clone()),
            None => {
                voice.say("starting Postgres");
                let server = PrivateServer::start(ServerOptions {
                    pg_bin: options.pg_bin.clone(),
                    folder: options.data_dir.clone(),
                    profile: Profile::Durable,
                    max_connections: MAX_CONNECTIONS,
                });
                let server = server.await?;
                let url = DatabaseUrl(server.url("postgres"));
                (Some(server), None, url)
            }
        };
        let pool = database::connect(url.expose()).await?;
        if server.is_none() {
            preflight::check(&pool, options).await.context("nothing was changed in your database")?;
        }
        database::migrate(&pool).await?;
        Ok(Self { pool, server, folder, url, key: None, key_kept: KeyKept::No })
    }

    /// Puts into the database what [`Self::leave`] takes back: the demo's table and the key.
    async fn furnish(&mut self, options: &DevOptions) -> anyhow::Result<()> {
        if !options.no_demo {
            demo::create(&self.pool).await?;
        }
        let kept = options.data_dir.is_some().then(|| self.path().join(KEY_FILE));
        let wanted = match (&options.key, &kept) {
            (Some(key), _) => Some(key.clone()),
            (None, Some(path)) => kept_key(path).with_context(|| format!("cannot read {}", path.display()))?,
            (None, None) => None,
        };
        let is_wanted = wanted.is_some();
        let key = match wanted {
            Some(key) => {
                database::adopt_key(&self.pool, &key).await?;
                key
            }
            None => database::create_key(&self.pool).await?,
        };
        if let Some(path) = &kept {
            keep_key(path, &key).with_context(|| format!("cannot write {}", path.display()))?;
        }
        self.key_kept = match (kept, is_wanted) {
            (Some(_), _) => KeyKept::WithDatabase,
            (None, true) => KeyKept::Given,
            (None, false) => KeyKept::No,
        };
        self.key = Some(key);
        Ok(())
    }

    /// The run's folder.
    fn path(&self) -> &Path {
        match (&self.server, &self.folder) {
            (Some(server), _) => server.folder(),
            (None, Some(folder)) => folder.path(),
            (None, None) => Path::new("."),
        }
    }

    /// For people.
    fn describe(&self) -> String {
        match &self.server {
            Some(server) => format!("a Postgres {} of their own", server.major_version()),
            None => "your database".to_owned(),
        }
    }

    /// Takes back what was made in the database, where that outlives us, and stops the server.
    async fn leave(mut self) {
        let clean_up = async {
            match (&self.key, self.key_kept) {
                (Some(key), KeyKept::No) => database::revoke_key(&self.pool, key).await?,
                (Some(key), KeyKept::Given) => database::remove_key(&self.pool, key).await?,
                (Some(_), KeyKept::WithDatabase) | (None, _) => {}
            }
            if self.server.is_none() {
                demo::remove(&self.pool).await?;
            }
            anyhow::Ok(())
        };
        match tokio::time::timeout(CLEAN_UP_LIMIT, clean_up).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => eprintln!("the key or the demo stays in the database: {error:#}"),
            Err(_) => eprintln!("the key or the demo stays in the database, which does not answer"),
        }
        // A connection that does not answer must not keep us.
        let _ = tokio::time::timeout(CLEAN_UP_LIMIT, self.pool.close()).await;
        if let Some(server) = &mut self.server {
            server.stop().await;
        }
    }
}

/// The key that an earlier run left in its folder.
fn kept_key(path: &Path) -> anyhow::Result<Option<ApiKey>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(ApiKey::parse(text.trim())?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Keeps the key for the next run, for nobody else to read.
fn keep_key(path: &Path, key: &ApiKey) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path)?;
    writeln!(file, "{}", key.expose())
}

/// Nodes, balancer and demo, until cancelled or until they fail to become ready.
async fn cluster(
    base: &Base,
    options: &DevOptions,
    claim: Option<Claim>,
    voice: Voice,
    cancel: &CancellationToken,
) -> anyhow::Result<()> {
    let logs = base.path().join("logs");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let nodes = NodeProcess::plan(options.nodes, &base.url, &logs).context("cannot plan the nodes")?;
    let balancer = bind_balancer(options.port, nodes.iter().map(|node| node.address).collect()).await?;
    let address = balancer.address()?;
    let pids: Vec<_> = nodes.iter().map(|_| watch::Sender::new(0)).collect();
    let stop = cancel.child_token();
    let balancer_stop = CancellationToken::new();

    let nodes_run = async {
        let each =
            nodes.iter().zip(&pids).map(|(node, pid)| node.run(pid, &stop, |node, what| voice.tell(node, &what)));
        join_all(each).await;
        balancer_stop.cancel();
    };
    let demo_run = async {
        if !options.no_demo {
            stop.run_until_cancelled(demo::write(&base.pool)).await;
        }
    };
    let watch_run = async {
        let view = ClusterView { base, nodes: &nodes, pids: &pids };
        let watched =
            stop.run_until_cancelled(view.announce_and_watch(claim, address, &logs, !options.no_demo, voice)).await;
        // Only its failure ends it earlier than the rest.
        stop.cancel();
        watched.unwrap_or(Ok(()))
    };
    voice.say(&format!("starting {} nodes, logs in {}", nodes.len(), logs.display()));
    let ((), (), (), watched) = tokio::join!(nodes_run, balancer.run(balancer_stop.clone()), demo_run, watch_run);
    watched
}

async fn bind_balancer(port: Option<u16>, nodes: Vec<SocketAddr>) -> anyhow::Result<Balancer> {
    let port = match port {
        Some(port) => port,
        None => free_port().context("no free port for the balancer")?,
    };
    Balancer::bind(loopback(port), nodes).await.with_context(|| {
        format!("cannot listen on 127.0.0.1:{port}: stop what uses that port, or choose another with --port")
    })
}

/// What there is to see of a running cluster.
struct ClusterView<'a> {
    base: &'a Base,
    nodes: &'a [NodeProcess],
    pids: &'a [watch::Sender<u32>],
}

impl ClusterView<'_> {
    /// Waits for the cluster, tells about it, and then of every new leader. Ends only with an error.
    async fn announce_and_watch(
        &self,
        claim: Option<Claim>,
        balancer: SocketAddr,
        logs: &Path,
        with_demo: bool,
        voice: Voice,
    ) -> anyhow::Result<()> {
        let mut leader = self.ready().await?;
        let name = claim.as_ref().map_or_else(|| "unlisted".to_owned(), |claim| claim.name.to_string());
        let announcement = self.announcement(name, balancer);
        // Kept to the end: its drop gives the name back.
        let mut claim = claim;
        if let Some(Err(error)) = claim.as_mut().map(|claim| claim.publish(&announcement)) {
            voice.say(&format!("`tidewire tail` will need --url and --key: {error}"));
        }
        voice.announce(&announcement.json(), &announcement.text(&self.base.describe(), logs, with_demo));
        voice.say(&self.leads(&leader));
        voice.say("Ctrl-C stops everything.");
        loop {
            sleep(LEADER_POLL_INTERVAL).await;
            // A database that is away has no leader to tell of; nodes say so themselves.
            if let Ok(Some(now)) = database::leader(&self.base.pool).await
                && now != leader
            {
                leader = now;
                voice.say(&self.leads(&leader));
            }
        }
    }

    /// Every node takes connections and one leads.
    async fn ready(&self) -> anyhow::Result<Leader> {
        let deadline = Instant::now() + READY_LIMIT;
        loop {
            let health = join_all(self.nodes.iter().map(|node| health_of(node.address))).await;
            let missing = self.nodes.iter().zip(&health).find(|(_, health)| **health != Health::Ready);
            match missing {
                None => {
                    if let Some(leader) = database::leader(&self.base.pool).await? {
                        return Ok(leader);
                    }
                    if Instant::now() > deadline {
                        bail!("the nodes are ready but none leads after {} s", READY_LIMIT.as_secs());
                    }
                }
                Some((node, _)) if Instant::now() > deadline => bail!(
                    "{} is not ready after {} s; the end of its log:\n{}",
                    node.name,
                    READY_LIMIT.as_secs(),
                    node.log_tail()
                ),
                Some(_) => {}
            }
            sleep(READY_POLL_INTERVAL).await;
        }
    }

    fn announcement(&self, name: String, balancer: SocketAddr) -> Announcement {
        let nodes = self.nodes.iter().zip(self.pids).map(|(node, pid)| AnnouncedNode {
            name: node.name.clone(),
            pid: *pid.borrow(),
            url: announcement::http(node.address),
        });
        Announcement {
            name,
            database_url: self.base.url.expose().to_owned(),
            load_balancer: announcement::http(balancer),
            api_key: self.base.key.as_ref().map(|key| key.expose().to_owned()).unwrap_or_default(),
            nodes: nodes.collect(),
        }
    }

    fn leads(&self, leader: &Leader) -> String {
        let pid =
            self.nodes.iter().zip(self.pids).find(|(node, _)| node.name == leader.node).map(|(_, pid)| *pid.borrow());
        match pid {
            Some(pid) if pid > 0 => format!(
                "{} leads (term {}). Kill it and watch the feed go on:  kill -9 {pid}",
                leader.node, leader.term
            ),
            _ => format!("{} leads (term {}).", leader.node, leader.term),
        }
    }
}

/// Where words go: to standard output, or beside it when a script reads that.
#[derive(Debug, Clone, Copy)]
struct Voice {
    json: bool,
}

impl Voice {
    fn say(self, text: &str) {
        // A terminal that is gone must not end the run by a panic; SIGHUP or whoever started us does that in order.
        let _ = if self.json { writeln!(io::stderr(), "{text}") } else { writeln!(io::stdout(), "{text}") };
    }

    /// The one thing that a script reads, or the many lines that people do.
    fn announce(self, json: &str, text: &str) {
        let _ = writeln!(io::stdout(), "{}", if self.json { json } else { text });
    }

    fn tell(self, node: &NodeProcess, what: &Happening) {
        let name = &node.name;
        self.say(&match what {
            Happening::Died { status, restart_in } => {
                format!("{name} is gone: {status}. It starts again in {} s.", restart_in.as_secs())
            }
            Happening::Restarted { pid } => format!("{name} runs again, process {pid}."),
            Happening::GivenUp { reason } => format!("{name} is not started again: {reason}"),
        });
    }
}

/// What asks us to stop.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

/// As many open files as we may have, for us and the nodes: the usual 1,024 ends at a few hundred clients.
fn raise_file_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}
