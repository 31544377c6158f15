//! The storm: thousands of clients lose their node at once, or all of them all nodes, and come back.
//!
//! A process has about 20,000 files, so there are two balancers and two processes of clients (F19 of the design); the
//! balancers reach the nodes without links in between. What each client got is not checked here, that is what runs are
//! for: this measures how soon everybody is back, and what it costs Postgres.

pub mod clients;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use sqlx::Executor;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use self::clients::{Crowd, TICK, WEIGHTS};
use crate::cluster::{Cluster, ClusterOptions, HaProxy};
use crate::run::Watcher;
use crate::workload;

/// Balancers, each with a process of clients.
const PAIRS: u32 = 2;
/// From the first client to the last one that has caught up.
const ARRIVAL: Duration = Duration::from_secs(180);
/// Between the storms: what is late from one must not count in the next.
const CALM: Duration = Duration::from_secs(5);
/// The storm is over, whoever is still away.
const LIMIT: Duration = Duration::from_secs(90);
const LOOK: Duration = Duration::from_millis(250);
/// A restarted node is ready within this.
const READY: Duration = Duration::from_secs(30);
/// Between two written rows: a hundred a second.
const ROW_EVERY: Duration = Duration::from_millis(10);
/// One row in so many is for everybody.
const TICK_EVERY: u32 = 100;
/// Queries of the log for clients that resume.
const REPLAY: &str = "tidewire_log_queries_total{purpose=\"replay\"}";

/// What to measure.
#[derive(Clone, Debug)]
pub struct StormOptions {
    /// Data and logs.
    pub folder: PathBuf,
    /// `tidewire`.
    pub binary: PathBuf,
    /// Over all processes.
    pub clients: u32,
    /// Of each kind.
    pub storms: u32,
}

/// Who loses what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// SIGKILL of one of three nodes: a third of the clients.
    NodeKilled,
    /// Every socket of every node, at the balancers.
    EverySocket,
}

impl Kind {
    /// For people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::NodeKilled => "one of three nodes killed",
            Self::EverySocket => "every socket cut",
        }
    }

    /// 99 % have caught up within this.
    #[must_use]
    pub const fn goal(self) -> Duration {
        match self {
            Self::NodeKilled => Duration::from_secs(5),
            Self::EverySocket => Duration::from_secs(15),
        }
    }
}

/// One storm.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Storm {
    /// What happened.
    pub kind: Kind,
    /// Clients that lost their connection.
    pub lost: u64,
    /// Of those, who had not caught up when it was called over.
    pub away: u64,
    /// From the cut to caught up, milliseconds: half of them, 99 %, the last.
    pub p50_ms: u64,
    /// See `p50_ms`.
    pub p99_ms: u64,
    /// See `p50_ms`.
    pub max_ms: u64,
    /// Queries of the log, all nodes.
    pub log_queries: u64,
    /// Resident memory of all nodes before and at most, bytes.
    pub memory_bytes: (u64, u64),
}

impl Storm {
    /// Whether the design's figures were reached.
    #[must_use]
    pub fn reached(&self) -> bool {
        let in_time = self.p99_ms <= u64::try_from(self.kind.goal().as_millis()).unwrap_or(u64::MAX);
        // At most one query for a thousand resumes.
        self.lost > 0 && in_time && self.log_queries * 1_000 <= self.lost.max(1_000)
    }
}

/// Starts a cluster and its clients, and lets the storms come one after the other.
///
/// # Errors
/// The cluster or the clients do not come up; that says nothing about storms.
pub async fn storms(options: &StormOptions, watcher: &impl Watcher) -> anyhow::Result<Vec<Storm>> {
    watcher.step("starting Postgres, the nodes and the balancers");
    let cluster = Cluster::start(ClusterOptions {
        folder: options.folder.clone(),
        binary: options.binary.clone(),
        nodes: 3,
        seed: 1,
        env: Vec::new(),
        small_disks: false,
    })
    .await
    .context("the cluster does not start")?;
    let result = on_cluster(options, &cluster, watcher).await;
    cluster.stop().await.context("the cluster does not stop")?;
    result
}

