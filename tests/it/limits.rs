//! How many connections a key has over the whole cluster: the registry of nodes, and the limits that go by it.

use std::sync::Arc;

use tidewire::auth::key::KeyId;
use tidewire::cluster::{Cluster, ConnectionLimiter};
use tidewire::postgres::Database;
use tidewire::postgres::registry::{self, Elsewhere, NodeIdentity, NodeReport, NodeState};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::support::postgres::{TestDatabase, database};
use crate::support::{DEADLINE, eventually};

/// A node's connections to the test's database.
fn connect(db: &TestDatabase) -> Arc<Database> {
    Arc::new(Database::new(&db.url, None, "test", 5).unwrap())
}

fn identity(node: &str) -> NodeIdentity {
    NodeIdentity { node: node.to_owned(), instance: Uuid::new_v4(), url: None, version: "test".to_owned() }
}

fn report() -> NodeReport {
    NodeReport { epoch: Some(1), high_water: Some(7), connections: 3, subscriptions: 4, state: NodeState::Ready }
}

fn elsewhere(connections: u32, leaving: u32) -> Elsewhere {
    Elsewhere { connections, leaving }
}

#[tokio::test]
async fn nodes_hear_of_each_others_connections_and_a_dead_ones_count_for_nothing() {
    let db = database().await;
    let (a, b) = (identity("a"), identity("b"));
    let key = KeyId::from_stored("key");
    let count = |count| vec![(key.clone(), count)];
    let beat = async |node: &NodeIdentity, own: &[(KeyId, u32)]| {
        registry::heartbeat(&db.pool.clone().into(), node, &report(), own).await.unwrap()
    };
    assert_eq!(beat(&a, &count(3)).await.other_nodes, 0);
    let heard = beat(&b, &count(4)).await;
    assert_eq!((heard.other_nodes, heard.others.get(&key)), (1, Some(&elsewhere(3, 0))));
    assert_eq!(beat(&a, &[]).await.others.get(&key), Some(&elsewhere(4, 0)));
    assert!(beat(&b, &count(4)).await.others.is_empty(), "what a node no longer has is gone");

    // A crash of Postgres empties the unlogged table; the next heartbeat fills it.
    sqlx::query("TRUNCATE tidewire.key_connections").execute(&db.pool).await.unwrap();
    beat(&b, &count(4)).await;
    assert_eq!(beat(&a, &[]).await.others.get(&key), Some(&elsewhere(4, 0)));

    let silent = "UPDATE tidewire.nodes SET heartbeat_at = now() - interval '2 s' WHERE node = 'b'";
    sqlx::query(silent).execute(&db.pool).await.unwrap();
    assert_eq!(beat(&a, &[]).await.others.get(&key), Some(&elsewhere(4, 4)));

    let silence = "UPDATE tidewire.nodes SET heartbeat_at = now() - interval '6 s' WHERE node = 'b'";
    sqlx::query(silence).execute(&db.pool).await.unwrap();
    let heard = beat(&a, &[]).await;
    assert_eq!((heard.other_nodes, heard.others.len()), (0, 0));
    let nodes = registry::list(&db.pool.clone().into()).await.unwrap();
    let fresh: Vec<_> = nodes.iter().map(|node| (node.node.as_str(), node.fresh)).collect();
    assert_eq!(fresh, [("a", true), ("b", false)]);
    assert_eq!((nodes[0].epoch, nodes[0].high_water, nodes[0].state.as_str()), (Some(1), Some(7), "ready"));

    // It was only paused: it counts again with its next heartbeat, also after a sweep.
    registry::sweep(&db.pool.clone().into()).await.unwrap();
    beat(&b, &count(4)).await;
    assert_eq!(beat(&a, &[]).await.others.get(&key), Some(&elsewhere(4, 0)));
    registry::leave(&db.pool.clone().into(), &b).await.unwrap();
    let heard = beat(&a, &[]).await;
    assert_eq!((heard.other_nodes, heard.others.len()), (0, 0));
}

