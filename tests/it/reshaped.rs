//! Subscriptions made right after a table got another shape: they are taken as the table is now, and what had happened
//! before them does not end them.

use serde_json::{Value, json};

use crate::support::answered;
use crate::support::cluster::TestCluster;
use crate::support::wire::Wire;

/// What happens to a table `@`, the subscription made right after it, and a row that must come.
struct Case {
    setup: &'static str,
    /// SCHEMA events that the setup makes, and that are to be told first: row security that was on for a moment ends
    /// whoever cannot show that he came after it.
    settled: i64,
    change: &'static str,
    subscribe: fn() -> Value,
    insert: &'static str,
    /// SCHEMA events that the change surely makes.
    told: i64,
}

const fn case(change: &'static str, subscribe: fn() -> Value, insert: &'static str, told: i64) -> Case {
    Case { setup: "", settled: 0, change, subscribe, insert, told }
}

const PLAIN: fn() -> Value = || json!({});

const CASES: &[Case] = &[
    case(
        "DROP TABLE @; CREATE TABLE @ (id int PRIMARY KEY, a int); SELECT tidewire.track('@')",
        PLAIN,
        "INSERT INTO @ (id) VALUES (7)",
        1,
    ),
    case(
        "BEGIN; DROP TABLE @; CREATE TABLE @ (id int PRIMARY KEY, a int); SELECT tidewire.track('@'); COMMIT",
        || json!({"where": "a = 5", "columns": ["id"]}),
        "INSERT INTO @ (id, a) VALUES (7, 5)",
        1,
    ),
    case(
        "DROP TABLE @; CREATE TABLE @ (id int PRIMARY KEY, b text); SELECT tidewire.track('@')",
        || json!({"where": "b = 'x'"}),
        "INSERT INTO @ (id, b) VALUES (7, 'x')",
        1,
    ),
    case("ALTER TABLE @ ADD COLUMN b text", || json!({"where": "b = 'x'"}), "INSERT INTO @ (id, b) VALUES (7, 'x')", 1),
    case("ALTER TABLE @ ADD COLUMN b text", || json!({"columns": ["id", "b"]}), "INSERT INTO @ (id) VALUES (7)", 1),
    case(
        "ALTER TABLE @ RENAME a TO b",
        || json!({"where": "b = 5", "columns": ["b"]}),
        "INSERT INTO @ (id, b) VALUES (7, 5)",
        1,
    ),
    case("ALTER TABLE @ ALTER a TYPE text", || json!({"where": "a = 'x'"}), "INSERT INTO @ (id, a) VALUES (7, 'x')", 1),
    Case {
        setup: "CREATE TYPE @_mood AS ENUM ('good'); ALTER TABLE @ ADD COLUMN m @_mood",
        ..case(
            "ALTER TYPE @_mood ADD VALUE 'bad'",
            || json!({"where": "m = 'bad'"}),
            "INSERT INTO @ (id, m) VALUES (7, 'bad')",
            0,
        )
    },
    Case {
        setup: "SELECT tidewire.track('@', before_image => false)",
        ..case(
            "SELECT tidewire.track('@', except_columns => '{}')",
            || json!({"where": "a = 5"}),
            "INSERT INTO @ (id, a) VALUES (7, 5)",
            0,
        )
    },
    Case {
        setup: "SELECT tidewire.track('@', except_columns => '{a}')",
        ..case("SELECT tidewire.track('@')", || json!({"where": "a = 5"}), "INSERT INTO @ (id, a) VALUES (7, 5)", 0)
    },
    Case {
        setup: "ALTER TABLE @ ENABLE ROW LEVEL SECURITY",
        settled: 1,
        ..case("ALTER TABLE @ DISABLE ROW LEVEL SECURITY", PLAIN, "INSERT INTO @ (id) VALUES (7)", 0)
    },
];

async fn told(cluster: &TestCluster, table: &str) -> i64 {
    let count = "SELECT count(*)::text FROM tidewire.event_log WHERE operation = 'SCHEMA' AND table_name";
    cluster.text(&format!("{count} = 'public.{table}'")).await.parse().unwrap()
}

