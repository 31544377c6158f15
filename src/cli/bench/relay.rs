//! The relay alone: draining a backlog, with and without what holds other queues up, and the steady state.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use parking_lot::Mutex;
use sqlx::PgConnection;

use super::cluster::Cluster;
use super::database::{Standstill, connect, drained, execute, last_seq};
use super::load::{Load, Writer, emit};
use super::report::{Goal, Report, latencies, quantile_ms, record};
use super::{Common, bar, listeners, now_us};
use crate::client::DEFAULT_READ_BUFFER_BYTES;

/// With the envelope this makes events of about 400 bytes.
const PAYLOAD_BYTES: usize = 200;
/// Sessions that fill the outbox.
const FILLING: u64 = 2;
/// Transactions in one DO block: the progress bar's step.
const FILL_STEP: u64 = 10_000;
/// A relay slower than this has stopped.
const DRAIN_LIMIT: Duration = Duration::from_mins(10);
const POLL: Duration = Duration::from_millis(10);
const AGGREGATE: &str = "bench_relay";

#[derive(Args, Debug)]
pub(super) struct RelayArgs {
    /// Events in the backlog
    #[arg(long, default_value_t = 1_000_000)]
    events: u64,
    /// Also drain with a snapshot held, and with a transaction open that has written
    #[arg(long)]
    held: bool,
    /// Instead of a backlog: writers at this rate and one subscriber
    #[arg(long, value_name = "EVENTS/S", num_args = 0..=1, default_missing_value = "12000", conflicts_with = "held")]
    sustained: Option<u32>,
    /// Writing clients of a sustained run
    #[arg(long, default_value_t = 32)]
    clients: u32,
    /// Length of a sustained run, seconds
    #[arg(long, default_value_t = 20)]
    seconds: u64,
}

pub(super) async fn run(args: &RelayArgs, common: &Common, cluster: &Cluster) -> anyhow::Result<Report> {
    let mut report = Report::new("relay");
    match args.sustained {
        Some(rate) => sustained(args, rate, common, cluster, &mut report).await?,
        None => backlog(args, common, cluster, &mut report).await?,
    }
    Ok(report)
}

/// What stands beside the relay while it drains.
#[derive(Clone, Copy)]
enum Beside {
    Nothing,
    /// A read-only transaction with a snapshot, which keeps dead rows from being removed.
    Snapshot,
    /// A transaction with an xid, which holds back the snapshots' horizon of all later ones.
    Writer,
}

async fn backlog(args: &RelayArgs, common: &Common, cluster: &Cluster, report: &mut Report) -> anyhow::Result<()> {
    let normal = drains(args, common.runs, Beside::Nothing, cluster).await?;
    report.figure("drain", "events/s", Some(Goal::AtLeast(60_000.0)), normal.clone());
    report.note(format!(
        "{} events of about 400 B from as many single-row transactions (tidewire.emit, COMMIT in a DO loop, \
         synchronous_commit off while filling only) written while no relay ran; from the moment the lock is free, an \
         election included, to the last event in the log; feed on, {} following node(s)",
        args.events,
        cluster.nodes.len()
    ));
    if args.held {
        let mut sorted = normal;
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        for (beside, name) in [(Beside::Snapshot, "a held snapshot"), (Beside::Writer, "a long writer")] {
            let runs = drains(args, common.runs, beside, cluster).await?;
            let shares = runs.iter().map(|rate| rate / median * 100.0).collect();
            report.figure(format!("drain beside {name}"), "events/s", None, runs);
            report.figure(format!("… of the normal drain, {name}"), "%", Some(Goal::AtLeast(80.0)), shares);
        }
        report.note("held: the same drain after as many rows were relayed since the snapshot or the transaction began");
    }
    Ok(())
}

