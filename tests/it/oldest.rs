//! `from: "oldest"`: everything that the log still has, on every transport.

use serde_json::{Value, json};
use tidewire::client::{Source, Start, SubscribeOptions};

use crate::support::cluster::TestCluster;
use crate::support::eventually;
use crate::support::http::ask;
use crate::support::wire::Wire;

fn oldest(id: &str, filter: Option<&str>) -> Value {
    json!({"type": "subscribe", "id": id, "tables": ["orders"], "where": filter, "from": "oldest"})
}

fn ids(events: &Value) -> Vec<i64> {
    events.as_array().unwrap().iter().map(|event| event["key"]["id"].as_i64().unwrap()).collect()
}

/// What comes until `caught_up`, and the `subscribed`.
async fn replay(wire: &mut Wire, filter: Option<&str>) -> (Value, Vec<i64>) {
    wire.say(oldest("o", filter)).await;
    let subscribed = wire.expect("subscribed").await;
    let (mut seen, mut position) = (Vec::new(), subscribed["cursor"].clone());
    loop {
        let message = wire.message().await;
        match message["type"].as_str().unwrap() {
            "events" => {
                assert_eq!(message["prev"], position);
                position = message["cursor"].clone();
                seen.extend(ids(&message["events"]));
            }
            "caught_up" => break,
            _ => panic!("{message}"),
        }
    }
    wire.say(json!({"type": "unsubscribe", "id": "o"})).await;
    wire.expect("unsubscribed").await;
    (subscribed, seen)
}

/// What the log has, by the rows of each of its transactions, and what of it is gone.
struct Log {
    name: &'static str,
    transactions: &'static [std::ops::RangeInclusive<i64>],
    /// Seqs that retention took.
    gone_through: i64,
    filter: Option<&'static str>,
    seen: &'static [i64],
}

const LOGS: &[Log] = &[
    Log { name: "empty", transactions: &[], gone_through: 0, filter: None, seen: &[] },
    Log { name: "whole", transactions: &[1..=1, 2..=4], gone_through: 0, filter: None, seen: &[1, 2, 3, 4] },
    Log { name: "filtered", transactions: &[1..=1, 2..=4], gone_through: 0, filter: Some("id > 2"), seen: &[3, 4] },
    // Nothing tells whether a transaction's first rows are gone, so the first that is left is passed over.
    Log { name: "trimmed", transactions: &[1..=1, 2..=2, 3..=4], gone_through: 1, filter: None, seen: &[3, 4] },
    Log { name: "cut", transactions: &[1..=4, 5..=6, 7..=8], gone_through: 2, filter: None, seen: &[5, 6, 7, 8] },
];

