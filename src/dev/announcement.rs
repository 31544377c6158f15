//! What a ready `tidewire dev` reports: to people, to scripts, and to `tidewire tail` in the next terminal.
//!
//! The last through a file of ours in the folder of temporary files, one for each name, readable by its owner alone since
//! it holds the key. Whoever holds the file's lock owns the name; the kernel frees the lock when the owner dies, however
//! it dies, and whoever finds such a file removes it. A name without contents belongs to a cluster that still starts.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use super::demo;
use super::shell::{program, quoted};

/// An announcement is about a kilobyte; more is not one.
const MAX_FILE_BYTES: u64 = 64 * 1024;
/// Longest name of a cluster, characters.
const MAX_NAME_CHARS: usize = 32;
/// Somebody may take a name between our look at it and our attempt to take it.
const CLAIM_ATTEMPTS: usize = 8;
/// Clusters that were given no name: `dev`, `dev2` and so on. More would exhaust the machine first.
const MAX_UNNAMED: usize = 64;

/// The name of one `tidewire dev` among those of this user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterName(String);

impl FromStr for ClusterName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        if plain && (1..=MAX_NAME_CHARS).contains(&text.len()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("a name has 1 to {MAX_NAME_CHARS} letters, digits, `-` and `_`"))
        }
    }
}

impl std::fmt::Display for ClusterName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A running `tidewire dev`, as `--json` prints it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Its name among this user's.
    pub name: String,
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

/// Which of several clusters is meant.
#[derive(Debug, thiserror::Error)]
pub enum ChooseError {
    /// None of that name.
    #[error("no `tidewire dev` named {name} runs{}", others(.running))]
    Unknown {
        /// The name asked for.
        name: ClusterName,
        /// Those that run.
        running: Vec<String>,
    },
    /// Several, and none was named.
    #[error("several `tidewire dev` run: choose one with --dev{}", listed(.0))]
    Ambiguous(Vec<(String, String)>),
}

fn others(running: &[String]) -> String {
    if running.is_empty() { String::new() } else { format!("; these run: {}", running.join(", ")) }
}

fn listed(running: &[(String, String)]) -> String {
    running.iter().map(|(name, url)| format!("\n  --dev {name}   {url}")).collect()
}

/// The ready `tidewire dev` clusters of this user, by name.
#[must_use]
pub fn running() -> Vec<Announcement> {
    running_in(&std::env::temp_dir())
}

fn running_in(folder: &Path) -> Vec<Announcement> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix(&prefix())
            .and_then(|rest| rest.strip_suffix(SUFFIX))
            .is_some_and(|name| name.parse::<ClusterName>().is_ok())
    };
    let paths = entries.flatten().map(|entry| entry.path()).filter(ours);
    let mut found: Vec<Announcement> = paths.filter_map(|path| read(&path)).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The cluster of this name, or the only one; `None`: none runs.
///
/// # Errors
/// None of this name; several where no name was given.
pub fn choose(name: Option<&ClusterName>) -> Result<Option<Announcement>, ChooseError> {
    choose_from(running(), name)
}

fn choose_from(
    mut running: Vec<Announcement>,
    name: Option<&ClusterName>,
) -> Result<Option<Announcement>, ChooseError> {
    if let Some(name) = name {
        let names = running.iter().map(|one| one.name.clone()).collect();
        let found = running.into_iter().find(|one| one.name == name.0);
        return found.map(Some).ok_or_else(|| ChooseError::Unknown { name: name.clone(), running: names });
    }
    if running.len() > 1 {
        return Err(ChooseError::Ambiguous(running.into_iter().map(|one| (one.name, one.load_balancer)).collect()));
    }
    Ok(running.pop())
}

/// A cluster's name, taken until dropped; its file is removed then.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) name: ClusterName,
    path: PathBuf,
    /// The kernel frees its lock when we die, and then nobody believes the file any more.
    file: File,
}

impl Claim {
    /// Takes this name, or the first free one of `dev`, `dev2` and so on.
    ///
    /// # Errors
    /// Another cluster has the name, or the file cannot be written.
    pub(super) fn take(name: Option<&ClusterName>) -> io::Result<Self> {
        Self::take_in(&std::env::temp_dir(), name)
    }

    fn take_in(folder: &Path, name: Option<&ClusterName>) -> io::Result<Self> {
        let taken = |name: &dyn std::fmt::Display| {
            let text = format!("a `tidewire dev` named {name} runs already: stop it, or choose another --name");
            io::Error::new(io::ErrorKind::AlreadyExists, text)
        };
        if let Some(name) = name {
            return Self::take_one(folder, name)?.ok_or_else(|| taken(name));
        }
        for number in 1..=MAX_UNNAMED {
            let name = ClusterName(if number == 1 { "dev".to_owned() } else { format!("dev{number}") });
            if let Some(claim) = Self::take_one(folder, &name)? {
                return Ok(claim);
            }
        }
        Err(taken(&"dev"))
    }

