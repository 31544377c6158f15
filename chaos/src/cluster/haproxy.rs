//! The balancer under test: HAProxy with the configuration that the documentation recommends.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout};

use super::postgres::{free_port, loopback};
use super::process::Process;

/// For an answer on the runtime socket.
const ANSWER: Duration = Duration::from_secs(3);
/// From its start to its first connection.
const START: Duration = Duration::from_secs(10);
/// From a signal to its end.
const STOP: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);
/// Its backend in the configuration.
const BACKEND: &str = "tidewire";

/// The process and its runtime socket.
#[derive(Debug)]
pub struct HaProxy {
    process: Process,
    config: PathBuf,
    socket: PathBuf,
    port: u16,
    stats: u16,
    nodes: Vec<String>,
}

impl HaProxy {
    pub(super) fn new(process: Process, config: PathBuf, socket: PathBuf, nodes: Vec<String>) -> anyhow::Result<Self> {
        Ok(Self { process, config, socket, port: free_port()?, stats: free_port()?, nodes })
    }

    pub(super) const fn port(&self) -> u16 {
        self.port
    }

    /// Where clients connect, with no link in between.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", loopback(self.port))
    }

    /// Of the process.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.process.pid()
    }

    pub(super) async fn start(&self) -> anyhow::Result<()> {
        let mut command = Command::new("haproxy");
        // `-db`: it stays our child. A worker of its own would outlive it.
        command.arg("-db").arg("-f").arg(&self.config);
        command.env("TIDEWIRE_BIND", format!("127.0.0.1:{}", self.port));
        command.env("HAPROXY_STATS_BIND", format!("127.0.0.1:{}", self.stats));
        command.env("HAPROXY_ADMIN_SOCKET", &self.socket);
        for (n, address) in self.nodes.iter().enumerate() {
            command.env(format!("TIDEWIRE_NODE{}", n + 1), address);
        }
        self.process.spawn(command).context("HAProxy (package haproxy)")?;
        let until = Instant::now() + START;
        while TcpStream::connect(loopback(self.port)).await.is_err() {
            ensure!(
                self.process.running() && Instant::now() < until,
                "HAProxy does not come up{}",
                self.process.last_words()
            );
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Kills it and starts it again: all its connections are gone.
    ///
    /// # Errors
    /// It does not come up again.
    pub async fn restart(&self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGKILL);
        self.process.wait_exit(STOP).await?;
        self.start().await
    }

    /// Sends a command to the runtime socket and returns the answer.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn command(&self, command: &str) -> anyhow::Result<String> {
        let ask = async {
            let mut socket = UnixStream::connect(&self.socket).await?;
            socket.write_all(format!("{command}\n").as_bytes()).await?;
            let mut answer = String::new();
            socket.read_to_string(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        timeout(ANSWER, ask).await.context("HAProxy does not answer")?.context("HAProxy's runtime socket")
    }

    /// The nodes as it sees them: name and state (`UP`, `DOWN`, `NOLB`…).
    ///
    /// # Errors
    /// It does not answer.
    pub async fn servers(&self) -> anyhow::Result<Vec<(String, String)>> {
        let answer = self.command("show stat").await?;
        let mut lines = answer.lines();
        let header: Vec<&str> = lines.next().unwrap_or_default().trim_start_matches("# ").split(',').collect();
        let column = |name: &str| header.iter().position(|column| *column == name).context("HAProxy's statistics");
        let (proxy, server, status) = (column("pxname")?, column("svname")?, column("status")?);
        let rows = lines.map(|line| line.split(',').collect::<Vec<_>>());
        Ok(rows
            .filter(|row| row.len() > status && row[proxy] == BACKEND && row[server] != "BACKEND")
            .map(|row| (row[server].to_owned(), row[status].to_owned()))
            .collect())
    }

    /// Ends all connections to a node, at once.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn shut_sessions(&self, node: &str) -> anyhow::Result<()> {
        let answer = self.command(&format!("shutdown sessions server {BACKEND}/{node}")).await?;
        ensure!(answer.trim().is_empty(), "HAProxy does not shut the sessions of {node}: {}", answer.trim());
        Ok(())
    }

    /// Ends it.
    ///
    /// # Errors
    /// It does not end.
    pub async fn stop(&self) -> anyhow::Result<()> {
        if self.process.signal(Signal::SIGKILL) {
            self.process.wait_exit(STOP).await?;
        }
        Ok(())
    }
}
