//! Whoever was away goes on where it stopped, on any node, or is told why that cannot be.

use serde_json::{Value, json};
use tidewire::client::{ClientError, ResyncReason, Source, Start, SubscribeOptions};
use tidewire::cursor::Cursor;

use crate::support::cluster::{TestCluster, TestNode};
use crate::support::wire::Wire;
use crate::support::{eventually, within};

/// More than a ring of 1 MiB holds.
const PAST_THE_RING: i64 = 1_500;

#[tokio::test]
async fn a_client_resumes_on_another_node_without_a_gap() {
    let cluster = TestCluster::start(2).await;
    let mut client = cluster.node(0).client("orders").await;
    cluster.insert("orders", 1..=10).await;
    client.expect_keys(1..=10).await;
    let cursor = client.disconnect().await;
    cluster.insert("orders", 11..=20).await;
    let mut client = cluster.node(1).client_after("orders", cursor).await;
    client.expect_keys(11..=20).await;
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn a_client_resumes_after_each_event_it_may_have_stopped_at() {
    let cluster = TestCluster::start(1).await;
    let mut wire = cluster.node(0).wire().await;
    let mut cursors = vec![wire.subscribe("o", "orders").await["cursor"].clone()];
    for id in 1..=5 {
        cluster.insert("orders", id..=id).await;
        cursors.push(wire.find("events").await["cursor"].clone());
    }
    assert!(cursors.is_sorted_by_key(|cursor| cursor.as_str().unwrap().to_owned()));
    for (handled, cursor) in (0..).zip(&cursors) {
        let cursor: Cursor = cursor.as_str().unwrap().parse().unwrap();
        let mut client = cluster.node(0).client_after("orders", cursor).await;
        client.expect_keys(handled + 1..=5).await;
        client.expect_nothing_more(&cluster.pool).await;
    }
}

#[tokio::test]
async fn a_node_that_is_behind_the_cursor_waits_and_does_not_refuse() {
    let cluster = TestCluster::start(2).await;
    let leader = cluster.leader().await;
    let (ahead, behind) = (cluster.node(leader), cluster.node(1 - leader));
    // The node knows the key and the table, as it would of a client that was there before.
    behind.client("orders").await.disconnect().await;
    behind.proxy.stall();
    let mut client = ahead.client("orders").await;
    cluster.insert("orders", 1..=10).await;
    client.expect_keys(1..=10).await;
    let cursor = client.disconnect().await;
    assert!(behind.context().hub.edge().deliverable.seq < cursor.seq);
    let resuming = behind.client_after("orders", cursor);
    let mending = async {
        // The wish is there and waits: the node counts a connection that has not been answered.
        eventually("the client is connected", || {
            behind.context().connections.load(std::sync::atomic::Ordering::Relaxed) == 1
        })
        .await;
        behind.proxy.restore();
    };
    let (mut client, ()) = tokio::join!(resuming, mending);
    cluster.insert("orders", 11..=12).await;
    client.expect_keys([11, 12]).await;
}

#[tokio::test]
async fn what_is_in_memory_comes_from_memory_and_older_events_from_the_log() {
    let cluster = TestCluster::with(1, |settings| settings.ring_bytes = Some(1 << 20)).await;
    let node = cluster.node(0);
    let start = node.context().hub.edge().boundary;
    fill(&cluster, 1..=PAST_THE_RING).await;
    cluster.insert("orders", PAST_THE_RING + 1..=PAST_THE_RING + 1).await;
    let last = PAST_THE_RING + 1;
    node.reached(last as u64).await;
    assert!(node.context().hub.ring_base() > 10, "the ring must have let go of the beginning");

    let mut from_log = node.client_after("orders", start).await;
    assert_eq!(from_log.subscription.source(), Source::History);
    from_log.expect_keys(1..=last).await;
    from_log.caught_up().await;
    // And on, live.
    cluster.insert("orders", last + 1..=last + 1).await;
    from_log.expect_keys([last + 1]).await;

    let cursor = from_log.disconnect().await;
    cluster.insert("orders", last + 2..=last + 3).await;
    node.reached(last as u64 + 3).await;
    let mut from_memory = node.client_after("orders", cursor).await;
    assert_eq!(from_memory.subscription.source(), Source::Memory);
    from_memory.expect_keys(last + 2..=last + 3).await;
    let by_source = |source: &str| node.metrics().resumes_total.with_label_values(&[source]).get();
    assert_eq!((by_source("history"), by_source("memory")), (1, 1));
}

/// Rows that fill a ring of 1 MiB soon.
async fn fill(cluster: &TestCluster, ids: std::ops::RangeInclusive<i64>) {
    let (first, last) = (ids.start(), ids.end());
    let sql = "INSERT INTO orders (id, note) SELECT g, repeat('x', 1200)";
    let mut from = *first;
    while from <= *last {
        let through = (from + 499).min(*last);
        cluster.run(&format!("{sql} FROM generate_series({from}, {through}) g")).await;
        from = through + 1;
    }
}

#[tokio::test]
async fn a_filtered_history_is_replayed_without_what_does_not_match() {
    let cluster = TestCluster::with(1, |settings| settings.ring_bytes = Some(1 << 20)).await;
    let node = cluster.node(0);
    let start = node.context().hub.edge().boundary;
    fill(&cluster, 1..=PAST_THE_RING).await;
    node.reached(PAST_THE_RING as u64).await;
    let some = SubscribeOptions::tables(["orders"]).filter("id BETWEEN 990 AND 1010 OR id = 1").from(start);
    // Shorter than a heartbeat: nothing but the page itself may wake the session.
    let began = std::time::Instant::now();
    let mut client = node.client_of(some).await;
    client.expect_keys([1].into_iter().chain(990..=1010)).await;
    assert!(began.elapsed() < std::time::Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(client.caught_up().await, node.context().hub.edge().boundary);
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn a_cursor_that_is_no_good_is_answered_with_its_reason() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    cluster.insert("orders", 1..=20).await;
    node.reached(20).await;
    let newest = node.context().hub.edge().boundary;
    let at = |seq, check| Cursor { seq, check, ..newest }.to_string();
    for (cursor, reason) in [
        ("certainly not".to_owned(), ResyncReason::CursorInvalid),
        (String::new(), ResyncReason::CursorInvalid),
        ("x".repeat(10_000), ResyncReason::CursorInvalid),
        (Cursor { epoch: newest.epoch + 1, ..newest }.to_string(), ResyncReason::CursorInvalid),
        (at(1_000_000, newest.check), ResyncReason::CursorInvalid),
        (at(10, newest.check), ResyncReason::HistoryDiverged),
        (at(20, newest.check ^ 1), ResyncReason::HistoryDiverged),
    ] {
        let subscribe = SubscribeOptions::tables(["orders"]).from(Start::After(cursor.clone()));
        let resync = refused(node, subscribe).await;
        assert_eq!(resync.reason, reason, "{cursor}: {resync:?}");
        assert_eq!(resync.newest, Some(newest), "{cursor}");
        assert!(resync.oldest.is_some() && !resync.message.is_empty(), "{resync:?}");
    }
    // The id is free again, and the connection lives.
    let mut wire = node.wire().await;
    for _ in 0..2 {
        wire.say(json!({"type": "subscribe", "id": "o", "tables": ["orders"], "from": {"cursor": "bad"}})).await;
        let resync = wire.expect("resync_required").await;
        assert_eq!((&resync["id"], &resync["reason"]), (&json!("o"), &json!("cursor_invalid")));
    }
    let oldest = wire.subscribe("o", "orders").await;
    assert_eq!(oldest["cursor"], newest.to_string());
}

async fn refused(node: &TestNode, subscribe: SubscribeOptions) -> tidewire::client::Resync {
    let client = tidewire::client::Client::connect(node.connect_options()).await.unwrap();
    match within("an answer", client.subscribe(subscribe)).await {
        Err(ClientError::Resync(resync)) => *resync,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_oldest_position_lies_between_transactions_and_one_before_it_has_expired() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    let start = node.context().hub.edge().boundary;
    cluster.insert("orders", 1..=30).await;
    cluster.insert("orders", 31..=40).await;
    node.reached(40).await;
    let mut all = node.client_after("orders", node.context().hub.oldest().unwrap()).await;
    all.expect_keys(1..=40).await;

    // As retention does, only that it drops whole partitions: the beginning of the log goes, and a fresh node knows only
    // the rest. It begins inside a transaction.
    cluster.run("DELETE FROM tidewire.event_log WHERE seq <= 10").await;
    let mut cluster = cluster;
    cluster.stop(0).await;
    cluster.start_again(0).await;
    let node = cluster.node(0);
    let resync = refused(node, SubscribeOptions::tables(["orders"]).from(start)).await;
    assert_eq!(resync.reason, ResyncReason::CursorExpired);
    let oldest = resync.oldest.expect("there is an oldest");
    let mut client = node.client_after("orders", oldest).await;
    client.expect_keys(31..=40).await;
}

#[tokio::test]
async fn no_event_is_lost_while_subscribing_under_writers() {
    let cluster = TestCluster::start(2).await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (pool, stopped) = (cluster.pool.clone(), stop.clone());
    let writer = tokio::spawn(async move {
        let mut id = 0_i64;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            id += 1;
            sqlx::query("INSERT INTO orders (id) VALUES ($1)").bind(id).execute(&pool).await.unwrap();
        }
        id
    });
    // What commits after `subscribed` was sent cannot be missed: subscribers begin in the middle of the stream and must
    // see everything from their position on, whatever way it takes.
    let mut subscribers = Vec::new();
    for turn in 0..20 {
        let mut client = cluster.node(turn % 2).client("orders").await;
        let begun = client.subscription.position();
        client.events(5).await;
        let cursor = client.leave().await;
        let again = cluster.node((turn + 1) % 2).client_after("orders", begun).await;
        subscribers.push((begun, again));
        let after = cluster.node(turn % 2).client_after("orders", cursor).await;
        subscribers.push((cursor, after));
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let last = writer.await.unwrap();
    for (cursor, mut client) in subscribers {
        // One row, one transaction, one seq: the key of what follows on a position is known.
        client.expect_keys(cursor.seq as i64 + 1..=last).await;
        client.expect_nothing_more(&cluster.pool).await;
    }
}

#[tokio::test]
async fn a_reconnect_storm_is_served_without_asking_postgres_for_each() {
    const CLIENTS: usize = 50;
    let cluster = TestCluster::with(1, |settings| settings.ring_bytes = Some(1 << 20)).await;
    let node = cluster.node(0);
    let start = node.context().hub.edge().boundary;
    fill(&cluster, 1..=PAST_THE_RING).await;
    node.reached(PAST_THE_RING as u64).await;
    let recent = node.context().hub.edge().boundary;
    cluster.insert("orders", PAST_THE_RING + 1..=PAST_THE_RING + 10).await;
    node.reached(PAST_THE_RING as u64 + 10).await;
    let replays = || node.metrics().log_queries_total.with_label_values(&["replay"]).get();

    let before = replays();
    storm(node, CLIENTS, recent, PAST_THE_RING + 1..=PAST_THE_RING + 10).await;
    assert_eq!(replays() - before, 0, "memory serves what it has");

    let before = replays();
    storm(node, CLIENTS, start, 1..=5).await;
    let asked = replays() - before;
    // Each client alone would ask for two pages and for the id at its position.
    assert!(asked < 20, "{asked} queries for {CLIENTS} clients");
}

/// So many clients come back at once; they look at everything and are shown only the rows with these keys.
async fn storm(node: &TestNode, clients: usize, cursor: Cursor, keys: std::ops::RangeInclusive<i64>) {
    let expected: Vec<i64> = keys.clone().collect();
    let shown = format!("id BETWEEN {} AND {}", keys.start(), keys.end());
    let returning = (0..clients).map(async |_| {
        let mut wire = node.wire().await;
        let from = json!({"cursor": cursor.to_string()});
        wire.say(json!({"type": "subscribe", "id": "o", "tables": ["orders"], "where": shown, "from": from})).await;
        wire.expect("subscribed").await;
        let mut seen = Vec::new();
        loop {
            let message = wire.message().await;
            match message["type"].as_str() {
                Some("events") => {
                    let events = message["events"].as_array().unwrap();
                    seen.extend(events.iter().map(|event| event["key"]["id"].as_i64().unwrap()));
                }
                Some("caught_up") => break,
                _ => panic!("{message}"),
            }
        }
        assert_eq!(seen, expected);
    });
    futures_util::future::join_all(returning).await;
}

/// Rows that a slow reader has not read.
const BEHIND: i64 = 10_000;

/// A subscriber who has read nothing of [`BEHIND`] rows, most of which are in memory no more.
async fn behind_the_ring() -> (TestCluster, Wire) {
    let cluster = TestCluster::with(1, |settings| {
        settings.ring_bytes = Some(1 << 20);
        settings.slow_after_ms = Some(600_000);
    })
    .await;
    let node = cluster.node(0);
    let mut wire = node.wire().await;
    wire.subscribe("o", "orders").await;
    wire.expect("caught_up").await;
    // Nothing is read meanwhile: buffers of the sockets fill, then the position stays behind.
    fill(&cluster, 1..=BEHIND).await;
    node.reached(BEHIND as u64).await;
    eventually("the ring has let go of what the reader needs", || node.context().hub.ring_base() > 8_000).await;
    (cluster, wire)
}

#[tokio::test]
async fn a_slow_reader_gets_everything_though_memory_has_moved_on() {
    let (cluster, mut wire) = behind_the_ring().await;
    let mut next = 1;
    while next <= BEHIND {
        let message = wire.message().await;
        if message["type"] == "events" {
            for event in message["events"].as_array().unwrap() {
                assert_eq!(event["key"]["id"], json!(next));
                next += 1;
            }
        }
    }
    let fell_back = |to: &str| cluster.node(0).metrics().fallbacks_total.with_label_values(&[to]).get();
    assert!(fell_back("log") > 0);
}

/// Found in review: the page that was to be read was wholly gone, and the session asked for it without end.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_slow_reader_whose_position_has_left_the_log_is_told() {
    let (cluster, mut wire) = behind_the_ring().await;
    cluster.run("DELETE FROM tidewire.event_log WHERE seq <= 7000").await;
    let resync = wire.find("resync_required").await;
    assert_eq!(resync["reason"], "too_far_behind");
}

/// Found in review: between hearing of an epoch and reading on, a node called such a cursor one of another cluster.
#[tokio::test]
async fn a_cursor_is_waited_for_also_by_a_node_that_is_just_learning_of_a_new_epoch() {
    let cluster = TestCluster::start(2).await;
    let leader = cluster.leader().await;
    let (ahead, behind) = (cluster.node(leader), cluster.node(1 - leader));
    behind.client("orders").await.disconnect().await;
    behind.proxy.stall();
    let mut client = ahead.client("orders").await;
    cluster.insert("orders", 1..=10).await;
    client.expect_keys(1..=10).await;
    let cursor = client.disconnect().await;
    // As after a failover that has lost nothing.
    cluster
        .run(
            "INSERT INTO tidewire.epochs (epoch, system_identifier, timeline, start_seq, reason)
             SELECT 2, system_identifier, timeline, 10, 'test' FROM tidewire.epochs;
             INSERT INTO tidewire.terms (term, epoch, node, pid, feed_pid, feed_key)
             SELECT term + 1, 2, node, pid, feed_pid, feed_key FROM tidewire.terms ORDER BY term DESC LIMIT 1",
        )
        .await;
    let resuming = behind.client_after("orders", cursor);
    let mending = async {
        eventually("the client is connected", || {
            behind.context().connections.load(std::sync::atomic::Ordering::Relaxed) == 1
        })
        .await;
        behind.proxy.restore();
    };
    let (mut client, ()) = tokio::join!(resuming, mending);
    cluster.insert("orders", 11..=12).await;
    client.expect_keys([11, 12]).await;
}

#[tokio::test]
async fn a_client_goes_on_by_itself_when_its_node_dies() {
    let mut cluster = TestCluster::start(2).await;
    let mut client = cluster.client("orders").await;
    cluster.insert("orders", 1..=5).await;
    client.expect_keys(1..=5).await;
    let serving = cluster.serving(&client);
    let dying = cluster.take_out(serving);
    dying.abort().await;
    cluster.insert("orders", 6..=10).await;
    client.expect_keys(6..=10).await;
    assert_eq!(client.resumed().len(), 1);
    assert_eq!(cluster.serving(&client), 1 - serving);
    client.expect_nothing_more(&cluster.pool).await;
}

#[tokio::test]
async fn progress_moves_the_position_of_a_subscription_that_sees_nothing() {
    let cluster = TestCluster::with(1, |settings| settings.progress_ms = Some(100)).await;
    let mut wire = cluster.node(0).wire().await;
    let begun = wire.subscribe("o", "event:nothing").await["cursor"].clone();
    wire.expect("caught_up").await;
    cluster.insert("orders", 1..=5).await;
    let cursor: Value = loop {
        let progress = wire.expect("progress").await;
        assert_eq!(progress["ids"], json!(["o"]));
        if progress["cursor"] != begun {
            break progress["cursor"].clone();
        }
    };
    let cursor: Cursor = cursor.as_str().unwrap().parse().unwrap();
    assert_eq!(cursor.seq, 5);
    let mut client = cluster.node(0).client_after("orders", cursor).await;
    client.expect_nothing_more(&cluster.pool).await;
}

/// Found in review: positions inside a transaction were told, and a session that had read all there was of one never
/// gave its thread back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_starts_inside_an_open_transaction_longer_than_its_ring_gives_it_whole() {
    const OPEN: i64 = 12_000;
    let mut cluster = TestCluster::start(1).await;
    cluster.insert("orders", 1..=1).await;
    cluster.node(0).reached(1).await;
    cluster.stop(0).await;
    // A leader that has relayed the beginning of a large transaction, and is no more.
    let part = |from: i64, to: i64, tx_end: bool| {
        format!(
            "INSERT INTO tidewire.event_log (seq, xid, tx_end, omitted, event_id, table_name, operation, key_hash, row_key,
                 after_data, created_at, relayed_at)
             SELECT 1 + i, '900'::xid8, {tx_end}, false, gen_random_uuid(), 'public.orders', 'INSERT', 0,
                    json_build_object('id', i), json_build_object('id', i, 'status', 'new'), now(), now()
             FROM generate_series({from}, {to}) i"
        )
    };
    cluster.run(&part(1, OPEN, false)).await;
    cluster.set_relay(0, false);
    cluster.start_again(0).await;
    let node = cluster.node(0);
    let edge = node.context().hub.edge();
    assert_eq!(edge.boundary.seq, 1, "the newest end of a transaction");
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(node.client("orders").await);
    }
    cluster.run(&part(OPEN + 1, OPEN + 1, true)).await;
    for client in &mut clients {
        client.expect_keys(1..=OPEN + 1).await;
    }
}

