//! One notification's payload: what it says in clear, and the sealed body.
//!
//! Text form: `1.<epoch>.<term>.<first>.<last>.<kind>.<nonce>[.<body>]`, numbers in decimal, the body in base64. Everything before the
//! body is authenticated with it (`feed::seal`). Kinds: `e` events ride in the body; `r` a range, to be read from the
//! log; `h` a heartbeat, `last` is the leader's newest seq.
//!
//! The body before sealing, compressed: for each event its id (16 bytes), xid, operation and flags, table, JSON body;
//! seqs are dense from `first`, so they are not written. Decoding never panics on any bytes and never allocates more than
//! [`MAX_BODY_BYTES`].

use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use crate::cursor::{Epoch, Seq};
use crate::event::{Event, Operation};

/// Largest payload: Postgres takes fewer than 8000 bytes.
pub const MAX_PAYLOAD_BYTES: usize = 7_900;

/// Largest decompressed body, bytes: bounds what a hostile chunk can make a node allocate.
pub const MAX_BODY_BYTES: usize = 4 << 20;

/// Fast enough to cost less than the bytes it saves (measured in the design's notes: 131 events to a chunk).
const COMPRESSION_LEVEL: i32 = 1;

/// What a chunk announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The events ride in the body.
    Events,
    /// They are to be read from the log.
    Range,
    /// Nothing new; `last` is the newest seq.
    Heartbeat,
}

impl Kind {
    const fn letter(self) -> &'static str {
        match self {
            Self::Events => "e",
            Self::Range => "r",
            Self::Heartbeat => "h",
        }
    }
}

/// What a chunk says in clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The epoch of the leader's log.
    pub epoch: Epoch,
    /// The leader's term.
    pub term: u64,
    /// First seq that it covers.
    pub first: Seq,
    /// Last seq that it covers.
    pub last: Seq,
    /// What it announces.
    pub kind: Kind,
    /// Counter of the term, never used twice: the AEAD's nonce.
    pub nonce: u64,
}

/// The payload is not a chunk of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Not the text form above.
    #[error("not a feed chunk of this version")]
    Malformed,
    /// Did not open: forged, of another term's key, or damaged.
    #[error("the chunk does not open with its term's key")]
    Sealed,
    /// The body does not hold what the header says.
    #[error("the chunk's body is damaged")]
    Body,
}

impl Header {
    /// The authenticated prefix, which is also the payload's beginning.
    #[must_use]
    pub fn text(&self) -> String {
        format!("1.{}.{}.{}.{}.{}.{}", self.epoch, self.term, self.first, self.last, self.kind.letter(), self.nonce)
    }

    /// Splits a payload into its header, the header's text and the sealed body.
    ///
    /// # Errors
    /// [`ChunkError::Malformed`].
    pub fn parse(payload: &str) -> Result<(Self, &str, &str), ChunkError> {
        let mut parts = payload.splitn(8, '.');
        let mut next = || parts.next().ok_or(ChunkError::Malformed);
        if next()? != "1" {
            return Err(ChunkError::Malformed);
        }
        let number = |text: &str| text.parse::<u64>().map_err(|_| ChunkError::Malformed);
        let epoch = u32::try_from(number(next()?)?).map_err(|_| ChunkError::Malformed)?;
        let (term, first, last) = (number(next()?)?, number(next()?)?, number(next()?)?);
        let kind = match next()? {
            "e" => Kind::Events,
            "r" => Kind::Range,
            "h" => Kind::Heartbeat,
            _ => return Err(ChunkError::Malformed),
        };
        let nonce = number(next()?)?;
        let body = next()?;
        let header = Self { epoch, term, first, last, kind, nonce };
        let text = payload.get(..payload.len() - body.len() - 1).ok_or(ChunkError::Malformed)?;
        if kind != Kind::Heartbeat && first > last {
            return Err(ChunkError::Malformed);
        }
        Ok((header, text, body))
    }
}

/// Compresses events into a body.
///
/// # Errors
/// [`ChunkError::Body`] when they are more than [`MAX_BODY_BYTES`] or do not compress.
pub fn encode_events(events: &[Event]) -> Result<Vec<u8>, ChunkError> {
    let mut plain = Vec::with_capacity(events.iter().map(|event| event.body.len() + 64).sum());
    for event in events {
        plain.extend_from_slice(event.id.as_bytes());
        push_varint(&mut plain, event.xid);
        plain.push(flags(event));
        push_bytes(&mut plain, event.table.as_bytes());
        push_bytes(&mut plain, &event.body);
    }
    if plain.len() > MAX_BODY_BYTES {
        return Err(ChunkError::Body);
    }
    zstd::bulk::compress(&plain, COMPRESSION_LEVEL).map_err(|_| ChunkError::Body)
}

