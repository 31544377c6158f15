//! [`Event`]: one change as it came over the wire.
//!
//! Row images stay the JSON text that the server sent ([`RawValue`]): Postgres's integers and numerics have any size,
//! and a parse into floats would lose digits. Parse an image into a type of your own with [`Image::parse`].

use std::fmt;

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use uuid::Uuid;

/// One change of one row, or one domain event.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Its place in the log. Rises strictly; filters leave gaps in it.
    pub seq: u64,
    /// The idempotency key: the same on every transport and sink.
    pub id: Uuid,
    /// The qualified table, or `event:<aggregate type>`.
    pub table: String,
    /// What happened.
    pub op: Op,
    /// The type of a domain event.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub event_type: Option<String>,
    /// The row's key columns.
    #[serde(default, skip_serializing_if = "Image::is_absent")]
    pub key: Image,
    /// The key before the change, where the key itself changed.
    #[serde(default, skip_serializing_if = "Image::is_absent")]
    pub old_key: Image,
    /// The row before the change.
    #[serde(default, skip_serializing_if = "Image::is_absent")]
    pub before: Image,
    /// The row after it; a domain event's payload.
    #[serde(default, skip_serializing_if = "Image::is_absent")]
    pub after: Image,
    /// Names of the columns that differ, of an UPDATE with a before image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<Vec<String>>,
    /// Columns whose value the source did not send; they are absent from `after`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unchanged: Option<Vec<String>>,
    /// The transaction: decimal `pg_current_xact_id()`.
    #[serde(default)]
    pub tx: String,
    /// This was the last event of its transaction in the log (a filter may have removed that one).
    #[serde(default)]
    pub tx_end: bool,
    /// When the change was captured; not monotone in `seq`.
    pub ts: DateTime<Utc>,
    /// What the writer attached, such as a trace context.
    #[serde(default, skip_serializing_if = "Image::is_absent")]
    pub headers: Image,
    /// How an UPDATE moved the row across the subscription's `where`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transition: Option<Transition>,
    /// The rows could not be carried; `key`, `tx` and `tx_end` keep their meaning.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub omitted: bool,
}

/// A JSON value of an event, with the protocol's difference between "there is none" and "not available".
#[derive(Clone, Debug, Default)]
pub enum Image {
    /// The field is absent: the value is not available here.
    #[default]
    Absent,
    /// The field is null: there is none (no row before an INSERT).
    Null,
    /// The value, as the text that the server sent.
    Value(Box<RawValue>),
}

impl Image {
    /// Whether the value is not available.
    #[must_use]
    pub const fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }

    /// Whether it is known that there is none.
    #[must_use]
    pub const fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }

    /// The JSON text, if there is a value.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Value(value) => Some(value.get()),
            Self::Absent | Self::Null => None,
        }
    }

    /// The value as a type of your own; `None` when it is absent or null.
    ///
    /// # Errors
    /// The value does not fit the type.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<Option<T>, serde_json::Error> {
        self.text().map(serde_json::from_str).transpose()
    }

    /// The columns in the server's order, each with its JSON text; empty when there is no value or it is no object.
    #[must_use]
    pub fn columns(&self) -> Vec<(String, Box<RawValue>)> {
        self.text()
            .and_then(|text| serde_json::from_str::<Columns>(text).ok())
            .map_or_else(Vec::new, |columns| columns.0)
    }
}

impl Serialize for Image {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Value(value) => value.serialize(serializer),
            Self::Absent | Self::Null => serializer.serialize_unit(),
        }
    }
}

impl<'de> Deserialize<'de> for Image {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Box::<RawValue>::deserialize(deserializer)?;
        Ok(if value.get() == "null" { Self::Null } else { Self::Value(value) })
    }
}

/// An object's members in their order.
struct Columns(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Columns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> serde::de::Visitor<'de> for Members {
            type Value = Columns;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Columns, A::Error> {
                let mut columns = Vec::new();
                while let Some(member) = map.next_entry()? {
                    columns.push(member);
                }
                Ok(Columns(columns))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// What happened to a row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// A row came.
    Insert,
    /// A row changed.
    Update,
    /// A row went.
    Delete,
    /// All rows went; those of one partition if the event's headers name it as `tidewire.partition`.
    Truncate,
    /// A domain event.
    Event,
    /// The table's shape changed; `after` describes it.
    Schema,
    /// An operation that a later server knows.
    Other(String),
}

impl Op {
    /// The text on the wire.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Insert => "INSERT",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Truncate => "TRUNCATE",
            Self::Event => "EVENT",
            Self::Schema => "SCHEMA",
            Self::Other(text) => text,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Serialize for Op {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Op {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Ok(match text.as_ref() {
            "INSERT" => Self::Insert,
            "UPDATE" => Self::Update,
            "DELETE" => Self::Delete,
            "TRUNCATE" => Self::Truncate,
            "EVENT" => Self::Event,
            "SCHEMA" => Self::Schema,
            other => Self::Other(other.to_owned()),
        })
    }
}

/// How an UPDATE moved a row across a subscription's `where`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transition {
    /// The row is in from now on: treat it like an INSERT.
    Enter,
    /// The row is out from now on: drop it.
    Leave,
    /// It cannot be told.
    #[serde(other)]
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPDATE: &str = r#"{"seq":1041,"id":"5f0c0e4c-9a39-4f9b-8f54-6a3b7f1f2a10","table":"public.orders","op":"UPDATE",
        "key":{"id":42},"before":{"id":42,"total":123456789012345678901234567890.10},"after":{"id":42,"total":1e400},
        "changed":["total"],"tx":"7482","tx_end":true,"ts":"2026-11-20T10:00:00.123456+00:00","later":[1]}"#;

    #[test]
    fn an_event_reads_as_documented_and_unknown_fields_are_ignored() {
        let event: Event = serde_json::from_str(UPDATE).unwrap();
        assert_eq!((event.seq, event.op.clone(), event.tx.as_str(), event.tx_end), (1041, Op::Update, "7482", true));
        assert_eq!(event.changed.as_deref(), Some(&["total".to_owned()][..]));
        assert_eq!(event.ts.timestamp_subsec_micros(), 123_456);
        assert!(!event.omitted && event.transition.is_none());
    }

    #[test]
    fn numbers_keep_every_digit() {
        let event: Event = serde_json::from_str(UPDATE).unwrap();
        let column = |image: &Image| image.columns()[1].1.get().to_owned();
        assert_eq!(column(&event.before), "123456789012345678901234567890.10");
        assert_eq!(column(&event.after), "1e400");
    }

    #[test]
    fn null_and_absent_are_different() {
        let text = r#"{"seq":1,"id":"5f0c0e4c-9a39-4f9b-8f54-6a3b7f1f2a10","table":"t","op":"INSERT","before":null,
            "tx":"1","tx_end":true,"ts":"2026-11-20T10:00:00+00:00","transition":"later"}"#;
        let event: Event = serde_json::from_str(text).unwrap();
        assert!(event.before.is_null() && event.after.is_absent() && event.key.is_absent());
        assert_eq!(event.transition, Some(Transition::Unknown));
        let back = serde_json::to_string(&event).unwrap();
        assert!(back.contains(r#""before":null"#) && !back.contains("after"), "{back}");
    }

    #[test]
    fn an_operation_of_a_later_server_keeps_its_name() {
        let op: Op = serde_json::from_str("\"MERGE\"").unwrap();
        assert_eq!(op, Op::Other("MERGE".into()));
        assert_eq!(serde_json::to_string(&op).unwrap(), "\"MERGE\"");
    }
}
