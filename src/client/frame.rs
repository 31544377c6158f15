//! What the server says: an [`Frame`] of events, or another message of the protocol.
//!
//! The frames carry nearly all bytes, so they are not parsed here: the head is read where the server puts it, and the
//! events stay text until someone wants them. Whatever does not look as expected goes through a whole JSON parse, so
//! a server that orders its fields otherwise is understood too, only slower.

use std::borrow::Cow;
use std::ops::Range;

use serde::Deserialize;
use serde_json::value::RawValue;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use crate::client::event::Event;
use crate::cursor::{CURSOR_TEXT_LEN, Cursor};
use crate::protocol::message::ServerMessage;

/// A message of the server.
#[derive(Debug)]
pub(super) enum Incoming {
    /// Events of one subscription.
    Events { id: String, frame: Frame },
    /// Anything else that this version knows.
    Message(Box<ServerMessage>),
    /// A type that this version does not know, to be ignored.
    Unknown,
}

/// One `events` frame: a run of events, not yet parsed.
#[derive(Clone, Debug)]
pub struct Frame {
    text: Utf8Bytes,
    prev: Option<Cursor>,
    cursor: Cursor,
    open: bool,
    events: Range<usize>,
}

impl Frame {
    /// The whole message, as it came.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The position before the frame.
    #[must_use]
    pub const fn prev(&self) -> Option<Cursor> {
        self.prev
    }

    /// The position after it.
    #[must_use]
    pub const fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Whether the frame ends inside a transaction.
    #[must_use]
    pub const fn open(&self) -> bool {
        self.open
    }

    /// The events: a JSON array.
    #[must_use]
    pub fn events_text(&self) -> &str {
        &self.text[self.events.clone()]
    }

    /// How many events the frame holds: one pass over the text, without allocation.
    #[must_use]
    pub fn count(&self) -> usize {
        count_elements(self.events_text())
    }

    /// The events.
    ///
    /// # Errors
    /// The text is not what the protocol says.
    pub fn parse(&self) -> Result<Vec<Event>, serde_json::Error> {
        // A server of a later version may put a field behind the events: then the quick range is too long.
        serde_json::from_str(self.events_text()).or_else(|error| match whole(&self.text) {
            Ok(Some((_, frame))) if frame.events != self.events => serde_json::from_str(frame.events_text()),
            _ => Err(error),
        })
    }
}

/// Reads one text message.
///
/// # Errors
/// It is not JSON, or a known type with fields that are not the protocol's.
pub(super) fn read(text: &Utf8Bytes) -> Result<Incoming, serde_json::Error> {
    if let Some((id, frame)) = quick(text) {
        return Ok(Incoming::Events { id, frame });
    }
    if let Some((id, frame)) = whole(text)? {
        return Ok(Incoming::Events { id, frame });
    }
    match serde_json::from_str::<ServerMessage>(text) {
        Ok(message) => Ok(Incoming::Message(Box::new(message))),
        Err(error) if is_known_type(text) => Err(error),
        Err(_) => Ok(Incoming::Unknown),
    }
}

