//! What a connection costs the node while nothing happens: resident memory, with a subscription on each.

use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::cluster::Cluster;
use super::report::{Goal, Report};
use super::{Common, listeners, wait};

const AGGREGATE: &str = "bench_idle";
/// A subscriber reads heartbeats only; thousands of them share this process.
const READ_BUFFER_BYTES: usize = 4 * 1024;
/// After the start, and between runs: what a node gives back, it has given back by then.
const SETTLE: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
pub(super) struct ConnectionsArgs {
    /// Subscribed connections to one node
    #[arg(long, default_value_t = 5000)]
    count: usize,
    /// How long they are idle before memory is read, seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

pub(super) async fn run(args: &ConnectionsArgs, common: &Common, cluster: &Cluster) -> anyhow::Result<Report> {
    let mut report = Report::new("connections");
    let node = &cluster.nodes[0];
    let process =
        cluster.process(&node.name).context("this bench reads a node's memory, so it needs a cluster of its own")?;
    let urls = [node.url.clone()];
    wait(SETTLE, "the empty node").await;
    let count = f64::from(u32::try_from(args.count)?);
    let (mut empty, mut each) = (Vec::new(), Vec::new());
    for _ in 0..common.runs {
        let before = kibibytes(process.resident_bytes()?);
        let table = format!("event:{AGGREGATE}");
        let subscribers = listeners::connect(cluster, &urls, args.count, &table, READ_BUFFER_BYTES).await?;
        let mut tasks = listeners::read(subscribers, |_| |_: &crate::client::Frame| {});
        tokio::select! {
            () = wait(Duration::from_secs(args.seconds), "idle") => {}
            error = listeners::trouble(&mut tasks) => return Err(error),
        }
        let after = kibibytes(process.resident_bytes()?);
        empty.push(before / 1024.0);
        each.push((after - before) / count);
        tasks.shutdown().await;
        wait(SETTLE, "disconnecting").await;
    }
    report.worst("empty node, resident", "MiB", Goal::AtMost(60.0), empty.get(..1).unwrap_or_default());
    // Later runs find memory that an earlier one had: the first is what a connection costs.
    report.figure(
        "idle connection, first run",
        "KiB",
        Some(Goal::AtMost(10.0)),
        each.iter().take(1).copied().collect(),
    );
    if each.len() > 1 {
        report.figure("idle connection, all runs", "KiB", None, each);
    }
    report.note(format!(
        "{} connections, one subscription each, idle for {} s; resident memory of the node less that of the empty node",
        args.count, args.seconds
    ));
    Ok(report)
}

#[expect(clippy::cast_precision_loss, reason = "memory is far below 2^53 bytes")]
fn kibibytes(bytes: u64) -> f64 {
    bytes as f64 / 1024.0
}
