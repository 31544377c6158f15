//! The feed over NOTIFY is fast and worth no trust: lost, forged or stuck, nobody misses or invents an event.

use sqlx::postgres::PgListener;
use sqlx::{Connection as _, PgConnection};

use crate::support::cluster::TestCluster;
use crate::support::postgres::own_server;
use crate::support::{eventually, within};

/// Ends the backends on which nodes listen.
const KILL_LISTENERS: &str = "SELECT count(pg_terminate_backend(pid))::text FROM pg_stat_activity
     WHERE datname = current_database() AND application_name LIKE 'tidewire %' AND query ILIKE 'LISTEN%'";

#[tokio::test]
async fn a_killed_listener_is_replaced_and_nothing_is_missed() {
    let cluster = TestCluster::start(2).await;
    let mut clients = [cluster.node(0).client("orders").await, cluster.node(1).client("orders").await];
    let connects = |node: usize| cluster.node(node).metrics().reconciles_total.with_label_values(&["connect"]).get();
    let writer = cluster.writer();
    for _ in 0..3 {
        let before = [connects(0), connects(1)];
        assert_eq!(cluster.text(KILL_LISTENERS).await, "2");
        eventually("both listen again", || connects(0) > before[0] && connects(1) > before[1]).await;
    }
    let last = writer.stop().await;
    for client in &mut clients {
        client.expect_keys(1..=last).await;
        client.expect_nothing_more(&cluster.pool).await;
        assert!(client.resumed().is_empty(), "the sockets stayed");
    }
}

#[tokio::test]
async fn forged_chunks_invent_nothing_and_hide_nothing() {
    let cluster = TestCluster::start(2).await;
    let (leader, node) = (cluster.leader().await, cluster.node(0));
    let mut client = node.client("orders").await;
    // Anybody may listen: so whoever forges knows what real chunks look like.
    let mut eavesdropper = PgListener::connect_with(&cluster.pool).await.unwrap();
    eavesdropper.listen("tidewire_feed").await.unwrap();
    cluster.insert("orders", 1..=3).await;
    client.expect_keys(1..=3).await;
    let chunk = loop {
        let heard = within("a chunk", eavesdropper.recv()).await.unwrap();
        if heard.payload().contains(".e.") {
            break heard.payload().to_owned();
        }
    };
    let mut parts: Vec<&str> = chunk.split('.').collect();
    let next = node.context().hub.high_water() + 1;
    let (first, last) = (next.to_string(), (next + 2).to_string());
    (parts[3], parts[4]) = (&first, &last);
    let forged = [
        chunk.clone(),
        parts.join("."),
        format!("1.1.1.{next}.{}.r.77", next + 1_000),
        format!("1.1.1.{next}.{}.h.78", next + 1_000_000),
        format!("1.1.99.{next}.{next}.h.79"),
        format!("1.7.1.{next}.{next}.e.80.AAAA"),
        "1.1.1.1.18446744073709551615.h.81".to_owned(),
        "garbage".to_owned(),
        "x".repeat(7_900),
    ];
    let mut connection = cluster.pool.acquire().await.unwrap();
    // A role that nothing of Tidewire's was granted to; NOTIFY asks nobody.
    sqlx::query("SET ROLE pg_signal_backend").execute(&mut *connection).await.unwrap();
    for _ in 0..20 {
        for payload in &forged {
            sqlx::query("SELECT pg_notify('tidewire_feed', $1)").bind(payload).execute(&mut *connection).await.unwrap();
        }
        for channel in ["tidewire_wake", "tidewire_leader", "tidewire_keys", "tidewire_schema"] {
            sqlx::query("SELECT pg_notify($1, 'x')").bind(channel).execute(&mut *connection).await.unwrap();
        }
    }
    sqlx::query("RESET ROLE").execute(&mut *connection).await.unwrap();
    drop(connection);
    let outcome = |outcome: &str| node.metrics().feed_chunks_total.with_label_values(&[outcome]).get();
    eventually("they were all looked at", || outcome("foreign") + outcome("refused") >= 180).await;
    assert_eq!(node.context().hub.high_water(), next - 1);
    assert_eq!(cluster.leader().await, leader);
    client.expect_nothing_more(&cluster.pool).await;
    cluster.insert("orders", 4..=6).await;
    client.expect_keys(4..=6).await;
    assert_eq!(node.metrics().log_newest_seq.get(), 6);
    assert_eq!(cluster.terms().await, 1);
}

