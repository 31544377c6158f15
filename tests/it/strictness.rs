//! How exact a client must be, as data: what closes, what is answered by name, what is ignored; on the handshake, in frames
//! and in messages.

use serde_json::{Value, json};

use crate::support::cluster::TestCluster;
use crate::support::raw::{HANDSHAKE, Raw, frame, framed, text};
use crate::support::wire::{Heard, Wire};
use tokio_tungstenite::tungstenite::Message;

async fn one() -> TestCluster {
    TestCluster::with(1, |settings| settings.messages_per_s = Some(1_000)).await
}

async fn welcomed(cluster: &TestCluster) -> Raw {
    let bearer = format!("Bearer {}", cluster.key);
    let mut raw = Raw::connect(cluster.node(0).address(), "/v1/ws", &[("authorization", &bearer)]).await;
    assert_eq!(raw.json().await["type"], "welcome");
    raw
}

/// Found by trying: what came in the same TCP segment as `auth` was refused with 4401, in the next one it was served.
#[tokio::test]
async fn pieces_of_the_network_make_no_difference_to_auth() {
    let cluster = one().await;
    let auth = json!({"type": "auth", "token": cluster.key}).to_string();
    let subscribe = r#"{"type":"subscribe","id":"o","tables":["orders"]}"#;
    let messages = [text(&auth), text(r#"{"type":"ping","t":1}"#), frame(0x89, b"beat"), text(subscribe)];
    let whole = messages.concat();
    for piece in [whole.len(), whole.len() - 3, messages[0].len(), messages[0].len() + 1, 17] {
        let mut raw = Raw::connect(cluster.node(0).address(), "/v1/ws", &[]).await;
        for part in whole.chunks(piece) {
            raw.send(part).await;
        }
        assert_eq!(raw.json().await["type"], "welcome", "in pieces of {piece}");
        let (mut kinds, mut beats) = (Vec::new(), 0);
        while kinds.len() < 3 {
            let frame = raw.frame().await.unwrap();
            match frame.first {
                0x81 => kinds.push(serde_json::from_slice::<Value>(&frame.payload).unwrap()["type"].clone()),
                0x8a => beats += i32::from(frame.payload == b"beat"),
                _ => panic!("{frame:?}"),
            }
        }
        assert_eq!((kinds, beats), (vec![json!("pong"), json!("subscribed"), json!("caught_up")], 1), "{piece}");
    }
    // And a bad one is refused as ever, with nothing of what follows it.
    let mut raw = Raw::connect(cluster.node(0).address(), "/v1/ws", &[]).await;
    raw.send(&[text(r#"{"type":"auth","token":"cdc_no"}"#), text(r#"{"type":"ping"}"#)].concat()).await;
    assert_eq!(raw.json().await["code"], "unauthenticated");
    assert_eq!(raw.closed().await, 4401);
}

/// What a message leads to.
#[derive(Debug)]
enum Outcome {
    Closes,
    /// An error with this code that names this field's value.
    Names(&'static str, &'static str, &'static str),
    /// A message of this type.
    Served(&'static str),
}

use Outcome::{Closes, Names, Served};

#[tokio::test]
async fn one_rule_says_which_bad_messages_close() {
    let cluster = one().await;
    let deep = format!("{}{}", "[".repeat(5_000), "]".repeat(5_000));
    let deep_field = format!(r#"{{"type":"unsubscribe","id":"a","later":{deep}}}"#);
    let deep_from =
        format!(r#"{{"type":"subscribe","id":"a","tables":["orders"],"from":{{"cursor":"x","later":{deep}}}}}"#);
    let large = format!(r#"{{"type":"ping","t":"{}"}}"#, "x".repeat(5_000));
    let long = format!(r#"{{"type":"unsubscribe","id":"{}"}}"#, "x".repeat(65));
    for (message, outcome) in [
        // No message.
        ("{", Closes),
        ("[\"ping\"]", Closes),
        (r#"{"type":"dance"}"#, Closes),
        (r#"{"type":"unsubscribe"}"#, Closes),
        (long.as_str(), Closes),
        (r#"{"type":"subscribe","id":"","tables":["orders"]}"#, Closes),
        (r#"{"type":"subscribe","id":"a","tables":"orders"}"#, Closes),
        (r#"{"type":"subscribe","id":"a","tables":["orders"],"from":{"cursor":7}}"#, Closes),
        (r#"{"type":"sync","tx":7}"#, Closes),
        (r#"{"type":"ping","t":1,}"#, Closes),
        // Of the right form, with a value that means nothing.
        (r#"{"type":"subscribe","id":"a","tables":[]}"#, Names("bad_message", "id", "a")),
        (r#"{"type":"subscribe","id":"a","tables":["a.b.c"]}"#, Names("bad_message", "id", "a")),
        (r#"{"type":"subscribe","id":"a","tables":["orders"],"ops":["MERGE"]}"#, Names("bad_message", "id", "a")),
        (r#"{"type":"subscribe","id":"a","tables":["orders"],"from":"yesterday"}"#, Names("bad_message", "id", "a")),
        (r#"{"type":"subscribe","id":"a","tables":["orders"],"from":{"later":1}}"#, Names("bad_message", "id", "a")),
        (r#"{"type":"subscribe","id":"a","tables":["orders"],"where":"id ="}"#, Names("bad_filter", "id", "a")),
        (r#"{"type":"sync","tx":"x"}"#, Names("bad_message", "tx", "x")),
        (r#"{"type":"sync","tx":""}"#, Names("bad_message", "tx", "")),
        (r#"{"type":"sync","tx":"7","timeout_ms":-1}"#, Names("bad_message", "tx", "7")),
        (r#"{"type":"sync","tx":"7","timeout_ms":1e400}"#, Names("bad_message", "tx", "7")),
        (r#"{"type":"sync","tx":"9000000000"}"#, Names("bad_message", "tx", "9000000000")),
        (large.as_str(), Names("too_large", "type", "error")),
        // Unknown fields.
        (r#"{"type":"unsubscribe","id":"a","later":1e400}"#, Served("unsubscribed")),
        (r#"{"type":"unsubscribe","id":"a","later":"\ud800"}"#, Served("unsubscribed")),
        (deep_field.as_str(), Served("unsubscribed")),
        (deep_from.as_str(), Served("resync_required")),
        (
            r#"{"type":"subscribe","id":"a","tables":["orders"],"from":{"cursor":"x","later":1}}"#,
            Served("resync_required"),
        ),
        (r#"{"type":"subscribe","id":"a","tables":["orders"],"from":null,"where":null}"#, Served("subscribed")),
    ] {
        let mut wire = cluster.node(0).wire().await;
        wire.send(Message::text(message)).await;
        let answer = wire.message().await;
        match outcome {
            Closes => {
                assert_eq!((&answer["type"], &answer["code"]), (&json!("error"), &json!("bad_message")), "{message}");
                assert_eq!(wire.closed().await, 4400, "{message}");
                continue;
            }
            Names(code, field, value) => {
                assert_eq!((&answer["code"], &answer[field]), (&json!(code), &json!(value)), "{message}: {answer}");
            }
            Served(kind) => assert_eq!(answer["type"], kind, "{message}: {answer}"),
        }
        wire.say(json!({"type": "ping", "t": "still there"})).await;
        assert_eq!(wire.find("pong").await["t"], "still there", "{message}");
    }
}

#[tokio::test]
async fn an_error_about_a_sync_names_it() {
    let cluster = one().await;
    let mut wire = cluster.node(0).wire().await;
    let mut transaction = cluster.pool.begin().await.unwrap();
    let running: String =
        sqlx::query_scalar("SELECT pg_current_xact_id()::text").fetch_one(&mut *transaction).await.unwrap();
    // Two at once, of which the second is over first.
    wire.say(json!({"type": "sync", "tx": running, "timeout_ms": 600})).await;
    wire.say(json!({"type": "sync", "tx": "9000000000"})).await;
    let mut named = Vec::new();
    for _ in 0..2 {
        let (code, error) = wire.error().await;
        assert_eq!(error.get("id"), None);
        named.push((code, error["tx"].as_str().unwrap().to_owned()));
    }
    assert_eq!(named, [("bad_message".to_owned(), "9000000000".to_owned()), ("unavailable".to_owned(), running)]);
}

#[tokio::test]
async fn a_pong_says_what_the_ping_said_byte_for_byte() {
    let cluster = one().await;
    let mut raw = welcomed(&cluster).await;
    for t in [
        "null",
        "1e400",
        "1.0",
        "12345678901234567890123",
        "[ 1 ,\n2 ]",
        "\"\\u0041\\ud800\"",
        r#"{"b":1,"a":2,"a":3}"#,
    ] {
        raw.send(&text(&format!(r#"{{"type":"ping","t":{t}}}"#))).await;
        let pong = raw.frame().await.unwrap();
        assert_eq!(String::from_utf8(pong.payload).unwrap(), format!(r#"{{"type":"pong","t":{t}}}"#));
    }
}

#[tokio::test]
async fn a_handshake_must_be_one() {
    let cluster = one().await;
    let address = cluster.node(0).address();
    let with = |name: &'static str, values: &[&'static str]| {
        let mut headers: Vec<_> = HANDSHAKE.iter().copied().filter(|(known, _)| *known != name).collect();
        headers.extend(values.iter().map(|value| (name, *value)));
        headers
    };
    for (headers, status) in [
        (vec![], 426),
        (with("upgrade", &[]), 426),
        (with("upgrade", &["h2c"]), 426),
        (with("upgrade", &["websockets"]), 426),
        (with("connection", &["keep-alive"]), 426),
        (with("connection", &["upgraded"]), 426),
        (with("sec-websocket-version", &[]), 426),
        (with("sec-websocket-version", &["8"]), 426),
        (with("sec-websocket-version", &["13", "13"]), 426),
        (with("sec-websocket-key", &[]), 400),
        (with("sec-websocket-key", &[""]), 400),
        (with("sec-websocket-key", &["x"]), 400),
        (with("sec-websocket-key", &["dGhlIHNhbXBsZQ=="]), 400),
        (with("sec-websocket-key", &["dGhlIHNhbXBsZSBub25jZSBsb25nZXI="]), 400),
        (with("sec-websocket-key", &["dGhlIHNhbXBsZSBub25jZQ="]), 400),
        (with("sec-websocket-key", &["dGhlIHNhbXBsZSBub25j*Q=="]), 400),
        (with("sec-websocket-key", &["dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ=="]), 400),
        (with("upgrade", &["WebSocket"]), 101),
        (with("upgrade", &["h2c, websocket"]), 101),
        (with("connection", &["keep-alive, Upgrade"]), 101),
        (with("connection", &["keep-alive", "upgrade"]), 101),
    ] {
        let answer = Raw::ask(address, "/v1/ws", &headers).await;
        assert_eq!(answer.status, status, "{headers:?}");
        if status == 101 {
            assert_eq!(answer.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "RFC 6455, 1.3");
            continue;
        }
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{headers:?}");
        if status == 426 {
            let told = ["upgrade", "connection", "sec-websocket-version"].map(|name| answer.header(name));
            assert_eq!(told, [Some("websocket"), Some("Upgrade"), Some("13")], "{headers:?}");
        }
    }
    // A bad handshake costs no ticket.
    let bearer = format!("Bearer {}", cluster.key);
    let issued = crate::support::http::ask("POST", address, "/v1/tickets", &[("authorization", &bearer)]).await;
    let target = format!("/v1/ws?ticket={}", issued.json().await["ticket"].as_str().unwrap());
    assert_eq!(Raw::ask(address, &target, &with("sec-websocket-key", &["x"])).await.status, 400);
    assert_eq!(Raw::ask(address, &target, &HANDSHAKE).await.status, 101);
}

/// Found by trying: lengths in more bytes than needed were accepted.
#[tokio::test]
async fn a_frame_that_may_not_be_closes_after_what_came_before_it() {
    let cluster = one().await;
    let ping = br#"{"type":"ping"}"#;
    let short = ping.len() as u8;
    for (name, bytes, close) in [
        ("length 15 in 16 bits", framed(0x81, &[126, 0, short], ping), 1002),
        ("length 15 in 64 bits", framed(0x81, &[127, 0, 0, 0, 0, 0, 0, 0, short], ping), 1002),
        ("length 200 in 64 bits", framed(0x81, &[127, 0, 0, 0, 0, 0, 0, 0, 200], &[b' '; 200]), 1002),
        ("the highest bit of a length", framed(0x81, &[127, 0x80, 0, 0, 0, 0, 0, 0, 0], b""), 1002),
        ("RSV1", frame(0xc1, ping), 1002),
        ("RSV2", frame(0xa1, ping), 1002),
        ("RSV3", frame(0x91, ping), 1002),
        ("opcode 3", frame(0x83, ping), 1002),
        ("opcode 11", frame(0x8b, b""), 1002),
        ("a ping in pieces", frame(0x09, b""), 1002),
        ("a close in pieces", frame(0x08, b""), 1002),
        ("a ping of 126 bytes", frame(0x89, &[0; 126]), 1002),
        ("a continuation of nothing", frame(0x80, ping), 1002),
        ("a text inside a text", [frame(0x01, b"{"), frame(0x81, b"}")].concat(), 1002),
        ("not masked", [&[0x81, short][..], ping].concat(), 1002),
        ("not UTF-8", frame(0x81, &[0xc3, 0x28]), 1007),
        ("not UTF-8, in pieces", [frame(0x01, &[0xc3]), frame(0x80, &[0x28])].concat(), 1007),
        ("a surrogate", frame(0x81, &[0xed, 0xa0, 0x80]), 1007),
        ("binary", frame(0x82, ping), 1003),
        ("too large", framed(0x81, &[127, 0, 0, 0, 0, 0x10, 0, 0, 0], b"{"), 1009),
    ] {
        let mut raw = welcomed(&cluster).await;
        raw.send(&[text(r#"{"type":"ping","t":"before"}"#), bytes].concat()).await;
        assert_eq!(raw.json().await["t"], "before", "{name}");
        let error = raw.json().await;
        assert_eq!(error["type"], "error", "{name}");
        assert!(["bad_message", "too_large"].contains(&error["code"].as_str().unwrap()), "{name}: {error}");
        assert_eq!(raw.closed().await, close, "{name}");
    }
}

#[tokio::test]
async fn a_close_is_answered_in_kind() {
    let cluster = one().await;
    let coded = |code: u16, reason: &[u8]| frame(0x88, &[&code.to_be_bytes()[..], reason].concat());
    let mut cases = vec![
        ("nothing".to_owned(), frame(0x88, b""), 1005),
        ("one byte".to_owned(), frame(0x88, &[3]), 1002),
        ("a reason".to_owned(), coded(1000, "tschüß".as_bytes()), 1000),
        ("a reason of 123 bytes".to_owned(), coded(1001, &[b'x'; 123]), 1001),
        ("a reason of 124 bytes".to_owned(), coded(1000, &[b'x'; 124]), 1002),
        ("a reason that is not UTF-8".to_owned(), coded(1000, &[0xc3, 0x28]), 1007),
    ];
    // RFC 6455, 7.4 and the registry of close codes.
    for code in [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999] {
        cases.push((code.to_string(), coded(code, b""), code));
    }
    for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535] {
        cases.push((code.to_string(), coded(code, b""), 1002));
    }
    for (name, bytes, close) in cases {
        let mut raw = welcomed(&cluster).await;
        raw.send(&bytes).await;
        assert_eq!(raw.closed().await, close, "{name}");
        assert_eq!(raw.frame().await, None, "{name}: the server ends the connection");
    }
    // Nothing is said after the close, and the other end of the socket is still served.
    let mut wire = Wire::connect(&cluster.node(0).ws_url(), &[]).await.unwrap();
    wire.say(json!({"type": "auth", "token": cluster.key})).await;
    assert!(matches!(wire.hear().await, Heard::Message(welcome) if welcome["type"] == "welcome"));
}
