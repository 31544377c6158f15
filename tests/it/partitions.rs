//! Partitions that come and go, and what is said of them.

use std::str::FromStr as _;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};

use crate::capture::{database_with, problems, run, strings};
use crate::support::answered;
use crate::support::postgres::TestDatabase;

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
        let count = "SELECT count(*)::text FROM tidewire.outbox WHERE operation <> 'SCHEMA'";
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
        let count = "SELECT count(*)::text FROM tidewire.outbox WHERE operation <> 'SCHEMA'";
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
        let seen = "SELECT table_name || ' ' || (after_data ->> 'v') FROM tidewire.outbox WHERE operation <> 'SCHEMA' ORDER BY id";
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

/// Takes what is in the outbox: operations with their key, changes with their partition.
async fn told(database: &TestDatabase) -> Vec<String> {
    let sql = "WITH taken AS (DELETE FROM tidewire.outbox RETURNING *)
        SELECT concat_ws(' ', operation, row_key::text, (
            SELECT string_agg(concat_ws(' ', change ->> 'kind', change ->> 'from', change ->> 'to'), ', ')
            FROM json_array_elements(CASE operation WHEN 'SCHEMA' THEN after_data -> 'changes' END) change))
        FROM taken ORDER BY id";
    strings(&database.pool, sql).await
}

