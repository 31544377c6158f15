//! One run: a cluster, a workload and the plan's faults, recorded; then judged and measured from the record alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use crate::checker::Violation;
use crate::cluster::packet_filter::PacketFilter;
use crate::cluster::{Cluster, ClusterOptions};
use crate::faults::{self, FaultEvent, Scene};
use crate::history::{Line, Micros, Reader, Record, Recorder, Run, VERSION};
use crate::plan::Plan;
use crate::preflight::{self, Abilities};
use crate::report::RunSummary;
use crate::workload::{self, Workload, truth};
use crate::{checker, figures};

/// From the start of the clients to the first event in a handler.
const FIRST_DELIVERY: Duration = Duration::from_secs(30);
/// From the last heal to a cluster that is whole.
const HEALTHY: Duration = Duration::from_secs(90);
/// From the writers' end to every client at the log's head.
const DRAIN: Duration = Duration::from_secs(60);
/// Between two looks at the nodes' memory.
const LOOK: Duration = Duration::from_secs(1);
/// What the nodes run with beside the defaults. Progress often enough that a client of a rare filter soon says where it is;
/// a slow consumer given up soon enough for a run of two minutes.
const SETTINGS: [(&str, &str); 2] = [("TIDEWIRE_PROGRESS_MS", "1000"), ("TIDEWIRE_SLOW_AFTER_MS", "8000")];
/// A run's history, in its folder.
const HISTORY: &str = "history.jsonl";

/// What to run, on what.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Everything of the run goes here: data of Postgres, logs, history. Made if it is not there.
    pub folder: PathBuf,
    /// The server.
    pub binary: PathBuf,
    /// Writers, clients, faults.
    pub plan: Plan,
    /// The mutant that the server is, if it must fail.
    pub mutant: Option<String>,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Judged and measured.
    pub summary: RunSummary,
    /// For `check`.
    pub history: PathBuf,
}

/// What a run tells while it goes.
pub trait Watcher: Sync {
    /// A step of the run began.
    fn step(&self, text: &str);
    /// A fault began or ended.
    fn fault(&self, event: &FaultEvent);
    /// About once a second.
    fn progress(&self, elapsed: Duration, committed: u64, delivered: u64);
}

/// Runs the plan and judges it.
///
/// # Errors
/// The run could not be carried out: that says nothing about the server. What the server broke is in the summary.
pub async fn run(options: &RunOptions, abilities: &Abilities, watcher: &impl Watcher) -> anyhow::Result<Outcome> {
    refuse_leftovers(&options.folder)?;
    fs::create_dir_all(&options.folder)
        .with_context(|| format!("cannot make the folder {}", options.folder.display()))?;
    watcher.step("starting Postgres, its standby, the nodes and the balancer");
    let cluster = Cluster::start(cluster_options(options, abilities)).await.context("the cluster does not start")?;
    let history = options.folder.join(HISTORY);
    let result = recorded(options, abilities, &cluster, &history, watcher).await;
    cluster.stop().await.context("the cluster does not stop")?;
    let (node_bytes, lost) = result?;
    watcher.step("checking");
    let path = history.clone();
    let mut summary = tokio::task::spawn_blocking(move || judge(&path)).await??;
    summary.node_bytes = node_bytes;
    if let Some(text) = lost {
        let at = Micros::try_from(Duration::from_millis(options.plan.duration_ms).as_micros()).unwrap_or(Micros::MAX);
        summary.violations.push(Violation { rule: "whole", at, text });
    }
    Ok(Outcome { summary, history })
}

fn refuse_leftovers(folder: &Path) -> anyhow::Result<()> {
    let left = preflight::leftovers(folder)?;
    if left.is_empty() {
        return Ok(());
    }
    let named: Vec<String> = left.iter().map(ToString::to_string).collect();
    bail!(
        "processes of an earlier run in {} are still alive: {}. Nothing was touched; end exactly these with `chaos clean {}`, or take another --folder",
        folder.display(),
        named.join(", "),
        folder.display()
    )
}

fn cluster_options(options: &RunOptions, abilities: &Abilities) -> ClusterOptions {
    let plan = &options.plan;
    let full = plan.faults.iter().any(|fault| fault.class == "F15" && abilities.allows("F15", &fault.variant).is_ok());
    ClusterOptions {
        folder: options.folder.clone(),
        binary: options.binary.clone(),
        nodes: plan.nodes,
        seed: plan.seed,
        env: settings(plan.seed, options.mutant.as_deref()),
        small_disks: full,
    }
}

