//! What is not captured is told: partitions that come, triggers that go, tables that change hands.
//!
//! These read the outbox: what is in it is in the log, in that order.

use std::str::FromStr as _;

use sqlx::postgres::{PgConnectOptions, PgPool};

use crate::capture::{database_with, problems, run, strings};
use crate::support::postgres::TestDatabase;

const NOTHING: &[&str] = &[];

/// Takes what is in the outbox: table, operation, and its key, its kinds of changes or its partition.
async fn told(database: &TestDatabase) -> Vec<String> {
    let sql = "WITH taken AS (DELETE FROM tidewire.outbox RETURNING *)
        SELECT concat_ws(' ', table_name, operation, row_key::text, headers ->> 'tidewire.partition',
            (SELECT string_agg(change ->> 'kind', ',') FROM json_array_elements(CASE operation WHEN 'SCHEMA' THEN after_data -> 'changes' END) change))
        FROM taken ORDER BY id";
    strings(&database.pool, sql).await
}

/// A pool of a role of this database's own that owns nothing yet and was granted nothing.
async fn owner(database: &TestDatabase) -> (String, PgPool) {
    let role = format!("{}_dba", database.name);
    run(
        &database.pool,
        &format!(
            "DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN PASSWORD 'x'; CREATE SCHEMA own AUTHORIZATION {role}"
        ),
    )
    .await;
    let options = PgConnectOptions::from_str(&database.url).unwrap().username(&role).password("x");
    (role, PgPool::connect_with(options).await.unwrap())
}

async fn forget(database: &TestDatabase, role: &str, pool: PgPool) {
    pool.close().await;
    run(&database.pool, &format!("DROP OWNED BY {role} CASCADE; DROP ROLE {role}")).await;
}

