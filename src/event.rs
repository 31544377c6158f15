//! What the log carries: [`NewEvent`], captured but not numbered, and [`Event`], numbered and ready to be shared.
//!
//! An event's JSON is composed once, by [`NewEvent::compose`], from what the outbox or the log holds; the leader does it
//! for the whole cluster and a reader of the log for its own page, through the same function, so both give the same
//! bytes. What is composed is the event without its number (the *body*, one JSON object); seq, id and `tx_end` are put
//! around it when it is written to a client ([`Event::write_json`]).
//!
//! Pure: knows neither Postgres nor the wire.

pub mod row;

use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use uuid::Uuid;

use crate::cursor::Seq;
use crate::event::row::Row;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A row came to be.
    Insert,
    /// A row changed.
    Update,
    /// A row is gone.
    Delete,
    /// All rows are gone; carries none.
    Truncate,
    /// A domain event.
    Event,
    /// The table itself changed.
    Schema,
}

impl Operation {
    /// Every operation; the position is its code in a feed chunk.
    pub const ALL: [Operation; 6] =
        [Self::Insert, Self::Update, Self::Delete, Self::Truncate, Self::Event, Self::Schema];

    /// The text in the outbox, the log and on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Insert => "INSERT",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Truncate => "TRUNCATE",
            Self::Event => "EVENT",
            Self::Schema => "SCHEMA",
        }
    }

    /// The operation of this text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.as_str() == text)
    }
}

/// A captured change, borrowed from wherever it was read. JSON texts are as Postgres rendered them.
#[derive(Clone, Copy, Debug)]
pub struct NewEvent<'a> {
    /// The idempotency key.
    pub event_id: Uuid,
    /// Canonical name.
    pub table: &'a str,
    /// What happened.
    pub operation: Operation,
    /// Key columns, after the change (before it for DELETE).
    pub key: Option<&'a str>,
    /// Key columns before an UPDATE that changed them.
    pub old_key: Option<&'a str>,
    /// The row before.
    pub before: Option<&'a str>,
    /// The row after; the payload of a domain event; the description of a schema change.
    pub after: Option<&'a str>,
    /// Type of a domain event.
    pub event_type: Option<&'a str>,
    /// The writer's headers, trace context among them.
    pub headers: Option<&'a str>,
    /// The transaction.
    pub xid: u64,
    /// When the change was captured.
    pub created_at: DateTime<Utc>,
    /// The rows could not be carried.
    pub omitted: bool,
}

impl NewEvent<'_> {
    /// Appends the event's JSON without number to `out`.
    pub fn compose(&self, out: &mut String) {
        out.push_str("{\"table\":");
        push_json_string(out, self.table);
        out.push_str(",\"op\":\"");
        out.push_str(self.operation.as_str());
        out.push('"');
        push_member(out, "key", self.key);
        push_member(out, "old_key", self.old_key);
        if !self.omitted {
            self.compose_images(out);
        }
        if let Some(event_type) = self.event_type {
            out.push_str(",\"type\":");
            push_json_string(out, event_type);
        }
        let _ = write!(out, ",\"tx\":\"{}\",\"ts\":\"", self.xid);
        // `+00:00`, not `Z`: the spelling that Postgres itself uses for timestamptz values.
        out.push_str(&self.created_at.to_rfc3339_opts(SecondsFormat::Micros, false));
        out.push('"');
        push_member(out, "headers", self.headers);
        if self.omitted {
            out.push_str(",\"omitted\":true");
        }
        out.push('}');
    }

    /// null = does not exist; absent = not available.
    fn compose_images(&self, out: &mut String) {
        match self.operation {
            Operation::Insert => {
                out.push_str(",\"before\":null");
                push_member(out, "after", self.after);
            }
            Operation::Delete => {
                push_member(out, "before", self.before);
                out.push_str(",\"after\":null");
            }
            Operation::Update => {
                push_member(out, "before", self.before);
                push_member(out, "after", self.after);
                if let (Some(before), Some(after)) = (self.before, self.after) {
                    push_changed(out, before, after);
                }
            }
            // A domain event without a payload says so.
            Operation::Event => push_member(out, "after", Some(self.after.unwrap_or("null"))),
            Operation::Schema => push_member(out, "after", self.after),
            Operation::Truncate => {}
        }
    }
}

fn push_member(out: &mut String, name: &str, value: Option<&str>) {
    if let Some(value) = value {
        out.push_str(",\"");
        out.push_str(name);
        out.push_str("\":");
        out.push_str(value);
    }
}

/// Both images come from the same settings, so equal text is equal value.
fn push_changed(out: &mut String, before: &str, after: &str) {
    let (Ok(before), Ok(after)) = (Row::parse(before), Row::parse(after)) else { return };
    out.push_str(",\"changed\":[");
    let mut first = true;
    for (index, (name, value)) in after.iter().enumerate() {
        if before.at(index, name) == Some(value) {
            continue;
        }
        if !first {
            out.push(',');
        }
        first = false;
        push_json_string(out, name);
    }
    out.push(']');
}

