//! The wire protocol as `docs/PROTOCOL.md` promises it: every refusal has its code, and what is promised to come, comes.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidewire::config::Settings;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use crate::support::cluster::TestCluster;
use crate::support::eventually;
use crate::support::raw::{Raw, frame, text};
use crate::support::wire::{Heard, Wire};

async fn one(edit: impl Fn(&mut Settings)) -> TestCluster {
    TestCluster::with(1, edit).await
}

/// Subscribes with these fields beside type and id; gives the answer.
async fn try_subscribe(wire: &mut Wire, fields: Value) -> Value {
    let mut message = json!({"type": "subscribe", "id": "o"});
    message.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    wire.say(message).await;
    wire.message().await
}

#[tokio::test]
async fn welcome_tells_version_node_and_limits() {
    let cluster = one(|settings| {
        settings.message_bytes = Some(10_000);
        settings.heartbeat_ms = Some(12_345);
    })
    .await;
    let bearer = format!("Bearer {}", cluster.key);
    let mut wire = Wire::connect(&cluster.node(0).ws_url(), &[("authorization", &bearer)]).await.unwrap();
    let welcome = wire.message().await;
    assert_eq!((&welcome["type"], &welcome["version"]), (&json!("welcome"), &json!(1)));
    assert_eq!((&welcome["node"], &welcome["heartbeat_ms"]), (&json!("n0"), &json!(12_345)));
    let limits = json!({"message_bytes": 10_000, "subscriptions": 128, "filter_bytes": 4096, "messages_per_s": 20, "frame_bytes": 1 << 20});
    assert_eq!(welcome["limits"], limits);
    assert_eq!(welcome["window"]["history_ms"], 86_400_000);
    assert!(welcome["connection"].as_str().is_some_and(|name| name.starts_with("c-")));
}

#[tokio::test]
async fn what_is_no_message_closes_with_4400() {
    let cluster = one(|_| {}).await;
    for text in [
        "{",
        "",
        "null",
        "[]",
        "{\"type\":\"dance\"}",
        "{\"id\":\"x\"}",
        "{\"type\":\"subscribe\",\"id\":\"\",\"tables\":[\"orders\"]}",
        "{\"type\":\"subscribe\",\"id\":7,\"tables\":[\"orders\"]}",
        "{\"type\":\"unsubscribe\"}",
        "{\"type\":\"sync\"}",
    ] {
        let mut wire = cluster.node(0).wire().await;
        wire.send(Message::text(text)).await;
        let (code, error) = wire.error().await;
        assert_eq!((code.as_str(), &error["retry"]), ("bad_message", &json!("never")), "{text}");
        assert_eq!(wire.closed().await, 4400, "{text}");
    }
}

#[tokio::test]
async fn binary_oversized_and_broken_messages_close_with_the_codes_of_websocket() {
    let cluster = one(|settings| settings.message_bytes = Some(2_000)).await;
    let broken = Frame::message(vec![0xff_u8, 0xfe], OpCode::Data(Data::Text), true);
    for (message, close) in [
        (Message::binary(vec![1, 2, 3]), 1003),
        (Message::text("x".repeat(2_001)), 1009),
        (Message::text("x".repeat(100_000)), 1009),
        (Message::Frame(broken), 1007),
    ] {
        let mut wire = cluster.node(0).wire().await;
        wire.send(message).await;
        assert_eq!(wire.closed().await, close);
    }
    // The limit itself is allowed.
    let mut wire = cluster.node(0).wire().await;
    let padding = 2_000 - json!({"type": "ping", "t": ""}).to_string().len();
    wire.say(json!({"type": "ping", "t": "x".repeat(padding)})).await;
    wire.expect("pong").await;
}

#[tokio::test]
async fn bad_credentials_are_refused_before_the_upgrade() {
    let cluster = one(|_| {}).await;
    let url = cluster.node(0).ws_url();
    let bad = format!("Bearer {}x", cluster.key);
    for value in [bad.as_str(), "Bearer", "Bearer ", "Bearer cdc_no", "Basic cm9sZTpwdw==", "Digest x"] {
        let (status, body) = Wire::connect(&url, &[("authorization", value)]).await.unwrap_err();
        assert_eq!(status, 401, "{value}: {body}");
        assert!(!body.contains(&cluster.key), "{body}");
    }
    for name in ["key", "api_key", "token", "access_token"] {
        let (status, body) = Wire::connect(&format!("{url}?{name}={}", cluster.key), &[]).await.unwrap_err();
        assert_eq!(status, 400, "{body}");
        assert!(body.contains("Authorization: Bearer"), "{body}");
    }
}

