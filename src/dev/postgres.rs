//! A Postgres server of our own, for `tidewire dev` and for tests.
//!
//! It listens on 127.0.0.1 and on a socket in its folder only, runs under an unprivileged account, and ends with its
//! owner: by [`PrivateServer::stop`], on drop, by the folder's watchdog when we are killed, or by the next run.
//!
//! Must not know what is in its databases; it speaks no SQL.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::RngExt;
use rand::distr::Alphanumeric;

use super::account::{Account, make_open_folder};
use super::binaries::{Binaries, BinariesError};
use super::port::free_port;
use super::run_folder::RunFolder;

/// The server's only role at first, its superuser.
const SUPERUSER: &str = "postgres";
/// 190 bits.
const PASSWORD_CHARS: usize = 32;
const PASSWORD_FILE: &str = "password";
const LOG_FILE: &str = "postgres.log";

/// Covers crash recovery of a kept data directory.
const START_LIMIT: Duration = Duration::from_secs(60);
/// A fast shutdown writes a checkpoint.
const FAST_STOP_LIMIT: Duration = Duration::from_secs(15);
const IMMEDIATE_STOP_LIMIT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Somebody else may take the port between our look and the server's bind.
const START_ATTEMPTS: usize = 4;
/// `sun_path` has 104 bytes on macOS, 108 on Linux; `/.s.PGSQL.29999` and the final zero take 16 of them.
const MAX_SOCKET_FOLDER_BYTES: usize = 87;
/// How much of the server's log an error quotes.
const LOG_TAIL_BYTES: u64 = 2_000;

/// How careful the server is with its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// As in production: fsync on, a password on every connection.
    Durable,
    /// For tests: survives any death of its processes, not that of the machine; no password.
    Fast,
}

/// How to start a server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Folder of the programs, instead of a search.
    pub pg_bin: Option<PathBuf>,
    /// Folder that keeps data and logs, instead of a temporary one.
    pub folder: Option<PathBuf>,
    /// How careful.
    pub profile: Profile,
    /// Postgres's `max_connections`.
    pub max_connections: u16,
}

/// A running server, until dropped.
pub struct PrivateServer {
    // Dropped in this order: the process first, then the folder that its data are in.
    process: Process,
    folder: RunFolder,
    account: Account,
    binaries: Binaries,
    options: ServerOptions,
    port: u16,
    /// None under [`Profile::Fast`].
    password: Option<String>,
}

