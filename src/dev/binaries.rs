//! Finds Postgres's programs, or fetches them once.
//!
//! A folder counts only when `postgres --version` and `initdb` in it work *for the account that will run them* and
//! the version is one that Tidewire supports. A `--pg-bin` that does not is an error, any other is passed over.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use nix::unistd::Uid;
use postgresql_embedded::{PostgreSQL, Settings, VersionReq};

use super::account::{Account, make_open_folder};

/// The oldest supported major version.
const MIN_MAJOR: u32 = 14;

/// What is fetched where nothing is installed. Minor releases come as they appear.
const FETCHED_VERSION: &str = "17";
const FETCHED_FROM: &str = "https://github.com/zonkyio/embedded-postgres-binaries";

/// About 12 MB; a line that takes longer than this is as good as none.
const FETCH_LIMIT: Duration = Duration::from_secs(300);
const SPINNER_INTERVAL: Duration = Duration::from_millis(100);

/// Folders that hold one installation, and folders whose children do. `*` stands for a child's name after a prefix.
const USUAL_PLACES: [&str; 11] = [
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/libexec/postgresql*",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/opt/homebrew/opt/postgresql/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/usr/local/pgsql/bin",
    "/opt/local/lib/postgresql*/bin",
    "/usr/local/bin",
];

/// A folder with usable programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binaries {
    folder: PathBuf,
    major: u32,
}

/// Why no programs could be had.
#[derive(Debug, thiserror::Error)]
pub enum BinariesError {
    /// The folder that was asked for will not do.
    #[error("--pg-bin {}: {reason}", folder.display())]
    Unusable {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// None installed, none fetched.
    #[error(
        "no Postgres {MIN_MAJOR} or later is installed, and fetching one failed: {reason}. Install it \
         (Debian, Ubuntu: `apt-get install postgresql`; Fedora: `dnf install postgresql-server`; Alpine: `apk add \
         postgresql`; macOS: `brew install postgresql@17`), name its programs with --pg-bin, or use a database of \
         yours with --database-url"
    )]
    NotFetched {
        /// Why it failed.
        reason: String,
    },
}

impl Binaries {
    /// `asked` if given; else the first usable of `PATH`, the usual places newest first, and the cache; else fetched.
    ///
    /// # Errors
    /// When `asked` is unusable, or nothing is found and nothing can be fetched.
    pub(super) async fn find(asked: Option<&Path>, account: Account) -> Result<Self, BinariesError> {
        if let Some(folder) = asked {
            return probe(folder, account)
                .map_err(|reason| BinariesError::Unusable { folder: folder.to_path_buf(), reason });
        }
        if let Some(found) = installed(account) {
            return Ok(found);
        }
        fetched(account).await.map_err(|reason| BinariesError::NotFetched { reason })
    }

    /// Full path of a program.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Major version.
    pub(super) fn major(&self) -> u32 {
        self.major
    }
}

#[expect(clippy::disallowed_methods, reason = "`dev` looks for programs where a shell would")]
fn installed(account: Account) -> Option<Binaries> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).filter(|folder| folder.is_absolute());
    if let Some(found) = on_path.filter_map(|folder| probe(&folder, account).ok()).next() {
        return Some(found);
    }
    let usual = USUAL_PLACES.iter().flat_map(|pattern| matching(Path::new("/"), pattern));
    newest(usual, account)
}

fn newest(folders: impl Iterator<Item = PathBuf>, account: Account) -> Option<Binaries> {
    folders.filter_map(|folder| probe(&folder, account).ok()).max_by_key(|found| found.major)
}

/// Checks a folder by running what is in it.
fn probe(folder: &Path, account: Account) -> Result<Binaries, String> {
    for program in ["initdb", "postgres"] {
        if !folder.join(program).is_file() {
            return Err(format!("there is no program `{program}` in it"));
        }
    }
    let mut major = 0;
    for program in ["initdb", "postgres"] {
        let mut command = Command::new(folder.join(program));
        account.apply(&mut command, Path::new("/"));
        let output =
            command.arg("--version").output().map_err(|error| format!("`{program}` does not start: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        major = major_version(&text).ok_or_else(|| {
            format!("`{program} --version` failed: {}", String::from_utf8_lossy(&output.stderr).trim())
        })?;
    }
    if major < MIN_MAJOR {
        return Err(format!("it is Postgres {major}; Tidewire needs {MIN_MAJOR} or later"));
    }
    Ok(Binaries { folder: folder.to_path_buf(), major })
}

/// The major version in `postgres (PostgreSQL) 15.14 (Debian …)`, `… 19beta1` too.
fn major_version(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL) ")?.1;
    let digits = version.find(|c: char| !c.is_ascii_digit()).map_or(version, |end| &version[..end]);
    digits.parse().ok()
}

/// Folders under `root` that fit `pattern`, in which a component may end in, or hold one, `*`.
fn matching(root: &Path, pattern: &str) -> Vec<PathBuf> {
    let mut found = vec![root.to_path_buf()];
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        found = match part.split_once('*') {
            None => found.into_iter().map(|folder| folder.join(part)).filter(|folder| folder.is_dir()).collect(),
            Some((start, end)) => found.iter().flat_map(|folder| children(folder, start, end)).collect(),
        };
    }
    found
}

fn children(folder: &Path, start: &str, end: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let fits = |name: &str| name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end);
    entries.flatten().filter(|entry| fits(&entry.file_name().to_string_lossy())).map(|entry| entry.path()).collect()
}

