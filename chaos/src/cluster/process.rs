//! Child processes: started, signalled and reaped by us, and written down so that a later run can name what is left.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, User};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::timeout;

/// Lines of a log that an error quotes.
const QUOTED_LINES: usize = 15;
/// Bytes from the end of a log in which they are looked for.
const QUOTED_BYTES: u64 = 8 << 10;
/// A program that ends by itself, `pg_basebackup` of the whole cluster included.
const PROGRAM: Duration = Duration::from_secs(90);
/// The file of a run's folder that lists its processes.
pub const PROCESSES: &str = "processes.json";

/// A process that a run started. A pid alone says little: it is given away again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Its pid.
    pub pid: i32,
    /// Clock ticks from the machine's boot to its start, from `/proc`.
    pub started: u64,
    /// What it is.
    pub name: String,
}

/// The processes of one run.
#[derive(Debug)]
pub(crate) struct Table {
    path: PathBuf,
    listed: Mutex<BTreeMap<i32, Listed>>,
}

impl Table {
    pub(crate) fn new(folder: &Path) -> Arc<Self> {
        Arc::new(Self { path: folder.join(PROCESSES), listed: Mutex::default() })
    }

    fn add(&self, pid: i32, name: &str) {
        let Some(started) = started(pid) else { return };
        self.listed.lock().insert(pid, Listed { pid, started, name: name.to_owned() });
        self.write();
    }

    fn remove(&self, pid: i32) {
        self.listed.lock().remove(&pid);
        self.write();
    }

    /// The list is a courtesy to a later run: a disk that is full must not end this one.
    fn write(&self) {
        let all: Vec<Listed> = self.listed.lock().values().cloned().collect();
        if let Ok(text) = serde_json::to_vec(&all) {
            let _ = fs::write(&self.path, text);
        }
    }
}

/// Field 22 of `/proc/<pid>/stat`; the command's name before it may hold spaces and brackets.
#[must_use]
pub fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// One process that may be started again and again.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    table: Arc<Table>,
    /// The pid while it lives, its exit status afterwards.
    state: watch::Sender<State>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    pid: Option<i32>,
    exit: Option<ExitStatus>,
}

impl Process {
    pub(crate) fn new(name: &str, log: PathBuf, table: Arc<Table>) -> Self {
        Self { name: name.to_owned(), log, table, state: watch::Sender::new(State::default()) }
    }

    /// Starts it; its output is added to its log.
    pub(crate) fn spawn(&self, mut command: Command) -> anyhow::Result<i32> {
        anyhow::ensure!(!self.running(), "{} runs already", self.name);
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("cannot open {}", self.log.display()))?;
        // Its own group: a Ctrl-C in the terminal is for the harness, which ends its children in order.
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let mut child = tokio::process::Command::from(command)
            .kill_on_drop(false)
            .spawn()
            .with_context(|| format!("cannot start {}", self.name))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).context("a child without a pid")?;
        self.table.add(pid, &self.name);
        self.state.send_replace(State { pid: Some(pid), exit: None });
        let (state, table) = (self.state.clone(), Arc::clone(&self.table));
        tokio::spawn(async move {
            let exit = child.wait().await.ok();
            table.remove(pid);
            state.send_replace(State { pid: None, exit });
        });
        Ok(pid)
    }

    /// While it lives.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.state.borrow().pid
    }

    /// Whether it lives.
    #[must_use]
    pub fn running(&self) -> bool {
        self.pid().is_some()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Sends a signal; whether there was somebody to get it.
    pub fn signal(&self, signal: Signal) -> bool {
        self.pid().is_some_and(|pid| kill(Pid::from_raw(pid), signal).is_ok())
    }

    /// Its exit status once it has ended.
    ///
    /// # Errors
    /// It did not end in time.
    pub async fn wait_exit(&self, within: Duration) -> anyhow::Result<Option<ExitStatus>> {
        let mut state = self.state.subscribe();
        let ended = timeout(within, state.wait_for(|state| state.pid.is_none())).await;
        match ended {
            Ok(Ok(state)) => Ok(state.exit),
            _ => anyhow::bail!("{} did not end within {within:?}{}", self.name, self.last_words()),
        }
    }

    /// The end of its log, for an error.
    #[must_use]
    pub fn last_words(&self) -> String {
        let text = tail(&self.log).unwrap_or_default();
        format!("; the end of {}:\n{text}", self.log.display())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
    }
}

fn tail(path: &Path) -> std::io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(QUOTED_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(QUOTED_LINES)..].join("\n"))
}

/// The account that Postgres runs under: it refuses root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account(Option<(Uid, Gid)>);

impl Account {
    pub(crate) fn find() -> anyhow::Result<Self> {
        if !Uid::effective().is_root() {
            return Ok(Self(None));
        }
        let user = User::from_name("postgres")?.context(
            "Postgres does not run as root and there is no account `postgres`: install the package postgresql",
        )?;
        Ok(Self(Some((user.uid, user.gid))))
    }

    pub(crate) fn command(self, program: &Path) -> Command {
        let mut command = Command::new(program);
        if let Some((uid, gid)) = self.0 {
            command.uid(uid.as_raw()).gid(gid.as_raw());
        }
        command.current_dir("/").env_remove("PGDATA").env_remove("PGHOST").env_remove("PGPORT");
        command
    }

    /// Makes a folder that belongs to the account.
    pub(crate) fn folder(self, path: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        self.own(path)
    }

    pub(crate) fn own(self, path: &Path) -> anyhow::Result<()> {
        if let Some((uid, gid)) = self.0 {
            std::os::unix::fs::chown(path, Some(uid.as_raw()), Some(gid.as_raw()))?;
        }
        Ok(())
    }
}

/// Runs a program to its end; it is killed if it takes too long.
pub(crate) async fn output(command: Command) -> anyhow::Result<String> {
    // Its name, not its path: what is said here ends up in reports.
    let shown = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let run = tokio::process::Command::from(command).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(PROGRAM, run)
        .await
        .with_context(|| format!("{shown} does not end within {PROGRAM:?}"))?
        .with_context(|| format!("cannot run {shown}"))?;
    anyhow::ensure!(
        output.status.success(),
        "{shown} failed: {}{}",
        String::from_utf8_lossy(&output.stderr).trim(),
        String::from_utf8_lossy(&output.stdout).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
