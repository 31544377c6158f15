//! kill -9 of the leader, again and again, under a steady load: how long nothing is relayed.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use sqlx::PgConnection;

use super::cluster::Cluster;
use super::load::{Load, Writer, emit};
use super::report::{Goal, Report};
use super::{bar, database};

const AGGREGATE: &str = "bench_leader";
const PAYLOAD_BYTES: usize = 200;
/// No election takes longer, unless there is none.
const ELECTION_LIMIT: Duration = Duration::from_secs(30);
/// How often the log is looked at: the figure's error.
const POLL: Duration = Duration::from_millis(2);
/// After every node is back: time to become a follower and a candidate.
const CALM: Duration = Duration::from_secs(2);
/// The load outlives any number of kills; it is stopped, not waited for.
const LOAD: Duration = Duration::from_hours(6);

#[derive(Args, Debug)]
pub(super) struct LeaderArgs {
    /// How often the leader is killed
    #[arg(long, default_value_t = 30)]
    kills: u32,
    /// Single-row transactions a second meanwhile
    #[arg(long, default_value_t = 200)]
    rate: u32,
}

pub(super) async fn run(args: &LeaderArgs, cluster: &Cluster) -> anyhow::Result<Report> {
    let mut report = Report::new("leader");
    let writer = Writer::find().await;
    let sql = format!("SELECT {}", emit(AGGREGATE, PAYLOAD_BYTES));
    let load = Load { sql, clients: 4, rate: Some(args.rate), duration: LOAD };
    let silences = tokio::select! {
        silences = kills(args, cluster) => silences?,
        ended = writer.run(&cluster.database_url, &load) => {
            ended?;
            bail!("the writers ended early");
        }
    };
    report.worst("kill -9 to the next term's first commit, worst", "ms", Goal::AtMost(500.0), &silences);
    report.figure("kill -9 to the next term's first commit", "ms", None, silences);
    report.note(format!(
        "{} kills at {} single-row transactions/s ({}); until events of the next term are committed in the log, looked \
         at every {} ms",
        args.kills,
        args.rate,
        writer.name(),
        POLL.as_millis()
    ));
    Ok(report)
}

async fn kills(args: &LeaderArgs, cluster: &Cluster) -> anyhow::Result<Vec<f64>> {
    let mut connection = database::connect(&cluster.database_url).await?;
    let bar = bar(u64::from(args.kills), "killing leaders");
    let mut silences = Vec::new();
    for _ in 0..args.kills {
        cluster.whole().await?;
        tokio::time::sleep(CALM).await;
        silences.push(kill_leader(cluster, &mut connection).await?.as_secs_f64() * 1000.0);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(silences)
}

async fn kill_leader(cluster: &Cluster, connection: &mut PgConnection) -> anyhow::Result<Duration> {
    let (term, node) = database::newest_term(connection).await?;
    let process = cluster.process(&node);
    let process =
        process.with_context(|| format!("the leader `{node}` is no process of a cluster of this bench's own"))?;
    process.kill()?;
    let killed = Instant::now();
    let mut at_change = None;
    loop {
        if database::newest_term(connection).await?.0 > term {
            let last = database::last_seq(connection).await?;
            if last > *at_change.get_or_insert(last) {
                return Ok(killed.elapsed());
            }
        }
        if killed.elapsed() > ELECTION_LIMIT {
            bail!("no leader relays {} s after `{node}` was killed", ELECTION_LIMIT.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
}
