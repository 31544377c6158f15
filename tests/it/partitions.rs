//! Partitions that come and go, and what is said of them.

use std::str::FromStr as _;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};

use crate::capture::{database_with, problems, run, strings};
use crate::support::answered;

const NOTHING: &[&str] = &[];

/// Found in review: its changes went out under its own name, past the conditions of the table's keys, and it could not be
/// attached again.
#[tokio::test]
async fn a_partition_that_was_detached_is_captured_no_more_until_it_is_attached_again() {
    for bulk in [false, true] {
        let database = database_with(&format!(
            "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
             SELECT tidewire.track('p', bulk => {bulk}); ALTER TABLE p DETACH PARTITION p1"
        ))
        .await;
        let count = "SELECT count(*)::text FROM tidewire.outbox";
        // Before the leader has looked, and after.
        run(&database.pool, "INSERT INTO p1 VALUES (1); TRUNCATE p1").await;
        assert_eq!(strings(&database.pool, count).await, ["0"], "bulk: {bulk}");
        assert_eq!(problems(&database.pool).await, NOTHING);
        run(&database.pool, "INSERT INTO p1 VALUES (1); UPDATE p1 SET id = 2; TRUNCATE p1").await;
        assert_eq!(strings(&database.pool, count).await, ["0"], "bulk: {bulk}");
        let tracked = "SELECT table_name FROM tidewire.tracked_tables";
        assert_eq!(strings(&database.pool, tracked).await, ["public.p"]);
        run(&database.pool, "ALTER TABLE p ATTACH PARTITION p1 FOR VALUES IN (1)").await;
        assert_eq!(problems(&database.pool).await, NOTHING);
        run(&database.pool, "INSERT INTO p1 VALUES (1)").await;
        let seen = "SELECT DISTINCT table_name FROM tidewire.outbox";
        assert_eq!(strings(&database.pool, seen).await, ["public.p"], "bulk: {bulk}");
    }
}

/// Found in review: it was its own root, and was captured under its own name for ever.
#[tokio::test]
async fn a_partition_with_partitions_that_was_detached_is_captured_no_more() {
    for bulk in [false, true] {
        let database = database_with(&format!(
            "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY LIST (id);
             CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1) PARTITION BY LIST (id);
             CREATE TABLE p11 PARTITION OF p1 FOR VALUES IN (1);
             SELECT tidewire.track('p', bulk => {bulk}); ALTER TABLE p DETACH PARTITION p1"
        ))
        .await;
        let count = "SELECT count(*)::text FROM tidewire.outbox";
        // Before the leader has looked, and after.
        for _ in 0..2 {
            run(&database.pool, "INSERT INTO p1 VALUES (1); TRUNCATE p11; INSERT INTO p11 VALUES (1); TRUNCATE p1")
                .await;
            assert_eq!(strings(&database.pool, count).await, ["0"], "bulk: {bulk}");
            assert_eq!(problems(&database.pool).await, NOTHING);
        }
        let bears =
            "SELECT DISTINCT tgrelid::regclass::text FROM pg_trigger WHERE tgname LIKE '!tidewire%' AND tgparentid = 0
                     AND tgrelid IN ('p1'::regclass) UNION SELECT table_name FROM tidewire.tracked_tables";
        assert_eq!(strings(&database.pool, bears).await, ["public.p"], "bulk: {bulk}");
    }
}

/// Found in review: such rows went out under the partition's name, and whoever reads the table never saw them.
#[tokio::test]
async fn rows_of_a_partition_that_is_being_detached_concurrently_are_still_the_tables() {
    for bulk in [false, true] {
        let database = database_with(&format!(
            "CREATE TABLE p (id int PRIMARY KEY, v int) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
             INSERT INTO p VALUES (1, 0); SELECT tidewire.track('p', bulk => {bulk})"
        ))
        .await;
        let options = PgConnectOptions::from_str(&database.url).unwrap();
        let mut old = options.connect().await.unwrap();
        sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM p").execute(&mut old).await.unwrap();
        let mut other = options.connect().await.unwrap();
        let detaching = tokio::spawn(async move {
            sqlx::query("ALTER TABLE p DETACH PARTITION p1 CONCURRENTLY").execute(&mut other).await.unwrap();
        });
        answered("the first half of the detachment", async || {
            let pending = "SELECT 'pending' FROM pg_inherits WHERE inhrelid = 'p1'::regclass AND inhdetachpending";
            strings(&database.pool, pending).await.pop()
        })
        .await;
        sqlx::raw_sql("UPDATE p SET v = 1; UPDATE p1 SET v = 2; COMMIT").execute(&mut old).await.unwrap();
        detaching.await.unwrap();
        let seen = "SELECT table_name || ' ' || (after_data ->> 'v') FROM tidewire.outbox ORDER BY id";
        assert_eq!(strings(&database.pool, seen).await, ["public.p 1", "public.p 2"], "bulk: {bulk}");
        old.close().await.unwrap();
    }
}

/// Found in review: a context copied from another event's headers made a table's TRUNCATE look like that of a partition.
#[tokio::test]
async fn no_context_makes_a_tables_truncation_look_like_a_partitions() {
    let database = database_with(
        "CREATE TABLE p (id int) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p DEFAULT; SELECT tidewire.track('p')",
    )
    .await;
    let truncate =
        r#"BEGIN; SET LOCAL tidewire.headers = '{"tidewire.partition": "public.x", "a": 1}'; TRUNCATE p; COMMIT"#;
    run(&database.pool, truncate).await;
    let seen = "SELECT headers::text FROM tidewire.outbox";
    assert_eq!(strings(&database.pool, seen).await, [r#"{"a": 1}"#]);
}
