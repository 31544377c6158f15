//! What is committed reaches whoever asked for it: once, in order, whole transactions together.

use std::time::{Duration, Instant};

use crate::support::client::key_of;
use crate::support::cluster::TestCluster;

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
