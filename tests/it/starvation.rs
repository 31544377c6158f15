//! What clients can make a node ask Postgres keeps it neither from the log nor from its readiness.

use std::time::{Duration, Instant};

use serde_json::json;
use tidewire::auth::key::ApiKey;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use crate::support::cluster::{TestCluster, TestNode};
use crate::support::http::ask;
use crate::support::wire::{Heard, Wire};
use crate::support::{answered, eventually};

/// So much later than a node that nobody asks anything may one be that many ask. Less than the shortest time for which a question
/// that hangs keeps what it has.
const LATER: Duration = Duration::from_secs(2);

/// Inserts rows one by one; each must reach the bystander on the first node about when it reaches the control connection on the
/// second, and the first must stay ready.
async fn goes_on(cluster: &TestCluster, [bystander, control]: &mut [Wire; 2], ids: std::ops::Range<i64>, what: &str) {
    for id in ids {
        cluster.insert("orders", id..=id).await;
        let began = Instant::now();
        let timed = async |wire: &mut Wire| {
            let events = wire.find("events").await;
            assert_eq!(events["events"][0]["key"]["id"], id, "{what}");
            began.elapsed()
        };
        let (here, there) = tokio::join!(timed(bystander), timed(control));
        assert!(here < there + LATER, "{what}: {here:?}, elsewhere {there:?}");
        assert!(cluster.node(0).is_ready(), "{what}");
    }
}

async fn bystanders(cluster: &TestCluster) -> [Wire; 2] {
    [bystander(cluster.node(0)).await, bystander(cluster.node(1)).await]
}

async fn bystander(node: &TestNode) -> Wire {
    let mut wire = node.wire().await;
    wire.subscribe("o", "orders").await;
    wire.expect("caught_up").await;
    wire
}

/// What a client asks, and the table whose lock makes the question wait.
const QUESTIONS: &[(&str, &str)] =
    &[("keys", "tidewire.api_keys"), ("tickets", "tidewire.tickets"), ("tables", "tidewire.tracked_tables")];

