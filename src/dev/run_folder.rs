//! The folder of one run: data, socket, logs, and the lock that tells whether its owner still lives.
//!
//! Ownership is an advisory file lock on `owner.lock`. The kernel frees it when the owner dies, however it dies, so a
//! lock that can be taken proves that nobody owns the folder; no process id is trusted for that. A small shell
//! watches a pipe from us beside it: at our death it stops the server and removes a temporary folder at once. What
//! even that misses (the shell was killed too) is found by [`sweep`], which the next run calls.
//!
//! Must not know how a server is configured; it knows only where its process id stands.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

use super::account::{Account, make_open_folder};

/// Temporary folders start with this.
const PREFIX: &str = "tidewire-run-";
const OWNER_LOCK: &str = "owner.lock";
const PID_FILE: &str = "postmaster.pid";

/// A server without clients stops within milliseconds; after this long it is killed.
const LEFTOVER_STOP_LIMIT: Duration = Duration::from_secs(10);
const LEFTOVER_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// `$1` postmaster.pid, `$2` signal, `$3` folder to remove or nothing. A line on stdin means that all is well; the
/// end of the pipe without one, that we died. The pid is read only then, and only a process named postgres is hit.
const WATCHDOG: &str = r#"
read -r line && exit 0
pid=$(head -n 1 "$1" 2>/dev/null)
is_postgres() {
    [ -n "$pid" ] || return 1
    grep -aq postgres "/proc/$pid/cmdline" 2>/dev/null || ps -p "$pid" -o args= 2>/dev/null | grep -q postgres
}
if is_postgres; then
    kill -s "$2" "$pid"
    left=100
    while [ -e "$1" ] && [ "$left" -gt 0 ]; do sleep 0.1 || sleep 1; left=$((left - 1)); done
    if [ -e "$1" ] && is_postgres; then kill -s KILL "$pid"; fi
fi
if [ -n "$3" ]; then rm -rf -- "$3"; fi
"#;

/// A folder that this process owns until the value is dropped.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
    temporary: bool,
    watchdog: Option<Child>,
    /// Held, not read: closing it frees the lock.
    _owner: File,
}

impl RunFolder {
    /// A new folder that disappears with its owner. Also clears away what killed runs left in the same place.
    ///
    /// # Errors
    /// When no temporary folder exists that `account` may enter, or it cannot be written.
    pub(super) fn temporary(account: Account) -> io::Result<Self> {
        let parent = temporary_parent(account)?;
        sweep(&parent);
        let path = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?.keep();
        // Afterwards, since the umask would take from a mode asked for at creation.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        let owner = own_new(&path)?;
        Self::watched(path, owner, true)
    }

    /// A new temporary folder of a run without a server of its own.
    ///
    /// # Errors
    /// When no temporary folder can be written.
    pub(super) fn for_logs() -> io::Result<Self> {
        Self::temporary(Account::own())
    }

    /// The folder at `path`, made if need be and kept afterwards. A server that a killed run left in it is stopped.
    ///
    /// # Errors
    /// When another live process owns the folder, `account` may not enter it, or a Postgres of somebody else's lies in it.
    pub(super) fn kept(path: &Path, account: Account) -> io::Result<Self> {
        make_open_folder(path)?;
        let path = path.canonicalize()?;
        if let Some(blocked) = account.blocked_at(&path)? {
            return Err(io::Error::other(format!(
                "the account that runs Postgres may not enter {}: choose another folder, or `chmod a+x` that one",
                blocked.display()
            )));
        }
        // Every folder of ours keeps its lock's file. A server in any other, running or not, is somebody's.
        if data_dir_of(&path).join("PG_VERSION").exists() && !path.join(OWNER_LOCK).exists() {
            return Err(io::Error::other(format!(
                "{} holds a Postgres that tidewire did not make: choose another folder, or use that server with --database-url",
                path.display()
            )));
        }
        let owner = own(&path)?.ok_or_else(|| in_use(&path))?;
        stop_leftover(&path)?;
        Self::watched(path, owner, false)
    }