#[tokio::test]
async fn chunks_of_the_wrong_backend_are_ignored_even_when_they_are_genuine() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    let mut client = node.client("orders").await;
    let mut eavesdropper = PgListener::connect_with(&cluster.pool).await.unwrap();
    eavesdropper.listen("tidewire_feed").await.unwrap();
    cluster.insert("orders", 1..=1).await;
    client.expect_keys([1]).await;
    let heard = within("a chunk", eavesdropper.recv()).await.unwrap();
    let foreign = || node.metrics().feed_chunks_total.with_label_values(&["foreign"]).get();
    let before = foreign();
    sqlx::query("SELECT pg_notify('tidewire_feed', $1)").bind(heard.payload()).execute(&cluster.pool).await.unwrap();
    eventually("the replay was seen through", || foreign() > before).await;
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn a_session_that_pins_the_notification_queue_slows_the_feed_and_stops_nothing() {
    // A server of its own: the queue is shared by all its databases.
    let server = own_server().await;
    let url = server.url("postgres");
    let cluster = TestCluster::over(&url, 1, |_| {}).await;
    let node = cluster.node(0);
    let mut client = node.client("orders").await;
    let mut pin = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("LISTEN junk").execute(&mut pin).await.unwrap();
    sqlx::raw_sql("BEGIN; SELECT 1").execute(&mut pin).await.unwrap();
    // Two hundredths of its 8 GB.
    let fill = "SELECT count(pg_notify('junk', rpad(g::text, 7900, 'x'))) FROM generate_series(1, 23000) g";
    cluster.run(fill).await;
    eventually("the leader sees it", || node.metrics().notify_queue_permille.get() >= 20).await;
    let from_log = || node.metrics().events_received_total.with_label_values(&["log"]).get();
    let before = from_log();
    cluster.insert("orders", 1..=50).await;
    client.expect_keys(1..=50).await;
    assert_eq!(from_log() - before, 50, "only the range was announced");

    drop(pin);
    eventually("the queue is free", || node.metrics().notify_queue_permille.get() < 20).await;
    let before = from_log();
    cluster.insert("orders", 51..=60).await;
    client.expect_keys(51..=60).await;
    assert_eq!(from_log(), before, "the feed carries events again");
}

/// One throttle stood for the key look-ups of all terms: whoever made terms up kept a new leader's chunks from being believed
/// until its next heartbeats.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_made_up_terms_does_not_delay_a_new_leaders_feed() {
    const ROUNDS: i64 = 6;
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    let mut client = node.client("orders").await;
    let mut forgers = Vec::new();
    for forger in 0..3_i64 {
        let mut connection = cluster.pool.acquire().await.unwrap().detach();
        forgers.push(tokio::spawn(async move {
            for round in 0_i64.. {
                let flood = "SELECT pg_notify('tidewire_feed', format('1.1.%s.1.1.h.%s.AAAA', $1::bigint + g, g)) FROM generate_series(1, 20) g";
                sqlx::query(flood).bind(1_000 + forger + round * 100).execute(&mut connection).await.unwrap();
                // As a thousand chunks a second and forger, without end.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }));
    }
    let foreign = || node.metrics().feed_chunks_total.with_label_values(&["foreign"]).get();
    eventually("the flood has come", || foreign() > 200).await;
    let by_feed = || node.metrics().events_received_total.with_label_values(&["feed"]).get();
    let before = by_feed();
    for round in 1..=ROUNDS {
        cluster.kill_leader_backend().await;
        cluster.leader().await;
        cluster.insert("orders", round..=round).await;
        client.expect_keys([round]).await;
    }
    // A reading of the log may happen to come first.
    assert!(by_feed() - before >= 5, "{} of {ROUNDS}", by_feed() - before);
    for forger in forgers {
        forger.abort();
    }
}
