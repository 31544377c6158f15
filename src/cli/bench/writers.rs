//! What capture costs the writers: a plain INSERT of the same row, `emit` with nobody relaying, `emit` with the whole
//! cluster relaying, and a NOTIFY trigger, which is what people build first.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use sqlx::PgConnection;
use url::Url;

use super::cluster::Cluster;
use super::load::{Load, Writer, emit, payload};
use super::report::{Goal, Report};
use super::{Common, database, relay, spinner};

const AGGREGATE: &str = "bench_writers";
const PAYLOAD_BYTES: usize = 200;
/// A database beside the cluster's, migrated, that no node knows of: nobody relays there, and nobody parks.
const QUIET: &str = "tidewire_bench";

#[derive(Args, Debug)]
pub(super) struct WritersArgs {
    /// Writing clients; each number is a round of its own
    #[arg(long, value_delimiter = ',', default_values_t = [8, 32])]
    clients: Vec<u32>,
    /// Length of a run, seconds
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

/// Who writes what, where.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    Quiet,
    Relayed,
    Notify,
}

pub(super) async fn run(args: &WritersArgs, common: &Common, cluster: &Cluster) -> anyhow::Result<Report> {
    let mut report = Report::new("writers");
    let writer = Writer::find().await;
    let mut connection = database::connect(&cluster.database_url).await?;
    let quiet_url = quiet_database(&mut connection, &cluster.database_url).await?;
    let mut quiet = database::connect(&quiet_url).await?;
    plain_tables(&mut quiet).await?;
    for clients in &args.clients {
        let mut rates = [const { Vec::new() }; 4];
        for run in 1..=common.runs {
            // In turn, so that a disk that slows down slows all of them down.
            for (way, rates) in [Way::Plain, Way::Quiet, Way::Relayed, Way::Notify].into_iter().zip(&mut rates) {
                let spinner = spinner(format!("{clients} clients, run {run}: {}", way.name()));
                let url = if way == Way::Relayed { &cluster.database_url } else { &quiet_url };
                let duration = Duration::from_secs(args.seconds);
                let load = Load { sql: way.sql(), clients: *clients, rate: None, duration };
                rates.push(writer.run(url, &load).await?);
                database::execute(
                    &mut quiet,
                    "TRUNCATE tidewire_bench.plain, tidewire_bench.notifying, tidewire.outbox",
                )
                .await?;
                relay::settle(&mut connection).await?;
                database::execute(&mut quiet, "CHECKPOINT").await?;
                spinner.finish_and_clear();
            }
        }
        tell(&mut report, *clients, rates);
    }
    database::execute(&mut connection, "DROP SCHEMA IF EXISTS tidewire_bench CASCADE").await?;
    drop(quiet);
    database::execute(&mut connection, format!("DROP DATABASE IF EXISTS {QUIET} WITH (FORCE)")).await?;
    report.note(format!(
        "{}; one row of {PAYLOAD_BYTES} B in each transaction. Plain: the row of the outbox into a table with the same \
         columns and primary key, without the index, the function and the trigger. No node: in a database that no node \
         follows, so the relay is never parked. Nobody listens to the NOTIFY trigger. Runs in turn",
        writer.name()
    ));
    Ok(report)
}

fn tell(report: &mut Report, clients: u32, rates: [Vec<f64>; 4]) {
    let [plain, quiet, relayed, notify] = rates;
    let share = |rates: &[f64]| rates.iter().zip(&plain).map(|(rate, plain)| rate / plain * 100.0).collect::<Vec<_>>();
    let shares = [share(&quiet), share(&relayed), share(&notify)];
    report.figure(format!("{clients} clients: {}", Way::Plain.name()), "tx/s", None, plain.clone());
    for ((way, rates), shares) in
        [(Way::Quiet, quiet), (Way::Relayed, relayed), (Way::Notify, notify)].into_iter().zip(shares)
    {
        let goal = (way == Way::Quiet).then_some(Goal::AtLeast(80.0));
        report.figure(format!("{clients} clients: {}", way.name()), "tx/s", None, rates);
        report.figure("  … of plain", "%", goal, shares);
    }
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain INSERT",
            Self::Quiet => "emit, no node",
            Self::Relayed => "emit, all nodes relaying",
            Self::Notify => "INSERT with a NOTIFY trigger",
        }
    }

    fn sql(self) -> String {
        // \x3a is the colon, which pgbench would take for the beginning of a variable.
        let insert = |table: &str| {
            format!(
                "INSERT INTO tidewire_bench.{table} (table_name, operation, row_key, after_data, event_type) VALUES \
                 (E'event\\x3a{AGGREGATE}', 'EVENT', json_build_object('aggregate_id', (random() * 1000000)::int::text), {}, \
                 'bench.written')",
                payload(PAYLOAD_BYTES)
            )
        };
        match self {
            Self::Plain => insert("plain"),
            Self::Notify => insert("notifying"),
            Self::Quiet | Self::Relayed => format!("SELECT {}", emit(AGGREGATE, PAYLOAD_BYTES)),
        }
    }
}

/// The database that no node follows, made anew; its URL.
async fn quiet_database(connection: &mut PgConnection, database_url: &str) -> anyhow::Result<String> {
    database::execute(connection, format!("DROP DATABASE IF EXISTS {QUIET} WITH (FORCE)")).await?;
    database::execute(connection, format!("CREATE DATABASE {QUIET}")).await.context("a database for the quiet runs")?;
    let mut url = Url::parse(database_url).context("the database's URL")?;
    url.set_path(QUIET);
    let options = url.as_str().parse().context("the database's URL")?;
    crate::postgres::migrate::migrate(&options).await?;
    Ok(url.into())
}

async fn plain_tables(connection: &mut PgConnection) -> anyhow::Result<()> {
    let like = "(LIKE tidewire.outbox INCLUDING DEFAULTS INCLUDING IDENTITY INCLUDING STORAGE, PRIMARY KEY (id))";
    for sql in [
        "CREATE SCHEMA tidewire_bench".to_owned(),
        format!("CREATE TABLE tidewire_bench.plain {like}"),
        format!("CREATE TABLE tidewire_bench.notifying {like}"),
        "CREATE FUNCTION tidewire_bench.notify() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_notify('tidewire_bench', NEW.after_data::text);
            RETURN NULL;
        END $$"
            .to_owned(),
        "CREATE TRIGGER notify AFTER INSERT ON tidewire_bench.notifying
            FOR EACH ROW EXECUTE FUNCTION tidewire_bench.notify()"
            .to_owned(),
    ] {
        database::execute(connection, sql).await?;
    }
    Ok(())
}
