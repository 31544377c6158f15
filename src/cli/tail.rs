//! `tidewire tail`: changes on the terminal as they happen.
//!
//! Events go to standard output, news (a lost connection, a resume) to standard error, so that a pipe gets events
//! only. Every ending, wanted or not, tells the cursor to go on from.

mod line;

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, bail};
use chrono::Utc;
use clap::Args;
use serde_json::value::RawValue;

use self::line::{Paint, event_line, news};
use crate::client::{
    Client, ClientError, ConnectOptions, Frame, Frames, Item, Resumed, Source, Start, SubscribeOptions,
};
use crate::dev;

/// Show changes as they happen.
///
/// Survives lost connections and dying nodes: it resumes by itself and says from where and with how many events.
#[derive(Args, Debug, Clone)]
#[command(after_help = "\
Examples:
  tidewire tail public.orders
  tidewire tail public.orders --where \"status = 'paid'\" --op UPDATE
  tidewire tail 'sales.*' event:invoice --json | jq .after
  tidewire tail public.orders --from 00000001-000000000000002a-1c9e44d0")]
pub struct TailArgs {
    /// Tables (`public.orders`), globs (`sales.*`, `*`) or domain events (`event:invoice`).
    #[arg(required = true, value_name = "TABLE")]
    tables: Vec<String>,
    /// Only rows for which this SQL condition holds.
    #[arg(long = "where", value_name = "CONDITION")]
    filter: Option<String>,
    /// Only these operations: INSERT, UPDATE, DELETE, TRUNCATE, EVENT, SCHEMA.
    #[arg(long = "op", value_name = "OP", value_delimiter = ',')]
    ops: Vec<String>,
    /// Only these columns.
    #[arg(long, value_name = "COLUMN", value_delimiter = ',')]
    columns: Vec<String>,
    /// Where to begin: `now`, `oldest` (all that the log still has; the key needs the history scope), or a cursor that an
    /// earlier run printed.
    #[arg(long, default_value = "now", value_name = "now|oldest|CURSOR")]
    from: String,
    /// Address of a node or a balancer; several, separated by commas, are tried in turn. Without it: the `tidewire dev`
    /// that you run.
    #[arg(long, env = "TIDEWIRE_URL", value_delimiter = ',')]
    url: Vec<String>,
    /// API key. Without it and without --url: that of the `tidewire dev` that you run.
    #[arg(long, env = "TIDEWIRE_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Attempts to connect in a row before giving up.
    #[arg(long, default_value_t = crate::client::DEFAULT_ATTEMPTS)]
    attempts: u32,
    /// End after this many events.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// One JSON object a line: the event as the server sent it.
    #[arg(long)]
    json: bool,
    /// No colours (as is usual: also where `NO_COLOR` is set, and where the output is no terminal).
    #[arg(long, env = "NO_COLOR", num_args = 0..=1, default_missing_value = "1", hide_env_values = true, value_name = "")]
    no_color: Option<String>,
}

impl TailArgs {
    fn connect_options(&self) -> anyhow::Result<ConnectOptions> {
        let (urls, key) = if self.url.is_empty() {
            let dev = dev::running().context("no address: give --url or TIDEWIRE_URL, or start `tidewire dev`")?;
            (vec![dev.load_balancer], self.key.clone().unwrap_or(dev.api_key))
        } else {
            let key =
                self.key.clone().context("no API key: give --key or TIDEWIRE_KEY; `tidewire keys create` makes one")?;
            (self.url.clone(), key)
        };
        let mut urls = urls.into_iter();
        let first = urls.next().context("no address: give --url")?;
        let options = urls.fold(ConnectOptions::new(first), ConnectOptions::or).attempts(self.attempts);
        Ok(options.key(key))
    }

    fn subscribe_options(&self) -> SubscribeOptions {
        let start = match self.from.as_str() {
            "now" => Start::Now,
            "oldest" => Start::Oldest,
            cursor => Start::After(cursor.to_owned()),
        };
        let mut options = SubscribeOptions::tables(&self.tables).from(start);
        if let Some(filter) = &self.filter {
            options = options.filter(filter);
        }
        if !self.ops.is_empty() {
            options = options.ops(self.ops.iter().map(|op| op.to_ascii_uppercase()));
        }
        if !self.columns.is_empty() {
            options = options.columns(&self.columns);
        }
        options
    }