async fn on_cluster(options: &StormOptions, cluster: &Cluster, watcher: &impl Watcher) -> anyhow::Result<Vec<Storm>> {
    let url = cluster.primary().borrow().clone();
    workload::prepare(&url).await.context("the tables cannot be made")?;
    let writing = AbortOnDropHandle::new(tokio::spawn(write(url)));
    let mut balancers = Vec::new();
    let mut crowds = Vec::new();
    for n in 0..PAIRS {
        let balancer = cluster.another_balancer(n).await?;
        crowds.push(Crowd::start(&balancer.url(), cluster.api_key(), options.clients / PAIRS)?);
        balancers.push(balancer);
    }
    watcher.step(&format!("{} clients arrive", options.clients));
    arrived(&mut crowds, u64::from(options.clients / PAIRS * PAIRS)).await?;
    let mut storms = Vec::new();
    for n in 0..options.storms {
        for kind in [Kind::NodeKilled, Kind::EverySocket] {
            sleep(CALM).await;
            ensure!(!writing.is_finished(), "the writer has ended: a silent system proves nothing");
            let victim = usize::try_from(n).unwrap_or(0) % cluster.nodes().len();
            let storm = storm(kind, victim, cluster, &balancers, &mut crowds).await?;
            watcher.step(&format!(
                "{}: {} clients lost, p50 {} ms, p99 {} ms, last {} ms, {} away, {} log queries",
                kind.text(),
                storm.lost,
                storm.p50_ms,
                storm.p99_ms,
                storm.max_ms,
                storm.away,
                storm.log_queries
            ));
            storms.push(storm);
        }
    }
    for balancer in balancers {
        balancer.stop().await?;
    }
    Ok(storms)
}

async fn arrived(crowds: &mut [Crowd], all: u64) -> anyhow::Result<()> {
    let until = Instant::now() + ARRIVAL;
    loop {
        let mut there = 0;
        for crowd in &mut *crowds {
            there += crowd.report().await?.there;
        }
        if there == all {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{there} of {all} clients have arrived within {ARRIVAL:?}");
        sleep(LOOK).await;
    }
}

async fn storm(
    kind: Kind,
    victim: usize,
    cluster: &Cluster,
    balancers: &[HaProxy],
    crowds: &mut [Crowd],
) -> anyhow::Result<Storm> {
    for crowd in &mut *crowds {
        crowd.mark().await?;
    }
    let queries = replays(cluster).await;
    let memory = memory(cluster);
    let cut = micros_now();
    match kind {
        Kind::NodeKilled => ensure!(cluster.nodes()[victim].kill(), "the node does not run"),
        Kind::EverySocket => {
            for balancer in balancers {
                for node in cluster.nodes() {
                    balancer.shut_sessions(node.name()).await?;
                }
            }
        }
    }
    let until = Instant::now() + LIMIT;
    let mut most = memory;
    let mut before = 0;
    let (lost, back) = loop {
        sleep(LOOK).await;
        most = most.max(self::memory(cluster));
        let (mut lost, mut back) = (0, Vec::new());
        for crowd in &mut *crowds {
            let report = crowd.report().await?;
            lost += report.lost;
            back.extend(report.back_at_us);
        }
        // Nobody has been lost since the last look, and all who were are back.
        let over = lost > 0 && lost == before && back.len() as u64 == lost;
        if over || Instant::now() >= until {
            break (lost, back);
        }
        before = lost;
    };
    let after = replays(cluster).await;
    let log_queries = after.iter().map(|(node, count)| count - queries.get(node).unwrap_or(&0.0)).sum::<f64>();
    if kind == Kind::NodeKilled {
        let node = &cluster.nodes()[victim];
        node.wait_exit(READY).await?;
        node.start()?;
        node.wait_ready(READY).await?;
        cluster.wait_healthy(READY).await?;
    }
    let mut waits = Histogram::<u64>::new(3)?;
    for at in &back {
        waits.record(at.saturating_sub(cut) / 1_000)?;
    }
    // Who is still away waits at least that long.
    let away = lost - back.len() as u64;
    if away > 0 {
        waits.record_n(u64::try_from(LIMIT.as_millis())?, away)?;
    }
    Ok(Storm {
        kind,
        lost,
        away,
        p50_ms: waits.value_at_quantile(0.5),
        p99_ms: waits.value_at_quantile(0.99),
        max_ms: waits.max(),
        log_queries: log_queries.max(0.0) as u64,
        memory_bytes: (memory, most),
    })
}

/// Rows that few listen to, and now and then one for everybody.
async fn write(url: String) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(1);
    let mut connection = workload::connect(&url).await?;
    let mut due = tokio::time::interval(ROW_EVERY);
    for n in 0_u32.. {
        due.tick().await;
        let w = if n % TICK_EVERY == 0 { TICK } else { rng.random_range(0..WEIGHTS) };
        let statement = format!(
            "INSERT INTO public.notes (id, val, w) VALUES ({}, 'storm-{n}', {w})
             ON CONFLICT (id) DO UPDATE SET prev = notes.val, val = excluded.val, w = excluded.w",
            n % 1_000
        );
        connection.execute(sqlx::AssertSqlSafe(statement)).await?;
    }
    Ok(())
}

/// Of each node that answers.
async fn replays(cluster: &Cluster) -> BTreeMap<String, f64> {
    let mut counts = BTreeMap::new();
    for node in cluster.nodes() {
        if let Ok(count) = node.metric(REPLAY).await {
            counts.insert(node.name().to_owned(), count);
        }
    }
    counts
}

fn memory(cluster: &Cluster) -> u64 {
    cluster.nodes().iter().filter_map(crate::cluster::Node::rss_bytes).sum()
}

/// The clock that all processes of the machine share.
fn micros_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
