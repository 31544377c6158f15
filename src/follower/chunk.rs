//! Which chunks of the feed are believed, and what is done with them.

use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bytes::Bytes;

use super::Follower;
use super::lookup::Verdict;
use crate::cursor::{Epoch, Seq};
use crate::feed::chunk::{ChunkError, Header, Kind, decode_events};
use crate::feed::seal::FeedKey;
use crate::log::incarnation::{TermKey, term_key};
use crate::mutant::{self, Mutant};
use crate::telemetry::metrics::gauge;

/// Keys of terms that are kept.
const MAX_KEYS: usize = 16;

/// What is known of a chunk's sender.
enum Sender {
    /// It announces for the chunk's term, whose key this is.
    Announcer(Arc<FeedKey>),
    /// It does not, or it was not asked for.
    Foreign,
    /// Too many are unknown to ask for each: the log says what there is.
    Unclear,
}

impl Follower {
    /// Some: the log is to be read.
    pub(super) async fn chunk(&mut self, pid: u32, payload: &str) -> Option<&'static str> {
        let count = |outcome| self.metrics.feed_chunks_total.with_label_values(&[outcome]).inc();
        let Ok((header, text, sealed)) = Header::parse(payload) else {
            count("refused");
            return None;
        };
        let key = match self.sender(&header, pid).await {
            Sender::Announcer(key) => key,
            other => {
                self.metrics.feed_chunks_total.with_label_values(&["foreign"]).inc();
                return matches!(other, Sender::Unclear).then_some("doubt");
            }
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

    /// Who sent a chunk, and the key of its term if that backend announces for it.
    async fn sender(&mut self, header: &Header, pid: u32) -> Sender {
        if !self.keys.contains_key(&header.term) {
            match self.lookups.judge(pid, Instant::now()) {
                Verdict::Ask => {}
                Verdict::ReadLog => return Sender::Unclear,
                Verdict::Ignore => return Sender::Foreign,
            }
            // No answer says nothing of the sender: the log is read.
            let Ok(found) = self.asked(term_key(&self.database.pool(), header.term)).await else {
                return Sender::Unclear;
            };
            match found {
                Some(found) if found.feed_pid == pid => self.remember(header.term, found),
                _ => self.lookups.refuse(pid, Instant::now()),
            }
        }
        let Some((term, key)) = self.keys.get(&header.term) else { return Sender::Foreign };
        // A term's number may come twice after a lost tail: the key is that of one epoch only.
        let announces = (term.feed_pid == pid || mutant::is(Mutant::FeedTrusted)) && term.epoch == header.epoch;
        match key {
            Some(key) if announces => Sender::Announcer(Arc::clone(key)),
            _ => Sender::Foreign,
        }
    }

    fn remember(&mut self, term: u64, found: TermKey) {
        let key = found.key.as_deref().and_then(FeedKey::new).map(Arc::new);
        if self.keys.len() >= MAX_KEYS
            && let Some(oldest) = self.keys.keys().min().copied()
        {
            self.keys.remove(&oldest);
        }
        self.keys.insert(term, (found, key));
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
