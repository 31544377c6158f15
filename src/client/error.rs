//! Why a connection was lost ([`Disconnect`]), and why a client or a subscription ended ([`ClientError`]).
//!
//! The first is news: the client goes on by itself. The second is final: the text says the cause and what to do.

use std::time::Duration;

use crate::cursor::Cursor;
use crate::protocol::close::{Advice, CloseCode};
use crate::protocol::error::WireError;
use crate::protocol::message::Resync;

/// Close codes of this range mean "do not reconnect unchanged", also those that a later server invents.
const STOP_CODES: std::ops::Range<u16> = 4400..4500;

/// Why a connection was lost, or could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Disconnect {
    /// The address cannot be reached, or the connection broke.
    #[error("{0}")]
    Network(String),
    /// The server, or a balancer before it, answered the upgrade with an HTTP status.
    #[error("HTTP {status} instead of a WebSocket{}", detail(.message))]
    Http {
        /// The status.
        status: u16,
        /// The body's first line, or its `detail`.
        message: String,
        /// The server asks to wait this long.
        retry_after: Option<Duration>,
    },
    /// The server closed the connection.
    #[error("closed by the server: {code} {reason}{}", detail(.message))]
    Closed {
        /// The close code; 1005 when there was none, 1006 when the connection ended without a close frame.
        code: u16,
        /// Its text.
        reason: String,
        /// The `error` that came before it.
        message: String,
    },
    /// The connection was not ready in time.
    #[error("no welcome within {} s", .0.as_secs())]
    NoWelcome(Duration),
    /// Nothing was heard for so long that the connection must be dead.
    #[error("nothing was heard for {} s", .0.as_secs())]
    Silence(Duration),
    /// A frame did not follow on the position held: something is missing before it.
    #[error("a frame of `{id}` follows on {prev}, but the position is {held}")]
    Mismatch {
        /// The subscription.
        id: String,
        /// The position held.
        held: String,
        /// The frame's `prev`.
        prev: String,
    },
    /// The node drains, and this client's slot has come.
    #[error("the node restarts")]
    Drain,
    /// The server said something that is not in the protocol.
    #[error("not the protocol: {0}")]
    Protocol(String),
}

fn detail(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

pub(super) fn mismatch(id: &str, held: Option<Cursor>, prev: Option<Cursor>) -> Disconnect {
    let text = |cursor: Option<Cursor>| cursor.map_or_else(|| "nothing".to_owned(), |cursor| cursor.to_string());
    Disconnect::Mismatch { id: id.to_owned(), held: text(held), prev: text(prev) }
}

impl Disconnect {
    /// The error to end with, where reconnecting unchanged would end the same way.
    pub(super) fn stops(&self) -> Option<ClientError> {
        match self {
            Self::Closed { code, reason, message } if close_stops(*code) => {
                Some(ClientError::Closed { code: *code, reason: reason.clone(), message: message.clone() })
            }
            // 408, 425 and 429 pass with time; the other statuses of 400 and more are about this very request.
            Self::Http { status: status @ (300..=407 | 409..=424 | 426..=428 | 430..=499), message, .. } => {
                Some(ClientError::Rejected { status: *status, message: message.clone() })
            }
            _ => None,
        }
    }

    /// The wait that the server asks for.
    pub(super) const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Http { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

fn close_stops(code: u16) -> bool {
    match CloseCode::from_code(code) {
        Some(known) => known.advice() == Advice::Stop,
        None => STOP_CODES.contains(&code),
    }
}

/// Why a client, a subscription or a request ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The address is none that a client can use.
    #[error("`{url}` is no address of a node: {reason}. Give http(s):// or ws(s)://, host and port.")]
    BadUrl {
        /// As it was given, without credentials.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The key has characters that no key has. (It is not repeated here.)
    #[error("the API key has characters that cannot stand in a header: copy it again, from `cdc_` to its end")]
    BadKey,
    /// The limit of consecutive attempts was reached.
    #[error("gave up after {attempts} attempts; the last one: {last}. Is the server running, and is this its address?")]
    GaveUp {
        /// How many.
        attempts: u32,
        /// Why the last one failed.
        last: Disconnect,
    },
    /// The server closed the connection for a reason that reconnecting does not mend.
    #[error("the server closed the connection: {code} {reason}{}. {}", detail(.message), remedy(*.code))]
    Closed {
        /// The close code.
        code: u16,
        /// Its text.
        reason: String,
        /// The `error` that came before it.
        message: String,
    },
    /// The upgrade was refused for a reason that trying again does not mend.
    #[error("the server refused the connection: HTTP {status}{}. {}", detail(.message), status_remedy(*.status))]
    Rejected {
        /// The HTTP status.
        status: u16,
        /// The body's first line, or its `detail`.
        message: String,
    },
    /// The server speaks another version of the protocol.
    #[error("the server speaks protocol version {0}, this client version {version}: use a matching pair", version = crate::protocol::VERSION)]
    Version(u32),
    /// The server refused a subscription or a request.
    #[error("{0}")]
    Refused(WireError),
    /// The position to begin at cannot be resumed from.
    #[error("{}: {}", .0.reason.as_str(), .0.message)]
    Resync(Box<Resync>),
    /// An event could not be read; the subscription has ended before it.
    #[error("an event after {after} could not be read: {reason}. Update the client, or report this")]
    Unreadable {
        /// The position before the frame.
        after: String,
        /// What the parser says.
        reason: String,
    },
    /// A subscription of this client has this id.
    #[error("the id `{0}` is in use on this client: choose another, or leave it out")]
    DuplicateId(String),
    /// The connection was lost before the answer came.
    #[error("the connection was lost before the answer came ({0}); ask again")]
    Interrupted(Disconnect),
    /// The answer did not come in time.
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The client was shut down.
    #[error("the client was shut down")]
    Stopped,
}

fn remedy(code: u16) -> &'static str {
    match CloseCode::from_code(code) {
        Some(CloseCode::Unauthenticated | CloseCode::AuthTimeout) => "Give a valid API key (`tidewire keys create`)",
        Some(CloseCode::KeyRevoked | CloseCode::KeyExpired) => "Create another key with `tidewire keys create`",
        Some(CloseCode::Forbidden) => "Use a key with the scope that is needed",
        Some(CloseCode::Version) => "Use a client and a server of matching versions",
        _ => "Trying again unchanged would end the same way",
    }
}

fn status_remedy(status: u16) -> &'static str {
    match status {
        401 => "Give a valid API key (`tidewire keys create`)",
        403 => "The server does not allow this origin or key",
        404 => "There is no Tidewire at this address and path",
        426 => "A proxy on the way does not pass WebSocket upgrades on",
        _ => "Check the address and what stands before the server",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(code: u16) -> Disconnect {
        Disconnect::Closed { code, reason: String::new(), message: String::new() }
    }

    #[test]
    fn every_close_code_follows_its_advice() {
        for code in CloseCode::ALL {
            assert_eq!(closed(code.code()).stops().is_some(), code.advice() == Advice::Stop, "{code:?}");
        }
    }

    #[test]
    fn codes_of_later_servers_go_by_their_range() {
        assert!(closed(4499).stops().is_some());
        assert!(closed(4099).stops().is_none() && closed(1006).stops().is_none());
    }

    #[test]
    fn a_busy_server_is_tried_again_and_a_refusal_is_not() {
        let http = |status| Disconnect::Http { status, message: String::new(), retry_after: None };
        assert!([401, 403, 404, 426].iter().all(|status| http(*status).stops().is_some()));
        assert!([408, 429, 500, 502, 503].iter().all(|status| http(*status).stops().is_none()));
    }
}