    fn watched(path: PathBuf, owner: File, temporary: bool) -> io::Result<Self> {
        let mut folder = Self { path, temporary, watchdog: None, _owner: owner };
        // SIGINT asks a server for a fast shutdown with a checkpoint; a temporary one has nothing worth that.
        let (signal, remove) = if temporary { ("QUIT", folder.path.as_path()) } else { ("INT", Path::new("")) };
        let watchdog = Command::new("/bin/sh")
            .args(["-c", WATCHDOG, "tidewire-watchdog"])
            .arg(folder.pid_file())
            .arg(signal)
            .arg(remove)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A group of its own: Ctrl-C in the terminal is for us, not for it.
            .process_group(0)
            .spawn()?;
        folder.watchdog = Some(watchdog);
        Ok(folder)
    }

    /// Where everything of this run lies.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Postgres's data directory within the folder.
    pub(super) fn data_dir(&self) -> PathBuf {
        data_dir_of(&self.path)
    }

    /// Postgres's own process file; it exists while a server runs, and after one was killed.
    pub(super) fn pid_file(&self) -> PathBuf {
        self.data_dir().join(PID_FILE)
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if let Some(mut watchdog) = self.watchdog.take() {
            if let Some(mut stdin) = watchdog.stdin.take() {
                // A watchdog that is gone already cannot be called off, nor does it need to be.
                let _ = stdin.write_all(b"done\n");
            }
            let _ = watchdog.wait();
        }
        if self.temporary {
            // What cannot be removed now is swept by the next run.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Stops the servers and removes the temporary folders of dead runs in `parent`. Never fails: a folder that resists
/// is left for another time, and said in the log.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        if let Err(error) = sweep_one(&path) {
            tracing::debug!(path = %path.display(), %error, "a folder of an earlier run stays");
        }
    }
}

fn sweep_one(path: &Path) -> io::Result<()> {
    // Not through a link, and only what we made: everybody may write in the folder of temporary files.
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_dir() || meta.uid() != Uid::effective().as_raw() || !path.join(OWNER_LOCK).exists() {
        return Ok(());
    }
    let Some(_owner) = own(path)? else { return Ok(()) };
    stop_leftover(path)?;
    tracing::info!(path = %path.display(), "removing what a killed run left behind");
    fs::remove_dir_all(path)
}

