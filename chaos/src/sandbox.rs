//! A campaign lives in namespaces of its own, where the machine lets it: what it mounts, filters and starts is its own
//! and goes with it, and nothing of anybody else's is in its reach.
//!
//! Our first process runs `unshare`, which runs us again as the namespaces' process 1. That one only reaps: a Postgres
//! whose postmaster was killed leaves orphans. Its one child is the program proper.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, Uid};

/// Whoever ends our first process ends everything: it is the parent whose death `setpriv` has the kernel announce.
const UNSHARE: [&str; 11] = [
    "setpriv",
    "--pdeathsig",
    "KILL",
    "unshare",
    "--net",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--",
];
/// Tells the process which of the three it is.
const STAGE: &str = "TIDEWIRE_CHAOS_SANDBOX";

/// Where we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In namespaces of our own.
    Inside,
    /// Among everybody else's processes.
    Outside,
    /// The program ran inside, and this is what came of it.
    Done(u8),
}

/// Goes into a sandbox if `wanted` and if we may; its processes have `environment` too.
///
/// # Errors
/// The program cannot be run again.
pub fn enter(wanted: bool, environment: &[(&'static str, PathBuf)]) -> anyhow::Result<Place> {
    match std::env::var(STAGE).as_deref() {
        Ok("reaper") => reap(),
        Ok("program") => Ok(Place::Inside),
        _ if wanted && Uid::effective().is_root() => outer(environment),
        _ => Ok(Place::Outside),
    }
}

fn outer(environment: &[(&'static str, PathBuf)]) -> anyhow::Result<Place> {
    let own = std::env::current_exe()?;
    // Asked first: a container may not make namespaces, and its refusal must not look like the program's own end.
    let allowed = Command::new(UNSHARE[0]).args(&UNSHARE[1..]).arg("true").output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        eprintln!("no sandbox: namespaces cannot be made here (package util-linux, and root's rights)");
        return Ok(Place::Outside);
    }
    let status = Command::new(UNSHARE[0])
        .args(&UNSHARE[1..])
        .arg(own)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "reaper")
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .status();
    match status {
        Ok(status) => Ok(Place::Done(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))),
        Err(error) => {
            tracing::warn!(%error, "no sandbox: `unshare` (package util-linux) cannot be run");
            Ok(Place::Outside)
        }
    }
}

fn reap() -> anyhow::Result<Place> {
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    anyhow::ensure!(
        up.is_ok_and(|status| status.success()),
        "the sandbox's loopback cannot be set up: install the package iproute2, or run with --no-sandbox"
    );
    let program = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "program")
        .spawn()
        .context("the program cannot be run again")?;
    let pid = Pid::from_raw(i32::try_from(program.id())?);
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(ended, code)) if ended == pid => {
                return Ok(Place::Done(u8::try_from(code).unwrap_or(u8::MAX)));
            }
            Ok(WaitStatus::Signaled(ended, signal, _)) if ended == pid => {
                let status = std::process::ExitStatus::from_raw(signal as i32);
                tracing::error!(%status, "the program was killed");
                return Ok(Place::Done(u8::MAX));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl From<Place> for ExitCode {
    fn from(place: Place) -> Self {
        match place {
            Place::Done(code) => Self::from(code),
            Place::Inside | Place::Outside => Self::SUCCESS,
        }
    }
}