/// What the nodes run with. Sizes are part of what a seed gives: half of the runs have the defaults, the others small
/// batches (transactions in parts, windows that end inside one) or a small ring (resumes and slow clients read the log). A
/// mutant gets both, for its wrong turn may need either.
fn settings(seed: u64, mutant: Option<&str>) -> Vec<(String, String)> {
    let (batch, ring) = (("TIDEWIRE_RELAY_BATCH", "64"), ("TIDEWIRE_RING_BYTES", "1048576"));
    let sizes = match (mutant, (seed >> 8) % 4) {
        (Some(_), _) => vec![batch, ring],
        (None, 2) => vec![batch],
        (None, 3) => vec![ring],
        (None, _) => Vec::new(),
    };
    let named = mutant.map(|mutant| ("TIDEWIRE_MUTANT", mutant));
    SETTINGS.into_iter().chain(sizes).chain(named).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

async fn recorded(
    options: &RunOptions,
    abilities: &Abilities,
    cluster: &Arc<Cluster>,
    history: &Path,
    watcher: &impl Watcher,
) -> anyhow::Result<((u64, u64), Option<String>)> {
    let plan = &options.plan;
    let primary = cluster.primary();
    let url = primary.borrow().clone();
    workload::prepare(&url).await.context("the tables of the workload cannot be made")?;
    let recorder = Recorder::create(history)?;
    recorder.record(Record::Run(Run {
        version: VERSION,
        seed: plan.seed,
        server: env!("CARGO_PKG_VERSION").into(),
        mutant: options.mutant.clone(),
        wall: recorder.wall(),
        plan: serde_json::to_value(plan)?,
    }));
    watcher.step("starting writers and clients");
    let key = cluster.api_key().to_owned();
    let workload =
        Workload::start(&plan.workload, recorder.clone(), cluster.url(), key, primary).await.context("the workload")?;
    first_delivery(&workload).await?;
    let memory = Memory::watch(cluster);
    let scene = Scene {
        cluster: Arc::clone(cluster),
        workload: Arc::clone(&workload),
        recorder: recorder.clone(),
        abilities: abilities.clone(),
        filter: abilities.allows("F8", "loss").is_ok().then(PacketFilter::new).transpose()?,
    };
    let began = Instant::now();
    let ends = began + Duration::from_millis(plan.duration_ms);
    let faults = async {
        let lost = faults::inject(&scene, plan, |event| watcher.fault(event)).await;
        if lost.is_none() {
            sleep_until(ends).await;
        }
        lost
    };
    let mut lost = tokio::select! {
        lost = faults => lost,
        () = tell(&workload, began, watcher) => None,
    };
    watcher.step("healing and draining");
    // A cluster that does not come back is the worst that can be found: what it did until then is judged all the same.
    if let Err(error) = cluster.wait_healthy(HEALTHY).await {
        let text = format!("the cluster did not become whole again after the last fault: {error:#}");
        watcher.step(&text);
        lost.get_or_insert(text);
    } else if let Some(text) = &lost {
        watcher.step(text);
    }
    let drained = workload.drain(DRAIN).await;
    let node_bytes = memory.seen();
    let url = cluster.primary().borrow().clone();
    truth::record(&url, &recorder, workload.wants()).await.context("the truth cannot be read from Postgres")?;
    workload.stop().await;
    recorder.finish()?;
    if !drained.behind.is_empty() {
        watcher.step(&format!("{} subscriptions did not reach the log's head", drained.behind.len()));
    }
    Ok((node_bytes, lost))
}

async fn first_delivery(workload: &Workload) -> anyhow::Result<()> {
    let until = Instant::now() + FIRST_DELIVERY;
    while workload.delivered() == 0 {
        ensure!(
            Instant::now() < until,
            "no client saw an event within {FIRST_DELIVERY:?} of a start without any fault; see the nodes' logs"
        );
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn tell(workload: &Workload, began: Instant, watcher: &impl Watcher) {
    loop {
        sleep(LOOK).await;
        watcher.progress(began.elapsed(), workload.committed(), workload.delivered());
    }
}

/// Memory of all nodes together, looked at once a second.
struct Memory {
    first: Arc<AtomicU64>,
    most: Arc<AtomicU64>,
    _task: AbortOnDropHandle<()>,
}

impl Memory {
    fn watch(cluster: &Arc<Cluster>) -> Self {
        let (first, most) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (cluster, begin, peak) = (Arc::clone(cluster), Arc::clone(&first), Arc::clone(&most));
        let task = tokio::spawn(async move {
            loop {
                let bytes = cluster.nodes().iter().filter_map(crate::cluster::Node::rss_bytes).sum();
                let _ = begin.compare_exchange(0, bytes, Ordering::Relaxed, Ordering::Relaxed);
                peak.fetch_max(bytes, Ordering::Relaxed);
                sleep(LOOK).await;
            }
        });
        Self { first, most, _task: AbortOnDropHandle::new(task) }
    }

    fn seen(&self) -> (u64, u64) {
        (self.first.load(Ordering::Relaxed), self.most.load(Ordering::Relaxed))
    }
}

/// Judges and measures a history.
///
/// # Errors
/// It cannot be read, was cut short or is of another version.
pub fn judge(path: &Path) -> anyhow::Result<RunSummary> {
    let mut run = None;
    let lines = Reader::open(path)?.inspect(|line| {
        if let Ok(Line(_, Record::Run(first))) = line {
            run = Some(first.clone());
        }
    });
    let verdict = checker::check(lines)?;
    let figures = figures::measure(Reader::open(path)?)?;
    let run = run.with_context(|| format!("{} does not begin with a run", path.display()))?;
    let failpoints = run.plan.get("failpoints").and_then(serde_json::Value::as_bool).unwrap_or(false);
    Ok(RunSummary {
        seed: run.seed,
        mutant: run.mutant,
        failpoints,
        violations: verdict.violations,
        late: verdict.late,
        vacuous: verdict.vacuous,
        counts: verdict.counts,
        figures,
        node_bytes: (0, 0),
    })
}

/// Rules that were broken, with how often.
#[must_use]
pub fn rules(summary: &RunSummary) -> BTreeMap<&str, usize> {
    let mut rules = BTreeMap::new();
    for violation in &summary.violations {
        *rules.entry(violation.rule).or_default() += 1;
    }
    rules
}
