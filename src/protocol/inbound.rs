//! Reading what a client says.
//!
//! One rule decides what happens to a message that cannot be served. What has not the form of a message (no JSON object, an
//! unknown `type`, a field that is missing or of another JSON type, an `id` or `tx` too long to be named in an answer) says
//! that the client speaks something else: [`Fault::Form`], and the connection closes. A field of the right type with a
//! value that means nothing is answered by name, and the connection goes on.
//!
//! Unknown fields are ignored whatever they hold: they are skipped, never parsed, so neither depth nor a number out of
//! range matters.

use std::borrow::Cow;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use super::message::{Auth, ClientMessage, From, MAX_ID_CHARS, Subscribe};

/// Largest `t` of a ping, bytes: as many answers as a slow client may leave waiting must not cost megabytes.
pub const MAX_PING_BYTES: usize = 4 << 10;
/// What an error repeats of a client's text, characters.
const SHOWN_CHARS: usize = 200;

/// Why a message is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It has not the form of a message: closes.
    Form(String),
    /// A subscribe with a value that means nothing.
    Subscribe {
        /// The subscription.
        id: String,
        /// Cause and what to do.
        what: String,
    },
    /// A sync with a value that means nothing.
    Sync {
        /// The transaction.
        tx: String,
        /// Cause and what to do.
        what: String,
    },
    /// A ping that is too large to be echoed.
    Ping(String),
}

/// JSON as it was written.
#[derive(Clone, Debug)]
pub struct RawJson(Box<RawValue>);

impl RawJson {
    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        self.0.get()
    }
}

impl PartialEq for RawJson {
    fn eq(&self, other: &Self) -> bool {
        self.text() == other.text()
    }
}

impl Serialize for RawJson {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

// Inside a tagged enum the text itself is gone: this is for clients, which read back what they wrote.
impl<'de> Deserialize<'de> for RawJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        RawValue::from_string(value.to_string()).map(Self).map_err(D::Error::custom)
    }
}

impl TryFrom<String> for RawJson {
    type Error = serde_json::Error;

    fn try_from(text: String) -> Result<Self, serde_json::Error> {
        RawValue::from_string(text).map(Self)
    }
}

#[derive(Deserialize)]
struct Kind<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
}

#[derive(Deserialize)]
struct SubscribeFields<'a> {
    id: String,
    tables: Vec<String>,
    ops: Option<Vec<String>>,
    #[serde(rename = "where")]
    filter: Option<String>,
    columns: Option<Vec<String>>,
    #[serde(borrow)]
    from: Option<&'a RawValue>,
}

/// Positions are texts here: a malformed cursor is answered with `cursor_invalid`, it is no fault of the message.
#[derive(Deserialize)]
struct Position {
    #[serde(default, deserialize_with = "present")]
    cursor: Option<String>,
    #[serde(default, deserialize_with = "present")]
    snapshot_if_gone: Option<String>,
}

#[derive(Deserialize)]
struct UnsubscribeFields {
    id: String,
}

#[derive(Deserialize)]
struct PingFields<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    t: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct SyncFields<'a> {
    tx: String,
    #[serde(borrow)]
    timeout_ms: Option<&'a RawValue>,
}

/// Tells `null` from nothing.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

impl ClientMessage {
    /// Reads a text message.
    ///
    /// # Errors
    /// A [`Fault`], which says what to do about it.
    pub fn read(text: &str) -> Result<Self, Fault> {
        // A structure would be read from a list too.
        if !text.trim_start_matches([' ', '\t', '\n', '\r']).starts_with('{') {
            return Err(Fault::Form("a message is a JSON object".to_owned()));
        }
        let Kind { kind } = fields(text)?;
        match &*kind {
            "auth" => fields::<Auth>(text).map(Self::Auth),
            "subscribe" => subscribe(text).map(Self::Subscribe),
            "unsubscribe" => {
                let UnsubscribeFields { id } = fields(text)?;
                short("id", &id, 1)?;
                Ok(Self::Unsubscribe { id })
            }
            "ping" => ping(text),
            "sync" => sync(text),
            other => {
                let known = "auth, subscribe, unsubscribe, ping or sync";
                Err(Fault::Form(format!("unknown type {:?}: a client says {known}", shown(other))))
            }
        }
    }
}

fn fields<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Fault> {
    serde_json::from_str(text).map_err(|error| form(&error))
}

fn form(error: &serde_json::Error) -> Fault {
    Fault::Form(format!("not a message of version 1: {}", shown(&error.to_string())))
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS).collect()
}

/// Names that answers repeat.
fn short(field: &str, name: &str, least: usize) -> Result<(), Fault> {
    if (least..=MAX_ID_CHARS).contains(&name.chars().count()) {
        return Ok(());
    }
    let least = least.max(1);
    Err(Fault::Form(format!("{field} has {least} to {MAX_ID_CHARS} characters")))
}

fn subscribe(text: &str) -> Result<Subscribe, Fault> {
    let SubscribeFields { id, tables, ops, filter, columns, from } = fields(text)?;
    short("id", &id, 1)?;
    let from = match from.map(RawValue::get) {
        None => From::default(),
        Some(word) if word.starts_with('"') => {
            let from = serde_json::from_str(word);
            let what = || format!("from {} is no beginning: see docs/PROTOCOL.md, `subscribe`", shown(word));
            from.map_err(|_| Fault::Subscribe { id: id.clone(), what: what() })?
        }
        Some(object) if object.starts_with('{') => {
            let Position { cursor, snapshot_if_gone } = fields(object)?;
            match (cursor, snapshot_if_gone) {
                (Some(cursor), None) => From::Cursor(cursor),
                (None, Some(cursor)) => From::SnapshotIfGone(cursor),
                _ => {
                    let what = "from names one position: {\"cursor\":\"…\"} or {\"snapshot_if_gone\":\"…\"}".to_owned();
                    return Err(Fault::Subscribe { id, what });
                }
            }
        }
        Some(_) => return Err(Fault::Form("from is a string or an object".to_owned())),
    };
    Ok(Subscribe { id, tables, ops, filter, columns, from })
}

fn ping(text: &str) -> Result<ClientMessage, Fault> {
    let PingFields { t } = fields(text)?;
    if t.is_some_and(|t| t.get().len() > MAX_PING_BYTES) {
        return Err(Fault::Ping(format!("t of a ping has at most {MAX_PING_BYTES} bytes")));
    }
    Ok(ClientMessage::Ping { t: t.map(|t| RawJson(t.to_owned())) })
}

fn sync(text: &str) -> Result<ClientMessage, Fault> {
    let SyncFields { tx, timeout_ms } = fields(text)?;
    short("tx", &tx, 0)?;
    let timeout_ms = match timeout_ms.map(RawValue::get) {
        None => None,
        Some(number) if number.starts_with(|c: char| c == '-' || c.is_ascii_digit()) => {
            if !number.bytes().all(|byte| byte.is_ascii_digit()) {
                let what = "timeout_ms is a whole number of milliseconds, written in digits alone".to_owned();
                return Err(Fault::Sync { tx, what });
            }
            // However large: what is above the longest wait counts as that.
            Some(number.parse().unwrap_or(u64::MAX))
        }
        Some(_) => return Err(Fault::Form("timeout_ms is a number".to_owned())),
    };
    Ok(ClientMessage::Sync { tx, timeout_ms })
}

#[cfg(test)]
mod tests;
