//! A client process: subscribes through the balancer, records what its handlers see, and now and then ends and begins
//! again from a cursor that it saved.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tidewire::client::{
    Batch, Client, ClientError, ConnectOptions, Cursor, Disconnect, ErrorCode, Event, Frame, Frames, Item, Resync,
    Source, SubscribeOptions, Subscription, Transition,
};
use tokio::time::{Instant, sleep, sleep_until};

use super::want::{ClientPlan, Habit};
use super::{Position, Shared};
use crate::history::{Content, Delivered, Record, Want, fingerprint};

/// A process that restarts lives between these.
const LIFE: std::ops::Range<u64> = 5_000..40_000;
/// Between the end of a process and the next one, or between two attempts of a first connection.
const PAUSE: Duration = Duration::from_millis(200);
/// Clients begin within this time, so that a run does not begin with a storm.
const BEGIN: u64 = 2_000;
/// Progress is recorded this often at most: the checker needs the promise, not every repetition.
const PROGRESS: Duration = Duration::from_secs(1);
/// A process that forgot what it handled last begins so many batches earlier at most.
const OLDER: usize = 50;

/// How to reach the cluster.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub(super) url: String,
    pub(super) api_key: String,
}

pub(super) async fn live(plan: ClientPlan, way: Way, shared: Arc<Shared>) {
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let end = shared.clients_end.clone();
    let mut saved: Vec<Option<Cursor>> = vec![None; plan.wants.len()];
    end.run_until_cancelled(sleep(Duration::from_millis(rng.random_range(0..BEGIN)))).await;
    while !end.is_cancelled() {
        let options = ConnectOptions::new(&way.url).key(&way.api_key).unlimited_attempts();
        let client = match end.run_until_cancelled(Client::connect(options)).await {
            Some(Ok(client)) => client,
            Some(Err(error)) => {
                if let Some(code) = refusal(&error) {
                    refuse(&plan, &shared, code, &error);
                    return;
                }
                end.run_until_cancelled(sleep(PAUSE)).await;
                continue;
            }
            None => break,
        };
        let life = match plan.habit {
            Habit::Stays => None,
            _ => Some(Instant::now() + Duration::from_millis(rng.random_range(LIFE))),
        };
        let each = plan.wants.iter().zip(&saved).enumerate().map(|(n, (want, saved))| {
            let handler = Handler {
                client: plan.client,
                n: u32::try_from(n).unwrap_or(u32::MAX),
                want: want.clone(),
                shared: Arc::clone(&shared),
                life,
                older: plan.habit == Habit::RestartsFromOlder,
                recent: Vec::new(),
            };
            handler.listen(client.clone(), *saved)
        });
        saved = futures_util::future::join_all(each).await;
        if plan.habit == Habit::Forgets {
            saved.fill(None);
        }
        drop(client);
        end.run_until_cancelled(sleep(PAUSE)).await;
    }
}

/// The server refuses for good: the code, or the status.
fn refusal(error: &ClientError) -> Option<u16> {
    match error {
        ClientError::Closed { code, .. } => Some(*code),
        ClientError::Rejected { status, .. } => Some(*status),
        _ => None,
    }
}

fn refuse(plan: &ClientPlan, shared: &Shared, code: u16, error: &ClientError) {
    for _ in &plan.wants {
        let s = shared.next_subscription.fetch_add(1, Ordering::Relaxed);
        shared.recorder.record(Record::Refused { s, code: Some(code), error: error.to_string() });
    }
}

struct Handler {
    client: u32,
    n: u32,
    want: Want,
    shared: Arc<Shared>,
    life: Option<Instant>,
    older: bool,
    recent: Vec<Cursor>,
}

