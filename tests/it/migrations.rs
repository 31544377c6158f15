//! Migrations: from any number of nodes at once, refused where they cannot work, with a sentence that helps.

use std::str::FromStr as _;

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, PgPool};
use tidewire::postgres::migrate::{MigrationError, Outcome, migrate, version};

use crate::support::postgres::database;

async fn run(pool: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

#[tokio::test]
async fn nodes_that_migrate_at_once_all_end_at_the_same_version() {
    let database = database().await;
    run(&database.pool, "DROP SCHEMA tidewire CASCADE").await;
    let options = PgConnectOptions::from_str(&database.url).unwrap();
    let outcomes = futures_util::future::join_all((0..6).map(|_| migrate(&options))).await;
    let migrated = outcomes.iter().filter(|outcome| outcome.as_ref().unwrap().from == 0).count();
    assert_eq!(migrated, 1, "{outcomes:?}");
    assert!(outcomes.iter().all(|outcome| outcome.as_ref().unwrap().to == version()), "{outcomes:?}");
}

#[tokio::test]
async fn migrating_again_changes_nothing() {
    let database = database().await;
    let options = PgConnectOptions::from_str(&database.url).unwrap();
    assert_eq!(migrate(&options).await.unwrap(), Outcome { from: version(), to: version() });
}

#[tokio::test]
async fn a_database_of_a_newer_program_is_refused() {
    let database = database().await;
    run(
        &database.pool,
        "INSERT INTO tidewire.schema_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'from the future', true, '\\x00', 0)",
    )
    .await;
    let options = PgConnectOptions::from_str(&database.url).unwrap();
    let error = migrate(&options).await.unwrap_err();
    assert!(matches!(error, MigrationError::DatabaseNewer { found: 9999, .. }), "{error}");
    assert!(error.to_string().contains("upgrade the program"), "{error}");
}

#[tokio::test]
async fn a_changed_migration_is_refused() {
    let database = database().await;
    run(&database.pool, "UPDATE tidewire.schema_migrations SET checksum = '\\x00' WHERE version = 1").await;
    let options = PgConnectOptions::from_str(&database.url).unwrap();
    assert!(matches!(migrate(&options).await.unwrap_err(), MigrationError::Changed { version: 1 }));
}

/// A role is global to the server, so its name carries the database's.
async fn stranger(pool: &PgPool, url: &str) -> (String, PgConnectOptions) {
    let database: String = sqlx::query_scalar("SELECT current_database()").fetch_one(pool).await.unwrap();
    let role = format!("{database}_stranger");
    run(pool, &format!("DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN PASSWORD 'stranger'")).await;
    let options = PgConnectOptions::from_str(url).unwrap().username(&role).password("stranger");
    (role, options)
}

#[tokio::test]
async fn a_role_without_rights_is_told_which_grant_to_run() {
    let database = database().await;
    let (role, options) = stranger(&database.pool, &database.url).await;
    let error = migrate(&options).await.unwrap_err().to_string();
    assert!(error.contains(&format!("GRANT tidewire_owner TO {role};")), "{error}");

    run(&database.pool, "DROP SCHEMA tidewire CASCADE").await;
    let error = migrate(&options).await.unwrap_err().to_string();
    assert!(error.contains("GRANT CREATE ON DATABASE") && error.contains(&format!("TO {role};")), "{error}");
    run(&database.pool, &format!("DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_role_that_may_only_create_in_the_database_can_own_everything_itself() {
    let database = database().await;
    let (role, options) = stranger(&database.pool, &database.url).await;
    run(&database.pool, "DROP SCHEMA tidewire CASCADE").await;
    run(
        &database.pool,
        &format!("DO $$ BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO {role}', current_database()); END $$"),
    )
    .await;
    let mut url = url::Url::parse(&database.url).unwrap();
    url.set_username(&role).unwrap();
    url.set_password(Some("stranger")).unwrap();
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidewire"))
        .args(["migrate"])
        .env("TIDEWIRE_DATABASE_URL", url.as_str())
        .output()
        .await
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("note: role"), "{output:?}");
    assert_eq!(migrate(&options).await.unwrap(), Outcome { from: version(), to: version() });
    let owner: String =
        sqlx::query_scalar("SELECT relowner::regrole::text FROM pg_class WHERE oid = 'tidewire.outbox'::regclass")
            .fetch_one(&database.pool)
            .await
            .unwrap();
    assert_eq!(owner, role);
    let emitted: Result<uuid::Uuid, _> = sqlx::query_scalar("SELECT tidewire.emit('order', '1', 'paid', '{}')")
        .fetch_one(&sqlx::PgPool::connect_with(options).await.unwrap())
        .await;
    emitted.unwrap();
    run(&database.pool, &format!("DROP OWNED BY {role} CASCADE; DROP ROLE {role}")).await;
}

/// As the first user of a managed service is.
#[tokio::test]
async fn a_role_that_may_create_roles_gives_everything_and_capture_owners_of_their_own() {
    let database = database().await;
    let (role, options) = stranger(&database.pool, &database.url).await;
    run(&database.pool, "DROP SCHEMA tidewire CASCADE").await;
    run(
        &database.pool,
        &format!(
            "ALTER ROLE {role} CREATEROLE;
             DO $$ BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO {role}', current_database()); END $$"
        ),
    )
    .await;
    assert_eq!(migrate(&options).await.unwrap().to, version());
    let owners = "SELECT format('%s of %s', proname, proowner::regrole) FROM pg_proc
                  WHERE pronamespace = 'tidewire'::regnamespace AND proname LIKE 'capture%' ORDER BY 1";
    let owners: Vec<String> = sqlx::query_scalar(owners).fetch_all(&database.pool).await.unwrap();
    let wanted =
        ["capture of tidewire_capture", "capture_bulk of tidewire_capture", "capture_truncate of tidewire_owner"];
    assert_eq!(owners, wanted);
    let own = sqlx::PgPool::connect_with(options).await.unwrap();
    run(&own, "CREATE SCHEMA own; CREATE TABLE own.t (id int PRIMARY KEY); SELECT tidewire.track('own.t')").await;
    run(&own, "INSERT INTO own.t VALUES (1); UPDATE own.t SET id = 2; TRUNCATE own.t").await;
    let captured: i64 =
        sqlx::query_scalar("SELECT count(*) FROM tidewire.outbox").fetch_one(&database.pool).await.unwrap();
    assert_eq!(captured, 3);
    own.close().await;
    run(&database.pool, &format!("DROP OWNED BY {role} CASCADE; DROP ROLE {role}")).await;
}
