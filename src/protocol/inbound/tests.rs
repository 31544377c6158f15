//! The rule as data: what closes, what is answered by name, what is ignored.

use super::*;

fn read(text: &str) -> Result<ClientMessage, Fault> {
    ClientMessage::read(text)
}

fn from_of(from: &str) -> Result<From, Fault> {
    let text = format!(r#"{{"type":"subscribe","id":"a","tables":["t"],"from":{from}}}"#);
    read(&text).map(|message| match message {
        ClientMessage::Subscribe(subscribe) => subscribe.from,
        other => panic!("{other:?}"),
    })
}

#[test]
fn subscribe_reads_as_documented() {
    let text = r#"{"type":"subscribe","id":"paid","tables":["public.orders"],"where":"status = 'paid'","from":{"cursor":"x"},"later":1}"#;
    let ClientMessage::Subscribe(subscribe) = read(text).unwrap() else { panic!("not a subscribe") };
    assert_eq!(subscribe.from, From::Cursor("x".into()));
    assert_eq!(subscribe.filter.as_deref(), Some("status = 'paid'"));
    for (from, want) in [
        (r#""now""#, From::Now),
        ("null", From::Now),
        (r#""oldest""#, From::Oldest),
        (r#""snapshot""#, From::Snapshot),
        (r#"{"snapshot_if_gone":"y"}"#, From::SnapshotIfGone("y".into())),
        (r#"{"cursor":"x","later":1}"#, From::Cursor("x".into())),
        (r#"{"later":{"cursor":7},"cursor":"x"}"#, From::Cursor("x".into())),
        (r#" { "cursor" : "" } "#, From::Cursor(String::new())),
    ] {
        assert_eq!(from_of(from), Ok(want), "{from}");
    }
}

#[test]
fn unknown_fields_are_ignored_whatever_they_hold() {
    let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    let objects = format!("{}1{}", "{\"a\":".repeat(5_000), "}".repeat(5_000));
    for value in [
        "1e400",
        "-1e-400",
        "1e999999",
        "null",
        "\"\\ud800\"",
        "[1,{\"id\":2}]",
        "12345678901234567890123",
        &deep,
        &objects,
    ] {
        for text in [
            format!(r#"{{"type":"ping","later":{value}}}"#),
            format!(r#"{{"later":{value},"type":"sync","tx":"7"}}"#),
            format!(r#"{{"type":"unsubscribe","id":"a","later":{value},"t":{value}}}"#),
            format!(r#"{{"type":"auth","token":"x","later":{value}}}"#),
            format!(r#"{{"type":"subscribe","id":"a","tables":["t"],"later":{value},"later":{value}}}"#),
            format!(r#"{{"type":"subscribe","id":"a","tables":["t"],"from":{{"cursor":"x","later":{value}}}}}"#),
        ] {
            assert!(read(&text).is_ok(), "{}: {:?}", shown(&text), read(&text));
        }
    }
}

#[test]
fn a_ping_is_kept_as_it_was_written() {
    for t in ["null", "1e400", "1.0", "[ 1 ,2 ]", "\"\\u0041\\ud800\"", "{\"b\":1,\"a\":2,\"a\":3}", "-0", "true"] {
        let text = format!(r#"{{"type":"ping","t":{t}}}"#);
        let ClientMessage::Ping { t: Some(kept) } = read(&text).unwrap() else { panic!("no t in {text}") };
        assert_eq!(kept.text(), t);
        let said = serde_json::to_string(&super::super::message::ServerMessage::Pong { t: Some(kept) }).unwrap();
        assert_eq!(said, format!(r#"{{"type":"pong","t":{t}}}"#));
    }
    assert_eq!(read(r#"{"type":"ping"}"#), Ok(ClientMessage::Ping { t: None }));
    let of = |length: usize| read(&format!(r#"{{"type":"ping","t":"{}"}}"#, "x".repeat(length - 2)));
    assert!(of(MAX_PING_BYTES).is_ok());
    assert!(matches!(of(MAX_PING_BYTES + 1), Err(Fault::Ping(_))));
}

#[test]
fn what_has_not_the_form_of_a_message_closes() {
    let (long, longer) = ("x".repeat(MAX_ID_CHARS + 1), "9".repeat(MAX_ID_CHARS + 1));
    for text in [
        "",
        " ",
        "{",
        "null",
        "[]",
        "[\"ping\"]",
        "\"ping\"",
        "{\"type\":\"ping\"} {}",
        "{\"type\":\"ping\",}",
        "\u{feff}{\"type\":\"ping\"}",
        "{\"type\":\"dance\"}",
        "{\"type\":\"Ping\"}",
        "{\"type\":\"events\"}",
        "{\"type\":7}",
        "{\"type\":null}",
        "{\"id\":\"x\"}",
        "{\"type\":\"ping\",\"type\":\"ping\"}",
        "{\"type\":\"ping\",\"t\":01}",
        "{\"type\":\"ping\",\"later\":nul}",
        "{\"type\":\"unsubscribe\"}",
        "{\"type\":\"unsubscribe\",\"id\":\"\"}",
        &format!("{{\"type\":\"unsubscribe\",\"id\":\"{long}\"}}"),
        "{\"type\":\"subscribe\",\"id\":\"a\"}",
        "{\"type\":\"subscribe\",\"tables\":[\"t\"]}",
        "{\"type\":\"subscribe\",\"id\":\"\",\"tables\":[\"t\"]}",
        &format!("{{\"type\":\"subscribe\",\"id\":\"{long}\",\"tables\":[\"t\"]}}"),
        "{\"type\":\"subscribe\",\"id\":7,\"tables\":[\"t\"]}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":\"t\"}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":[7]}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":null}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":[\"t\"],\"ops\":\"INSERT\"}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":[\"t\"],\"where\":1}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":[\"t\"],\"columns\":{}}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":[\"t\"],\"from\":7}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":[\"t\"],\"from\":[\"now\"]}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":[\"t\"],\"from\":{\"cursor\":7}}",
        "{\"type\":\"subscribe\",\"id\":\"a\",\"tables\":[\"t\"],\"from\":{\"cursor\":null}}",
        "{\"type\":\"sync\"}",
        "{\"type\":\"sync\",\"tx\":7}",
        &format!("{{\"type\":\"sync\",\"tx\":\"{longer}\"}}"),
        "{\"type\":\"sync\",\"tx\":\"7\",\"timeout_ms\":\"5\"}",
        "{\"type\":\"auth\",\"token\":7}",
    ] {
        match read(text) {
            Err(Fault::Form(what)) => assert!(what.len() <= 300, "{what}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn a_value_that_means_nothing_is_answered_by_name() {
    for from in [
        "\"later\"",
        "\"\"",
        "\"NOW\"",
        "\"cursor\"",
        "{}",
        "{\"later\":1}",
        "{\"cursor\":\"x\",\"snapshot_if_gone\":\"x\"}",
    ] {
        assert!(matches!(from_of(from), Err(Fault::Subscribe { id, .. }) if id == "a"), "{from}");
    }
    for timeout in ["-1", "1.5", "1e400", "1e3", "1.0", "-0"] {
        let text = format!(r#"{{"type":"sync","tx":"7","timeout_ms":{timeout}}}"#);
        assert!(matches!(read(&text), Err(Fault::Sync { tx, .. }) if tx == "7"), "{timeout}");
    }
    // Found in review: a wait that is longer than any counts as the longest, however long the number.
    for timeout in ["18446744073709551615", "18446744073709551616", "99999999999999999999999999"] {
        let text = format!(r#"{{"type":"sync","tx":"7","timeout_ms":{timeout}}}"#);
        let want = ClientMessage::Sync { tx: "7".into(), timeout_ms: Some(u64::MAX) };
        assert_eq!(read(&text), Ok(want), "{timeout}");
    }
}

#[test]
fn null_is_as_good_as_nothing_for_what_may_be_left_out() {
    let text = r#"{"type":"subscribe","id":"a","tables":["t"],"ops":null,"where":null,"columns":null,"from":null}"#;
    assert_eq!(read(text), read(r#"{"type":"subscribe","id":"a","tables":["t"]}"#));
    assert_eq!(
        read(r#"{"type":"sync","tx":"7","timeout_ms":null}"#),
        Ok(ClientMessage::Sync { tx: "7".into(), timeout_ms: None })
    );
}

#[test]
fn the_secret_of_auth_is_not_printed() {
    let auth = Auth { token: Some("cdc_secret".into()), role: None, password: Some("hush".into()) };
    let text = format!("{:?}", ClientMessage::Auth(auth));
    assert!(!text.contains("secret") && !text.contains("hush"), "{text}");
}
