//! What a ready `tidewire dev` tells: to people, to scripts, and to `tidewire tail` in the next terminal.
//!
//! The last through a file of ours in the folder of temporary files, readable by its owner alone since it holds the
//! key; it goes when `dev` does.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use super::demo;

/// An announcement is about a kilobyte; more is not one.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// A running `tidewire dev`, as `--json` prints it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Where the data are, password included.
    pub database_url: String,
    /// Where clients connect, `http://…`.
    pub load_balancer: String,
    /// A key with every scope.
    pub api_key: String,
    /// The nodes behind the balancer.
    pub nodes: Vec<AnnouncedNode>,
}

/// One node of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedNode {
    /// Also in its command line and in `tidewire.terms`.
    pub name: String,
    /// Its process, until it is restarted.
    pub pid: u32,
    /// Its own address, `http://…`.
    pub url: String,
}

/// The `tidewire dev` that this user runs, if one does: what clients connect to when they are told nothing else.
pub fn running() -> Option<Announcement> {
    read(&file())
}

/// The announcement's file, locked as long as the run lives and removed when dropped.
#[derive(Debug)]
pub(super) struct Published {
    path: PathBuf,
    /// The kernel frees its lock when we die, and then nobody believes the file any more.
    lock: File,
}

impl Announcement {
    /// Leaves it for [`running`] to find. The last one to start is found.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn publish(&self) -> io::Result<Published> {
        self.publish_at(file())
    }

    fn publish_at(&self, path: PathBuf) -> io::Result<Published> {
        // Never written through: whoever reads sees a whole one, and a link that somebody put there is replaced.
        let unfinished = path.with_extension(format!("{}.new", std::process::id()));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        let written = file
            .lock()
            .and_then(|()| file.write_all(self.json().as_bytes()))
            .and_then(|()| fs::rename(&unfinished, &path));
        if let Err(error) = written {
            // The first error is the one to tell.
            let _ = fs::remove_file(&unfinished);
            return Err(error);
        }
        Ok(Published { path, lock: file })
    }

    /// One line.
    pub(super) fn json(&self) -> String {
        // Strings and numbers only: this cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What people read. `logs` is where the nodes write; `server` describes the database.
    pub(super) fn text(&self, server: &str, logs: &Path, with_demo: bool) -> String {
        use std::fmt::Write as _;
        let Self { database_url, load_balancer, api_key, nodes } = self;
        let websocket = load_balancer.replacen("http", "ws", 1);
        let mut text = format!("\ntidewire is ready: {} nodes on {server}\n\n", nodes.len());
        // Writing to a String cannot fail.
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "  {name:<14} {value}");
        };
        line("Balancer", &format!("{load_balancer}   {websocket}/v1/ws"));
        for node in nodes {
            line(&format!("Node {}", node.name), &format!("{}   process {}", node.url, node.pid));
        }
        line("API key", api_key);
        line("Logs", &logs.display().to_string());
        line("Database", &format!("psql '{database_url}'"));
        let table = if with_demo { demo::TABLE } else { "<table>" };
        if !with_demo {
            line("Track a table", "SELECT tidewire.track('<table>');   (in psql)");
        }
        let _ = write!(
            text,
            "\nWatch changes from another terminal:\n  tidewire tail {table} --url {load_balancer} --key {api_key}\n  \
             curl -N -H 'Authorization: Bearer {api_key}' '{load_balancer}/v1/sse?table={table}'\n"
        );
        text
    }
}

impl std::fmt::Debug for Announcement {
    // Not derived: key and password stay out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Announcement")
            .field("load_balancer", &self.load_balancer)
            .field("nodes", &self.nodes)
            .finish_non_exhaustive()
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        // Unless another `dev` has put its own in place meanwhile.
        let inode = |meta: io::Result<fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
        if inode(fs::symlink_metadata(&self.path)) == inode(self.lock.metadata()) {
            // One that cannot be removed is not believed any more, since its lock is free.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The address as clients write it.
pub(super) fn http(address: SocketAddr) -> String {
    format!("http://{address}")
}

fn file() -> PathBuf {
    std::env::temp_dir().join(format!("tidewire-dev-{}.json", Uid::effective()))
}

fn read(path: &Path) -> Option<Announcement> {
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path).ok()?;
    let meta = file.metadata().ok()?;
    // Anybody may put a file there; only one that we alone could write is believed, since the key goes to its URL.
    if meta.uid() != Uid::effective().as_raw() || meta.mode() & 0o077 != 0 || meta.len() > MAX_FILE_BYTES {
        return None;
    }
    if !matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
        return None;
    }
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn announcement() -> Announcement {
        Announcement {
            database_url: "postgres://postgres:secret@127.0.0.1:5432/postgres".to_owned(),
            load_balancer: "http://127.0.0.1:8080".to_owned(),
            api_key: "cdc_secret".to_owned(),
            nodes: vec![AnnouncedNode { name: "n1".to_owned(), pid: 7, url: "http://127.0.0.1:8081".to_owned() }],
        }
    }

    #[test]
    fn scripts_get_one_line_in_the_documented_shape() {
        assert_eq!(
            announcement().json(),
            r#"{"database_url":"postgres://postgres:secret@127.0.0.1:5432/postgres","load_balancer":"http://127.0.0.1:8080","api_key":"cdc_secret","nodes":[{"name":"n1","pid":7,"url":"http://127.0.0.1:8081"}]}"#
        );
    }

    #[test]
    fn people_get_lines_that_they_can_paste() {
        let text = announcement().text("Postgres 17", Path::new("/logs"), true);
        for line in [
            "psql 'postgres://postgres:secret@127.0.0.1:5432/postgres'",
            "tidewire tail public.orders --url http://127.0.0.1:8080 --key cdc_secret",
            "curl -N -H 'Authorization: Bearer cdc_secret' 'http://127.0.0.1:8080/v1/sse?table=public.orders'",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn what_is_published_is_found_until_it_ends_and_only_if_nobody_else_could_have_written_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dev.json");
        let published = announcement().publish_at(path.clone()).unwrap();
        assert_eq!(read(&path), Some(announcement()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(read(&path), None);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        drop(published);
        assert!(!path.exists());

        fs::write(&path, announcement().json()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read(&path), None, "its owner is dead");
    }

    #[test]
    fn debug_output_has_no_secret() {
        assert!(!format!("{:?}", announcement()).contains("secret"));
    }
}
