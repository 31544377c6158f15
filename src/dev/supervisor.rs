//! The nodes of `tidewire dev`: processes of this same program, started again when they die.
//!
//! A node's stdin is a pipe from us. When we die, however we die, the pipe ends and the node with it
//! (`--exit-on-stdin-eof`). The database's URL goes through the environment: command lines are for everyone to read.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::DatabaseUrl;
use super::port::{free_port, loopback};

/// Long enough to see that a node is gone, short enough not to wait for it.
const RESTART_PAUSE: Duration = Duration::from_secs(2);
/// A node that dies this soon after its start died of the start.
const QUICK_DEATH: Duration = Duration::from_secs(10);
/// So many quick deaths in a row: starting it again does not help.
const MAX_QUICK_DEATHS: u32 = 10;
/// From SIGTERM to SIGKILL.
const STOP_LIMIT: Duration = Duration::from_secs(8);
/// How much of a node's log a message quotes.
const LOG_TAIL_BYTES: u64 = 2_000;

/// What it takes to start a node.
#[derive(Debug, Clone)]
pub(super) struct NodeProcess {
    /// `n1`, `n2`…
    pub(super) name: String,
    /// Where it listens, the same after every restart.
    pub(super) address: SocketAddr,
    /// Where its output goes.
    pub(super) log: PathBuf,
    program: PathBuf,
    /// Contains a password: never shown.
    database_url: DatabaseUrl,
}

/// What happened to a node, for whoever watches the terminal.
#[derive(Debug)]
pub(super) enum Happening {
    /// It died and will be started again.
    Died {
        /// How.
        status: String,
        /// After this.
        restart_in: Duration,
    },
    /// It runs again.
    Restarted {
        /// Its new process id.
        pid: u32,
    },
    /// It will not be started again.
    GivenUp {
        /// Why.
        reason: String,
    },
}

impl NodeProcess {
    /// Nodes `n1` to `n{count}` on free ports, logging into `logs`.
    ///
    /// # Errors
    /// When there is no free port, or our own program cannot be found.
    pub(super) fn plan(count: u16, database_url: &DatabaseUrl, logs: &Path) -> io::Result<Vec<Self>> {
        let program = std::env::current_exe()?;
        let mut nodes: Vec<Self> = Vec::new();
        while nodes.len() < usize::from(count) {
            let address = loopback(free_port()?);
            if nodes.iter().any(|node| node.address == address) {
                continue;
            }
            let name = format!("n{}", nodes.len() + 1);
            let log = logs.join(format!("{name}.log"));
            let (program, database_url) = (program.clone(), database_url.clone());
            nodes.push(Self { name, address, log, program, database_url });
        }
        Ok(nodes)
    }

    /// Runs the node until cancelled, and stops it then. `pid` always tells the current process, 0 for none.
    pub(super) async fn run(
        &self,
        pid: &watch::Sender<u32>,
        cancel: &CancellationToken,
        tell: impl Fn(&Self, Happening),
    ) {
        let mut deaths = QuickDeaths::default();
        let mut first = true;
        loop {
            let started = Instant::now();
            let status = match self.start() {
                Ok(mut child) => {
                    // Taken out, because waiting for a child closes its stdin, and that would end it.
                    let _stdin = child.stdin.take();
                    let id = child.id().unwrap_or_default();
                    pid.send_replace(id);
                    if !first {
                        tell(self, Happening::Restarted { pid: id });
                    }
                    first = false;
                    let Some(ended) = cancel.run_until_cancelled(child.wait()).await else {
                        return stop(child).await;
                    };
                    pid.send_replace(0);
                    describe(ended)
                }
                Err(error) => format!("it cannot be started: {error}"),
            };
            if !deaths.may_restart(started.elapsed()) {
                let reason =
                    format!("{status}, {MAX_QUICK_DEATHS} times in a row; the end of its log:\n{}", self.log_tail());
                return tell(self, Happening::GivenUp { reason });
            }
            tell(self, Happening::Died { status, restart_in: RESTART_PAUSE });
            if cancel.run_until_cancelled(sleep(RESTART_PAUSE)).await.is_none() {
                return;
            }
        }
    }

    fn start(&self) -> io::Result<Child> {
        // The cluster is this command's own: what the surroundings set for another one is not for its nodes.
        let strange =
            std::env::vars_os().map(|(name, _)| name).filter(|name| name.to_string_lossy().starts_with("TIDEWIRE_"));
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.log)?;
        let both = log.try_clone()?;
        let mut command = Command::new(&self.program);
        for name in strange {
            command.env_remove(name);
        }
        command
            .args(["serve", "--node", &self.name, "--listen", &self.address.to_string(), "--exit-on-stdin-eof"])
            .env("TIDEWIRE_DATABASE_URL", self.database_url.expose())
            // Nor is a tidewire.toml that stands where the command was given.
            .current_dir(self.log.parent().unwrap_or(Path::new("/")))
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(both)
            // A group of its own: Ctrl-C in the terminal is for us, and we stop the nodes in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }

