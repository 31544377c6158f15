//! The relay's advisory locks ask for no right: whoever holds one without being the relay is named everywhere, with the
//! statement that ends it, and that statement works.

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};
use tidewire::cli::doctor::{Severity, examine};
use tidewire::cli::status;
use tidewire::postgres::Database;
use tidewire::relay::{LEADER_LOCK, PARK_LOCK};

use crate::support::cluster::TestCluster;
use crate::support::postgres::own_server;
use crate::support::{answered, eventually};

/// What a stranger runs, and the lock that it then holds.
const HOLDS: &[(&str, i64, &str)] = &[
    ("SELECT pg_advisory_lock($)", LEADER_LOCK, "leader"),
    ("SELECT pg_advisory_lock_shared($)", LEADER_LOCK, "leader"),
    ("BEGIN; SELECT pg_advisory_xact_lock($)", LEADER_LOCK, "leader"),
    ("SELECT pg_advisory_lock($)", PARK_LOCK, "park"),
    ("SELECT pg_advisory_lock_shared($)", PARK_LOCK, "park"),
    ("BEGIN; SELECT pg_advisory_xact_lock($); PREPARE TRANSACTION 'it''s held'", PARK_LOCK, "park"),
];

#[tokio::test]
async fn whoever_holds_the_relays_locks_is_named_with_the_statement_that_ends_it() {
    let server = own_server().await;
    let url = server.url("postgres");
    // The relay never parks, so that the park lock is free.
    let cluster = TestCluster::over(&url, 1, |settings| settings.wake = Some(tidewire::config::Wake::Poll)).await;
    let node = cluster.node(0);
    let mut client = node.client("orders").await;
    cluster.run("CREATE ROLE stranger LOGIN").await;
    let held = || node.metrics().foreign_locks.get();
    for (index, (statement, key, lock)) in HOLDS.iter().enumerate() {
        let mut stranger = PgConnection::connect(&url).await.unwrap();
        sqlx::raw_sql("SET ROLE stranger; SET application_name = 'a backup'").execute(&mut stranger).await.unwrap();
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut stranger).await.unwrap();
        if *lock == "leader" {
            // It waits in line, and has the lock when the leader is gone.
            cluster.run("SELECT pg_terminate_backend(pid) FROM tidewire.terms ORDER BY term DESC LIMIT 1").await;
        }
        let take = statement.replace('$', &key.to_string());
        sqlx::raw_sql(AssertSqlSafe(take)).execute(&mut stranger).await.unwrap();
        eventually("the node sees it", || held() > 0).await;
        let (who, end) = match statement.contains("PREPARE") {
            true => ("it''s held".to_owned(), "ROLLBACK PREPARED 'it''s held';".to_owned()),
            false => (format!("session {pid} of role"), format!("SELECT pg_terminate_backend({pid});")),
        };
        let health: Value = node.get("/health").await.json().await;
        let seen = &health["relay"]["foreign_locks"][0];
        assert_eq!((&seen["lock"], &seen["end"]), (&Value::from(*lock), &Value::from(end.as_str())), "{health}");
        assert!(seen["holder"].as_str().unwrap().contains(&who), "{health}");
        let known = status::read(&cluster.pool.clone().into()).await.unwrap().foreign_locks;
        assert_eq!((known.len(), known[0].end.as_str()), (1, end.as_str()), "{statement}");
        let findings = examine(&Database::new(&url, None, "doctor", 2).unwrap()).await;
        let found = findings.iter().find(|finding| finding.check == "foreign locks").unwrap();
        let severity = if *lock == "leader" { Severity::Problem } else { Severity::Warning };
        assert_eq!((found.severity, found.run.as_deref()), (severity, Some(end.as_str())), "{statement}");
        // What is printed is what helps.
        cluster.run(&end).await;
        eventually("it is gone", || held() == 0).await;
        let id = i64::try_from(index).unwrap() + 1;
        cluster.insert("orders", id..=id).await;
        client.expect_keys([id]).await;
    }
}

