//! What this machine lets a campaign do, found out by trying; the rest is skipped, loudly.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cluster::packet_filter::PacketFilter;
use crate::cluster::{Listed, PROCESSES, find_binaries, started};
use crate::sandbox::Place;

/// Every class of faults, with what it is.
pub const CLASSES: [(&str, &str); 29] = [
    ("F1", "kill a follower"),
    ("F2", "kill the leader"),
    ("F3", "pause the leader"),
    ("F4", "pause a follower"),
    ("F5", "cut a node off from Postgres"),
    ("F6", "cut a node off from Postgres, one way"),
    ("F7", "cut clients off from the balancer, or the balancer from a node"),
    ("F8", "delay, loss, a narrow line"),
    ("F9", "Postgres stops at once and starts again"),
    ("F10", "failover to a synchronous standby"),
    ("F11", "failover that loses a tail"),
    ("F12", "the old primary comes back"),
    ("F13", "a backend of ours is terminated"),
    ("F14", "no connections left, locked tables, slow statements"),
    ("F15", "disk full under Postgres"),
    ("F16", "idle transactions, held snapshots, rolled-back ids, a huge transaction"),
    ("F17", "NOTIFY lost or repeated, LISTEN dead"),
    ("F18", "a consumer that reads slowly or not at all"),
    ("F19", "everybody reconnects at once"),
    ("F20", "rolling restart"),
    ("F21", "the clock jumps an hour"),
    ("F22", "Kafka killed, paused, full"),
    ("F23", "keys made and revoked, a table untracked, its triggers disabled"),
    ("F24", "hostile clients"),
    ("F25", "two to four at once"),
    ("F26", "a held notification queue, forged and replayed notifications"),
    ("F27", "a node near its limit of memory"),
    ("F28", "a noisy neighbour: dear conditions, subscriptions that nobody reads, floods of sync and pings"),
    ("FP", "fail points: a step of the server is killed, delayed or fails"),
];

/// Open files that 10,000 clients and their proxies need.
const FILES: u64 = 20_000;

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Abilities {
    /// Tool to why it cannot be used.
    missing: BTreeMap<&'static str, String>,
    /// libfaketime's library, for `LD_PRELOAD`.
    faketime: Option<PathBuf>,
}

/// Tries everything. Outside a sandbox nobody's network is filtered and nothing is mounted, root or not.
#[must_use]
pub fn probe(place: Place) -> Abilities {
    let mut abilities = Abilities { faketime: faketime(), ..Abilities::default() };
    let mut need = |tool, result: Result<(), String>| {
        if let Err(why) = result {
            abilities.missing.insert(tool, why);
        }
    };
    need("postgres", find_binaries().map(drop).map_err(|error| format!("{error:#}")));
    need("haproxy", runs("haproxy", &["-v"]).map_err(|why| format!("{why}: install the package haproxy")));
    if place == Place::Inside {
        need("nft", PacketFilter::new().map(drop).map_err(|error| format!("{error:#}: install nftables")));
        need("tmpfs", tmpfs().map_err(|error| format!("no tmpfs can be mounted ({error:#})")));
    } else {
        for tool in ["nft", "tmpfs"] {
            need(tool, Err("only in a sandbox of its own: run as root, without --no-sandbox".into()));
        }
    }
    need("prlimit", runs("prlimit", &["--version"]).map_err(|why| format!("{why}: install util-linux")));
    if abilities.faketime.is_none() {
        abilities.missing.insert("faketime", "libfaketime was not found: install the package faketime".into());
    }
    abilities
}

fn runs(program: &str, arguments: &[&str]) -> Result<(), String> {
    match Command::new(program).args(arguments).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{program} fails with {}", output.status)),
        Err(error) => Err(format!("{program} cannot be run ({error})")),
    }
}

fn tmpfs() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1m"))?;
    umount2(folder.path(), MntFlags::MNT_DETACH)?;
    Ok(())
}

fn faketime() -> Option<PathBuf> {
    let libraries = fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path().join("faketime"));
    libraries
        .chain([PathBuf::from("/usr/local/lib/faketime"), PathBuf::from("/usr/lib64/faketime")])
        .map(|folder| folder.join("libfaketime.so.1"))
        .find(|path| path.exists())
}

/// Lets this process have as many open files as the machine allows.
///
/// # Errors
/// The limit cannot be read or set.
pub fn raise_files() -> anyhow::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    if hard < FILES {
        tracing::warn!(hard, "fewer open files than 10,000 clients need");
    }
    Ok(hard)
}

