//! Trigger capture: every committed change of a tracked table is in the outbox once, as it really happened, and no DDL of
//! the table's owner breaks a write.
//!
//! The tests read the outbox itself, in the order of its ids; what the relay makes of it is tried elsewhere.

use serde_json::Value;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool, Row as _};

use crate::support::postgres::{TestDatabase, database};

pub(crate) async fn run(pool: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// A migrated database after these statements.
pub(crate) async fn database_with(sql: &str) -> TestDatabase {
    let database = database().await;
    run(&database.pool, sql).await;
    database
}

/// Takes what was captured since the last call: `OPERATION key [was old key] before -> after`, `-` for SQL nulls.
pub(crate) async fn captured(pool: &PgPool) -> Vec<String> {
    let line = |row: PgRow| {
        let text = |column: &str| row.get::<Option<String>, _>(column).unwrap_or_else(|| "-".into());
        let was = row.get::<Option<String>, _>("old_key").map(|was| format!("was {was} ")).unwrap_or_default();
        format!("{} {} {was}{} -> {}", text("operation"), text("row_key"), text("before_data"), text("after_data"))
    };
    let sql = "WITH taken AS (DELETE FROM tidewire.outbox RETURNING *)
        SELECT operation, row_key::text, old_key::text, before_data::text, after_data::text FROM taken ORDER BY id";
    sqlx::query(sql).fetch_all(pool).await.unwrap().into_iter().map(line).collect()
}

pub(crate) async fn strings(pool: &PgPool, sql: &str) -> Vec<String> {
    sqlx::query_scalar(AssertSqlSafe(sql.to_owned()))
        .fetch_all(pool)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"))
}

/// What the leader is told: `problem table detail`.
pub(crate) async fn problems(pool: &PgPool) -> Vec<String> {
    strings(pool, "SELECT concat_ws(' ', problem, table_name, detail) FROM tidewire.refresh_tracked() ORDER BY 1").await
}

/// The message and hint of the error that a statement must raise.
pub(crate) async fn refusal(pool: &PgPool, sql: &str) -> String {
    let error = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(pool).await.expect_err(sql);
    let error = error.into_database_error().unwrap();
    let hint = error.downcast_ref::<sqlx::postgres::PgDatabaseError>().hint().unwrap_or_default().to_owned();
    format!("{}. {hint}", error.message())
}

#[tokio::test]
async fn each_change_is_captured_once_with_key_before_and_after() {
    let database = database_with(
        "CREATE TABLE orders (id bigint PRIMARY KEY, status text); SELECT tidewire.track('orders');
         INSERT INTO orders VALUES (1, 'new'); UPDATE orders SET status = 'paid'; UPDATE orders SET id = 2; DELETE FROM orders;
         TRUNCATE orders;",
    )
    .await;
    let tables = strings(&database.pool, "SELECT DISTINCT table_name FROM tidewire.outbox").await;
    assert_eq!(tables, ["public.orders"]);
    assert_eq!(
        captured(&database.pool).await,
        [
            r#"INSERT {"id":1} - -> {"id":1,"status":"new"}"#,
            r#"UPDATE {"id":1} {"id":1,"status":"new"} -> {"id":1,"status":"paid"}"#,
            r#"UPDATE {"id":2} was {"id":1} {"id":1,"status":"paid"} -> {"id":2,"status":"paid"}"#,
            r#"DELETE {"id":2} {"id":2,"status":"paid"} -> -"#,
            "TRUNCATE - - -> -",
        ]
    );
}

#[tokio::test]
async fn an_update_that_changes_nothing_queues_nothing() {
    // json and point have no equality operator: comparing rows with IS DISTINCT FROM would fail the user's UPDATE.
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY, doc json, at point, n numeric); SELECT tidewire.track('t');
         CREATE TABLE listed (id int PRIMARY KEY, a int, b text); SELECT tidewire.track('listed', columns => '{a}');
         CREATE TABLE bulk (id int PRIMARY KEY, a int); SELECT tidewire.track('bulk', bulk => true);
         INSERT INTO t VALUES (1, '{\"a\": 1}', '(1,2)', 1.0); INSERT INTO listed VALUES (1, 1, 'b'); INSERT INTO bulk VALUES (1, 1)",
    )
    .await;
    captured(&database.pool).await;
    run(
        &database.pool,
        "UPDATE t SET doc = doc, n = 1.0; UPDATE listed SET a = 1, b = 'b'; UPDATE bulk SET a = 1; UPDATE bulk SET a = 2 WHERE false;
         DELETE FROM bulk WHERE false; INSERT INTO bulk SELECT 1, 1 WHERE false",
    )
    .await;
    assert_eq!(captured(&database.pool).await, Vec::<String>::new());
    run(&database.pool, "UPDATE t SET n = 1.00").await;
    assert_eq!(captured(&database.pool).await.len(), 1, "another text of the same number is a change");
}