/// From the cache, or fetched into it. One process at a time fetches; the others wait and find it there.
async fn fetched(account: Account) -> Result<Binaries, String> {
    let cache = cache_folder().ok_or("no home directory for a cache")?;
    let told = |error: io::Error| format!("{}: {error}", cache.display());
    make_open_folder(&cache).map_err(told)?;
    let lock = wait_for_lock(cache.join("fetch.lock")).await.map_err(told)?;
    let have = || newest(matching(&cache, "*/bin").into_iter(), account);
    if let Some(found) = have() {
        return Ok(found);
    }
    let staging = cache.join("staging");
    if staging.exists() {
        fs::remove_dir_all(&staging).map_err(told)?;
    }
    let installation = fetch(&staging).await?;
    if account.switches() {
        open_to_all(&cache).map_err(told)?;
    }
    let name = installation.file_name().ok_or("the fetched folder has no name")?;
    fs::rename(&installation, cache.join(name)).map_err(told)?;
    fs::remove_dir_all(&staging).map_err(told)?;
    drop(lock);
    have().ok_or_else(|| format!("what was fetched into {} does not run on this machine", cache.display()))
}

/// Downloads and unpacks into `staging`, and shows that it does.
async fn fetch(staging: &Path) -> Result<PathBuf, String> {
    // The crate would also run initdb, as ourselves; a data directory that looks initialised keeps it from that.
    let data = tempfile::tempdir().map_err(|error| error.to_string())?;
    File::create(data.path().join("postgresql.conf")).map_err(|error| error.to_string())?;
    let mut postgres = PostgreSQL::new(Settings {
        releases_url: FETCHED_FROM.to_owned(),
        version: VersionReq::parse(FETCHED_VERSION).map_err(|error| error.to_string())?,
        installation_dir: staging.to_path_buf(),
        data_dir: data.path().to_path_buf(),
        password_file: data.path().join("unused"),
        temporary: false,
        ..Settings::default()
    });
    let bar =
        ProgressBar::new_spinner().with_message(format!("fetching Postgres {FETCHED_VERSION} (once, about 12 MB)"));
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(SPINNER_INTERVAL);
    let done = tokio::time::timeout(FETCH_LIMIT, postgres.setup()).await;
    bar.finish_and_clear();
    match done {
        Ok(Ok(())) => Ok(postgres.settings().installation_dir.clone()),
        Ok(Err(error)) => Err(with_causes(&error)),
        Err(_) => Err(format!("not done after {} s", FETCH_LIMIT.as_secs())),
    }
}

/// An error with what lies under it, since "request failed" alone tells nobody that the machine is offline.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let line = error.to_string();
        if !text.contains(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        cause = error.source();
    }
    text
}

/// Per user; root's is one that the account of the server can reach, which its home is not.
#[expect(clippy::disallowed_methods, reason = "`dev` keeps what it fetched where programs keep such things")]
fn cache_folder() -> Option<PathBuf> {
    if Uid::effective().is_root() {
        return Some(PathBuf::from("/var/cache/tidewire/postgres"));
    }
    let base = match std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute()) {
        Some(cache) => cache,
        None if cfg!(target_os = "macos") => std::env::home_dir()?.join("Library/Caches"),
        None => std::env::home_dir()?.join(".cache"),
    };
    Some(base.join("tidewire/postgres"))
}

async fn wait_for_lock(path: PathBuf) -> io::Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o644).open(path)?;
    let locked = tokio::task::spawn_blocking(move || file.lock().map(|()| file)).await;
    locked.map_err(io::Error::other)?
}

/// Makes everything under `folder` readable and what is executable, executable for everyone (a strict umask of root's
/// would keep the server's account out).
fn open_to_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_symlink() {
            continue;
        }
        let mode = meta.permissions().mode();
        let execute = if meta.is_dir() || mode & 0o100 != 0 { 0o111 } else { 0 };
        fs::set_permissions(entry.path(), fs::Permissions::from_mode(mode | 0o444 | execute))?;
        if meta.is_dir() {
            open_to_all(&entry.path())?;
        }
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_releases_and_betas() {
        assert_eq!(major_version("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n"), Some(15));
        assert_eq!(major_version("initdb (PostgreSQL) 19beta1"), Some(19));
        assert_eq!(major_version("postgres (PostgreSQL) 9.6.24"), Some(9));
        assert_eq!(major_version("mysqld 8.0"), None);
        assert_eq!(major_version(""), None);
    }

    #[test]
    fn a_pattern_finds_every_version_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        for folder in ["pg/14/bin", "pg/17/bin", "pg/18", "app@15/bin", "app/bin"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let mut found = matching(root.path(), "/pg/*/bin");
        found.sort();
        assert_eq!(found, [root.path().join("pg/14/bin"), root.path().join("pg/17/bin")]);
        assert_eq!(matching(root.path(), "/app@*/bin"), [root.path().join("app@15/bin")]);
        assert_eq!(matching(root.path(), "/missing/*/bin"), Vec::<PathBuf>::new());
    }

    #[tokio::test]
    async fn a_folder_that_was_asked_for_and_will_not_do_is_an_error_not_a_search() {
        let empty = tempfile::tempdir().unwrap();
        let error = Binaries::find(Some(empty.path()), Account::for_server().unwrap()).await.unwrap_err();
        assert!(error.to_string().contains("no program `initdb`"), "{error}");
    }
}
