//! Domain events: `emit`, the view, and the wake-up of a parked relay.

use serde_json::{Value, json};
use sqlx::postgres::PgListener;
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use crate::capture::{refusal, run, strings};
use crate::support::DEADLINE;
use crate::support::postgres::database;

/// The key that a parked relay holds exclusively.
const PARK: i64 = 8_388_068_008_253_452_902;

#[tokio::test]
async fn an_event_has_its_aggregate_its_type_and_its_payload() {
    let database = database().await;
    let sql = "SELECT tidewire.emit('order', '4\"2', 'paid', $1, $2)";
    let id: Uuid = sqlx::query_scalar(sql)
        .bind(json!({"total": 1}))
        .bind(json!({"tenant": "a"}))
        .fetch_one(&database.pool)
        .await
        .unwrap();
    let sql = "SELECT event_id, table_name || ' ' || operation || ' ' || row_key::text || ' ' || event_type, after_data::jsonb, headers::jsonb FROM tidewire.outbox";
    let row: (Uuid, String, Value, Value) = sqlx::query_as(sql).fetch_one(&database.pool).await.unwrap();
    assert_eq!(
        row,
        (id, r#"event:order EVENT {"aggregate_id":"4\"2"} paid"#.into(), json!({"total": 1}), json!({"tenant": "a"}))
    );
}

#[tokio::test]
async fn literals_text_json_and_jsonb_all_find_emit_without_a_cast() {
    let database = database().await;
    run(
        &database.pool,
        r#"SELECT tidewire.emit('o', '1', 't', '{"a": 1}'), tidewire.emit('o', '1', 't', '{"a": 1}', '{"h": 1}'),
               tidewire.emit('o', '1', 't', '{"a": 1}'::text), tidewire.emit('o', '1', 't', '{"a": 1}'::varchar, '{"h": 1}'),
               tidewire.emit('o', '1', 't', '{"a": 1}'::json), tidewire.emit('o', '1', 't', '{"a": 1}'::json, '{"h": 1}'::json),
               tidewire.emit('o', '1', 't', '{"a": 1}'::jsonb), tidewire.emit('o', '1', 't', '{"a": 1}'::jsonb, '{"h": 1}'::jsonb),
               tidewire.emit('o', '1', 't', '{"a": 1}'::jsonb, '{"h": 1}'), tidewire.emit('o', '1', 't', NULL);
           INSERT INTO tidewire.outbox_event (aggregate_type, aggregate_id, event_type, payload)
           SELECT 'o', g::text, 't', jsonb_build_object('a', 1) FROM generate_series(1, 3) g;
           INSERT INTO tidewire.outbox_event VALUES ('o', '1', 't', '{"a": 1}', '{"h": 1}')"#,
    )
    .await;
    let counts = strings(
        &database.pool,
        "SELECT concat_ws(' ', count(*), count(after_data), count(headers)) FROM tidewire.outbox",
    )
    .await;
    assert_eq!(counts, ["14 13 6"]);
}

#[tokio::test]
async fn an_event_that_is_none_is_refused() {
    let database = database().await;
    for (sql, says) in [
        ("SELECT tidewire.emit(NULL, '1', 't', '{}')", "must not be null"),
        ("SELECT tidewire.emit('o', '1', 't', '{')", "invalid input syntax for type json"),
        ("SELECT tidewire.emit('o', '1', 't', '{}', '[1]')", "must be a JSON object"),
        ("INSERT INTO tidewire.outbox_event VALUES ('o', NULL, 't', '{}')", "must not be null"),
        ("SELECT tidewire.set_wake('often')", "unknown wake mode 'often'"),
    ] {
        let refusal = refusal(&database.pool, sql).await;
        assert!(refusal.contains(says), "{sql}: {refusal}");
    }
}

#[tokio::test]
async fn writers_ring_a_parked_relay_and_keep_an_awake_one_from_parking() {
    let database = database().await;
    run(&database.pool, "CREATE TABLE t (id int PRIMARY KEY); SELECT tidewire.track('t', replica => true)").await;
    let mut listener = PgListener::connect_with(&database.pool).await.unwrap();
    listener.listen_all(["tidewire_wake", "fence"]).await.unwrap();
    let mut relay = PgConnection::connect(&database.url).await.unwrap();
    let mut writer = PgConnection::connect(&database.url).await.unwrap();
    let park = "SELECT pg_try_advisory_lock($1)";

    sqlx::raw_sql("BEGIN; SELECT tidewire.emit('o', '1', 't', '{}')").execute(&mut writer).await.unwrap();
    let parked: bool = sqlx::query_scalar(park).bind(PARK).fetch_one(&mut relay).await.unwrap();
    assert!(!parked, "a writer that saw the relay awake is still under way");
    sqlx::raw_sql("COMMIT").execute(&mut writer).await.unwrap();

    let parked: bool = sqlx::query_scalar(park).bind(PARK).fetch_one(&mut relay).await.unwrap();
    assert!(parked);
    for write in [
        "SELECT tidewire.emit('o', '1', 't', '{}')",
        "INSERT INTO tidewire.outbox_event VALUES ('o', '1', 't', '{}')",
        "INSERT INTO t VALUES (1)",
        "SET session_replication_role = replica; INSERT INTO t VALUES (2); RESET session_replication_role",
    ] {
        sqlx::raw_sql(write).execute(&mut writer).await.unwrap();
        let notification = tokio::time::timeout(DEADLINE, listener.recv()).await.expect(write).unwrap();
        assert_eq!(notification.channel(), "tidewire_wake", "{write}");
    }

    run(&database.pool, "SELECT tidewire.set_wake('poll')").await;
    assert_eq!(strings(&database.pool, "SELECT tidewire.wake_mode()").await, ["poll"]);
    // The switch itself rings, so that a relay that is parked looks again.
    assert_eq!(listener.recv().await.unwrap().channel(), "tidewire_wake");
    sqlx::raw_sql("SELECT tidewire.emit('o', '1', 't', '{}'); NOTIFY fence").execute(&mut writer).await.unwrap();
    assert_eq!(listener.recv().await.unwrap().channel(), "fence");
    run(&database.pool, "SELECT tidewire.set_wake('notify')").await;
    assert_eq!(strings(&database.pool, "SELECT tidewire.wake_mode()").await, ["notify"]);
}
