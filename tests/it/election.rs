//! Who leads: the real election, several candidates in one process. Two never both append, a killed or silent leader is
//! followed, one that resigns hands over, and a commit that may not be durable is not told to anyone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgListener;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use tidewire::feed::chunk::{Header, Kind};
use tidewire::lifecycle::Lifecycle;
use tidewire::log::retention::{create_partition, partitions, trim};
use tidewire::postgres::Database;
use tidewire::postgres::listen::Wakeups;
use tidewire::relay::{LEADER_LOCK, Relay, RelayOptions, election};
use tidewire::telemetry::metrics::Metrics;
use tokio::sync::watch;

use crate::capture::{run, strings};
use crate::support::DEADLINE;
use crate::support::cluster::init_tracing;
use crate::support::postgres::{database, own_server, pool};
use crate::support::proxy::Proxy;
use crate::support::relay::{Term, Writer, emit, faults};

const LEASE: Duration = Duration::from_secs(10);
/// More than a batch's worth of any candidate here.
const BATCH: u32 = 20;

/// A node's relay without the node.
struct Candidate {
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
    task: tokio::task::JoinHandle<()>,
}

impl Candidate {
    /// `relay_url` is where it leads; `url` where it listens.
    async fn start(name: &str, relay_url: &str, url: &str, lease: Duration) -> Self {
        let (lifecycle, metrics) = (Lifecycle::new(), Arc::new(Metrics::new().unwrap()));
        let wakeups = Arc::new(Wakeups::default());
        let mut listener = PgListener::connect(url).await.unwrap();
        listener.listen_all(["tidewire_wake", "tidewire_leader"]).await.unwrap();
        wakeups.set_listening(true);
        let heard = Arc::clone(&wakeups);
        tokio::spawn(async move {
            while let Ok(notification) = listener.recv().await {
                match notification.channel() {
                    "tidewire_wake" => heard.outbox.notify_one(),
                    _ => heard.leadership.notify_one(),
                }
            }
        });
        let relay = Relay {
            options: RelayOptions {
                node: name.to_owned(),
                batch: BATCH,
                event_bytes: 4 << 20,
                lease,
                park_after: Duration::from_millis(30),
                retention: Duration::from_secs(3600),
                trace: false,
            },
            database: Arc::new(Database::new(relay_url, None, name, 2).unwrap()),
            wakeups,
            known: watch::channel(None).1,
            channels: watch::channel(Arc::new(HashMap::new())).1,
            metrics: Arc::clone(&metrics),
        };
        let task = tokio::spawn(election::run(relay, lifecycle.clone()));
        Self { lifecycle, metrics, task }
    }

    fn leads(&self) -> bool {
        self.metrics.leader.get() == 1
    }

    async fn stop(self) {
        self.lifecycle.stop();
        tokio::time::timeout(DEADLINE, self.task).await.expect("it resigns").unwrap();
    }
}

