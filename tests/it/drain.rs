//! A node that is told to go says goodbye, hands over, and loses nothing.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::support::cluster::TestCluster;
use crate::support::http::ask;
use crate::support::wire::Wire;
use crate::support::{answered, within};

#[tokio::test]
async fn each_client_gets_its_slot_and_1012_at_its_time() {
    const CLIENTS: usize = 12;
    let mut cluster = TestCluster::with(2, |settings| {
        settings.drain_window_ms = Some(1_500);
        settings.drain_deadline_ms = Some(6_000);
    })
    .await;
    let mut wires = Vec::new();
    for _ in 0..CLIENTS {
        let mut wire = cluster.node(0).wire().await;
        wire.subscribe("o", "orders").await;
        wire.expect("caught_up").await;
        wires.push(wire);
    }
    let (address, bearer) = (cluster.node(0).address(), format!("Bearer {}", cluster.key));
    let url = cluster.node(0).ws_url();
    let going = cluster.take_out(0);
    let watching = async {
        let mut slots = BTreeSet::new();
        for wire in &mut wires {
            let drain = wire.expect("drain").await;
            let (slot, deadline) =
                (drain["reconnect_after_ms"].as_u64().unwrap(), drain["deadline_ms"].as_u64().unwrap());
            assert!(slot <= 1_500 && slot <= deadline && deadline <= 6_000, "{drain}");
            slots.insert(slot);
        }
        assert!(slots.len() > CLIENTS / 2, "everybody has the same slot: {slots:?}");
        // Not dead, but not for newcomers.
        assert_eq!(ask("GET", address, "/readyz", &[]).await.status, 404);
        assert_eq!(ask("GET", address, "/livez", &[]).await.status, 200);
        let (status, body) = Wire::connect(&url, &[("authorization", &bearer)]).await.unwrap_err();
        assert_eq!(status, 503, "{body}");
        for wire in &mut wires {
            assert_eq!(wire.closed().await, 1012);
        }
    };
    let ((), ()) = within("the drain", Box::pin(async { tokio::join!(going.stop(), watching) })).await;
}

#[tokio::test]
async fn a_leader_that_goes_hands_over_within_a_second() {
    let mut cluster = TestCluster::start(2).await;
    let leader = cluster.leader().await;
    let mut client = cluster.node(1 - leader).client("orders").await;
    cluster.insert("orders", 1..=5).await;
    client.expect_keys(1..=5).await;
    cluster.stop(leader).await;
    assert_eq!(cluster.leader().await, 1 - leader);
    cluster.insert("orders", 6..=10).await;
    client.expect_keys(6..=10).await;
    let sql = "SELECT former.reason || ' ' || (later.acquired_at - former.released_at < interval '1 second')
               FROM tidewire.terms former JOIN tidewire.terms later ON later.term = former.term + 1";
    assert_eq!(cluster.text(sql).await, "resigned true");
}

#[tokio::test]
async fn a_client_follows_a_rolling_restart_without_a_gap() {
    let mut cluster = TestCluster::start(2).await;
    let mut client = cluster.client("orders").await;
    let writer = cluster.writer();
    client.expect_keys(1..=10).await;
    let mut seen = 10;
    for _ in 0..2 {
        let serving = cluster.serving(&client);
        let going = cluster.take_out(serving);
        let reading = async {
            while client.resumed().is_empty() || client.resumed().last().unwrap().node != cluster.node(1 - serving).name
            {
                seen += 1;
                client.expect_keys([seen]).await;
            }
        };
        within("the drain", Box::pin(async { tokio::join!(going.stop(), reading) })).await;
        cluster.start_again(serving).await;
    }
    assert_eq!(client.resumed().len(), 2, "{:?}", client.resumed());
    let last = writer.stop().await;
    client.expect_keys(seen + 1..=last).await;
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn a_node_without_clients_goes_at_once_and_is_marked_so() {
    let mut cluster = TestCluster::with(2, |settings| {
        settings.drain_window_ms = Some(20_000);
        settings.drain_deadline_ms = Some(25_000);
    })
    .await;
    let began = Instant::now();
    cluster.stop(0).await;
    assert!(began.elapsed().as_secs() < 10, "{:?}", began.elapsed());
    let states = "SELECT string_agg(node || ' ' || state, ', ' ORDER BY node) FROM tidewire.nodes";
    answered("the node's row says so", async || {
        let states = cluster.text(states).await;
        (states == "n0 stopped, n1 ready" || states == "n1 ready").then_some(())
    })
    .await;
}