/// What is done, what must be told at once, and what the leader's look must tell where there are no event triggers; `X` and `Y` are
/// the partitions' names, in SQL and in the outbox.
const DEPARTURES: &[(&str, &[&str], &[&str])] = &[
    (
        "BEGIN; ALTER TABLE p DETACH PARTITION p1; DELETE FROM p1 WHERE id = 1; ALTER TABLE p ATTACH PARTITION p1 FOR VALUES IN (1, 2); COMMIT",
        &["SCHEMA detach_partition public.p1", "SCHEMA attach_partition public.p1"],
        &["SCHEMA detach_partition public.p1, attach_partition public.p1"],
    ),
    (
        "ALTER TABLE m DETACH PARTITION m4; UPDATE m4 SET v = 7; ALTER TABLE m ATTACH PARTITION m4 FOR VALUES IN (4)",
        &["SCHEMA detach_partition public.m4", "SCHEMA attach_partition public.m4"],
        &["SCHEMA detach_partition public.m4, attach_partition public.m4"],
    ),
    (
        "BEGIN; ALTER TABLE p DETACH PARTITION m; DELETE FROM m; ALTER TABLE p ATTACH PARTITION m FOR VALUES IN (4, 5); COMMIT",
        &["SCHEMA detach_partition public.m4", "SCHEMA attach_partition public.m4"],
        &["SCHEMA detach_partition public.m4, attach_partition public.m4"],
    ),
    (
        "ALTER TABLE p DETACH PARTITION p1; TRUNCATE p1; ALTER TABLE p ATTACH PARTITION p1 FOR VALUES IN (1, 2)",
        &["SCHEMA detach_partition public.p1"],
        &["SCHEMA detach_partition public.p1"],
    ),
    (
        "DROP TABLE p1; CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1, 2)",
        &["SCHEMA detach_partition public.p1"],
        &["SCHEMA detach_partition public.p1"],
    ),
    (
        "CREATE TABLE x (id int NOT NULL, v int); INSERT INTO x VALUES (7);
         BEGIN; ALTER TABLE p ATTACH PARTITION x FOR VALUES IN (7); DELETE FROM p WHERE id = 7; ALTER TABLE p DETACH PARTITION x; COMMIT",
        &["SCHEMA attach_partition public.x", r#"DELETE {"id":7}"#, "SCHEMA detach_partition public.x"],
        &[r#"DELETE {"id":7}"#],
    ),
    (
        "ALTER TABLE p RENAME TO q; ALTER TABLE q RENAME TO p; CREATE INDEX ON p (v); ALTER TABLE p1 RENAME TO p9; ALTER TABLE p9 SET (fillfactor = 50)",
        &[],
        &[],
    ),
];

/// Found in review: changes of a partition that was away between two looks were lost, and nobody was told.
#[tokio::test]
async fn a_partition_that_leaves_and_comes_back_is_told_in_order() {
    for event_triggers in [true, false] {
        for options in ["", ", bulk => true", ", deferred => true"] {
            for (change, at_once, later) in DEPARTURES {
                let database = database_with(&format!(
                    "CREATE TABLE p (id int PRIMARY KEY, v int) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1, 2);
                     CREATE TABLE m PARTITION OF p FOR VALUES IN (4, 5) PARTITION BY LIST (id); CREATE TABLE m4 PARTITION OF m FOR VALUES IN (4);
                     INSERT INTO p VALUES (1), (2), (4); SELECT tidewire.track('p'{options})"
                ))
                .await;
                if !event_triggers {
                    run(
                        &database.pool,
                        "DROP EVENT TRIGGER tidewire_attach; DROP EVENT TRIGGER tidewire_ddl; DROP EVENT TRIGGER tidewire_drop",
                    )
                    .await;
                }
                // Deferred events would not let the transaction go on.
                let change = match options.contains("deferred") {
                    true => change.replace(
                        "DELETE FROM p WHERE id = 7;",
                        "DELETE FROM p WHERE id = 7; SET CONSTRAINTS ALL IMMEDIATE;",
                    ),
                    false => (*change).to_owned(),
                };
                run(&database.pool, &change).await;
                if event_triggers {
                    assert_eq!(told(&database).await, *at_once, "{options} {change}");
                }
                let mut connection = database.pool.acquire().await.unwrap();
                tidewire::schema::watch::look(&mut connection).await.unwrap();
                tidewire::schema::watch::look(&mut connection).await.unwrap();
                let expected = if event_triggers { &[] } else { *later };
                assert_eq!(told(&database).await, expected, "{options} {change}");
            }
        }
    }
}

/// Found in review: a table captured in bulk could not be written to where it had a foreign partition, and what was written into the
/// partition itself was lost. The foreign data wrapper reads nothing: the triggers are what matters.
#[tokio::test]
async fn a_table_with_a_foreign_partition_has_row_triggers() {
    let made = "CREATE FOREIGN TABLE f PARTITION OF p FOR VALUES IN (2) SERVER away";
    let attached = "CREATE FOREIGN TABLE f (id int NOT NULL, v int) SERVER away; ALTER TABLE p ATTACH PARTITION f FOR VALUES IN (2)";
    let ways = "SELECT DISTINCT tgrelid::regclass || ' ' || tgfoid::regproc FROM pg_trigger
                WHERE tgname LIKE '!tidewire%' AND tgfoid <> 'tidewire.capture_truncate()'::regprocedure ORDER BY 1";
    let by_row = ["f tidewire.capture", "p tidewire.capture", "p1 tidewire.capture"];
    let in_bulk = ["p tidewire.capture_bulk", "p1 tidewire.capture_bulk"];
    let event_triggers_off =
        "DROP EVENT TRIGGER tidewire_attach; DROP EVENT TRIGGER tidewire_ddl; DROP EVENT TRIGGER tidewire_drop";
    for (before, after, fires) in [
        (made, "", true),
        (attached, "", true),
        ("", made, true),
        ("", attached, true),
        ("", made, false),
        ("", attached, false),
    ] {
        let database = database_with(&format!(
            "CREATE FOREIGN DATA WRAPPER none; CREATE SERVER away FOREIGN DATA WRAPPER none;
             CREATE TABLE p (id int NOT NULL, v int) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
             {}; {before}; SELECT tidewire.track('p', bulk => true); {after}",
            if fires { "" } else { event_triggers_off }
        ))
        .await;
        if !fires {
            assert_eq!(problems(&database.pool).await, NOTHING, "{before}{after}");
        }
        assert_eq!(strings(&database.pool, ways).await, by_row, "{before}{after}");
        assert_eq!(problems(&database.pool).await, NOTHING, "{before}{after}");
        // What it holds came with it.
        told(&database).await;
        run(&database.pool, "INSERT INTO p VALUES (1, 1)").await;
        assert_eq!(told(&database).await, ["INSERT"], "{before}{after}");
        run(&database.pool, "DROP FOREIGN TABLE f; CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2); DROP TABLE p2")
            .await;
        assert_eq!(problems(&database.pool).await, NOTHING, "{before}{after}");
        assert_eq!(strings(&database.pool, ways).await, in_bulk, "{before}{after}");
        run(&database.pool, "INSERT INTO p VALUES (1, 2)").await;
        assert_eq!(told(&database).await.last().unwrap(), "INSERT", "{before}{after}");
    }
}

#[tokio::test]
async fn a_foreign_table_that_is_attached_is_told() {
    let database = database_with(
        "CREATE FOREIGN DATA WRAPPER none; CREATE SERVER away FOREIGN DATA WRAPPER none; CREATE FOREIGN TABLE f (id int) SERVER away;
         CREATE TABLE p (id int) PARTITION BY LIST (id); SELECT tidewire.track('p'); ALTER TABLE p ATTACH PARTITION f FOR VALUES IN (2)",
    )
    .await;
    assert_eq!(told(&database).await, ["SCHEMA attach_partition public.f"]);
    // One that is made in place has rows all the same.
    run(&database.pool, "CREATE FOREIGN TABLE g PARTITION OF p FOR VALUES IN (3) SERVER away").await;
    assert_eq!(told(&database).await, ["SCHEMA attach_partition public.g"]);
}
