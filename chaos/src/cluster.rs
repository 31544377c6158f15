//! The cluster under test, all of it child processes: a Postgres primary and its standby, the nodes, HAProxy.
//!
//! Clients → client link → HAProxy → front link → node → database link → Postgres. Every arrow that a network could cut
//! is a [`link`]; writers and the harness itself reach Postgres past them.

mod haproxy;
pub mod link;
mod node;
pub mod packet_filter;
mod postgres;
mod process;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use sqlx::PgConnection;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

pub use self::haproxy::HaProxy;
use self::link::Link;
pub use self::node::Node;
pub use self::postgres::{Postgres, Server, Stop, find_binaries};
use self::postgres::{free_port, loopback};
pub use self::process::{Listed, PROCESSES, Process, started};
use self::process::{Table, output};

/// From the start of the nodes to all of them ready.
const READY: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);
/// From a signal to an exit when the cluster ends.
const STOP: Duration = Duration::from_secs(5);
/// The advisory lock that makes a relay the leader (docs/ARCHITECTURE.md).
const LEADER_LOCK: i64 = 8_388_068_008_253_452_901;

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Data and logs.
    pub folder: PathBuf,
    /// `tidewire`.
    pub binary: PathBuf,
    /// How many; HAProxy's configuration has three.
    pub nodes: u16,
    /// Of the links.
    pub seed: u64,
    /// For all nodes.
    pub env: Vec<(String, String)>,
    /// Tables and WAL on small disks.
    pub small_disks: bool,
}

/// Everything that was started. Dropping it kills what still lives.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    haproxy: HaProxy,
    client_link: Link,
    postgres: Postgres,
    api_key: String,
    binary: PathBuf,
    folder: PathBuf,
    table: Arc<Table>,
}

impl Cluster {
    /// Starts everything and waits until it is whole.
    ///
    /// # Errors
    /// A part does not come up; its log is quoted.
    pub async fn start(options: ClusterOptions) -> anyhow::Result<Arc<Self>> {
        ensure!((1..=3).contains(&options.nodes), "deploy/haproxy/haproxy.cfg knows one to three nodes");
        let table = Table::new(&options.folder);
        let postgres =
            Postgres::start(&options.folder.join("postgres"), &table, options.seed, options.small_disks).await?;
        let owner = format!("postgres://{}@127.0.0.1:{}/app", postgres::OWNER, postgres.server(0).port());
        let mut migrate = Command::new(&options.binary);
        migrate.args(["migrate", "--database-url", &owner]);
        output(migrate).await.context("`tidewire migrate`")?;
        let mut create = Command::new(&options.binary);
        create.args(["keys", "create", "--name", "chaos", "--all", "--max-connections", "50000", "--json"]);
        create.env("TIDEWIRE_DATABASE_URL", &owner);
        let api_key = key_of(&output(create).await.context("`tidewire keys create`")?)?;
        let mut nodes = Vec::new();
        for index in 0..usize::from(options.nodes) {
            nodes.push(node(&options, index, &postgres, &table).await?);
        }
        // HAProxy's configuration names three; those that are not there are down from the beginning.
        let mut fronts: Vec<String> = nodes.iter().map(|node| node.front_link().address().to_string()).collect();
        while fronts.len() < 3 {
            fronts.push(loopback(free_port()?).to_string());
        }
        let haproxy = balancer("haproxy", &options.folder, &table, fronts)?;
        let client_link = Link::start("clients", loopback(haproxy.port()), options.seed ^ 0xc11e).await?;
        let ClusterOptions { binary, folder, .. } = options;
        let cluster = Arc::new(Self { nodes, haproxy, client_link, postgres, api_key, binary, folder, table });
        cluster.nodes.iter().try_for_each(Node::start)?;
        for node in &cluster.nodes {
            node.wait_ready(READY).await?;
        }
        cluster.haproxy.start().await?;
        cluster.wait_healthy(READY).await?;
        Ok(cluster)
    }

    /// Ends everything.
    ///
    /// # Errors
    /// A part does not end.
    pub async fn stop(&self) -> anyhow::Result<()> {
        for node in &self.nodes {
            if node.kill() {
                node.wait_exit(STOP).await?;
            }
        }
        self.haproxy.stop().await?;
        self.postgres.shut_down().await
    }

