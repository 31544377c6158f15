//! Every encoding that a database can have: events arrive as UTF-8, or `migrate` says why not; a text that has no form in UTF-8
//! stops nobody.

use std::str::FromStr as _;

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tidewire::cli::doctor::examine;
use tidewire::client::{Event, SubscribeOptions};
use tidewire::dev::postgres::PrivateServer;
use tidewire::postgres::Database;
use tidewire::postgres::migrate::{MigrationError, migrate};

use crate::support::answered;
use crate::support::client::key_of;
use crate::support::cluster::TestCluster;
use crate::support::postgres::own_server;
use crate::support::wire::Heard;

async fn make(server: &PrivateServer, name: &str, encoding: &str) -> String {
    let mut connection = PgConnection::connect(&server.url("postgres")).await.unwrap();
    let create = format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'");
    sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut connection).await.unwrap();
    server.url(name)
}

fn note(event: &Event) -> String {
    let row: serde_json::Value = event.after.parse().unwrap().expect("a row");
    row["note"].as_str().expect("a note").to_owned()
}

/// Encodings, and a text that each can write.
const ENCODINGS: &[(&str, &str)] = &[
    ("LATIN1", "café ÿ"),
    ("LATIN2", "žluťoučký"),
    ("LATIN9", "10 € œuvre"),
    ("KOI8R", "привет"),
    ("WIN1252", "“café” €"),
    ("WIN1251", "привет №"),
    ("EUC_JP", "日本語"),
    ("SQL_ASCII", "café 日本語 привет"),
    ("UTF8", "café 日本語 привет"),
];

#[tokio::test]
async fn texts_of_every_encoding_arrive_live_and_from_the_log() {
    let server = own_server().await;
    for (encoding, text) in ENCODINGS {
        let url = make(&server, &format!("e_{}", encoding.to_lowercase()), encoding).await;
        let cluster = TestCluster::over(&url, 1, |_| {}).await;
        let mut client = cluster.node(0).client("orders").await;
        let start = client.caught_up().await;
        cluster.run(&format!("INSERT INTO orders (id, note) VALUES (1, '{text}'); SELECT tidewire.emit('t', '{text}', '{text}', '{{}}')")).await;
        assert_eq!(note(&client.event().await), *text, "{encoding}");
        let mut again = cluster.node(0).client_after("orders", start).await;
        assert_eq!(note(&again.event().await), *text, "{encoding}");
        // A name that the encoding cannot write is that of no table, for whoever asks and for nobody else.
        let mut wire = cluster.node(0).wire().await;
        wire.say(serde_json::json!({"type": "subscribe", "id": "x", "tables": ["public.日本ж€ő"]})).await;
        match wire.hear().await {
            Heard::Message(answer) => assert_eq!(answer["code"], "unknown_table", "{encoding}: {answer}"),
            other => panic!("{encoding}: {other:?}"),
        }
        cluster.insert("orders", 2..=2).await;
        client.expect_keys([2]).await;
    }
}

#[tokio::test]
async fn an_encoding_that_postgres_cannot_convert_is_refused_with_a_sentence() {
    let server = own_server().await;
    let url = make(&server, "mule", "MULE_INTERNAL").await;
    let error = migrate(&PgConnectOptions::from_str(&url).unwrap()).await.unwrap_err();
    assert!(matches!(error, MigrationError::Encoding { .. }) && !error.is_transient(), "{error:?}");
    assert!(error.to_string().contains("MULE_INTERNAL"), "{error}");
}

/// Where a byte that is not UTF-8 may stand, as SQL: `bad` is such a text.
const UNREADABLE: &[&str] = &[
    "INSERT INTO orders (id, note) VALUES (2, bad)",
    "INSERT INTO orders (id, note) VALUES (3, bad)",
    "UPDATE orders SET note = NULL WHERE id = 2",
    "DELETE FROM orders WHERE id = 3",
    "PERFORM tidewire.emit('t', bad, 'e', '{}')",
    "PERFORM tidewire.emit('t', '1', bad, '{}')",
    "PERFORM tidewire.emit(bad, '1', 'e', '{}')",
    "PERFORM tidewire.emit('t', '1', 'e', to_json(bad))",
    "PERFORM tidewire.emit('t', '1', 'e', '{}', json_build_object('h', bad))",
    "INSERT INTO named VALUES (bad)",
];

