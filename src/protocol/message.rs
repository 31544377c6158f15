//! The messages of version 1. Unknown fields are ignored; an unknown type from a client is an error.
//!
//! `events` is not among [`ServerMessage`]: its frames are composed from bytes that all subscribers share
//! (`hub::frame`), never from a structure.

use serde::{Deserialize, Serialize};

use crate::cursor::Cursor;
use crate::protocol::error::{ErrorCode, Retry};
use crate::protocol::inbound::RawJson;

/// Longest subscription id, characters.
pub const MAX_ID_CHARS: usize = 64;

/// A message from a client; read by [`ClientMessage::read`](super::inbound).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientMessage {
    /// Credentials, when none came with the upgrade; later a new token for the live socket.
    Auth(Auth),
    /// Begin a subscription.
    Subscribe(Subscribe),
    /// End one.
    Unsubscribe {
        /// The subscription.
        id: String,
    },
    /// Answered with `pong`.
    Ping {
        /// Echoed as it was written.
        #[serde(skip_serializing_if = "Option::is_none")]
        t: Option<RawJson>,
    },
    /// Ask to be told when everything of a transaction has been sent.
    Sync {
        /// Decimal `pg_current_xact_id()`.
        tx: String,
        /// At most 30,000 milliseconds; the default is that.
        #[serde(skip_serializing_if = "Option::is_none")]
        timeout_ms: Option<u64>,
    },
}

/// Credentials in a message.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Auth {
    /// An API key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// A database role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Its password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

// Secrets must not reach a log through `{:?}`.
impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").field("role", &self.role).finish_non_exhaustive()
    }
}

/// A wish to be told of changes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Subscribe {
    /// Chosen by the client, unique on its connection, 1 to 64 characters.
    pub id: String,
    /// Names and globs.
    pub tables: Vec<String>,
    /// Only these operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<Vec<String>>,
    /// SQL condition over the row.
    #[serde(rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Only these columns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// Where to begin.
    pub from: From,
}

/// Where a subscription begins. Cursors are texts here: a malformed one is answered, not refused as a message.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// With the next change.
    #[default]
    Now,
    /// With the oldest whole transaction that the log still has.
    Oldest,
    /// With the rows as they are.
    Snapshot,
    /// After this position.
    Cursor(String),
    /// After this position, or with the rows where it is gone.
    SnapshotIfGone(String),
}

/// A message to a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerMessage {
    /// First message after authentication.
    Welcome(Welcome),
    /// The subscription stands.
    Subscribed {
        /// The subscription.
        id: String,
        /// Its position; null for a snapshot.
        cursor: Option<Cursor>,
        /// Whether nothing was missed since the given cursor; null for `now`, `oldest` and `snapshot`.
        recovered: Option<bool>,
        /// Where its first events come from.
        source: Source,
    },
    /// The replay has reached the present.
    CaughtUp {
        /// The subscription.
        id: String,
        /// Its position.
        cursor: Cursor,
    },
    /// Everything up to here that matches has been sent.
    Progress {
        /// The subscriptions.
        ids: Vec<String>,
        /// Their position.
        cursor: Cursor,
    },
    /// The subscription has ended and cannot be resumed.
    ResyncRequired(Resync),
    /// The subscription has ended because the client asked.
    Unsubscribed {
        /// The subscription.
        id: String,
    },
    /// Everything of that transaction has been sent.
    Synced {
        /// The transaction.
        tx: String,
        /// The position that holds it.
        cursor: Cursor,
    },
    /// The node is about to go.
    Drain {
        /// This client's slot, milliseconds from this message.
        reconnect_after_ms: u64,
        /// When the node is gone, milliseconds from this message.
        deadline_ms: u64,
    },
    /// The answer to `ping`.
    Pong {
        /// As it came.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        t: Option<RawJson>,
    },
    /// Something was refused.
    Error {
        /// The subscription it concerns.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// The transaction of the `sync` it answers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tx: Option<String>,
        /// For programs.
        code: ErrorCode,
        /// For people: cause and what to do.
        message: String,
        /// Whether trying again can help.
        retry: Retry,
        /// At least this long, milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u64>,
    },
}

/// What a connection begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Protocol version.
    pub version: u32,
    /// This connection's name in logs and in `/v1/subscriptions`.
    pub connection: String,
    /// The node that serves it.
    pub node: String,
    /// Interval of the server's pings, milliseconds.
    pub heartbeat_ms: u64,
    /// Longest silence of a caught-up subscription, milliseconds.
    pub progress_ms: u64,
    /// How far back a resume can go.
    pub window: Window,
    /// What a client must stay within.
    pub limits: Limits,
}

/// How far back a resume can go, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// From memory, as of now.
    pub memory_ms: u64,
    /// From the log.
    pub history_ms: u64,
}

/// Limits of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Largest inbound message, bytes.
    pub message_bytes: usize,
    /// Most subscriptions.
    pub subscriptions: usize,
    /// Longest `where`, bytes.
    pub filter_bytes: usize,
    /// Sustained inbound messages a second.
    pub messages_per_s: u32,
    /// Largest `events` frame, bytes, unless a single event is larger.
    pub frame_bytes: usize,
}

/// Where the first events of a subscription come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Nothing to replay.
    Live,
    /// The node's ring.
    Memory,
    /// The log.
    History,
    /// The table.
    Snapshot,
}

impl Source {
    /// The label of metrics and of the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Memory => "memory",
            Self::History => "history",
            Self::Snapshot => "snapshot",
        }
    }
}

/// Why a subscription cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResyncReason {
    /// Older than the log.
    CursorExpired,
    /// Past the start of a later epoch, or its check differs.
    HistoryDiverged,
    /// Malformed, of an unknown epoch, or beyond the end.
    CursorInvalid,
    /// A column of the filter or of the list is gone.
    SchemaChanged,
    /// The table is gone.
    TableDropped,
    /// The table is not tracked any more.
    NotTracked,
    /// Changes were made that are not in the log.
    CaptureGap,
    /// The position left the log while connected.
    TooFarBehind,
}

impl ResyncReason {
    /// Every reason, for tables and tests.
    pub const ALL: &'static [ResyncReason] = &[
        Self::CursorExpired,
        Self::HistoryDiverged,
        Self::CursorInvalid,
        Self::SchemaChanged,
        Self::TableDropped,
        Self::NotTracked,
        Self::CaptureGap,
        Self::TooFarBehind,
    ];

    /// The text on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CursorExpired => "cursor_expired",
            Self::HistoryDiverged => "history_diverged",
            Self::CursorInvalid => "cursor_invalid",
            Self::SchemaChanged => "schema_changed",
            Self::TableDropped => "table_dropped",
            Self::NotTracked => "not_tracked",
            Self::CaptureGap => "capture_gap",
            Self::TooFarBehind => "too_far_behind",
        }
    }
}

/// The end of a subscription that cannot be resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resync {
    /// The subscription.
    pub id: String,
    /// Why.
    pub reason: ResyncReason,
    /// The oldest position that can be resumed from.
    pub oldest: Option<Cursor>,
    /// The newest position.
    pub newest: Option<Cursor>,
    /// Cause and what to do, for people.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_reason_is_the_one_on_the_wire() {
        for reason in ResyncReason::ALL {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        }
    }
}
