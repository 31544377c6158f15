//! The private Postgres of `tidewire dev` and of these tests starts anywhere, and nothing of it is left behind.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sqlx::{Connection, PgConnection};
use tidewire::dev::postgres::{PrivateServer, Profile, ServerOptions};

use crate::support::DEADLINE;
use crate::support::postgres::{database, empty_database, own_server};

async fn answer(url: &str) -> i32 {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let answer = sqlx::query_scalar("SELECT 42").fetch_one(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    answer
}

async fn eventually(what: &str, mut fact: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !fact() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn options(folder: Option<&Path>, profile: Profile) -> ServerOptions {
    ServerOptions { pg_bin: None, folder: folder.map(Path::to_path_buf), profile, max_connections: 20 }
}

/// True for a process that runs; a zombie that its parent has not collected does not.
fn lives(pid: u32) -> bool {
    processes().get(&pid).is_some_and(|process| !process.state.starts_with('Z'))
}

struct Process {
    parent: u32,
    state: String,
    command: String,
}

fn processes() -> HashMap<u32, Process> {
    let output = Command::new("ps").args(["-A", "-o", "pid=,ppid=,state=,args="]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .map(|line| {
            let mut words = line.split_whitespace();
            let pid = words.next().unwrap().parse().unwrap();
            let parent = words.next().unwrap().parse().unwrap();
            let state = words.next().unwrap().to_owned();
            (pid, Process { parent, state, command: words.collect::<Vec<_>>().join(" ") })
        })
        .collect()
}

#[tokio::test]
async fn a_private_server_takes_connections_and_is_gone_without_a_trace_when_dropped() {
    let server = own_server().await;
    assert_eq!(answer(&server.url("postgres")).await, 42);
    let (pid, folder) = (server.pid().unwrap(), server.folder().to_path_buf());
    assert!(folder.exists());
    drop(server);
    assert!(!lives(pid) && !folder.exists());
}

#[tokio::test]
async fn a_server_comes_back_on_the_same_port_with_its_data_after_a_crash_and_after_a_stop() {
    let mut server = own_server().await;
    let url = server.url("postgres");
    let mut connection = PgConnection::connect(&url).await.unwrap();
    sqlx::query("CREATE TABLE kept AS SELECT 42 AS answer").execute(&mut connection).await.unwrap();

    server.stop_immediate().await;
    assert!(sqlx::query("SELECT 1").execute(&mut connection).await.is_err());
    server.start_again().await.unwrap();
    assert_eq!(server.url("postgres"), url);
    server.stop().await;
    assert_eq!(server.pid(), None);
    server.start_again().await.unwrap();

    let mut connection = PgConnection::connect(&url).await.unwrap();
    let kept: i32 = sqlx::query_scalar("SELECT answer FROM kept").fetch_one(&mut connection).await.unwrap();
    assert_eq!(kept, 42);
}

#[tokio::test]
async fn a_durable_server_keeps_its_folder_and_asks_for_the_password() {
    let place = open_folder();
    let folder = place.path().join("data-dir");
    let mut server = PrivateServer::start(options(Some(&folder), Profile::Durable)).await.unwrap();
    let url = server.url("postgres");
    assert_eq!(answer(&url).await, 42);

    let mut wrong = url::Url::parse(&url).unwrap();
    wrong.set_password(Some("wrong")).unwrap();
    assert!(PgConnection::connect(wrong.as_str()).await.is_err());
    let password = url::Url::parse(&url).unwrap().password().unwrap().to_owned();
    assert!(!format!("{server:?}").contains(&password));

    let busy = PrivateServer::start(options(Some(&folder), Profile::Durable)).await.unwrap_err();
    let cause = std::error::Error::source(&busy).unwrap().to_string();
    assert!(cause.contains("in use by another tidewire"), "{cause}");

    server.stop().await;
    drop(server);
    assert!(folder.exists());
    let server = PrivateServer::start(options(Some(&folder), Profile::Durable)).await.unwrap();
    assert_eq!(answer(&server.url("postgres")).await, 42);
}

#[tokio::test]
async fn a_server_ends_with_its_owner_even_when_that_is_killed() {
    let mut owner = Owner::start(None);
    owner.kill();
    let (pid, folder) = (owner.server, owner.folder.clone());
    eventually("the watchdog stops the server", || !lives(pid)).await;
    eventually("the watchdog removes the folder", || !folder.exists()).await;
}

#[tokio::test]
async fn what_a_killed_run_left_behind_is_found_and_stopped_by_the_next() {
    let place = open_folder();
    let folder = place.path().join("data-dir");
    let mut owner = Owner::start(Some(&folder));
    owner.kill_watchdog();
    owner.kill();
    assert!(lives(owner.server));

    let server = PrivateServer::start(options(Some(&folder), Profile::Fast)).await.unwrap();
    assert!(!lives(owner.server));
    assert_eq!(answer(&server.url("postgres")).await, 42);
}

#[tokio::test]
async fn a_temporary_server_of_a_killed_run_is_swept_away_by_the_next() {
    let mut owner = Owner::start(None);
    owner.kill_watchdog();
    owner.kill();
    let _next = own_server().await;
    let (pid, folder) = (owner.server, owner.folder.clone());
    eventually("some next run has stopped the server", || !lives(pid)).await;
    eventually("and removed its folder", || !folder.exists()).await;
}

#[tokio::test]
async fn every_test_has_a_database_of_its_own_that_goes_with_it() {
    let (one, other) = tokio::join!(database(), empty_database());
    assert_ne!(one.name, other.name);
    sqlx::query("CREATE TABLE mine ()").execute(&one.pool).await.unwrap();
    sqlx::query("CREATE TABLE mine ()").execute(&other.pool).await.unwrap();

    let gone = one.name.clone();
    drop(one);
    let left: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(gone)
        .fetch_one(&other.pool)
        .await
        .unwrap();
    assert!(!left);
}

/// A folder that the account of the server may enter.
fn open_folder() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o755)).tempdir_in("/tmp").unwrap()
}