#[tokio::test]
async fn without_a_credential_the_server_says_nothing_and_waits_for_auth() {
    let cluster = one(|settings| settings.auth_timeout_ms = Some(60_000)).await;
    let url = cluster.node(0).ws_url();
    let mut wire = Wire::connect(&url, &[]).await.unwrap();
    wire.say(json!({"type": "auth", "token": cluster.key})).await;
    assert_eq!(wire.message().await["type"], "welcome", "the first word");
    wire.subscribe("o", "orders").await;

    for (message, code) in [
        (json!({"type": "auth", "token": "cdc_wrong"}), "unauthenticated"),
        (json!({"type": "auth"}), "unauthenticated"),
        (json!({"type": "auth", "role": "me", "password": "pw"}), "unsupported"),
        (json!({"type": "ping"}), "unauthenticated"),
        (json!({"type": "subscribe", "id": "o", "tables": ["orders"]}), "unauthenticated"),
        (json!({"type": "dance"}), "unauthenticated"),
    ] {
        let mut wire = Wire::connect(&url, &[]).await.unwrap();
        wire.say(message.clone()).await;
        assert_eq!(wire.error().await.0, code, "{message}");
        assert_eq!(wire.closed().await, 4401, "{message}");
    }
}

#[tokio::test]
async fn silence_after_connect_closes_with_4408() {
    let cluster = one(|settings| settings.auth_timeout_ms = Some(100)).await;
    let mut wire = Wire::connect(&cluster.node(0).ws_url(), &[]).await.unwrap();
    assert_eq!(wire.closed().await, 4408);
}

#[tokio::test]
async fn a_client_that_does_not_answer_pings_is_closed_with_4012() {
    let cluster = one(|settings| settings.heartbeat_ms = Some(200)).await;
    let node = cluster.node(0);
    let mut answering = node.wire().await;
    let mut silent = node.wire().await;
    let closed = || node.metrics().closes_total.with_label_values(&["4012"]).get();
    // The library answers pings when it is read: this one is, the other is not.
    while closed() == 0 {
        assert!(matches!(answering.hear().await, Heard::Ping));
    }
    assert_eq!(silent.closed().await, 4012);
    answering.say(json!({"type": "ping"})).await;
    answering.expect("pong").await;
}

#[tokio::test]
async fn a_client_that_accepts_nothing_is_closed_with_4008() {
    let cluster = one(|settings| settings.slow_after_ms = Some(2_000)).await;
    let node = cluster.node(0);
    let mut wire = node.wire().await;
    wire.subscribe("o", "orders").await;
    for start in (1..).step_by(200) {
        if node.metrics().slow_consumers_total.get() + node.metrics().closes_total.with_label_values(&["4008"]).get()
            > 0
        {
            break;
        }
        assert!(start < 40_000, "the sockets took everything");
        let rows = format!("FROM generate_series({start}, {}) g", start + 199);
        cluster.run(&format!("INSERT INTO orders (id, note) SELECT g, repeat('x', 4000) {rows}")).await;
    }
    assert_eq!(wire.closed().await, 4008);
    eventually("it was counted", || node.metrics().slow_consumers_total.get() == 1).await;
}

