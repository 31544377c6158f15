//! One Postgres server: its process, its data folder and the port that stays its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use sqlx::Executor;
use tokio::time::{Instant, sleep};

use super::super::process::{Account, Process};
use super::{DATABASE, LOOK, connect};

/// From the start of a server to its first answer, a crash's recovery included.
const START: Duration = Duration::from_secs(60);
/// From the order to its exit.
const STOP: Duration = Duration::from_secs(30);

/// How a server is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// As if the power had failed, but for what was flushed: the next start recovers.
    Immediate,
    /// Sessions are ended, everything is written.
    Fast,
}

/// One server.
#[derive(Debug)]
pub struct Server {
    pub(super) slot: usize,
    pub(super) port: u16,
    pub(super) data: PathBuf,
    pub(super) binaries: PathBuf,
    pub(super) account: Account,
    pub(super) process: Process,
}

impl Server {
    /// Its port on the loopback.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Of the postmaster.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.process.pid()
    }

    /// Whether the postmaster lives.
    #[must_use]
    pub fn running(&self) -> bool {
        self.process.running()
    }

    /// Where it logs.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        self.process.log_path()
    }

    /// As the superuser, straight to it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{DATABASE}", self.port)
    }

    pub(super) fn maintenance_url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start(&self) -> anyhow::Result<()> {
        self.launch()?;
        let until = Instant::now() + START;
        while !self.accepts().await {
            if !self.running() || Instant::now() >= until {
                bail!("Postgres in slot {} does not come up{}", self.slot, self.process.last_words());
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Starts it and waits for nothing.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn launch(&self) -> anyhow::Result<()> {
        let mut command = self.account.command(&self.binaries.join("postgres"));
        command.arg("-D").arg(&self.data).arg("-p").arg(self.port.to_string());
        self.process.spawn(command).map(drop)
    }

    /// Stops it and waits for its end; nothing if it does not run.
    ///
    /// # Errors
    /// It does not end.
    pub async fn stop(&self, stop: Stop) -> anyhow::Result<()> {
        let signal = if stop == Stop::Immediate { Signal::SIGQUIT } else { Signal::SIGINT };
        if self.process.signal(signal) {
            self.process.wait_exit(STOP).await?;
        }
        Ok(())
    }

    /// Stops the postmaster as a debugger would; its backends go on.
    pub fn pause(&self) -> bool {
        self.process.signal(Signal::SIGSTOP)
    }

    /// See [`pause`](Self::pause).
    pub fn resume(&self) -> bool {
        self.process.signal(Signal::SIGCONT)
    }

    /// Whether it answers a statement.
    pub async fn accepts(&self) -> bool {
        match connect(&self.maintenance_url()).await {
            Ok(mut connection) => connection.execute("SELECT 1").await.is_ok(),
            Err(_) => false,
        }
    }

    /// While it is stopped: it waits for no standby when it comes back.
    pub(super) fn forget_synchronous(&self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.running(), "the server in slot {} runs", self.slot);
        let path = self.data.join("postgresql.auto.conf");
        let text = fs::read_to_string(&path).context("the settings of the stopped server")?;
        let kept = text.lines().filter(|line| !line.starts_with("synchronous_standby_names"));
        // Written in place: the file keeps its owner.
        fs::write(&path, kept.fold(String::new(), |text, line| text + line + "\n"))?;
        Ok(())
    }
}