#[tokio::test]
async fn on_conflict_copy_merge_and_savepoints_are_captured_as_they_really_happened() {
    for option in ["", ", bulk => true", ", deferred => true"] {
        let database = database_with(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT tidewire.track('t'{option});
             INSERT INTO t VALUES (1, 'a');
             INSERT INTO t VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET v = 'b';
             INSERT INTO t VALUES (1, 'x') ON CONFLICT DO NOTHING;
             BEGIN; INSERT INTO t VALUES (2, 'kept'); SAVEPOINT s; INSERT INTO t VALUES (3, 'gone'); UPDATE t SET v = 'gone';
             ROLLBACK TO s; COMMIT;
             BEGIN; DELETE FROM t; ROLLBACK;"
        ))
        .await;
        let mut copy = database.pool.acquire().await.unwrap();
        let mut copy = copy.copy_in_raw("COPY t FROM STDIN").await.unwrap();
        copy.send(&b"4\tcopied\n"[..]).await.unwrap();
        copy.finish().await.unwrap();
        assert_eq!(
            captured(&database.pool).await,
            [
                r#"INSERT {"id":1} - -> {"id":1,"v":"a"}"#,
                r#"UPDATE {"id":1} {"id":1,"v":"a"} -> {"id":1,"v":"b"}"#,
                r#"INSERT {"id":2} - -> {"id":2,"v":"kept"}"#,
                r#"INSERT {"id":4} - -> {"id":4,"v":"copied"}"#,
            ],
            "{option}"
        );
        let version: i32 = strings(&database.pool, "SHOW server_version_num").await[0].parse().unwrap();
        if version >= 150_000 {
            let merge = "MERGE INTO t USING (VALUES (1), (9)) AS s (id) ON t.id = s.id
                WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (s.id, 'merged')";
            run(&database.pool, merge).await;
            let mut lines = captured(&database.pool).await;
            lines.sort();
            assert_eq!(
                lines,
                [r#"DELETE {"id":1} {"id":1,"v":"b"} -> -"#, r#"INSERT {"id":9} - -> {"id":9,"v":"merged"}"#]
            );
        }
    }
}

#[tokio::test]
async fn foreign_key_cascades_are_captured_on_the_child() {
    for option in ["", ", bulk => true"] {
        let database = database_with(&format!(
            "CREATE TABLE parent (id int PRIMARY KEY);
             CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE);
             INSERT INTO parent VALUES (1); INSERT INTO child VALUES (10, 1), (11, 1);
             SELECT tidewire.track('child'{option});
             UPDATE parent SET id = 5; DELETE FROM parent;"
        ))
        .await;
        assert_eq!(
            captured(&database.pool).await,
            [
                r#"UPDATE {"id":10} {"id":10,"parent":1} -> {"id":10,"parent":5}"#,
                r#"UPDATE {"id":11} {"id":11,"parent":1} -> {"id":11,"parent":5}"#,
                r#"DELETE {"id":10} {"id":10,"parent":5} -> -"#,
                r#"DELETE {"id":11} {"id":11,"parent":5} -> -"#,
            ],
            "{option}"
        );
    }
}