impl Handler {
    /// Listens until the process ends; returns the cursor that it saved.
    async fn listen(mut self, client: Client, mut from: Option<Cursor>) -> Option<Cursor> {
        loop {
            let s = self.shared.next_subscription.fetch_add(1, Ordering::Relaxed);
            let record = Record::Subscribe { s, client: self.client, want: self.want.clone(), from };
            self.shared.recorder.record(record);
            self.position(s, from, false);
            let mut options = SubscribeOptions::tables(self.want.tables.clone());
            if let Some(filter) = &self.want.filter {
                options = options.filter(filter);
            }
            if let Some(ops) = &self.want.ops {
                options = options.ops(ops.clone());
            }
            if let Some(from) = from {
                options = options.from(from);
            }
            let subscribed = tokio::select! {
                subscribed = client.subscribe(options) => subscribed,
                () = self.over() => return from,
            };
            match subscribed {
                Ok(subscription) => match self.follow(s, &client, subscription).await {
                    Next::Ended(saved) => return saved,
                    Next::FromNow => from = None,
                },
                Err(ClientError::Resync(resync)) => {
                    self.resync(s, &resync, from);
                    from = None;
                }
                // The connection was lost before the answer, or the node has lost Postgres: asked again.
                Err(ClientError::Interrupted(_) | ClientError::TimedOut(_)) => sleep(PAUSE).await,
                Err(ClientError::Refused(error)) if error.code == ErrorCode::Unavailable => sleep(PAUSE).await,
                Err(error) => {
                    self.shared.recorder.record(Record::Refused { s, code: refusal(&error), error: error.to_string() });
                    self.shared.positions.lock().entry((self.client, self.n)).and_modify(|at| at.ended = true);
                    return from;
                }
            }
        }
    }

    /// The end of the run, or of this process.
    async fn over(&self) {
        let life = async {
            match self.life {
                Some(life) => sleep_until(life).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.shared.clients_end.cancelled() => {}
            () = life => {}
        }
    }

    async fn follow(&mut self, s: u32, client: &Client, subscription: Subscription) -> Next {
        let first = subscription.position();
        let node = client.server().map(|welcome| welcome.node);
        let source = source(subscription.source());
        let mut subscription = Feed::of(subscription, self.client);
        self.shared.recorder.record(Record::Subscribed { s, cursor: first, source, node });
        self.position(s, Some(first), true);
        let mut progress = None;
        loop {
            let item = tokio::select! {
                item = subscription.next() => item,
                () = self.over() => {
                    // What `next` has handed out was handled: recorded at once, below.
                    subscription.ack();
                    let position = subscription.position();
                    self.shared.recorder.record(Record::Stop { s, position });
                    return Next::Ended(Some(self.saved(position)));
                }
            };
            match item {
                Some(Ok(Item::Resync(resync))) => {
                    let position = subscription.position();
                    self.resync(s, &resync, Some(position));
                    return Next::FromNow;
                }
                Some(Ok(item)) => self.note(s, item, &mut progress, client),
                Some(Err(error)) => {
                    let record = Record::Refused { s, code: refusal(&error), error: error.to_string() };
                    self.shared.recorder.record(record);
                    return Next::Ended(Some(subscription.position()));
                }
                None => return Next::Ended(Some(subscription.position())),
            }
        }
    }

    fn note(&mut self, s: u32, item: Item, progress: &mut Option<Instant>, client: &Client) {
        let record = match item {
            Item::Batch(Batch { events, cursor, open }) => {
                self.shared.delivered.fetch_add(events.len() as u64, Ordering::Relaxed);
                self.position(s, Some(cursor), true);
                if self.older {
                    if self.recent.len() >= OLDER {
                        self.recent.remove(0);
                    }
                    self.recent.push(cursor);
                }
                Record::Deliver { s, e: events.iter().map(delivered).collect(), cursor, open }
            }
            Item::CaughtUp { cursor } => {
                self.position(s, Some(cursor), true);
                Record::CaughtUp { s, cursor }
            }
            Item::Progress { cursor } => {
                self.position(s, Some(cursor), true);
                if progress.is_some_and(|last| last.elapsed() < PROGRESS) {
                    return;
                }
                *progress = Some(Instant::now());
                Record::Progress { s, cursor }
            }
            Item::Disconnected { cause, .. } => {
                self.shared.positions.lock().entry((self.client, self.n)).and_modify(|at| at.connected = false);
                let (code, status) = match &cause {
                    Disconnect::Closed { code, .. } => (Some(*code), None),
                    Disconnect::Http { status, .. } => (None, Some(*status)),
                    _ => (None, None),
                };
                Record::Disconnected { s, code, status, cause: cause.to_string() }
            }
            Item::Resumed(resumed) => {
                self.shared.positions.lock().entry((self.client, self.n)).and_modify(|at| at.connected = true);
                let node = client.server().map(|welcome| welcome.node);
                Record::Resumed { s, source: source(resumed.source), node }
            }
            _ => return,
        };
        self.shared.recorder.record(record);
    }

    fn resync(&self, s: u32, resync: &Resync, position: Option<Cursor>) {
        let position = position.unwrap_or(Cursor::origin(0));
        let (reason, message) = (resync.reason.as_str().to_owned(), resync.message.clone());
        self.shared.recorder.record(Record::Resync { s, reason, position, message });
    }

    fn position(&self, s: u32, cursor: Option<Cursor>, connected: bool) {
        let mut positions = self.shared.positions.lock();
        match positions.get_mut(&(self.client, self.n)) {
            Some(at) => {
                at.s = s;
                at.cursor = cursor;
                at.connected = connected;
            }
            None => {
                let want = self.want.clone();
                let at = Position { s, client: self.client, cursor, connected, ended: false, want };
                positions.insert((self.client, self.n), at);
            }
        }
    }

    /// What the process had saved when it ended.
    fn saved(&self, position: Cursor) -> Cursor {
        if self.older { self.recent.first().copied().unwrap_or(position) } else { position }
    }
}

/// A subscription as applications read it, or frame by frame. The former drops what lies at or below the position, which
/// the server must never send: so most read the latter, to see it.
enum Feed {
    Batches(Subscription),
    Frames(Frames),
}

impl Feed {
    fn of(subscription: Subscription, client: u32) -> Self {
        if client.is_multiple_of(4) { Self::Batches(subscription) } else { Self::Frames(subscription.into_frames()) }
    }

