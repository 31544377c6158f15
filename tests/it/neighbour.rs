//! A client costs only itself: dear conditions, and subscriptions that nobody reads.

use serde_json::{Value, json};
use tidewire::client::SubscribeOptions;

use crate::support::cluster::TestCluster;
use crate::support::eventually;
use crate::support::http::ask;

/// A condition that reads a text more than a hundred times before it is found to be true.
fn dear() -> String {
    let terms: Vec<String> = (0..130).map(|n| format!("note LIKE '%_q{n}_%'")).collect();
    format!("{} OR id > 0", terms.join(" OR "))
}

/// Every byte that may mean something in a URL written as `%XX`.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

const LARGE: &str = "INSERT INTO orders (id, note) SELECT 1, repeat('x', 1000000)";

fn keys(frame: &Value) -> Vec<i64> {
    frame["events"].as_array().unwrap().iter().map(|event| event["key"]["id"].as_i64().unwrap()).collect()
}

/// Found in review: one connection with sixty of these and one row of a megabyte, and for 15 seconds nobody on the node
/// got anything.
#[tokio::test]
async fn dear_filters_are_served_at_their_own_pace_and_miss_nothing() {
    const SUBSCRIPTIONS: usize = 6;
    let cluster = TestCluster::start(1).await;
    let mut wire = cluster.node(0).wire().await;
    for id in 0..SUBSCRIPTIONS {
        // Not equal, or they would be looked at once for all.
        let filter = format!("{} AND id <> {}", dear(), -1 - i64::try_from(id).unwrap());
        wire.say(json!({"type": "subscribe", "id": format!("s{id}"), "tables": ["orders"], "where": filter})).await;
        wire.find("caught_up").await;
    }
    let target = format!("/v1/sse?table=orders&where={}", encoded(&dear()));
    let bearer = format!("Bearer {}", cluster.key);
    let mut stream = ask("GET", cluster.node(0).address(), &target, &[("Authorization", &bearer)]).await;
    stream.expect("caught_up").await;
    let mut other = cluster.node(0).client("orders").await;

    cluster.run(LARGE).await;
    cluster.insert_each("orders", 2..=4).await;
    other.expect_keys(1..=4).await;
    let metrics = cluster.node(0).metrics();
    assert!(metrics.filters_passed_over_total.get() > 0, "nobody was passed over");
    let mut seen: Vec<Vec<i64>> = vec![Vec::new(); SUBSCRIPTIONS];
    while seen.iter().any(|keys| keys.len() < 4) {
        let frame = wire.find("events").await;
        let id: usize = frame["id"].as_str().unwrap()[1..].parse().unwrap();
        seen[id].extend(keys(&frame));
    }
    assert_eq!(seen, vec![vec![1, 2, 3, 4]; SUBSCRIPTIONS]);
    assert!(metrics.filter_thread_ms_total.get() > 0);

    let mut streamed = Vec::new();
    while streamed.len() < 4 {
        let event = stream.expect("events").await;
        streamed.extend(keys(&event.data));
    }
    assert_eq!(streamed, [1, 2, 3, 4]);
}

/// Found in review: while the first of two looked, the second one moved the turn past whoever came next; the session slept until
/// something else woke it.
#[tokio::test]
async fn a_cheap_subscription_behind_two_dear_ones_does_not_wait_for_them() {
    let cluster = TestCluster::start(1).await;
    let mut wire = cluster.node(0).wire().await;
    for id in ["dear 1", "dear 2"] {
        let filter = format!("{} AND note <> '{id}'", dear());
        wire.say(json!({"type": "subscribe", "id": id, "tables": ["orders"], "where": filter})).await;
        wire.find("caught_up").await;
    }
    wire.subscribe("cheap", "orders").await;
    wire.find("caught_up").await;
    cluster.run(LARGE).await;
    let mut order = Vec::new();
    while order.len() < 3 {
        order.push(wire.find("events").await["id"].as_str().unwrap().to_owned());
    }
    assert_eq!(order[0], "cheap", "{order:?}");
}

/// A condition of nearly the greatest length that compares each character of a text sixteen times in each of its terms.
fn hopeless() -> String {
    vec!["note LIKE '%_aa_a_a_a_a_a_b%'"; 110].join(" OR ")
}