#[tokio::test]
async fn a_refused_subscription_leaves_the_connection_and_the_others_alone() {
    let cluster = one(|settings| settings.messages_per_s = Some(1_000)).await;
    cluster.run("CREATE TABLE untracked (id int)").await;
    let mut wire = cluster.node(0).wire().await;
    wire.subscribe("good", "orders").await;
    wire.expect("caught_up").await;
    let long = format!("note = '{}'", "x".repeat(5_000));
    for (fields, code) in [
        (json!({"tables": ["nowhere"]}), "unknown_table"),
        (json!({"tables": ["Orders"]}), "unknown_table"),
        (json!({"tables": ["untracked"]}), "not_tracked"),
        (json!({"tables": ["orders", "nowhere"]}), "unknown_table"),
        (json!({"tables": []}), "bad_message"),
        (json!({"tables": ["a.b.c.d"]}), "bad_message"),
        (json!({"tables": ["orders"], "ops": ["MERGE"]}), "bad_message"),
        (json!({"tables": ["orders"], "where": "status = "}), "bad_filter"),
        (json!({"tables": ["orders"], "where": "no_such_column = 1"}), "bad_filter"),
        (json!({"tables": ["orders"], "where": "id IN (SELECT 1)"}), "bad_filter"),
        (json!({"tables": ["orders"], "where": long}), "too_large"),
        (json!({"tables": ["orders"], "columns": ["no_such_column"]}), "bad_filter"),
        (json!({"tables": ["*"], "where": "id = 1"}), "bad_filter"),
        (json!({"tables": ["public.*"], "columns": ["id"]}), "bad_filter"),
        (json!({"tables": ["orders"], "from": "snapshot"}), "unsupported"),
        (json!({"tables": ["orders"], "from": {"snapshot_if_gone": "gone"}}), "unsupported"),
    ] {
        let answer = try_subscribe(&mut wire, fields.clone()).await;
        assert_eq!((&answer["type"], &answer["code"]), (&json!("error"), &json!(code)), "{fields}: {answer}");
        assert_eq!(answer["id"], "o", "{fields}");
        assert!(answer["message"].as_str().is_some_and(|message| message.len() > 10), "{answer}");
    }
    let bad = try_subscribe(&mut wire, json!({"tables": ["orders"], "where": "id = 1 AND status ~ 'x'"})).await;
    assert!(bad["message"].as_str().unwrap().chars().any(|c| c.is_ascii_digit()), "a position: {bad}");
    // The id is free after an error that names it.
    assert_eq!(try_subscribe(&mut wire, json!({"tables": ["orders"]})).await["type"], "subscribed");
    cluster.insert("orders", 1..=1).await;
    let mut ids = [wire.find("events").await["id"].clone(), wire.find("events").await["id"].clone()];
    ids.sort_by_key(Value::to_string);
    assert_eq!(ids, ["good", "o"]);
}

#[tokio::test]
async fn snapshot_if_gone_with_a_good_cursor_is_a_resume() {
    let cluster = one(|_| {}).await;
    let mut wire = cluster.node(0).wire().await;
    let cursor = wire.subscribe("a", "orders").await["cursor"].clone();
    cluster.insert("orders", 1..=1).await;
    wire.find("events").await;
    let answer = try_subscribe(&mut wire, json!({"tables": ["orders"], "from": {"snapshot_if_gone": cursor}})).await;
    assert_eq!((&answer["recovered"], &answer["cursor"]), (&json!(true), &cursor), "{answer}");
}

#[tokio::test]
async fn what_a_key_may_not_read_is_forbidden_by_name() {
    let cluster = one(|_| {}).await;
    cluster.run("CREATE TABLE secrets (id int PRIMARY KEY); SELECT tidewire.track('secrets')").await;
    let scopes = json!({"tables": [{"table": "public.orders", "ops": ["INSERT"], "hidden_columns": ["note"]}]});
    let key = cluster.key(scopes).await;
    let mut wire = cluster.node(0).wire_of(key.expose()).await;
    for (fields, named) in [
        (json!({"tables": ["secrets"]}), "public.secrets"),
        (json!({"tables": ["no_such_table"]}), "public.no_such_table"),
        (json!({"tables": ["event:x"]}), "event:x"),
        (json!({"tables": ["orders"], "ops": ["DELETE"]}), "DELETE"),
    ] {
        let answer = try_subscribe(&mut wire, fields.clone()).await;
        assert_eq!(answer["code"], "forbidden", "{fields}: {answer}");
        assert!(answer["message"].as_str().unwrap().contains(named), "{answer}");
    }
    // A glob yields what the key may read.
    assert_eq!(try_subscribe(&mut wire, json!({"tables": ["*"]})).await["type"], "subscribed");
    wire.expect("caught_up").await;
    cluster.run("INSERT INTO secrets VALUES (1); INSERT INTO orders (id, note) VALUES (1, 'hush'); UPDATE orders SET status = 'x'").await;
    let frame = wire.find("events").await;
    let events = frame["events"].as_array().unwrap();
    assert_eq!((events.len(), &events[0]["table"], &events[0]["op"]), (1, &json!("public.orders"), &json!("INSERT")));
    assert!(!frame.to_string().contains("hush"));
}

