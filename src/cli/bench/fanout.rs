//! One node, many subscribers of the same rows: how many deliveries a second, and what one costs the node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use sqlx::AssertSqlSafe;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::cluster::Cluster;
use super::load::emit;
use super::report::{Goal, Report, latencies, quantile_ms, record};
use super::{Common, database, listeners, now_us};

const AGGREGATE: &str = "bench_fanout";
const WARM_UP: Duration = Duration::from_secs(3);
/// A subscriber's reads: frames of a batched run are tens of kilobytes, those of a single one are not. (The WebSocket
/// library clears the buffer before each read, so a large one costs.)
const BATCHED_READ_BYTES: usize = 64 * 1024;
const SINGLE_READ_BYTES: usize = 4 * 1024;
/// Writers of single rows.
const SINGLE_WRITERS: u32 = 8;
/// Histograms, so that subscribers on different threads seldom wait for each other.
const SHARDS: usize = 16;

#[derive(Args, Debug)]
pub(super) struct FanoutArgs {
    /// Subscribers of one node
    #[arg(long, default_value_t = 500)]
    subscribers: usize,
    /// Bytes of a row
    #[arg(long, default_value_t = 300)]
    bytes: usize,
    /// Rows of a transaction, batched
    #[arg(long, default_value_t = 20)]
    rows: usize,
    /// How many rows the writer may be ahead of the slowest subscriber, batched
    #[arg(long, default_value_t = 400)]
    ahead: usize,
    /// Single-row transactions a second, single
    #[arg(long, default_value_t = 300)]
    rate: u32,
    /// Only one of the two
    #[arg(long)]
    only: Option<Kind>,
    /// Length of a run, seconds
    #[arg(long, default_value_t = 15)]
    seconds: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// As many rows as go, in transactions of several
    Batched,
    /// Single rows at a fixed rate
    Single,
}

/// What the subscribers share.
struct Shared {
    subscribers: usize,
    rows: usize,
    deliveries: AtomicU64,
    measuring: AtomicBool,
    latencies: Vec<Mutex<Histogram<u64>>>,
    /// How many subscribers have handled the n-th transaction, modulo its length.
    handled: Vec<AtomicUsize>,
    /// One permit for each transaction that the writer may begin.
    room: Semaphore,
}

pub(super) async fn run(args: &FanoutArgs, common: &Common, cluster: &Cluster) -> anyhow::Result<Report> {
    let mut report = Report::new("fanout");
    for kind in [Kind::Batched, Kind::Single] {
        if args.only.is_none_or(|only| only == kind) {
            measure(args, kind, common, cluster, &mut report).await?;
        }
    }
    report.note(format!(
        "{} subscribers of one node, rows of {} B, in this process beside the node and Postgres; deliveries are counted \
         by the client library's frames",
        args.subscribers, args.bytes
    ));
    Ok(report)
}

async fn measure(
    args: &FanoutArgs,
    kind: Kind,
    common: &Common,
    cluster: &Cluster,
    report: &mut Report,
) -> anyhow::Result<()> {
    let window = (args.ahead / args.rows).max(1);
    let shared = Arc::new(Shared {
        subscribers: args.subscribers,
        rows: if kind == Kind::Batched { args.rows } else { 1 },
        deliveries: AtomicU64::new(0),
        measuring: AtomicBool::new(false),
        latencies: (0..SHARDS).map(|_| latencies().map(Mutex::new)).collect::<anyhow::Result<_>>()?,
        handled: (0..window * 2).map(|_| AtomicUsize::new(0)).collect(),
        room: Semaphore::new(window),
    });
    let node = &cluster.nodes[0];
    let urls = [node.url.clone()];
    let table = format!("event:{AGGREGATE}");
    let read_bytes = if kind == Kind::Batched { BATCHED_READ_BYTES } else { SINGLE_READ_BYTES };
    let subscribers = listeners::connect(cluster, &urls, args.subscribers, &table, read_bytes).await?;
    let mut tasks = listeners::read(subscribers, |number| listener(shared.clone(), number, kind));
    let writer = async {
        match kind {
            Kind::Batched => write_batches(args, &shared, &cluster.database_url).await,
            Kind::Single => write_singles(args, &cluster.database_url).await,
        }
    };
    let (mut rates, mut costs, mut p50, mut p99) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let sample = async {
        for _ in 0..common.runs {
            tokio::time::sleep(WARM_UP).await;
            let run = sample(args, &shared, cluster.process(&node.name)).await?;
            rates.push(run.deliveries / run.seconds);
            costs.extend(run.cpu_us);
            p50.push(quantile_ms(&run.latencies, 0.5));
            p99.push(quantile_ms(&run.latencies, 0.99));
        }
        anyhow::Ok(())
    };
    let spinner = super::spinner(format!("fan-out, {kind:?}"));
    tokio::select! {
        sampled = sample => sampled?,
        error = listeners::trouble(&mut tasks) => return Err(error),
        Err(error) = writer => return Err(error),
    }
    spinner.finish_and_clear();
    stop(tasks).await;
    match kind {
        Kind::Batched => {
            report.figure("batched: deliveries", "/s", Some(Goal::AtLeast(1_000_000.0)), rates);
            report.figure("batched: node's CPU each", "µs", None, costs);
            report.figure("batched: p99", "ms", None, p99);
        }
        Kind::Single => {
            // A delivery of each row to each subscriber is all there is; one in a hundred is lost to the edges of a run.
            let all = f64::from(args.rate) * f64::from(u32::try_from(args.subscribers)?);
            report.figure("single: deliveries", "/s", Some(Goal::AtLeast(all * 0.99)), rates);
            report.figure("single: node's CPU each", "µs", Some(Goal::AtMost(8.0)), costs);
            report.figure("single: p50", "ms", None, p50);
            report.figure("single: p99", "ms", Some(Goal::AtMost(20.0)), p99);
        }
    }
    Ok(())
}