#[tokio::test]
async fn a_bulk_update_that_moves_keys_pairs_old_and_new_rows() {
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT g, g FROM generate_series(1, 300) g;
         SELECT tidewire.track('t', bulk => true); UPDATE t SET id = id + 1000, v = v;",
    )
    .await;
    let wrong: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM tidewire.outbox
         WHERE (after_data ->> 'v') <> (before_data ->> 'v') OR (row_key ->> 'id')::int <> (old_key ->> 'id')::int + 1000",
    )
    .fetch_one(&database.pool)
    .await
    .unwrap();
    assert_eq!((captured(&database.pool).await.len(), wrong), (300, 0));
}

#[tokio::test]
async fn values_have_one_text_whatever_the_sessions_settings() {
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY, ts timestamptz, d date, i interval, b bytea, f float8); SELECT tidewire.track('t');
         CREATE TABLE u (LIKE t INCLUDING ALL); SELECT tidewire.track('u', bulk => true)",
    )
    .await;
    let mut odd = PgConnection::connect(&database.url).await.unwrap();
    let settings =
        "SET TimeZone = 'America/New_York'; SET DateStyle = 'SQL, DMY'; SET IntervalStyle = 'postgres_verbose';
        SET bytea_output = 'escape'; SET extra_float_digits = -3";
    sqlx::raw_sql(settings).execute(&mut odd).await.unwrap();
    let insert = r"INSERT INTO t VALUES (1, '2026-11-20 10:00:00.123456+00', '2026-11-20', '1 day 2 hours', '\xdead', 0.1::float8 + 0.2);
        INSERT INTO u SELECT * FROM t";
    sqlx::raw_sql(insert).execute(&mut odd).await.unwrap();
    let expected = r#"INSERT {"id":1} - -> {"id":1,"ts":"2026-11-20T10:00:00.123456+00:00","d":"2026-11-20","i":"P1DT2H","b":"\\xdead","f":0.30000000000000004}"#;
    assert_eq!(captured(&database.pool).await, [expected, expected]);
}

#[tokio::test]
async fn renames_and_other_ddl_break_no_write_and_lose_no_key() {
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY, v text, w point); SELECT tidewire.track('t'); INSERT INTO t VALUES (1, 'a');
         ALTER TABLE t RENAME id TO number; UPDATE t SET v = 'b';
         ALTER TABLE t ALTER v TYPE varchar(20); ALTER TABLE t DROP w; ALTER TABLE t ADD x int DEFAULT 7; UPDATE t SET v = 'c';
         ALTER TABLE t RENAME TO renamed; UPDATE renamed SET number = 2;
         ALTER TABLE renamed DROP number; UPDATE renamed SET v = 'd'",
    )
    .await;
    let tables = strings(&database.pool, "SELECT table_name FROM tidewire.outbox ORDER BY id").await;
    assert_eq!(tables, ["public.t", "public.t", "public.t", "public.renamed", "public.renamed"]);
    assert_eq!(
        captured(&database.pool).await[1..],
        [
            r#"UPDATE {"number":1} {"number":1,"v":"a","w":null} -> {"number":1,"v":"b","w":null}"#,
            r#"UPDATE {"number":1} {"number":1,"v":"b","x":7} -> {"number":1,"v":"c","x":7}"#,
            r#"UPDATE {"number":2} was {"number":1} {"number":1,"v":"c","x":7} -> {"number":2,"v":"c","x":7}"#,
            r#"UPDATE - {"v":"c","x":7} -> {"v":"d","x":7}"#,
        ]
    );
}

