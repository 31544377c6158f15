//! The operating-system account under which a private Postgres runs.
//!
//! Postgres refuses to run as root. When we are root, it gets the account `postgres` if there is one, else `nobody`;
//! otherwise our own. Whoever changes the account of a child also drops root's supplementary groups: the standard
//! library does so whenever a uid is set by a process of root.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{Gid, Uid, User};

/// Tried in this order when we are root.
const UNPRIVILEGED: [&str; 2] = ["postgres", "nobody"];

/// Who runs the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Account {
    uid: Uid,
    gid: Gid,
    /// We are root, so children and their files must be handed over.
    switch: bool,
}

impl Account {
    /// The account for a server started by this process.
    ///
    /// # Errors
    /// When we are root and neither `postgres` nor `nobody` exists.
    pub(super) fn for_server() -> io::Result<Self> {
        let own = Self::own();
        if !own.uid.is_root() {
            return Ok(own);
        }
        for name in UNPRIVILEGED {
            if let Some(user) = User::from_name(name)?.filter(|user| !user.uid.is_root()) {
                return Ok(Self { uid: user.uid, gid: user.gid, switch: true });
            }
        }
        Err(io::Error::other(
            "Postgres does not run as root, and there is no account `postgres` or `nobody`: run as another user",
        ))
    }

    /// The one that we run under.
    pub(super) fn own() -> Self {
        Self { uid: Uid::effective(), gid: Gid::effective(), switch: false }
    }

    /// True when the server runs under another account than ours.
    pub(super) fn switches(self) -> bool {
        self.switch
    }

    /// Makes `command` run under this account, in a folder it may enter, without Postgres settings of our environment.
    pub(super) fn apply(self, command: &mut Command, folder: &Path) {
        command.current_dir(folder);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        if self.switch {
            command.uid(self.uid.as_raw()).gid(self.gid.as_raw());
        }
    }

    /// Gives a file or folder to this account.
    pub(super) fn give(self, path: &Path) -> io::Result<()> {
        if self.switch {
            std::os::unix::fs::chown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))?;
        }
        Ok(())
    }

    /// The first folder on the way to `path` that this account may not enter.
    ///
    /// # Errors
    /// When a folder on the way cannot be read.
    pub(super) fn blocked_at(self, path: &Path) -> io::Result<Option<PathBuf>> {
        let path = path.canonicalize()?;
        let mut way: Vec<&Path> = path.ancestors().collect();
        way.reverse();
        for folder in way {
            let meta = fs::metadata(folder)?;
            if !may_enter(meta.mode(), meta.uid(), meta.gid(), self.uid.as_raw(), self.gid.as_raw()) {
                return Ok(Some(folder.to_path_buf()));
            }
        }
        Ok(None)
    }
}

/// Makes `path` and what is missing on the way to it, with mode 0755 whatever the umask; what exists stays as it is.
///
/// # Errors
/// When a folder cannot be made.
pub(super) fn make_open_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_open_folder(parent)?;
    }
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

/// POSIX search permission; the first class that applies decides alone.
fn may_enter(mode: u32, owner: u32, group: u32, uid: u32, gid: u32) -> bool {
    let shift = if owner == uid {
        6
    } else if group == gid {
        3
    } else {
        0
    };
    mode >> shift & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_class_that_applies_decides_whether_a_folder_may_be_entered() {
        assert!(may_enter(0o700, 5, 5, 5, 9));
        assert!(!may_enter(0o077, 5, 5, 5, 5));
        assert!(may_enter(0o710, 1, 7, 5, 7));
        assert!(!may_enter(0o701, 1, 7, 5, 7));
        assert!(may_enter(0o711, 1, 1, 5, 7));
        assert!(!may_enter(0o700, 0, 0, 5, 7));
    }

    #[test]
    fn the_server_never_runs_as_root() {
        assert!(!Account::for_server().unwrap().uid.is_root());
    }
}