async fn until(what: &str, mut fact: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(DEADLINE, async {
        while !fact().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

async fn number(pool: &PgPool, sql: &str) -> i64 {
    sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(pool).await.unwrap()
}

async fn events(pool: &PgPool) -> i64 {
    number(pool, "SELECT count(*) FROM tidewire.event_log").await
}

async fn terms(pool: &PgPool) -> i64 {
    number(pool, "SELECT count(*) FROM tidewire.terms").await
}

/// Kills the backend that holds the leader's lock and has begun its term, and waits until it is gone; true when there was
/// one.
async fn kill_leader(pool: &PgPool) -> bool {
    number(
        pool,
        &format!(
            "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid, 10000)) FROM pg_locks
             WHERE locktype = 'advisory' AND granted AND (classid::bigint << 32 | objid::bigint) = {LEADER_LOCK}
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND pid = (SELECT pid FROM tidewire.terms ORDER BY term DESC LIMIT 1)"
        ),
    )
    .await
        > 0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_leaders_are_followed_and_no_two_append() {
    let database = database().await;
    let mut candidates = Vec::new();
    for name in ["a", "b", "c"] {
        candidates.push(Candidate::start(name, &database.url, &database.url, LEASE).await);
    }
    let mut writer = Writer::connect(&database.url).await;
    let mut killed = 0;
    for round in 0..120_i64 {
        writer.run(&format!("BEGIN; {} {} COMMIT", emit("x"), emit("y"))).await;
        if round % 20 == 10 {
            until("a leader to kill", async || kill_leader(&database.pool).await).await;
            killed += 1;
        }
    }
    until("everything is relayed", async || events(&database.pool).await == 240).await;
    let books =
        "SELECT concat_ws(' ', term, node, pid, acquired_at, released_at, reason) FROM tidewire.terms ORDER BY term";
    assert!(terms(&database.pool).await > killed, "{killed} killed: {:#?}", strings(&database.pool, books).await);
    until("one thinks that it leads", async || candidates.iter().filter(|candidate| candidate.leads()).count() == 1)
        .await;
    for candidate in candidates {
        candidate.stop().await;
    }
    assert_eq!(faults(&database.pool).await, [""; 0]);
    let unfinished =
        "SELECT format('%s %s', term, reason) FROM tidewire.terms WHERE released_at IS NULL OR reason IS NULL";
    assert_eq!(strings(&database.pool, unfinished).await, [""; 0], "every term is closed in the books");
}

/// Two primaries that were each promoted from the same standby, and never heard of each other.
#[tokio::test]
async fn two_histories_that_part_at_one_place_have_epochs_of_different_numbers() {
    let database = database().await;
    let newest = "SELECT max(epoch)::bigint FROM tidewire.epochs";
    let mut given = Vec::new();
    for name in ["first", "one", "other"] {
        let candidate = Candidate::start(name, &database.url, &database.url, LEASE).await;
        until("it leads", async || candidate.leads()).await;
        candidate.stop().await;
        given.push(number(&database.pool, newest).await);
        let began = number(&database.pool, "SELECT extract(epoch FROM max(at))::bigint FROM tidewire.epochs").await;
        run(
            &database.pool,
            "DELETE FROM tidewire.epochs WHERE epoch > 1; UPDATE tidewire.epochs SET timeline = '000000FF'",
        )
        .await;
        let clock = "SELECT extract(epoch FROM clock_timestamp())::bigint";
        until("the second is over", async || number(&database.pool, clock).await > began + 1).await;
    }
    assert_eq!(given[0], 1);
    assert!(given[1] > 1 && given[2] > given[1], "{given:?}");
}

#[tokio::test]
async fn a_leader_that_was_silent_for_longer_than_its_lease_writes_nothing_when_it_wakes() {
    let database = database().await;
    let mut writer = Writer::connect(&database.url).await;
    for inside in [false, true] {
        let mut stale = Term::begin_with(&database.url, 100, Duration::from_millis(500)).await.unwrap();
        writer.emit("before").await;
        stale.drain().await;
        let pid = stale.pid().await;
        if inside {
            sqlx::raw_sql("BEGIN").execute(&mut stale.connection).await.unwrap();
            assert_eq!(stale.step().await.unwrap().events.len(), 0);
            writer.emit("inside").await;
            stale.step().await.unwrap();
        } else {
            writer.emit("outside").await;
        }
        let alive = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}");
        until("Postgres ends the silent session", async || number(&database.pool, &alive).await == 0).await;
        let mut next = Term::begin(&database.url, 100).await.unwrap();
        next.drain().await;
        let reached = next.newest;
        writer.emit("for the next").await;
        stale.step().await.expect_err("its session is over");
        assert_eq!(number(&database.pool, "SELECT max(seq) FROM tidewire.event_log").await, reached.cast_signed());
        next.drain().await;
        next.connection.close().await.unwrap();
    }
    assert_eq!(events(&database.pool).await, 6);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stalled_network_held_back_from_an_old_leader_changes_nothing() {
    let database = database().await;
    let mut through = url::Url::parse(&database.url).unwrap();
    let target = through.socket_addrs(|| Some(5432)).unwrap()[0];
    let proxy = Proxy::start(target).await;
    through.set_ip_host(std::net::Ipv4Addr::LOCALHOST.into()).unwrap();
    through.set_port(Some(proxy.port())).unwrap();
    let lease = Duration::from_secs(1);
    let stalled = Candidate::start("stalled", through.as_str(), &database.url, lease).await;
    until("the first leads", async || stalled.leads()).await;
    let other = Candidate::start("other", &database.url, &database.url, lease).await;
    let mut writer = Writer::connect(&database.url).await;
    writer.emit("one").await;
    until("one is relayed", async || events(&database.pool).await == 1).await;
    proxy.stall();
    // Whatever the stalled one still sends lies in the proxy.
    writer.emit("two").await;
    until("the other leads", async || other.leads()).await;
    until("two is relayed", async || events(&database.pool).await == 2).await;
    proxy.restore();
    for _ in 0..30 {
        writer.emit("more").await;
    }
    until("all is relayed", async || events(&database.pool).await == 32).await;
    until("the old leader has noticed", async || !stalled.leads()).await;
    assert!(other.leads());
    other.stop().await;
    until("it may lead again", async || stalled.leads()).await;
    stalled.stop().await;
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_resigns_hands_over_with_its_books_closed() {
    let database = database().await;
    let first = Candidate::start("first", &database.url, &database.url, LEASE).await;
    until("the first leads", async || first.leads()).await;
    let second = Candidate::start("second", &database.url, &database.url, LEASE).await;
    until("the first is parked", async || first.metrics.relay_parked.get() == 1).await;
    let mut writer = Writer::connect(&database.url).await;
    writer.emit("for the first").await;
    until("it is relayed", async || events(&database.pool).await == 1).await;
    first.stop().await;
    until("the second leads", async || second.leads()).await;
    writer.run(&format!("SET session_replication_role = replica; {}", emit("for the second"))).await;
    until("it is relayed", async || events(&database.pool).await == 2).await;
    second.stop().await;
    assert_eq!(
        strings(&database.pool, "SELECT concat_ws(' ', term, node, reason, feed_key) FROM tidewire.terms ORDER BY 1")
            .await,
        ["1 first resigned", "2 second resigned"]
    );
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_resigns_also_inside_a_large_transaction_that_a_foreign_lock_holds_up() {
    let database = database().await;
    let (mut writer, mut locker) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    let many = r#"INSERT INTO tidewire.outbox (table_name, operation, after_data)
                  SELECT 'event:t', 'EVENT', json_build_object('n', g) FROM generate_series(1, 100) g"#;
    writer.run(many).await;
    locker.run("BEGIN; SELECT FROM tidewire.outbox WHERE after_data ->> 'n' = '50' FOR SHARE").await;
    let first = Candidate::start("first", &database.url, &database.url, LEASE).await;
    // Of 8 rows, 20 and 20: the next has the one that is locked.
    until("three parts are relayed", async || events(&database.pool).await == 48).await;
    first.stop().await;
    let second = Candidate::start("second", &database.url, &database.url, LEASE).await;
    until("the second leads", async || second.leads()).await;
    locker.run("COMMIT").await;
    until("the rest follows", async || events(&database.pool).await == 100).await;
    second.stop().await;
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_may_not_be_durable_is_announced_to_nobody_and_ends_the_term() {
    init_tracing();
    let server = own_server().await;
    let url = server.url("postgres");
    let pool = pool(&url).await;
    tidewire::postgres::migrate::migrate(&pool.connect_options()).await.unwrap();
    let mut feed = PgListener::connect(&url).await.unwrap();
    feed.listen_all(["tidewire_feed", "done"]).await.unwrap();
    let leader = Candidate::start("leader", &url, &url, LEASE).await;
    until("it leads", async || leader.leads()).await;
    let mut writer = Writer::connect(&url).await;
    // The writers here do not wait for standbys.
    writer.run("SET synchronous_commit = local").await;
    writer.emit("durable").await;
    until("it is relayed", async || events(&pool).await == 1).await;
    run(&pool, "ALTER SYSTEM SET synchronous_standby_names = 'missing'").await;
    run(&pool, "SELECT pg_reload_conf()").await;
    until("the server expects a standby", async || {
        strings(&pool, "SELECT current_setting('synchronous_standby_names')").await == ["missing"]
    })
    .await;
    writer.emit("in doubt").await;
    let waits = "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity
                 WHERE wait_event = 'SyncRep' AND query LIKE 'WITH w AS%'";
    until("the claim waits for the standby", async || number(&pool, waits).await == 1).await;
    until("the term ends", async || leader.metrics.relay_errors_total.get() >= 1).await;
    assert_eq!(events(&pool).await, 2, "it is visible");

    run(&pool, "ALTER SYSTEM RESET synchronous_standby_names").await;
    run(&pool, "SELECT pg_reload_conf()").await;
    until("it leads again", async || leader.leads()).await;
    writer.emit("last").await;
    until("all is relayed", async || events(&pool).await == 3).await;
    leader.stop().await;
    writer.run("NOTIFY done").await;
    let mut announced = Vec::new();
    loop {
        let notification = feed.recv().await.unwrap();
        if notification.channel() == "done" {
            break;
        }
        let (header, _, _) = Header::parse(notification.payload()).unwrap();
        if header.kind != Kind::Heartbeat || header.term == 1 {
            announced.push((header.term, header.last));
        }
    }
    assert!(announced.iter().all(|(term, last)| *term > 1 || *last < 2), "{announced:?}");
    assert!(announced.iter().any(|(term, last)| *term > 1 && *last == 3), "{announced:?}");
    assert_eq!(faults(&pool).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_makes_partitions_before_it_needs_them() {
    let database = database().await;
    run(&database.pool, "DROP TABLE tidewire.event_log_1").await;
    let mut connection = PgConnection::connect(&database.url).await.unwrap();
    create_partition(&mut connection, 1, 30).await.unwrap();
    create_partition(&mut connection, 1, 30).await.unwrap();
    let leader = Candidate::start("leader", &database.url, &database.url, LEASE).await;
    let mut writer = Writer::connect(&database.url).await;
    for _ in 0..50 {
        writer.emit("x").await;
    }
    until("all is relayed", async || events(&database.pool).await == 50).await;
    leader.stop().await;
    let names: Vec<_> =
        partitions(&mut connection).await.unwrap().into_iter().map(|one| (one.name, one.from)).collect();
    assert_eq!(names, [("event_log_1".to_owned(), 1), ("event_log_31".to_owned(), 31)]);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test]
async fn retention_drops_whole_old_partitions_and_never_the_newest_events() {
    let database = database().await;
    run(&database.pool, "DROP TABLE tidewire.event_log_1").await;
    let mut connection = PgConnection::connect(&database.url).await.unwrap();
    for from in [1, 11, 21, 31, 41] {
        create_partition(&mut connection, from, 10).await.unwrap();
    }
    // The first twenty are two hours old, the rest half an hour; nothing in the last partition.
    run(
        &database.pool,
        "INSERT INTO tidewire.event_log (seq, xid, tx_end, event_id, table_name, operation, created_at, relayed_at)
         SELECT g, '5', true, gen_random_uuid(), 'event:t', 'EVENT', now(), now() - CASE WHEN g <= 20 THEN interval '2 hours' ELSE interval '30 minutes' END
         FROM generate_series(1, 35) g",
    )
    .await;
    let hour = Duration::from_secs(3600);
    assert_eq!(trim(&mut connection, hour * 3, None).await.unwrap(), 0);
    assert_eq!(trim(&mut connection, hour, Some(9)).await.unwrap(), 0, "a reader still needs the tenth");
    assert_eq!(trim(&mut connection, hour, Some(10)).await.unwrap(), 1);
    assert_eq!(trim(&mut connection, hour, None).await.unwrap(), 1);
    assert_eq!(trim(&mut connection, hour, None).await.unwrap(), 0);
    // A table that a former leader detached and did not drop.
    run(&database.pool, "CREATE TABLE tidewire.event_log_1 (LIKE tidewire.event_log)").await;
    assert_eq!(trim(&mut connection, Duration::ZERO, None).await.unwrap(), 1);
    let left: Vec<_> = partitions(&mut connection).await.unwrap().into_iter().map(|one| one.from).collect();
    assert_eq!(left, [31, 41], "the newest events stay whatever their age");
    assert_eq!(
        strings(&database.pool, "SELECT to_regclass('tidewire.event_log_1')::text IS NULL || ''").await,
        ["true"]
    );
    assert_eq!(number(&database.pool, "SELECT min(seq) FROM tidewire.event_log").await, 31);
}