#[tokio::test]
async fn composite_keys_given_keys_and_no_key() {
    let database = database_with(
        "CREATE TABLE c (a int, \"B\" text, v int, PRIMARY KEY (\"B\", a)); SELECT tidewire.track('c');
         INSERT INTO c VALUES (1, 'x\"y', 1); UPDATE c SET a = 2; ALTER TABLE c RENAME a TO z; UPDATE c SET v = 3;
         CREATE TABLE g (a int, b int); SELECT tidewire.track('g', key => '{b}'); INSERT INTO g VALUES (1, 2);
         ALTER TABLE g RENAME b TO bb; UPDATE g SET bb = 3;
         CREATE TABLE n (a int); SELECT tidewire.track('n'); INSERT INTO n VALUES (1)",
    )
    .await;
    assert_eq!(
        captured(&database.pool).await,
        [
            r#"INSERT {"B":"x\"y","a":1} - -> {"a":1,"B":"x\"y","v":1}"#,
            r#"UPDATE {"B":"x\"y","a":2} was {"B":"x\"y","a":1} {"a":1,"B":"x\"y","v":1} -> {"a":2,"B":"x\"y","v":1}"#,
            r#"UPDATE {"B":"x\"y","z":2} {"z":2,"B":"x\"y","v":1} -> {"z":2,"B":"x\"y","v":3}"#,
            r#"INSERT {"b":2} - -> {"a":1,"b":2}"#,
            r#"UPDATE {"bb":3} was {"bb":2} {"a":1,"bb":2} -> {"a":1,"bb":3}"#,
            r#"INSERT - - -> {"a":1}"#,
        ]
    );
    assert_eq!(problems(&database.pool).await, Vec::<String>::new());
    let keys = strings(
        &database.pool,
        "SELECT key_columns::text FROM tidewire.tracked_tables WHERE table_name <> 'public.n' ORDER BY table_name",
    )
    .await;
    assert_eq!(keys, ["{B,z}", "{bb}"], "the leader's look notices the new names");
}