#[tokio::test]
async fn a_duplicate_id_and_one_too_many_are_refused() {
    let cluster = one(|settings| settings.subscriptions = Some(2)).await;
    let mut wire = cluster.node(0).wire().await;
    wire.subscribe("o", "orders").await;
    wire.expect("caught_up").await;
    assert_eq!(try_subscribe(&mut wire, json!({"tables": ["orders"]})).await["code"], "duplicate_id");
    wire.subscribe("p", "orders").await;
    wire.expect("caught_up").await;
    wire.say(json!({"type": "subscribe", "id": "q", "tables": ["orders"]})).await;
    let (code, error) = wire.error().await;
    assert_eq!((code.as_str(), &error["id"]), ("too_many_subscriptions", &json!("q")));
    wire.say(json!({"type": "unsubscribe", "id": "p"})).await;
    wire.expect("unsubscribed").await;
    wire.subscribe("q", "orders").await;
}

#[tokio::test]
async fn unsubscribing_is_answered_also_for_an_id_that_does_not_exist_and_ends_the_events() {
    let cluster = one(|_| {}).await;
    let mut wire = cluster.node(0).wire().await;
    wire.say(json!({"type": "unsubscribe", "id": "never was"})).await;
    assert_eq!(wire.expect("unsubscribed").await["id"], "never was");
    wire.subscribe("o", "orders").await;
    wire.expect("caught_up").await;
    wire.say(json!({"type": "unsubscribe", "id": "o"})).await;
    wire.expect("unsubscribed").await;
    cluster.insert("orders", 1..=3).await;
    cluster.node(0).reached(3).await;
    wire.subscribe("o", "orders").await;
    wire.expect("caught_up").await;
    cluster.insert("orders", 4..=4).await;
    let frame = wire.expect("events").await;
    assert_eq!((&frame["events"][0]["key"]["id"], frame["events"].as_array().unwrap().len()), (&json!(4), 1));
}

#[tokio::test]
async fn a_ping_is_echoed() {
    let cluster = one(|_| {}).await;
    let mut wire = cluster.node(0).wire().await;
    for t in [json!(17), json!("x"), json!({"a": [1]})] {
        wire.say(json!({"type": "ping", "t": t, "unknown": "ignored"})).await;
        assert_eq!(wire.expect("pong").await["t"], t);
    }
    wire.say(json!({"type": "ping"})).await;
    assert_eq!(wire.expect("pong").await.get("t"), None);
}