/// The order in which our servers write: type, id, prev, cursor, `open` when it is true, events.
fn quick(text: &Utf8Bytes) -> Option<(String, Frame)> {
    let rest = text.strip_prefix(r#"{"type":"events","id":""#)?;
    let end = rest.bytes().position(|byte| byte == b'"' || byte == b'\\')?;
    let id = rest.get(..end)?;
    let rest = rest.get(end..)?.strip_prefix(r#"","prev":""#)?;
    let (prev, rest) = rest.split_at_checked(CURSOR_TEXT_LEN)?;
    let rest = rest.strip_prefix(r#"","cursor":""#)?;
    let (cursor, rest) = rest.split_at_checked(CURSOR_TEXT_LEN)?;
    let rest = rest.strip_prefix('"')?;
    let (rest, open) = rest.strip_prefix(r#","open":true"#).map_or((rest, false), |rest| (rest, true));
    let events = rest.strip_prefix(r#","events":"#)?;
    let (prev, cursor) = (prev.parse().ok()?, cursor.parse().ok()?);
    let start = text.len() - events.len();
    let events = start..start + events.strip_suffix('}')?.len();
    if !text[events.clone()].ends_with(']') {
        return None;
    }
    Some((id.to_owned(), Frame { text: text.clone(), prev: Some(prev), cursor, open, events }))
}

/// The same by a JSON parse; `None` when it is another type of message.
fn whole(text: &Utf8Bytes) -> Result<Option<(String, Frame)>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Events<'a> {
        id: String,
        prev: Option<Cursor>,
        cursor: Cursor,
        #[serde(default)]
        open: bool,
        #[serde(borrow)]
        events: &'a RawValue,
    }
    if kind(text)? != "events" {
        return Ok(None);
    }
    let read: Events<'_> = serde_json::from_str(text)?;
    let start = read.events.get().as_ptr().addr() - text.as_str().as_ptr().addr();
    let events = start..start + read.events.get().len();
    let (prev, cursor, open) = (read.prev, read.cursor, read.open);
    Ok(Some((read.id, Frame { text: text.clone(), prev, cursor, open, events })))
}

fn kind(text: &str) -> Result<Cow<'_, str>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Kind<'a> {
        #[serde(rename = "type", borrow)]
        kind: Cow<'a, str>,
    }
    serde_json::from_str::<Kind<'_>>(text).map(|kind| kind.kind)
}

/// Whether `ServerMessage` has a variant for this text's type; serde tells an unknown variant only by its message.
fn is_known_type(text: &str) -> bool {
    const KNOWN: [&str; 9] = [
        "welcome",
        "subscribed",
        "caught_up",
        "progress",
        "resync_required",
        "unsubscribed",
        "synced",
        "drain",
        "error",
    ];
    kind(text).map_or(true, |kind| kind == "pong" || KNOWN.contains(&kind.as_ref()))
}

/// The number of elements of a JSON array. Exact for valid JSON: strings are skipped, nesting is counted.
fn count_elements(array: &str) -> usize {
    let bytes = array.as_bytes();
    let (mut depth, mut commas, mut filled, mut at) = (0u32, 0usize, false, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                filled = true;
            }
            b'[' | b'{' => {
                filled |= depth > 0;
                depth += 1;
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' if depth == 1 => commas += 1,
            _ => {}
        }
        at += 1;
    }
    if filled { commas + 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PREV: &str = "00000001-0000000000000001-0000000a";
    const CURSOR: &str = "00000001-0000000000000003-0000000b";

    fn event(seq: u64, note: &str) -> String {
        let note = serde_json::to_string(note).unwrap();
        format!(
            r#"{{"seq":{seq},"id":"5f0c0e4c-9a39-4f9b-8f54-6a3b7f1f2a10","table":"public.t","op":"INSERT","before":null,"after":{{"note":{note},"list":[{{"seq":1}},{{"seq":2}}]}},"tx":"9","tx_end":true,"ts":"2026-11-20T10:00:00+00:00"}}"#
        )
    }

    fn frame(text: String) -> (String, Frame) {
        match read(&text.into()).unwrap() {
            Incoming::Events { id, frame } => (id, frame),
            other => panic!("not events: {other:?}"),
        }
    }

    #[test]
    fn a_frame_as_our_server_writes_it_is_read_without_a_parse() {
        let events = format!("[{},{}]", event(2, "a\\\"],"), event(3, "{[,"));
        let text = format!(r#"{{"type":"events","id":"a","prev":"{PREV}","cursor":"{CURSOR}","events":{events}}}"#);
        assert!(quick(&text.clone().into()).is_some());
        let (id, frame) = frame(text);
        assert_eq!((id.as_str(), frame.open(), frame.count()), ("a", false, 2));
        assert_eq!((frame.prev(), frame.cursor()), (PREV.parse().ok(), CURSOR.parse().unwrap()));
        assert_eq!(frame.events_text(), events);
        assert_eq!(frame.parse().unwrap().iter().map(|event| event.seq).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn an_open_frame_is_read_without_a_parse_too() {
        let text = format!(
            r#"{{"type":"events","id":"a","prev":"{PREV}","cursor":"{CURSOR}","open":true,"events":[{}]}}"#,
            event(2, "x")
        );
        assert!(quick(&text.clone().into()).is_some());
        let (_, frame) = frame(text);
        assert!(frame.open() && frame.parse().unwrap().len() == 1);
    }

    #[test]
    fn any_order_of_fields_is_understood() {
        let events = format!("[{}]", event(2, "x"));
        for text in [
            format!(
                r#"{{"type":"events","id":"a","prev":"{PREV}","cursor":"{CURSOR}","events":{events},"open":true}}"#
            ),
            format!(
                r#"{{"open":true,"events": {events} ,"cursor":"{CURSOR}","prev":"{PREV}","id":"\u0061","type":"events"}}"#
            ),
            format!(
                r#"{{"type":"events","id":"a","open":true,"prev":"{PREV}","cursor":"{CURSOR}","events":{events},"new":[1]}}"#
            ),
        ] {
            let (id, frame) = frame(text);
            assert_eq!((id.as_str(), frame.open(), frame.parse().unwrap().len()), ("a", true, 1));
        }
    }

    #[test]
    fn a_field_behind_the_events_does_not_hide_them() {
        let events = format!("[{}]", event(2, "x"));
        let (_, frame) = frame(format!(
            r#"{{"type":"events","id":"a","prev":"{PREV}","cursor":"{CURSOR}","events":{events},"new":[1]}}"#
        ));
        assert_eq!(frame.parse().unwrap().len(), 1);
    }

    #[test]
    fn unknown_types_are_ignored_and_broken_known_ones_are_not() {
        assert!(matches!(read(&r#"{"type":"confetti","n":1}"#.into()), Ok(Incoming::Unknown)));
        assert!(read(&r#"{"type":"caught_up","id":"a"}"#.into()).is_err());
        assert!(read(&r#"{"type":"events","id":"a"}"#.into()).is_err());
        assert!(read(&"nonsense".into()).is_err());
        assert!(matches!(read(&r#"{"type":"pong","t":1,"x":2}"#.into()), Ok(Incoming::Message(_))));
    }

    proptest! {
        #[test]
        fn the_count_is_the_length_of_the_array(notes in proptest::collection::vec("\\PC{0,12}", 0..6)) {
            let events: Vec<_> = notes.iter().enumerate().map(|(n, note)| event(n as u64, note)).collect();
            prop_assert_eq!(count_elements(&format!("[{}]", events.join(", "))), notes.len());
        }

        #[test]
        fn arbitrary_text_never_panics(text in "\\PC*", tail in "\\PC*") {
            let _ = read(&text.into());
            let head = format!(r#"{{"type":"events","id":"a","prev":"{PREV}","cursor":"{CURSOR}","events":{tail}"#);
            if let Ok(Incoming::Events { frame, .. }) = read(&head.into()) {
                let _ = (frame.count(), frame.parse());
            }
        }
    }
}
