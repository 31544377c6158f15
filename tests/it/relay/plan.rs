//! The claim's plan: it stays on the indexes, and what is dead or uncommitted costs it nothing. Counted in buffers, never
//! in time.

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tidewire::log::append::CLAIM;

use super::rows;
use crate::support::postgres::{TestDatabase, database};
use crate::support::relay::{Term, Writer, emit, faults};

/// Blocks that an empty claim may touch: a few index descents, the catalog, the sequence.
const FEW_BLOCKS: u64 = 150;

/// Explains the claim that a drained relay makes now.
async fn explain_idle(database: &TestDatabase) -> Value {
    let (low, snapshot): (i64, String) =
        sqlx::query_as("SELECT last_value, pg_current_snapshot()::text FROM tidewire.outbox_id_seq")
            .fetch_one(&database.pool)
            .await
            .unwrap();
    let parts: Vec<&str> = snapshot.split(':').collect();
    explain(database, 500, low, parts[2], parts[1]).await
}

/// Explains a claim of this window, floor, running transactions and newest one.
async fn explain(database: &TestDatabase, window: i64, low: i64, unseen: &str, newest: &str) -> Value {
    let mut connection = PgConnection::connect(&database.url).await.unwrap();
    tidewire::postgres::settings::lead(&mut connection, std::time::Duration::from_secs(20)).await.unwrap();
    let prepare = format!("PREPARE claim (bigint, bigint, bigint, bigint, bigint, text[], text) AS {CLAIM}");
    sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut connection).await.unwrap();
    let explain = format!(
        "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)
         EXECUTE claim(500000, 4194304, {window}, {low}, {window}, '{{{unseen}}}', '{newest}')"
    );
    sqlx::raw_sql("BEGIN").execute(&mut connection).await.unwrap();
    // The second time: index entries that were found dead are marked by the first.
    sqlx::raw_sql(AssertSqlSafe(format!("{explain}; ROLLBACK; BEGIN"))).execute(&mut connection).await.unwrap();
    // Never committed: the connection is dropped.
    sqlx::query_scalar::<_, Value>(AssertSqlSafe(explain)).persistent(false).fetch_one(&mut connection).await.unwrap()
}

fn blocks(plan: &Value) -> u64 {
    let top = &plan[0]["Plan"];
    top["Shared Hit Blocks"].as_u64().unwrap() + top["Shared Read Blocks"].as_u64().unwrap()
}

fn assert_indexed(plan: &Value) {
    fn walk(node: &Value, scans: &mut Vec<String>) {
        let kind = node["Node Type"].as_str().unwrap_or_default();
        if node["Relation Name"] == "outbox" && kind.contains("Scan") {
            scans.push(format!("{kind} {}", node["Index Name"].as_str().unwrap_or_default()));
        }
        for child in node["Plans"].as_array().into_iter().flatten() {
            walk(child, scans);
        }
    }
    let mut scans = Vec::new();
    walk(&plan[0]["Plan"], &mut scans);
    scans.sort();
    scans.dedup();
    assert_eq!(
        scans,
        ["Index Only Scan outbox_xid_id", "Index Scan outbox_pkey", "Index Scan outbox_xid_id", "Tid Scan "],
        "{plan:#}"
    );
}

#[tokio::test]
async fn an_idle_claim_touches_few_blocks_whatever_the_dead_rows_that_a_snapshot_holds() {
    let database = database().await;
    let mut writer = Writer::connect(&database.url).await;
    let mut holder = Writer::connect(&database.url).await;
    holder.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM tidewire.outbox").await;
    for part in 0..20 {
        writer.run(&rows(&format!("{part}-"), 5_000)).await;
    }
    let mut term = Term::begin(&database.url, 5_000).await.unwrap();
    assert_eq!(term.drain().await, 100_000);
    let plan = explain_idle(&database).await;
    assert_indexed(&plan);
    assert!(blocks(&plan) < FEW_BLOCKS, "{} blocks: {plan:#}", blocks(&plan));
    holder.run("COMMIT").await;
}

#[tokio::test]
async fn the_uncommitted_rows_of_a_bulk_writer_cost_an_idle_claim_nothing() {
    let database = database().await;
    let (mut bulk, mut other) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    let mut term = Term::begin(&database.url, 500).await.unwrap();
    bulk.run(&format!("BEGIN; {}", rows("", 50_000))).await;
    // Any later transaction id puts the bulk writer into the list of those that run.
    other.emit("other").await;
    assert_eq!(term.drain().await, 1);
    let plan = explain_idle(&database).await;
    assert_indexed(&plan);
    assert!(blocks(&plan) < FEW_BLOCKS, "{} blocks: {plan:#}", blocks(&plan));
    bulk.run("ROLLBACK").await;
}

#[tokio::test]
async fn a_large_transaction_that_waits_for_its_end_is_not_read_again_by_every_claim() {
    let database = database().await;
    let (mut large, mut small) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    large.run(&format!("BEGIN; {}", rows("", 20_000))).await;
    for _ in 0..40 {
        small.run(&rows("small", 50)).await;
    }
    large.run(&format!("{}; COMMIT", emit("end"))).await;
    // The floor is past the beginning of the large one, its end beyond the window.
    let (xid, newest): (String, String) = sqlx::query_as(
        "SELECT (SELECT xid::text FROM tidewire.outbox ORDER BY id LIMIT 1), pg_snapshot_xmax(pg_current_snapshot())::text",
    )
    .fetch_one(&database.pool)
    .await
    .unwrap();
    let plan = explain(&database, 50, 20_100, &xid, &newest).await;
    assert_indexed(&plan);
    assert!(blocks(&plan) < 10 * FEW_BLOCKS, "{} blocks: {plan:#}", blocks(&plan));
    let mut term = Term::begin(&database.url, 50).await.unwrap();
    term.drain().await;
    assert_eq!(term.newest, 22_001);
    assert_eq!(term.last(1), ["end."]);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}