/// What comes for the subscription, up to a row with this id.
async fn comes(wire: &mut Wire, id: i64, context: &str) {
    loop {
        let message = wire.message().await;
        assert!(message["type"] != "error" && message["type"] != "resync_required", "{context}: {message}");
        let events = message["events"].as_array().cloned().unwrap_or_default();
        assert!(
            events.iter().all(|event| event["after"]["changes"][0]["kind"] != "drop_table"),
            "{context}: {message}"
        );
        if events.iter().any(|event| event["op"] == "INSERT" && event["key"]["id"] == id) {
            return;
        }
    }
}

#[tokio::test]
async fn a_subscription_made_right_after_a_change_stands() {
    let cluster = TestCluster::start(2).await;
    for (number, case) in CASES.iter().enumerate() {
        let table = format!("t{number}");
        let run = async |sql: &str| cluster.run(&sql.replace('@', &table)).await;
        run("CREATE TABLE @ (id int PRIMARY KEY, a int); SELECT tidewire.track('@')").await;
        run(case.setup).await;
        let is_settled = async || (told(&cluster, &table).await >= case.settled).then_some(());
        answered(case.setup, is_settled).await;
        // Both nodes remember the table as it was.
        let mut wires = [cluster.node(0).wire().await, cluster.node(1).wire().await];
        for wire in &mut wires {
            wire.say(json!({"type": "subscribe", "id": "warm", "tables": [table, "orders"]})).await;
            wire.message().await;
        }
        let before = told(&cluster, &table).await;
        run(case.change).await;
        let mut message = json!({"type": "subscribe", "id": "s", "tables": [table]});
        message.as_object_mut().unwrap().extend((case.subscribe)().as_object().unwrap().clone());
        for wire in &mut wires {
            wire.say(json!({"type": "unsubscribe", "id": "warm"})).await;
            wire.say(message.clone()).await;
            let answer = loop {
                let answer = wire.message().await;
                if answer["id"] == "s" {
                    break answer;
                }
            };
            assert_eq!(answer["type"], "subscribed", "{}: {answer}", case.change);
        }
        run(case.insert).await;
        for wire in &mut wires {
            comes(wire, 7, case.change).await;
        }
        // Also once the leader has told what had changed.
        let is_told = async || (told(&cluster, &table).await >= before + case.told).then_some(());
        answered(case.change, is_told).await;
        run(&case.insert.replace('7', "8")).await;
        for wire in &mut wires {
            comes(wire, 8, case.change).await;
        }
    }
}

#[tokio::test]
async fn a_row_condition_on_a_column_added_a_moment_ago_holds() {
    let cluster = TestCluster::start(1).await;
    cluster.run("CREATE TABLE t (id int PRIMARY KEY); SELECT tidewire.track('t')").await;
    let mut warm = cluster.node(0).wire().await;
    warm.subscribe("warm", "t").await;
    let key = cluster.key(json!({"tables": [{"table": "t", "condition": "tenant = 7"}]})).await;
    cluster.run("ALTER TABLE t ADD COLUMN tenant int").await;
    let mut wire = cluster.node(0).wire_of(key.expose()).await;
    wire.subscribe("s", "t").await;
    cluster.run("INSERT INTO t VALUES (1, 1), (7, 7)").await;
    comes(&mut wire, 7, "a row condition").await;
}

#[tokio::test]
async fn whoever_was_there_before_the_change_is_ended_by_it() {
    let cluster = TestCluster::start(1).await;
    for (change, reason) in [
        ("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, a int); SELECT tidewire.track('t')", "table_dropped"),
        ("ALTER TABLE t RENAME a TO b", "schema_changed"),
        ("ALTER TABLE t ALTER a TYPE text", "schema_changed"),
    ] {
        cluster
            .run("DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY, a int); SELECT tidewire.track('t')")
            .await;
        let mut wire = cluster.node(0).wire().await;
        let subscribe = json!({"type": "subscribe", "id": "s", "tables": ["t"], "where": "a = 5"});
        wire.say(subscribe.clone()).await;
        let cursor = wire.find("subscribed").await["cursor"].clone();
        cluster.run(change).await;
        assert_eq!(wire.find("resync_required").await["reason"], reason, "{change}");
        // Nor does whoever comes back with a cursor of before go on over it.
        let mut back = json!({"type": "subscribe", "id": "s", "tables": ["t"]});
        back["from"] = json!({"cursor": cursor});
        back["columns"] = json!(["id"]);
        if reason == "table_dropped" {
            let mut late = cluster.node(0).wire().await;
            late.say(back).await;
            assert_eq!(late.find("resync_required").await["reason"], reason, "{change}");
        }
    }
}
