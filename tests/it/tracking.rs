//! Tracked tables over time: partitions, triggers that go missing, what the leader hears of it, and who may do what.

use std::str::FromStr as _;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener};
use sqlx::{Connection as _, PgConnection, PgPool};

use crate::capture::{captured, database_with, problems, refusal, run, strings};
use crate::support::DEADLINE;
use crate::support::postgres::database;

const NOTHING: &[&str] = &[];

#[tokio::test]
async fn changes_of_partitions_are_changes_of_the_root() {
    let database = database_with(
        "CREATE TABLE p (id int, r text, v text, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
         CREATE TABLE p_a PARTITION OF p FOR VALUES IN ('a');
         CREATE TABLE p_b (gone int, v text, r text NOT NULL, id int NOT NULL); ALTER TABLE p_b DROP gone;
         ALTER TABLE p ATTACH PARTITION p_b FOR VALUES IN ('b'); SELECT tidewire.track('p');
         INSERT INTO p VALUES (1, 'a', 'x'); INSERT INTO p_b (id, r, v) VALUES (2, 'b', 'direct'); UPDATE p SET v = 'y' WHERE id = 2;
         UPDATE p SET v = 'y' WHERE id = 2; UPDATE p SET r = 'b' WHERE id = 1;
         CREATE TABLE p_c PARTITION OF p FOR VALUES IN ('c'); ALTER TABLE p RENAME id TO number; INSERT INTO p VALUES (3, 'c')",
    )
    .await;
    assert_eq!(strings(&database.pool, "SELECT DISTINCT table_name FROM tidewire.outbox").await, ["public.p"]);
    assert_eq!(
        captured(&database.pool).await,
        [
            r#"INSERT {"id":1,"r":"a"} - -> {"id":1,"r":"a","v":"x"}"#,
            r#"INSERT {"id":2,"r":"b"} - -> {"v":"direct","r":"b","id":2}"#,
            r#"UPDATE {"id":2,"r":"b"} {"v":"direct","r":"b","id":2} -> {"v":"y","r":"b","id":2}"#,
            r#"DELETE {"id":1,"r":"a"} {"id":1,"r":"a","v":"x"} -> -"#,
            r#"INSERT {"id":1,"r":"b"} - -> {"v":"x","r":"b","id":1}"#,
            r#"INSERT {"number":3,"r":"c"} - -> {"number":3,"r":"c","v":null}"#,
        ]
    );
}

#[tokio::test]
async fn truncating_the_root_is_one_event_and_a_leaf_is_named() {
    let database = database_with(
        "CREATE TABLE p (id int) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1) PARTITION BY LIST (id);
         CREATE TABLE p11 PARTITION OF p1 FOR VALUES IN (1); CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2);
         SELECT tidewire.track('p')",
    )
    .await;
    for sql in [
        "TRUNCATE p",
        "TRUNCATE p2",
        "TRUNCATE p1",
        // In one transaction: the leaf was emptied by the first already, unless something was written in between.
        "TRUNCATE p; TRUNCATE p2; INSERT INTO p VALUES (2); TRUNCATE p2",
        "CREATE TABLE late PARTITION OF p DEFAULT; SELECT tidewire.refresh_tracked()",
        "TRUNCATE late",
    ] {
        run(&database.pool, sql).await;
    }
    let seen = strings(
        &database.pool,
        "SELECT concat_ws(' ', operation, headers ->> 'tidewire.partition') FROM tidewire.outbox ORDER BY id",
    )
    .await;
    assert_eq!(
        seen,
        [
            "TRUNCATE",
            "TRUNCATE public.p2",
            "TRUNCATE public.p11",
            "TRUNCATE",
            "INSERT",
            "TRUNCATE public.p2",
            "TRUNCATE public.late"
        ]
    );
}