    /// The last lines of its log.
    pub(super) fn log_tail(&self) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(&self.log)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_else(|error| format!("(cannot be read: {error})"))
    }
}

/// Quick deaths in a row.
#[derive(Debug, Default)]
struct QuickDeaths(u32);

impl QuickDeaths {
    /// Counts a death after a life of `lived`, and tells whether another start is worth it.
    fn may_restart(&mut self, lived: Duration) -> bool {
        self.0 = if lived < QUICK_DEATH { self.0 + 1 } else { 0 };
        self.0 < MAX_QUICK_DEATHS
    }
}

/// SIGTERM, so that it drains, then SIGKILL.
async fn stop(mut child: Child) {
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
        // Not waited for yet, so the number cannot be another's.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if timeout(STOP_LIMIT, child.wait()).await.is_err() {
        // Fails only for a process that has just ended.
        let _ = child.kill().await;
    }
}

fn describe(ended: io::Result<ExitStatus>) -> String {
    use std::os::unix::process::ExitStatusExt;
    match ended {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("it ended with code {code}"),
            (None, Some(signal)) => {
                let name =
                    Signal::try_from(signal).map_or_else(|_| signal.to_string(), |name| name.as_str().to_owned());
                format!("it was killed by {name}")
            }
            (None, None) => "it ended".to_owned(),
        },
        Err(error) => format!("it cannot be watched: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// A node whose program is this shell script.
    fn node(folder: &Path, script: &str) -> NodeProcess {
        let program = folder.join("program");
        // Written by another process: a file that a fork of ours still holds open for writing cannot be executed.
        let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"";
        let mut shell = std::process::Command::new("/bin/sh");
        let done = shell.args(["-c", write, "sh", script]).arg(&program).status().unwrap();
        assert!(done.success());
        NodeProcess {
            name: "n1".to_owned(),
            address: loopback(1),
            log: folder.join("n1.log"),
            program,
            database_url: DatabaseUrl("postgres://secret".to_owned()),
        }
    }

    #[tokio::test]
    async fn a_node_that_dies_is_started_again_and_both_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let node = node(folder.path(), "echo started; exit 3");
        let (pid, cancel, told) = (watch::Sender::new(0), CancellationToken::new(), Mutex::new(Vec::new()));
        let tell = |_: &NodeProcess, happening| {
            if matches!(happening, Happening::Restarted { .. }) {
                cancel.cancel();
            }
            told.lock().unwrap().push(happening);
        };
        node.run(&pid, &cancel, tell).await;
        let told = told.into_inner().unwrap();
        assert!(matches!(&told[0], Happening::Died { status, .. } if status == "it ended with code 3"), "{told:?}");
        assert!(matches!(&told[1], Happening::Restarted { pid } if *pid > 0), "{told:?}");
        assert!(node.log_tail().starts_with("started"));
    }

    #[test]
    fn only_quick_deaths_in_a_row_end_the_restarts() {
        let mut deaths = QuickDeaths::default();
        let quick = Duration::from_millis(1);
        assert!((1..MAX_QUICK_DEATHS).all(|_| deaths.may_restart(quick)));
        assert!(deaths.may_restart(QUICK_DEATH));
        assert!((1..MAX_QUICK_DEATHS).all(|_| deaths.may_restart(quick)));
        assert!(!deaths.may_restart(quick));
    }

    #[tokio::test]
    async fn a_node_is_asked_to_stop_and_its_url_is_in_its_environment_only() {
        let folder = tempfile::tempdir().unwrap();
        let script = "trap 'echo asked; exit 0' TERM; echo \"$@\" \"$TIDEWIRE_DATABASE_URL\"; \
                      read -r line || echo end of stdin; echo done";
        let node = node(folder.path(), script);
        let (pid, cancel) = (watch::Sender::new(0), CancellationToken::new());
        let started = async {
            while !node.log_tail().contains("secret") {
                sleep(Duration::from_millis(10)).await;
            }
            cancel.cancel();
        };
        tokio::join!(node.run(&pid, &cancel, |_, _| {}), started);
        let log = node.log_tail();
        assert!(log.contains("serve --node n1 --listen 127.0.0.1:1 --exit-on-stdin-eof postgres://secret"), "{log}");
        assert!(log.contains("asked") && !log.contains("end of stdin"), "{log}");
        assert!(!format!("{node:?}").contains("secret"));
    }

    #[test]
    fn every_node_has_a_name_a_port_and_a_log_of_its_own() {
        let nodes = NodeProcess::plan(5, &DatabaseUrl(String::new()), Path::new("/logs")).unwrap();
        let mut ports: Vec<_> = nodes.iter().map(|node| node.address.port()).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 5);
        assert_eq!(nodes[4].name, "n5");
        assert_eq!(nodes[4].log, Path::new("/logs/n5.log"));
    }
}