#[tokio::test]
async fn a_burst_above_the_rate_is_read_later_and_not_lost() {
    let cluster = one(|settings| settings.messages_per_s = Some(40)).await;
    let mut wire = cluster.node(0).wire().await;
    let began = Instant::now();
    for t in 0..90 {
        wire.say(json!({"type": "ping", "t": t})).await;
    }
    for t in 0..90 {
        assert_eq!(wire.expect("pong").await["t"], t);
    }
    // 50 at once, the rest at 40 a second.
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn who_insists_above_the_rate_gets_4013() {
    let cluster = one(|settings| settings.messages_per_s = Some(2)).await;
    let mut wire = cluster.node(0).wire().await;
    // More than it may say in the ten seconds.
    for _ in 0..100 {
        wire.say(json!({"type": "ping"})).await;
    }
    let mut error = Value::Null;
    let code = loop {
        match wire.hear().await {
            Heard::Message(message) if message["type"] == "error" => error = message,
            Heard::Closed(code) => break code,
            _ => {}
        }
    };
    assert_eq!((code, &error["code"]), (4013, &json!("rate_limited")));
}

/// Found in review: the frames that continue a message were read without end.
#[tokio::test]
async fn pieces_of_messages_count_as_messages() {
    const RATE: u32 = 40;
    const PIECES: usize = 90;
    let cluster = one(|settings| settings.messages_per_s = Some(RATE)).await;
    let bearer = format!("Bearer {}", cluster.key);
    let mut raw = Raw::connect(cluster.node(0).address(), "/v1/ws", &[("authorization", &bearer)]).await;
    assert_eq!(raw.json().await["type"], "welcome");
    let pieces = frame(0x00, b"").repeat(PIECES);
    let began = Instant::now();
    raw.send(
        &[frame(0x01, br#"{"type":"ping","#), pieces, frame(0x80, br#""t":1}"#), text(r#"{"type":"ping"}"#)].concat(),
    )
    .await;
    assert_eq!(raw.json().await["t"], 1);
    assert_eq!(raw.json().await["type"], "pong");
    // 50 at once, the rest at the rate.
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());

    // A message that never ends.
    let cluster = one(|settings| settings.messages_per_s = Some(2)).await;
    let bearer = format!("Bearer {}", cluster.key);
    let mut raw = Raw::connect(cluster.node(0).address(), "/v1/ws", &[("authorization", &bearer)]).await;
    raw.send(&[frame(0x01, b""), frame(0x00, b"").repeat(1_000)].concat()).await;
    assert_eq!(raw.closed().await, 4013);
}

#[tokio::test]
async fn sync_answers_when_everything_of_the_transaction_has_been_sent() {
    let cluster = one(|settings| settings.progress_ms = Some(60_000)).await;
    let mut wire = cluster.node(0).wire().await;
    wire.subscribe("o", "orders").await;
    wire.expect("caught_up").await;

    let committed = cluster
        .text("WITH made AS (INSERT INTO orders (id) SELECT generate_series(1, 5)) SELECT pg_current_xact_id()::text")
        .await;
    wire.say(json!({"type": "sync", "tx": committed})).await;
    let events = wire.message().await;
    assert_eq!((&events["type"], events["events"].as_array().map(Vec::len)), (&json!("events"), Some(5)));
    let synced = wire.message().await;
    assert_eq!((&synced["type"], &synced["tx"]), (&json!("synced"), &json!(committed)));
    assert!(synced["cursor"].as_str() >= events["cursor"].as_str());

    let mut transaction = cluster.pool.begin().await.unwrap();
    sqlx::query("INSERT INTO orders (id) VALUES (6)").execute(&mut *transaction).await.unwrap();
    let running: String =
        sqlx::query_scalar("SELECT pg_current_xact_id()::text").fetch_one(&mut *transaction).await.unwrap();
    wire.say(json!({"type": "sync", "tx": running, "timeout_ms": 200})).await;
    let (code, error) = wire.error().await;
    assert_eq!((code.as_str(), &error["retry"]), ("unavailable", &json!("backoff")));
    wire.say(json!({"type": "sync", "tx": running})).await;
    transaction.rollback().await.unwrap();
    assert_eq!(wire.expect("synced").await["tx"], running, "an aborted one has no events");

    let nothing = cluster.text("SELECT pg_current_xact_id()::text").await;
    wire.say(json!({"type": "sync", "tx": nothing})).await;
    assert_eq!(wire.expect("synced").await["tx"], nothing);

    for tx in ["9000000000", "-1", "+7", "7 ", "0x7", "7e0", "٧", "x", "", "0", "99999999999999999999"] {
        wire.say(json!({"type": "sync", "tx": tx})).await;
        assert_eq!(wire.error().await.0, "bad_message", "{tx}");
    }
}

#[tokio::test]
async fn caught_up_comes_exactly_once_also_for_now_and_progress_follows_while_idle() {
    let cluster = one(|settings| settings.progress_ms = Some(100)).await;
    cluster.insert("orders", 1..=3).await;
    cluster.node(0).reached(3).await;
    let mut wire = cluster.node(0).wire().await;
    let subscribed = wire.subscribe("now", "orders").await;
    assert_eq!((&subscribed["recovered"], &subscribed["source"]), (&Value::Null, &json!("live")));
    let caught_up = wire.message().await;
    assert_eq!((&caught_up["type"], &caught_up["cursor"]), (&json!("caught_up"), &subscribed["cursor"]));
    let oldest = cluster.node(0).context().hub.oldest().unwrap().to_string();
    wire.say(json!({"type": "subscribe", "id": "all", "tables": ["orders"], "from": {"cursor": oldest}})).await;

    let (mut caught_up, mut progress, mut silences) = (0, 0, Vec::new());
    let mut last = Instant::now();
    while progress < 10 {
        let message = wire.message().await;
        match (message["type"].as_str().unwrap(), message["id"].as_str()) {
            ("progress", _) => {
                progress += 1;
                silences.push(last.elapsed());
                last = Instant::now();
            }
            ("caught_up", id) => {
                assert_eq!(id, Some("all"));
                caught_up += 1;
            }
            ("subscribed" | "events", Some("all")) => {}
            _ => panic!("{message}"),
        }
    }
    assert_eq!(caught_up, 1);
    silences.sort_unstable();
    // The median, as the machine may have been away for any one of them.
    assert!(silences[5] < Duration::from_millis(300), "{silences:?}");
}

#[tokio::test]
async fn progress_names_the_subscriptions_that_share_a_position() {
    let cluster = one(|settings| settings.progress_ms = Some(100)).await;
    let mut wire = cluster.node(0).wire().await;
    for id in ["a", "b", "c"] {
        wire.subscribe(id, "orders").await;
        wire.expect("caught_up").await;
    }
    let mut named = std::collections::BTreeSet::new();
    while named.len() < 3 {
        let progress = wire.expect("progress").await;
        named.extend(progress["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()));
    }
}
