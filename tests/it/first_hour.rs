//! What somebody runs into in the first hour: what commands print can be pasted and goes on where it says, every command
//! says which cluster it speaks to, and a refusal names its cause once, with what to do, before anything was changed.

use std::process::{Output, Stdio};

use serde_json::Value;
use sqlx::{AssertSqlSafe, PgPool};
use tidewire::dev::postgres::{PrivateServer, Profile, ServerOptions};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

use crate::support::cluster::TestCluster;
use crate::support::postgres::{database, empty_database, pool};
use crate::support::{answered, eventually, within};

/// The program without what the surroundings set, in a folder without a configuration.
fn tidewire(folder: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidewire"));
    command.args(arguments).current_dir(folder).kill_on_drop(true).stdin(Stdio::null());
    // No `tidewire dev` of whoever runs the tests.
    command.env("TMPDIR", folder);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TIDEWIRE_") {
            command.env_remove(name);
        }
    }
    command
}

async fn ends(mut command: Command) -> Output {
    within("the command's end", command.output()).await.unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn run(pool: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Found in use: the cursor that `tail --count` named was that before its last frame, so that a loop stood still.
#[tokio::test]
async fn a_loop_of_tail_count_reads_everything_once() {
    let cluster = TestCluster::start(1).await;
    let folder = tempfile::tempdir().unwrap();
    let mut client = cluster.client("orders").await;
    let mut cursor = client.caught_up().await.to_string();
    // One transaction, so that one frame holds several counts, and others of their own.
    cluster.insert("orders", 1..=10).await;
    cluster.insert_each("orders", 11..=13).await;
    client.expect_keys(1..=13).await;
    let mut seen = Vec::new();
    for count in [1, 3, 3, 4, 2] {
        let count = count.to_string();
        let url = cluster.node(0).url();
        let mut command =
            tidewire(folder.path(), &["tail", "orders", "--json", "--count", &count, "--from", &cursor, "--url", &url]);
        command.env("TIDEWIRE_KEY", &cluster.key);
        let output = ends(command).await;
        assert!(output.status.success(), "{}", stderr(&output));
        let lines = String::from_utf8(output.stdout.clone()).unwrap();
        seen.extend(
            lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["key"]["id"].as_i64().unwrap()),
        );
        let said = stderr(&output);
        assert!(said.contains(&format!("--url {url} --count {count} --from ")), "{said}");
        assert!(!said.contains(&cluster.key), "the key is not repeated");
        cursor = said.split_once("last cursor ").unwrap().1.split(';').next().unwrap().to_owned();
    }
    assert_eq!(seen, (1..=13).collect::<Vec<_>>());
}

/// Found in use: however many attempts were asked for, a first connection got four.
#[tokio::test]
async fn tail_tries_as_often_as_it_is_told() {
    let folder = tempfile::tempdir().unwrap();
    for attempts in ["1", "2", "6"] {
        let command = tidewire(
            folder.path(),
            &["tail", "orders", "--url", "http://127.0.0.1:1", "--key", "cdc_x", "--attempts", attempts],
        );
        let output = ends(command).await;
        let said = stderr(&output);
        assert!(!output.status.success() && said.contains(&format!("gave up after {attempts} attempts")), "{said}");
    }
}

/// `--database-url` stands last, as everywhere; a file is read by every command; a script gets nothing but JSON.
#[tokio::test]
async fn every_command_takes_its_database_alike_and_says_which_it_is() {
    let db = database().await;
    let folder = tempfile::tempdir().unwrap();
    run(&db.pool, "CREATE TABLE orders (id int PRIMARY KEY)").await;
    let commands: &[&[&str]] = &[
        &["migrate"],
        &["track", "orders"],
        &["tables"],
        &["status"],
        &["keys", "create", "--name", "web", "--table", "orders"],
        &["keys", "list"],
        &["untrack", "orders"],
    ];
    let shown = format!("/{}\n", db.name);
    for words in commands {
        let output = ends(tidewire(folder.path(), words)).await;
        assert!(stderr(&output).contains("no database named: give --database-url"), "{words:?}: {}", stderr(&output));

        let output = ends(tidewire(folder.path(), &[words, &["--database-url", &db.url][..]].concat())).await;
        assert!(output.status.success(), "{words:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(&shown), "{words:?}: {}", stderr(&output));
    }
    std::fs::write(folder.path().join("tidewire.toml"), format!("database_url = '{}'\nlisten = '127.0.0.1:1'", db.url))
        .unwrap();
    for words in commands {
        let output = ends(tidewire(folder.path(), words)).await;
        assert!(output.status.success(), "{words:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("database of tidewire.toml: "), "{words:?}: {}", stderr(&output));
        let output = ends(tidewire(folder.path(), &[words, &["--json"][..]].concat())).await;
        assert!(output.status.success(), "{words:?}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{words:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap();
    }
    let output = ends(tidewire(folder.path(), &["status", "--dev", "blue"])).await;
    assert!(stderr(&output).contains("no `tidewire dev` named blue runs"), "{}", stderr(&output));
    std::fs::write(folder.path().join("tidewire.toml"), "database = 'x'").unwrap();
    let output = ends(tidewire(folder.path(), &["status"])).await;
    assert!(stderr(&output).contains("tidewire.toml is not a valid configuration"), "{}", stderr(&output));
}

/// A server as in production: with passwords. Its superuser's URL, and one of a role that is none.
async fn guarded_server() -> (PrivateServer, PgPool, String) {
    let options = ServerOptions { pg_bin: None, folder: None, profile: Profile::Durable, max_connections: 100 };
    let server = PrivateServer::start(options).await.unwrap();
    let admin = pool(&server.url("postgres")).await;
    run(&admin, "CREATE ROLE app LOGIN PASSWORD 'right'").await;
    run(&admin, "CREATE ROLE nologin PASSWORD 'right'").await;
    run(&admin, "CREATE DATABASE app OWNER app").await;
    run(&admin, "CREATE DATABASE closed").await;
    run(&admin, "REVOKE CONNECT ON DATABASE closed FROM PUBLIC").await;
    let host = format!("127.0.0.1:{}", server.port());
    (server, admin, host)
}

/// Found in use: a wrong password was "no Postgres reached", said twice, and `serve` waited for it forever.
#[tokio::test]
async fn what_never_heals_ends_serve_at_once_and_is_rightly_named() {
    let (_server, _admin, host) = guarded_server().await;
    let folder = tempfile::tempdir().unwrap();
    for (who, database, want) in [
        ("app:wrong", "app", "password authentication failed for user \"app\". Check user and password"),
        ("nobody:right", "app", "password authentication failed for user \"nobody\""),
        ("nologin:right", "app", "is not permitted to log in. Give it the right: ALTER ROLE"),
        ("app:right", "missing", "database \"missing\" does not exist. Check the database in the URL"),
        ("app:right", "closed", "permission denied for database \"closed\". Give the role the right: GRANT CONNECT"),
        ("app:right", "app?sslmode=require", "TLS: server does not support TLS. Check sslmode"),
    ] {
        let url = format!("postgres://{who}@{host}/{database}");
        for words in [&["serve", "--listen", "127.0.0.1:0"][..], &["status"], &["migrate"], &["dev", "--nodes", "1"]] {
            let output = ends(tidewire(folder.path(), &[words, &["--database-url", &url][..]].concat())).await;
            let said = stderr(&output);
            assert!(!output.status.success() && said.contains(want), "{words:?} {who} {database}: {said}");
            assert!(!said.contains("no Postgres reached"), "{said}");
            let (_, last) = said.rsplit_once("tidewire: ").unwrap();
            let cause = want.split('.').next().unwrap();
            assert_eq!(last.matches(cause).count(), 1, "once: {said}");
            assert!(!said.contains("right@") && !said.contains("wrong@"), "{said}");
        }
    }
}

/// What may come is waited for; one line says so, without colours in a file.
#[tokio::test]
async fn a_server_that_is_away_is_waited_for_in_one_plain_line() {
    let folder = tempfile::tempdir().unwrap();
    let url = "postgres://app@127.0.0.1:1/app";
    let mut command = tidewire(folder.path(), &["serve", "--listen", "127.0.0.1:0", "--database-url", url]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = answered("the line that says what it waits for", async || {
        let line = within("a line", lines.next_line()).await.unwrap().expect("it goes on");
        assert!(!line.contains('\u{1b}'), "{line:?}");
        line.contains("waiting for Postgres").then_some(line)
    })
    .await;
    assert_eq!(line.matches("Connection refused").count(), 1, "{line}");
    assert!(line.contains("Is the server running"), "{line}");
    assert!(child.try_wait().unwrap().is_none());
    child.kill().await.unwrap();
}

/// Found in use: `dev --database-url` refused only after it had migrated the database.
#[tokio::test]
async fn dev_refuses_a_database_before_it_changes_it() {
    let (server, admin, host) = guarded_server().await;
    let folder = tempfile::tempdir().unwrap();
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port().to_string();
    let cases: &[(&str, &str, &[&str], &str)] = &[
        ("taken", "CREATE TABLE public.orders (id int)", &[], "has a table public.orders of its own"),
        ("few", "ALTER DATABASE few CONNECTION LIMIT 12", &["--no-demo"], "start fewer with --nodes"),
        ("readonly", "ALTER DATABASE readonly SET default_transaction_read_only = on", &["--no-demo"], "is read-only"),
        (
            "nopublic",
            "REVOKE ALL ON SCHEMA public FROM PUBLIC, app",
            &[],
            "GRANT USAGE, CREATE ON SCHEMA public TO app",
        ),
        ("many", "SELECT", &["--no-demo", "--nodes", "9"], "max_connections"),
        ("busyport", "SELECT", &["--no-demo", "--port", &port], "choose another with --port"),
    ];
    for (name, prepare, options, want) in cases {
        run(&admin, &format!("CREATE DATABASE {name}")).await;
        run(&admin, &format!("GRANT CREATE ON DATABASE {name} TO app")).await;
        let inside = pool(&server.url(name)).await;
        run(&inside, prepare).await;
        let url = format!("postgres://app:right@{host}/{name}");
        let words = [&["dev", "--database-url", &url][..], options].concat();
        let output = ends(tidewire(folder.path(), &words)).await;
        let said = stderr(&output);
        assert!(!output.status.success() && said.contains(want), "{name}: {said}");
        let changed: bool = sqlx::query_scalar(
            "SELECT to_regnamespace('tidewire') IS NOT NULL OR EXISTS (SELECT FROM pg_roles WHERE rolname LIKE 'tidewire%')",
        )
        .fetch_one(&inside)
        .await
        .unwrap();
        assert!(!changed, "{name}");
        inside.close().await;
    }
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A second cluster in the same database would be one with the first.
#[tokio::test]
async fn dev_refuses_a_database_that_has_a_cluster() {
    let db = database().await;
    let cluster = TestCluster::over(&db.url, 1, |_| {}).await;
    let folder = tempfile::tempdir().unwrap();
    eventually("a heartbeat", || cluster.node(0).is_ready()).await;
    let output = ends(tidewire(folder.path(), &["dev", "--no-demo", "--database-url", &db.url])).await;
    let said = stderr(&output);
    assert!(!output.status.success() && said.contains("already has a cluster"), "{said}");
    assert!(said.contains(&cluster.node(0).name), "{said}");
}

/// Found in use: "permission denied for schema tidewire", and nothing that would help.
#[tokio::test]
async fn a_missing_right_comes_with_the_grant_to_run() {
    let db = empty_database().await;
    let folder = tempfile::tempdir().unwrap();
    let role = format!("plain_{}", db.name);
    let mut url = url::Url::parse(&db.url).unwrap();
    url.set_username(&role).unwrap();
    tidewire::postgres::migrate::migrate(&db.pool.connect_options()).await.unwrap();
    run(&db.pool, &format!("CREATE ROLE {role} LOGIN; CREATE TABLE orders (id int PRIMARY KEY)")).await;
    for (words, want) in [
        (&["track", "orders"][..], format!("SELECT tidewire.grant_tracking('{role}');")),
        (&["tables"], format!("GRANT tidewire_owner TO {role};")),
        (&["status"], format!("GRANT tidewire_owner TO {role};")),
        (&["keys", "list"], format!("GRANT tidewire_owner TO {role};")),
        (&["keys", "create", "--name", "x", "--table", "orders"], format!("GRANT tidewire_owner TO {role};")),
        (&["migrate"], format!("GRANT tidewire_owner TO {role};")),
        (&["doctor"], format!("GRANT tidewire_owner TO {role};")),
    ] {
        let output = ends(tidewire(folder.path(), &[words, &["--database-url", url.as_str()][..]].concat())).await;
        let said = stderr(&output) + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && said.contains(&want), "{words:?}: {said}");
    }
    run(&db.pool, &format!("SELECT tidewire.grant_tracking('{role}')")).await;
    let output = ends(tidewire(folder.path(), &["track", "orders", "--database-url", url.as_str()])).await;
    assert!(!output.status.success() && stderr(&output).contains("owner"), "{}", stderr(&output));
    run(&db.pool, &format!("ALTER TABLE orders OWNER TO {role}")).await;
    let output = ends(tidewire(folder.path(), &["track", "orders", "--database-url", url.as_str()])).await;
    assert!(output.status.success(), "{}", stderr(&output));
    run(&db.pool, &format!("SELECT tidewire.untrack('orders'); REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

/// Found in use: the gauge stayed at 1 after the last batch, and connections were counted twice.
#[tokio::test]
async fn gauges_say_what_is_and_not_what_was() {
    let cluster = TestCluster::start(1).await;
    let mut client = cluster.client("orders").await;
    for id in 1..=5 {
        cluster.insert("orders", id..=id).await;
    }
    client.expect_keys(1..=5).await;
    let metrics = cluster.node(0).metrics();
    eventually("no batch waits", || metrics.feed_backlog_batches.get() == 0).await;
    let text = within("the metrics", cluster.node(0).get("/metrics")).await.text().await;
    let connections: i64 = text
        .lines()
        .filter(|line| line.starts_with("tidewire_connections{"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<i64>().unwrap())
        .sum();
    assert_eq!(connections, 1, "{text}");
}