/// Appends `text` as a JSON string.
pub fn push_json_string(out: &mut String, text: &str) {
    let plain = text.bytes().all(|byte| byte >= 0x20 && byte != b'"' && byte != b'\\');
    if plain {
        out.push('"');
        out.push_str(text);
        out.push('"');
    } else {
        out.push_str(&serde_json::Value::from(text).to_string());
    }
}

/// A numbered event, cheap to clone: its body is shared by the ring, the groups and every reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its position.
    pub seq: Seq,
    /// The idempotency key.
    pub id: Uuid,
    /// The transaction.
    pub xid: u64,
    /// What happened.
    pub operation: Operation,
    /// Last of its transaction.
    pub tx_end: bool,
    /// The rows could not be carried.
    pub omitted: bool,
    /// Canonical name.
    pub table: Arc<str>,
    /// One JSON object, see [`NewEvent::compose`]; at least two bytes.
    pub body: Bytes,
}

/// What an event costs in memory beside its body, bytes; rounded up.
const EVENT_OVERHEAD_BYTES: usize = 128;

impl Event {
    /// Memory held, bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        EVENT_OVERHEAD_BYTES + self.body.len()
    }

    /// Appends the event as clients see it when nothing is masked.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        self.write_json_with(out, &self.body, None);
    }

    /// As [`Event::write_json`], with a body that a mask has rewritten and the transition of a filter.
    pub fn write_json_with(&self, out: &mut Vec<u8>, body: &[u8], transition: Option<&str>) {
        use std::io::Write as _;
        // Writing to a Vec does not fail.
        let _ = write!(out, "{{\"seq\":{},\"id\":\"{}\",", self.seq, self.id.as_hyphenated());
        out.extend_from_slice(body.get(1..body.len().saturating_sub(1)).unwrap_or_default());
        if let Some(transition) = transition {
            let _ = write!(out, ",\"transition\":\"{transition}\"");
        }
        out.extend_from_slice(if self.tx_end { b",\"tx_end\":true}" } else { b",\"tx_end\":false}" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn update<'a>() -> NewEvent<'a> {
        NewEvent {
            event_id: Uuid::from_u128(1),
            table: "public.orders",
            operation: Operation::Update,
            key: Some(r#"{"id":42}"#),
            old_key: None,
            before: Some(r#"{"id":42,"status":"new","n":1}"#),
            after: Some(r#"{"id":42,"status":"paid","n":1}"#),
            event_type: None,
            headers: Some(r#"{"traceparent":"00-ab"}"#),
            xid: 7482,
            created_at: DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap(),
            omitted: false,
        }
    }

    fn composed(event: &NewEvent<'_>) -> Value {
        let mut text = String::new();
        event.compose(&mut text);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn an_update_names_the_columns_that_differ() {
        let value = composed(&update());
        assert_eq!(value["changed"], json!(["status"]));
        assert_eq!(value["ts"], "2023-11-14T22:13:20.123456+00:00");
        assert_eq!(value["tx"], "7482");
        assert!(value.get("old_key").is_none());
    }

    #[test]
    fn null_means_does_not_exist_and_absent_not_available() {
        let insert = NewEvent { operation: Operation::Insert, before: None, ..update() };
        assert_eq!(composed(&insert)["before"], Value::Null);
        assert!(composed(&insert).get("before").is_some());
        let bare = NewEvent { before: None, ..update() };
        assert!(composed(&bare).get("before").is_none());
        assert!(composed(&bare).get("changed").is_none());
        let delete = NewEvent { operation: Operation::Delete, ..update() };
        assert_eq!(composed(&delete).get("after"), Some(&Value::Null));
        let event = NewEvent { operation: Operation::Event, before: None, after: None, ..update() };
        assert_eq!(composed(&event).get("after"), Some(&Value::Null));
    }

    #[test]
    fn an_omitted_event_keeps_its_place_without_its_rows() {
        let value = composed(&NewEvent { omitted: true, ..update() });
        assert_eq!(value["omitted"], true);
        assert_eq!(value["key"], json!({"id": 42}));
        assert!(value.get("after").is_none() && value.get("before").is_none());
    }

    #[test]
    fn the_written_event_is_one_json_object() {
        let mut body = String::new();
        NewEvent { table: "public.we\"ird", ..update() }.compose(&mut body);
        let event = Event {
            seq: 9,
            id: Uuid::from_u128(1),
            xid: 7482,
            operation: Operation::Update,
            tx_end: true,
            omitted: false,
            table: "public.we\"ird".into(),
            body: body.into(),
        };
        let mut out = Vec::new();
        event.write_json(&mut out);
        let value: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&value["seq"], &value["tx_end"]), (&json!(9), &json!(true)));
        assert_eq!(value["table"], "public.we\"ird");
        assert_eq!(value["id"], "00000000-0000-0000-0000-000000000001");
    }
}