#[tokio::test]
async fn bulk_capture_sees_writes_that_name_a_partition() {
    let database = database_with(
        "CREATE TABLE p (id int PRIMARY KEY, v int) PARTITION BY RANGE (id); CREATE TABLE p0 PARTITION OF p FOR VALUES FROM (0) TO (10);
         SELECT tidewire.track('p', bulk => true); CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (10) TO (20);
         SELECT tidewire.refresh_tracked();
         INSERT INTO p VALUES (1, 1), (11, 1); INSERT INTO p0 VALUES (2, 1); INSERT INTO p1 VALUES (12, 1);
         UPDATE p SET id = 19 WHERE id = 1; DELETE FROM p1 WHERE id = 12",
    )
    .await;
    assert_eq!(
        captured(&database.pool).await,
        [
            r#"INSERT {"id":1} - -> {"id":1,"v":1}"#,
            r#"INSERT {"id":11} - -> {"id":11,"v":1}"#,
            r#"INSERT {"id":2} - -> {"id":2,"v":1}"#,
            r#"INSERT {"id":12} - -> {"id":12,"v":1}"#,
            r#"UPDATE {"id":19} was {"id":1} {"id":1,"v":1} -> {"id":19,"v":1}"#,
            r#"DELETE {"id":12} {"id":12,"v":1} -> -"#,
        ]
    );
}

/// Found in review: every write to such a table failed.
#[tokio::test]
async fn bulk_capture_of_a_table_without_a_key_has_no_key() {
    let database = database_with(
        "CREATE TABLE t (a int); SELECT tidewire.track('t', bulk => true);
         INSERT INTO t VALUES (1), (2); UPDATE t SET a = 3 WHERE a = 2; DELETE FROM t WHERE a = 1;
         CREATE TABLE u (a int PRIMARY KEY); SELECT tidewire.track('u', bulk => true);
         ALTER TABLE u DROP CONSTRAINT u_pkey; SELECT tidewire.refresh_tracked(); INSERT INTO u VALUES (4)",
    )
    .await;
    let seen = strings(
        &database.pool,
        "SELECT concat_ws(' ', operation, coalesce(row_key::text, '-'), coalesce(after_data, before_data)) FROM tidewire.outbox ORDER BY id",
    )
    .await;
    assert_eq!(
        seen,
        [
            r#"INSERT - {"a":1}"#,
            r#"INSERT - {"a":2}"#,
            r#"UPDATE - {"a":3}"#,
            r#"DELETE - {"a":1}"#,
            r#"INSERT - {"a":4}"#
        ]
    );
}