/// What one subscriber does with each frame.
fn listener(shared: Arc<Shared>, number: usize, kind: Kind) -> impl FnMut(&crate::client::Frame) + Send + 'static {
    let mut rows = 0usize;
    move |frame| {
        let before = rows / shared.rows;
        if kind == Kind::Single || number == 0 {
            // All of them where it is asked for; batched, one subscriber stands for the rest.
            let now = now_us();
            let measuring = shared.measuring.load(Ordering::Relaxed);
            let mut latencies = shared.latencies[number % SHARDS].lock();
            for at in listeners::written_at(frame) {
                rows += 1;
                if measuring {
                    record(&mut latencies, now - at);
                }
            }
        } else {
            rows += listeners::written(frame);
        }
        for transaction in before..rows / shared.rows {
            shared.handle(transaction);
        }
    }
}

impl Shared {
    /// A subscriber has all rows of the transaction; the last one to have them lets the writer begin another.
    fn handle(&self, transaction: usize) {
        self.deliveries.fetch_add(u64::try_from(self.rows).unwrap_or_default(), Ordering::Relaxed);
        let handled = &self.handled[transaction % self.handled.len()];
        if handled.fetch_add(1, Ordering::AcqRel) + 1 == self.subscribers {
            handled.store(0, Ordering::Release);
            self.room.add_permits(1);
        }
    }
}

/// As many transactions as the slowest subscriber follows.
async fn write_batches(args: &FanoutArgs, shared: &Shared, database_url: &str) -> anyhow::Result<()> {
    let mut connection = database::connect(database_url).await?;
    let sql = format!("SELECT {} FROM generate_series(1, {})", emit(AGGREGATE, args.bytes), args.rows);
    loop {
        shared.room.acquire().await?.forget();
        sqlx::query(AssertSqlSafe(sql.clone())).execute(&mut connection).await?;
    }
}

/// One row at each tick, by several writers in turn: one alone would wait for its own commits.
async fn write_singles(args: &FanoutArgs, database_url: &str) -> anyhow::Result<()> {
    let sql = format!("SELECT {}", emit(AGGREGATE, args.bytes));
    let tick = Duration::from_secs(1) / args.rate.max(1);
    let begun = tokio::time::Instant::now();
    let writers = (0..SINGLE_WRITERS).map(|number| {
        let sql = sql.clone();
        async move {
            let mut connection = database::connect(database_url).await?;
            let mut ticks = tokio::time::interval_at(begun + tick * number, tick * SINGLE_WRITERS);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            loop {
                ticks.tick().await;
                sqlx::query(AssertSqlSafe(sql.clone())).execute(&mut connection).await?;
            }
        }
    });
    // They end with an error only.
    futures_util::future::try_join_all(writers).await.map(|_: Vec<()>| ())
}

struct Sample {
    deliveries: f64,
    seconds: f64,
    /// Of the node, for each delivery; none for a given cluster, whose processes are not known.
    cpu_us: Option<f64>,
    latencies: Histogram<u64>,
}

#[expect(clippy::cast_precision_loss, reason = "deliveries of a run are far below 2^53")]
async fn sample(
    args: &FanoutArgs,
    shared: &Shared,
    process: Option<super::process::Process>,
) -> anyhow::Result<Sample> {
    for latencies in &shared.latencies {
        latencies.lock().reset();
    }
    shared.measuring.store(true, Ordering::Relaxed);
    let (begun, before) = (Instant::now(), shared.deliveries.load(Ordering::Relaxed));
    let cpu_before = process.map(super::process::Process::cpu_time).transpose()?;
    tokio::time::sleep(Duration::from_secs(args.seconds)).await;
    let deliveries = (shared.deliveries.load(Ordering::Relaxed) - before) as f64;
    let seconds = begun.elapsed().as_secs_f64();
    let cpu_after = process.map(super::process::Process::cpu_time).transpose()?;
    shared.measuring.store(false, Ordering::Relaxed);
    let mut latencies = latencies()?;
    for shard in &shared.latencies {
        latencies.add(&*shard.lock())?;
    }
    let used = cpu_before.zip(cpu_after).map(|(before, after)| after.saturating_sub(before).as_secs_f64() * 1e6);
    Ok(Sample { deliveries, seconds, cpu_us: used.map(|used| used / deliveries.max(1.0)), latencies })
}

/// Ends the subscribers and waits for their goodbyes.
async fn stop(mut tasks: JoinSet<anyhow::Error>) {
    tasks.shutdown().await;
}
