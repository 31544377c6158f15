//! The seal of the feed: a term's random AES-256-GCM key, and a nonce that counts.
//!
//! NOTIFY knows no privileges: any role can listen and inject. Only those who can read `tidewire.terms` have the key, so
//! a chunk that opens was made by the leader of that term. A nonce is never used twice within a term: it is a counter,
//! and the key dies with the process that drew it.
//!
//! Pure but for drawing the key.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bytes::Bytes;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use crate::event::Event;
use crate::feed::chunk::{ChunkError, Header, Kind, MAX_PAYLOAD_BYTES, encode_events};

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;

/// A term's key.
pub struct FeedKey(LessSafeKey);

// The key must not reach a log.
impl std::fmt::Debug for FeedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FeedKey")
    }
}

impl FeedKey {
    /// The key of these 32 bytes; None for any other length.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        UnboundKey::new(&AES_256_GCM, bytes).ok().map(|key| Self(LessSafeKey::new(key)))
    }

    /// Fresh random bytes for a new term.
    #[must_use]
    pub fn draw() -> [u8; KEY_BYTES] {
        rand::random()
    }

    /// The payload of a chunk.
    ///
    /// # Errors
    /// [`ChunkError::Sealed`] when the cipher refuses (it does not for bodies of this size).
    pub fn seal(&self, header: &Header, mut body: Vec<u8>) -> Result<String, ChunkError> {
        let mut payload = header.text();
        self.0
            .seal_in_place_append_tag(nonce(header.nonce), Aad::from(payload.as_bytes()), &mut body)
            .map_err(|_| ChunkError::Sealed)?;
        payload.push('.');
        STANDARD_NO_PAD.encode_string(&body, &mut payload);
        Ok(payload)
    }

    /// The body of a chunk that this key sealed.
    ///
    /// # Errors
    /// [`ChunkError::Sealed`] for anything else.
    pub fn open(&self, header: &Header, text: &str, body: &str) -> Result<Bytes, ChunkError> {
        let mut sealed = STANDARD_NO_PAD.decode(body).map_err(|_| ChunkError::Sealed)?;
        let length = self
            .0
            .open_in_place(nonce(header.nonce), Aad::from(text.as_bytes()), &mut sealed)
            .map_err(|_| ChunkError::Sealed)?
            .len();
        sealed.truncate(length);
        Ok(sealed.into())
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[NONCE_LEN - 8..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Makes the chunks of one term.
#[derive(Debug)]
pub struct Sealer {
    key: FeedKey,
    epoch: u32,
    term: u64,
    next_nonce: u64,
    /// How many events went into the last chunk: the first guess for the next.
    guess: usize,
}

/// The most events that are tried in one chunk.
const MAX_EVENTS_IN_CHUNK: usize = 1_024;

impl Sealer {
    /// A term's sealer; None when the key has not [`KEY_BYTES`] bytes.
    #[must_use]
    pub fn new(key: &[u8], epoch: u32, term: u64) -> Option<Self> {
        Some(Self { key: FeedKey::new(key)?, epoch, term, next_nonce: 0, guess: 64 })
    }

    /// Chunks that carry `events`, which are dense; an event too large for a chunk is announced by range.
    ///
    /// # Errors
    /// [`ChunkError`] as [`FeedKey::seal`].
    pub fn events(&mut self, mut events: &[Event]) -> Result<Vec<String>, ChunkError> {
        let mut chunks = Vec::new();
        while let [first, ..] = events {
            let mut count = events.len().min(self.guess);
            let payload = loop {
                let Some(last) = count.checked_sub(1).and_then(|index| events.get(index)) else {
                    count = 1;
                    break self.range(first.seq, first.seq)?;
                };
                if let Some(payload) = self.fitting(first.seq, last.seq, &events[..count])? {
                    self.guess = (count + count / 8 + 1).min(MAX_EVENTS_IN_CHUNK);
                    break payload;
                }
                // A quarter less each time: a few tries at most find the size, and the guess remembers it.
                count = count * 3 / 4;
                self.guess = count.max(1);
            };
            chunks.push(payload);
            events = &events[count..];
        }
        Ok(chunks)
    }

    fn fitting(&mut self, first: u64, last: u64, events: &[Event]) -> Result<Option<String>, ChunkError> {
        let Ok(body) = encode_events(events) else { return Ok(None) };
        // Base64 without padding, the tag, and a header of at most ~110 bytes.
        if (body.len() + 16) * 4 / 3 + 112 > MAX_PAYLOAD_BYTES {
            return Ok(None);
        }
        let header = self.header(first, last, Kind::Events);
        self.key.seal(&header, body).map(Some)
    }

    /// A chunk that says: read these from the log.
    ///
    /// # Errors
    /// [`ChunkError`] as [`FeedKey::seal`].
    pub fn range(&mut self, first: u64, last: u64) -> Result<String, ChunkError> {
        let header = self.header(first, last, Kind::Range);
        self.key.seal(&header, Vec::new())
    }

    /// A chunk that says: the leader is alive, and `newest` is the newest seq.
    ///
    /// # Errors
    /// [`ChunkError`] as [`FeedKey::seal`].
    pub fn heartbeat(&mut self, newest: u64) -> Result<String, ChunkError> {
        let header = self.header(newest, newest, Kind::Heartbeat);
        self.key.seal(&header, Vec::new())
    }

    fn header(&mut self, first: u64, last: u64, kind: Kind) -> Header {
        let nonce = self.next_nonce;
        self.next_nonce += 1;
        Header { epoch: self.epoch, term: self.term, first, last, kind, nonce }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Operation;
    use crate::feed::chunk::decode_events;
    use std::collections::HashSet;
    use uuid::Uuid;

    fn events(count: u64, size: usize) -> Vec<Event> {
        (1..=count)
            .map(|seq| Event {
                seq,
                id: Uuid::new_v4(),
                xid: 700 + seq,
                operation: Operation::Insert,
                tx_end: true,
                omitted: false,
                table: "public.orders".into(),
                body: format!("{{\"table\":\"public.orders\",\"n\":{seq},\"pad\":\"{}\"}}", pad(size, seq)).into(),
            })
            .collect()
    }

    // Text that does not compress, so that sizes are what they seem.
    fn pad(size: usize, seed: u64) -> String {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..size)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                char::from(b'a' + (state % 26) as u8)
            })
            .collect()
    }

    fn open_all(key: &FeedKey, chunks: &[String]) -> Vec<Event> {
        let mut out = Vec::new();
        for chunk in chunks {
            assert!(chunk.len() <= MAX_PAYLOAD_BYTES);
            let (header, text, body) = Header::parse(chunk).unwrap();
            let body = key.open(&header, text, body).unwrap();
            out.extend(decode_events(&header, &body, |name| name.into()).unwrap());
        }
        out
    }

    #[test]
    fn a_batch_arrives_whole_in_chunks_that_fit() {
        let bytes = FeedKey::draw();
        let mut sealer = Sealer::new(&bytes, 1, 4).unwrap();
        let batch = events(1_000, 300);
        let chunks = sealer.events(&batch).unwrap();
        assert_eq!(open_all(&FeedKey::new(&bytes).unwrap(), &chunks), batch);
    }

    #[test]
    fn an_event_too_large_for_a_chunk_is_announced_by_range() {
        let bytes = FeedKey::draw();
        let chunks = Sealer::new(&bytes, 1, 4).unwrap().events(&events(1, 20_000)).unwrap();
        let (header, ..) = Header::parse(&chunks[0]).unwrap();
        assert_eq!((header.kind, header.first, header.last, chunks.len()), (Kind::Range, 1, 1, 1));
    }

    #[test]
    fn a_nonce_is_never_used_twice() {
        let mut sealer = Sealer::new(&FeedKey::draw(), 1, 4).unwrap();
        let mut chunks = sealer.events(&events(500, 200)).unwrap();
        chunks.push(sealer.heartbeat(500).unwrap());
        chunks.push(sealer.range(1, 2).unwrap());
        let nonces: HashSet<u64> = chunks.iter().map(|chunk| Header::parse(chunk).unwrap().0.nonce).collect();
        assert_eq!(nonces.len(), chunks.len());
    }

    #[test]
    fn whatever_was_touched_does_not_open() {
        let bytes = FeedKey::draw();
        let key = FeedKey::new(&bytes).unwrap();
        let chunk = Sealer::new(&bytes, 1, 4).unwrap().range(5, 9).unwrap();
        let forged = chunk.replacen(".5.9.", ".5.8.", 1);
        for payload in [forged.as_str(), chunk.get(..chunk.len() - 2).unwrap()] {
            let (header, text, body) = Header::parse(payload).unwrap();
            assert_eq!(key.open(&header, text, body), Err(ChunkError::Sealed));
        }
        let other = FeedKey::new(&FeedKey::draw()).unwrap();
        let (header, text, body) = Header::parse(&chunk).unwrap();
        assert!(other.open(&header, text, body).is_err() && key.open(&header, text, body).is_ok());
    }
}
