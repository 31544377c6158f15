//! A Postgres in a container is as good as any other.

use std::io::Write as _;

use crate::support::container::{Postgres, engine_answers};
use crate::support::postgres::pool;

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_in_a_container_takes_the_schema_and_an_event() {
    if !engine_answers() {
        // Not captured by the test runner, as `eprintln!` would be.
        let _ = writeln!(std::io::stderr(), "NOT RUN: no Docker engine answers here");
        return;
    }
    let server = Postgres::start(100).await;
    let pool = pool(&server.url("postgres")).await;
    tidewire::postgres::migrate::migrate(&pool.connect_options()).await.unwrap();
    sqlx::query("SELECT tidewire.emit('order', '1', 'placed', '{}'::json)").execute(&pool).await.unwrap();
    let waiting: i64 = sqlx::query_scalar("SELECT count(*) FROM tidewire.outbox").fetch_one(&pool).await.unwrap();
    assert_eq!(waiting, 1);
}
