//! What nodes know of tracked tables, and what the log says when their shape changes.

use std::collections::BTreeSet;
use std::sync::Arc;

use sqlx::AssertSqlSafe;
use tidewire::filter::{Column, ColumnType};
use tidewire::postgres::Database;
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

async fn tracked(registry: &Registry, table: &str) -> Arc<TableInfo> {
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
    let registry = Registry::new(node_database(&db));
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
    let registry = Registry::new(node_database(&db));
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
    let registry = Registry::new(node_database(&db));
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
    let registry = Registry::new(node_database(&db));
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
    let registry = Arc::new(Registry::new(node_database(&db)));
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
    let registry = Registry::new(node_database(&db));
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