/// The end of what no budget pays for, told alike on both transports; and nothing else ends.
#[tokio::test]
async fn a_transaction_that_is_too_expensive_ends_its_subscription_and_nothing_else() {
    let cluster = TestCluster::start(1).await;
    let mut wire = cluster.node(0).wire().await;
    wire.say(json!({"type": "subscribe", "id": "dear", "tables": ["orders"], "where": hopeless()})).await;
    let cursor = wire.find("caught_up").await["cursor"].clone();
    wire.subscribe("cheap", "orders").await;
    wire.find("caught_up").await;
    let target = format!("/v1/sse?table=orders&where={}", encoded(&hopeless()));
    let bearer = format!("Bearer {}", cluster.key);
    let mut stream = ask("GET", cluster.node(0).address(), &target, &[("Authorization", &bearer)]).await;
    stream.expect("caught_up").await;

    cluster.run("INSERT INTO orders (id, note) SELECT 1, repeat('a', 4000000)").await;
    assert_eq!(wire.find("events").await["id"], "cheap");
    let error = wire.find("error").await;
    let said = ["id", "code", "retry"].map(|name| error[name].as_str().unwrap().to_owned());
    assert_eq!(said, ["dear", "too_expensive", "never"], "{error}");

    let mut lines = Vec::new();
    while let Some(line) = stream.line().await {
        lines.push(line);
    }
    let text = lines.join("\n");
    assert!(text.contains("retry: 3600000\nevent: error\ndata: "), "{text}");
    assert!(text.contains(r#""code":"too_expensive""#) && text.contains(r#""retry":"never""#), "{text}");

    cluster.insert("orders", 2..=2).await;
    let events = wire.find("events").await;
    assert_eq!((&events["id"], keys(&events)), (&json!("cheap"), vec![2]), "the connection goes on");
    // Its position stays good, and its id is free.
    let subscribe = json!({"type": "subscribe", "id": "dear", "tables": ["orders"], "from": {"cursor": cursor}});
    wire.say(subscribe).await;
    let mut seen = Vec::new();
    while seen.len() < 2 {
        seen.extend(keys(&wire.find("events").await));
    }
    assert_eq!(seen, [1, 2]);
}

/// The same from the log: it is long gone from memory.
#[tokio::test]
async fn a_dear_filter_catches_up_from_the_log() {
    let cluster = TestCluster::with(1, |settings| settings.ring_bytes = Some(1 << 20)).await;
    let cursor = cluster.node(0).client("orders").await.disconnect().await;
    cluster.run(LARGE).await;
    cluster.insert_each("orders", 2..=3).await;
    cluster.run("INSERT INTO orders (id, note) SELECT g, repeat('y', 400000) FROM generate_series(4, 10) g").await;
    let node = cluster.node(0);
    eventually("the first row has left the ring", || node.context().hub.ring_base() > cursor.seq).await;
    let subscribe = SubscribeOptions::tables(["orders"]).filter(dear()).from(cursor);
    node.client_of(subscribe).await.expect_keys(1..=10).await;
}

/// Found in review: 2,560 subscriptions without a filter, each with an id of its own, and twelve rows of 100 KB: 2.9 GB.
#[tokio::test]
async fn subscriptions_that_nobody_reads_share_their_frames_whatever_their_ids() {
    const LIMIT: usize = 1 << 20;
    let cluster = TestCluster::with(1, |settings| settings.frames_bytes = Some(LIMIT)).await;
    let mut wires = Vec::new();
    for connection in 0..3 {
        let mut wire = cluster.node(0).wire().await;
        for id in 0..20 {
            wire.subscribe(&format!("{connection} {id}"), "orders").await;
            wire.find("caught_up").await;
        }
        wires.push(wire);
    }
    let metrics = cluster.node(0).metrics();
    assert_eq!((metrics.subscriptions.get(), metrics.filter_groups.get()), (60, 1));
    let mut other = cluster.node(0).client("orders").await;
    for id in 1..=12 {
        cluster.run(&format!("INSERT INTO orders (id, note) SELECT {id}, repeat('x', 100000)")).await;
    }
    cluster.insert("orders", 13..=13).await;
    other.expect_keys(1..=13).await;
    assert!(metrics.frames_bytes.get() <= i64::try_from(LIMIT).unwrap(), "{}", metrics.frames_bytes.get());
    for (connection, wire) in wires.iter_mut().enumerate() {
        let mut rows = std::collections::BTreeMap::<String, Vec<i64>>::new();
        while rows.values().map(Vec::len).sum::<usize>() < 20 * 13 {
            let frame = wire.find("events").await;
            let id = frame["id"].as_str().unwrap().to_owned();
            assert!(id.starts_with(&format!("{connection} ")), "a frame of another connection's subscription: {id}");
            rows.entry(id).or_default().extend(keys(&frame));
        }
        assert!(rows.values().all(|keys| *keys == (1..=13).collect::<Vec<_>>()), "{rows:?}");
    }
}
