//! What is committed reaches whoever asked for it: once, in order, whole transactions together.

use std::time::{Duration, Instant};

use serde_json::json;
use tidewire::client::{ConnectOptions, Event, SubscribeOptions, Transition};
use tokio_tungstenite::tungstenite::Message;

use crate::support::client::{TestClient, key_of};
use crate::support::cluster::TestCluster;
use crate::support::eventually;

#[tokio::test]
async fn a_committed_row_reaches_the_clients_of_every_node() {
    let cluster = TestCluster::start(2).await;
    let mut here = cluster.node(0).client("orders").await;
    let mut there = cluster.node(1).client("orders").await;
    cluster.insert_each("orders", 1..=5).await;
    here.expect_keys(1..=5).await;
    there.expect_keys(1..=5).await;
    here.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn what_is_rolled_back_is_never_heard_of() {
    let cluster = TestCluster::start(1).await;
    let mut client = cluster.node(0).client("orders").await;
    cluster.run("BEGIN; INSERT INTO orders (id) VALUES (1); ROLLBACK").await;
    cluster.run("BEGIN; INSERT INTO orders (id) VALUES (2); SAVEPOINT a; INSERT INTO orders (id) VALUES (3); ROLLBACK TO a; COMMIT").await;
    client.expect_keys([2]).await;
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn an_event_tells_operation_images_and_what_changed() {
    let cluster = TestCluster::start(1).await;
    let mut client = cluster.node(0).client("orders").await;
    cluster.run("INSERT INTO orders (id, total) VALUES (1, 12345678901234567890.10)").await;
    cluster.run("UPDATE orders SET status = 'paid' WHERE id = 1").await;
    cluster.run("DELETE FROM orders WHERE id = 1").await;
    let events = client.events(3).await;
    let ops: Vec<_> = events.iter().map(|event| event.op.as_str()).collect();
    assert_eq!(ops, ["INSERT", "UPDATE", "DELETE"]);
    assert!(events[0].before.is_null() && events[2].after.is_null());
    assert!(events[0].after.text().unwrap().contains("12345678901234567890.10"), "{:?}", events[0].after);
    assert_eq!(events[1].changed.as_deref(), Some(&["status".to_owned()][..]));
    assert!(events[1].before.text().unwrap().contains("new") && events[1].after.text().unwrap().contains("paid"));
    assert!(events.iter().all(|event| event.table == "public.orders" && event.tx_end && key_of(event) == 1));
}

#[tokio::test]
async fn transactions_are_contiguous_and_their_last_event_says_so() {
    let cluster = TestCluster::start(1).await;
    let mut client = cluster.node(0).client("orders").await;
    let writers = (0..4_i64).map(|writer| {
        let pool = cluster.pool.clone();
        tokio::spawn(async move {
            for round in 0..10 {
                let mut transaction = pool.begin().await.unwrap();
                for row in 0..3 {
                    sqlx::query("INSERT INTO orders (id) VALUES ($1)")
                        .bind(writer * 1_000 + round * 10 + row)
                        .execute(&mut *transaction)
                        .await
                        .unwrap();
                }
                transaction.commit().await.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let events = client.events(120).await;
    for transaction in events.chunks(3) {
        assert!(transaction.iter().all(|event| event.tx == transaction[0].tx), "{transaction:?}");
        let ends: Vec<_> = transaction.iter().map(|event| event.tx_end).collect();
        assert_eq!(ends, [false, false, true]);
        let first = key_of(&transaction[0]);
        assert_eq!(transaction.iter().map(key_of).collect::<Vec<_>>(), [first, first + 1, first + 2]);
    }
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn a_writer_wakes_a_parked_relay() {
    const ROUNDS: usize = 15;
    let cluster = TestCluster::start(1).await;
    let mut client = cluster.node(0).client("orders").await;
    let mut waits = Vec::new();
    for id in 1..=15 {
        cluster.node(0).parked().await;
        let began = Instant::now();
        cluster.insert("orders", id..=id).await;
        client.expect_keys([id]).await;
        waits.push(began.elapsed());
    }
    waits.sort_unstable();
    // The relay's safety poll alone, every 500 ms in any phase, would make half of them wait 250 ms or more.
    assert!(waits[ROUNDS / 2] < Duration::from_millis(150), "{waits:?}");
}

#[tokio::test]
async fn operations_and_columns_are_chosen_by_the_subscriber() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    let mut deletes = node.client_of(SubscribeOptions::tables(["orders"]).ops(["DELETE", "TRUNCATE"])).await;
    let mut narrow = node.client_of(SubscribeOptions::tables(["orders"]).columns(["id", "status"])).await;
    cluster.insert("orders", 1..=2).await;
    cluster.run("UPDATE orders SET note = 'hidden' WHERE id = 1").await;
    cluster.run("DELETE FROM orders WHERE id = 2").await;
    cluster.run("TRUNCATE orders").await;
    let events = deletes.events(2).await;
    assert_eq!(events.iter().map(|event| event.op.as_str()).collect::<Vec<_>>(), ["DELETE", "TRUNCATE"]);
    let events = narrow.events(5).await;
    for event in &events {
        let columns: Vec<_> = event.after.columns().into_iter().map(|(name, _)| name).collect();
        assert!(columns.is_empty() || columns == ["id", "status"], "{event:?}");
    }
    assert_eq!(events[2].op.as_str(), "UPDATE", "also one that changes no chosen column");
    assert_eq!(events[2].changed.as_deref(), Some(&[][..]));
    deletes.expect_nothing_more(&cluster.pool).await;
    narrow.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn a_filter_tells_which_rows_enter_and_leave_it() {
    let cluster = TestCluster::start(1).await;
    let paid = SubscribeOptions::tables(["orders"]).filter("status = 'paid'");
    let mut client = cluster.node(0).client_of(paid).await;
    cluster.run("INSERT INTO orders (id, status) VALUES (1, 'new'), (2, 'paid')").await;
    cluster.run("UPDATE orders SET status = 'paid' WHERE id = 1").await;
    cluster.run("UPDATE orders SET note = 'x' WHERE id = 1").await;
    cluster.run("UPDATE orders SET status = 'sent' WHERE id = 1").await;
    cluster.run("UPDATE orders SET note = 'y' WHERE id = 1").await;
    cluster.run("DELETE FROM orders").await;
    let events = client.events(5).await;
    let seen: Vec<_> = events.iter().map(|event| (key_of(event), event.op.as_str(), event.transition)).collect();
    assert_eq!(
        seen,
        [
            (2, "INSERT", None),
            (1, "UPDATE", Some(Transition::Enter)),
            (1, "UPDATE", None),
            (1, "UPDATE", Some(Transition::Leave)),
            (2, "DELETE", None),
        ]
    );
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn equal_filters_are_one_group_and_each_subscriber_has_its_own() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    let mut clients = Vec::new();
    for status in ["paid", "paid", "new"] {
        let subscribe = SubscribeOptions::tables(["orders"]).filter(format!("status = '{status}'"));
        clients.push(node.client_of(subscribe.id("same")).await);
    }
    assert_eq!((node.metrics().filter_groups.get(), node.metrics().subscriptions.get()), (2, 3));
    cluster.run("INSERT INTO orders (id, status) VALUES (1, 'new'), (2, 'paid'), (3, 'new')").await;
    clients[0].expect_keys([2]).await;
    clients[1].expect_keys([2]).await;
    clients[2].expect_keys([1, 3]).await;
    for client in clients {
        client.disconnect().await;
    }
    eventually("groups go with their last subscriber", || node.metrics().filter_groups.get() == 0).await;
    assert_eq!(node.metrics().subscriptions.get(), 0);
}

#[tokio::test]
async fn a_glob_takes_in_tables_that_are_tracked_later() {
    let cluster = TestCluster::start(1).await;
    let mut client = cluster.node(0).client_of(SubscribeOptions::tables(["sales.*"])).await;
    cluster.run("CREATE SCHEMA sales; CREATE TABLE sales.\"Big Deals\" (id int PRIMARY KEY); SELECT tidewire.track('sales.\"Big Deals\"')").await;
    cluster.run("INSERT INTO orders (id) VALUES (1)").await;
    cluster.run("INSERT INTO sales.\"Big Deals\" VALUES (7)").await;
    let event = client.event().await;
    assert_eq!((event.table.as_str(), key_of(&event)), ("sales.\"Big Deals\"", 7));
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn domain_events_come_by_aggregate_type_or_all() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    let mut all = node.client("event:*").await;
    let large =
        SubscribeOptions::tables(["event:invoice"]).filter("(payload->>'total')::int > 100 AND event_type = 'sent'");
    let mut large = node.client_of(large).await;
    cluster.run("SELECT tidewire.emit('invoice', 'a', 'sent', '{\"total\": 50}')").await;
    cluster
        .run("SELECT tidewire.emit('invoice', 'b', 'sent', '{\"total\": 500}', '{\"traceparent\": \"00-x\"}')")
        .await;
    cluster.run("SELECT tidewire.emit('order', 'c', 'made', '{}')").await;
    let events = all.events(3).await;
    let tables: Vec<_> = events.iter().map(|event| event.table.as_str()).collect();
    assert_eq!(tables, ["event:invoice", "event:invoice", "event:order"]);
    let event = large.event().await;
    assert_eq!(event.key.text(), Some(r#"{"aggregate_id":"b"}"#));
    assert_eq!(event.event_type.as_deref(), Some("sent"));
    assert!(event.headers.text().unwrap().contains("00-x"));
    large.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn a_key_sees_only_its_columns_and_rows() {
    let cluster = TestCluster::start(1).await;
    let scopes =
        json!({"tables": [{"table": "public.orders", "columns": ["id", "status"], "condition": "status <> 'secret'"}]});
    let key = cluster.key(scopes).await;
    let options = ConnectOptions::new(cluster.node(0).url()).key(key.expose());
    let mut client = TestClient::connect(options, SubscribeOptions::tables(["orders"])).await;
    cluster.run("INSERT INTO orders (id, status, note) VALUES (1, 'new', 'hush'), (2, 'secret', 'hush')").await;
    cluster.run("UPDATE orders SET note = 'still hush' WHERE id = 1").await;
    cluster.run("UPDATE orders SET status = 'secret' WHERE id = 1").await;
    cluster.run("UPDATE orders SET status = 'open' WHERE id = 2").await;
    let events = client.events(3).await;
    let shown = format!("{events:?}");
    assert!(!shown.contains("hush") && !shown.contains("secret"), "{shown}");
    assert_eq!(events[0].after.text(), Some(r#"{"id":1,"status":"new"}"#));
    assert_eq!((key_of(&events[1]), &events[1].transition), (1, &Some(Transition::Leave)));
    assert!(events[1].after.is_absent() && !events[1].key.is_absent(), "{:?}", events[1]);
    assert_eq!((key_of(&events[2]), &events[2].transition), (2, &Some(Transition::Enter)));
    assert!(events[2].before.is_absent(), "{:?}", events[2]);
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn two_subscriptions_of_one_connection_both_get_what_both_match() {
    let cluster = TestCluster::start(1).await;
    let mut wire = cluster.node(0).wire().await;
    for (id, filter) in [("all", "true"), ("big", "id > 2")] {
        wire.say(json!({"type": "subscribe", "id": id, "tables": ["orders"], "where": filter})).await;
        wire.expect("subscribed").await;
        wire.expect("caught_up").await;
    }
    cluster.insert("orders", 1..=4).await;
    let (mut all, mut big) = (Vec::new(), Vec::new());
    while all.len() < 4 || big.len() < 2 {
        let frame = wire.expect("events").await;
        let seen = if frame["id"] == "all" { &mut all } else { &mut big };
        seen.extend(frame["events"].as_array().unwrap().iter().map(|event| event["key"]["id"].as_i64().unwrap()));
    }
    assert_eq!((all, big), (vec![1, 2, 3, 4], vec![3, 4]));
}

#[tokio::test]
async fn a_transaction_is_split_only_above_the_frame_limit_and_says_open_until_its_end() {
    let cluster = TestCluster::with(1, |settings| settings.frame_bytes = Some(16 << 10)).await;
    let mut wire = cluster.node(0).wire().await;
    let subscribed = wire.subscribe("o", "orders").await;
    wire.expect("caught_up").await;
    cluster.run("INSERT INTO orders (id, note) SELECT g, repeat('x', 500) FROM generate_series(1, 10) g").await;
    let frame = wire.expect("events").await;
    assert_eq!(frame["events"].as_array().unwrap().len(), 10);
    assert_eq!((&frame["prev"], frame.get("open")), (&subscribed["cursor"], None));

    cluster.run("INSERT INTO orders (id, note) SELECT g, repeat('x', 500) FROM generate_series(11, 200) g").await;
    let (mut position, mut keys, mut frames) = (frame["cursor"].clone(), Vec::new(), 0);
    loop {
        let frame = wire.expect("events").await;
        assert_eq!(frame["prev"], position);
        assert!(frame.to_string().len() <= (16 << 10) + 200, "{}", frame.to_string().len());
        position = frame["cursor"].clone();
        frames += 1;
        let events = frame["events"].as_array().unwrap();
        keys.extend(events.iter().map(|event| event["key"]["id"].as_i64().unwrap()));
        let last = events.last().unwrap()["tx_end"] == true;
        assert_eq!(frame["open"] == true, !last, "{frame}");
        if last {
            break;
        }
    }
    assert_eq!(keys, (11..=200).collect::<Vec<_>>());
    assert!(frames > 3, "{frames}");
}

#[tokio::test]
async fn rows_too_large_to_carry_keep_their_place_and_go_to_the_dead_letters() {
    let cluster = TestCluster::with(1, |settings| settings.event_bytes = Some(2_000)).await;
    let filtered = SubscribeOptions::tables(["orders"]).filter("status = 'none has this'");
    let mut filtered = cluster.node(0).client_of(filtered).await;
    let mut client = cluster.node(0).client("orders").await;
    cluster.run("INSERT INTO orders (id, note) SELECT g, CASE WHEN g = 2 THEN repeat('x', 5000) END FROM generate_series(1, 3) g").await;
    let events = client.events(3).await;
    assert_eq!(events.iter().map(key_of).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(events.iter().map(|event| event.omitted).collect::<Vec<_>>(), [false, true, false]);
    assert!(events[1].after.is_absent() && !events[1].tx_end && events[2].tx_end, "{:?}", events[1]);
    let letter = cluster.text("SELECT seq || ' ' || length(rows::text) FROM tidewire.dead_letters").await;
    let (seq, length) = letter.split_once(' ').unwrap();
    assert_eq!(seq.parse(), Ok(events[1].seq));
    assert!(length.parse::<usize>().unwrap() > 5_000);
    assert_eq!(cluster.node(0).metrics().relay_poison_total.get(), 1);
    // Nobody can tell whether it matches, so everybody who may is told.
    assert_eq!(key_of(&filtered.event().await), 2);
}

#[tokio::test]
async fn values_come_as_postgres_writes_them_under_pinned_settings() {
    let cluster = TestCluster::start(1).await;
    cluster.run(
        "CREATE TABLE kinds (id int PRIMARY KEY, n numeric, f float8, b bytea, t timestamptz, l timestamp, i interval, a int[], j jsonb, u uuid, nothing text);
         SELECT tidewire.track('kinds')",
    ).await;
    let mut client = cluster.node(0).client("kinds").await;
    cluster.run(
        "SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'; SET IntervalStyle = 'postgres'; SET bytea_output = 'escape'; SET extra_float_digits = -5;
         INSERT INTO kinds VALUES (1, 'NaN', 0.1::float8 + 0.2, '\\xDEADbeef', '2026-11-20 10:00:00.123456+00', '2026-11-20 10:00', '1 day 2 hours', '{1,2}', '{\"a\": [1]}', '6ba7b810-9dad-11d1-80b4-00c04fd430c8', NULL);
         RESET ALL",
    ).await;
    let event = client.event().await;
    let row: serde_json::Value = event.after.parse().unwrap().unwrap();
    let expected = json!({
        "id": 1, "n": "NaN", "f": 0.30000000000000004, "b": "\\xdeadbeef", "t": "2026-11-20T10:00:00.123456+00:00",
        "l": "2026-11-20T10:00:00", "i": "P1DT2H", "a": [1, 2], "j": {"a": [1]}, "u": "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "nothing": null
    });
    assert_eq!(row, expected);
}

#[tokio::test]
async fn order_per_row_is_kept_under_concurrent_writers() {
    const WRITERS: usize = 6;
    let cluster = TestCluster::start(1).await;
    let mut client = cluster.node(0).client("orders").await;
    cluster.run("INSERT INTO orders (id, total) VALUES (1, 0), (2, 0)").await;
    let writers = (0..WRITERS).map(|_| {
        let pool = cluster.pool.clone();
        tokio::spawn(async move {
            for round in 0..20 {
                let sql = match round % 3 {
                    0 => "UPDATE orders SET total = total + 1 WHERE id = 1",
                    1 => "BEGIN; UPDATE orders SET total = total + 1 WHERE id = 1; SAVEPOINT s; UPDATE orders SET total = total + 100 WHERE id = 1; ROLLBACK TO s; UPDATE orders SET total = total + 1 WHERE id = 2; COMMIT",
                    _ => "BEGIN; UPDATE orders SET total = total + 1 WHERE id = 1; ROLLBACK",
                };
                sqlx::raw_sql(sql).execute(&pool).await.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    // Seven rounds of the first kind, seven of the second with two updates each.
    let events = client.events(2 + WRITERS * 21).await;
    for row in [1, 2] {
        let totals: Vec<i64> = events.iter().filter(|event| key_of(event) == row).map(total_of).collect();
        assert_eq!(totals, (0..totals.len() as i64).collect::<Vec<_>>(), "row {row}");
    }
    client.expect_nothing_more(&cluster.pool).await;
}

fn total_of(event: &Event) -> i64 {
    event.after.parse::<serde_json::Value>().unwrap().unwrap()["total"].as_i64().unwrap()
}

#[tokio::test]
async fn a_large_transaction_arrives_whole_and_alone() {
    const ROWS: i64 = 20_000;
    let cluster = TestCluster::with(1, |settings| settings.relay_batch = Some(1_000)).await;
    let mut client = cluster.node(0).client("orders").await;
    let mut small = cluster.pool.begin().await.unwrap();
    sqlx::query("INSERT INTO orders (id) VALUES (-1)").execute(&mut *small).await.unwrap();
    cluster.insert("orders", 1..=ROWS).await;
    sqlx::query("INSERT INTO orders (id) VALUES (-2)").execute(&mut *small).await.unwrap();
    small.commit().await.unwrap();
    let events = client.events(ROWS as usize + 2).await;
    let (large, small): (Vec<_>, Vec<_>) = events.iter().partition(|event| key_of(event) > 0);
    assert_eq!(large.iter().map(|event| key_of(event)).collect::<Vec<_>>(), (1..=ROWS).collect::<Vec<_>>());
    assert_eq!(large.iter().filter(|event| event.tx_end).count(), 1);
    assert_eq!(small.iter().map(|event| key_of(event)).collect::<Vec<_>>(), [-1, -2]);
    assert_eq!(large.last().unwrap().seq - large[0].seq, ROWS as u64 - 1, "nothing stands in between");
}

/// Found in review: answers to a client that reads none of them were kept without a limit.
#[tokio::test]
async fn a_client_that_takes_no_answers_is_not_heard_until_it_does() {
    let cluster = TestCluster::with(1, |settings| {
        settings.messages_per_s = Some(100_000);
        settings.slow_after_ms = Some(600_000);
    })
    .await;
    let mut wire = cluster.node(0).wire().await;
    let ping = json!({"type": "ping", "t": "x".repeat(4_000)}).to_string();
    let mut sent = 0;
    while sent < 30_000 && wire.takes(Message::text(ping.clone())).await {
        sent += 1;
    }
    assert!(sent < 30_000, "120 MB of questions were taken from a client that reads no answer");
    for _ in 0..sent {
        wire.expect("pong").await;
    }
}