impl Abilities {
    /// Whether a fault can be done.
    ///
    /// # Errors
    /// Why not, and what would help.
    pub fn allows(&self, class: &str, variant: &str) -> Result<(), String> {
        let tools: &[&str] = match class {
            "F22" => return Err("this version has no Kafka sink".into()),
            "F20" if variant.contains("mixed") => return Err("there is no second release to mix with".into()),
            "F8" if variant.contains("loss") => &["nft"],
            "F15" => &["tmpfs"],
            "F21" => &["faketime"],
            "F27" => &["prlimit"],
            _ => &[],
        };
        ["postgres", "haproxy"].iter().chain(tools).try_for_each(|tool| match self.missing.get(tool) {
            None => Ok(()),
            Some(why) => Err(why.clone()),
        })
    }

    /// The library for `LD_PRELOAD`.
    #[must_use]
    pub fn faketime(&self) -> Option<&Path> {
        self.faketime.as_deref()
    }

    /// What cannot be done, class by class.
    #[must_use]
    pub fn cannot(&self) -> Vec<(String, String)> {
        let variants = |class: &str| match class {
            "F8" => vec!["delay", "loss"],
            "F20" => vec!["rolling", "mixed versions"],
            _ => vec![""],
        };
        CLASSES
            .iter()
            .flat_map(|(class, _)| variants(class).into_iter().map(move |variant| (*class, variant)))
            .filter_map(|(class, variant)| {
                let why = self.allows(class, variant).err()?;
                Some((class.to_owned(), if variant.is_empty() { why } else { format!("{variant}: {why}") }))
            })
            .collect()
    }
}

impl fmt::Display for Abilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cannot = self.cannot();
        for (class, what) in CLASSES {
            let reasons: Vec<&str> =
                cannot.iter().filter(|(other, _)| other == class).map(|(_, why)| why.as_str()).collect();
            let whole = !reasons.is_empty() && !matches!(class, "F8" | "F20");
            let word = if whole { "SKIPPED" } else { "can" };
            write!(f, "{class:<4} {word:<8} {what}")?;
            for why in reasons {
                write!(f, "\n     SKIPPED  {why}")?;
            }
            writeln!(f)?;
        }
        writeln!(f, "SKIPPED  everything about snapshots: this version has none")
    }
}

/// A process of an earlier run that still lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover(Listed);

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.0.name, self.0.pid)
    }
}

/// Processes of an earlier run in this folder that still live. A pid that was given to another process is none.
///
/// # Errors
/// The run's list cannot be read.
pub fn leftovers(folder: &Path) -> anyhow::Result<Vec<Leftover>> {
    let path = folder.join(PROCESSES);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let listed: Vec<Listed> =
        serde_json::from_slice(&text).with_context(|| format!("{} is no list of processes", path.display()))?;
    Ok(listed.into_iter().filter(|process| started(process.pid) == Some(process.started)).map(Leftover).collect())
}

/// Kills exactly the leftovers of this folder.
///
/// # Errors
/// The run's list cannot be read, or a process may not be killed.
pub fn clean(folder: &Path) -> anyhow::Result<Vec<Leftover>> {
    let left = leftovers(folder)?;
    for process in &left {
        kill(Pid::from_raw(process.0.pid), Signal::SIGKILL).with_context(|| format!("cannot kill {process}"))?;
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_got_the_pid_of_a_dead_one_is_no_leftover() {
        let folder = tempfile::tempdir().unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let ours = Listed { pid, started: started(pid).unwrap(), name: "node1".into() };
        let other = Listed { started: ours.started + 1, ..ours.clone() };
        let list = |process: &Listed| {
            fs::write(folder.path().join(PROCESSES), serde_json::to_vec(&[process]).unwrap()).unwrap();
        };
        list(&other);
        assert_eq!(leftovers(folder.path()).unwrap(), []);
        list(&ours);
        assert_eq!(leftovers(folder.path()).unwrap(), [Leftover(ours)]);
    }

    #[test]
    fn what_a_machine_without_tools_cannot_do_says_what_to_install() {
        let missing = BTreeMap::from([("nft", "install nftables".into()), ("faketime", "install faketime".into())]);
        let abilities = Abilities { missing, faketime: None };
        assert_eq!(abilities.allows("F8", "loss 5 %"), Err("install nftables".into()));
        assert_eq!(abilities.allows("F8", "delay"), Ok(()));
        assert_eq!(abilities.allows("F21", "+1h"), Err("install faketime".into()));
        assert!(abilities.to_string().contains("F22  SKIPPED"));
    }
}
