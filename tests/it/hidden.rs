//! What a key may not read is to it as if it were not there: no answer tells a hidden column from one that does not exist.

use serde_json::{Value, json};

use crate::support::cluster::{TestCluster, TestNode};
use crate::support::http::ask;
use crate::support::wire::Wire;

/// Columns of every kind that hides something, and a name of no column in their place.
const TABLE: &str = r#"CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE TYPE pair AS (a int, b text);
    CREATE TABLE vault (id int PRIMARY KEY, open text, number int, word text, "Mixed" text, document jsonb, feeling mood,
                        two pair, list int[], price numeric, untold text);
    SELECT tidewire.track('vault', except_columns => '{untold}')"#;
const HIDDEN: &[&str] = &["number", "word", "\"Mixed\"", "document", "feeling", "two", "list", "price", "untold"];
/// Conditions on a column `@`.
const CONDITIONS: &[&str] = &[
    "@ = 1",
    "@ = 'x'",
    "@ IS NULL",
    "@ IS NOT TRUE",
    "@ IN (1, 2)",
    "@ BETWEEN 1 AND 2",
    "@ LIKE 'x%'",
    "@ -> 'a' IS NULL",
    "@ ->> 'a' = 'b'",
    "@::int = 1",
    "@ = open",
    "open = 'x' AND (id > 5 OR @ < '2026-01-01')",
    "id = 1 OR @",
    "@",
    "@ = nothing",
    "mixed = 'x' AND @ = 'x'",
    "open ~ 'x' AND @ = 1",
    "NOWHERE = 1 OR @ = 1",
];
/// A name that no column has.
const UNKNOWN: &str = "nowhere";

async fn answer(wire: &mut Wire, fields: Value) -> String {
    let mut message = json!({"type": "subscribe", "id": "s", "tables": ["vault"]});
    message.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    wire.say(message).await;
    let answer = wire.message().await;
    assert_eq!(answer["type"], "error", "{fields}: {answer}");
    answer.to_string()
}

async fn streamed(node: &TestNode, key: &str, query: &str) -> String {
    let bearer = format!("Bearer {key}");
    let mut stream =
        ask("GET", node.address(), &format!("/v1/sse?table=vault&{query}"), &[("authorization", &bearer)]).await;
    stream.expect("error").await.data.to_string()
}

#[tokio::test]
async fn a_hidden_column_answers_as_one_that_does_not_exist() {
    let cluster = TestCluster::start(1).await;
    cluster.run(TABLE).await;
    let bare: Vec<&str> = HIDDEN.iter().map(|name| name.trim_matches('"')).collect();
    for scope in [
        json!({"table": "vault", "hidden_columns": bare}),
        json!({"table": "vault", "columns": ["id", "open"]}),
        json!({"table": "public.*", "hidden_columns": bare}),
        json!({"table": "*", "columns": ["id", "open"]}),
    ] {
        let key = cluster.key(json!({"tables": [scope]})).await;
        for hidden in HIDDEN {
            // A connection of its own: its messages are counted.
            let mut wire = cluster.node(0).wire_of(key.expose()).await;
            for condition in CONDITIONS {
                let there = answer(&mut wire, json!({"where": condition.replace('@', hidden)})).await;
                let nowhere = answer(&mut wire, json!({"where": condition.replace('@', UNKNOWN)})).await;
                let bare = hidden.trim_matches('"');
                assert_eq!(there.replace(bare, UNKNOWN), nowhere, "{condition} on {hidden} of {scope}");
            }
            let name = hidden.trim_matches('"');
            let there = answer(&mut wire, json!({"columns": ["id", name]})).await;
            let nowhere = answer(&mut wire, json!({"columns": ["id", UNKNOWN]})).await;
            assert_eq!(there.replace(name, UNKNOWN), nowhere, "{scope}");
        }
    }
    let key = cluster.key(json!({"tables": [{"table": "vault", "hidden_columns": bare}]})).await;
    for query in ["where=@%20%3D%201", "where=@%20IS%20NULL", "column=@", "column=id&column=@"] {
        let there = streamed(cluster.node(0), key.expose(), &query.replace('@', "number")).await;
        let nowhere = streamed(cluster.node(0), key.expose(), &query.replace('@', UNKNOWN)).await;
        assert_eq!(there.replace("number", UNKNOWN), nowhere);
    }
}

#[tokio::test]
async fn a_row_condition_that_does_not_fit_says_nothing_of_what_it_names() {
    let cluster = TestCluster::start(1).await;
    cluster.run(TABLE).await;
    for condition in ["number = 'x'", "gone = 1", "two = 1", "untold = 'x'", "number ~ 1"] {
        let scopes = json!({"tables": [{"table": "vault", "columns": ["id", "open"], "condition": condition}]});
        let key = cluster.key(scopes).await;
        let mut wire = cluster.node(0).wire_of(key.expose()).await;
        let told = answer(&mut wire, json!({})).await;
        assert!(told.contains("forbidden") && told.contains("row condition"), "{told}");
        for hidden in ["number", "gone", "two", "untold", "integer", "character"] {
            assert!(!told.contains(hidden), "{condition}: {told}");
        }
    }
}

#[tokio::test]
async fn changes_of_hidden_columns_are_told_to_nobody_who_may_not_read_them() {
    let cluster = TestCluster::start(1).await;
    cluster.run(TABLE).await;
    let scope =
        json!({"table": "vault", "hidden_columns": ["number", "word", "later"], "condition": "number IS NOT NULL"});
    let key = cluster.key(json!({"tables": [scope]})).await;
    let mut wire = cluster.node(0).wire_of(key.expose()).await;
    wire.subscribe("s", "vault").await;
    wire.expect("caught_up").await;
    cluster
        .run(
            "ALTER TABLE vault DROP COLUMN word; ALTER TABLE vault ADD COLUMN later text;
             INSERT INTO vault (id, number, later) VALUES (1, 5, 'hush')",
        )
        .await;
    let frame = wire.find("events").await;
    assert_eq!(frame["events"][0]["op"], "INSERT", "{frame}");
    // The row condition's own column: the subscription has to end, and is not told by what.
    cluster.run("ALTER TABLE vault ALTER number TYPE bigint; INSERT INTO vault (id, number) VALUES (2, 6)").await;
    let mut heard = String::new();
    let ended = loop {
        let message = wire.message().await;
        heard.push_str(&message.to_string());
        if message["type"] == "resync_required" {
            break message;
        }
    };
    assert_eq!(ended["reason"], "schema_changed");
    for hidden in ["number", "word", "later", "hush", "bigint"] {
        assert!(!heard.contains(hidden) && !frame.to_string().contains(hidden), "{hidden}: {heard}\n{frame}");
    }
}
