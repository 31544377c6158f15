//! Error codes of the protocol, and the `error` a client sees.

use serde::{Deserialize, Serialize};

/// What went wrong, as the client's program sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// Malformed JSON, an unknown type, a missing or mistyped field.
    BadMessage,
    /// No valid credential.
    Unauthenticated,
    /// The key may not; the message names the table, operation or column.
    Forbidden,
    /// No such table.
    UnknownTable,
    /// The table exists but is not tracked.
    NotTracked,
    /// The `where` is not in the language; the message has the position and the reason.
    BadFilter,
    /// The subscription id is in use on this connection.
    DuplicateId,
    /// Over the connection's limit of subscriptions.
    TooManySubscriptions,
    /// Over a rate or connection limit.
    RateLimited,
    /// A text over its limit.
    TooLarge,
    /// The subscription costs more than this node can spend on it for long.
    TooExpensive,
    /// Known, but not offered by this server.
    Unsupported,
    /// Not now: Postgres is away, or a wait ran out.
    Unavailable,
    /// An error of the server's own.
    Internal,
}

impl ErrorCode {
    /// Every code, for tables and tests.
    pub const ALL: &'static [ErrorCode] = &[
        Self::BadMessage,
        Self::Unauthenticated,
        Self::Forbidden,
        Self::UnknownTable,
        Self::NotTracked,
        Self::BadFilter,
        Self::DuplicateId,
        Self::TooManySubscriptions,
        Self::RateLimited,
        Self::TooLarge,
        Self::TooExpensive,
        Self::Unsupported,
        Self::Unavailable,
        Self::Internal,
    ];

    /// The code's text on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadMessage => "bad_message",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden => "forbidden",
            Self::UnknownTable => "unknown_table",
            Self::NotTracked => "not_tracked",
            Self::BadFilter => "bad_filter",
            Self::DuplicateId => "duplicate_id",
            Self::TooManySubscriptions => "too_many_subscriptions",
            Self::RateLimited => "rate_limited",
            Self::TooLarge => "too_large",
            Self::TooExpensive => "too_expensive",
            Self::Unsupported => "unsupported",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }
}

/// Whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    /// The same request will fail again.
    Never,
    /// At once.
    Now,
    /// After a back-off.
    Backoff,
    /// Forget the position, fetch the state anew, subscribe from `now`.
    Resync,
}

/// An error as it goes to the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.as_str())]
pub struct WireError {
    /// What went wrong.
    pub code: ErrorCode,
    /// Cause and what to do, for people.
    pub message: String,
    /// Whether trying again can help.
    pub retry: Retry,
    /// With `backoff`: at least this long, milliseconds.
    pub retry_after_ms: Option<u64>,
}

impl WireError {
    /// An error that trying again will not mend.
    pub fn never(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry: Retry::Never, retry_after_ms: None }
    }

    /// An error that may pass; `retry_after_ms` in milliseconds.
    pub fn backoff(code: ErrorCode, message: impl Into<String>, retry_after_ms: u64) -> Self {
        Self { code, message: message.into(), retry: Retry::Backoff, retry_after_ms: Some(retry_after_ms) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_code_is_the_one_on_the_wire() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }
}
