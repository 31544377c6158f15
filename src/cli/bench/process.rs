//! What Linux tells of a process: its processor time, its memory, its parent. See `proc(5)`.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// A running process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process(u32);

impl Process {
    /// The child of `parent` that has `word` in its command line.
    pub(super) fn find_child(parent: u32, word: &str) -> Option<Self> {
        let entries = fs::read_dir("/proc").ok()?;
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let mut children = pids.filter(|pid| parent_of(*pid) == Some(parent));
        children.find(|pid| command_line(*pid).iter().any(|argument| argument == word)).map(Self)
    }

    /// Processor time in user and system mode since it began.
    pub(super) fn cpu_time(self) -> anyhow::Result<Duration> {
        let fields = stat(self.0).context("the node's process has ended")?;
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
        // Behind the command's name: utime is the 12th field, stime the 13th.
        let (user, system) = (ticks(11).unwrap_or_default(), ticks(12).unwrap_or_default());
        let hertz =
            sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|hertz| u64::try_from(hertz).ok()).unwrap_or(100);
        Ok(Duration::from_micros((user + system) * 1_000_000 / hertz))
    }

    /// Resident memory, bytes.
    pub(super) fn resident_bytes(self) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0)).context("the node's process has ended")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().context("VmRSS")?;
        Ok(kilobytes * 1024)
    }

    /// `kill -9`.
    pub(super) fn kill(self) -> anyhow::Result<()> {
        kill(Pid::from_raw(i32::try_from(self.0)?), Signal::SIGKILL).context("kill -9 of the leader")
    }
}

/// The fields of `/proc/<pid>/stat` behind the command's name, which may hold anything.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

fn parent_of(pid: u32) -> Option<u32> {
    stat(pid)?.get(1)?.parse().ok()
}

fn command_line(pid: u32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_parent_memory_and_used_time() {
        let me = Process(std::process::id());
        assert!(parent_of(me.0).is_some());
        assert!(me.resident_bytes().unwrap() > 100_000);
        assert!(me.cpu_time().is_ok());
        assert!(!command_line(me.0).is_empty());
    }
}