    /// `None`: a living process has it.
    fn take_one(folder: &Path, name: &ClusterName) -> io::Result<Option<Self>> {
        let path = folder.join(format!("{}{name}{SUFFIX}", prefix()));
        // It gets its name only once it is locked, so that nobody ever sees a free one of a living run.
        let unnamed = folder.join(format!("{}{name}.{}.new", prefix(), std::process::id()));
        let _ = fs::remove_file(&unnamed);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unnamed)?;
        let named = file.lock().and_then(|()| {
            for _ in 0..CLAIM_ATTEMPTS {
                match fs::hard_link(&unnamed, &path) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    done => return done.map(|()| true),
                }
                if !remove_dead(&path) {
                    return Ok(false);
                }
            }
            Ok(false)
        });
        // Under its own name it is needed no more.
        let _ = fs::remove_file(&unnamed);
        Ok(named?.then(|| Self { name: name.clone(), path, file }))
    }

    /// Leaves the announcement for [`running`] to find.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn publish(&mut self, announcement: &Announcement) -> io::Result<()> {
        // Whoever reads a part of it reads no JSON, and looks again later.
        self.file.write_all(announcement.json().as_bytes())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Unless somebody else has put a file of his own in its place.
        if is_same(&self.path, &self.file) {
            // One that cannot be removed is not believed any more, since its lock is free.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Announcement {
    /// One line.
    pub(super) fn json(&self) -> String {
        // Strings and numbers only: this cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What people read. `logs` is where the nodes write; `server` describes the database.
    pub(super) fn text(&self, server: &str, logs: &Path, with_demo: bool) -> String {
        use std::fmt::Write as _;
        let Self { name, database_url, load_balancer, api_key, nodes } = self;
        let websocket = load_balancer.replacen("http", "ws", 1);
        let mut text = match nodes.len() {
            1 => format!("\ntidewire is ready: 1 node on {server}\n\n"),
            count => format!("\ntidewire is ready: {count} nodes on {server}\n\n"),
        };
        // Writing to a String cannot fail.
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "  {name:<14} {value}");
        };
        line("Name", name);
        line("Balancer", &format!("{load_balancer}   {websocket}/v1/ws"));
        for node in nodes {
            line(&format!("Node {}", node.name), &format!("{}   process {}", node.url, node.pid));
        }
        line("API key", api_key);
        line("Logs", &logs.display().to_string());
        line("Database", &format!("psql {}", quoted(database_url)));
        let table = if with_demo { demo::TABLE } else { "<table>" };
        if !with_demo {
            line("Track a table", &format!("{} track <table> --dev {name}", program()));
        }
        let program = program();
        let _ = write!(
            text,
            "\nWatch changes from another terminal:\n  {program} tail {table} --dev {name}\n  \
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

/// The address as clients write it.
pub(super) fn http(address: SocketAddr) -> String {
    format!("http://{address}")
}

const SUFFIX: &str = ".json";

fn prefix() -> String {
    format!("tidewire-dev-{}-", Uid::effective())
}

fn read(path: &Path) -> Option<Announcement> {
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path).ok()?;
    let meta = file.metadata().ok()?;
    // Anybody may put a file there; only one that we alone could write is believed, since the key goes to its URL.
    if meta.uid() != Uid::effective().as_raw() || meta.mode() & 0o077 != 0 || meta.len() > MAX_FILE_BYTES {
        return None;
    }
    if is_dead(&file) {
        if is_same(path, &file) {
            // One that stays is not believed the next time either.
            let _ = fs::remove_file(path);
        }
        return None;
    }
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// Removes the file of a dead owner; false: its owner lives, or it cannot be removed.
fn remove_dead(path: &Path) -> bool {
    match OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path) {
        Ok(file) => is_dead(&file) && (!is_same(path, &file) || fs::remove_file(path).is_ok()),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Nobody holds its lock. It is held, and not only tried, until `file` is closed: who takes the name waits for nobody.
fn is_dead(file: &File) -> bool {
    !matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Whether the file at `path` is still this one.
fn is_same(path: &Path, file: &File) -> bool {
    let inode = |meta: io::Result<fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
    inode(fs::symlink_metadata(path)) == inode(file.metadata())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn announcement() -> Announcement {
        Announcement {
            name: "blue".to_owned(),
            database_url: "postgres://postgres:secret@127.0.0.1:5432/postgres?sslmode=disable".to_owned(),
            load_balancer: "http://127.0.0.1:8080".to_owned(),
            api_key: "cdc_secret".to_owned(),
            nodes: vec![AnnouncedNode { name: "n1".to_owned(), pid: 7, url: "http://127.0.0.1:8081".to_owned() }],
        }
    }

    #[test]
    fn scripts_get_one_line_in_the_documented_shape() {
        assert_eq!(
            announcement().json(),
            r#"{"name":"blue","database_url":"postgres://postgres:secret@127.0.0.1:5432/postgres?sslmode=disable","load_balancer":"http://127.0.0.1:8080","api_key":"cdc_secret","nodes":[{"name":"n1","pid":7,"url":"http://127.0.0.1:8081"}]}"#
        );
    }

    #[test]
    fn people_get_lines_that_they_can_paste() {
        let text = announcement().text("Postgres 17", Path::new("/logs"), true);
        let tail = format!("\n  {} tail public.orders --dev blue\n", program());
        for line in [
            "psql 'postgres://postgres:secret@127.0.0.1:5432/postgres?sslmode=disable'",
            tail.as_str(),
            "curl -N -H 'Authorization: Bearer cdc_secret' 'http://127.0.0.1:8080/v1/sse?table=public.orders'",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    fn name(text: &str) -> ClusterName {
        text.parse().unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        running_in(folder).into_iter().map(|one| one.name).collect()
    }

    fn start(folder: &Path, given: Option<&str>) -> io::Result<Claim> {
        let mut claim = Claim::take_in(folder, given.map(name).as_ref())?;
        claim.publish(&Announcement { name: claim.name.to_string(), ..announcement() })?;
        Ok(claim)
    }

    /// Found in use: the last `dev` (or a bench) to start hid the one before, and its end left that one unfound.
    #[test]
    fn clusters_side_by_side_are_all_found_and_none_takes_anothers_name() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let first = start(folder, None).unwrap();
        let (second, blue) = (start(folder, None).unwrap(), start(folder, Some("blue")).unwrap());
        assert_eq!(names(folder), ["blue", "dev", "dev2"]);
        assert!(start(folder, Some("blue")).unwrap_err().to_string().contains("blue runs already"));
        assert_eq!(names(folder), ["blue", "dev", "dev2"], "an attempt takes nothing away");
        drop(second);
        drop(blue);
        assert_eq!(names(folder), ["dev"], "the end of others leaves the first where it is");
        drop(first);
        assert_eq!(fs::read_dir(folder).unwrap().count(), 0, "nothing stays");
    }

    #[test]
    fn a_cluster_that_still_starts_has_its_name_but_is_not_found() {
        let folder = tempfile::tempdir().unwrap();
        let claim = Claim::take_in(folder.path(), Some(&name("blue"))).unwrap();
        assert_eq!(names(folder.path()), [""; 0]);
        assert!(claim.path.exists());
        assert!(Claim::take_in(folder.path(), Some(&name("blue"))).is_err());
    }

    #[test]
    fn a_dead_owners_file_is_not_believed_and_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        for text in [announcement().json(), String::new(), "{".to_owned()] {
            let path = folder.path().join(format!("{}blue{SUFFIX}", prefix()));
            let write = |mode| {
                fs::write(&path, &text).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            };
            write(0o600);
            assert_eq!(names(folder.path()), [""; 0], "its owner is dead");
            assert!(!path.exists());
            write(0o600);
            drop(start(folder.path(), Some("blue")).unwrap());
            assert!(!path.exists());
        }
    }

    #[test]
    fn only_what_nobody_else_could_have_written_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let claim = start(folder.path(), Some("blue")).unwrap();
        fs::set_permissions(&claim.path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(names(folder.path()), [""; 0]);
        fs::set_permissions(&claim.path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(names(folder.path()), ["blue"]);
    }

    #[test]
    fn of_several_one_is_named_and_the_error_lists_them() {
        let of = |names: &[&str]| {
            names.iter().map(|name| Announcement { name: (*name).to_owned(), ..announcement() }).collect::<Vec<_>>()
        };
        let chosen = |names: &[&str], wanted: Option<&str>| {
            choose_from(of(names), wanted.map(name).as_ref())
                .map(|one| one.map(|one| one.name))
                .map_err(|e| e.to_string())
        };
        assert_eq!(chosen(&[], None), Ok(None));
        assert_eq!(chosen(&["a"], None), Ok(Some("a".to_owned())));
        assert_eq!(chosen(&["a", "b"], Some("b")), Ok(Some("b".to_owned())));
        let error = chosen(&["a", "b"], None).unwrap_err();
        assert!(error.contains("--dev a   http://127.0.0.1:8080") && error.contains("--dev b"), "{error}");
        assert_eq!(chosen(&["a"], Some("b")).unwrap_err(), "no `tidewire dev` named b runs; these run: a");
        assert_eq!(chosen(&[], Some("b")).unwrap_err(), "no `tidewire dev` named b runs");
    }

    #[test]
    fn a_name_is_a_plain_word() {
        for bad in ["", "a b", "../x", "a/b", "ä", &"x".repeat(33)] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn debug_output_has_no_secret() {
        assert!(!format!("{:?}", announcement()).contains("secret"));
    }
}
