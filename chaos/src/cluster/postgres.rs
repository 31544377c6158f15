//! Two Postgres servers in two slots: one is the primary, the other its streaming standby, and they can change places.
//!
//! The port of a slot never changes. Replication goes through a link of its own, whichever way it runs.

mod disks;
mod server;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

pub use self::server::{Server, Stop};
use super::link::{Cut, Direction, Link};
use super::process::{Account, Process, Table, output};

/// From `pg_promote` to a primary.
const PROMOTE: Duration = Duration::from_secs(30);
/// From the start of a standby to streaming.
const STREAM: Duration = Duration::from_secs(30);
/// For one connection.
const CONNECT: Duration = Duration::from_secs(3);
/// Postgres ends a statement of the harness after this; longer than any step that is done in one.
const STATEMENT: &str = "60s";
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// The database of the workload and of Tidewire.
const DATABASE: &str = "app";
/// Ports of servers.
const PORTS: std::ops::RangeInclusive<u16> = 15_000..=30_000;
/// Each process of the campaign begins somewhere else, and goes round in so many.
const PORTS_A_PROCESS: u16 = 2_000;
/// Its owner: the role of the nodes and of the writers.
pub(super) const OWNER: &str = "app";

/// `fsync` stays on: a kill must be a kill.
const SETTINGS: &str = "
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 200
shared_buffers = 128MB
wal_level = replica
max_wal_senders = 8
wal_keep_size = 512MB
max_wal_size = 512MB
hot_standby = on
wal_sender_timeout = 3s
wal_receiver_timeout = 3s
wal_retrieve_retry_interval = 200ms
checkpoint_timeout = 5min
log_checkpoints = off
restart_after_crash = on
jit = off
";

/// A superuser's connection, without the log noise of failed ones.
pub(super) async fn connect(url: &str) -> anyhow::Result<PgConnection> {
    let options: sqlx::postgres::PgConnectOptions = url.parse()?;
    let options =
        options.application_name("chaos").options([("statement_timeout", STATEMENT)]).disable_statement_logging();
    timeout(CONNECT, PgConnection::connect_with(&options))
        .await
        .with_context(|| format!("Postgres does not answer within {CONNECT:?}"))?
        .context("Postgres cannot be reached")
}

/// The pair.
#[derive(Debug)]
pub struct Postgres {
    servers: [Server; 2],
    current: AtomicUsize,
    primary: watch::Sender<String>,
    replication: Link,
    account: Account,
    binaries: PathBuf,
    disks: Option<disks::Disks>,
}

impl Postgres {
    pub(super) async fn start(folder: &Path, table: &Arc<Table>, seed: u64, small_disks: bool) -> anyhow::Result<Self> {
        let account = Account::find()?;
        let binaries = find_binaries()?;
        account.folder(folder)?;
        let mut servers = Vec::new();
        for slot in 0..2 {
            let process = Process::new(
                &format!("postgres-{slot}"),
                folder.join(format!("postgres-{slot}.log")),
                Arc::clone(table),
            );
            let (data, binaries) = (folder.join(format!("data-{slot}")), binaries.clone());
            servers.push(Server { slot, port: free_port()?, data, binaries, account, process });
        }
        let servers: [Server; 2] = servers.try_into().map_err(|_| anyhow::anyhow!("two servers"))?;
        let replication = Link::start("replication", loopback(servers[0].port), seed).await?;
        let disks = if small_disks { Some(disks::Disks::mount(folder, account)?) } else { None };
        let primary = watch::Sender::new(servers[0].url());
        let pair = Self { servers, current: AtomicUsize::new(0), primary, replication, account, binaries, disks };
        pair.initialise().await?;
        pair.rebuild_standby().await?;
        Ok(pair)
    }

    async fn initialise(&self) -> anyhow::Result<()> {
        let server = &self.servers[0];
        let mut command = self.account.command(&self.binaries.join("initdb"));
        command
            .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync", "-D"])
            .arg(&server.data);
        if let Some(disks) = &self.disks {
            command.arg("--waldir").arg(disks.wal());
        }
        output(command).await?;
        let path = server.data.join("postgresql.conf");
        let text = fs::read_to_string(&path)? + SETTINGS;
        fs::write(&path, text)?;
        server.start().await?;
        let mut connection = connect(&server.maintenance_url()).await?;
        connection.execute("CREATE ROLE app LOGIN").await?;
        if let Some(disks) = &self.disks {
            let path = disks.tablespace(0).display().to_string();
            connection
                .execute(sqlx::AssertSqlSafe(format!("CREATE TABLESPACE small OWNER {OWNER} LOCATION '{path}'")))
                .await?;
        }
        connection.execute("CREATE DATABASE app OWNER app").await?;
        if self.disks.is_some() {
            // Of everything that is made from here on, Tidewire's tables and the user's alike.
            connection.execute("ALTER DATABASE app SET default_tablespace = 'small'").await?;
        }
        Ok(())
    }

