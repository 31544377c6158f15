//! What is measured: a cluster that `tidewire dev` starts for the run, or one that is given.
//!
//! An own cluster is a child process; it is asked to stop when the run ends, however it ends, and removes what it made.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::Common;
use super::process::Process;
use crate::client::{Client, ConnectOptions, Frames, SubscribeOptions};

/// From nothing to three nodes, a download of Postgres included.
const START_LIMIT: Duration = Duration::from_mins(5);
/// How long an own cluster may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(40);
/// How long a node that died may take to be back.
const RETURN_LIMIT: Duration = Duration::from_secs(30);
const RETURN_POLL: Duration = Duration::from_millis(100);

/// The cluster under measurement.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) database_url: String,
    pub(super) nodes: Vec<Node>,
    key: Option<String>,
    dev: Option<Child>,
}

/// One node of it; without a name when it was given by its address.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Node {
    #[serde(default)]
    pub(super) name: String,
    pub(super) url: String,
}

/// What `tidewire dev --json` prints.
#[derive(Deserialize)]
struct Announced {
    database_url: String,
    api_key: String,
    nodes: Vec<Node>,
}

impl Cluster {
    /// The given cluster, or one of our own with `nodes` nodes.
    pub(super) async fn of(common: &Common, nodes: usize) -> anyhow::Result<Self> {
        match (&common.database_url, common.url.is_empty()) {
            (Some(database_url), false) => Ok(Self {
                database_url: database_url.clone(),
                nodes: common.url.iter().map(|url| Node { name: String::new(), url: url.clone() }).collect(),
                key: common.key.clone(),
                dev: None,
            }),
            (None, true) => Self::start(common, nodes).await,
            _ => bail!(
                "a given cluster needs both --database-url (to write) and --url (to read); without them one is started"
            ),
        }
    }

    async fn start(common: &Common, nodes: usize) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("this program's own path")?;
        let mut command = Command::new(program);
        command.args(["dev", "--json", "--unlisted", "--no-demo", "--nodes", &nodes.to_string()]);
        if let Some(folder) = &common.data_dir {
            command.arg("--data-dir").arg(folder);
        }
        // What it tells people would stand between the figures; it is shown when it fails.
        let told = tempfile::NamedTempFile::new().context("a file for what `tidewire dev` tells")?;
        let stderr = told.reopen().context("a file for what `tidewire dev` tells")?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().context("`tidewire dev`")?;
        let stdout = child.stdout.take().context("the output of `tidewire dev`")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(START_LIMIT, lines.next_line()).await;
        let line = line.context("`tidewire dev` was not ready in five minutes")??;
        let Some(line) = line else {
            let told = std::fs::read_to_string(told.path()).unwrap_or_default();
            bail!("`tidewire dev` ended: {}", told.trim());
        };
        let announced: Announced = serde_json::from_str(&line).context("the first line of `tidewire dev --json`")?;
        Ok(Self {
            database_url: announced.database_url,
            nodes: announced.nodes,
            key: Some(announced.api_key),
            dev: Some(child),
        })
    }

    /// The process of a node of an own cluster; another one after each restart.
    pub(super) fn process(&self, node: &str) -> Option<Process> {
        let dev = self.dev.as_ref()?.id()?;
        Process::find_child(dev, node)
    }

    /// Waits until every node of an own cluster runs and welcomes clients.
    pub(super) async fn whole(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + RETURN_LIMIT;
        for node in &self.nodes {
            loop {
                if Client::connect(self.connect_options(&node.url).attempts(0)).await.is_ok() {
                    break;
                }
                if Instant::now() > deadline {
                    bail!("node {} did not come back within {} s", node.name, RETURN_LIMIT.as_secs());
                }
                tokio::time::sleep(RETURN_POLL).await;
            }
        }
        Ok(())
    }

    fn connect_options(&self, url: &str) -> ConnectOptions {
        let options = ConnectOptions::new(url);
        match &self.key {
            Some(key) => options.key(key),
            None => options,
        }
    }

    /// A client of the node at `url` with one subscription to `tables`.
    pub(super) async fn listen(
        &self,
        url: &str,
        table: &str,
        read_buffer_bytes: usize,
    ) -> anyhow::Result<(Client, Frames)> {
        let client = Client::connect(self.connect_options(url).read_buffer_bytes(read_buffer_bytes)).await?;
        let frames = client.subscribe(SubscribeOptions::tables([table])).await?.into_frames();
        Ok((client, frames))
    }

    /// Stops an own cluster and waits until it has tidied up.
    pub(super) async fn stop(mut self) {
        self.ask_to_stop();
        if let Some(mut child) = self.dev.take()
            && tokio::time::timeout(STOP_LIMIT, child.wait()).await.is_err()
        {
            eprintln!("`tidewire dev` does not stop; its next start will tidy up after it");
            // A process that is gone already needs no killing.
            let _ = child.kill().await;
        }
    }

    fn ask_to_stop(&self) {
        if let Some(pid) = self.dev.as_ref().and_then(Child::id).and_then(|pid| i32::try_from(pid).ok()) {
            // It may have ended by itself: Ctrl-C reaches both.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.ask_to_stop();
    }
}
