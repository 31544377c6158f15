//! `tidewire tail`: changes on the terminal as they happen.
//!
//! Events go to standard output, news (a lost connection, a resume) to standard error, so that a pipe gets events
//! only. Every ending, wanted or not, tells the cursor to go on from.

mod line;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use chrono::Utc;
use clap::Args;
use serde_json::value::RawValue;

use self::line::{Paint, event_line, news};
use crate::cli::connect::{Reader, say_target};
use crate::client::{
    Client, ClientError, ConnectOptions, Frame, Frames, Item, Resumed, Source, Start, SubscribeOptions,
};
use crate::cursor::Cursor;
use crate::dev::shell::{program, quoted};
use crate::dev::{self, ClusterName};

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
    /// The `tidewire dev` of this name, whatever else is set.
    #[arg(long, value_name = "NAME")]
    dev: Option<ClusterName>,
    /// API key. Without it and without --url: that of the `tidewire dev` that you run.
    #[arg(long, env = "TIDEWIRE_KEY", hide_env_values = true)]
    key: Option<String>,
    /// A file with the API key, which does not stand in the list of processes then.
    #[arg(long, value_name = "FILE", conflicts_with = "key")]
    key_file: Option<PathBuf>,
    /// Attempts to connect in a row before giving up [default: 4 at first, 20 after a loss].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    attempts: Option<u32>,
    /// End after this many events; what is printed last says how to go on.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// One JSON object a line: the event as the server sent it.
    #[arg(long)]
    json: bool,
    /// No colours (as is usual: also where `NO_COLOR` is set, and where the output is no terminal).
    #[arg(long, env = "NO_COLOR", num_args = 0..=1, default_missing_value = "1", hide_env_values = true, value_name = "")]
    no_color: Option<String>,
}

impl TailArgs {
    /// Where to connect, and how a continuation names that.
    fn target(&self) -> anyhow::Result<Target> {
        let key = self.given_key()?;
        if self.dev.is_none() && !self.url.is_empty() {
            let key =
                key.context("no API key: give --key, --key-file or TIDEWIRE_KEY; `tidewire keys create` makes one")?;
            return Ok(Target { urls: self.url.clone(), key, dev: None });
        }
        match dev::choose(self.dev.as_ref())? {
            Some(dev) => {
                Ok(Target { urls: vec![dev.load_balancer], key: key.unwrap_or(dev.api_key), dev: Some(dev.name) })
            }
            None => bail!("no address: give --url or TIDEWIRE_URL, or start `tidewire dev`"),
        }
    }

    fn given_key(&self) -> anyhow::Result<Option<String>> {
        let Some(path) = &self.key_file else { return Ok(self.key.clone()) };
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(text.trim().to_owned()))
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

    /// The same command from `cursor` on, as a shell reads it. A key that was given stands there as the variable: it is
    /// not to be repeated in a log.
    fn continuation(&self, target: &Target, cursor: &str) -> String {
        let mut words = vec![program(), "tail".to_owned()];
        words.extend(self.tables.iter().map(|table| quoted(table)));
        let mut option = |name: &str, value: &str| words.extend([name.to_owned(), quoted(value)]);
        if let Some(filter) = &self.filter {
            option("--where", filter);
        }
        if !self.ops.is_empty() {
            option("--op", &self.ops.join(","));
        }
        if !self.columns.is_empty() {
            option("--columns", &self.columns.join(","));
        }
        match &target.dev {
            Some(name) => option("--dev", name),
            None => option("--url", &target.urls.join(",")),
        }
        if let Some(path) = &self.key_file {
            option("--key-file", &path.to_string_lossy());
        }
        if let Some(attempts) = self.attempts {
            option("--attempts", &attempts.to_string());
        }
        if let Some(count) = self.count {
            option("--count", &count.to_string());
        }
        option("--from", cursor);
        if self.key.is_some() && self.key_file.is_none() {
            words.push(r#"--key "$TIDEWIRE_KEY""#.to_owned());
        }
        words.extend(self.json.then(|| "--json".to_owned()));
        words.extend(self.no_color.as_ref().filter(|value| !value.is_empty()).map(|_| "--no-color".to_owned()));
        words.join(" ")
    }

    fn paint(&self, terminal: bool) -> Paint {
        Paint(terminal && self.no_color.as_deref().is_none_or(str::is_empty))
    }
}

/// Where a tail connects.
struct Target {
    urls: Vec<String>,
    key: String,
    /// The `tidewire dev` that it is.
    dev: Option<String>,
}

impl Target {
    fn connect_options(&self, attempts: Option<u32>) -> anyhow::Result<ConnectOptions> {
        let mut urls = self.urls.iter();
        let first = urls.next().context("no address: give --url")?;
        let options = urls.fold(ConnectOptions::new(first), ConnectOptions::or).key(&self.key);
        Ok(attempts.map_or_else(|| options.clone(), |attempts| options.clone().attempts(attempts)))
    }

