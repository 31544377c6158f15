//! A process full of clients, and how the storm talks to it: a word on its standard input, a line of JSON back.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tidewire::client::{Client, ConnectOptions, Item, SubscribeOptions};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::time::{sleep, timeout};

use super::micros_now;

/// Rows are spread over so many weights, and filters as well.
pub(super) const WEIGHTS: u32 = 1_000;
/// A row of this weight is for everybody.
pub(super) const TICK: u32 = WEIGHTS;
/// Between two arrivals in one process.
const ARRIVES_EVERY: Duration = Duration::from_millis(3);
/// Thousands of them share the process.
const READ_BUFFER_BYTES: usize = 4 << 10;
/// For an answer of a process of clients, which may be busy with its storm.
const ANSWER: Duration = Duration::from_secs(30);
/// Asks for a report.
const REPORT: &str = "report";
/// Forgets what was lost so far.
const MARK: &str = "mark";

/// What became of the clients since the last mark.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Report {
    /// Have caught up and are connected.
    pub(super) there: u64,
    /// Lost their connection.
    pub(super) lost: u64,
    /// When those who are back caught up, microseconds since 1970.
    pub(super) back_at_us: Vec<u64>,
}

/// A process of clients, seen from outside. It ends with this.
#[derive(Debug)]
pub(super) struct Crowd {
    _child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Crowd {
    pub(super) fn start(url: &str, key: &str, clients: u32) -> anyhow::Result<Self> {
        let mut child = tokio::process::Command::new(std::env::current_exe()?)
            .args(["storm-clients", "--url", url, "--clients", &clients.to_string()])
            .env("TIDEWIRE_KEY", key)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("a process of clients cannot be started")?;
        let (input, output) = (child.stdin.take().context("its input")?, child.stdout.take().context("its output")?);
        Ok(Self { _child: child, input, output: BufReader::new(output).lines() })
    }

    pub(super) async fn mark(&mut self) -> anyhow::Result<()> {
        self.ask(MARK).await.map(drop)
    }

    pub(super) async fn report(&mut self) -> anyhow::Result<Report> {
        Ok(serde_json::from_str(&self.ask(REPORT).await?)?)
    }

    async fn ask(&mut self, word: &str) -> anyhow::Result<String> {
        let asked = async {
            self.input.write_all(format!("{word}\n").as_bytes()).await?;
            self.output.next_line().await?.context("the clients' process has ended")
        };
        timeout(ANSWER, asked).await.context("the clients' process does not answer")?
    }
}

/// Where one client stands.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    there: bool,
    lost: bool,
    back_at_us: Option<u64>,
}

/// The process of clients, seen from inside: runs until its input ends.
///
/// # Errors
/// A client was refused for good, or the input or output broke.
pub async fn serve(url: &str, key: &str, clients: u32) -> anyhow::Result<()> {
    let states = Arc::new(Mutex::new(vec![State::default(); usize::try_from(clients)?]));
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..clients {
        tasks.spawn(one(n, url.to_owned(), key.to_owned(), Arc::clone(&states)));
    }
    let mut words = BufReader::new(tokio::io::stdin()).lines();
    let mut output = tokio::io::stdout();
    loop {
        let word = tokio::select! {
            word = words.next_line() => word?,
            Some(ended) = tasks.join_next() => {
                ended??;
                anyhow::bail!("a client ended by itself");
            }
        };
        let answer = match word.as_deref() {
            Some(MARK) => {
                states.lock().iter_mut().for_each(|state| *state = State { there: state.there, ..State::default() });
                "{}".to_owned()
            }
            Some(REPORT) => serde_json::to_string(&report(&states.lock()))?,
            Some(other) => anyhow::bail!("not understood: {other}"),
            None => return Ok(()),
        };
        output.write_all(format!("{answer}\n").as_bytes()).await?;
        output.flush().await?;
    }
}

fn report(states: &[State]) -> Report {
    Report {
        there: states.iter().filter(|state| state.there).count() as u64,
        lost: states.iter().filter(|state| state.lost).count() as u64,
        back_at_us: states.iter().filter_map(|state| state.back_at_us).collect(),
    }
}

async fn one(n: u32, url: String, key: String, states: Arc<Mutex<Vec<State>>>) -> anyhow::Result<()> {
    sleep(ARRIVES_EVERY * n).await;
    let options = ConnectOptions::new(url).key(key).unlimited_attempts().read_buffer_bytes(READ_BUFFER_BYTES);
    let client = Client::connect(options).await.context("a client cannot connect")?;
    let wanted = SubscribeOptions::tables(["public.notes"]).filter(format!("w = {} OR w = {TICK}", n % WEIGHTS));
    let mut subscription = client.subscribe(wanted).await.context("a client cannot subscribe")?;
    let index = usize::try_from(n)?;
    while let Some(item) = subscription.next().await {
        let item = item.context("a client was turned away")?;
        let mut states = states.lock();
        let Some(state) = states.get_mut(index) else { break };
        match item {
            Item::CaughtUp { .. } => {
                state.there = true;
                if state.lost {
                    state.back_at_us = Some(micros_now());
                }
            }
            Item::Disconnected { .. } => *state = State { lost: true, ..State::default() },
            Item::Resync(resync) => anyhow::bail!("a client has to start over: {}", resync.message),
            _ => {}
        }
    }
    anyhow::bail!("a subscription ended")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_lost_counts_until_the_next_mark_and_is_back_once() {
        let away = State { lost: true, ..State::default() };
        let back = State { there: true, lost: true, back_at_us: Some(7) };
        let stayed = State { there: true, ..State::default() };
        let report = report(&[away, back, stayed]);
        assert_eq!((report.there, report.lost, report.back_at_us), (2, 2, vec![7]));
    }
}
