//! The feed silent, doubled, forged, and its queue held: F17, F26.

use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::{Rng, RngExt};
use sqlx::postgres::PgListener;
use sqlx::{Executor as _, PgConnection};
use tidewire::event::{Event, NewEvent, Operation};
use tidewire::feed::chunk;
use tokio::time::Instant;
use uuid::Uuid;

use super::act::{Act, Role, until};
use super::connections;

const CHANNEL: &str = "tidewire_feed";
/// Chunks that are kept for sending again.
const KEPT_CHUNKS: usize = 512;
/// Between two forged chunks.
const FORGED_EVERY: Duration = Duration::from_millis(25);
/// How much later a replayed chunk comes again.
const REPLAY_AFTER: Duration = Duration::from_secs(1);
/// Positions after the head that are forged at once: the log has gone on by some of them before the first is heard, and a
/// node takes only what follows on what it has.
const FORGED_AHEAD: i64 = 24;

/// F17, F26.
pub(super) async fn trouble(act: &mut Act<'_>) -> anyhow::Result<()> {
    match act.fault.variant.as_str() {
        "silent" => silent(act).await,
        "duplicated" => again(act, Duration::ZERO).await,
        "replayed" => again(act, REPLAY_AFTER).await,
        "forged" => forged(act).await,
        _ => queue_held(act).await,
    }
}

/// Postgres's side of a follower's LISTEN connection is stopped: the socket stands, and nothing comes.
async fn silent(act: &mut Act<'_>) -> anyhow::Result<()> {
    let node = act.claim(Role::Follower).await?;
    let mut connection = act.cluster().admin().await?;
    let listeners = connections::listeners(&mut connection).await?;
    let backend = listeners.iter().find(|backend| backend.node == node.name()).context("its LISTEN connection")?.pid;
    act.on(&format!("the LISTEN connection of {}", node.name()));
    let stopped = Stopped::new(backend)?;
    act.took = true;
    let found = until(act.until(), || another_listener(act, node.name(), backend)).await;
    if let Some(after) = found {
        act.micros("found_us", after);
    }
    act.hold().await;
    drop(stopped);
    act.off();
    Ok(())
}

async fn another_listener(act: &Act<'_>, node: &str, old: i32) -> bool {
    let Ok(mut connection) = act.cluster().admin().await else { return false };
    let listeners = connections::listeners(&mut connection).await.unwrap_or_default();
    listeners.iter().any(|backend| backend.node == node && backend.pid != old)
}

/// A backend of our own Postgres that stands still until this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(backend: i32) -> anyhow::Result<Self> {
        let pid = Pid::from_raw(backend);
        kill(pid, Signal::SIGSTOP)?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Gone already if its Postgres was killed meanwhile.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Real chunks come a second time.
async fn again(act: &mut Act<'_>, after: Duration) -> anyhow::Result<()> {
    let url = act.cluster().primary().borrow().clone();
    let mut listener = PgListener::connect(&url).await?;
    listener.listen(CHANNEL).await?;
    let mut connection = act.cluster().admin().await?;
    act.on(CHANNEL);
    let mut own = std::collections::BTreeSet::new();
    let mut waiting = std::collections::VecDeque::new();
    let mut sent = 0_u32;
    while let Ok(heard) = tokio::time::timeout_at(act.until(), listener.recv()).await {
        let payload = heard?.payload().to_owned();
        // What was sent from here is heard here too.
        if waiting.len() < KEPT_CHUNKS && !own.remove(&payload) {
            waiting.push_back((Instant::now() + after, payload));
        }
        while let Some((_, payload)) = waiting.pop_front_if(|(due, _)| *due <= Instant::now()) {
            notify(&mut connection, &payload).await?;
            own.insert(payload);
            sent += 1;
        }
    }
    act.took = sent > 0;
    act.figure("sent_chunks", f64::from(sent));
    act.off();
    Ok(())
}

async fn notify(connection: &mut PgConnection, payload: &str) -> anyhow::Result<()> {
    sqlx::query("SELECT pg_notify($1, $2)").bind(CHANNEL).bind(payload).execute(connection).await?;
    Ok(())
}

