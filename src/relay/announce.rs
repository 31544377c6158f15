//! The feed's sender: one task and one connection for a term.
//!
//! It never holds the relay up: what it cannot send is read from the log. And it never hurts the database: the
//! notification queue is shared by the whole cluster and pinned by any session that stays in a transaction after LISTEN.
//! From [`RANGES_ONLY_PERMILLE`] of it in use only ranges are sent, from [`SILENT_PERMILLE`] nothing, and the relay does
//! not park, so that writers never notify.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgConnection;
use tokio::sync::{mpsc, watch};

use crate::event::Event;
use crate::failpoint;
use crate::feed::chunk::ChunkError;
use crate::feed::seal::Sealer;
use crate::telemetry::metrics::{Metrics, gauge};

/// The feed's channel.
pub(crate) const FEED_CHANNEL: &str = "tidewire_feed";
/// An idle leader is heard this often.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// From this use of the notification queue on, only ranges are announced.
const RANGES_ONLY_PERMILLE: i64 = 20;
/// From this use on, nothing is.
const SILENT_PERMILLE: i64 = 200;
/// Batches sent in one transaction.
const MAX_COALESCED: usize = 4;
/// Longest wait for one announcement.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// What was committed by one claim.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) events: Vec<Event>,
}

/// Why announcing ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum AnnounceError {
    #[error(transparent)]
    Postgres(#[from] sqlx::Error),
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    #[error("no answer for {SEND_TIMEOUT:?}")]
    Silence,
}

pub(super) struct Announcer {
    pub(super) connection: PgConnection,
    pub(super) sealer: Sealer,
    pub(super) batches: mpsc::Receiver<Batch>,
    pub(super) may_park: watch::Sender<bool>,
    pub(super) channels: watch::Receiver<Arc<HashMap<Arc<str>, String>>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) newest: u64,
    pub(super) queue_permille: i64,
}

impl Announcer {
    /// Announces until the relay is gone.
    pub(super) async fn run(&mut self) -> Result<(), AnnounceError> {
        self.beat().await?;
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                _ = heartbeat.tick() => self.beat().await?,
                batch = self.batches.recv() => match batch {
                    Some(batch) => self.send(batch).await?,
                    None => return Ok(()),
                }
            }
        }
    }

    async fn send(&mut self, batch: Batch) -> Result<(), AnnounceError> {
        let mut batches = vec![batch];
        while batches.len() < MAX_COALESCED
            && let Ok(more) = self.batches.try_recv()
        {
            batches.push(more);
        }
        // Also when it shrinks: the sender looks only when it adds.
        self.metrics.feed_backlog_batches.set(gauge(self.batches.len()));
        let (mut channels, mut payloads) = (Vec::new(), Vec::new());
        for Batch { events } in &batches {
            let (Some(first), Some(last)) = (events.first(), events.last()) else { continue };
            self.newest = last.seq;
            let chunks = match self.queue_permille {
                ..RANGES_ONLY_PERMILLE => self.chunks(events)?,
                RANGES_ONLY_PERMILLE..SILENT_PERMILLE => vec![self.sealer.range(first.seq, last.seq)?],
                _ => continue,
            };
            channels.extend(chunks.iter().map(|_| FEED_CHANNEL.to_owned()));
            payloads.extend(chunks);
            self.add_public(events, &mut channels, &mut payloads);
        }
        self.notify(&channels, &payloads).await
    }

    /// Chunks of events, and ranges of those whose bodies the claim did not keep.
    fn chunks(&mut self, events: &[Event]) -> Result<Vec<String>, ChunkError> {
        let mut chunks = Vec::new();
        for run in events.chunk_by(|a, b| a.body.is_empty() == b.body.is_empty()) {
            match run {
                [first, ..] if first.body.is_empty() => {
                    let last = run.last().map_or(first.seq, |event| event.seq);
                    chunks.push(self.sealer.range(first.seq, last)?);
                }
                _ => chunks.extend(self.sealer.events(run)?),
            }
        }
        Ok(chunks)
    }

    /// One small notification for each table with a public channel: plain LISTEN users.
    fn add_public(&self, events: &[Event], channels: &mut Vec<String>, payloads: &mut Vec<String>) {
        let public = self.channels.borrow();
        if public.is_empty() {
            return;
        }
        let mut seen: HashMap<&str, (u64, u64, usize)> = HashMap::new();
        for event in events {
            if let Some(channel) = public.get(&event.table) {
                let entry = seen.entry(channel).or_insert((event.seq, event.seq, 0));
                *entry = (entry.0, event.seq, entry.2 + 1);
            }
        }
        for (channel, (first, last, count)) in seen {
            channels.push(channel.to_owned());
            payloads.push(format!(r#"{{"first":{first},"last":{last},"count":{count}}}"#));
        }
    }

    async fn beat(&mut self) -> Result<(), AnnounceError> {
        let asked =
            sqlx::query_scalar::<_, f64>("SELECT pg_notification_queue_usage()").fetch_one(&mut self.connection);
        let used = tokio::time::timeout(SEND_TIMEOUT, asked).await.map_err(|_| AnnounceError::Silence)??;
        self.queue_permille = (used * 1000.0) as i64;
        self.metrics.notify_queue_permille.set(self.queue_permille);
        let roomy = self.queue_permille < SILENT_PERMILLE;
        self.may_park.send_if_modified(|may_park| std::mem::replace(may_park, roomy) != roomy);
        if roomy {
            let payload = self.sealer.heartbeat(self.newest)?;
            self.notify(&[FEED_CHANNEL.to_owned()], &[payload]).await?;
        }
        Ok(())
    }

    async fn notify(&mut self, channels: &[String], payloads: &[String]) -> Result<(), AnnounceError> {
        // Lost on the way, as far as anybody can tell.
        if payloads.is_empty() || failpoint::hit("relay.announce").await.is_err() {
            return Ok(());
        }
        let sent = sqlx::query(
            "SELECT pg_notify(channel, payload)
             FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS chunk (channel, payload, position)
             ORDER BY position",
        )
        .bind(channels)
        .bind(payloads)
        .execute(&mut self.connection);
        match tokio::time::timeout(SEND_TIMEOUT, sent).await.map_err(|_| AnnounceError::Silence)? {
            Ok(_) => self.metrics.feed_sent_chunks_total.inc_by(payloads.len() as u64),
            // A full queue, say: nothing is lost, the nodes read the log; silent until the next heartbeat looks again.
            Err(sqlx::Error::Database(error)) if error.code().as_deref() != Some("57P01") => {
                tracing::warn!(%error, "an announcement was refused; nodes read the log");
                self.queue_permille = SILENT_PERMILLE;
                let _ = self.may_park.send(false);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}
