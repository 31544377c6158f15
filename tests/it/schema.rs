//! What nodes know of tracked tables, and what the log says when their shape changes.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _};
use tidewire::filter::{Column, ColumnType};
use tidewire::lifecycle::Lifecycle;
use tidewire::postgres::Database;
use tidewire::schema::watch::{Look, look};
use tidewire::schema::{Lookup, Registry, TableInfo};
use tidewire::table_name::TableName;

use crate::support::postgres::{TestDatabase, database};

fn node_database(db: &TestDatabase) -> Arc<Database> {
    Arc::new(Database::new(&db.url, None, "test", 5).unwrap())
}

async fn run(db: &TestDatabase, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(&db.pool)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

fn name(text: &str) -> TableName {
    text.parse().unwrap()
}

async fn tracked(registry: &Arc<Registry>, table: &str) -> Arc<TableInfo> {
    match registry.lookup(&name(table)).await.unwrap() {
        Lookup::Tracked(info) => info,
        other => panic!("{table}: {other:?}"),
    }
}

const ORDERS: &str = "CREATE DOMAIN money_amount AS numeric(12,2);
    CREATE TYPE order_status AS ENUM ('new', 'paid');
    CREATE TABLE orders (id bigint PRIMARY KEY, status order_status, amount money_amount, note varchar(40));
    SELECT tidewire.track('orders', except_columns => '{note}', notify => true)";

#[tokio::test]
async fn a_table_tracked_a_moment_ago_is_known() {
    let db = database().await;
    let registry = Arc::new(Registry::new(node_database(&db), Lifecycle::new()));
    assert_eq!(registry.lookup(&name("orders")).await.unwrap(), Lookup::Unknown);
    run(&db, "CREATE TABLE orders (id bigint PRIMARY KEY)").await;
    assert_eq!(registry.lookup(&name("orders")).await.unwrap(), Lookup::NotTracked);
    run(&db, "DROP TABLE orders").await;
    run(&db, ORDERS).await;
    let info = tracked(&registry, "orders").await;
    let columns = [
        Column::new("id", ColumnType::Int8),
        Column::new("status", ColumnType::Enum),
        Column::new("amount", ColumnType::Numeric),
        Column::new("note", ColumnType::Text),
    ];
    assert_eq!(info.columns, columns);
    assert_eq!(
        info.captured,
        Some(["id", "status", "amount"].into_iter().map(Box::from).collect::<BTreeSet<Box<str>>>())
    );
    assert_eq!(info.key_columns.as_deref(), Some(["id".to_owned()].as_slice()));
    assert_eq!((info.name.as_str(), info.before_image, info.row_security), ("public.orders", true, false));
    assert!(registry.is_current(&info));
    assert_eq!(registry.public_channels().borrow().get("public.orders").map(String::as_str), Some("cdc_orders"));
}

#[tokio::test]
async fn names_are_taken_as_they_are() {
    let db = database().await;
    let registry = Arc::new(Registry::new(node_database(&db), Lifecycle::new()));
    run(
        &db,
        r#"CREATE SCHEMA "Sales.EU"; CREATE TABLE "Sales.EU"."Order Lines" (a int, "B" int, PRIMARY KEY (a, "B"));
           SELECT tidewire.track('"Sales.EU"."Order Lines"', columns => '{}', before_image => false);
           CREATE VIEW v AS SELECT 1"#,
    )
    .await;
    let info = tracked(&registry, r#""Sales.EU"."Order Lines""#).await;
    assert_eq!(info.key_columns.as_deref(), Some(["a".to_owned(), "B".to_owned()].as_slice()));
    assert!(!info.before_image);
    assert_eq!(registry.lookup(&name("v")).await.unwrap(), Lookup::NotTracked);
    assert_eq!(registry.lookup(&name("Orders")).await.unwrap(), Lookup::Unknown);
}

#[tokio::test]
async fn a_refresh_brings_new_tables_and_forgets_old_ones() {
    let db = database().await;
    let registry = Arc::new(Registry::new(node_database(&db), Lifecycle::new()));
    run(&db, ORDERS).await;
    let before = tracked(&registry, "orders").await;
    run(&db, "CREATE TABLE lines (id int); SELECT tidewire.track('lines')").await;
    registry.refresh().await.unwrap();
    assert!(registry.cached("public.lines").is_some());
    assert!(Arc::ptr_eq(&before, &registry.cached("public.orders").unwrap()), "what did not change is kept");
    run(&db, "ALTER TABLE orders ADD COLUMN extra int; SELECT tidewire.untrack('lines')").await;
    registry.refresh().await.unwrap();
    assert_eq!(registry.lookup(&name("lines")).await.unwrap(), Lookup::NotTracked);
    assert!(registry.cached("public.lines").is_some(), "for those of its events that are still to be shown");
    assert!(!registry.is_current(&before));
    run(&db, "ALTER TABLE orders ADD COLUMN more int").await;
    let before = tracked(&registry, "orders").await;
    assert_eq!(before.columns.len(), 5, "it is remembered");
    registry.forget("public.orders");
    assert!(!registry.is_current(&before));
    assert_eq!(tracked(&registry, "orders").await.columns.len(), 6);
}

#[tokio::test]
async fn a_table_is_known_before_its_events_are_routed() {
    let db = database().await;
    let registry = Arc::new(Registry::new(node_database(&db), Lifecycle::new()));
    let tables: Vec<Arc<str>> = vec!["public.orders".into(), "event:x".into(), "public.gone".into()];
    registry.acquaint(&tables).await.unwrap();
    assert!(registry.cached("public.orders").is_none());
    run(&db, ORDERS).await;
    registry.acquaint(&tables).await.unwrap();
    assert!(registry.cached("public.orders").is_none(), "what is no tracked table is asked for once");
    let version = registry.version();
    registry.forget_strangers();
    registry.acquaint(&tables).await.unwrap();
    assert!(registry.cached("public.orders").is_some());
    assert!(registry.version() > version);
}

#[tokio::test]
async fn many_who_ask_at_once_share_few_queries() {
    let db = database().await;
    let registry = Arc::new(Registry::new(node_database(&db), Lifecycle::new()));
    run(&db, ORDERS).await;
    let asking: Vec<_> = (0..200)
        .map(|number| {
            let registry = Arc::clone(&registry);
            let table = if number % 2 == 0 { name("orders") } else { name("nothing") };
            tokio::spawn(async move { (number, registry.lookup(&table).await.unwrap()) })
        })
        .collect();
    for task in asking {
        let (number, found) = task.await.unwrap();
        assert_eq!(matches!(found, Lookup::Tracked(_)), number % 2 == 0);
    }
}

#[tokio::test]
async fn a_partition_is_not_tracked_itself() {
    let db = database().await;
    let registry = Arc::new(Registry::new(node_database(&db), Lifecycle::new()));
    run(
        &db,
        "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (10);
         SELECT tidewire.track('parted')",
    )
    .await;
    assert_eq!(tracked(&registry, "parted").await.columns.len(), 1);
    assert_eq!(registry.lookup(&name("parted_1")).await.unwrap(), Lookup::NotTracked);
}

/// A leader's view: its connection, and what it wrote.
struct Watcher<'a> {
    db: &'a TestDatabase,
    connection: PgConnection,
}

impl<'a> Watcher<'a> {
    /// Has looked once, so that everything is noted.
    async fn new(db: &'a TestDatabase) -> Self {
        let mut watcher = Self { db, connection: PgConnection::connect(&db.url).await.unwrap() };
        assert_eq!(watcher.events().await, []);
        watcher
    }

    async fn look(&mut self) -> Look {
        look(&mut self.connection).await.unwrap()
    }

    /// The SCHEMA events that a look writes: table and kinds of changes.
    async fn events(&mut self) -> Vec<(String, Value)> {
        let found = self.look().await;
        let taken: Vec<(String, sqlx::types::Json<Value>)> = sqlx::query_as(
            "WITH taken AS (DELETE FROM tidewire.outbox WHERE operation = 'SCHEMA' RETURNING id, table_name, after_data)
             SELECT table_name, after_data FROM taken ORDER BY id",
        )
        .fetch_all(&self.db.pool)
        .await
        .unwrap();
        // What happens to partitions is told by the statements themselves.
        assert!(found.events <= taken.len());
        assert_eq!(self.look().await.events, 0, "each change is told once");
        taken.into_iter().map(|(table, after)| (table, after.0)).collect()
    }

    /// As [`Self::events`], where there is one: its table and changes.
    async fn changes(&mut self) -> (String, Value) {
        let mut events = self.events().await;
        assert_eq!(events.len(), 1, "{events:?}");
        let (table, mut after) = events.remove(0);
        (table, after["changes"].take())
    }

    async fn after(&mut self, sql: &str) -> (String, Value) {
        run(self.db, sql).await;
        self.changes().await
    }
}

fn told(changes: &Value) -> Vec<&str> {
    changes.as_array().unwrap().iter().map(|change| change["kind"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn every_change_of_a_column_is_told_once() {
    let db = database().await;
    run(&db, ORDERS).await;
    let mut watcher = Watcher::new(&db).await;
    let (table, changes) = watcher.after("ALTER TABLE orders ADD COLUMN extra int").await;
    assert_eq!(table, "public.orders");
    assert_eq!(changes, json!([{"kind": "add_column", "column": "extra", "type": "integer"}]));
    let (_, changes) = watcher.after("ALTER TABLE orders RENAME extra TO more").await;
    assert_eq!(
        changes,
        json!([{"kind": "rename_column", "column": "extra", "from": "extra", "to": "more", "type": "integer"}])
    );
    let (_, changes) = watcher.after("ALTER TABLE orders ALTER more TYPE bigint").await;
    assert_eq!(changes[0]["kind"], "alter_column");
    assert_eq!((&changes[0]["from"], &changes[0]["to"]), (&json!("integer"), &json!("bigint")));
    let (_, changes) = watcher.after("ALTER TABLE orders DROP COLUMN more").await;
    assert_eq!(changes, json!([{"kind": "drop_column", "column": "more", "type": "bigint"}]));
    run(&db, "ALTER TABLE orders ADD COLUMN a int; ALTER TABLE orders DROP COLUMN a; ANALYZE orders").await;
    assert_eq!(watcher.events().await, [], "what was undone is no change");
}

#[tokio::test]
async fn tracking_makes_no_event() {
    let db = database().await;
    run(&db, ORDERS).await;
    let mut watcher = Watcher::new(&db).await;
    run(&db, "SELECT tidewire.track('orders', key => '{status}', bulk => true)").await;
    assert_eq!(watcher.events().await, []);
    run(&db, "SELECT tidewire.track('orders')").await;
    assert_eq!(watcher.events().await, []);
}

#[tokio::test]
async fn a_renamed_table_is_told_under_its_old_name() {
    let db = database().await;
    run(&db, ORDERS).await;
    let mut watcher = Watcher::new(&db).await;
    let (table, changes) = watcher.after("ALTER TABLE orders RENAME TO purchases").await;
    assert_eq!(table, "public.orders");
    assert_eq!(changes, json!([{"kind": "rename_table", "from": "public.orders", "to": "public.purchases"}]));
    let (table, _) = watcher.after("ALTER TABLE purchases ADD COLUMN b int").await;
    assert_eq!(table, "public.purchases");
    let (table, _) = watcher.after("CREATE SCHEMA elsewhere; ALTER TABLE purchases SET SCHEMA elsewhere").await;
    assert_eq!(table, "public.purchases");
}

#[tokio::test]
async fn a_dropped_table_is_told_before_anything_of_its_successor() {
    let db = database().await;
    run(&db, ORDERS).await;
    let mut watcher = Watcher::new(&db).await;
    let (table, changes) = watcher.after("DROP TABLE orders").await;
    assert_eq!((table.as_str(), changes), ("public.orders", json!([{"kind": "drop_table"}])));

    run(&db, "CREATE TABLE orders (id int PRIMARY KEY); SELECT tidewire.track('orders')").await;
    assert_eq!(watcher.events().await, []);
    run(
        &db,
        "BEGIN; DROP TABLE orders; CREATE TABLE orders (id int PRIMARY KEY); SELECT tidewire.track('orders');
         INSERT INTO orders VALUES (1); COMMIT",
    )
    .await;
    let written: Vec<(String, String)> =
        sqlx::query_as("SELECT table_name, operation FROM tidewire.outbox ORDER BY id")
            .fetch_all(&db.pool)
            .await
            .unwrap();
    let expected = [("public.orders", "SCHEMA"), ("public.orders", "INSERT")];
    assert_eq!(
        written.iter().map(|(table, operation)| (table.as_str(), operation.as_str())).collect::<Vec<_>>(),
        expected
    );
}

#[tokio::test]
async fn two_leaders_that_overlap_tell_a_change_once() {
    let db = database().await;
    run(&db, ORDERS).await;
    drop(Watcher::new(&db).await);
    run(&db, "ALTER TABLE orders ADD COLUMN extra int").await;
    let looking: Vec<_> = (0..4)
        .map(|_| {
            let url = db.url.clone();
            tokio::spawn(async move {
                let mut connection = PgConnection::connect(&url).await.unwrap();
                look(&mut connection).await.unwrap().events
            })
        })
        .collect();
    let mut told = 0;
    for task in looking {
        told += task.await.unwrap();
    }
    assert_eq!(told, 1);
}

#[tokio::test]
async fn broken_capture_is_reported_and_told() {
    let db = database().await;
    run(&db, ORDERS).await;
    // Where there are any, they tell the gap itself.
    run(&db, "ALTER EVENT TRIGGER tidewire_ddl DISABLE; ALTER EVENT TRIGGER tidewire_drop DISABLE").await;
    let mut watcher = Watcher::new(&db).await;
    let (_, changes) = watcher.after(r#"ALTER TABLE orders DISABLE TRIGGER "!tidewire""#).await;
    assert_eq!(told(&changes), ["capture_broken"]);
    assert!(changes[0]["message"].as_str().unwrap().contains("trigger_disabled"), "{changes}");
    let faults = watcher.look().await.faults;
    assert_eq!(faults.keys().collect::<Vec<_>>(), ["public.orders"]);
    let (_, changes) = watcher.after(r#"ALTER TABLE orders ENABLE TRIGGER "!tidewire""#).await;
    assert_eq!(told(&changes), ["capture_restored"]);
    assert!(watcher.look().await.faults.is_empty());

    let dropping = r#"DROP TRIGGER "!tidewire" ON orders; DROP TRIGGER "!tidewire_update" ON orders;
        DROP TRIGGER "!tidewire_truncate" ON orders"#;
    let (_, changes) = watcher.after(dropping).await;
    assert_eq!(told(&changes), ["capture_broken"]);
    let (_, changes) = watcher.after("SELECT tidewire.track('orders')").await;
    assert_eq!(told(&changes), ["capture_restored"]);
}

#[tokio::test]
async fn keys_partitions_and_row_security_are_part_of_the_shape() {
    let db = database().await;
    run(
        &db,
        "CREATE TABLE parted (id int NOT NULL, other int NOT NULL) PARTITION BY RANGE (id);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (10);
         SELECT tidewire.track('parted')",
    )
    .await;
    let mut watcher = Watcher::new(&db).await;
    let (_, changes) = watcher.after("ALTER TABLE parted ADD PRIMARY KEY (id)").await;
    assert_eq!(changes, json!([{"kind": "key", "from": null, "to": ["id"]}]));
    let (_, changes) = watcher.after("ALTER TABLE parted ENABLE ROW LEVEL SECURITY").await;
    assert_eq!(changes, json!([{"kind": "row_security", "from": false, "to": true}]));
    run(&db, "CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (10) TO (20)").await;
    assert_eq!(watcher.events().await, [], "a new partition brings no rows");
    let (_, changes) = watcher.after("DROP TABLE parted_1").await;
    assert_eq!((told(&changes), &changes[0]["from"]), (vec!["detach_partition"], &json!("public.parted_1")));
}