#[tokio::test]
async fn two_processes_of_one_name_are_found_and_a_restart_is_not_taken_for_one() {
    let db = database().await;
    let (one, two) = (identity("a"), identity("a"));
    let beat = async |node: &NodeIdentity| {
        registry::heartbeat(&db.pool.clone().into(), node, &report(), &[]).await.unwrap().rival
    };
    assert!(!beat(&one).await);
    assert!(beat(&two).await);
    assert!(beat(&one).await);
    registry::leave(&db.pool.clone().into(), &two).await.unwrap();
    assert!(!beat(&one).await, "leaving does nothing to a name that another has taken");
    registry::leave(&db.pool.clone().into(), &one).await.unwrap();
    assert!(!beat(&two).await, "who said goodbye is no rival");
    assert_eq!(registry::list(&db.pool.clone().into()).await.unwrap()[0].instance, two.instance);
}

#[tokio::test]
async fn a_limit_holds_over_the_whole_cluster() {
    let db = database().await;
    let key = KeyId::from_stored("key");
    let shutdown = CancellationToken::new();
    let start = |name: &str| {
        let limiter = ConnectionLimiter::new();
        let cluster = Cluster::new(connect(&db), identity(name), Arc::clone(&limiter), report);
        let status = cluster.status();
        (limiter, status, tokio::spawn(cluster.run(shutdown.clone())))
    };
    let (a, status, a_task) = start("a");
    let (b, _, b_task) = start("b");
    let guards: Vec<_> = (0..4).map(|_| a.try_acquire(&key, 6).unwrap()).collect();
    eventually("b has heard of four", || b.connections(&key).1 == 4).await;
    let more: Vec<_> = (0..2).map(|_| b.try_acquire(&key, 6).unwrap()).collect();
    assert!(b.try_acquire(&key, 6).is_err());
    eventually("a has heard of two", || a.connections(&key).1 == 2).await;
    assert!(a.try_acquire(&key, 6).is_err());
    drop(guards);
    eventually("b has heard that they are gone", || b.connections(&key).1 == 0).await;
    let last = b.try_acquire(&key, 6).unwrap();
    assert!(status.heard() && status.other_nodes() == 1 && !status.has_rival());

    shutdown.cancel();
    tokio::time::timeout(DEADLINE, async { tokio::try_join!(a_task, b_task) }).await.unwrap().unwrap();
    let nodes = registry::list(&db.pool.clone().into()).await.unwrap();
    assert!(nodes.iter().all(|node| node.state == "stopped" && !node.fresh));
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM tidewire.key_connections").fetch_one(&db.pool).await.unwrap();
    assert_eq!(left, 0);
    drop((more, last));
}

#[tokio::test]
async fn while_postgres_is_away_limits_go_by_the_last_counts() {
    let db = database().await;
    let key = KeyId::from_stored("key");
    registry::heartbeat(&db.pool.clone().into(), &identity("a"), &report(), &[(key.clone(), 4)]).await.unwrap();
    let limiter = ConnectionLimiter::new();
    let cluster = Cluster::new(connect(&db), identity("b"), Arc::clone(&limiter), report);
    let (status, shutdown) = (cluster.status(), CancellationToken::new());
    let task = tokio::spawn(cluster.run(shutdown.clone()));
    eventually("it has heard of four", || limiter.connections(&key).1 == 4).await;
    sqlx::query("ALTER TABLE tidewire.nodes RENAME TO away").execute(&db.pool).await.unwrap();
    eventually("a heartbeat has failed", || status.failures() > 0).await;
    let guards: Vec<_> = (0..2).map(|_| limiter.try_acquire(&key, 6).unwrap()).collect();
    assert!(limiter.try_acquire(&key, 6).is_err());
    shutdown.cancel();
    tokio::time::timeout(DEADLINE, task).await.unwrap().unwrap();
    drop(guards);
}