/// Invented chunks: well formed, of the true epoch and term, at the true place; and nonsense.
async fn forged(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut connection = act.cluster().admin().await?;
    let refused = refused_chunks(act).await;
    act.on(CHANNEL);
    let mut sent = 0_usize;
    while Instant::now() < act.until() {
        let (term, epoch, head): (i64, i32, i64) = sqlx::query_as(
            "SELECT term, epoch, (SELECT coalesce(max(seq), 0) FROM tidewire.event_log)
             FROM tidewire.terms ORDER BY term DESC LIMIT 1",
        )
        .fetch_one(&mut connection)
        .await?;
        let payloads = invent(act, epoch, term, head);
        sqlx::query("SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload")
            .bind(CHANNEL)
            .bind(&payloads)
            .execute(&mut connection)
            .await?;
        sent += payloads.len();
        tokio::time::sleep(FORGED_EVERY).await;
    }
    act.figure("sent_chunks", sent as f64);
    let now = refused_chunks(act).await;
    act.figure("refused_chunks", now - refused);
    act.took = sent > 0 && now > refused;
    act.off();
    Ok(())
}

fn invent(act: &mut Act<'_>, epoch: i32, term: i64, head: i64) -> Vec<String> {
    let nonce: u32 = act.random.random();
    let body: String =
        (0..64).map(|_| char::from(b'A' + u8::try_from(act.random.random_range(0..26)).unwrap_or(0))).collect();
    let (first, last) = (head + 1, head + act.random.random_range(1..4));
    let one = match act.random.next_u32() % 6 {
        0 => format!("1.{epoch}.{term}.{first}.{last}.e.{nonce}.{body}"),
        5 => {
            let at = |seq| format!("1.{epoch}.{term}.{seq}.{seq}.e.{nonce}.{}", unsealed(seq, nonce));
            return (first..=head + FORGED_AHEAD).map(at).collect();
        }
        1 => format!("1.{epoch}.{term}.{first}.{}.r.{nonce}.{body}", last + 1_000_000),
        2 => format!("1.{epoch}.{term}.{}.{}.h.{nonce}.{body}", 0, last + 1_000_000),
        3 => format!("1.{}.{}.{first}.{last}.e.{nonce}.{body}", epoch + 1, term + 1),
        _ => body,
    };
    vec![one]
}

/// An event that would pass, but for the seal: whoever made this knows everything of the format, and not the key.
fn unsealed(seq: i64, nonce: u32) -> String {
    let row = format!(r#"{{"id":0,"val":"forged-{nonce}","prev":null,"w":1}}"#);
    let new = NewEvent {
        event_id: Uuid::new_v4(),
        table: "public.notes",
        operation: Operation::Insert,
        key: Some(r#"{"id":0}"#),
        old_key: None,
        before: None,
        after: Some(&row),
        event_type: None,
        headers: None,
        xid: u64::from(nonce),
        created_at: chrono::Utc::now(),
        omitted: false,
    };
    let mut body = String::new();
    new.compose(&mut body);
    let event = Event {
        seq: seq.cast_unsigned(),
        id: new.event_id,
        xid: new.xid,
        operation: new.operation,
        tx_end: true,
        omitted: false,
        table: new.table.into(),
        body: body.into(),
    };
    chunk::encode_events(&[event]).map(|bytes| STANDARD_NO_PAD.encode(bytes)).unwrap_or_default()
}

/// Chunks that the nodes did not believe, so far.
async fn refused_chunks(act: &Act<'_>) -> f64 {
    let mut sum = 0.0;
    for node in act.cluster().nodes() {
        for outcome in ["refused", "foreign"] {
            let name = format!("tidewire_feed_chunks_total{{outcome=\"{outcome}\"}}");
            sum += node.metric(&name).await.unwrap_or_default();
        }
    }
    sum
}

/// A session that listens and then idles in a transaction: Postgres cannot clean its notification queue.
async fn queue_held(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut holder = act.cluster().admin().await?;
    act.on("the notification queue");
    // In one message: between two, notifications would come, which a plain connection does not expect.
    holder.execute("BEGIN; LISTEN tidewire_feed; COMMIT; BEGIN; SELECT count(*) FROM tidewire.epochs").await?;
    act.hold().await;
    let mut other = act.cluster().admin().await?;
    let used: f64 = sqlx::query_scalar("SELECT pg_notification_queue_usage()").fetch_one(&mut other).await?;
    act.figure("queue_permille", used * 1_000.0);
    act.took = used > 0.0;
    // Its end is the heal. Asked for anything more, it would get what has gathered first.
    drop(holder);
    act.off();
    Ok(())
}