    /// The slot of the primary.
    #[must_use]
    pub fn current(&self) -> usize {
        self.current.load(Ordering::Acquire)
    }

    /// The other one.
    #[must_use]
    pub fn standby_slot(&self) -> usize {
        1 - self.current()
    }

    /// As the superuser, straight to the slot's server.
    #[must_use]
    pub fn url(&self, slot: usize) -> String {
        self.servers[slot].url()
    }

    /// A slot's server.
    #[must_use]
    pub fn server(&self, slot: usize) -> &Server {
        &self.servers[slot]
    }

    /// The primary's URL; changes at a failover.
    #[must_use]
    pub fn primary(&self) -> watch::Receiver<String> {
        self.primary.subscribe()
    }

    /// Makes the standby the primary.
    ///
    /// # Errors
    /// It does not become one.
    pub async fn promote_standby(&self) -> anyhow::Result<()> {
        let slot = self.standby_slot();
        let server = &self.servers[slot];
        let mut connection = connect(&server.maintenance_url()).await?;
        let seconds = PROMOTE.as_secs();
        let promoted: bool = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT pg_promote(true, {seconds})")))
            .fetch_one(&mut connection)
            .await?;
        anyhow::ensure!(promoted, "the standby was not promoted in {PROMOTE:?}{}", server.process.last_words());
        // It must not wait for a standby that it does not have.
        connection.execute("ALTER SYSTEM RESET synchronous_standby_names").await?;
        connection.execute("SELECT pg_reload_conf()").await?;
        self.current.store(slot, Ordering::Release);
        self.primary.send_replace(server.url());
        Ok(())
    }

    /// Commits wait for the standby, or no longer do.
    ///
    /// # Errors
    /// The primary does not say so in time.
    pub async fn make_synchronous(&self, on: bool) -> anyhow::Result<()> {
        let mut connection = connect(&self.servers[self.current()].maintenance_url()).await?;
        let statement = if on {
            "ALTER SYSTEM SET synchronous_standby_names = '*'"
        } else {
            "ALTER SYSTEM RESET synchronous_standby_names"
        };
        connection.execute(statement).await?;
        connection.execute("SELECT pg_reload_conf()").await?;
        let wanted = if on { "sync" } else { "async" };
        self.wait_replication(&mut connection, wanted).await
    }

    async fn wait_replication(&self, connection: &mut PgConnection, wanted: &str) -> anyhow::Result<()> {
        let until = Instant::now() + STREAM;
        loop {
            let state: Option<String> =
                sqlx::query_scalar("SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'")
                    .fetch_optional(&mut *connection)
                    .await?;
            if state.as_deref() == Some(wanted) || (wanted == "any" && state.is_some()) {
                return Ok(());
            }
            anyhow::ensure!(
                Instant::now() < until,
                "the standby is not {wanted} within {STREAM:?}{}",
                self.servers[self.standby_slot()].process.last_words()
            );
            sleep(LOOK).await;
        }
    }

    /// Whether the standby streams now.
    ///
    /// # Errors
    /// The primary does not answer.
    pub async fn streaming(&self) -> anyhow::Result<bool> {
        let mut connection = connect(&self.servers[self.current()].maintenance_url()).await?;
        let n: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'")
            .fetch_one(&mut connection)
            .await?;
        Ok(n > 0)
    }

    /// The standby gets nothing more, until [`heal_replication`](Self::heal_replication).
    pub fn cut_replication(&self) {
        self.replication.cut(Cut::Reset, Direction::Both);
    }

    /// See [`cut_replication`](Self::cut_replication).
    pub fn heal_replication(&self) {
        self.replication.heal();
    }

