//! Which chunks of the feed are believed, and what is done with them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bytes::Bytes;

use super::Follower;
use crate::cursor::{Epoch, Seq};
use crate::feed::chunk::{ChunkError, Header, Kind, decode_events};
use crate::feed::seal::FeedKey;
use crate::log::incarnation::term_key;
use crate::mutant::{self, Mutant};
use crate::telemetry::metrics::gauge;

/// Keys of terms that are kept.
const MAX_KEYS: usize = 16;
/// An unknown term is asked for at most this often: forged chunks must not become queries.
const KEY_LOOKUP_INTERVAL: Duration = Duration::from_millis(100);

impl Follower {
    /// Some: the log is to be read.
    pub(super) async fn chunk(&mut self, pid: u32, payload: &str) -> Option<&'static str> {
        let count = |outcome| self.metrics.feed_chunks_total.with_label_values(&[outcome]).inc();
        let Ok((header, text, sealed)) = Header::parse(payload) else {
            count("refused");
            return None;
        };
        let Some(key) = self.key(&header, pid).await else {
            self.metrics.feed_chunks_total.with_label_values(&["foreign"]).inc();
            return None;
        };
        let Ok(body) = opened(&key, &header, text, sealed) else {
            self.metrics.feed_chunks_total.with_label_values(&["refused"]).inc();
            return None;
        };
        self.heard = Instant::now();
        let newest = self.hub.high_water();
        let epoch = self.hub.epochs().newest();
        if says_more(&header, epoch, newest) {
            self.metrics.term.set(header.term.cast_signed());
            self.metrics.log_newest_seq.set(gauge(header.last));
        }
        if header.epoch != epoch || !self.state.belief.lock().met() || self.hub.edge().held {
            return Some("doubt");
        }
        let outcome = match header.kind {
            _ if header.last <= newest => "known",
            Kind::Events if header.first == newest + 1 => {
                match decode_events(&header, &body, |name| self.interner.share(name)) {
                    Ok(events) => match self.take(&events, "feed").await {
                        Ok(()) => "applied",
                        Err(error) => {
                            tracing::debug!(%error, "tables of the feed could not be looked up");
                            "gap"
                        }
                    },
                    Err(_) => "refused",
                }
            }
            _ => "gap",
        };
        self.metrics.feed_chunks_total.with_label_values(&[outcome]).inc();
        if outcome == "gap" {
            self.metrics.feed_gaps_total.inc();
        }
        matches!(outcome, "gap" | "refused").then_some("gap")
    }

    /// The key of a chunk's term, if the chunk comes from the backend that announces for it.
    async fn key(&mut self, header: &Header, pid: u32) -> Option<Arc<FeedKey>> {
        if !self.keys.contains_key(&header.term) {
            if self.key_asked.is_some_and(|at| at.elapsed() < KEY_LOOKUP_INTERVAL) {
                return None;
            }
            self.key_asked = Some(Instant::now());
            let found = self.asked(term_key(&self.database.pool(), header.term)).await.ok()??;
            let key = found.key.as_deref().and_then(FeedKey::new).map(Arc::new);
            if self.keys.len() >= MAX_KEYS
                && let Some(oldest) = self.keys.keys().min().copied()
            {
                self.keys.remove(&oldest);
            }
            self.keys.insert(header.term, (found, key));
        }
        let (term, key) = self.keys.get(&header.term)?;
        // A term's number may come twice after a lost tail: the key is that of one epoch only.
        let sender = term.feed_pid == pid || mutant::is(Mutant::FeedTrusted);
        (sender && term.epoch == header.epoch).then(|| key.clone()).flatten()
    }
}

/// Whether a chunk knows more of the log's end than a node that has it up to `newest`. One that waited while the node was
/// paused comes when the log has been read: it must not put the node back in anybody's eyes.
const fn says_more(header: &Header, epoch: Epoch, newest: Seq) -> bool {
    header.epoch == epoch && header.last >= newest
}

/// What the chunk says, if the term's leader sealed it.
fn opened(key: &FeedKey, header: &Header, text: &str, sealed: &str) -> Result<Bytes, ChunkError> {
    match key.open(header, text, sealed) {
        Err(_) if mutant::is(Mutant::FeedTrusted) => {
            STANDARD_NO_PAD.decode(sealed).map(Bytes::from).map_err(|_| ChunkError::Body)
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found by the chaos campaign: a woken node read the log, said ready, and then showed the numbers of what it had
    /// slept through, one old chunk after the other.
    #[test]
    fn a_chunk_that_waited_does_not_put_the_logs_end_back() {
        let chunk = |epoch, last| Header { epoch, term: 1, first: last, last, kind: Kind::Heartbeat, nonce: 0 };
        assert!(says_more(&chunk(1, 20), 1, 19));
        assert!(says_more(&chunk(1, 20), 1, 20));
        assert!(!says_more(&chunk(1, 20), 1, 28));
        assert!(!says_more(&chunk(1, 20), 2, 10), "of a tail that is lost");
    }
}
