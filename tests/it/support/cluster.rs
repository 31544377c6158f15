//! A cluster in this process: real nodes on a database of their own, each behind a breakable proxy.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Once};
use std::time::Duration;

use sqlx::{AssertSqlSafe, PgPool};
use tidewire::auth::key::ApiKey;
use tidewire::auth::scope::Scopes;
use tidewire::auth::store;
use tidewire::client::{ConnectOptions, SubscribeOptions};
use tidewire::config::Settings;
use tidewire::cursor::Cursor;
use tidewire::http::health::unready;
use tidewire::node::Node;
use tidewire::session::Context;
use tidewire::telemetry::metrics::Metrics;
use tidewire::telemetry::tracing::NoticeLayer;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use super::client::TestClient;
use super::http::{Answer, ask};
use super::postgres::{TestDatabase, database, pool};
use super::proxy::Proxy;
use super::wire::Wire;
use super::{answered, eventually, within};

/// Between two rows of a writer.
const WRITE_INTERVAL: Duration = Duration::from_millis(3);
/// Before a writer tries again what failed.
const WRITE_RETRY: Duration = Duration::from_millis(20);
/// Connections that the cluster's key may have.
const KEY_CONNECTIONS: u32 = 100_000;

/// Nodes, and what they stand on. Everything ends with the value.
pub(crate) struct TestCluster {
    nodes: Vec<TestNode>,
    /// Straight to the database, past every proxy.
    pub(crate) pool: PgPool,
    /// A key with every scope.
    pub(crate) key: String,
    // Last: the nodes must have let go of it.
    _database: Option<TestDatabase>,
}

/// One node.
pub(crate) struct TestNode {
    pub(crate) name: String,
    /// Before Postgres.
    pub(crate) proxy: Proxy,
    settings: Settings,
    node: Option<Node>,
    key: String,
}

impl TestCluster {
    /// `count` nodes, ready, one of them leading, with the tracked table `public.orders`.
    pub(crate) async fn start(count: usize) -> Self {
        Self::with(count, |_| {}).await
    }

    /// Like [`TestCluster::start`], with other settings.
    pub(crate) async fn with(count: usize, edit: impl Fn(&mut Settings)) -> Self {
        let database = database().await;
        let (pool, url) = (database.pool.clone(), database.url.clone());
        Self::build(count, edit, pool, &url, Some(database)).await
    }

    /// Nodes on a database that the test owns, which need not be migrated.
    pub(crate) async fn over(url: &str, count: usize, edit: impl Fn(&mut Settings)) -> Self {
        let pool = pool(url).await;
        tidewire::postgres::migrate::migrate(&pool.connect_options()).await.expect("migrate");
        Self::build(count, edit, pool, url, None).await
    }

    async fn build(
        count: usize,
        edit: impl Fn(&mut Settings),
        pool: PgPool,
        url: &str,
        database: Option<TestDatabase>,
    ) -> Self {
        init_tracing();
        sqlx::raw_sql(
            "CREATE TABLE public.orders (id bigint PRIMARY KEY, status text NOT NULL DEFAULT 'new', total numeric, note text);
             SELECT tidewire.track('public.orders')",
        )
        .execute(&pool)
        .await
        .unwrap();
        let key = store::create_key(&pool.clone().into(), "test", &Scopes::all(KEY_CONNECTIONS), None).await.unwrap();
        let key = key.expose().to_owned();
        let target = address_of(url).await;
        let mut nodes = Vec::with_capacity(count);
        for index in 0..count {
            let proxy = Proxy::start(target).await;
            let name = format!("n{index}");
            let mut settings = settings(&name, through(url, &proxy));
            edit(&mut settings);
            let node = start_node(&settings).await;
            // Where clients find it, also after a restart.
            settings.listen = Some(node.address());
            let node = Some(node);
            nodes.push(TestNode { name, proxy, settings, node, key: key.clone() });
        }
        let cluster = Self { nodes, pool, key, _database: database };
        for node in &cluster.nodes {
            node.ready().await;
        }
        if cluster.nodes.iter().any(|node| node.settings.relay != Some(false)) {
            cluster.leader().await;
        }
        cluster
    }

    pub(crate) fn node(&self, index: usize) -> &TestNode {
        &self.nodes[index]
    }

    /// Whether a node may lead when it is started again.
    pub(crate) fn set_relay(&mut self, index: usize, relay: bool) {
        self.nodes[index].settings.relay = Some(relay);
    }

    /// The node that leads.
    pub(crate) async fn leader(&self) -> usize {
        let leading = |node: &TestNode| node.node.is_some() && node.metrics().leader.get() == 1;
        answered("a leader", async || self.nodes.iter().position(leading)).await
    }