    /// The command that goes on from `cursor`.
    fn continuation(&self, cursor: &str) -> String {
        let mut words = vec!["tidewire".to_owned(), "tail".to_owned()];
        words.extend(self.tables.iter().map(|table| quoted(table)));
        if let Some(filter) = &self.filter {
            words.extend(["--where".to_owned(), quoted(filter)]);
        }
        if !self.ops.is_empty() {
            words.extend(["--op".to_owned(), quoted(&self.ops.join(","))]);
        }
        if !self.columns.is_empty() {
            words.extend(["--columns".to_owned(), quoted(&self.columns.join(","))]);
        }
        words.extend(["--from".to_owned(), cursor.to_owned()]);
        words.join(" ")
    }

    fn paint(&self, terminal: bool) -> Paint {
        Paint(terminal && self.no_color.as_deref().is_none_or(str::is_empty))
    }
}

/// In single quotes, where a POSIX shell would read the word otherwise.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.,:/".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Runs until Ctrl-C, `--count`, or an error that trying again does not mend.
///
/// # Errors
/// The text says the cause and what to do.
pub async fn run(args: TailArgs) -> anyhow::Result<()> {
    let client = Client::connect(args.connect_options()?).await.map_err(explain)?;
    let subscription = client.subscribe(args.subscribe_options()).await.map_err(explain)?;
    let node = client.server().map_or_else(String::new, |server| server.node);
    let mut tail = Tail {
        stdout_paint: args.paint(std::io::stdout().is_terminal()),
        stderr_paint: args.paint(std::io::stderr().is_terminal()),
        left: args.count.unwrap_or(u64::MAX),
        replay: None,
        args,
    };
    let source = subscription.source();
    tail.news(&format!("subscribed on {node} after {} ({})", subscription.position(), source.as_str()));
    tail.replay = Some(Replay { source: source.as_str(), events: 0, resumed: false });
    let mut frames = subscription.into_frames();
    let outcome = tail.follow(&mut frames).await;
    let cursor = frames.position().to_string();
    tail.news(&format!("last cursor {cursor}; go on with: {}", tail.args.continuation(&cursor)));
    drop(frames);
    client.close().await;
    outcome
}

/// What is being replayed, until `caught_up`.
struct Replay {
    source: &'static str,
    events: u64,
    resumed: bool,
}

struct Tail {
    args: TailArgs,
    stdout_paint: Paint,
    stderr_paint: Paint,
    left: u64,
    replay: Option<Replay>,
}

/// Whether to go on.
enum Flow {
    GoOn,
    Done,
}

impl Tail {
    async fn follow(&mut self, frames: &mut Frames) -> anyhow::Result<()> {
        let stopped = stop_signal();
        tokio::pin!(stopped);
        loop {
            let item = tokio::select! {
                item = frames.next() => item,
                () = &mut stopped => return Ok(()),
            };
            let Some(item) = item else { bail!("the subscription has ended") };
            match self.item(item.map_err(explain)?)? {
                // What is printed is handled.
                Flow::GoOn => frames.ack(),
                // Of the last frame perhaps a part only: rather some events twice than one never.
                Flow::Done => return Ok(()),
            }
        }
    }

    fn item(&mut self, item: Item<Frame>) -> anyhow::Result<Flow> {
        match item {
            Item::Batch(frame) => return self.batch(&frame),
            Item::CaughtUp { .. } => self.caught_up(),
            Item::Progress { .. } => {}
            Item::Disconnected { cause, retry_in } => {
                self.replay = None;
                self.news(&format!("connection lost: {cause}; trying again {}", soon(retry_in)));
            }
            Item::Resumed(resumed) => self.resumed(&resumed),
            Item::Resync(resync) => bail!(
                "{}: {}. What was missed cannot be had any more: read the tables anew, then tail --from now{}",
                resync.reason.as_str(),
                resync.message,
                resync.oldest.map_or_else(String::new, |oldest| format!(" (the oldest position is {oldest})")),
            ),
        }
        Ok(Flow::GoOn)
    }

