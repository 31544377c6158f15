//! What somebody has set for the database or the role does not reach a node's own sessions.

use crate::support::answered;
use crate::support::client::key_of;
use crate::support::cluster::TestCluster;
use crate::support::postgres::own_server;

/// `ALTER DATABASE … SET`, each with the others.
const SETTINGS: &[&str] = &[
    "default_transaction_isolation = 'serializable'",
    "default_transaction_deferrable = on",
    "lock_timeout = '20ms'",
    "idle_session_timeout = '300ms'",
    "synchronous_commit = off",
    "standard_conforming_strings = off",
];

/// Found in review: under `serializable` the leader lost term after term ("could not serialize access"), and with
/// `idle_session_timeout` the node lost its LISTEN connection again and again.
#[tokio::test]
async fn the_databases_settings_do_not_end_a_term() {
    let server = own_server().await;
    let url = server.url("postgres");
    for setting in SETTINGS {
        let pool = crate::support::postgres::pool(&url).await;
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("ALTER DATABASE postgres SET {setting}")))
            .execute(&pool)
            .await
            .unwrap();
        pool.close().await;
    }
    let cluster = TestCluster::over(&url, 1, |_| {}).await;
    let mut client = cluster.node(0).client("orders").await;
    // Enough rounds that an idle session would have been ended between them.
    let mut wire = cluster.node(0).wire().await;
    wire.subscribe("s", "orders").await;
    wire.expect("caught_up").await;
    let writers = (0..4_i64).map(|writer| {
        let cluster = &cluster;
        async move {
            for id in 0..25 {
                let id = writer * 25 + id + 1;
                // Serializable writers among themselves may have to try again; the relay is nobody of theirs.
                let insert = format!("INSERT INTO orders (id) VALUES ({id})");
                while let Err(error) = sqlx::raw_sql(sqlx::AssertSqlSafe(insert.clone())).execute(&cluster.pool).await {
                    let code = error.as_database_error().and_then(|refused| refused.code());
                    assert!(matches!(code.as_deref(), Some("40001" | "55P03")), "{error}");
                }
            }
        }
    });
    futures_util::future::join_all(writers).await;
    let mut keys: Vec<_> = client.events(100).await.iter().map(key_of).collect();
    keys.sort_unstable();
    assert_eq!(keys, (1..=100).collect::<Vec<_>>());
    assert_eq!(cluster.terms().await, 1);
    // Its statement is LISTEN as long as nothing else was asked of it. A limit of 300 ms would never let it come so far.
    let idle = "SELECT coalesce(bool_or(clock_timestamp() - state_change > '1 s'), false)::text FROM pg_stat_activity
                WHERE query LIKE 'LISTEN%' AND application_name LIKE 'tidewire%'";
    answered("a LISTEN connection that was idle for a second", async || {
        (cluster.text(idle).await == "true").then_some(())
    })
    .await;
    let ready = cluster.node(0).get("/readyz").await;
    assert_eq!(ready.status, 200);
}
