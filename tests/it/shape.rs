//! What subscribers hear when a table changes its shape: those who are not concerned go on, the others are told why not.

use serde_json::{Value, json};

use crate::support::cluster::TestCluster;
use crate::support::wire::Wire;

/// Messages to a connection, by the subscription that they are for.
struct Ear {
    wire: Wire,
    heard: Vec<Value>,
}

impl Ear {
    fn new(wire: Wire) -> Self {
        Self { wire, heard: Vec::new() }
    }

    async fn subscribe(&mut self, subscribe: Value) -> Value {
        let id = subscribe["id"].clone();
        self.wire.say(subscribe).await;
        self.next(&id, |message| message["type"] != "events").await
    }

    /// The next message for `id` that satisfies `wanted`; what comes for others is kept.
    async fn next(&mut self, id: &Value, wanted: impl Fn(&Value) -> bool) -> Value {
        let fits = |message: &Value| message["id"] == *id && message["type"] != "caught_up" && wanted(message);
        loop {
            if let Some(index) = self.heard.iter().position(&fits) {
                return self.heard.remove(index);
            }
            let message = self.wire.message().await;
            self.heard.push(message);
        }
    }

    /// Operations that come for `id`, until the last of these.
    async fn hears(&mut self, id: &str, operations: &[&str]) -> Vec<Value> {
        let mut events = Vec::new();
        while events.len() < operations.len() {
            let message = self.next(&id.into(), |_| true).await;
            assert_eq!(message["type"], "events", "{message}");
            events.extend(message["events"].as_array().unwrap().iter().cloned());
        }
        assert_eq!(events.iter().map(|event| event["op"].as_str().unwrap()).collect::<Vec<_>>(), operations);
        events
    }

    async fn resync(&mut self, id: &str) -> (String, String) {
        let message = self.next(&id.into(), |_| true).await;
        assert_eq!(message["type"], "resync_required", "{message}");
        let text = |member: &str| message[member].as_str().unwrap().to_owned();
        (text("reason"), text("message"))
    }
}

#[tokio::test]
async fn only_those_whose_columns_change_have_to_begin_anew() {
    let cluster = TestCluster::start(2).await;
    // Not the leader's node, if it can be helped: the change travels by the feed.
    let mut ear = Ear::new(cluster.node((cluster.leader().await + 1) % 2).wire().await);
    let paid = json!({"type": "subscribe", "id": "paid", "tables": ["orders"], "where": "status = 'paid'"});
    let start = ear.subscribe(paid.clone()).await;
    ear.subscribe(json!({"type": "subscribe", "id": "dear", "tables": ["orders"], "where": "total > 5"})).await;
    ear.subscribe(json!({"type": "subscribe", "id": "all", "tables": ["*"]})).await;
    cluster.run("INSERT INTO orders (id, status, total) VALUES (1, 'paid', 10)").await;
    for id in ["paid", "dear", "all"] {
        ear.hears(id, &["INSERT"]).await;
    }

    cluster.run("ALTER TABLE orders RENAME status TO state").await;
    let told = ear.hears("paid", &["SCHEMA"]).await;
    assert_eq!(told[0]["after"]["changes"][0]["to"], "state");
    let (reason, message) = ear.resync("paid").await;
    assert_eq!(reason, "schema_changed");
    assert!(message.contains("state"), "{message}");

    cluster.run("INSERT INTO orders (id, state, total) VALUES (2, 'paid', 20)").await;
    for id in ["dear", "all"] {
        let events = ear.hears(id, &["SCHEMA", "INSERT"]).await;
        assert_eq!(events[1]["after"]["state"], "paid");
    }
    let refused = ear.subscribe(paid.clone()).await;
    assert_eq!((&refused["type"], &refused["code"]), (&json!("error"), &json!("bad_filter")));
    let anew = json!({"type": "subscribe", "id": "paid", "tables": ["orders"], "where": "state = 'paid'"});
    assert_eq!(ear.subscribe(anew.clone()).await["type"], "subscribed");
    cluster.run("INSERT INTO orders (id, state) VALUES (3, 'new'), (4, 'paid')").await;
    let events = ear.hears("paid", &["INSERT"]).await;
    assert_eq!(events[0]["key"]["id"], 4);

    // Whoever was away meanwhile is told the same.
    let mut late = Ear::new(cluster.node(0).wire().await);
    let mut since = anew;
    since["from"] = json!({"cursor": start["cursor"]});
    assert_eq!(late.subscribe(since).await["type"], "subscribed");
    loop {
        let message = late.next(&"paid".into(), |_| true).await;
        if message["type"] == "resync_required" {
            assert_eq!(message["reason"], "schema_changed");
            break;
        }
        let events = message["events"].as_array().unwrap();
        assert!(events.iter().all(|event| event["key"]["id"] == 1), "nothing after the change: {message}");
    }
}