    async fn next(&mut self) -> Option<Result<Item, ClientError>> {
        match self {
            Self::Batches(subscription) => subscription.next().await,
            Self::Frames(frames) => Some(frames.next().await?.and_then(parsed)),
        }
    }

    fn ack(&mut self) {
        match self {
            Self::Batches(subscription) => subscription.ack(),
            Self::Frames(frames) => frames.ack(),
        }
    }

    fn position(&self) -> Cursor {
        match self {
            Self::Batches(subscription) => subscription.position(),
            Self::Frames(frames) => frames.position(),
        }
    }
}

/// With all events of the frame.
fn parsed(item: Item<Frame>) -> Result<Item, ClientError> {
    Ok(match item {
        Item::Batch(frame) => {
            let unreadable = |error: serde_json::Error| ClientError::Unreadable {
                after: frame.prev().map_or_else(String::new, |cursor| cursor.to_string()),
                reason: error.to_string(),
            };
            Item::Batch(Batch {
                events: frame.parse().map_err(unreadable)?,
                cursor: frame.cursor(),
                open: frame.open(),
            })
        }
        Item::CaughtUp { cursor } => Item::CaughtUp { cursor },
        Item::Progress { cursor } => Item::Progress { cursor },
        Item::Disconnected { cause, retry_in } => Item::Disconnected { cause, retry_in },
        Item::Resumed(resumed) => Item::Resumed(resumed),
        Item::Resync(resync) => Item::Resync(resync),
        other => {
            let (after, reason) = (String::new(), format!("an item of a later client: {other:?}"));
            return Err(ClientError::Unreadable { after, reason });
        }
    })
}

/// How a subscription ended.
enum Next {
    /// With its process.
    Ended(Option<Cursor>),
    /// The server cannot resume it.
    FromNow,
}

fn source(source: Source) -> String {
    source.as_str().to_owned()
}

fn delivered(event: &Event) -> Delivered {
    let content = Content {
        event_id: event.id,
        table: &event.table,
        op: event.op.as_str(),
        tx: &event.tx,
        tx_end: event.tx_end,
        key: event.key.text(),
        before: event.before.text(),
        after: event.after.text(),
    };
    let transition = event.transition.map(|transition| {
        match transition {
            Transition::Enter => "enter",
            Transition::Leave => "leave",
            Transition::Unknown => "unknown",
        }
        .to_owned()
    });
    Delivered(event.seq, fingerprint(&content), transition)
}