#[tokio::test]
async fn every_transport_begins_with_the_oldest_whole_transaction() {
    for log in LOGS {
        let cluster = TestCluster::start(1).await;
        let node = cluster.node(0);
        for rows in log.transactions {
            cluster.insert("orders", rows.clone()).await;
        }
        let end = log.transactions.last().map_or(0, |rows| *rows.end());
        node.reached(end as u64).await;
        if log.gone_through > 0 {
            // The node has not noticed yet when the first client asks.
            cluster.run(&format!("DELETE FROM tidewire.event_log WHERE seq <= {}", log.gone_through)).await;
        }
        let mut wire = node.wire().await;
        let (subscribed, seen) = replay(&mut wire, log.filter).await;
        if log.gone_through == 0 {
            assert_eq!(seen, log.seen, "{}", log.name);
        } else {
            // What is in memory may be shown, as long as no transaction is torn.
            assert!(seen.ends_with(log.seen), "{}: {seen:?}", log.name);
            eventually("the node has noticed", || {
                node.context().hub.log_oldest().is_some_and(|oldest| oldest as i64 > log.gone_through)
            })
            .await;
            assert_eq!(replay(&mut wire, log.filter).await.1, log.seen, "{}", log.name);
        }
        assert_eq!(subscribed["recovered"], Value::Null, "{}", log.name);
        let source = subscribed["source"].as_str().unwrap();
        assert_eq!(source, if end == 0 { "live" } else { "memory" }, "{}: it is all in the ring", log.name);

        let filter = log.filter.map(|filter| filter.replace(' ', "%20").replace('>', "%3E"));
        let filter = filter.map_or_else(String::new, |filter| format!("&where={filter}"));
        let bearer = format!("Bearer {}", cluster.key);
        let target = format!("/v1/sse?table=orders&from=oldest{filter}");
        let mut stream = ask("GET", node.address(), &target, &[("authorization", &bearer)]).await;
        let mut seen = Vec::new();
        loop {
            let event = stream.event().await.expect("the stream goes on");
            match event.name.as_str() {
                "events" => seen.extend(ids(&event.data["events"])),
                "caught_up" => break,
                _ => panic!("{event:?}"),
            }
        }
        assert_eq!(seen, log.seen, "{} by SSE", log.name);

        let mut options = SubscribeOptions::tables(["orders"]).from(Start::Oldest);
        if let Some(filter) = log.filter {
            options = options.filter(filter);
        }
        let mut client = node.client_of(options).await;
        client.expect_keys(log.seen.iter().copied()).await;
        client.caught_up().await;
        // And on, live.
        cluster.insert("orders", 100..=100).await;
        client.expect_keys([100]).await;
    }
}

#[tokio::test]
async fn what_memory_has_no_more_comes_from_the_log() {
    const ROWS: i64 = 2_000;
    let cluster = TestCluster::with(1, |settings| settings.ring_bytes = Some(1 << 20)).await;
    let node = cluster.node(0);
    for first in (1..=ROWS).step_by(500) {
        let rows = format!("generate_series({first}, {})", first + 499);
        cluster.run(&format!("INSERT INTO orders (id, note) SELECT g, repeat('x', 1200) FROM {rows} g")).await;
    }
    node.reached(ROWS as u64).await;
    eventually("the ring has let go of the beginning", || node.context().hub.ring_base() > 10).await;
    let mut wire = node.wire().await;
    let (subscribed, seen) = replay(&mut wire, None).await;
    assert_eq!((&subscribed["source"], &subscribed["recovered"]), (&json!("history"), &Value::Null));
    assert_eq!(seen, (1..=ROWS).collect::<Vec<_>>());
    let client = node.client_of(SubscribeOptions::tables(["orders"]).from(Start::Oldest)).await;
    assert_eq!(client.subscription.source(), Source::History);
}

#[tokio::test]
async fn a_key_without_history_begins_now_or_at_a_cursor() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    cluster.insert("orders", 1..=2).await;
    node.reached(2).await;
    for (scopes, allowed) in [
        (json!({"tables": [{"table": "public.orders"}]}), false),
        (json!({"tables": [{"table": "public.orders"}], "history": true}), true),
    ] {
        let key = cluster.key(scopes).await;
        let mut wire = node.wire_of(key.expose()).await;
        wire.say(oldest("o", None)).await;
        let bearer = format!("Bearer {}", key.expose());
        let target = "/v1/sse?table=orders&from=oldest";
        let mut stream = ask("GET", node.address(), target, &[("authorization", &bearer)]).await;
        if allowed {
            wire.expect("subscribed").await;
            assert_eq!(ids(&stream.expect("events").await.data["events"]), [1, 2]);
        } else {
            let (code, error) = wire.error().await;
            assert_eq!((code.as_str(), &error["id"]), ("forbidden", &json!("o")));
            assert!(error["message"].as_str().unwrap().contains("history"), "{error}");
            assert_eq!(stream.expect("error").await.data["code"], "forbidden");
        }
        // A position is what a client has kept: it needs no scope.
        wire.say(json!({"type": "subscribe", "id": "c", "tables": ["orders"], "from": {"cursor": "x"}})).await;
        wire.find("resync_required").await;
    }
}