/// Another process that owns a server: this test binary again, running `owns_a_server_until_it_is_killed`.
struct Owner {
    child: Child,
    server: u32,
    folder: PathBuf,
}

const OWNER_FOLDER: &str = "TIDEWIRE_TEST_OWNER_FOLDER";

impl Owner {
    fn start(folder: Option<&Path>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "private_server::owns_a_server_until_it_is_killed", "--ignored", "--nocapture"]);
        command.env(OWNER_FOLDER, folder.map(Path::as_os_str).unwrap_or_default());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let told = lines.map(Result::unwrap).find_map(|line| line.split_once("owns ").map(|(_, told)| told.to_owned()));
        let told = told.expect("the owner tells what it owns");
        let (server, folder) = told.split_once(' ').unwrap();
        Self { child, server: server.parse().unwrap(), folder: folder.into() }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn kill_watchdog(&self) {
        let all = processes();
        let watchdog = all
            .iter()
            .find(|(_, process)| process.parent == self.child.id() && process.command.contains("tidewire-watchdog"));
        let pid = i32::try_from(*watchdog.expect("a watchdog").0).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test of its own: what [`Owner`] runs.
#[tokio::test]
#[ignore = "runs as a child of other tests"]
async fn owns_a_server_until_it_is_killed() {
    let Some(folder) = std::env::var_os(OWNER_FOLDER) else { return };
    let folder = Some(Path::new(&folder)).filter(|path| !path.as_os_str().is_empty());
    let server = PrivateServer::start(options(folder, Profile::Fast)).await.unwrap();
    println!("\nowns {} {}", server.pid().unwrap(), server.folder().display());
    // Ends by itself, should the parent die first.
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}
