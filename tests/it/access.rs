//! What a connection may see and what it counts against are those of the key that it last sent, and of no other.

use std::time::Duration;

use serde_json::{Value, json};
use tidewire::auth::key::ApiKey;
use tidewire::auth::store;

use crate::support::cluster::TestCluster;
use crate::support::eventually;
use crate::support::wire::{Heard, Wire};

fn auth(key: &ApiKey) -> Value {
    json!({"type": "auth", "token": key.expose()})
}

fn subscribe(id: &str, table: &str) -> Value {
    json!({"type": "subscribe", "id": id, "tables": [table]})
}

/// A cluster of one node with the tables `orders` and `secrets`.
async fn cluster() -> TestCluster {
    let cluster = TestCluster::start(1).await;
    cluster
        .run("CREATE TABLE secrets (id bigint PRIMARY KEY, status text); SELECT tidewire.track('public.secrets')")
        .await;
    cluster
}

/// Waits for `events` of the subscription; gives them. Fails when a subscription among `silent` has any.
async fn events(wire: &mut Wire, id: &str, silent: &[&str]) -> Vec<Value> {
    loop {
        let message = wire.message().await;
        if message["type"] == "events" {
            assert!(!silent.contains(&message["id"].as_str().unwrap()), "{message}");
            if message["id"] == id {
                return message["events"].as_array().unwrap().clone();
            }
        }
    }
}

/// Who asks under the first key and changes to the second. `asks`: subscriptions of one write with the `auth`; `refused`:
/// those that end with `forbidden`, the others go on.
struct Change {
    name: &'static str,
    running: &'static [(&'static str, &'static str)],
    at_once: &'static [(&'static str, &'static str)],
    second: &'static str,
    refused: &'static [&'static str],
    goes_on: &'static [&'static str],
}

const CHANGES: &[Change] = &[
    Change {
        name: "asked for in the same write",
        running: &[],
        at_once: &[("s", "secrets"), ("o", "orders")],
        second: r#"{"tables": [{"table": "public.orders"}]}"#,
        refused: &["s"],
        goes_on: &["o"],
    },
    Change {
        name: "running",
        running: &[("s", "secrets"), ("o", "orders")],
        at_once: &[],
        second: r#"{"tables": [{"table": "public.orders"}]}"#,
        refused: &["s"],
        goes_on: &["o"],
    },
    Change {
        name: "running, another operation only",
        running: &[("s", "secrets"), ("o", "orders")],
        at_once: &[("o2", "orders")],
        second: r#"{"tables": [{"table": "public.orders", "ops": ["INSERT"]}]}"#,
        refused: &["s"],
        goes_on: &["o", "o2"],
    },
    Change {
        name: "a glob is narrowed, not ended",
        running: &[("g", "public.*")],
        at_once: &[],
        second: r#"{"tables": [{"table": "public.orders"}]}"#,
        refused: &[],
        goes_on: &["g"],
    },
    Change {
        name: "the same scopes",
        running: &[("o", "orders"), ("s", "secrets")],
        at_once: &[("s2", "secrets")],
        second: r#"{"tables": [{"table": "*"}], "history": true}"#,
        refused: &[],
        goes_on: &["o", "s", "s2"],
    },
];