async fn drains(args: &RelayArgs, runs: u32, beside: Beside, cluster: &Cluster) -> anyhow::Result<Vec<f64>> {
    let mut rates = Vec::new();
    for _ in 0..runs {
        let mut other = connect(&cluster.database_url).await?;
        match beside {
            Beside::Nothing => {}
            Beside::Snapshot => {
                execute(&mut other, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
                execute(&mut other, "SELECT count(*) FROM pg_class").await?;
            }
            Beside::Writer => {
                execute(&mut other, "BEGIN").await?;
                execute(&mut other, format!("SELECT {}", emit(AGGREGATE, PAYLOAD_BYTES))).await?;
            }
        }
        if !matches!(beside, Beside::Nothing) {
            // Its rows stay behind, dead but not removable.
            drain(args, cluster).await?;
        }
        rates.push(drain(args, cluster).await?);
        execute(&mut other, "ROLLBACK").await?;
    }
    Ok(rates)
}

/// Fills while nobody relays, then lets go: events a second.
async fn drain(args: &RelayArgs, cluster: &Cluster) -> anyhow::Result<f64> {
    let mut connection = connect(&cluster.database_url).await?;
    let standstill = Standstill::begin(&cluster.database_url).await?;
    let before = last_seq(&mut connection).await?;
    fill(args.events, cluster).await?;
    execute(&mut connection, "CHECKPOINT").await?;
    let goal = before + i64::try_from(args.events)?;
    let bar = bar(args.events, "draining");
    standstill.end().await?;
    let begun = Instant::now();
    loop {
        let last = last_seq(&mut connection).await?;
        bar.set_position(u64::try_from(last - before).unwrap_or_default());
        if last >= goal {
            break;
        }
        if begun.elapsed() > DRAIN_LIMIT {
            bail!("{} events are still waiting after {} s", goal - last, DRAIN_LIMIT.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
    bar.finish_and_clear();
    Ok(f64::from(u32::try_from(args.events)?) / begun.elapsed().as_secs_f64())
}

async fn fill(events: u64, cluster: &Cluster) -> anyhow::Result<()> {
    let bar = bar(events, "filling the outbox");
    let session = |share: u64| {
        let bar = bar.clone();
        async move {
            let mut connection = connect(&cluster.database_url).await?;
            execute(&mut connection, "SET synchronous_commit = off").await?;
            let mut left = share;
            while left > 0 {
                let step = left.min(FILL_STEP);
                execute(&mut connection, single_row_transactions(step)).await?;
                left -= step;
                bar.inc(step);
            }
            anyhow::Ok(())
        }
    };
    let share = events / FILLING;
    let sessions = (0..FILLING).map(|number| session(if number == 0 { events - share * (FILLING - 1) } else { share }));
    futures_util::future::try_join_all(sessions).await?;
    bar.finish_and_clear();
    Ok(())
}

fn single_row_transactions(count: u64) -> String {
    let emit = emit(AGGREGATE, PAYLOAD_BYTES);
    format!("DO $fill$ BEGIN FOR i IN 1..{count} LOOP PERFORM {emit}; COMMIT; END LOOP; END $fill$")
}

/// What one subscriber sees while writers write at a fixed rate.
async fn sustained(
    args: &RelayArgs,
    rate: u32,
    common: &Common,
    cluster: &Cluster,
    report: &mut Report,
) -> anyhow::Result<()> {
    let writer = Writer::find().await;
    let (mut delivered, mut p99, mut worst, mut written) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut connection = connect(&cluster.database_url).await?;
    for _ in 0..common.runs {
        let seen = Arc::new(Mutex::new((0u32, latencies()?)));
        let table = format!("event:{AGGREGATE}");
        let subscriber = cluster.listen(&cluster.nodes[0].url, &table, DEFAULT_READ_BUFFER_BYTES).await?;
        let mut tasks = listeners::read(vec![subscriber], |_| {
            let seen = seen.clone();
            move |frame| {
                let (now, mut seen) = (now_us(), seen.lock());
                for at in listeners::written_at(frame) {
                    seen.0 += 1;
                    record(&mut seen.1, now - at);
                }
            }
        });
        let duration = Duration::from_secs(args.seconds);
        let sql = format!("SELECT {}", emit(AGGREGATE, PAYLOAD_BYTES));
        let load = Load { sql, clients: args.clients, rate: Some(rate), duration };
        let spinner = super::spinner(format!("{rate} single-row transactions/s for {} s", args.seconds));
        let tps = tokio::select! {
            tps = writer.run(&cluster.database_url, &load) => tps?,
            error = listeners::trouble(&mut tasks) => return Err(error),
        };
        drained(&mut connection, DRAIN_LIMIT).await?;
        spinner.finish_and_clear();
        // The last events are on their way from the log to the subscriber.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let seen = seen.lock();
        delivered.push(f64::from(seen.0) / duration.as_secs_f64());
        p99.push(quantile_ms(&seen.1, 0.99));
        worst.push(quantile_ms(&seen.1, 1.0));
        written.push(tps);
    }
    report.figure("written", "tx/s", None, written);
    report.figure("delivered", "events/s", Some(Goal::AtLeast(10_000.0)), delivered);
    report.figure("lag, 99th percentile", "ms", None, p99);
    report.figure("lag, worst event", "ms", Some(Goal::AtMost(1000.0)), worst);
    report.note(format!(
        "{} writers ({}), asked for {rate} tx/s; the clock is read in the INSERT",
        args.clients,
        writer.name()
    ));
    Ok(())
}

/// Empties the outbox through the relay before something is measured that it would disturb.
pub(super) async fn settle(connection: &mut PgConnection) -> anyhow::Result<()> {
    drained(connection, DRAIN_LIMIT).await
}