/// Found in review: a page of the log was bounded in rows only, and a page of large ones was gigabytes.
#[tokio::test]
async fn rows_of_megabytes_are_resumed_from_the_log_a_few_at_a_time() {
    const ROWS: i64 = 30;
    let cluster = TestCluster::with(1, |settings| settings.ring_bytes = Some(1 << 20)).await;
    let node = cluster.node(0);
    let start = node.context().hub.edge().boundary;
    for id in 1..=ROWS {
        let note = "(SELECT string_agg(md5(g::text), '') FROM generate_series(1, 32000) g)";
        cluster.run(&format!("INSERT INTO orders (id, note) VALUES ({id}, {note})")).await;
    }
    node.reached(ROWS as u64).await;
    for after in 0..ROWS as u64 {
        let (pages, generation) = (&node.context().pages, node.context().hub.edge().generation);
        let page = pages.following(after, ROWS as u64, generation).await.unwrap();
        assert_eq!(page.first().map(|event| event.seq), Some(after + 1));
        assert!(page.len() < 3, "{} rows of 1 MB", page.len());
    }
    let mut client = node.client_after("orders", start).await;
    client.expect_keys(1..=ROWS).await;
}

/// Found in review: such a node met another event at its place with every reading, and never delivered anything again.
#[tokio::test]
async fn clients_of_a_log_that_was_replaced_without_a_word_are_told_and_the_node_goes_on() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    let mut wire = node.wire().await;
    wire.subscribe("o", "orders").await;
    cluster.insert("orders", 1..=5).await;
    node.reached(5).await;
    // As a snapshot of the disk that was restored and has grown past what the node knows.
    cluster.run("UPDATE tidewire.event_log SET event_id = gen_random_uuid()").await;
    let resync = wire.find("resync_required").await;
    assert_eq!(resync["reason"], "history_diverged");
    let mut client = node.client("orders").await;
    cluster.insert("orders", 6..=7).await;
    client.expect_keys(6..=7).await;
}