#[tokio::test]
async fn a_dropped_table_ends_its_subscriptions_and_its_successor_is_another() {
    let cluster = TestCluster::start(1).await;
    let mut ear = Ear::new(cluster.node(0).wire().await);
    let orders = json!({"type": "subscribe", "id": "orders", "tables": ["orders"]});
    ear.subscribe(orders.clone()).await;
    cluster
        .run(
            "BEGIN; DROP TABLE orders; CREATE TABLE orders (id bigint PRIMARY KEY); SELECT tidewire.track('orders');
             INSERT INTO orders VALUES (7); COMMIT",
        )
        .await;
    let told = ear.hears("orders", &["SCHEMA"]).await;
    assert_eq!(told[0]["after"]["changes"][0]["kind"], "drop_table");
    assert_eq!(ear.resync("orders").await.0, "table_dropped");
    assert_eq!(ear.subscribe(orders).await["type"], "subscribed");
    cluster.run("INSERT INTO orders VALUES (8)").await;
    assert_eq!(ear.hears("orders", &["INSERT"]).await[0]["key"]["id"], 8);

    cluster.run("ALTER TABLE orders RENAME TO purchases").await;
    let (reason, message) = loop {
        let message = ear.next(&"orders".into(), |_| true).await;
        if message["type"] == "resync_required" {
            break (message["reason"].clone(), message["message"].as_str().unwrap().to_owned());
        }
    };
    assert_eq!(reason, "schema_changed");
    assert!(message.contains("public.purchases"), "{message}");
}

#[tokio::test]
async fn a_glob_with_a_row_condition_covers_a_table_tracked_a_moment_ago() {
    let cluster = TestCluster::start(2).await;
    let key = cluster.key(json!({"tables": [{"table": "*", "condition": "id > 10"}]})).await;
    let mut ears = Vec::new();
    for node in 0..2 {
        let mut ear = Ear::new(cluster.node(node).wire_of(key.expose()).await);
        ear.subscribe(json!({"type": "subscribe", "id": "all", "tables": ["*"]})).await;
        ears.push(ear);
    }
    cluster
        .run(
            "CREATE TABLE late (id int PRIMARY KEY); SELECT tidewire.track('late');
             INSERT INTO late VALUES (5), (15)",
        )
        .await;
    cluster.run("INSERT INTO late VALUES (16)").await;
    for ear in &mut ears {
        let events = ear.hears("all", &["INSERT", "INSERT"]).await;
        assert_eq!((&events[0]["after"]["id"], &events[1]["after"]["id"]), (&json!(15), &json!(16)));
    }
}

#[tokio::test]
async fn row_security_ends_what_it_would_have_refused() {
    let cluster = TestCluster::start(1).await;
    let mut ear = Ear::new(cluster.node(0).wire().await);
    let orders = json!({"type": "subscribe", "id": "orders", "tables": ["orders"]});
    ear.subscribe(orders.clone()).await;
    cluster.run("ALTER TABLE orders ENABLE ROW LEVEL SECURITY").await;
    ear.hears("orders", &["SCHEMA"]).await;
    assert_eq!(ear.resync("orders").await.0, "schema_changed");
    let refused = ear.subscribe(orders).await;
    assert_eq!((&refused["type"], &refused["code"]), (&json!("error"), &json!("forbidden")));
}