    /// Terms so far.
    pub(crate) async fn terms(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM tidewire.terms").fetch_one(&self.pool).await.unwrap()
    }

    /// Kills the backend that holds the leader's lock; waits until another term has begun.
    pub(crate) async fn kill_leader_backend(&self) {
        self.leader().await;
        let before = self.terms().await;
        let killed: bool =
            sqlx::query_scalar("SELECT pg_terminate_backend(pid) FROM tidewire.terms ORDER BY term DESC LIMIT 1")
                .fetch_one(&self.pool)
                .await
                .unwrap();
        assert!(killed, "the leader's backend is there");
        answered("another term", async || (self.terms().await > before).then_some(())).await;
    }

    /// Inserts rows with these ids, in one transaction.
    pub(crate) async fn insert(&self, table: &str, ids: RangeInclusive<i64>) {
        self.run(&format!("INSERT INTO {table} (id) SELECT generate_series({}, {})", ids.start(), ids.end())).await;
    }

    /// Inserts rows with these ids, each in a transaction of its own.
    pub(crate) async fn insert_each(&self, table: &str, ids: RangeInclusive<i64>) {
        for id in ids {
            self.run(&format!("INSERT INTO {table} (id) VALUES ({id})")).await;
        }
    }

    /// Runs SQL; several statements are one transaction.
    pub(crate) async fn run(&self, sql: &str) {
        let shown = sql.to_owned();
        sqlx::raw_sql(AssertSqlSafe(shown.clone()))
            .execute(&self.pool)
            .await
            .unwrap_or_else(|error| panic!("{shown}: {error}"));
    }

    /// Runs SQL that gives one text.
    pub(crate) async fn text(&self, sql: &str) -> String {
        sqlx::query_scalar(AssertSqlSafe(sql.to_owned()))
            .fetch_one(&self.pool)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// A key with these scopes.
    pub(crate) async fn key(&self, scopes: serde_json::Value) -> ApiKey {
        let scopes: Scopes = serde_json::from_value(scopes).unwrap();
        store::create_key(&self.pool.clone().into(), "test", &scopes, None).await.unwrap()
    }

    /// A client that may use any node.
    pub(crate) fn connect_options(&self) -> ConnectOptions {
        let mut urls = self.nodes.iter().map(TestNode::url);
        let first = ConnectOptions::new(urls.next().expect("a node"));
        urls.fold(first, ConnectOptions::or).key(self.key.clone()).unlimited_attempts()
    }

    /// A subscriber that may use any node.
    pub(crate) async fn client(&self, table: &str) -> TestClient {
        TestClient::connect(self.connect_options(), SubscribeOptions::tables([table])).await
    }

    /// The node that serves a client.
    pub(crate) fn serving(&self, client: &TestClient) -> usize {
        let name = client.node().expect("the client is connected");
        self.nodes.iter().position(|node| node.name == name).expect("a node of this cluster")
    }

    /// Drains a node, as SIGTERM does.
    pub(crate) async fn stop(&mut self, index: usize) {
        let node = self.nodes[index].node.take().expect("the node runs");
        within("the drain", node.stop()).await;
    }

    /// Takes a node out of the cluster, to be stopped while the test looks on; see [`TestCluster::start_again`].
    pub(crate) fn take_out(&mut self, index: usize) -> Node {
        self.nodes[index].node.take().expect("the node runs")
    }

    /// Starts a stopped node again, on its port; it need not become ready.
    pub(crate) async fn start_unready(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        assert!(node.node.is_none(), "the node runs");
        node.node = Some(start_node(&node.settings).await);
    }

    /// Starts a stopped node again, on its port, and waits until it is ready.
    pub(crate) async fn start_again(&mut self, index: usize) {
        self.start_unready(index).await;
        self.nodes[index].ready().await;
    }

    /// Begins to insert rows into orders, one transaction each, with ids from 1 on; whatever becomes of Postgres, each
    /// is inserted once.
    pub(crate) fn writer(&self) -> Writer {
        let (pool, stop) = (self.pool.clone(), CancellationToken::new());
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut id = 0;
            while !stopped.is_cancelled() {
                id += 1;
                // After an error nobody knows whether it was committed; the conflict does.
                let sql = "INSERT INTO orders (id) VALUES ($1) ON CONFLICT DO NOTHING";
                while sqlx::query(sql).bind(id).execute(&pool).await.is_err() {
                    tokio::time::sleep(WRITE_RETRY).await;
                }
                tokio::time::sleep(WRITE_INTERVAL).await;
            }
            id
        });
        Writer { stop, task }
    }
}

/// Writes until it is stopped.
pub(crate) struct Writer {
    stop: CancellationToken,
    task: JoinHandle<i64>,
}

