//! The writers: `pgbench` where it is installed (it costs least beside the server that it measures), clients of our own
//! where it is not. Both run the same single statement over and over, each time in a transaction of its own.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::process::Command;
use tokio::task::JoinSet;
use url::Url;

/// Text that payloads are cut from: it must not compress like one letter repeated.
const TEXT_LEN: usize = 4096;

/// What to write, and how hard.
#[derive(Debug, Clone)]
pub(super) struct Load {
    /// One statement without parameters.
    pub(super) sql: String,
    pub(super) clients: u32,
    /// Transactions a second over all clients; none for as many as go.
    pub(super) rate: Option<u32>,
    pub(super) duration: Duration,
}

/// The machine's way of writing.
#[derive(Debug, Clone)]
pub(super) enum Writer {
    Pgbench(PathBuf),
    Own,
}

impl Writer {
    /// `pgbench` from the path or from Debian's folders, the newest first.
    pub(super) async fn find() -> Self {
        let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
        let mut programs: Vec<PathBuf> =
            installed.filter_map(|entry| Some(entry.ok()?.path().join("bin/pgbench"))).collect();
        programs.sort();
        programs.push("pgbench".into());
        for program in programs.into_iter().rev() {
            let version = Command::new(&program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            if version.await.is_ok_and(|status| status.success()) {
                return Self::Pgbench(program);
            }
        }
        Self::Own
    }

    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Pgbench(_) => "pgbench",
            Self::Own => "clients of our own (no pgbench was found)",
        }
    }

    /// Runs the load; transactions a second, connecting not counted. Stops with the future.
    pub(super) async fn run(&self, database_url: &str, load: &Load) -> anyhow::Result<f64> {
        match self {
            Self::Pgbench(program) => pgbench(program, database_url, load).await,
            Self::Own => own(database_url, load).await,
        }
    }
}

async fn pgbench(program: &PathBuf, database_url: &str, load: &Load) -> anyhow::Result<f64> {
    let mut script = tempfile::NamedTempFile::new().context("a script for pgbench")?;
    writeln!(script, "{};", load.sql)?;
    let threads = load.clients.min(2);
    let mut command = Command::new(program);
    command.args(["-n", "-M", "prepared", "-f"]).arg(script.path());
    command.args(["-c", &load.clients.to_string(), "-j", &threads.to_string()]);
    command.args(["-T", &load.duration.as_secs().max(1).to_string()]);
    if let Some(rate) = load.rate {
        command.args(["-R", &rate.to_string()]);
    }
    connection_settings(&mut command, database_url)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = command.output().await.context("pgbench")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("pgbench failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let line = text.lines().filter_map(|line| line.trim().strip_prefix("tps = ")).next_back();
    let number = line.and_then(|line| line.split_whitespace().next()).context("pgbench printed no tps")?;
    number.parse().context("pgbench's tps")
}

/// By the environment, as libpq reads it: a password in the command line could be read by everyone on the machine.
fn connection_settings(command: &mut Command, database_url: &str) -> anyhow::Result<()> {
    let url = Url::parse(database_url).context("the database's URL")?;
    let decoded = |text: &str| percent_decoded(text);
    let query = |name: &str| url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned());
    let host = query("host").or_else(|| url.host_str().map(decoded));
    let port = query("port").or_else(|| url.port().map(|port| port.to_string()));
    let user = Some(decoded(url.username())).filter(|user| !user.is_empty()).or_else(|| query("user"));
    let database = Some(decoded(url.path().trim_start_matches('/'))).filter(|name| !name.is_empty());
    let password = url.password().map(decoded).or_else(|| query("password"));
    let settings =
        [("PGHOST", host), ("PGPORT", port), ("PGUSER", user), ("PGDATABASE", database), ("PGPASSWORD", password)];
    for (name, value) in settings {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    Ok(())
}

fn percent_decoded(text: &str) -> String {
    // The only decoder in the crate `url` is that of forms, where `+` is a space.
    let form = format!("x={}", text.replace('+', "%2B"));
    url::form_urlencoded::parse(form.as_bytes()).next().map(|(_, value)| value.into_owned()).unwrap_or_default()
}

async fn own(database_url: &str, load: &Load) -> anyhow::Result<f64> {
    let mut connections = Vec::new();
    for _ in 0..load.clients {
        connections.push(PgConnection::connect(database_url).await?);
    }
    let (begun, done) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let turn = Arc::new(AtomicU64::new(0));
    let mut writers = JoinSet::new();
    for mut connection in connections {
        let (load, done, turn) = (load.clone(), done.clone(), turn.clone());
        writers.spawn(async move {
            loop {
                if let Some(rate) = load.rate {
                    let number = turn.fetch_add(1, Ordering::Relaxed);
                    let due = Duration::from_secs(1).mul_f64(f64::from(u32::try_from(number)?) / f64::from(rate));
                    tokio::time::sleep_until((begun + due).into()).await;
                }
                if begun.elapsed() >= load.duration {
                    return anyhow::Ok(());
                }
                sqlx::query(AssertSqlSafe(load.sql.clone())).execute(&mut connection).await?;
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer??;
    }
    let transactions = u32::try_from(done.load(Ordering::Relaxed))?;
    Ok(f64::from(transactions) / begun.elapsed().as_secs_f64())
}

/// The expression of a JSON payload of about `bytes`: the clock at the moment of the INSERT, in microseconds since 1970
/// (`at`), and text.
pub(super) fn payload(bytes: usize) -> String {
    let length = bytes.saturating_sub(40).max(1);
    let last = TEXT_LEN - length.min(TEXT_LEN);
    format!(
        "json_build_object('at', (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, \
         'note', substr('{}', 1 + (random() * {last})::int, {length}))",
        text()
    )
}

/// A call that publishes one domain event of the type `aggregate`.
pub(super) fn emit(aggregate: &str, bytes: usize) -> String {
    format!("tidewire.emit('{aggregate}', (random() * 1000000)::int::text, 'bench.written', {})", payload(bytes))
}

/// Letters and digits without a pattern, the same in every run.
fn text() -> String {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let letter = |_| {
        // Xorshift64 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b"abcdefghijklmnopqrstuvwxyz0123456789"[usize::try_from(state % 36).unwrap_or_default()])
    };
    (0..TEXT_LEN).map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_has_its_length_and_no_variable_of_pgbench() {
        let sql = payload(300);
        assert!(sql.contains(", 260)"), "the text is what the clock and the names leave");
        // pgbench takes a colon before a letter for a variable, unless it is a cast.
        let colons: Vec<_> = sql.match_indices(':').map(|(at, _)| at).collect();
        assert!(colons.chunks(2).all(|pair| matches!(pair, [a, b] if a + 1 == *b)), "{colons:?}");
    }

    #[test]
    fn a_password_reaches_pgbench_by_the_environment() {
        let mut command = Command::new("true");
        connection_settings(&mut command, "postgres://ada:p%40ss+@h:5/feed").unwrap();
        let env: Vec<_> =
            command.as_std().get_envs().map(|(name, value)| (name.to_str(), value.unwrap().to_str())).collect();
        assert!(
            env.contains(&(Some("PGPASSWORD"), Some("p@ss+"))) && env.contains(&(Some("PGDATABASE"), Some("feed")))
        );
    }
}
