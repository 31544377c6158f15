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
        let known = status::read(&cluster.pool).await.unwrap().foreign_locks;
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
    assert_eq!(status::foreign(&cluster.pool).await.unwrap(), []);
    cluster.kill_leader_backend().await;
    let (a, b) = (cluster.node(0), cluster.node(1));
    answered("a look or two", async || {
        let leads = a.metrics().leader.get() + b.metrics().leader.get() == 1;
        (leads && status::foreign(&cluster.pool).await.unwrap().is_empty()).then_some(())
    })
    .await;
    assert_eq!((a.metrics().foreign_locks.get(), b.metrics().foreign_locks.get()), (0, 0));
    sqlx::raw_sql("COMMIT").execute(&mut writer).await.unwrap();
}