/// Takes the folder's lock; `None` when a live process has it.
fn own(path: &Path) -> io::Result<Option<File>> {
    let file = open_lock(&path.join(OWNER_LOCK))?;
    match file.try_lock() {
        Ok(()) => signed(file).map(Some),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Takes the lock of a folder that nobody else knows. The lock gets its name only once it is held, so that no sweep
/// ever sees a free one of a living run.
fn own_new(path: &Path) -> io::Result<File> {
    let unnamed = path.join("owner.lock.new");
    let file = open_lock(&unnamed)?;
    file.lock()?;
    let file = signed(file)?;
    fs::rename(unnamed, path.join(OWNER_LOCK))?;
    Ok(file)
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(path)
}

/// Writes who holds the lock, for the message that others get.
fn signed(mut file: File) -> io::Result<File> {
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

fn in_use(path: &Path) -> io::Error {
    let mut owner = String::new();
    if let Ok(mut file) = File::open(path.join(OWNER_LOCK)) {
        // The number only makes the sentence better; without it, it is still true.
        let _ = file.read_to_string(&mut owner);
    }
    let owner = owner.trim();
    let owner = if owner.is_empty() { String::new() } else { format!(" (process {owner})") };
    io::Error::new(
        io::ErrorKind::ResourceBusy,
        format!("{} is in use by another tidewire{owner}: stop it, or choose another folder", path.display()),
    )
}

/// Stops the server whose data lie in this folder, if one runs. The caller holds the folder's lock.
fn stop_leftover(folder: &Path) -> io::Result<()> {
    let data_dir = data_dir_of(folder);
    let pid_file = data_dir.join(PID_FILE);
    let text = match fs::read_to_string(&pid_file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let Some(pid) = text.lines().next().and_then(|line| line.trim().parse::<i32>().ok()).filter(|pid| *pid > 1) else {
        return fs::remove_file(&pid_file);
    };
    let pid = Pid::from_raw(pid);
    if serves(pid, &data_dir) {
        tracing::info!(pid = pid.as_raw(), "stopping a Postgres that a killed run left behind");
        stop(pid, Signal::SIGINT, &data_dir)?;
    }
    match fs::remove_file(&pid_file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Sends `signal` and, when the limit passes, SIGKILL.
fn stop(pid: Pid, signal: Signal, data_dir: &Path) -> io::Result<()> {
    for signal in [signal, Signal::SIGKILL] {
        match kill(pid, signal) {
            Ok(()) => {}
            Err(Errno::ESRCH) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let deadline = Instant::now() + LEFTOVER_STOP_LIMIT;
        while Instant::now() < deadline {
            if !serves(pid, data_dir) {
                return Ok(());
            }
            thread::sleep(LEFTOVER_POLL_INTERVAL);
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {pid} does not end")))
}

/// True when process `pid` lives and is the postmaster of `data_dir`: process ids are used again.
fn serves(pid: Pid, data_dir: &Path) -> bool {
    command_line(pid).is_some_and(|line| line.contains("postgres") && line.contains(&*data_dir.to_string_lossy()))
}

/// The command line of a live process; `None` for a dead one (or a zombie, which has none).
fn command_line(pid: Pid) -> Option<String> {
    if let Ok(bytes) = fs::read(format!("/proc/{pid}/cmdline")) {
        return (!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned());
    }
    let output = Command::new("ps").args(["-p", &pid.to_string(), "-o", "args="]).output().ok()?;
    let line = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!line.is_empty()).then_some(line)
}

fn data_dir_of(folder: &Path) -> PathBuf {
    folder.join("data")
}

/// The usual folder of temporary files, or `/tmp` where the server may not enter that.
fn temporary_parent(account: Account) -> io::Result<PathBuf> {
    let usual = std::env::temp_dir();
    for parent in [usual.as_path(), Path::new("/tmp")] {
        if matches!(account.blocked_at(parent), Ok(None)) {
            return parent.canonicalize();
        }
    }
    Err(io::Error::other(format!("the account that runs Postgres may enter neither {} nor /tmp", usual.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> Account {
        Account::for_server().unwrap()
    }

    #[test]
    fn a_kept_folder_has_one_owner_at_a_time_and_outlives_it() {
        let place = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
        let path = place.path().join("kept");
        let first = RunFolder::kept(&path, account()).unwrap();
        let refused = RunFolder::kept(&path, account()).unwrap_err();
        assert!(refused.to_string().contains("in use by another tidewire"), "{refused}");
        drop(first);
        assert!(path.exists());
        RunFolder::kept(&path, account()).unwrap();
    }

    /// Found in review: it was stopped, given our settings and the demo, and left down.
    #[test]
    fn a_server_that_is_not_ours_is_left_alone() {
        let place = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
        let data = data_dir_of(place.path());
        fs::create_dir(&data).unwrap();
        fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        let refused = RunFolder::kept(place.path(), account()).unwrap_err().to_string();
        assert!(refused.contains("that tidewire did not make"), "{refused}");
        assert!(!place.path().join(OWNER_LOCK).exists(), "nothing was left in it");
    }

    #[test]
    fn a_temporary_folder_ends_with_its_owner() {
        let folder = RunFolder::temporary(account()).unwrap();
        let path = folder.path().to_path_buf();
        assert!(path.exists());
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn a_sweep_removes_dead_folders_only() {
        let parent = tempfile::tempdir().unwrap();
        let dead = parent.path().join(format!("{PREFIX}dead"));
        let living = parent.path().join(format!("{PREFIX}living"));
        let strange = parent.path().join("something-else");
        for path in [&dead, &living, &strange] {
            fs::create_dir(path).unwrap();
            fs::write(path.join(OWNER_LOCK), "1\n").unwrap();
        }
        let _owner = own(&living).unwrap().unwrap();
        sweep(parent.path());
        assert!(!dead.exists() && living.exists() && strange.exists());
    }

    #[test]
    fn a_process_file_that_names_somebody_else_costs_nobody_his_life() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("data")).unwrap();
        let pid_file = folder.path().join("data").join(PID_FILE);
        fs::write(&pid_file, format!("{}\n", std::process::id())).unwrap();
        stop_leftover(folder.path()).unwrap();
        assert!(!pid_file.exists());
    }
}
