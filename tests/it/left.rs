//! A client that sends its close frame and reads nothing costs only itself: what it asked for holds nobody up.

use std::time::Duration;

use serde_json::json;
use sqlx::{Postgres, Transaction};

use crate::support::cluster::{TestCluster, TestNode};
use crate::support::raw::{Raw, frame, text};
use crate::support::{answered, eventually};

/// Longer than any test waits: only slowness itself would end the client.
const PATIENCE_MS: u64 = 3_600_000;
/// What the system's buffers between node and client hold at most, and more.
const MORE_THAN_BUFFERS: &str =
    "INSERT INTO orders (id, note) SELECT g, repeat('x', 100000) FROM generate_series(1, 300) g";
/// Nothing was delivered for so long: the client takes nothing.
const STILL: Duration = Duration::from_millis(500);

/// What the client asks before it leaves, and the table whose lock makes the question wait.
const QUESTIONS: &[(&str, &str)] = &[("subscribe", "tidewire.tracked_tables"), ("sync", "tidewire.event_log")];

async fn lock(holder: &mut Transaction<'_, Postgres>, table: &str) {
    let lock = format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
    sqlx::query(sqlx::AssertSqlSafe(lock)).execute(&mut **holder).await.unwrap();
}

/// Waits until a client's question waits for the lock.
async fn waits(cluster: &TestCluster, question: &str) {
    let words = if question == "sync" { "WITH asked AS" } else { "tidewire.table_text" };
    let waiting = format!(
        "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%{words}%'
            AND datname = current_database()"
    );
    answered("the question waits", async || (cluster.text(&waiting).await != "0").then_some(())).await;
}

/// Waits until a client that reads nothing has been sent all that it takes.
async fn full(node: &TestNode) {
    let delivered = &node.metrics().frames_delivered_total;
    let (mut last, mut since) = (delivered.get(), tokio::time::Instant::now());
    eventually("the client takes no more", || {
        if delivered.get() != last {
            (last, since) = (delivered.get(), tokio::time::Instant::now());
        }
        last > 0 && since.elapsed() > STILL
    })
    .await;
}

/// Found in review: it was not polled any more, and for 30 seconds nobody's `sync` was answered and nobody could subscribe.
#[tokio::test]
async fn a_client_that_leaves_without_reading_holds_nobody_up() {
    for (question, table) in QUESTIONS {
        let cluster = TestCluster::with(1, |settings| settings.slow_after_ms = Some(PATIENCE_MS)).await;
        let node = cluster.node(0);
        let bearer = format!("Bearer {}", cluster.key);
        let mut open = cluster.pool.begin().await.unwrap();
        let running: String =
            sqlx::query_scalar("SELECT pg_current_xact_id()::text").fetch_one(&mut *open).await.unwrap();
        let mut other = node.wire().await;

        let mut client = Raw::connect(node.address(), "/v1/ws", &[("authorization", &bearer)]).await;
        client.send(&text(r#"{"type":"subscribe","id":"o","tables":["orders"]}"#)).await;
        for kind in ["welcome", "subscribed", "caught_up"] {
            assert_eq!(client.json().await["type"], kind);
        }
        let mut holder = cluster.pool.begin().await.unwrap();
        if *question == "sync" {
            // It is asked for again and again while the transaction runs.
            client.send(&text(&json!({"type": "sync", "tx": running}).to_string())).await;
            eventually("it is asked for", || node.metrics().sync_queries_total.get() > 0).await;
        } else {
            lock(&mut holder, table).await;
            client.send(&text(r#"{"type":"subscribe","id":"p","tables":["orders"]}"#)).await;
            waits(&cluster, question).await;
        }
        cluster.run(MORE_THAN_BUFFERS).await;
        full(node).await;
        if *question == "sync" {
            lock(&mut holder, table).await;
        }
        waits(&cluster, question).await;
        client.send(&frame(0x88, &1_000_u16.to_be_bytes())).await;
        eventually("its close frame was read", || node.metrics().closes_total.with_label_values(&["1000"]).get() == 1)
            .await;
        assert_eq!(node.metrics().subscriptions.get(), 0, "what served it was let go of");
        holder.rollback().await.unwrap();

        let done = cluster.text("SELECT pg_current_xact_id()::text").await;
        other.say(json!({"type": "sync", "tx": done})).await;
        assert_eq!(other.expect("synced").await["tx"], done, "{question}");
        other.subscribe("o", "orders").await;
        // It has two seconds for what is on its way, then it is cut off.
        let connections = node.metrics().connections.with_label_values(&["websocket"]);
        eventually("it is gone", || connections.get() == 1).await;
        assert_eq!(node.metrics().slow_consumers_total.get(), 0);
        open.rollback().await.unwrap();
    }
}
