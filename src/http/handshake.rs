//! The WebSocket handshake of RFC 6455, 4.2: what a request must have, and the answer to it.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use axum::response::{IntoResponse as _, Response};
use hyper::upgrade::OnUpgrade;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::http::problem::Problem;
use crate::protocol::SUBPROTOCOL;
use crate::protocol::error::ErrorCode;

/// Base64 of 16 bytes: 22 digits and `==`.
const KEY_DIGITS: usize = 22;

/// A request that may become a WebSocket.
#[derive(Debug)]
pub struct Handshake {
    accept: HeaderValue,
    on_upgrade: OnUpgrade,
    subprotocol: bool,
    other_version: bool,
}

impl<S: Send + Sync> FromRequestParts<S> for Handshake {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let upgrade_required = |what: &str| {
            let what = format!("this is a WebSocket: {what}");
            Problem::new(StatusCode::UPGRADE_REQUIRED, ErrorCode::BadMessage, what)
        };
        let headers = &parts.headers;
        if parts.method != Method::GET || parts.version != Version::HTTP_11 {
            return Err(upgrade_required("it begins with GET and HTTP/1.1"));
        }
        if !names(headers, header::CONNECTION, "upgrade") || !names(headers, header::UPGRADE, "websocket") {
            return Err(upgrade_required("send Connection: Upgrade and Upgrade: websocket"));
        }
        if one(headers, header::SEC_WEBSOCKET_VERSION) != Some(b"13") {
            return Err(upgrade_required("send Sec-WebSocket-Version: 13"));
        }
        let Some(key) = one(headers, header::SEC_WEBSOCKET_KEY).filter(|key| is_key(key)) else {
            let what = "Sec-WebSocket-Key is once there, and base64 of 16 bytes";
            return Err(Problem::new(StatusCode::BAD_REQUEST, ErrorCode::BadMessage, what));
        };
        let accept = HeaderValue::from_str(&derive_accept_key(key))
            .map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::Internal, error.to_string()))?;
        let offered: Vec<&str> = tokens(headers, header::SEC_WEBSOCKET_PROTOCOL).collect();
        let subprotocol = offered.contains(&SUBPROTOCOL);
        // Names that are not ours are no concern of ours.
        let other_version = !subprotocol && offered.iter().any(|name| name.starts_with("tidewire."));
        let Some(on_upgrade) = parts.extensions.remove::<OnUpgrade>() else {
            return Err(upgrade_required("this connection cannot become one"));
        };
        Ok(Self { accept, on_upgrade, subprotocol, other_version })
    }
}

impl Handshake {
    /// Whether only versions of our protocol were offered that we do not speak.
    #[must_use]
    pub const fn other_version(&self) -> bool {
        self.other_version
    }

    /// The answer, and the connection once the answer is out.
    #[must_use]
    pub fn accept(self) -> (Response, OnUpgrade) {
        let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, self.accept);
        if self.subprotocol {
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        }
        (response, self.on_upgrade)
    }
}

/// The value of a header that comes exactly once.
fn one(headers: &HeaderMap, name: HeaderName) -> Option<&[u8]> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none()).map(HeaderValue::as_bytes)
}

/// The tokens of a header that is a list, in every line of it.
fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let texts = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    texts.flat_map(|text| text.split(',')).map(str::trim)
}

fn names(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    tokens(headers, name).any(|one| one.eq_ignore_ascii_case(token))
}

fn is_key(key: &[u8]) -> bool {
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || [b'+', b'/'].contains(byte);
    key.strip_suffix(b"==").is_some_and(|digits| digits.len() == KEY_DIGITS && digits.iter().all(is_digit))
}
