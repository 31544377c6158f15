//! A transaction pooler before Postgres: nodes work through it, leave nothing in the sessions that they share with others, and
//! recognise one that is given as the server's own address. Needs the program `pgbouncer`.

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tidewire::config::Wake;
use tidewire::dev::postgres::PrivateServer;
use tidewire::postgres::{ConnectError, Database};

use crate::support::cluster::TestCluster;
use crate::support::postgres::own_server;
use crate::support::{answered, within};

/// Where Debian has it, and everybody else.
fn programs() -> String {
    format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Whether there is a PgBouncer; `.ci/run` installs it.
fn is_installed() -> bool {
    let found = Command::new("pgbouncer").arg("--version").env("PATH", programs()).output().is_ok();
    if !found {
        // Not captured by the test runner, as `eprintln!` would be.
        let _ = writeln!(std::io::stderr(), "NOT RUN: no PgBouncer here (Debian: apt-get install pgbouncer)");
    }
    found
}

/// PgBouncer in transaction mode, with `sessions` sessions of the server.
struct Pooler {
    child: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Pooler {
    async fn start(server: &PrivateServer, sessions: usize, more: &str) -> Self {
        let url = server.url("postgres");
        let (user, address) = url.trim_start_matches("postgres://").split_once('@').unwrap();
        // An empty password is a syntax error there, with quotes and without.
        let user = match user.split_once(':') {
            Some((user, password)) => format!("{user} password='{password}'"),
            None => user.to_owned(),
        };
        let (host, rest) = address.split_once(':').unwrap();
        let target = rest.split('/').next().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "[databases]\n* = host={host} port={target} user={user}\n[pgbouncer]\nlisten_addr=127.0.0.1\n\
             listen_port={port}\nunix_socket_dir=\nauth_type=any\npool_mode=transaction\ndefault_pool_size={sessions}\n\
             max_client_conn=500\n{more}\n"
        );
        let path = folder.path().join("pgbouncer.ini");
        std::fs::File::create(&path).unwrap().write_all(config.as_bytes()).unwrap();
        let mut command = Command::new("pgbouncer");
        // It refuses to be root, and then has to read its file.
        let user = Command::new("id").arg("-u").output().unwrap().stdout;
        if user.trim_ascii() == b"0" {
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
            command.args(["-u", "nobody"]);
        }
        let child =
            command.arg(&path).env("PATH", programs()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let pooler = Self { child, port, _folder: folder };
        answered("the pooler", async || PgConnection::connect_with(&pooler.options()).await.ok())
            .await
            .close()
            .await
            .unwrap();
        pooler
    }

    fn url(&self) -> String {
        format!("postgres://app@127.0.0.1:{}/postgres?sslmode=disable", self.port)
    }

    /// sqlx's own parameter is one that this pooler does not know.
    fn options(&self) -> sqlx::postgres::PgConnectOptions {
        self.url().parse::<sqlx::postgres::PgConnectOptions>().unwrap().extra_float_digits(None::<i8>)
    }

    async fn application(&self) -> PgConnection {
        PgConnection::connect_with(&self.options()).await.unwrap()
    }
}

/// Every setting that a session may have been left with.
const SETTINGS: &str = "SELECT string_agg(name || '=' || setting, ' ' ORDER BY name) FROM pg_settings
    WHERE source = 'session'
        AND name NOT IN ('application_name', 'client_encoding', 'DateStyle', 'TimeZone', 'standard_conforming_strings')";
const STATEMENTS: &str = "SELECT count(*)::text FROM pg_prepared_statements";

async fn text(connection: &mut PgConnection, sql: &str) -> Option<String> {
    use sqlx::Row as _;
    let row = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).fetch_one(connection).await.unwrap();
    row.get(0)
}

/// Found in review: no node got ready ("prepared statement sqlx_s_1 already exists"), and the application's statements ended
/// with the node's limits.
#[tokio::test]
async fn nodes_behind_a_transaction_pooler_work_and_leave_nothing_in_its_sessions() {
    if !is_installed() {
        return;
    }
    let server = own_server().await;
    let pooler = Pooler::start(&server, 3, "").await;
    let pooled = pooler.url();
    let cluster = TestCluster::over(&server.url("postgres"), 2, |settings| {
        settings.pooled_url = Some(pooled.clone());
        settings.wake = Some(Wake::Notify);
    })
    .await;
    let mut clients = vec![cluster.node(0).client("orders").await, cluster.node(1).client("orders").await];
    for first in [1, 21, 41, 61, 81] {
        cluster.insert("orders", first..=first + 19).await;
        for client in &mut clients {
            client.expect_keys(first..=first + 19).await;
        }
    }
    // What was written before, read from the log by pages.
    let cursor = clients.remove(0).disconnect().await;
    cluster.insert("orders", 101..=400).await;
    clients[0].expect_keys(101..=400).await;
    let mut resumed = cluster.node(1).client_after("orders", cursor).await;
    resumed.expect_keys(101..=400).await;
    // All three sessions at once.
    let mut applications = Vec::new();
    for _ in 0..3 {
        let mut application = pooler.application().await;
        sqlx::raw_sql("BEGIN").execute(&mut application).await.unwrap();
        assert_eq!(text(&mut application, SETTINGS).await, None);
        assert_eq!(text(&mut application, STATEMENTS).await.as_deref(), Some("0"));
        applications.push(application);
    }
    assert_eq!(cluster.terms().await, 1, "the leader has nothing to do with the pooler");
}

/// A request that is given up in the middle of its transaction leaves no transaction to the next.
#[tokio::test]
async fn a_cancelled_statement_leaves_no_transaction_behind() {
    if !is_installed() {
        return;
    }
    let server = own_server().await;
    let pooler = Pooler::start(&server, 2, "").await;
    let database = Database::new(&server.url("postgres"), Some(&pooler.url()), "test", 1).unwrap();
    let pool = database.pool();
    let slow = async { sqlx::query("SELECT pg_sleep($1)").bind(60.0_f64).execute(&pool).await };
    assert!(tokio::time::timeout(Duration::from_secs(1), slow).await.is_err());
    let began = "SELECT now() > statement_timestamp() - interval '500 milliseconds'";
    for _ in 0..3 {
        let fresh: bool = within("the pool", sqlx::query_scalar(began).fetch_one(&pool)).await.unwrap();
        assert!(fresh, "a transaction of somebody else's");
    }
    // A failed one is rolled back, and its connection serves on.
    for _ in 0..3 {
        sqlx::query("SELECT 1 / $1").bind(0).execute(&pool).await.unwrap_err();
        assert_eq!(sqlx::query_scalar::<_, i32>("SELECT $1").bind(7).fetch_one(&pool).await.unwrap(), 7);
    }
}

/// Found in review: the migration waited forever behind it, and a quiet pooler was not recognised.
#[tokio::test]
async fn a_pooler_given_as_the_servers_own_address_is_recognised() {
    if !is_installed() {
        return;
    }
    let server = own_server().await;
    for (sessions, more) in [(1, ""), (2, ""), (5, ""), (2, "server_round_robin=1"), (5, "server_round_robin=1")] {
        let pooler =
            Pooler::start(&server, sessions, &format!("ignore_startup_parameters=extra_float_digits\n{more}")).await;
        let database = Database::new(&pooler.url(), None, "test", 2).unwrap();
        let error = within("the check", database.probe()).await.unwrap_err();
        assert!(matches!(error, ConnectError::Pooler(_)), "{sessions} {more}: {error}");
        let mut application = pooler.application().await;
        assert_eq!(text(&mut application, SETTINGS).await, None, "{sessions} {more}");
    }
    // As it is installed, it does not even take the connection.
    let pooler = Pooler::start(&server, 2, "").await;
    let error = Database::new(&pooler.url(), None, "test", 2).unwrap().probe().await.unwrap_err();
    assert!(error.is_final() && error.to_string().contains("--pooled-url"), "{error}");
    // Neither the server itself, nor a pooler that keeps a session to one connection.
    Database::new(&server.url("postgres"), None, "test", 2).unwrap().probe().await.unwrap();
    let session = Pooler::start(&server, 5, "ignore_startup_parameters=extra_float_digits\npool_mode=session").await;
    Database::new(&session.url(), None, "test", 2).unwrap().probe().await.unwrap();
}