/// The events of a body; `header` says how many there must be. `intern` gives shared table names.
///
/// # Errors
/// [`ChunkError::Body`] on anything that [`encode_events`] would not have written.
pub fn decode_events(
    header: &Header,
    body: &[u8],
    mut intern: impl FnMut(&str) -> Arc<str>,
) -> Result<Vec<Event>, ChunkError> {
    let plain = Bytes::from(zstd::bulk::decompress(body, MAX_BODY_BYTES).map_err(|_| ChunkError::Body)?);
    let mut reader = Reader { plain: &plain, at: 0 };
    let mut events = Vec::new();
    for seq in header.first..=header.last {
        let id = Uuid::from_slice(reader.take(16)?).map_err(|_| ChunkError::Body)?;
        let xid = reader.varint()?;
        let flags = *reader.take(1)?.first().ok_or(ChunkError::Body)?;
        let operation = *Operation::ALL.get(usize::from(flags & 7)).ok_or(ChunkError::Body)?;
        let table = reader.slice()?;
        let table = intern(std::str::from_utf8(&table).map_err(|_| ChunkError::Body)?);
        let body = reader.slice()?;
        if body.len() < 2 || std::str::from_utf8(&body).is_err() {
            return Err(ChunkError::Body);
        }
        let (tx_end, omitted) = (flags & TX_END != 0, flags & OMITTED != 0);
        events.push(Event { seq, id, xid, operation, tx_end, omitted, table, body });
    }
    if reader.at == plain.len() { Ok(events) } else { Err(ChunkError::Body) }
}

const TX_END: u8 = 8;
const OMITTED: u8 = 16;

fn flags(event: &Event) -> u8 {
    let code = Operation::ALL.iter().position(|operation| *operation == event.operation).unwrap_or_default();
    let code = u8::try_from(code).unwrap_or_default();
    code | if event.tx_end { TX_END } else { 0 } | if event.omitted { OMITTED } else { 0 }
}

fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn push_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    push_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

struct Reader<'a> {
    plain: &'a Bytes,
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8], ChunkError> {
        let end = self.at.checked_add(count).ok_or(ChunkError::Body)?;
        let bytes = self.plain.get(self.at..end).ok_or(ChunkError::Body)?;
        self.at = end;
        Ok(bytes)
    }

    fn varint(&mut self) -> Result<u64, ChunkError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.take(1)?.first().ok_or(ChunkError::Body)?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(ChunkError::Body)
    }

    fn slice(&mut self) -> Result<Bytes, ChunkError> {
        let length = usize::try_from(self.varint()?).map_err(|_| ChunkError::Body)?;
        let from = self.at;
        self.take(length)?;
        Ok(self.plain.slice(from..from + length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(seq: Seq, table: &str, body: &str, code: usize, tx_end: bool) -> Event {
        Event {
            seq,
            id: Uuid::from_u128(u128::from(seq) * 77),
            xid: seq * 1_000_003,
            operation: Operation::ALL[code % 6],
            tx_end,
            omitted: code > 5,
            table: table.into(),
            body: Bytes::copy_from_slice(body.as_bytes()),
        }
    }

    fn header(first: Seq, last: Seq) -> Header {
        Header { epoch: 1, term: 2, first, last, kind: Kind::Events, nonce: 3 }
    }

    proptest! {
        #[test]
        fn events_survive_a_chunk(bodies in prop::collection::vec(("[a-z]{1,9}", "\\PC{2,40}", 0usize..12, any::<bool>()), 1..50)) {
            let events: Vec<Event> = bodies.iter().enumerate()
                .map(|(i, (table, body, code, end))| event(10 + i as u64, table, body, *code, *end)).collect();
            let body = encode_events(&events).unwrap();
            let last = 9 + events.len() as u64;
            prop_assert_eq!(decode_events(&header(10, last), &body, |name| name.into()).unwrap(), events);
            prop_assert!(decode_events(&header(10, last + 1), &body, |name| name.into()).is_err());
        }

        #[test]
        fn a_header_survives_its_text(epoch in any::<u32>(), term in any::<u64>(), first in 0u64..1000, more in 0u64..1000, nonce in any::<u64>()) {
            let header = Header { epoch, term, first, last: first + more, kind: Kind::Events, nonce };
            let payload = format!("{}.body", header.text());
            let (parsed, text, body) = Header::parse(&payload).unwrap();
            let clear = header.text();
            prop_assert_eq!((parsed, text, body), (header, clear.as_str(), "body"));
        }

        #[test]
        fn arbitrary_bytes_never_panic(payload in "\\PC*", bytes in prop::collection::vec(any::<u8>(), 0..300), last in 0u64..1_000_000) {
            let _ = Header::parse(&payload);
            let _ = decode_events(&header(1, last), &bytes, |name| name.into());
            let packed = zstd::bulk::compress(&bytes, 1).unwrap();
            let _ = decode_events(&header(1, last), &packed, |name| name.into());
        }
    }
}
