//! A `subscribe` that waits for Postgres is answered within the time that the protocol says, whatever it waits for in turn.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::answered;
use crate::support::cluster::TestCluster;

/// As docs/PROTOCOL.md has it.
const PROMISED: Duration = Duration::from_secs(10);
/// The first of two answers takes as long.
const FIRST: Duration = Duration::from_secs(5);

/// How Postgres is asked about tables by name.
const QUESTION: &str = "SELECT %";
const LOCK: &str = "LOCK TABLE tidewire.tracked_tables IN ACCESS EXCLUSIVE MODE";

/// Found in review: every question had ten seconds of its own.
#[tokio::test]
async fn two_slow_answers_do_not_add_up() {
    // Asked before: a connection that does not know the question yet asks in two steps, with a gap between them.
    let cluster = TestCluster::with(1, |settings| settings.pool_size = Some(2)).await;
    cluster.run("CREATE TABLE parcels (id bigint PRIMARY KEY)").await;
    cluster.run("SELECT tidewire.track('parcels')").await;
    let mut wire = cluster.node(0).wire().await;
    wire.subscribe("known", "orders").await;
    wire.expect("caught_up").await;
    let waiting = async |what: &str, query: &str| {
        let asked = format!(
            "SELECT count(*)::text FROM pg_stat_activity
             WHERE wait_event_type = 'Lock' AND datname = current_database() AND query LIKE '{query}'"
        );
        answered(what, async || (cluster.text(&asked).await != "0").then_some(())).await;
    };
    let mut first = cluster.pool.begin().await.unwrap();
    sqlx::query(LOCK).execute(&mut *first).await.unwrap();
    let began = Instant::now();
    wire.say(json!({"type": "subscribe", "id": "s", "tables": ["orders", "parcels"]})).await;
    waiting("the question about the first table", QUESTION).await;
    // In the queue behind that question, before the next.
    let mut second = cluster.pool.acquire().await.unwrap();
    let locking = tokio::spawn(async move {
        sqlx::raw_sql("BEGIN").execute(&mut *second).await.unwrap();
        sqlx::query(LOCK).execute(&mut *second).await.unwrap();
        second
    });
    waiting("the lock behind it", "LOCK TABLE%").await;
    tokio::time::sleep_until((began + FIRST).into()).await;
    first.rollback().await.unwrap();
    let mut second = locking.await.unwrap();
    waiting("the question about the second table", QUESTION).await;

    let (code, error) = wire.error().await;
    assert_eq!((code.as_str(), &error["retry"]), ("unavailable", &json!("backoff")));
    let took = began.elapsed();
    assert!(took >= PROMISED - Duration::from_millis(100) && took < PROMISED + FIRST / 2, "{took:?}");
    sqlx::raw_sql("ROLLBACK").execute(&mut *second).await.unwrap();
    // It is there again as soon as Postgres is.
    wire.subscribe("s", "orders").await;
}