#[tokio::test]
async fn a_byte_that_is_not_utf8_stops_nobody_wherever_it_stands() {
    let server = own_server().await;
    for (name, encoding, hex) in [("ascii", "SQL_ASCII", "6361e9"), ("win", "WIN1252", "636181")] {
        let url = make(&server, name, encoding).await;
        let cluster = TestCluster::over(&url, 1, |_| {}).await;
        cluster.run("CREATE TABLE named (k text PRIMARY KEY); SELECT tidewire.track('named')").await;
        let terms = cluster.terms().await;
        let all = || SubscribeOptions::tables(["*", "event:*"]);
        let mut client = cluster.node(0).client_of(all()).await;
        let start = client.caught_up().await;
        for statement in UNREADABLE {
            cluster
                .run(&format!(
                    "DO $do$ DECLARE bad text := convert_from('\\x{hex}', '{encoding}'); BEGIN {statement}; END $do$"
                ))
                .await;
        }
        cluster.insert("orders", 9..=9).await;
        let count = UNREADABLE.len() + 1;
        let events = client.events(count).await;
        let omitted: Vec<_> = events.iter().map(|event| event.omitted).collect();
        let mut wanted = vec![true; UNREADABLE.len()];
        wanted.push(false);
        assert_eq!(omitted, wanted, "{encoding}");
        assert_eq!(key_of(&events[0]), 2, "what can be read of it is sent");
        let mut again = cluster.node(0).client_of(all().from(start)).await;
        let read: Vec<_> = again.events(count).await.iter().map(|event| (event.seq, event.omitted)).collect();
        assert_eq!(read, events.iter().map(|event| (event.seq, event.omitted)).collect::<Vec<_>>());
        // As it was.
        let letters = format!(
            "SELECT count(*)::text FROM tidewire.dead_letters letter
             WHERE error LIKE '%UTF-8%' AND letter::text LIKE '%' || convert_from('\\x{hex}', '{encoding}') || '%'"
        );
        assert_eq!(cluster.text(&letters).await, UNREADABLE.len().to_string(), "{encoding}");
        assert_eq!(cluster.terms().await, terms, "{encoding}: nobody stopped leading");
        assert!(cluster.node(0).is_ready());
        let findings = examine(&Database::new(&url, None, "doctor", 2).unwrap()).await;
        assert!(format!("{findings:?}").contains("dead letters"), "{encoding}: {findings:?}");
    }
}

/// A table's and a column's name may have such bytes, too.
#[tokio::test]
async fn names_that_are_not_utf8_cost_nobody_but_their_table() {
    let server = own_server().await;
    let url = make(&server, "names", "SQL_ASCII").await;
    let cluster = TestCluster::over(&url, 1, |_| {}).await;
    let mut client = cluster.node(0).client("*").await;
    cluster
        .run(
            r"DO $do$ DECLARE bad text := convert_from('\x6361e9', 'SQL_ASCII'); BEGIN
                EXECUTE format('CREATE TABLE columns (id int PRIMARY KEY, %I int)', bad);
                EXECUTE format('CREATE TABLE %I (id int PRIMARY KEY)', bad);
                PERFORM tidewire.track('columns'), tidewire.track(bad::regclass);
                INSERT INTO columns VALUES (1, 1);
                EXECUTE format('INSERT INTO %I VALUES (1)', bad);
              END $do$",
        )
        .await;
    cluster.insert("orders", 9..=9).await;
    // Nobody can ask for a table whose name, or a column's, has no form in UTF-8; its events have their places all the same.
    let event = client.event().await;
    assert_eq!((key_of(&event), event.seq, event.omitted), (9, 3, false));
    assert_eq!(cluster.text("SELECT count(*)::text FROM tidewire.event_log WHERE omitted").await, "2");
    let mut later = cluster.node(0).client("orders").await;
    cluster.insert("orders", 10..=10).await;
    later.expect_keys([10]).await;
    // Found in review: the leader could not look at any table any more.
    cluster.run("ALTER TABLE columns ADD COLUMN extra int; ALTER TABLE orders ADD COLUMN extra int").await;
    answered("the SCHEMA event of another table", async || {
        let told =
            "SELECT count(*)::text FROM tidewire.event_log WHERE operation = 'SCHEMA' AND table_name = 'public.orders'";
        (cluster.text(told).await == "1").then_some(())
    })
    .await;
}
