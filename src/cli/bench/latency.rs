//! From the INSERT to the client: writers at a fixed rate, subscribers on every node, one machine's clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use parking_lot::Mutex;

use super::cluster::Cluster;
use super::load::{Load, Writer, emit};
use super::report::{Goal, Report, latencies, quantile_ms, record};
use super::{Common, listeners, now_us};
use crate::client::DEFAULT_READ_BUFFER_BYTES;

const AGGREGATE: &str = "bench_latency";
const PAYLOAD_BYTES: usize = 200;
/// Connections, caches and plans are warm after this.
const WARM_UP: Duration = Duration::from_secs(3);

#[derive(Args, Debug)]
pub(super) struct LatencyArgs {
    /// Single-row transactions a second
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// Subscribers, spread over the nodes
    #[arg(long, default_value_t = 10)]
    subscribers: usize,
    /// Writing clients
    #[arg(long, default_value_t = 4)]
    clients: u32,
    /// Length of a run, seconds
    #[arg(long, default_value_t = 20)]
    seconds: u64,
}

pub(super) async fn run(args: &LatencyArgs, common: &Common, cluster: &Cluster) -> anyhow::Result<Report> {
    let mut report = Report::new("latency");
    let writer = Writer::find().await;
    let urls: Vec<_> = cluster.nodes.iter().map(|node| node.url.clone()).collect();
    let table = format!("event:{AGGREGATE}");
    let subscribers = listeners::connect(cluster, &urls, args.subscribers, &table, DEFAULT_READ_BUFFER_BYTES).await?;
    let (seen, measuring) = (Arc::new(Mutex::new(latencies()?)), Arc::new(AtomicBool::new(false)));
    let mut tasks = listeners::read(subscribers, |_| {
        let (seen, measuring) = (seen.clone(), measuring.clone());
        move |frame| {
            let now = now_us();
            if measuring.load(Ordering::Relaxed) {
                let mut seen = seen.lock();
                listeners::written_at(frame).for_each(|at| record(&mut seen, now - at));
            }
        }
    });
    let quantiles = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];
    let mut runs = vec![Vec::new(); quantiles.len()];
    let (mut written, mut deliveries) = (Vec::new(), 0);
    for _ in 0..common.runs {
        let duration = WARM_UP + Duration::from_secs(args.seconds);
        let sql = format!("SELECT {}", emit(AGGREGATE, PAYLOAD_BYTES));
        let load = Load { sql, clients: args.clients, rate: Some(args.rate), duration };
        let spinner = super::spinner(format!("{} transactions/s for {} s", args.rate, args.seconds));
        let measure = async {
            tokio::time::sleep(WARM_UP).await;
            seen.lock().reset();
            measuring.store(true, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(args.seconds)).await;
            measuring.store(false, Ordering::Relaxed);
        };
        let both = async { tokio::join!(writer.run(&cluster.database_url, &load), measure).0 };
        let tps = tokio::select! {
            tps = both => tps?,
            error = listeners::trouble(&mut tasks) => return Err(error),
        };
        spinner.finish_and_clear();
        let seen = seen.lock();
        written.push(tps);
        deliveries += seen.len();
        for ((_, quantile), run) in quantiles.iter().zip(&mut runs) {
            run.push(quantile_ms(&seen, *quantile));
        }
    }
    report.figure("written", "tx/s", None, written);
    for ((name, quantile), run) in quantiles.into_iter().zip(runs) {
        let goal = match name {
            "p50" => Some(Goal::AtMost(2.0)),
            "p99" => Some(Goal::AtMost(10.0)),
            _ => None,
        };
        // A quantile needs events beyond it to mean anything.
        if quantile < 1.0 || deliveries > 0 {
            report.figure(format!("commit to client, {name}"), "ms", goal, run);
        }
    }
    report.note(format!(
        "{} subscribers on {} node(s), {deliveries} deliveries; {} writers ({}); the clock is read in the INSERT, so the \
         commit's fsync is within",
        args.subscribers,
        urls.len(),
        args.clients,
        writer.name()
    ));
    Ok(report)
}
