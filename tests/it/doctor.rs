//! What the administrator's commands say: doctor, status, tables, track.

use std::process::Output;

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tidewire::cli::doctor::{Finding, Severity, examine};
use tidewire::postgres::Database;

use crate::support::postgres::{TestDatabase, database, empty_database};

async fn run(db: &TestDatabase, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(&db.pool)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

async fn diagnosis(db: &TestDatabase) -> Vec<Finding> {
    examine(&Database::new(&db.url, None, "doctor", 2).unwrap()).await
}

/// The findings of one check that need attention.
async fn complaints(db: &TestDatabase, check: &str) -> Vec<Finding> {
    let found = diagnosis(db).await;
    assert!(found.iter().all(|finding| !finding.what.contains("could not be checked")), "{found:#?}");
    found.into_iter().filter(|finding| finding.check == check && finding.severity >= Severity::Warning).collect()
}

/// Runs the program against a test's database.
async fn tidewire(db: &TestDatabase, arguments: &[&str]) -> Output {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_tidewire"))
        .args(arguments)
        .env("TIDEWIRE_DATABASE_URL", &db.url)
        .kill_on_drop(true)
        .output()
        .await
        .unwrap()
}

async fn answer(db: &TestDatabase, arguments: &[&str]) -> Value {
    let output = tidewire(db, arguments).await;
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

const ORDERS: &str = "CREATE TABLE orders (id bigint PRIMARY KEY, parent bigint, note text);
    SELECT tidewire.track('orders', except_columns => '{note}')";

#[tokio::test]
async fn a_database_in_order_needs_nothing() {
    let db = database().await;
    run(&db, ORDERS).await;
    let attention: Vec<_> = diagnosis(&db)
        .await
        .into_iter()
        // The test server's minor version is what it is, and it runs without fsync.
        .filter(|finding| finding.severity >= Severity::Warning)
        .filter(|finding| !["version", "synchronous_commit", "fsync", "full_page_writes"].contains(&finding.check))
        .collect();
    assert_eq!(attention, []);
}

#[tokio::test]
async fn a_database_without_the_schema_is_sent_to_migrate() {
    let db = empty_database().await;
    let found = diagnosis(&db).await;
    let schema = found.iter().find(|finding| finding.check == "schema").unwrap();
    assert_eq!((schema.severity, schema.run.as_deref()), (Severity::Problem, Some("tidewire migrate")));
}

#[tokio::test]
async fn broken_triggers_come_with_what_mends_them() {
    let db = database().await;
    run(&db, ORDERS).await;
    for breaking in [
        r#"ALTER TABLE orders DISABLE TRIGGER "!tidewire""#,
        r#"DROP TRIGGER "!tidewire_update" ON orders"#,
        r#"DROP TRIGGER "!tidewire" ON orders; DROP TRIGGER "!tidewire_update" ON orders; DROP TRIGGER "!tidewire_truncate" ON orders"#,
    ] {
        run(&db, breaking).await;
        let found = complaints(&db, "triggers").await;
        assert_eq!(found.len(), 1, "{breaking}: {found:#?}");
        assert_eq!(found[0].severity, Severity::Problem);
        run(&db, found[0].run.as_deref().unwrap()).await;
        assert_eq!(complaints(&db, "triggers").await, [], "{breaking}");
        let except: Vec<String> =
            sqlx::query_scalar("SELECT except_columns FROM tidewire.tracked_tables").fetch_one(&db.pool).await.unwrap();
        assert_eq!(except, ["note"], "the options stay");
    }
}

#[tokio::test]
async fn a_row_trigger_that_changes_its_own_table_is_found() {
    let db = database().await;
    run(&db, ORDERS).await;
    run(
        &db,
        "CREATE FUNCTION harmless() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO orders_log VALUES (1); RETURN NULL; END';
         CREATE TRIGGER harmless AFTER UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION harmless()",
    )
    .await;
    assert_eq!(complaints(&db, "order").await, []);
    run(
        &db,
        r#"CREATE FUNCTION cascade() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN UPDATE public."orders" SET note = NEW.note WHERE parent = NEW.id; RETURN NULL; END';
           CREATE TRIGGER cascade AFTER UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION cascade()"#,
    )
    .await;
    let found = complaints(&db, "order").await;
    assert_eq!(found.len(), 1, "{found:#?}");
    run(&db, found[0].run.as_deref().unwrap()).await;
    assert_eq!(complaints(&db, "order").await, [], "deferred capture keeps the order");
}

#[tokio::test]
async fn what_makes_clients_hold_wrong_rows_is_warned_of() {
    let db = database().await;
    run(
        &db,
        "CREATE TABLE moved (id int PRIMARY KEY DEFERRABLE); CREATE TABLE loose (id int PRIMARY KEY, a int);
         CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY LIST (id); SELECT tidewire.track('moved'),
         tidewire.track('loose', key => '{a}'), tidewire.track('parted', bulk => true)",
    )
    .await;
    let found = complaints(&db, "tables").await;
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].what.contains("public.loose: column a of its key may be null"), "{found:#?}");
    assert!(found[1].what.contains("public.moved: its key constraint is DEFERRABLE"), "{found:#?}");
    run(&db, "DROP EVENT TRIGGER tidewire_attach").await;
    let found = complaints(&db, "tables").await;
    assert!(found.iter().any(|finding| finding.what.starts_with("public.parted is captured in bulk")), "{found:#?}");
}