/// Found in review: only what was written through the root was captured, and no TRUNCATE of such a partition in any mode.
#[tokio::test]
async fn a_partition_is_captured_from_the_statement_on_that_makes_it() {
    for options in [
        "",
        ", bulk => true",
        ", deferred => true",
        ", replica => true",
        ", before_image => false",
        ", columns => '{v}'",
    ] {
        let database = database_with(&format!(
            "CREATE TABLE p (id int PRIMARY KEY, v int) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
             SELECT tidewire.track('p'{options})"
        ))
        .await;
        for (made, named) in [
            ("CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2)", "public.p2"),
            (
                "CREATE TABLE p2 (id int NOT NULL, v int); ALTER TABLE p ATTACH PARTITION p2 FOR VALUES IN (2)",
                "public.p2",
            ),
            (
                "CREATE TABLE m PARTITION OF p FOR VALUES IN (2, 3) PARTITION BY LIST (id); CREATE TABLE p2 PARTITION OF m DEFAULT",
                "public.p2",
            ),
            ("CREATE SCHEMA s CREATE TABLE p2 PARTITION OF public.p FOR VALUES IN (2)", "s.p2"),
        ] {
            run(
                &database.pool,
                &format!("BEGIN; {made}; INSERT INTO {named} VALUES (2, 2); INSERT INTO p VALUES (1, 2); SET CONSTRAINTS ALL IMMEDIATE;
                          TRUNCATE {named}; DELETE FROM p; COMMIT"),
            )
            .await;
            let seen = told(&database).await;
            let wanted = [
                r#"public.p INSERT {"id":2}"#.to_owned(),
                r#"public.p INSERT {"id":1}"#.to_owned(),
                format!("public.p TRUNCATE {named}"),
                r#"public.p DELETE {"id":1}"#.to_owned(),
            ];
            assert_eq!(seen, wanted, "{options} {made}");
            assert_eq!(problems(&database.pool).await, NOTHING, "{options} {made}");
            run(&database.pool, &format!("DROP TABLE IF EXISTS m, {named}; DROP SCHEMA IF EXISTS s")).await;
            told(&database).await;
        }
    }
}

/// Found in review: whoever owned a table that another had tracked could make no partition of it.
#[tokio::test]
async fn a_tables_owner_makes_partitions_of_what_others_tracked() {
    for options in ["", ", bulk => true", ", replica => true"] {
        let database = database_with("SELECT 1").await;
        let (role, own) = owner(&database).await;
        run(&own, "CREATE TABLE own.p (id int PRIMARY KEY, v int) PARTITION BY LIST (id)").await;
        run(&database.pool, &format!("SELECT tidewire.track('own.p'{options})")).await;
        run(&own, "CREATE TABLE own.p1 PARTITION OF own.p FOR VALUES IN (1); INSERT INTO own.p1 VALUES (1, 1); TRUNCATE own.p1").await;
        assert_eq!(told(&database).await, [r#"own.p INSERT {"id":1}"#, "own.p TRUNCATE own.p1"], "{options}");
        // Neither did a key that changed reach the triggers.
        run(&own, "ALTER TABLE own.p DROP CONSTRAINT p_pkey; ALTER TABLE own.p ADD PRIMARY KEY (id, v); INSERT INTO own.p VALUES (1, 7)").await;
        assert_eq!(told(&database).await, [r#"own.p INSERT {"id":1,"v":7}"#], "{options}");
        for refused in [
            "SELECT tidewire.track('own.p')",
            "SELECT * FROM tidewire.tracked_tables",
            "SELECT tidewire.tell_gap('own.p'::regclass, '')",
        ] {
            assert!(sqlx::raw_sql(refused).execute(&own).await.is_err(), "{refused}");
        }
        forget(&database, &role, own).await;
    }
}

/// Found in review: a node's role that owns no tables only logged what it could not repair.
#[tokio::test]
async fn what_a_nodes_role_may_not_repair_is_refused_by_name() {
    for (options, broken) in [
        ("bulk => true", "CREATE TABLE own.p1 PARTITION OF own.p DEFAULT"),
        ("notify => false", "ALTER TABLE own.p DROP CONSTRAINT p_pkey"),
    ] {
        let database =
            database_with("ALTER EVENT TRIGGER tidewire_attach DISABLE; ALTER EVENT TRIGGER tidewire_ddl DISABLE")
                .await;
        let (role, own) = owner(&database).await;
        run(&own, "CREATE TABLE own.p (id int PRIMARY KEY, v int) PARTITION BY LIST (id)").await;
        run(&database.pool, &format!("SELECT tidewire.track('own.p', {options})")).await;
        run(&own, broken).await;
        let mut session = database.pool.acquire().await.unwrap();
        sqlx::raw_sql("SET ROLE tidewire_owner").execute(&mut *session).await.unwrap();
        let found: Vec<String> =
            sqlx::query_scalar("SELECT concat_ws(' ', problem, table_name, detail) FROM tidewire.refresh_tracked()")
                .fetch_all(&mut *session)
                .await
                .unwrap();
        sqlx::raw_sql("RESET ROLE").execute(&mut *session).await.unwrap();
        drop(session);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("repair_refused own.p "), "{found:?}");
        assert_eq!(problems(&database.pool).await, NOTHING, "whoever may, repairs");
        forget(&database, &role, own).await;
    }
}

/// Found in review: rows that were written between such statements were lost, and nobody was told.
#[tokio::test]
async fn a_gap_of_capture_is_told_where_it_begins_and_where_it_ends() {
    let gap = "public.t SCHEMA capture_gap";
    for options in ["", ", bulk => true", ", deferred => true", ", replica => true"] {
        let database =
            database_with(&format!("CREATE TABLE t (id int PRIMARY KEY); SELECT tidewire.track('t'{options})")).await;
        let enable = if options.contains("replica") {
            r#"ENABLE ALWAYS TRIGGER "!tidewire"; ALTER TABLE t ENABLE ALWAYS TRIGGER "!tidewire_update"; ALTER TABLE t ENABLE ALWAYS TRIGGER "!tidewire_truncate""#
        } else {
            "ENABLE TRIGGER ALL"
        };
        for (off, on) in [
            ("ALTER TABLE t DISABLE TRIGGER ALL".to_owned(), format!("ALTER TABLE t {enable}")),
            ("ALTER TABLE t DISABLE TRIGGER USER".to_owned(), format!("ALTER TABLE t {enable}")),
            (r#"ALTER TABLE t ENABLE REPLICA TRIGGER "!tidewire""#.to_owned(), format!("ALTER TABLE t {enable}")),
            (r#"DROP TRIGGER "!tidewire" ON t"#.to_owned(), format!("SELECT tidewire.track('t'{options})")),
        ] {
            run(
                &database.pool,
                &format!("BEGIN; {off}; INSERT INTO t VALUES (1); {on}; INSERT INTO t VALUES (2); COMMIT"),
            )
            .await;
            assert_eq!(told(&database).await, [gap, r#"public.t INSERT {"id":2}"#], "{options} {off}");
            // Before anybody has looked.
            run(&database.pool, &off).await;
            run(&database.pool, "INSERT INTO t VALUES (3)").await;
            run(&database.pool, &on).await;
            run(&database.pool, "INSERT INTO t VALUES (4)").await;
            assert_eq!(told(&database).await, [gap, gap, r#"public.t INSERT {"id":4}"#], "{options} {off}");
            run(&database.pool, &format!("BEGIN; {off}; ROLLBACK; TRUNCATE t")).await;
            assert_eq!(told(&database).await, ["public.t TRUNCATE"], "{options} {off}: nothing happened");
        }
        run(
            &database.pool,
            "ALTER TABLE t ADD v int; ALTER TABLE t RENAME TO u; ALTER TABLE u RENAME TO t; CREATE INDEX ON t (v);
             ALTER TABLE t DISABLE ROW LEVEL SECURITY; SELECT tidewire.track('t', before_image => false); SELECT tidewire.track('t', bulk => true);
             CREATE TRIGGER own BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger(); DROP TRIGGER own ON t",
        )
        .await;
        assert_eq!(told(&database).await, NOTHING, "{options}: no gap");
        run(&database.pool, "DROP TABLE t; DELETE FROM tidewire.tracked_tables").await;
        assert_eq!(strings(&database.pool, "SELECT 'left' FROM tidewire.capture_gaps").await, NOTHING);
    }
}

#[tokio::test]
async fn a_gap_of_one_partition_is_one_of_the_table() {
    let database = database_with(
        "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p DEFAULT; SELECT tidewire.track('p')",
    )
    .await;
    run(&database.pool, "BEGIN; ALTER TABLE p1 DISABLE TRIGGER ALL; INSERT INTO p VALUES (1); ALTER TABLE p1 ENABLE TRIGGER ALL; COMMIT").await;
    assert_eq!(told(&database).await, ["public.p SCHEMA capture_gap"]);
}

/// Found in review: what changed between untrack and track again was missed by subscribers who had heard nothing.
#[tokio::test]
async fn untracking_is_in_the_log_before_what_follows() {
    let database = database_with("CREATE TABLE t (id int PRIMARY KEY); SELECT tidewire.track('t')").await;
    run(
        &database.pool,
        "BEGIN; INSERT INTO t VALUES (1); SELECT tidewire.untrack('t'); INSERT INTO t VALUES (2); SELECT tidewire.track('t');
         INSERT INTO t VALUES (3); COMMIT",
    )
    .await;
    let wanted = [r#"public.t INSERT {"id":1}"#, "public.t SCHEMA untrack", r#"public.t INSERT {"id":3}"#];
    assert_eq!(told(&database).await, wanted);
    run(&database.pool, "SELECT tidewire.track('t', bulk => true); SELECT tidewire.track('t')").await;
    assert_eq!(told(&database).await, NOTHING, "tracking again is no end");
    run(&database.pool, "SELECT tidewire.untrack('t'); SELECT tidewire.untrack('t'); DROP TABLE t").await;
    assert_eq!(told(&database).await, ["public.t SCHEMA untrack"]);
}

/// Found in review: such a transaction failed at its commit on a unique constraint.
#[tokio::test]
async fn a_table_takes_anothers_name_and_is_tracked_in_one_transaction() {
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE green (id int PRIMARY KEY); SELECT tidewire.track('t')",
    )
    .await;
    run(
        &database.pool,
        "BEGIN; ALTER TABLE t RENAME TO blue; ALTER TABLE green RENAME TO t; SELECT tidewire.track('t'); INSERT INTO t VALUES (1); COMMIT",
    )
    .await;
    assert_eq!(told(&database).await, ["public.t SCHEMA rename_table", r#"public.t INSERT {"id":1}"#]);
    // Back again: both are tracked now, and swap.
    run(
        &database.pool,
        "BEGIN; ALTER TABLE t RENAME TO green; ALTER TABLE blue RENAME TO t; SELECT tidewire.track('t'); INSERT INTO t VALUES (2); COMMIT",
    )
    .await;
    let told_again = told(&database).await;
    assert_eq!(told_again.last().unwrap(), r#"public.t INSERT {"id":2}"#);
    assert!(told_again.contains(&"public.t SCHEMA rename_table".to_owned()), "{told_again:?}");
    assert_eq!(problems(&database.pool).await, NOTHING);
    let names = "SELECT table_name FROM tidewire.tracked_tables ORDER BY 1";
    assert_eq!(strings(&database.pool, names).await, ["public.green", "public.t"]);
}

/// Found in review: ATTACH failed, as both had triggers of one name.
#[tokio::test]
async fn a_tracked_table_becomes_a_partition_of_a_tracked_table() {
    for (parent, child) in [
        ("", ""),
        ("", ", bulk => true"),
        (", bulk => true", ""),
        (", bulk => true", ", bulk => true"),
        ("", ", columns => '{v}'"),
    ] {
        for event_triggers in [true, false] {
            let database = database_with(&format!(
                "CREATE TABLE p (id int PRIMARY KEY, v int) PARTITION BY LIST (id); CREATE TABLE c (id int PRIMARY KEY, v int);
                 CREATE TABLE s (id int PRIMARY KEY, v int) PARTITION BY LIST (id); CREATE TABLE s2 PARTITION OF s FOR VALUES IN (2);
                 SELECT tidewire.track('p'{parent}), tidewire.track('c'{child}), tidewire.track('s'{child})"
            ))
            .await;
            if !event_triggers {
                run(
                    &database.pool,
                    "ALTER EVENT TRIGGER tidewire_attach DISABLE; ALTER EVENT TRIGGER tidewire_ddl DISABLE",
                )
                .await;
            }
            run(
                &database.pool,
                "ALTER TABLE p ATTACH PARTITION c FOR VALUES IN (1); ALTER TABLE p ATTACH PARTITION s FOR VALUES IN (2)",
            )
            .await;
            assert_eq!(problems(&database.pool).await, NOTHING, "{parent} {child} {event_triggers}");
            assert_eq!(
                told(&database).await,
                ["public.c SCHEMA untrack", "public.s SCHEMA untrack"],
                "{parent} {child} {event_triggers}"
            );
            run(&database.pool, "INSERT INTO p VALUES (1, 1); INSERT INTO c SELECT 1, 1 WHERE false; UPDATE c SET v = 2; INSERT INTO s VALUES (2, 2); TRUNCATE s2").await;
            assert_eq!(
                told(&database).await,
                [
                    r#"public.p INSERT {"id":1}"#,
                    r#"public.p UPDATE {"id":1}"#,
                    r#"public.p INSERT {"id":2}"#,
                    "public.p TRUNCATE public.s2"
                ],
                "{parent} {child} {event_triggers}"
            );
            assert_eq!(strings(&database.pool, "SELECT table_name FROM tidewire.tracked_tables").await, ["public.p"]);
        }
    }
}

/// Found in review: between the change of the owner and the leader's next look, the new one could make no partition.
#[tokio::test]
async fn a_new_owner_makes_partitions_at_once() {
    for options in ["", ", bulk => true"] {
        let database = database_with("SELECT 1").await;
        let (role, own) = owner(&database).await;
        run(
            &database.pool,
            &format!(
                "CREATE TABLE own.p (id int PRIMARY KEY) PARTITION BY LIST (id); SELECT tidewire.track('own.p'{options});
                 ALTER TABLE own.p OWNER TO {role}"
            ),
        )
        .await;
        run(&own, "CREATE TABLE own.p1 PARTITION OF own.p FOR VALUES IN (1); INSERT INTO own.p1 VALUES (1)").await;
        assert_eq!(told(&database).await, [r#"own.p INSERT {"id":1}"#], "{options}");
        forget(&database, &role, own).await;
    }
}

/// Found in review: what such a session does to triggers was told by nobody.
#[tokio::test]
async fn a_gap_made_by_a_session_that_replicates_is_told() {
    let database = database_with("CREATE TABLE t (id int PRIMARY KEY); SELECT tidewire.track('t')").await;
    run(
        &database.pool,
        "BEGIN; SET LOCAL session_replication_role = replica; ALTER TABLE t DISABLE TRIGGER ALL; ALTER TABLE t ENABLE TRIGGER ALL; COMMIT",
    )
    .await;
    assert_eq!(told(&database).await, ["public.t SCHEMA capture_gap"]);
}

/// Found in review: tables that came out of a dump, with other OIDs than there, were told to be dropped.
#[tokio::test]
async fn a_restored_table_is_told_as_a_gap_and_a_dropped_one_as_dropped() {
    let made = "CREATE TABLE t (id int PRIMARY KEY)";
    let database = database_with(&format!("{made}; SELECT tidewire.track('t')")).await;
    // What pg_dump keeps of a tracked table: its triggers as they are, and the row in tidewire.tracked_tables.
    run(
        &database.pool,
        &format!(
            "DO $do$ DECLARE triggers text[] := ARRAY(SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 't'::regclass);
                 one text;
             BEGIN DROP TABLE t; {made}; FOREACH one IN ARRAY triggers LOOP EXECUTE one; END LOOP; END $do$;
             INSERT INTO t VALUES (1)"
        ),
    )
    .await;
    assert_eq!(problems(&database.pool).await, NOTHING);
    assert_eq!(told(&database).await, [r#"public.t INSERT {"id":1}"#, "public.t SCHEMA capture_gap"]);
    run(&database.pool, &format!("DROP TABLE t; {made}; SELECT tidewire.track('t')")).await;
    assert_eq!(told(&database).await, ["public.t SCHEMA drop_table"]);
}
