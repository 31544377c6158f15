//! One `tidewire serve`, with a link to each Postgres and one before its own port.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::link::Link;
use super::postgres::{OWNER, loopback};
use super::process::Process;

/// For one HTTP answer.
const ANSWER: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(25);

/// Set for the next start only.
#[derive(Debug, Default)]
struct NextStart {
    env: Vec<(String, String)>,
    address_space: Option<u64>,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    pub(super) name: String,
    pub(super) index: usize,
    pub(super) port: u16,
    pub(super) binary: PathBuf,
    pub(super) env: Vec<(String, String)>,
    pub(super) process: Process,
    pub(super) database: [Link; 2],
    pub(super) front: Link,
    next: Mutex<NextStart>,
}

impl Node {
    #[expect(clippy::too_many_arguments, reason = "made in one place, each from elsewhere")]
    pub(super) fn new(
        name: String,
        index: usize,
        port: u16,
        binary: PathBuf,
        env: Vec<(String, String)>,
        process: Process,
        database: [Link; 2],
        front: Link,
    ) -> Self {
        Self { name, index, port, binary, env, process, database, front, next: Mutex::default() }
    }

    /// `node1`…
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// From 0.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }

    /// While it lives.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.process.pid()
    }

    /// Whether it lives, paused or not.
    #[must_use]
    pub fn running(&self) -> bool {
        self.process.running()
    }

    /// Where it logs.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        self.process.log_path()
    }

    /// The links to the two Postgres servers, by slot.
    #[must_use]
    pub const fn database_links(&self) -> [&Link; 2] {
        [&self.database[0], &self.database[1]]
    }

    /// The link between the balancer and it.
    #[must_use]
    pub const fn front_link(&self) -> &Link {
        &self.front
    }

    /// Its own port, past the link before it.
    #[must_use]
    pub fn direct_url(&self) -> String {
        format!("http://{}", loopback(self.port))
    }

    /// More variables for the next start, such as libfaketime's.
    pub fn set_env(&self, env: Vec<(String, String)>) {
        self.next.lock().env = env;
    }

    /// Limit of its address space for the next start, bytes.
    pub fn set_address_space(&self, bytes: Option<u64>) {
        self.next.lock().address_space = bytes;
    }

    /// Starts it; does not wait until it is ready.
    ///
    /// # Errors
    /// It runs already, or the program does not.
    pub fn start(&self) -> anyhow::Result<()> {
        let next = std::mem::take(&mut *self.next.lock());
        let mut command = match next.address_space {
            None => Command::new(&self.binary),
            Some(bytes) => {
                // prlimit executes what follows in its own process: the pid stays ours.
                let mut command = Command::new("prlimit");
                command.arg(format!("--as={bytes}")).arg(&self.binary);
                command
            }
        };
        let [a, b] = self.database_links().map(|link| link.address().port());
        command
            .arg("serve")
            .env("TIDEWIRE_NODE", &self.name)
            .env("TIDEWIRE_LISTEN", format!("127.0.0.1:{}", self.port))
            .env("TIDEWIRE_DATABASE_URL", format!("postgres://{OWNER}@127.0.0.1:{a},127.0.0.1:{b}/app"))
            .envs(self.env.iter().cloned())
            .envs(next.env);
        self.process.spawn(command).map(drop)
    }

    /// SIGKILL.
    pub fn kill(&self) -> bool {
        self.process.signal(Signal::SIGKILL)
    }

    /// SIGSTOP.
    pub fn pause(&self) -> bool {
        self.process.signal(Signal::SIGSTOP)
    }

    /// SIGCONT.
    pub fn resume(&self) -> bool {
        self.process.signal(Signal::SIGCONT)
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// It does not run, or does not end in time.
    pub async fn terminate(&self, within: Duration) -> anyhow::Result<ExitStatus> {
        ensure!(self.process.signal(Signal::SIGTERM), "{} does not run", self.name);
        self.wait_exit(within).await?.with_context(|| format!("{} ended without a status", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn wait_exit(&self, within: Duration) -> anyhow::Result<Option<ExitStatus>> {
        self.process.wait_exit(within).await
    }

    /// Waits until it takes new clients.
    ///
    /// # Errors
    /// It does not in time, or ends.
    pub async fn wait_ready(&self, within: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + within;
        while !self.ready().await {
            ensure!(
                self.running() && Instant::now() < until,
                "{} is not ready within {within:?}{}",
                self.name,
                self.process.last_words()
            );
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Whether it takes new clients, asked past the balancer.
    pub async fn ready(&self) -> bool {
        self.running() && matches!(self.request("GET", "/readyz", "").await, Ok((200, _)))
    }

    /// Its metrics, Prometheus text.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn metrics(&self) -> anyhow::Result<String> {
        let (status, text) = self.request("GET", "/metrics", "").await?;
        ensure!(status == 200, "{} answers {status} for its metrics", self.name);
        Ok(text)
    }

    /// One of them, labels and all as it is printed.
    ///
    /// # Errors
    /// It does not answer, or has no such metric.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let text = self.metrics().await?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok());
        value.with_context(|| format!("{} has no metric {name}", self.name))
    }

    /// Resident memory, bytes.
    #[must_use]
    pub fn rss_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
    }

    /// Virtual memory, bytes.
    #[must_use]
    pub fn virtual_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
    }

    /// Arms a fail point of a server built with them.
    ///
    /// # Errors
    /// There is none of that name, or the server has none at all.
    pub async fn failpoint(&self, name: &str, action: &str) -> anyhow::Result<()> {
        let (status, text) = self.request("PUT", &format!("/chaos/failpoints/{name}"), action).await?;
        ensure!(status / 100 == 2, "{} refuses the fail point {name}: {status} {text}", self.name);
        Ok(())
    }

    /// Names of its fail points.
    ///
    /// # Errors
    /// It was built without.
    pub async fn failpoints(&self) -> anyhow::Result<String> {
        let (status, text) = self.request("GET", "/chaos/failpoints", "").await?;
        ensure!(status == 200, "{} has no fail points: {status}", self.name);
        Ok(text)
    }

    async fn request(&self, method: &str, path: &str, body: &str) -> anyhow::Result<(u16, String)> {
        let ask = async {
            let mut stream = TcpStream::connect(loopback(self.port)).await?;
            let head = format!(
                "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                self.name,
                body.len()
            );
            stream.write_all(head.as_bytes()).await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            std::io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
        };
        let answer = timeout(ANSWER, ask).await.with_context(|| format!("{} does not answer", self.name))??;
        let (head, body) = answer.split_once("\r\n\r\n").context("not HTTP")?;
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("not HTTP")?;
        Ok((status, body.to_owned()))
    }
}