    #[expect(clippy::disallowed_methods, reason = "the edge: the lag that is shown is by the clock on the wall")]
    fn batch(&mut self, frame: &Frame) -> anyhow::Result<Flow> {
        let (now, mut out) = (Utc::now(), String::new());
        let mut shown = 0;
        if self.args.json {
            let events: Vec<&RawValue> = serde_json::from_str(frame.events_text()).context("an event is no JSON")?;
            for event in events.iter().take(usize::try_from(self.left).unwrap_or(usize::MAX)) {
                out.push_str(event.get());
                out.push('\n');
                shown += 1;
            }
        } else {
            let events = frame.parse().context("an event is not what this version can read: update tidewire")?;
            for event in events.iter().take(usize::try_from(self.left).unwrap_or(usize::MAX)) {
                out.push_str(&event_line(event, now, self.stdout_paint));
                out.push('\n');
                shown += 1;
            }
        }
        if let Some(replay) = &mut self.replay {
            replay.events += shown;
        }
        self.left -= shown;
        let mut stdout = std::io::stdout().lock();
        if stdout.write_all(out.as_bytes()).and_then(|()| stdout.flush()).is_err() {
            // The reader of the pipe has gone: `head` got its lines.
            return Ok(Flow::Done);
        }
        Ok(if self.left == 0 { Flow::Done } else { Flow::GoOn })
    }

    fn caught_up(&mut self) {
        let Some(replay) = self.replay.take() else { return };
        if replay.resumed || replay.events > 0 {
            self.news(&format!("caught up: {} from {}", counted(replay.events, "event"), replay.source));
        }
    }

    fn resumed(&mut self, resumed: &Resumed) {
        let Resumed { from, source, attempt, node, away } = resumed;
        let attempts = counted(u64::from(*attempt), "attempt");
        let missed = match source {
            Source::Live => "nothing was missed".to_owned(),
            source => format!("what was missed comes from {}", source.as_str()),
        };
        let away = away.as_secs_f64();
        self.news(&format!("resumed on {node} after {from}: {missed}; away {away:.1} s, {attempts}"));
        self.replay = Some(Replay { source: source.as_str(), events: 0, resumed: *source != Source::Live });
    }

    fn news(&self, text: &str) {
        eprintln!("{}", news(text, self.stderr_paint));
    }
}

fn counted(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn soon(wait: Duration) -> String {
    if wait < Duration::from_millis(100) { "now".into() } else { format!("in {:.1} s", wait.as_secs_f64()) }
}

/// Adds the option of this command that mends the error.
#[expect(clippy::needless_pass_by_value, reason = "the signature that map_err wants")]
fn explain(error: ClientError) -> anyhow::Error {
    let hint = match &error {
        ClientError::Closed { code: 4401 | 4408, .. } | ClientError::Rejected { status: 401, .. } => {
            ". Give it with --key or TIDEWIRE_KEY"
        }
        ClientError::GaveUp { .. } | ClientError::BadUrl { .. } => " Give it with --url or TIDEWIRE_URL",
        ClientError::Resync(_) => ". Read the tables anew, then tail --from now",
        _ => "",
    };
    anyhow::anyhow!("{error}{hint}")
}

/// Ctrl-C or SIGTERM.
async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        // Without a handler the signal ends the process, as is its default.
        let _ = tokio::signal::ctrl_c().await;
        return;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        tail: TailArgs,
    }

    fn parse(words: &[&str]) -> TailArgs {
        Program::parse_from([&["tail"], words].concat()).tail
    }

    #[test]
    fn the_continuation_is_the_same_command_from_the_cursor() {
        let args = parse(&["public.orders", "--where", "note = 'it''s'", "--op", "insert,UPDATE"]);
        let want = r"tidewire tail public.orders --where 'note = '\''it'\'''\''s'\''' --op insert,UPDATE --from 1-2";
        assert_eq!(args.continuation("1-2"), want);
    }

    #[test]
    fn no_color_is_respected_when_it_is_not_empty() {
        assert!(parse(&["t", "--no-color="]).paint(true).0);
        assert!(!parse(&["t", "--no-color"]).paint(true).0);
        assert!(!parse(&["t", "--no-color="]).paint(false).0);
    }
}