#[tokio::test]
async fn what_the_new_key_may_not_read_ends_and_the_rest_goes_on_by_its_own_life() {
    let cluster = cluster().await;
    for (number, change) in (1_i64..).zip(CHANGES) {
        let first = cluster.key(json!({"tables": [{"table": "*"}], "history": true})).await;
        let second = cluster.key(serde_json::from_str(change.second).unwrap()).await;
        let node = cluster.node(0);
        let mut wire = node.wire_of(first.expose()).await;
        for (id, table) in change.running {
            wire.say(subscribe(id, table)).await;
            wire.find("caught_up").await;
        }
        let mut write: Vec<Value> = change.at_once.iter().map(|(id, table)| subscribe(id, table)).collect();
        write.extend([auth(&second), json!({"type": "ping", "t": 1})]);
        wire.say_at_once(&write).await;
        // Answered once the new key is in force: nothing that follows an `auth` is read before.
        let mut refused = Vec::new();
        let mut ponged = false;
        // What was asked for in the same write begins some time after the pong.
        let mut begins: Vec<&str> =
            change.at_once.iter().map(|(id, _)| *id).filter(|id| change.goes_on.contains(id)).collect();
        while refused.len() < change.refused.len() || !ponged || !begins.is_empty() {
            let message = wire.message().await;
            match message["type"].as_str().unwrap() {
                "error" => {
                    assert_eq!(message["code"], "forbidden", "{}: {message}", change.name);
                    refused.push(message["id"].as_str().unwrap().to_owned());
                }
                "pong" => ponged = true,
                "caught_up" => begins.retain(|id| message["id"] != **id),
                "events" => panic!("{}: {message}", change.name),
                _ => {}
            }
        }
        assert_eq!(refused, change.refused, "{}", change.name);
        let count = |key: &ApiKey| node.context().limiter.connections(key.id()).0;
        assert_eq!((count(&first), count(&second)), (0, 1), "{}", change.name);

        // The first key's end is no concern of this connection.
        store::revoke(&cluster.pool.clone().into(), first.id()).await.unwrap();
        cluster.run(&format!("INSERT INTO secrets VALUES ({number}); INSERT INTO orders (id) VALUES ({number})")).await;
        for id in change.goes_on {
            let mut seen = events(&mut wire, id, change.refused).await;
            if change.refused.is_empty() && *id == "g" {
                seen.retain(|event| event["table"] == "public.secrets");
                assert_eq!(seen, [] as [Value; 0], "{}", change.name);
            }
            cluster.run(&format!("UPDATE orders SET note = 'x' WHERE id = {number}")).await;
            cluster.run(&format!("UPDATE secrets SET status = 'x' WHERE id = {number}")).await;
            cluster
                .run(&format!("DELETE FROM secrets WHERE id = {number}; INSERT INTO secrets VALUES ({number})"))
                .await;
            cluster
                .run(&format!("DELETE FROM orders WHERE id = {number}; INSERT INTO orders (id) VALUES ({number})"))
                .await;
        }
        store::revoke(&cluster.pool.clone().into(), second.id()).await.unwrap();
        assert_eq!(wire.closed().await, 4440, "{}", change.name);
    }
}

/// Masks and conditions: the position stays, the view is the new key's.
#[tokio::test]
async fn a_running_subscription_shows_what_the_new_key_may_see_from_the_next_event_on() {
    let cluster = cluster().await;
    let wide = cluster.key(json!({"tables": [{"table": "public.orders"}]})).await;
    let narrow = cluster
        .key(json!({"tables": [{"table": "public.orders", "hidden_columns": ["note"], "condition": "id > 10"}]}))
        .await;
    let mut wire = cluster.node(0).wire_of(wide.expose()).await;
    wire.subscribe("o", "orders").await;
    cluster.run("INSERT INTO orders (id, note) VALUES (1, 'seen')").await;
    assert_eq!(events(&mut wire, "o", &[]).await[0]["after"]["note"], "seen");
    wire.say_at_once(&[auth(&narrow), json!({"type": "ping"})]).await;
    wire.find("pong").await;
    cluster.run("INSERT INTO orders (id, note) VALUES (2, 'hidden'), (11, 'hidden')").await;
    let seen = events(&mut wire, "o", &[]).await;
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!((&seen[0]["key"]["id"], seen[0]["after"].get("note")), (&json!(11), None));
    // And wider again.
    wire.say_at_once(&[auth(&wide), json!({"type": "ping"})]).await;
    wire.find("pong").await;
    cluster.run("INSERT INTO orders (id, note) VALUES (3, 'seen')").await;
    let seen = events(&mut wire, "o", &[]).await;
    assert_eq!((seen.len(), &seen[0]["after"]["note"]), (1, &json!("seen")));
}