#[tokio::test]
async fn whoever_locks_the_outbox_is_named() {
    let db = database().await;
    run(&db, "SELECT tidewire.emit('order', '1', 'paid', '{}')").await;
    let mut holder = PgConnection::connect(&db.url).await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut holder).await.unwrap();
    let mut open = holder.begin().await.unwrap();
    sqlx::query("SELECT FROM tidewire.outbox FOR UPDATE").execute(&mut *open).await.unwrap();
    let found = complaints(&db, "outbox locks").await;
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].run.as_deref(), Some(format!("SELECT pg_terminate_backend({pid});").as_str()));
    open.rollback().await.unwrap();
    assert_eq!(complaints(&db, "outbox locks").await, []);
    let relay = complaints(&db, "relay").await;
    assert_eq!(relay[0].severity, Severity::Problem, "an event waits and nobody leads");
}

#[tokio::test]
async fn dead_letters_are_counted_by_reader() {
    let db = database().await;
    run(&db, "INSERT INTO tidewire.dead_letters (reader, error) VALUES ('relay', 'too large'), ('relay', 'too large')")
        .await;
    let found = complaints(&db, "dead letters").await;
    assert!(found.len() == 1 && found[0].what.starts_with("2 events that relay"), "{found:#?}");
}

/// Found in review: nothing said why keys see nothing of such a table.
#[tokio::test]
async fn track_warns_of_row_level_security() {
    let db = database().await;
    run(&db, "CREATE TABLE secured (id int PRIMARY KEY); ALTER TABLE secured ENABLE ROW LEVEL SECURITY").await;
    let secured = answer(&db, &["track", "secured", "--json"]).await;
    let warning = secured["warnings"][0].as_str().unwrap();
    assert!(warning.contains("row level security") && warning.contains("--condition"), "{secured}");
}

#[tokio::test]
async fn the_commands_work_from_an_empty_database_on() {
    let db = empty_database().await;
    let refused = tidewire(&db, &["track", "orders"]).await;
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("tidewire migrate"), "{refused:?}");

    let migrated = answer(&db, &["migrate", "--json"]).await;
    assert_eq!(migrated["from"], 0);
    assert_eq!(answer(&db, &["migrate", "--json"]).await["from"], migrated["to"]);

    run(&db, r#"CREATE TABLE orders (id int PRIMARY KEY); CREATE UNLOGGED TABLE "Odd Name" (a int)"#).await;
    answer(&db, &["track", "orders", "--notify", "--json"]).await;
    let odd = answer(&db, &["track", r#"public."Odd Name""#, "--key", "a", "--no-before-image", "--json"]).await;
    assert!(odd["warnings"][0].as_str().unwrap().starts_with("table "), "{odd}");
    let tables = answer(&db, &["tables", "--json"]).await;
    assert_eq!(tables.as_array().unwrap().len(), 2);
    assert_eq!((&tables[1]["table"], &tables[1]["channel"]), (&"public.orders".into(), &"cdc_orders".into()));
    assert_eq!((&tables[0]["key"][0], &tables[0]["before_image"]), (&"a".into(), &false.into()));

    let unknown = tidewire(&db, &["track", "nothing"]).await;
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("does not exist"), "{unknown:?}");

    answer(&db, &["untrack", "orders", "--json"]).await;
    assert_eq!(answer(&db, &["tables", "--json"]).await.as_array().unwrap().len(), 1);
    let status = answer(&db, &["status", "--json"]).await;
    assert_eq!(
        (&status["leader"], &status["outbox"]["events"], &status["log"]["newest"]),
        (&Value::Null, &1.into(), &0.into())
    );
    let text = tidewire(&db, &["status"]).await.stdout;
    assert!(String::from_utf8_lossy(&text).contains("none: nothing is relayed"), "{text:?}");
}

#[tokio::test]
async fn a_database_that_nobody_answers_for_is_a_finding() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidewire"))
        .args(["doctor", "--json"])
        .env("TIDEWIRE_DATABASE_URL", format!("postgres://nobody@{free}/nothing"))
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&findings[0]["check"], &findings[0]["severity"]), (&"connection".into(), &"problem".into()));
}

#[tokio::test]
async fn capture_with_other_rights_than_its_own_is_no_fine_thing() {
    let db = database().await;
    run(&db, ORDERS).await;
    assert_eq!(complaints(&db, "capture's rights").await, []);
    run(&db, "REVOKE ALL ON tidewire.outbox FROM tidewire_capture").await;
    let found = complaints(&db, "capture's rights").await;
    assert_eq!(found[0].severity, Severity::Problem, "{found:?}");
    run(&db, found[0].run.as_deref().unwrap()).await;
    assert_eq!(complaints(&db, "capture's rights").await, [], "what it says to run mends it");
    run(&db, "INSERT INTO orders (id) VALUES (1)").await;
    // As a restore leaves them where the role is missing.
    run(&db, "DO $$ BEGIN EXECUTE format('ALTER FUNCTION tidewire.capture() OWNER TO %I', session_user); END $$").await;
    let found = complaints(&db, "capture's rights").await;
    assert_eq!(found[0].severity, Severity::Warning, "{found:?}");
}

#[tokio::test]
async fn a_reader_that_has_gone_is_no_error() {
    let db = database().await;
    for command in [&["tables"][..], &["status"], &["migrate"], &["track", "public.orders"]] {
        run(&db, "CREATE TABLE IF NOT EXISTS orders (id bigint PRIMARY KEY)").await;
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidewire"))
            .args(command)
            .env("TIDEWIRE_DATABASE_URL", &db.url)
            .stdout(writer)
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        // Which database it is, and nothing else.
        let is_target = said.lines().all(|line| line.starts_with("── database: "));
        assert!(output.status.success() && is_target, "{command:?}: {said}");
    }
}