/// Why a server is not there.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No programs.
    #[error(transparent)]
    Binaries(#[from] BinariesError),
    /// The folder, its lock or its files.
    #[error("cannot prepare the folder of the private Postgres")]
    Folder(#[source] io::Error),
    /// A program did not start at all.
    #[error("cannot run {}", program.display())]
    Spawn {
        /// Its path.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `initdb` refused.
    #[error("initdb failed: {0}")]
    Initdb(String),
    /// The server ended or was not ready in time.
    #[error("the private Postgres {what}; the end of its log:\n{log}")]
    NotStarted {
        /// What happened.
        what: &'static str,
        /// The log's last lines.
        log: String,
    },
}

impl PrivateServer {
    /// Starts a server and returns when it takes connections.
    ///
    /// # Errors
    /// See [`ServerError`]. Nothing is left behind.
    pub async fn start(options: ServerOptions) -> Result<Self, ServerError> {
        let account = Account::for_server().map_err(ServerError::Folder)?;
        let binaries = Binaries::find(options.pg_bin.as_deref(), account).await?;
        let asked = options.folder.clone();
        let folder = tokio::task::spawn_blocking(move || match asked {
            Some(path) => RunFolder::kept(&path, account),
            None => RunFolder::temporary(account),
        });
        let folder = folder.await.map_err(io::Error::other).and_then(|made| made).map_err(ServerError::Folder)?;
        let password = match options.profile {
            Profile::Durable => Some(password(folder.path()).map_err(ServerError::Folder)?),
            Profile::Fast => None,
        };
        let mut server = Self { process: Process::none(), folder, account, binaries, options, port: 0, password };
        server.initialise().await?;
        server.launch_anywhere().await?;
        Ok(server)
    }

    /// A libpq URL of one of its databases; it contains the password.
    pub fn url(&self, database: &str) -> String {
        let password = self.password.as_ref().map(|password| format!(":{password}")).unwrap_or_default();
        format!("postgres://{SUPERUSER}{password}@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    /// The TCP port, the same after every restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The postmaster's process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.id()
    }

    /// The major version, for instance 17.
    pub fn major_version(&self) -> u32 {
        self.binaries.major()
    }

    /// Folder of its data, socket and log.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Fast shutdown: connections are cut, a checkpoint is written; past a limit immediate, then killed.
    pub async fn stop(&mut self) {
        self.process.end(&[(Signal::SIGINT, FAST_STOP_LIMIT), (Signal::SIGQUIT, IMMEDIATE_STOP_LIMIT)]).await;
    }

    /// Every process at once and without a checkpoint, like a crash; the next start recovers from the WAL.
    pub async fn stop_immediate(&mut self) {
        self.process.end(&[(Signal::SIGQUIT, IMMEDIATE_STOP_LIMIT)]).await;
    }

    /// Starts the stopped server again, on the same port and data. Does nothing while it runs.
    ///
    /// # Errors
    /// When it does not come up, for instance because the port was taken meanwhile.
    pub async fn start_again(&mut self) -> Result<(), ServerError> {
        if self.process.is_running() {
            return Ok(());
        }
        self.launch().await
    }

    /// Makes the data directory, unless it is there.
    async fn initialise(&self) -> Result<(), ServerError> {
        let data = self.folder.data_dir();
        if data.join("global").join("pg_control").exists() {
            return Ok(());
        }
        let mut failure = String::new();
        // C.UTF-8 comes with newer C libraries only.
        for locale in ["C.UTF-8", "C"] {
            self.fresh_data_dir(&data).map_err(ServerError::Folder)?;
            let output = self.initdb(&data, locale).await?;
            if output.status.success() {
                return Ok(());
            }
            failure = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        }
        Err(ServerError::Initdb(failure))
    }

    fn fresh_data_dir(&self, data: &Path) -> io::Result<()> {
        if data.exists() {
            // Without pg_control it is what an interrupted initdb left; anything else is not ours to remove.
            if data.join("PG_VERSION").exists() || fs::read_dir(data)?.next().is_none() {
                fs::remove_dir_all(data)?;
            }
        }
        fs::DirBuilder::new().mode(0o700).create(data)?;
        self.account.give(data)
    }

    async fn initdb(&self, data: &Path, locale: &str) -> Result<std::process::Output, ServerError> {
        let program = self.binaries.program("initdb");
        let mut command = Command::new(&program);
        self.account.apply(&mut command, self.folder.path());
        command.arg("-D").arg(data).args(["-U", SUPERUSER, "-E", "UTF8", "--no-instructions"]);
        command.arg(format!("--locale={locale}"));
        let password_file = match &self.password {
            Some(password) => {
                let file = self.lent_password(password).map_err(ServerError::Folder)?;
                command.args(["--auth=scram-sha-256", "--pwfile"]).arg(file.path());
                Some(file)
            }
            None => {
                command.arg("--auth=trust");
                None
            }
        };
        if self.options.profile == Profile::Fast {
            command.arg("--no-sync");
        }
        let mut command = tokio::process::Command::from(command);
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = command.output().await.map_err(|source| ServerError::Spawn { program, source });
        drop(password_file);
        output
    }

    /// A copy of the password that the server's account can read, for as long as the value lives.
    fn lent_password(&self, password: &str) -> io::Result<tempfile::NamedTempFile> {
        let mut file = tempfile::Builder::new().prefix("password-").tempfile_in(self.folder.path())?;
        writeln!(file, "{password}")?;
        self.account.give(file.path())?;
        Ok(file)
    }

    async fn launch_anywhere(&mut self) -> Result<(), ServerError> {
        let mut attempt = 1;
        loop {
            self.port = free_port().map_err(ServerError::Folder)?;
            match self.launch().await {
                Err(ServerError::NotStarted { log, .. })
                    if attempt < START_ATTEMPTS && log.contains("could not bind") =>
                {
                    attempt += 1;
                }
                done => return done,
            }
        }
    }

    async fn launch(&mut self) -> Result<(), ServerError> {
        let (log, log_start) = self.open_log().map_err(ServerError::Folder)?;
        self.process = self.spawn(log)?;
        let deadline = Instant::now() + START_LIMIT;
        let what = loop {
            if !self.process.is_running() {
                break "ended at once";
            }
            if self.process.id().is_some_and(|pid| self.is_ready(pid)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                break "was not ready in time";
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        };
        self.stop_immediate().await;
        Err(ServerError::NotStarted { what, log: self.log_tail(log_start) })
    }

    fn spawn(&self, log: File) -> Result<Process, ServerError> {
        let program = self.binaries.program("postgres");
        let mut command = Command::new(&program);
        self.account.apply(&mut command, self.folder.path());
        command.arg("-D").arg(self.folder.data_dir());
        for (name, value) in self.settings().map_err(ServerError::Folder)? {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let both = log.try_clone().map_err(ServerError::Folder)?;
        // A group of its own: Ctrl-C in the terminal is for us, who then stop it after the nodes.
        command.stdin(Stdio::null()).stdout(log).stderr(both).process_group(0);
        let child = command.spawn().map_err(|source| ServerError::Spawn { program, source })?;
        Ok(Process { child: Some(child) })
    }

    fn settings(&self) -> io::Result<Vec<(&'static str, String)>> {
        let mut settings = vec![
            ("listen_addresses", "127.0.0.1".to_owned()),
            ("port", self.port.to_string()),
            ("unix_socket_directories", self.socket_folder()?),
            ("max_connections", self.options.max_connections.to_string()),
            ("wal_level", "logical".to_owned()),
            ("logging_collector", "off".to_owned()),
            ("log_destination", "stderr".to_owned()),
        ];
        if self.options.profile == Profile::Fast {
            // synchronous_commit stays on: it decides what is visible when, and tests rely on that.
            settings.extend([
                ("fsync", "off".to_owned()),
                ("full_page_writes", "off".to_owned()),
                // So that tests can try writers that use two-phase commit.
                ("max_prepared_transactions", "16".to_owned()),
            ]);
        }
        Ok(settings)
    }

    /// The socket's folder, made; empty (no socket) where the path would be too long for one.
    fn socket_folder(&self) -> io::Result<String> {
        let path = self.folder.path().join("socket");
        let text = path.to_string_lossy().into_owned();
        // Spaces, commas and quotes have a meaning in this setting.
        let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
        if text.len() > MAX_SOCKET_FOLDER_BYTES || !plain {
            return Ok(String::new());
        }
        if !path.exists() {
            make_open_folder(&path)?;
            self.account.give(&path)?;
        }
        Ok(text)
    }

    /// True when the process file says so in the words that pg_ctl waits for (its eighth line; see `pidfile.h`).
    fn is_ready(&self, pid: u32) -> bool {
        let Ok(text) = fs::read_to_string(self.folder.pid_file()) else { return false };
        let mut lines = text.lines();
        let ours = lines.next().is_some_and(|line| line.trim() == pid.to_string());
        ours && lines.nth(6).is_some_and(|status| status.trim() == "ready")
    }

    fn open_log(&self) -> io::Result<(File, u64)> {
        let path = self.folder.path().join(LOG_FILE);
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let length = log.metadata()?.len();
        Ok((log, length))
    }

    fn log_tail(&self, start: u64) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(self.folder.path().join(LOG_FILE))?;
            let end = file.metadata()?.len();
            file.seek(SeekFrom::Start(start.max(end.saturating_sub(LOG_TAIL_BYTES))))?;
            let mut bytes = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_else(|error| format!("(cannot be read: {error})"))
    }
}

impl std::fmt::Debug for PrivateServer {
    // Not derived: the password stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrivateServer")
            .field("port", &self.port)
            .field("pid", &self.pid())
            .field("folder", &self.folder.path())
            .finish_non_exhaustive()
    }
}

/// The folder's password, made when there is none yet.
fn password(folder: &Path) -> io::Result<String> {
    let path = folder.join(PASSWORD_FILE);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut rng = rand::rng();
            let password: String = (0..PASSWORD_CHARS).map(|_| char::from(rng.sample(Alphanumeric))).collect();
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            writeln!(file, "{password}")?;
            Ok(password)
        }
        Err(error) => Err(error),
    }
}

/// The postmaster; killed when dropped.
#[derive(Debug)]
struct Process {
    child: Option<Child>,
}

impl Process {
    fn none() -> Self {
        Self { child: None }
    }

    fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn is_running(&mut self) -> bool {
        if self.child.as_mut().is_some_and(|child| !matches!(child.try_wait(), Ok(None))) {
            self.child = None;
        }
        self.child.is_some()
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.id().and_then(|id| i32::try_from(id).ok()) {
            // Not waited for yet, so the number cannot be another's; a process that has just ended needs no signal.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// One signal after the other, each with its limit, and SIGKILL at the end.
    async fn end(&mut self, steps: &[(Signal, Duration)]) {
        for (signal, limit) in steps {
            self.signal(*signal);
            let deadline = Instant::now() + *limit;
            while self.is_running() && Instant::now() < deadline {
                tokio::time::sleep(POLL_INTERVAL).await;
            }
            if !self.is_running() {
                return;
            }
        }
        self.kill();
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only for a process that is gone.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGQUIT);
        let deadline = Instant::now() + IMMEDIATE_STOP_LIMIT;
        while self.is_running() && Instant::now() < deadline {
            std::thread::sleep(POLL_INTERVAL);
        }
        self.kill();
    }
}