    /// For people.
    fn described(&self) -> String {
        // An address may hold a password, which the client refuses later.
        let urls: Vec<_> = self.urls.iter().map(|url| url.rsplit('@').next().unwrap_or_default()).collect();
        match &self.dev {
            Some(name) => format!("`tidewire dev` {name}: {}", urls.join(", ")),
            None => urls.join(", "),
        }
    }
}

/// Runs until Ctrl-C, `--count`, or an error that trying again does not mend.
///
/// # Errors
/// The text says the cause and what to do.
pub async fn run(args: TailArgs) -> anyhow::Result<()> {
    let target = args.target()?;
    say_target(Reader::of(args.json), &target.described());
    let client = Client::connect(target.connect_options(args.attempts)?).await.map_err(explain)?;
    let subscription = client.subscribe(args.subscribe_options()).await.map_err(explain)?;
    let node = client.server().map_or_else(String::new, |server| server.node);
    let mut tail = Tail {
        stdout_paint: args.paint(std::io::stdout().is_terminal()),
        stderr_paint: args.paint(std::io::stderr().is_terminal()),
        left: args.count.unwrap_or(u64::MAX),
        replay: None,
        printed: None,
        args,
    };
    let source = subscription.source();
    tail.news(&format!("subscribed on {node} after {} ({})", subscription.position(), source.as_str()));
    tail.replay = Some(Replay { source: source.as_str(), events: 0, resumed: false });
    let mut frames = subscription.into_frames();
    let outcome = tail.follow(&mut frames).await;
    let cursor = tail.printed.unwrap_or_else(|| frames.position()).to_string();
    tail.news(&format!("last cursor {cursor}; go on with:"));
    eprintln!("{}", tail.args.continuation(&target, &cursor));
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
    /// After the last event that was printed, where `--count` ended amid a frame.
    printed: Option<Cursor>,
}

/// Whether to go on.
enum Flow {
    GoOn,
    /// `--count` is reached; what was printed is handled.
    Full,
    /// Nobody reads standard output any more.
    ReaderGone,
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
                Flow::Full => {
                    frames.ack();
                    return Ok(());
                }
                // Who knows what the reader took: rather some events twice than one never.
                Flow::ReaderGone => return Ok(()),
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
        let (now, limit) = (Utc::now(), usize::try_from(self.left).unwrap_or(usize::MAX));
        let lines: Vec<String> = if self.args.json {
            let events: Vec<&RawValue> = serde_json::from_str(frame.events_text()).context("an event is no JSON")?;
            events.iter().take(limit).map(|event| event.get().to_owned()).collect()
        } else {
            let events = frame.parse().context("an event is not what this version can read: update tidewire")?;
            events.iter().take(limit).map(|event| event_line(event, now, self.stdout_paint)).collect()
        };
        let shown = lines.len() as u64;
        if let Some(replay) = &mut self.replay {
            replay.events += shown;
        }
        self.left -= shown;
        let out: String = lines.into_iter().flat_map(|line| [line, "\n".to_owned()]).collect();
        let mut stdout = std::io::stdout().lock();
        if stdout.write_all(out.as_bytes()).and_then(|()| stdout.flush()).is_err() {
            // The reader of the pipe has gone: `head` got its lines.
            return Ok(Flow::ReaderGone);
        }
        if self.left > 0 {
            return Ok(Flow::GoOn);
        }
        self.printed = Some(cursor_after(frame, limit)?);
        Ok(Flow::Full)
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

/// The position after the frame's first `printed` events.
///
/// A position is the epoch, the seq and a check over both and the event's id ([`Cursor::at`]). Where a new epoch began
/// within the frame, an event does not say of which it is: the position before the frame, and some come twice.
fn cursor_after(frame: &Frame, printed: usize) -> anyhow::Result<Cursor> {
    let events = frame.parse().context("an event is not what this version can read: update tidewire")?;
    if events.len() <= printed {
        return Ok(frame.cursor());
    }
    let before = frame.prev().filter(|prev| prev.epoch != frame.cursor().epoch);
    match (before, printed.checked_sub(1).and_then(|last| events.get(last))) {
        (Some(before), _) => Ok(before),
        (None, Some(last)) => Ok(Cursor::at(frame.cursor().epoch, last.seq, last.id)),
        (None, None) => frame.prev().context("a frame without a position before it"),
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

    fn target(dev: Option<&str>) -> Target {
        Target {
            urls: vec!["http://a:1".to_owned(), "http://b:2".to_owned()],
            key: "cdc_secret".to_owned(),
            dev: dev.map(str::to_owned),
        }
    }

    /// Found in use: the line that was printed dropped --url and --json, among others.
    #[test]
    fn the_continuation_is_the_same_command_from_the_cursor() {
        let program = program();
        for (words, dev, want) in [
            (
                &["public.orders", "--where", "note = 'it''s'", "--op", "insert,UPDATE"][..],
                None,
                r"public.orders --where 'note = '\''it'\'''\''s'\''' --op insert,UPDATE --url http://a:1,http://b:2 --from 1-2",
            ),
            (&["a", "event:*", "--json"], Some("blue"), "a 'event:*' --dev blue --from 1-2 --json"),
            (
                &["a", "--columns", "b c,d", "--count", "5", "--attempts", "2", "--key", "cdc_secret", "--no-color"],
                None,
                r#"a --columns 'b c,d' --url http://a:1,http://b:2 --attempts 2 --count 5 --from 1-2 --key "$TIDEWIRE_KEY" --no-color"#,
            ),
            (
                &["a", "--key-file", "/my keys/x"],
                None,
                "a --url http://a:1,http://b:2 --key-file '/my keys/x' --from 1-2",
            ),
        ] {
            let line = parse(words).continuation(&target(dev), "1-2");
            assert_eq!(line, format!("{program} tail {want}"));
        }
    }

    #[test]
    fn no_color_is_respected_when_it_is_not_empty() {
        assert!(parse(&["t", "--no-color="]).paint(true).0);
        assert!(!parse(&["t", "--no-color"]).paint(true).0);
        assert!(!parse(&["t", "--no-color="]).paint(false).0);
    }
}
