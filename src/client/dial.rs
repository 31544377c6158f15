//! One attempt to connect: TCP, TLS, upgrade. What comes of it is a socket or the reason why not.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::client::Request;
use tokio_tungstenite::tungstenite::http::header::{AUTHORIZATION, HeaderValue, RETRY_AFTER};
use tokio_tungstenite::tungstenite::http::{HeaderMap, Response};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, error::UrlError};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};
use url::Url;

use crate::client::error::{ClientError, Disconnect};

/// A connection to a node.
pub(super) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// The largest message that is taken: a frame may hold a single event of any size, and Postgres's values end at 1 GB.
const MAX_MESSAGE_BYTES: usize = 1 << 30;
/// As much of an error page as is worth showing, bytes.
const MAX_SHOWN_BODY: usize = 200;

/// How to get in.
#[derive(Clone)]
pub(super) struct Credential(Option<HeaderValue>);

// Not even the header's length is anyone's business.
impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credential")
    }
}

impl Credential {
    pub(super) fn bearer(key: Option<&str>) -> Result<Self, ClientError> {
        let header = key.map(|key| HeaderValue::from_str(&format!("Bearer {}", key.trim()))).transpose();
        let mut header = header.map_err(|_| ClientError::BadKey)?;
        if let Some(header) = &mut header {
            header.set_sensitive(true);
        }
        Ok(Self(header))
    }
}

/// Connects to `url`. No limit of time: the caller has one.
pub(super) async fn dial(url: &Url, credential: &Credential, read_buffer_bytes: usize) -> Result<Socket, Disconnect> {
    let request = request(url, credential).map_err(|error| Disconnect::Network(error.to_string()))?;
    let config = WebSocketConfig::default()
        .read_buffer_size(read_buffer_bytes)
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    // Boxed: a TLS handshake's state is larger than everything else of the client.
    match Box::pin(connect_async_with_config(request, Some(config), true)).await {
        Ok((socket, _)) => Ok(socket),
        Err(error) => Err(reason(error, url)),
    }
}

fn request(url: &Url, credential: &Credential) -> Result<Request, Error> {
    let mut request = url.as_str().into_client_request()?;
    if let Some(header) = &credential.0 {
        request.headers_mut().insert(AUTHORIZATION, header.clone());
    }
    Ok(request)
}

fn reason(error: Error, url: &Url) -> Disconnect {
    match error {
        Error::Http(response) => refused(&response),
        Error::Io(error) => Disconnect::Network(format!("{}: {error}", place(url))),
        Error::Url(UrlError::UnableToConnect(_)) => Disconnect::Network(format!("{}: cannot connect", place(url))),
        other => Disconnect::Network(format!("{}: {other}", place(url))),
    }
}

/// The address without path.
fn place(url: &Url) -> String {
    let port = url.port_or_known_default().unwrap_or_default();
    format!("{}:{port}", url.host_str().unwrap_or_default())
}

fn refused(response: &Response<Option<Vec<u8>>>) -> Disconnect {
    let body = response.body().as_deref().unwrap_or_default();
    Disconnect::Http {
        status: response.status().as_u16(),
        message: message(body),
        retry_after: retry_after(response.headers()),
    }
}

/// A problem document's `detail` (RFC 9457), or the first line of whatever it is.
fn message(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Problem {
        detail: String,
    }
    if let Ok(problem) = serde_json::from_slice::<Problem>(body) {
        return problem.detail;
    }
    let text = String::from_utf8_lossy(body);
    text.lines().next().unwrap_or_default().chars().take(MAX_SHOWN_BODY).collect()
}

/// Only the form in seconds: our servers send no dates.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_the_server_says() {
        let body = br#"{"type":"about:blank","title":"x","detail":"the key has 3 connections of 3"}"#;
        let response = Response::builder().status(429).header("retry-after", "7").body(Some(body.to_vec())).unwrap();
        let want = Disconnect::Http {
            status: 429,
            message: "the key has 3 connections of 3".into(),
            retry_after: Some(Duration::from_secs(7)),
        };
        assert_eq!(refused(&response), want);
    }

    #[test]
    fn a_key_with_a_line_break_inside_is_refused_and_a_trailing_one_is_trimmed() {
        assert!(Credential::bearer(Some("cdc_a\nb")).is_err());
        assert!(Credential::bearer(Some("cdc_a\n")).is_ok());
    }
}