/// The subscription waits in Postgres while the key changes.
#[tokio::test]
async fn a_request_that_waits_for_postgres_is_answered_for_the_key_in_force() {
    let cluster = cluster().await;
    let node = cluster.node(0);
    let wide = cluster.key(json!({"tables": [{"table": "public.*"}]})).await;
    let narrow = cluster.key(json!({"tables": [{"table": "public.orders"}]})).await;
    // The node knows both keys: no question about them waits.
    drop(node.wire_of(narrow.expose()).await);
    let mut wire = node.wire_of(wide.expose()).await;
    node.proxy.stall();
    wire.say_at_once(&[subscribe("g", "ghost"), auth(&narrow), json!({"type": "ping"})]).await;
    wire.find("pong").await;
    node.proxy.restore();
    let (code, error) = wire.error().await;
    assert_eq!((code.as_str(), &error["id"]), ("forbidden", &json!("g")), "not what the old key would have been told");
}

#[tokio::test]
async fn a_connection_that_changes_its_key_counts_against_the_new_keys_limit() {
    let cluster = cluster().await;
    let node = cluster.node(0);
    let first = cluster.key(json!({"tables": [{"table": "public.orders"}]})).await;
    let full = cluster.key(json!({"tables": [{"table": "public.orders"}], "max_connections": 1})).await;
    let count = |key: &ApiKey| node.context().limiter.connections(key.id()).0;
    let there = node.wire_of(full.expose()).await;
    let mut wire = node.wire_of(first.expose()).await;
    wire.say(auth(&full)).await;
    assert_eq!(wire.error().await.0, "rate_limited");
    assert_eq!(wire.closed().await, 4429);
    eventually("the first key has its place back", || count(&first) == 0).await;

    // The same key again takes no second place; and a place that is free is taken, and the old one given back.
    let mut there = there;
    there.say_at_once(&[auth(&full), json!({"type": "ping"})]).await;
    there.expect("pong").await;
    assert_eq!(count(&full), 1);
    there.say_at_once(&[auth(&first), json!({"type": "ping"})]).await;
    there.expect("pong").await;
    assert_eq!((count(&full), count(&first)), (0, 1));
    let _free = node.wire_of(full.expose()).await;
}

/// A token that is not good ends a live connection as it ends one that begins.
#[tokio::test]
async fn what_follows_an_auth_is_read_after_its_outcome() {
    let cluster = cluster().await;
    let node = cluster.node(0);
    let good = cluster.key(json!({"tables": [{"table": "public.orders"}]})).await;
    for (token, closed) in [(good.expose(), None), ("cdc_none", Some(4401))] {
        for live in [false, true] {
            let mut wire = match live {
                true => node.wire_of(good.expose()).await,
                false => Wire::connect(&node.ws_url(), &[]).await.unwrap(),
            };
            let token = json!({"type": "auth", "token": token});
            wire.say_at_once(&[token, subscribe("o", "orders"), json!({"type": "ping"})]).await;
            match closed {
                None => {
                    wire.find("pong").await;
                    wire.find("caught_up").await;
                }
                Some(code) => {
                    assert_eq!(wire.error().await.0, "unauthenticated", "live: {live}");
                    assert_eq!(wire.closed().await, code, "live: {live}");
                }
            }
        }
    }
}

/// Control frames are nobody's way around the rate.
#[tokio::test]
async fn pings_and_pongs_of_websocket_count_as_messages() {
    use tokio_tungstenite::tungstenite::Message;
    for frame in [Message::Ping(Vec::new().into()), Message::Pong(Vec::new().into())] {
        let cluster = TestCluster::with(1, |settings| settings.messages_per_s = Some(10)).await;
        let mut wire = cluster.node(0).wire().await;
        let began = std::time::Instant::now();
        // The burst is taken at once; the ones above it take a second and a half.
        for _ in 0..65 {
            wire.send(frame.clone()).await;
        }
        wire.say(json!({"type": "ping"})).await;
        loop {
            match wire.hear().await {
                Heard::Message(message) if message["type"] == "pong" => break,
                Heard::Closed(code) => panic!("closed with {code}"),
                _ => {}
            }
        }
        assert!(began.elapsed() > Duration::from_secs(1), "{frame:?}: {:?}", began.elapsed());
    }
}