#[tokio::test]
async fn leaders_and_writers_are_no_strangers_to_the_relays_locks() {
    let cluster = TestCluster::start(2).await;
    let mut writer = cluster.pool.acquire().await.unwrap().detach();
    sqlx::raw_sql("BEGIN; INSERT INTO orders (id) VALUES (1)").execute(&mut writer).await.unwrap();
    let shared =
        format!("SELECT count(*) FROM pg_locks WHERE mode = 'ShareLock' AND objid::bigint = {PARK_LOCK} & 4294967295");
    let shared: i64 = sqlx::query(AssertSqlSafe(shared)).fetch_one(&mut writer).await.unwrap().get(0);
    assert!(shared <= 1, "it has the park lock, or found the relay parked");
    assert_eq!(status::foreign(&cluster.pool.clone().into()).await.unwrap(), []);
    cluster.kill_leader_backend().await;
    let (a, b) = (cluster.node(0), cluster.node(1));
    answered("a look or two", async || {
        let leads = a.metrics().leader.get() + b.metrics().leader.get() == 1;
        (leads && status::foreign(&cluster.pool.clone().into()).await.unwrap().is_empty()).then_some(())
    })
    .await;
    assert_eq!((a.metrics().foreign_locks.get(), b.metrics().foreign_locks.get()), (0, 0));
    sqlx::raw_sql("COMMIT").execute(&mut writer).await.unwrap();
}

/// Found by trying what the runbook says: a node asked for a function more than it grants, and could not connect at all.
#[tokio::test]
async fn a_node_needs_of_the_lock_functions_what_the_runbook_grants() {
    let server = own_server().await;
    let mut superuser = PgConnection::connect(&server.url("postgres")).await.unwrap();
    let url = server.url("hardened");
    let (_, given) = url.split_once("//").unwrap();
    let (given, _) = given.split_once('@').unwrap();
    let (user, password) = given.split_once(':').unwrap_or((given, "x"));
    for statement in [
        format!("CREATE ROLE node LOGIN PASSWORD '{password}'"),
        format!("CREATE ROLE writer LOGIN PASSWORD '{password}'"),
        "CREATE DATABASE hardened OWNER node".to_owned(),
    ] {
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut superuser).await.unwrap();
    }
    let runbook = include_str!("../../docs/RUNBOOK.md");
    let from = runbook.find("REVOKE EXECUTE ON FUNCTION pg_advisory_lock").unwrap();
    let (statements, _) = runbook[from..].split_once("```").unwrap();
    let statements = statements.replace("<the role of tidewire's nodes>", "node");
    let mut superuser = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut superuser).await.unwrap();

    let url_of = |role: &str| url.replacen(&format!("//{user}"), &format!("//{role}"), 1);
    let url = url_of("node");
    let cluster = TestCluster::over(&url, 1, |_| {}).await;
    let mut client = cluster.node(0).client("orders").await;
    cluster.run("GRANT INSERT ON orders TO writer").await;
    let mut writer = PgConnection::connect(&url_of("writer")).await.unwrap();
    let refused = sqlx::query("SELECT pg_advisory_lock($1)").bind(LEADER_LOCK).execute(&mut writer).await.unwrap_err();
    assert!(refused.to_string().contains("permission denied"), "{refused}");
    // The relay parks, and the writer has to see that.
    for id in 1..=2 {
        cluster.node(0).parked().await;
        sqlx::query("INSERT INTO orders (id) VALUES ($1)").bind(id).execute(&mut writer).await.unwrap();
        client.expect_keys(id..=id).await;
    }
    let findings = examine(&Database::new(&url, None, "doctor", 2).unwrap()).await;
    let denied: Vec<_> = findings.iter().filter(|finding| finding.what.contains("permission denied")).collect();
    assert!(denied.is_empty(), "{denied:#?}");
}