    /// Starts what was the primary before the failover, as it was: read-write, on its old port. Only that it waits for a
    /// standby is over: nobody could write there.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start_old_primary(&self) -> anyhow::Result<()> {
        let old = &self.servers[self.standby_slot()];
        old.forget_synchronous()?;
        old.start().await
    }

    /// Copies the primary into the other slot and starts it as its standby.
    ///
    /// # Errors
    /// It does not stream in the end.
    pub async fn rebuild_standby(&self) -> anyhow::Result<()> {
        let (from, to) = (self.current(), self.standby_slot());
        let server = &self.servers[to];
        server.stop(Stop::Immediate).await?;
        self.heal_replication();
        self.replication.set_target(loopback(self.servers[from].port));
        if server.data.exists() {
            fs::remove_dir_all(&server.data).with_context(|| format!("cannot empty {}", server.data.display()))?;
        }
        let mut command = self.account.command(&self.binaries.join("pg_basebackup"));
        command
            .args(["-h", "127.0.0.1", "-U", "postgres", "-X", "stream", "-c", "fast", "-R", "--no-sync", "-p"])
            .arg(self.replication.address().port().to_string())
            .arg("-D")
            .arg(&server.data);
        if let Some(disks) = &self.disks {
            disks.empty(to)?;
            let (from, to) = (disks.tablespace(from), disks.tablespace(to));
            command.arg("-T").arg(format!("{}={}", from.display(), to.display()));
        }
        output(command).await.context("the standby cannot be copied")?;
        server.start().await?;
        let mut connection = connect(&self.servers[from].maintenance_url()).await?;
        self.wait_replication(&mut connection, "any").await
    }

    /// Waits until the standby has replayed what the primary had flushed at the call.
    ///
    /// # Errors
    /// It has not in time.
    pub async fn replay_caught_up(&self, within: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + within;
        let mut connection = connect(&self.servers[self.current()].maintenance_url()).await?;
        let flushed: String =
            sqlx::query_scalar("SELECT pg_current_wal_flush_lsn()::text").fetch_one(&mut connection).await?;
        loop {
            let behind: Option<bool> =
                sqlx::query_scalar("SELECT replay_lsn < $1::pg_lsn FROM pg_stat_replication WHERE state = 'streaming'")
                    .bind(&flushed)
                    .fetch_optional(&mut connection)
                    .await?
                    .flatten();
            if behind == Some(false) {
                return Ok(());
            }
            anyhow::ensure!(Instant::now() < until, "the standby has not replayed {flushed} within {within:?}");
            sleep(LOOK).await;
        }
    }

    /// The small disks, where the run has them.
    #[must_use]
    pub const fn has_small_disks(&self) -> bool {
        self.disks.is_some()
    }

    /// Fills the disk of the tables: the next page that is added finds no room.
    ///
    /// # Errors
    /// The run has no small disks, or the mount refuses.
    pub fn fill_tablespace(&self) -> anyhow::Result<()> {
        self.disks()?.shrink(&self.disks()?.tablespace(self.current()))
    }

    /// Fills the disk of the primary's WAL; only slot 0 has one of its own.
    ///
    /// # Errors
    /// See [`fill_tablespace`](Self::fill_tablespace).
    pub fn fill_wal(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.current() == 0, "only the first primary has its WAL on a disk of its own");
        self.disks()?.shrink(&self.disks()?.wal())
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// See [`fill_tablespace`](Self::fill_tablespace).
    pub fn free_disks(&self) -> anyhow::Result<()> {
        self.disks()?.grow()
    }

    fn disks(&self) -> anyhow::Result<&disks::Disks> {
        self.disks.as_ref().context("this run has no small disks")
    }

    pub(super) async fn shut_down(&self) -> anyhow::Result<()> {
        for server in &self.servers {
            server.resume();
            server.stop(Stop::Immediate).await?;
        }
        if let Some(disks) = &self.disks {
            disks.unmount();
        }
        Ok(())
    }
}

pub(super) const fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// A free port for a server that starts later, perhaps again and again. Never one of those that the system gives to
/// connections (32768 and above on Linux): one of our thousands would sit on it by then.
pub(super) fn free_port() -> std::io::Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let begin = *PORTS.start() + u16::try_from(std::process::id() % 100).unwrap_or(0) * 100;
    for _ in PORTS {
        let port = begin + NEXT.fetch_add(1, Ordering::Relaxed) % PORTS_A_PROCESS;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    Err(std::io::Error::new(std::io::ErrorKind::AddrInUse, format!("no free port in {PORTS:?}")))
}

/// The newest Postgres of this machine: beside `initdb` in the PATH, or where Debian puts it.
///
/// # Errors
/// There is none.
pub fn find_binaries() -> anyhow::Result<PathBuf> {
    let debian = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut versions: Vec<(u32, PathBuf)> = debian
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .collect();
    versions.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    versions
        .into_iter()
        .map(|(_, folder)| folder)
        .rev()
        .chain(std::env::split_paths(&path))
        .find(|folder| folder.join("initdb").exists() && folder.join("pg_basebackup").exists())
        .context("no Postgres server programs found (initdb, pg_basebackup): install the package postgresql")
}