impl Writer {
    /// Stops; gives the last id, which is also how many rows there are.
    pub(crate) async fn stop(self) -> i64 {
        self.stop.cancel();
        within("the writer's end", self.task).await.expect("the writer ends")
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        for node in self.nodes.iter().filter_map(|node| node.node.as_ref()) {
            node.context().lifecycle.abort();
        }
    }
}

impl TestNode {
    fn running(&self) -> &Node {
        self.node.as_ref().expect("the node runs")
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        self.running().context()
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.context().metrics
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.running().address()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    pub(crate) fn is_ready(&self) -> bool {
        unready(self.context()).is_none()
    }

    /// Waits until it takes new connections.
    pub(crate) async fn ready(&self) {
        eventually("the node is ready", || self.is_ready()).await;
    }

    /// Waits until it can deliver up to `seq`.
    pub(crate) async fn reached(&self, seq: u64) {
        eventually("the node has reached the log's end", || self.context().hub.edge().deliverable.seq >= seq).await;
    }

    /// Waits until the relay, which must be on this node, is parked.
    pub(crate) async fn parked(&self) {
        eventually("the relay is parked", || self.metrics().relay_parked.get() == 1).await;
    }

    /// How to connect to this node alone.
    pub(crate) fn connect_options(&self) -> ConnectOptions {
        ConnectOptions::new(self.url()).key(self.key.clone())
    }

    /// A subscriber to a table, from now.
    pub(crate) async fn client(&self, table: &str) -> TestClient {
        self.client_of(SubscribeOptions::tables([table])).await
    }

    /// A subscriber to a table, after a position.
    pub(crate) async fn client_after(&self, table: &str, cursor: Cursor) -> TestClient {
        self.client_of(SubscribeOptions::tables([table]).from(cursor)).await
    }

    /// A subscriber to anything.
    pub(crate) async fn client_of(&self, subscribe: SubscribeOptions) -> TestClient {
        TestClient::connect(self.connect_options(), subscribe).await
    }

    /// A raw connection with the cluster's key; its `welcome` has been heard.
    pub(crate) async fn wire(&self) -> Wire {
        self.wire_of(&self.key).await
    }

    /// A raw connection with any key; its `welcome` has been heard.
    pub(crate) async fn wire_of(&self, key: &str) -> Wire {
        let bearer = format!("Bearer {key}");
        let mut wire = Wire::connect(&self.ws_url(), &[("authorization", &bearer)]).await.expect("upgraded");
        let welcome = wire.message().await;
        assert_eq!(welcome["type"], "welcome", "{welcome}");
        wire
    }

    pub(crate) fn ws_url(&self) -> String {
        format!("ws://{}/v1/ws", self.address())
    }

    /// An HTTP request without credentials.
    pub(crate) async fn get(&self, target: &str) -> Answer {
        ask("GET", self.address(), target, &[]).await
    }
}

/// Times short enough for tests, long enough for a machine under load.
fn settings(name: &str, database_url: String) -> Settings {
    Settings {
        database_url: Some(database_url),
        node: Some(name.to_owned()),
        listen: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        park_after_ms: Some(50),
        // Longer than any test waits: what only a timer would wake is a failure, not a delay.
        heartbeat_ms: Some(3_600_000),
        progress_ms: Some(600_000),
        drain_window_ms: Some(500),
        drain_deadline_ms: Some(3_000),
        // Every test runs its own cluster: shared buffers are not all that is shared.
        pool_size: Some(4),
        ..Settings::default()
    }
}

async fn start_node(settings: &Settings) -> Node {
    let config = settings.clone().resolve().expect("a good configuration");
    Node::start(&config).await.expect("the node starts")
}

async fn address_of(url: &str) -> SocketAddr {
    let url = url::Url::parse(url).unwrap();
    let host = (url.host_str().expect("Postgres over TCP").to_owned(), url.port().unwrap_or(5432));
    tokio::net::lookup_host(host).await.unwrap().next().expect("an address")
}

fn through(url: &str, proxy: &Proxy) -> String {
    let mut url = url::Url::parse(url).unwrap();
    url.set_host(Some("127.0.0.1")).unwrap();
    url.set_port(Some(proxy.port())).unwrap();
    url.into()
}

/// Once for all tests of the process: the relay needs the notices; `TIDEWIRE_TEST_LOG` (such as `tidewire=debug`) shows what nodes say.
pub(crate) fn init_tracing() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let notices = NoticeLayer.with_filter(filter_fn(|meta| meta.target() == "sqlx::postgres::notice"));
        let shown = std::env::var("TIDEWIRE_TEST_LOG").ok().map(|filter| {
            let filter = tracing_subscriber::EnvFilter::new(filter);
            tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_filter(filter)
        });
        tracing_subscriber::registry().with(shown).with(notices).init();
    });
}