/// Asks once, and waits for the answer as long as the connection stands.
async fn question(kind: &'static str, url: String, address: std::net::SocketAddr, key: String, number: usize) {
    match kind {
        "keys" => {
            let unknown = ApiKey::generate(&mut rand::rng());
            let mut request = url.into_client_request().unwrap();
            let bearer = format!("Bearer {}", unknown.expose());
            request.headers_mut().insert("authorization", bearer.parse().unwrap());
            let _ = tokio_tungstenite::connect_async(request).await;
        }
        "tickets" => {
            let bearer = format!("Bearer {key}");
            drop(ask("POST", address, "/v1/tickets", &[("authorization", &bearer)]).await);
        }
        _ => {
            let mut wire = Wire::connect(&url, &[("authorization", &format!("Bearer {key}"))]).await.unwrap();
            let table = format!("ghost{number}");
            wire.say(json!({"type": "subscribe", "id": "g", "tables": [table]})).await;
            let _ = tokio::time::timeout(Duration::from_secs(15), wire.find("error")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_of_clients_that_hang_keep_nobody_else_waiting() {
    for (kind, table) in QUESTIONS {
        let cluster = TestCluster::with(2, |settings| settings.pool_size = Some(2)).await;
        let node = cluster.node(0);
        let mut bystanders = bystanders(&cluster).await;
        let mut holder = cluster.pool.begin().await.unwrap();
        let lock = format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
        sqlx::query(sqlx::AssertSqlSafe(lock)).execute(&mut *holder).await.unwrap();
        let asking: Vec<_> = (0..40)
            .map(|number| {
                let (url, address, key) = (node.ws_url(), node.address(), cluster.key.clone());
                tokio::spawn(question(kind, url, address, key, number))
            })
            .collect();
        let hanging = "SELECT count(*)::text FROM pg_stat_activity
                       WHERE wait_event_type = 'Lock' AND datname = current_database()";
        answered("a question hangs", async || (cluster.text(hanging).await != "0").then_some(())).await;
        goes_on(&cluster, &mut bystanders, 1..40, kind).await;
        holder.rollback().await.unwrap();
        asking.into_iter().for_each(|task| task.abort());
    }
}

const SYNCING: usize = 60;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn syncs_that_wait_are_one_question_however_many_they_are() {
    let cluster = TestCluster::with(2, |settings| settings.pool_size = Some(2)).await;
    let node = cluster.node(0);
    let mut bystanders = bystanders(&cluster).await;
    let mut open = cluster.pool.begin().await.unwrap();
    let tx: String = sqlx::query_scalar("SELECT pg_current_xact_id()::text").fetch_one(&mut *open).await.unwrap();
    let mut wires = Vec::new();
    for _ in 0..SYNCING {
        let mut wire = node.wire().await;
        let sync = json!({"type": "sync", "tx": tx});
        wire.say_at_once(&vec![sync; 16]).await;
        wires.push(wire);
    }
    let (began, before) = (Instant::now(), node.metrics().sync_queries_total.get());
    goes_on(&cluster, &mut bystanders, 1..30, "sync").await;
    eventually("they are asked about", || node.metrics().sync_queries_total.get() > before + 30).await;
    goes_on(&cluster, &mut bystanders, 30..40, "sync").await;
    let (asked, waiting) = (node.metrics().sync_queries_total.get() - before, node.metrics().syncs_waiting.get());
    assert_eq!(waiting, i64::try_from(SYNCING * 16).unwrap());
    // Every 10 ms at most, whoever waits.
    let most = began.elapsed().as_millis() / 10 + 2;
    assert!(u128::from(asked) <= most, "{asked} statements in {:?}", began.elapsed());
    open.rollback().await.unwrap();
    for wire in &mut wires {
        for _ in 0..16 {
            assert_eq!(wire.find("synced").await["tx"], json!(tx));
        }
    }
    assert_eq!(node.metrics().syncs_waiting.get(), 0);
}

#[tokio::test]
async fn each_sync_gets_the_answer_of_its_own_transaction() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    let mut wire = bystander(node).await;
    let text = async |sql: &str| cluster.text(sql).await;
    let with_events = text("WITH made AS (INSERT INTO orders (id) VALUES (1)) SELECT pg_current_xact_id()::text").await;
    let without = text("SELECT pg_current_xact_id()::text").await;
    let mut open = cluster.pool.begin().await.unwrap();
    let running: String = sqlx::query_scalar("SELECT pg_current_xact_id()::text").fetch_one(&mut *open).await.unwrap();
    let future = (running.parse::<u64>().unwrap() + 1_000_000).to_string();
    let further = (running.parse::<u64>().unwrap() + 2_000_000).to_string();
    // One round has all of them.
    let asked = [&with_events, &without, &running, &future, &further];
    let syncs: Vec<_> = asked.iter().map(|tx| json!({"type": "sync", "tx": tx, "timeout_ms": 1500})).collect();
    wire.say_at_once(&syncs).await;
    let (mut synced, mut refused) = (Vec::new(), Vec::new());
    while synced.len() + refused.len() < asked.len() {
        match wire.hear().await {
            Heard::Message(message) if message["type"] == "synced" => {
                synced.push(message["tx"].as_str().unwrap().to_owned());
            }
            Heard::Message(message) if message["type"] == "error" => {
                refused.push(message["code"].as_str().unwrap().to_owned());
            }
            Heard::Message(_) => {}
            other => panic!("{other:?}"),
        }
    }
    synced.sort_by_key(|tx| tx.parse::<u64>().unwrap());
    assert_eq!(synced, [with_events, without]);
    assert_eq!(refused, ["bad_message", "bad_message", "unavailable"], "two in the future, one that runs");
    open.rollback().await.unwrap();
}