    /// Where clients connect.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.client_link.address())
    }

    /// May read everything.
    #[must_use]
    pub fn api_key(&self) -> &str {
        &self.api_key
    }

    /// All of them, running or not.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// One of them.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name() == name)
    }

    /// The pair of servers.
    #[must_use]
    pub const fn postgres(&self) -> &Postgres {
        &self.postgres
    }

    /// The balancer.
    #[must_use]
    pub const fn haproxy(&self) -> &HaProxy {
        &self.haproxy
    }

    /// Between the clients and the balancer.
    #[must_use]
    pub const fn client_link(&self) -> &Link {
        &self.client_link
    }

    /// The primary's URL as the superuser, past all links; changes at a failover.
    #[must_use]
    pub fn primary(&self) -> watch::Receiver<String> {
        self.postgres.primary()
    }

    /// A superuser's connection to the primary.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn admin(&self) -> anyhow::Result<PgConnection> {
        let url = self.primary().borrow().clone();
        postgres::connect(&url).await
    }

    /// Runs the server's own program, such as `keys revoke`, against the primary as its owner.
    ///
    /// # Errors
    /// The program fails.
    pub async fn tidewire(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let port = self.postgres.server(self.postgres.current()).port();
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .env("TIDEWIRE_DATABASE_URL", format!("postgres://{}@127.0.0.1:{port}/app", postgres::OWNER));
        output(command).await
    }

    /// The node that holds the leader's lock now, by what Postgres says.
    ///
    /// # Errors
    /// The primary does not answer.
    pub async fn leader(&self) -> anyhow::Result<Option<usize>> {
        let mut connection = self.admin().await?;
        let name: Option<String> = sqlx::query_scalar(
            "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid)
             WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
               AND ((l.classid::bigint << 32) | l.objid::bigint) = $1",
        )
        .bind(LEADER_LOCK)
        .fetch_optional(&mut connection)
        .await?;
        Ok(name.and_then(|name| {
            let name = name.strip_prefix("tidewire ")?.to_owned();
            self.nodes.iter().position(|node| node.name() == name)
        }))
    }

    /// One more balancer, which reaches the nodes without links; it ends when it is dropped.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn another_balancer(&self, n: u32) -> anyhow::Result<HaProxy> {
        let nodes = self.nodes.iter().map(|node| loopback(node.port).to_string()).collect();
        let balancer = balancer(&format!("haproxy-{n}"), &self.folder, &self.table, nodes)?;
        balancer.start().await?;
        Ok(balancer)
    }

    /// Waits until the primary answers, a leader relays, every node takes clients and the balancer sees it.
    ///
    /// # Errors
    /// It is not so in time; says what is missing.
    pub async fn wait_healthy(&self, within: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + within;
        loop {
            let missing = match self.missing().await {
                Ok(None) => return Ok(()),
                Ok(Some(missing)) => missing,
                Err(error) => format!("{error:#}"),
            };
            if Instant::now() >= until {
                bail!("not whole within {within:?}: {missing}");
            }
            sleep(LOOK).await;
        }
    }

    async fn missing(&self) -> anyhow::Result<Option<String>> {
        if self.leader().await?.is_none() {
            return Ok(Some("no node leads".into()));
        }
        for node in &self.nodes {
            if !node.ready().await {
                return Ok(Some(format!("{} is not ready{}", node.name(), node.process.last_words())));
            }
        }
        let servers = self.haproxy.servers().await?;
        let down = servers.iter().find(|(name, state)| self.node(name).is_some() && !state.starts_with("UP"));
        Ok(down.map(|(name, state)| format!("the balancer sees {name} as {state}")))
    }
}

async fn node(options: &ClusterOptions, index: usize, postgres: &Postgres, table: &Arc<Table>) -> anyhow::Result<Node> {
    let name = format!("node{}", index + 1);
    let port = free_port()?;
    let seed = options.seed.wrapping_add(index as u64 * 10);
    let a = Link::start(&format!("{name}-postgres-0"), loopback(postgres.server(0).port()), seed).await?;
    let b = Link::start(&format!("{name}-postgres-1"), loopback(postgres.server(1).port()), seed + 1).await?;
    let front = Link::start(&format!("balancer-{name}"), loopback(port), seed + 2).await?;
    let process = Process::new(&name, options.folder.join(format!("{name}.log")), Arc::clone(table));
    Ok(Node::new(name, index, port, options.binary.clone(), options.env.clone(), process, [a, b], front))
}

fn balancer(name: &str, folder: &Path, table: &Arc<Table>, nodes: Vec<String>) -> anyhow::Result<HaProxy> {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/haproxy/haproxy.cfg");
    let process = Process::new(name, folder.join(format!("{name}.log")), Arc::clone(table));
    HaProxy::new(process, config, folder.join(format!("{name}.sock")), nodes)
}

/// The key in the JSON that `keys create` prints.
fn key_of(text: &str) -> anyhow::Result<String> {
    let value: serde_json::Value = serde_json::from_str(text).context("`tidewire keys create --json`")?;
    let key = value.get("key").and_then(serde_json::Value::as_str).context("`tidewire keys create` shows no key")?;
    Ok(key.to_owned())
}