#[tokio::test]
async fn a_primary_key_that_changes_becomes_the_key() {
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY, new_id bigint NOT NULL); SELECT tidewire.track('t');
         ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ADD PRIMARY KEY (new_id)",
    )
    .await;
    assert_eq!(problems(&database.pool).await, Vec::<String>::new());
    run(&database.pool, "INSERT INTO t VALUES (1, 100)").await;
    assert_eq!(captured(&database.pool).await, [r#"INSERT {"new_id":100} - -> {"id":1,"new_id":100}"#]);
}

#[tokio::test]
async fn names_are_canonical() {
    let database = database_with(
        r#"CREATE SCHEMA sales; CREATE SCHEMA "We.ird"; CREATE TABLE sales."Orders" (id int PRIMARY KEY);
           CREATE TABLE "We.ird"."Tab""le" (id int PRIMARY KEY); CREATE TABLE "a b" (id int PRIMARY KEY) PARTITION BY LIST (id);
           CREATE TABLE part PARTITION OF "a b" DEFAULT;
           SELECT tidewire.track('sales."Orders"'), tidewire.track('"We.ird"."Tab""le"'), tidewire.track('"a b"');
           INSERT INTO sales."Orders" VALUES (1); INSERT INTO "We.ird"."Tab""le" VALUES (1); INSERT INTO "a b" VALUES (1)"#,
    )
    .await;
    let expected = ["sales.Orders", r#""We.ird"."Tab""le""#, r#"public."a b""#];
    assert_eq!(strings(&database.pool, "SELECT table_name FROM tidewire.outbox ORDER BY id").await, expected);
    assert_eq!(
        strings(&database.pool, "SELECT table_name FROM tidewire.tracked_tables ORDER BY relid").await,
        expected
    );
}

#[tokio::test]
async fn column_lists_follow_renames_and_do_not_hide_that_a_row_changed() {
    let database = database_with(
        "CREATE DOMAIN required AS text NOT NULL;
         CREATE TABLE t (id int PRIMARY KEY, v text, big text, secret text, r required DEFAULT 'r');
         SELECT tidewire.track('t', except_columns => '{big,secret,r}');
         INSERT INTO t VALUES (1, 'a', repeat('x', 100000), 's'); UPDATE t SET v = 'b';
         ALTER TABLE t RENAME secret TO hidden; ALTER TABLE t RENAME id TO number; UPDATE t SET hidden = 't'; DELETE FROM t",
    )
    .await;
    assert_eq!(
        captured(&database.pool).await,
        [
            r#"INSERT {"id":1} - -> {"id":1,"v":"a"}"#,
            r#"UPDATE {"id":1} {"id":1,"v":"a"} -> {"id":1,"v":"b"}"#,
            r#"UPDATE {"number":1} {"number":1,"v":"b"} -> {"number":1,"v":"b"}"#,
            r#"DELETE {"number":1} {"number":1,"v":"b"} -> -"#,
        ]
    );
    for bulk in ["false", "true"] {
        run(
            &database.pool,
            &format!(
                "SELECT tidewire.track('t', columns => '{{v}}', bulk => {bulk}); INSERT INTO t VALUES (1, 'a', 'x', 's');
                 ALTER TABLE t RENAME v TO w; ALTER TABLE t ADD v text DEFAULT 'not listed'; UPDATE t SET w = 'b', number = 2;
                 DELETE FROM t; ALTER TABLE t DROP v; ALTER TABLE t RENAME w TO v"
            ),
        )
        .await;
        assert_eq!(
            captured(&database.pool).await,
            [
                r#"INSERT {"number":1} - -> {"number":1,"v":"a"}"#,
                r#"UPDATE {"number":2} was {"number":1} {"number":1,"w":"a"} -> {"number":2,"w":"b"}"#,
                r#"DELETE {"number":2} {"number":2,"w":"b"} -> -"#,
            ],
            "bulk {bulk}"
        );
    }
}

#[tokio::test]
async fn without_a_before_image_the_key_is_still_known() {
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT tidewire.track('t', before_image => false);
         INSERT INTO t VALUES (1, 'a'); UPDATE t SET id = 2; DELETE FROM t",
    )
    .await;
    assert_eq!(
        captured(&database.pool).await[1..],
        [r#"UPDATE {"id":2} was {"id":1} - -> {"id":2,"v":"a"}"#, r#"DELETE {"id":2} - -> -"#]
    );
}

#[tokio::test]
async fn deferred_capture_waits_for_the_end_of_the_transaction() {
    let database =
        database_with("CREATE TABLE t (id int PRIMARY KEY, v int); SELECT tidewire.track('t', deferred => true)").await;
    let mut writer = PgConnection::connect(&database.url).await.unwrap();
    sqlx::raw_sql("BEGIN; INSERT INTO t VALUES (1, 1); UPDATE t SET v = 2").execute(&mut writer).await.unwrap();
    let queued: i64 = sqlx::query_scalar("SELECT count(*) FROM tidewire.outbox").fetch_one(&mut writer).await.unwrap();
    assert_eq!(queued, 0);
    sqlx::raw_sql("COMMIT").execute(&mut writer).await.unwrap();
    assert_eq!(captured(&database.pool).await.len(), 2);
}

#[tokio::test]
async fn replicated_writes_are_captured_only_when_asked_for() {
    let database = database_with(
        "CREATE TABLE plain (id int PRIMARY KEY); CREATE TABLE asked (id int PRIMARY KEY) PARTITION BY LIST (id);
         CREATE TABLE asked_early PARTITION OF asked FOR VALUES IN (1);
         SELECT tidewire.track('plain'), tidewire.track('asked', replica => true);
         CREATE TABLE asked_late PARTITION OF asked FOR VALUES IN (2); SELECT tidewire.refresh_tracked();
         SET session_replication_role = replica; INSERT INTO plain VALUES (1); INSERT INTO asked VALUES (1), (2);
         TRUNCATE asked_late; RESET session_replication_role",
    )
    .await;
    let captured = captured(&database.pool).await;
    let keys: Vec<_> = captured.iter().map(|line| line.split(" - ").next().unwrap()).collect();
    assert_eq!(keys, [r#"INSERT {"id":1}"#, r#"INSERT {"id":2}"#, "TRUNCATE"]);
}

#[tokio::test]
async fn the_writers_trace_context_travels_with_its_changes() {
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY); SELECT tidewire.track('t');
         BEGIN; SET LOCAL tidewire.traceparent = '00-0123456789abcdef0123456789abcdef-0123456789abcdef-01';
         SET LOCAL tidewire.headers = '{\"tenant\": \"a\"}'; INSERT INTO t VALUES (1); COMMIT;
         BEGIN; SET LOCAL tidewire.traceparent = 'nonsense'; INSERT INTO t VALUES (2); COMMIT; INSERT INTO t VALUES (3)",
    )
    .await;
    let headers: Vec<Option<Value>> = sqlx::query_scalar("SELECT headers::jsonb FROM tidewire.outbox ORDER BY id")
        .fetch_all(&database.pool)
        .await
        .unwrap();
    let traced =
        serde_json::json!({"tenant": "a", "traceparent": "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"});
    assert_eq!(headers, [Some(traced), None, None]);
}

#[tokio::test]
async fn tracking_again_changes_the_options_and_untracking_leaves_nothing() {
    let database = database_with(
        "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
         SELECT tidewire.track('p'); SELECT tidewire.track('p'); SELECT tidewire.track('p', bulk => true, notify => true);
         SELECT tidewire.track('p', deferred => true)",
    )
    .await;
    let options =
        strings(&database.pool, "SELECT concat_ws(' ', bulk, notify, deferred) FROM tidewire.tracked_tables").await;
    assert_eq!(options, ["f f t"]);
    run(&database.pool, "INSERT INTO p VALUES (1)").await;
    assert_eq!(captured(&database.pool).await.len(), 1);
    run(&database.pool, "SELECT tidewire.untrack('p'); SELECT tidewire.untrack('p'); DELETE FROM p").await;
    let told = captured(&database.pool).await;
    assert!(told.len() == 1 && told[0].starts_with("SCHEMA"), "that it is not tracked any more: {told:?}");
    let left = strings(&database.pool, "SELECT tgname::text FROM pg_trigger WHERE tgname LIKE '!tidewire%' UNION ALL SELECT table_name FROM tidewire.tracked_tables").await;
    assert_eq!(left, Vec::<String>::new());
}

#[tokio::test]
async fn what_cannot_be_tracked_is_refused_with_what_to_do() {
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE VIEW v AS SELECT * FROM t;
         CREATE TABLE p (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p DEFAULT;
         CREATE TABLE a_table_whose_name_is_so_long_that_its_channel_has_not_any_room (id int)",
    )
    .await;
    for (sql, says) in [
        ("SELECT tidewire.track('v')", "public.v is a view, not a table"),
        ("SELECT tidewire.track('pg_class')", "system table"),
        ("SELECT tidewire.track('tidewire.outbox')", "belongs to Tidewire"),
        ("CREATE TEMP TABLE tt (id int); SELECT tidewire.track('tt')", "temporary table"),
        ("SELECT tidewire.track('p1')", "SELECT tidewire.track('public.p')"),
        ("SELECT tidewire.track('missing')", "relation \"missing\" does not exist"),
        (
            "SELECT tidewire.track('t', columns => '{nope}')",
            "table public.t has no column nope. Its columns are: id, v.",
        ),
        ("SELECT tidewire.track('t', key => '{nope}')", "no column nope"),
        ("SELECT tidewire.track('t', columns => '{id}', except_columns => '{v}')", "exclude each other"),
        ("SELECT tidewire.track('t', except_columns => '{id}')", "a key column cannot be left out"),
        ("SELECT tidewire.track('t', bulk => true, deferred => true)", "exclude each other"),
        (
            "SELECT tidewire.track('a_table_whose_name_is_so_long_that_its_channel_has_not_any_room', notify => true)",
            "longer than 63 bytes",
        ),
    ] {
        let refusal = refusal(&database.pool, sql).await;
        assert!(refusal.contains(says), "{sql}: {refusal}");
    }
    assert_eq!(strings(&database.pool, "SELECT table_name FROM tidewire.tracked_tables").await, Vec::<String>::new());
}
