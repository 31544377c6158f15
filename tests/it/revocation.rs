//! What a key may do ends when the key does; and it may do it no more often than allowed, over the whole cluster.

use std::time::{Duration, Instant};

use chrono::{TimeDelta, Utc};
use serde_json::json;
use tidewire::auth::scope::Scopes;
use tidewire::auth::store;
use tidewire::postgres::registry::{self, NodeIdentity, NodeReport, NodeState};
use uuid::Uuid;

use crate::support::cluster::TestCluster;
use crate::support::eventually;
use crate::support::wire::Wire;

#[tokio::test]
async fn a_revoked_key_loses_its_sockets_on_every_node_within_a_second() {
    let cluster = TestCluster::start(2).await;
    let mut times = Vec::new();
    for _ in 0..3 {
        let key = cluster.key(json!({"tables": [{"table": "public.orders"}]})).await;
        let mut wires = Vec::new();
        for node in [0, 1] {
            let mut wire = cluster.node(node).wire_of(key.expose()).await;
            wire.subscribe("o", "orders").await;
            wire.expect("caught_up").await;
            wires.push(wire);
        }
        let mut other = cluster.node(0).wire().await;
        let began = Instant::now();
        store::revoke(&cluster.pool.clone().into(), key.id()).await.unwrap();
        for wire in &mut wires {
            assert_eq!(wire.closed().await, 4440);
        }
        times.push(began.elapsed());
        other.say(json!({"type": "ping"})).await;
        other.expect("pong").await;
        let bearer = format!("Bearer {}", key.expose());
        let (status, _) = Wire::connect(&cluster.node(0).ws_url(), &[("authorization", &bearer)]).await.unwrap_err();
        assert_eq!(status, 401);
    }
    // The best of three: the machine may be busy with other things.
    assert!(times.iter().min().unwrap() < &Duration::from_secs(1), "{times:?}");
}

#[tokio::test]
async fn an_expired_key_loses_its_sockets() {
    let cluster = TestCluster::start(1).await;
    let soon = Utc::now() + TimeDelta::seconds(3);
    let key = store::create_key(&cluster.pool.clone().into(), "short", &Scopes::all(10), Some(soon)).await.unwrap();
    let mut wire = cluster.node(0).wire_of(key.expose()).await;
    assert_eq!(wire.closed().await, 4441);
}

#[tokio::test]
async fn a_revocation_while_the_node_was_cut_off_is_found_when_it_is_back() {
    let cluster = TestCluster::start(1).await;
    let key = cluster.key(json!({"tables": [{"table": "public.orders"}]})).await;
    let node = cluster.node(0);
    let mut wire = node.wire_of(key.expose()).await;
    node.proxy.cut();
    eventually("the node has noticed", || !node.context().follower.listening()).await;
    store::revoke(&cluster.pool.clone().into(), key.id()).await.unwrap();
    node.proxy.restore();
    assert_eq!(wire.closed().await, 4440);
}

#[tokio::test]
async fn the_limit_of_connections_counts_over_the_whole_cluster() {
    let cluster = TestCluster::start(2).await;
    let key = cluster.key(json!({"tables": [{"table": "public.orders"}], "max_connections": 3})).await;
    let bearer = format!("Bearer {}", key.expose());
    let others = |node: usize| cluster.node(node).context().limiter.connections(key.id()).1;
    let first = cluster.node(0).wire_of(key.expose()).await;
    let _second = cluster.node(0).wire_of(key.expose()).await;
    eventually("the other node has heard of them", || others(1) == 2).await;
    let _third = cluster.node(1).wire_of(key.expose()).await;

    let url = cluster.node(1).ws_url();
    let (status, body) = Wire::connect(&url, &[("authorization", &bearer)]).await.unwrap_err();
    assert_eq!(status, 429, "{body}");
    let mut by_message = Wire::connect(&url, &[]).await.unwrap();
    by_message.say(json!({"type": "auth", "token": key.expose()})).await;
    assert_eq!(by_message.error().await.0, "rate_limited");
    assert_eq!(by_message.closed().await, 4429);

    drop(first);
    eventually("the other node has heard of that", || others(1) == 1).await;
    let _again = cluster.node(1).wire_of(key.expose()).await;
}

#[tokio::test]
async fn a_client_of_a_node_that_died_is_let_in_elsewhere_though_its_key_was_at_the_limit() {
    let cluster = TestCluster::start(1).await;
    let key = cluster.key(json!({"tables": [{"table": "public.orders"}], "max_connections": 1})).await;
    let node = cluster.node(0);
    // A node that wrote one heartbeat, and then died.
    let dead = NodeIdentity { node: "dead".into(), instance: Uuid::new_v4(), url: None, version: "test".to_owned() };
    let state = NodeState::Ready;
    let report = NodeReport { epoch: None, high_water: None, connections: 1, subscriptions: 0, state };
    registry::heartbeat(&cluster.pool.clone().into(), &dead, &report, &[(key.id().clone(), 1)]).await.unwrap();
    eventually("its connection counts", || node.context().limiter.connections(key.id()).1 == 1).await;

    let mut wire = Wire::connect(&node.ws_url(), &[]).await.unwrap();
    wire.say(json!({"type": "auth", "token": key.expose()})).await;
    wire.expect("welcome").await;
    assert_eq!(node.metrics().admissions_deferred_total.get(), 1);
}
