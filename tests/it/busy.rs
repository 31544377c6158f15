//! Tracking a table that is busy: its writers go on, and whoever must wait too long hears for whom.

use std::str::FromStr as _;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};

use crate::capture::{database_with, refusal, run, strings};
use crate::support::answered;

/// Found in review: every writer queued behind `track` for as long as one transaction was open.
#[tokio::test]
async fn whoever_waits_to_track_a_table_lets_its_writers_go_on() {
    for (setup, call) in [("SELECT 1", "track"), ("SELECT tidewire.track('busy')", "untrack")] {
        let database = database_with(&format!("CREATE TABLE busy (id int PRIMARY KEY); {setup}")).await;
        let options = PgConnectOptions::from_str(&database.url).unwrap();
        let mut writer = options.connect().await.unwrap();
        sqlx::raw_sql("BEGIN; INSERT INTO busy VALUES (1)").execute(&mut writer).await.unwrap();
        let mut tracker = options.connect().await.unwrap();
        let waiting = tokio::spawn(async move {
            let statement = format!("SELECT tidewire.{call}('busy')");
            sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut tracker).await.map(|_| ())
        });
        answered("the wait for the lock", async || {
            strings(&database.pool, "SELECT 'waits' FROM pg_locks WHERE relation = 'busy'::regclass AND NOT granted")
                .await
                .pop()
        })
        .await;
        run(&database.pool, "INSERT INTO busy VALUES (2)").await;
        assert!(!waiting.is_finished(), "{call}: the other writer is still there");
        sqlx::raw_sql("COMMIT").execute(&mut writer).await.unwrap();
        waiting.await.unwrap().unwrap();
        writer.close().await.unwrap();
    }
}

#[tokio::test]
async fn whoever_waited_too_long_hears_who_holds_the_lock() {
    let database = database_with("CREATE TABLE busy (id int PRIMARY KEY)").await;
    let mut writer = PgConnectOptions::from_str(&database.url).unwrap().connect().await.unwrap();
    sqlx::raw_sql("BEGIN; INSERT INTO busy VALUES (1)").execute(&mut writer).await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut writer).await.unwrap();
    let said = refusal(&database.pool, "SET lock_timeout = '100ms'; SELECT tidewire.track('busy')").await;
    assert!(said.starts_with("table public.busy is in use: process "), "{said}");
    assert!(said.contains(&format!("process {pid} ")) && said.contains("pg_terminate_backend"), "{said}");
    writer.close().await.unwrap();
}