/// Found in review: whoever owned any table could end the watch over all of them.
#[tokio::test]
async fn triggers_with_arguments_of_somebodys_own_stop_no_look_at_other_tables() {
    let database = database_with("CREATE TABLE good (id int PRIMARY KEY); SELECT tidewire.track('good')").await;
    let valid = r#""before_image":true,"notify":false,"bulk":false,"deferred":false,"replica":false"#;
    let options = [
        "5".to_owned(),
        "[]".to_owned(),
        r#"{"relid":"x"}"#.to_owned(),
        format!(r#"{{"relid":99999999999,{valid}}}"#),
        format!(r#"{{"relid":1,"key":5,{valid}}}"#),
        format!(r#"{{"relid":1,"key":[{{"name":"a","attnum":70000}}],{valid}}}"#),
        format!(r#"{{"relid":1,"primary":"perhaps",{valid}}}"#),
        "[".repeat(10_000),
    ];
    let hex = |text: &String| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    for (n, argument) in ["zz".to_owned(), "ff".to_owned()].into_iter().chain(options.iter().map(hex)).enumerate() {
        run(
            &database.pool,
            &format!(
                r#"CREATE TABLE own_{n} (id int); CREATE TRIGGER "!tidewire_truncate" AFTER TRUNCATE ON own_{n}
                   FOR EACH STATEMENT EXECUTE FUNCTION tidewire.capture_truncate('b', '{argument}')"#
            ),
        )
        .await;
        assert_eq!(problems(&database.pool).await, NOTHING, "{}", &argument[..40.min(argument.len())]);
    }
    assert_eq!(strings(&database.pool, "SELECT table_name FROM tidewire.tracked_tables").await, ["public.good"]);
}

/// Found in review: one table whose triggers cannot be put back ended the look at all.
#[tokio::test]
async fn a_table_whose_triggers_cannot_be_put_back_stops_no_look_at_other_tables() {
    let database = database_with(
        r#"CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); SELECT tidewire.track('a'), tidewire.track('b');
           CREATE FUNCTION own() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; DROP TRIGGER "!tidewire" ON a;
           CREATE TRIGGER "!tidewire" AFTER INSERT ON a EXECUTE FUNCTION own(); DROP TABLE b"#,
    )
    .await;
    let found = problems(&database.pool).await;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].starts_with("dropped public.b") && found[1].starts_with("trigger_outdated public.a"), "{found:?}");
}

/// Found in review: a cast that the table's owner had defined ran with the rights of the owner of everything.
#[tokio::test]
async fn what_a_tables_owner_has_capture_call_may_touch_nothing_of_ours() {
    for bulk in [false, true] {
        let database = database_with(&format!(
            "CREATE TYPE e AS ENUM ('a');
             CREATE FUNCTION f(e) RETURNS json LANGUAGE plpgsql AS 'BEGIN RETURN to_json(current_user::text); END';
             CREATE CAST (e AS json) WITH FUNCTION f(e);
             CREATE TABLE t (id int PRIMARY KEY, v e); SELECT tidewire.track('t', bulk => {bulk}); INSERT INTO t VALUES (1, 'a')"
        ))
        .await;
        let seen = strings(&database.pool, "SELECT after_data ->> 'v' FROM tidewire.outbox").await;
        assert_eq!(seen, ["tidewire_capture"], "bulk: {bulk}");
        for theft in [
            "UPDATE tidewire.api_keys SET name = name",
            "PERFORM feed_key FROM tidewire.terms",
            "PERFORM after_data FROM tidewire.event_log",
            "PERFORM after_data FROM tidewire.outbox",
            "PERFORM headers FROM tidewire.outbox",
            "INSERT INTO tidewire.outbox (xid, table_name, operation) VALUES (''18446744073709551615'', ''x'', ''UPDATE'')",
            "INSERT INTO tidewire.outbox (created_at, table_name, operation) VALUES (''infinity'', ''x'', ''UPDATE'')",
            "DELETE FROM tidewire.outbox",
            "CREATE TABLE tidewire.mine (id int)",
        ] {
            run(
                &database.pool,
                &format!(
                    "CREATE OR REPLACE FUNCTION f(e) RETURNS json LANGUAGE plpgsql AS 'BEGIN {theft}; RETURN 1; END'"
                ),
            )
            .await;
            run(&database.pool, "TRUNCATE tidewire.outbox; INSERT INTO t VALUES (2, 'a'); DELETE FROM t WHERE id = 2")
                .await;
            let refused = strings(&database.pool, "SELECT coalesce(omitted, '') FROM tidewire.outbox").await;
            assert_eq!(refused.len(), 2, "{theft}");
            assert!(refused.iter().all(|reason| reason.contains("permission denied")), "{theft}: {refused:?}");
        }
        run(&database.pool, "DROP CAST (e AS json); TRUNCATE t; INSERT INTO t VALUES (3, 'a')").await;
    }
}

#[tokio::test]
async fn the_leader_is_told_of_missing_and_disabled_triggers_and_of_dropped_tables() {
    let database = database_with(
        "CREATE TABLE whole (id int PRIMARY KEY); CREATE TABLE holed (id int PRIMARY KEY); CREATE TABLE disabled (id int PRIMARY KEY);
         CREATE TABLE p (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p DEFAULT;
         CREATE TABLE dropped (id int); CREATE TABLE bare (id int);
         SELECT tidewire.track(t::regclass) FROM unnest('{whole,holed,disabled,p,dropped,bare}'::text[]) t",
    )
    .await;
    assert_eq!(problems(&database.pool).await, NOTHING);
    run(
        &database.pool,
        r#"DROP TRIGGER "!tidewire" ON holed; ALTER TABLE disabled DISABLE TRIGGER "!tidewire_update";
           DO $$ BEGIN EXECUTE format('ALTER TABLE p1 DISABLE TRIGGER %I', '!tidewire_' || 'p'::regclass::oid); END $$; DROP TABLE dropped; DROP TRIGGER "!tidewire" ON bare;
           DROP TRIGGER "!tidewire_update" ON bare; DROP TRIGGER "!tidewire_truncate" ON bare"#,
    )
    .await;
    let oid = strings(&database.pool, "SELECT 'p'::regclass::oid::text").await.remove(0);
    assert_eq!(
        problems(&database.pool).await,
        [
            "dropped public.dropped",
            "trigger_disabled public.disabled !tidewire_update on public.disabled",
            &*format!("trigger_disabled public.p !tidewire_{oid} on public.p1"),
            "trigger_missing public.bare all",
            "trigger_missing public.holed !tidewire on public.holed",
        ]
    );
    run(&database.pool, "SELECT tidewire.track('holed'), tidewire.track('bare'), tidewire.track('disabled')").await;
    assert_eq!(problems(&database.pool).await.len(), 2, "tracking again repairs");
}

#[tokio::test]
async fn the_leaders_look_never_waits_for_a_users_lock() {
    let database = database_with(
        "ALTER EVENT TRIGGER tidewire_attach DISABLE; CREATE TABLE p (id int PRIMARY KEY) PARTITION BY LIST (id);
         SELECT tidewire.track('p'); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1)",
    )
    .await;
    let mut user = PgConnection::connect(&database.url).await.unwrap();
    sqlx::raw_sql("BEGIN; INSERT INTO p1 VALUES (1)").execute(&mut user).await.unwrap();
    let problems_meanwhile = problems(&database.pool).await;
    assert_eq!(problems_meanwhile.len(), 1, "{problems_meanwhile:?}");
    assert!(problems_meanwhile[0].starts_with("partition_trigger_missing public.p !tidewire_truncate on public.p1"));
    sqlx::raw_sql("COMMIT").execute(&mut user).await.unwrap();
    assert_eq!(problems(&database.pool).await, NOTHING);
}

#[tokio::test]
async fn tables_that_swap_names_stay_tracked_under_their_new_ones() {
    let database = database_with(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); SELECT tidewire.track('a'), tidewire.track('b');
         ALTER TABLE a RENAME TO c; ALTER TABLE b RENAME TO a; ALTER TABLE c RENAME TO b",
    )
    .await;
    assert_eq!(problems(&database.pool).await, NOTHING);
    let names = "SELECT table_name FROM tidewire.tracked_tables WHERE table_name <> tidewire.table_text(relid)";
    assert_eq!(strings(&database.pool, names).await, NOTHING);
    run(&database.pool, "DROP TABLE a; CREATE TABLE a (id int PRIMARY KEY); SELECT tidewire.track('a')").await;
    assert_eq!(problems(&database.pool).await, NOTHING, "a table of the same name takes the place of the dropped one");
}

#[tokio::test]
async fn a_fingerprint_changes_with_what_a_subscriber_sees_and_with_nothing_else() {
    let database = database_with(
        "CREATE DOMAIN email AS text; CREATE TABLE t (id int PRIMARY KEY, v email); SELECT tidewire.track('t')",
    )
    .await;
    let fingerprint = async || {
        strings(&database.pool, "SELECT tidewire.table_fingerprint((SELECT relid FROM tidewire.tracked_tables))::text")
            .await
    };
    let mut before = fingerprint().await;
    let stored = strings(&database.pool, "SELECT fingerprint::text FROM tidewire.tracked_tables").await;
    let read = |text: &String| serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text).unwrap();
    assert!(read(&before[0]).iter().all(|(name, value)| read(&stored[0]).get(name) == Some(value)), "{stored:?}");
    assert!(
        before[0].contains(r#""type_name": "text""#) && before[0].contains(r#""type": "public.email""#),
        "{before:?}"
    );
    for sql in [
        "INSERT INTO t VALUES (1)",
        "CREATE INDEX ON t (v)",
        "ANALYZE t",
        "VACUUM FULL t",
        "ALTER TABLE t SET (fillfactor = 50)",
    ] {
        run(&database.pool, sql).await;
    }
    assert_eq!(fingerprint().await, before);
    for ddl in [
        "ALTER TABLE t ADD w int",
        "ALTER TABLE t RENAME w TO x",
        "ALTER TABLE t ALTER x TYPE bigint",
        "ALTER TABLE t DROP x",
        "ALTER TABLE t RENAME TO u",
        "ALTER TABLE u ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE u DISABLE TRIGGER \"!tidewire\"",
    ] {
        run(&database.pool, ddl).await;
        let after = fingerprint().await;
        assert_ne!(after, before, "{ddl}");
        before = after;
    }
}

async fn heard(listener: &mut PgListener) -> bool {
    // A notification of our own behind the others: what arrives before it is all there was.
    sqlx::query("NOTIFY fence").execute(&mut *listener).await.unwrap();
    let mut heard = false;
    loop {
        let notification = tokio::time::timeout(DEADLINE, listener.recv()).await.expect("the fence").unwrap();
        match notification.channel() {
            "fence" => return heard,
            _ => heard = true,
        }
    }
}

#[tokio::test]
async fn ddl_rings_for_tracked_tables_only_and_never_when_writers_may_not_notify() {
    let database = database_with(
        "CREATE TABLE tracked (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE other (id int); SELECT tidewire.track('tracked')",
    )
    .await;
    let mut listener = PgListener::connect_with(&database.pool).await.unwrap();
    listener.listen_all(["tidewire_schema", "fence"]).await.unwrap();
    for (ddl, rings) in [
        ("ALTER TABLE other ADD v int", false),
        ("CREATE TABLE another (id int)", false),
        ("CREATE TEMP TABLE temporary (id int)", false),
        ("DROP TABLE another", false),
        ("ALTER TABLE tracked ADD v int", true),
        ("CREATE TABLE leaf PARTITION OF tracked DEFAULT", true),
        ("ALTER TABLE tracked DROP v", true),
        ("ALTER TABLE tracked DISABLE TRIGGER ALL", true),
        ("DROP TRIGGER \"!tidewire_truncate\" ON tracked", true),
        ("SELECT tidewire.set_wake('poll'); ALTER TABLE tracked ADD v int", false),
        ("SELECT tidewire.set_wake('notify'); DROP TABLE tracked", true),
        ("DROP SCHEMA tidewire CASCADE", false),
        ("CREATE TABLE afterwards (id int); DROP TABLE afterwards", false),
    ] {
        run(&database.pool, ddl).await;
        assert_eq!(heard(&mut listener).await, rings, "{ddl}");
    }
}

/// Found in review: where the schema was migrated without CREATEROLE, the GRANT that was printed gave nothing.
#[tokio::test]
async fn a_printed_grant_gives_the_right_to_emit() {
    const EMIT: &str =
        "SELECT tidewire.emit('order', '1', 'paid', '{}'), tidewire.emit('order', '1', 'paid', '{}'::jsonb)";
    for (with_role, before) in [
        (true, "SELECT 1"),
        (
            false,
            "REVOKE ALL ON SCHEMA tidewire FROM tidewire_app; REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tidewire FROM tidewire_app",
        ),
    ] {
        let database = database().await;
        run(&database.pool, before).await;
        let (role, options) = role(&database.pool, &database.url, "emits").await;
        let app = PgPool::connect_with(options.clone()).await.unwrap();
        let error = sqlx::query(EMIT).execute(&app).await.unwrap_err();
        let message = tidewire::cli::connect::explained(&app.clone().into(), error).await.to_string();
        let (_, grant) = message.split_once("with tidewire.emit(): ").expect(&message);
        assert_eq!(grant.contains("tidewire_app"), with_role, "{message}");
        run(&database.pool, grant).await;
        app.close().await;
        let app = PgPool::connect_with(options).await.unwrap();
        run(&app, EMIT).await;
        app.close().await;
        run(&database.pool, &format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    }
}

/// A login role of this database's own, and how to connect as it.
async fn role(pool: &PgPool, url: &str, suffix: &str) -> (String, PgConnectOptions) {
    let database = strings(pool, "SELECT current_database()::text").await.remove(0);
    let role = format!("{database}_{suffix}");
    run(pool, &format!("DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN PASSWORD 'x'")).await;
    let options = PgConnectOptions::from_str(url).unwrap().username(&role).password("x");
    (role, options)
}

#[tokio::test]
async fn an_application_may_publish_and_nothing_else() {
    let database = database().await;
    let (role, options) = role(&database.pool, &database.url, "app").await;
    run(&database.pool, &format!("GRANT tidewire_app TO {role}; CREATE TABLE t (id int PRIMARY KEY); SELECT tidewire.track('t'); GRANT INSERT ON t TO {role}")).await;
    let app = PgPool::connect_with(options).await.unwrap();
    // Names on the caller's search_path must not bend what runs with the owner's rights.
    run(
        &app,
        "CREATE TEMP TABLE outbox (id int); CREATE DOMAIN pg_temp.json AS int; CREATE DOMAIN pg_temp.text AS int;
         SET search_path = pg_temp, pg_catalog, public; INSERT INTO t VALUES (1);
         SELECT tidewire.emit('order', '1', 'paid', '{}'), tidewire.emit('order', '1', 'paid', '{}'::pg_catalog.jsonb);
         INSERT INTO tidewire.outbox_event VALUES ('order', '2', 'paid', '{}')",
    )
    .await;
    assert_eq!(captured(&database.pool).await.len(), 4);
    for sql in [
        "INSERT INTO tidewire.outbox (table_name, operation) VALUES ('public.t', 'INSERT')",
        "SELECT * FROM tidewire.outbox_event",
        "SELECT feed_key FROM tidewire.terms",
        "SELECT * FROM tidewire.event_log",
        "SELECT * FROM tidewire.api_keys",
        "SELECT tidewire.track('t')",
        "SELECT tidewire.set_wake('poll')",
        "SELECT tidewire.sync_tracked('t'::regclass)",
    ] {
        let refusal = refusal(&app, sql).await;
        assert!(refusal.contains("permission denied"), "{sql}: {refusal}");
    }
    app.close().await;
    run(&database.pool, &format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn owners_track_their_own_tables_once_they_are_let() {
    let database = database().await;
    let (role, options) = role(&database.pool, &database.url, "owner").await;
    run(&database.pool, &format!("CREATE SCHEMA own AUTHORIZATION {role}; CREATE TABLE foreigners (id int); SELECT tidewire.grant_tracking('{role}')")).await;
    let owner = PgPool::connect_with(options).await.unwrap();
    run(
        &owner,
        "CREATE TABLE own.t (id int PRIMARY KEY, v text) PARTITION BY LIST (id); CREATE TABLE own.t1 PARTITION OF own.t DEFAULT;
         SELECT tidewire.track('own.t'); SELECT tidewire.track('own.t', columns => '{v}', replica => true);
         INSERT INTO own.t VALUES (1, 'a')",
    )
    .await;
    assert_eq!(captured(&database.pool).await, [r#"INSERT {"id":1} - -> {"id":1,"v":"a"}"#]);
    assert_eq!(problems(&database.pool).await, NOTHING);
    let refusal = refusal(&owner, "SELECT tidewire.track('foreigners')").await;
    assert!(refusal.contains("may not track table public.foreigners. Only its owner"), "{refusal}");
    run(&owner, "SELECT tidewire.untrack('own.t'); DELETE FROM own.t").await;
    let left = strings(&database.pool, "SELECT operation FROM tidewire.outbox").await;
    assert_eq!(left, ["SCHEMA"], "that it is not tracked any more, and nothing else");
    owner.close().await;
    run(&database.pool, &format!("DROP OWNED BY {role} CASCADE; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn keys_and_their_versions_are_announced_but_not_their_use() {
    let database = database().await;
    let mut listener = PgListener::connect_with(&database.pool).await.unwrap();
    listener.listen_all(["tidewire_keys", "fence"]).await.unwrap();
    let mut last = 0;
    for (sql, rings) in [
        ("INSERT INTO tidewire.api_keys (key_id, name, key_hash, scopes) VALUES ('k', 'n', '', '{}')", true),
        ("UPDATE tidewire.api_keys SET last_used_at = now()", false),
        ("UPDATE tidewire.api_keys SET is_active = true", false),
        ("UPDATE tidewire.api_keys SET is_active = false, last_used_at = now()", true),
        (
            "DELETE FROM tidewire.api_keys; INSERT INTO tidewire.api_keys (key_id, name, key_hash, scopes) VALUES ('k', 'n', '', '{}')",
            true,
        ),
    ] {
        run(&database.pool, sql).await;
        assert_eq!(heard(&mut listener).await, rings, "{sql}");
        let version: i64 =
            sqlx::query_scalar("SELECT version FROM tidewire.api_keys").fetch_one(&database.pool).await.unwrap();
        assert_eq!(version > last, rings, "{sql}");
        last = version;
    }
    run(&database.pool, "DELETE FROM tidewire.api_keys").await;
    let notification = tokio::time::timeout(Duration::from_secs(30), listener.recv()).await.unwrap().unwrap();
    assert_eq!((notification.channel(), notification.payload()), ("tidewire_keys", "k"));
}

#[tokio::test]
async fn a_restored_database_finds_its_tracked_tables_again() {
    // What a dump and restore does: other OIDs, and attribute numbers without the gaps of dropped columns.
    let database = database_with(
        "CREATE TABLE t (gone int, id int PRIMARY KEY, v text, secret text); ALTER TABLE t DROP gone;
         SELECT tidewire.track('t', except_columns => '{secret}')",
    )
    .await;
    let triggers = strings(
        &database.pool,
        "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 't'::regclass ORDER BY tgname",
    )
    .await;
    run(
        &database.pool,
        &format!(
            "DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v text, secret text); {}; INSERT INTO t VALUES (1, 'a', 's')",
            triggers.join(";")
        ),
    )
    .await;
    assert_eq!(captured(&database.pool).await, [r#"INSERT {"id":1} - -> {"id":1,"v":"a"}"#]);
    assert_eq!(problems(&database.pool).await, NOTHING);
    captured(&database.pool).await;
    run(&database.pool, "ALTER TABLE t RENAME secret TO hidden; INSERT INTO t VALUES (2, 'b', 's')").await;
    assert_eq!(captured(&database.pool).await, [r#"INSERT {"id":2} - -> {"id":2,"v":"b"}"#]);
    let known = "SELECT concat_ws(' ', relid::regclass, except_columns) FROM tidewire.tracked_tables";
    assert_eq!(problems(&database.pool).await, NOTHING);
    assert_eq!(strings(&database.pool, known).await, ["t {hidden}"]);
}

#[tokio::test]
async fn a_list_of_no_columns_carries_the_key_alone() {
    let database = database_with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT tidewire.track('t', columns => '{}'); INSERT INTO t VALUES (1, 'a');
         CREATE TABLE u (id int, v text); SELECT tidewire.track('u', columns => '{v}'); ALTER TABLE u DROP v;
         SELECT tidewire.refresh_tracked(); INSERT INTO u VALUES (1)",
    )
    .await;
    assert_eq!(captured(&database.pool).await, [r#"INSERT {"id":1} - -> {"id":1}"#, "INSERT - - -> {}"]);
}
