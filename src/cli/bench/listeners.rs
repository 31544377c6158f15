//! Many subscribers in one process: connected side by side, each reading in a task of its own.

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::task::JoinSet;

use super::bar;
use super::cluster::Cluster;
use crate::client::{Client, Frame, Frames, Item};

/// Handshakes at once: enough to keep the node busy, too few to overflow its accept queue.
const CONNECTING: usize = 64;

/// Connects `count` subscribers to the nodes at `urls` in turn.
pub(super) async fn connect(
    cluster: &Cluster,
    urls: &[String],
    count: usize,
    table: &str,
    read_buffer_bytes: usize,
) -> anyhow::Result<Vec<(Client, Frames)>> {
    let bar = bar(u64::try_from(count)?, "connecting");
    let one = |number: usize| {
        let url = urls[number % urls.len()].clone();
        let bar = bar.clone();
        async move {
            let listener = cluster.listen(&url, table, read_buffer_bytes).await?;
            bar.inc(1);
            anyhow::Ok(listener)
        }
    };
    let listeners = stream::iter(0..count).map(one).buffer_unordered(CONNECTING).try_collect().await;
    bar.finish_and_clear();
    listeners
}

/// Reads them all; `heard` is called with each frame, in the listener's task. A lost connection ends the bench: what is
/// measured is the undisturbed run.
pub(super) fn read<F>(listeners: Vec<(Client, Frames)>, heard: impl Fn(usize) -> F) -> JoinSet<anyhow::Error>
where
    F: FnMut(&Frame) + Send + 'static,
{
    let mut tasks = JoinSet::new();
    for (number, (client, mut frames)) in listeners.into_iter().enumerate() {
        let mut heard = heard(number);
        tasks.spawn(async move {
            let _client = client;
            loop {
                match frames.next().await {
                    Some(Ok(Item::Batch(frame))) => heard(&frame),
                    Some(Ok(Item::Disconnected { cause, .. })) => {
                        return anyhow::anyhow!("a subscriber was cut off: {cause}");
                    }
                    Some(Ok(Item::Resync(resync))) => {
                        return anyhow::anyhow!("a subscriber must resync: {}", resync.message);
                    }
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return error.into(),
                    None => return anyhow::anyhow!("a subscription ended"),
                }
            }
        });
    }
    tasks
}

/// The first trouble of any listener; waits for ever where there is none.
pub(super) async fn trouble(tasks: &mut JoinSet<anyhow::Error>) -> anyhow::Error {
    match tasks.join_next().await {
        Some(Ok(error)) => error,
        Some(Err(error)) => error.into(),
        None => std::future::pending().await,
    }
}

/// The clock that the writer read in each INSERT of the frame, microseconds since 1970: the payload's `at`.
pub(super) fn written_at(frame: &Frame) -> impl Iterator<Item = i64> + '_ {
    const MARK: &[u8] = b"\"at\" : ";
    let text = frame.text().as_bytes();
    memchr::memmem::find_iter(text, MARK).filter_map(move |at| {
        let digits = &text[at + MARK.len()..];
        let end = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
        std::str::from_utf8(&digits[..end]).ok()?.parse().ok()
    })
}

/// How many of the bench's events the frame holds, by the same mark: the cheapest exact count of what we wrote ourselves.
pub(super) fn written(frame: &Frame) -> usize {
    memchr::memmem::find_iter(frame.text().as_bytes(), b"\"at\" : ").count()
}
