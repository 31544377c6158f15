//! What a client is told: where the servers are ([`ConnectOptions`]), and what it wants to hear
//! ([`SubscribeOptions`]).

use std::fmt;

use url::Url;

use crate::client::error::ClientError;
use crate::client::machine::FIRST_ATTEMPTS;
use crate::cursor::Cursor;
use crate::protocol::message::{From as WireFrom, Subscribe};

/// Consecutive attempts without progress before a client gives up, unless told otherwise. With full jitter up to 10 s
/// they take about a minute and a half.
pub const DEFAULT_ATTEMPTS: u32 = 20;

/// Bytes that a connection reads at once, unless told otherwise.
pub const DEFAULT_READ_BUFFER_BYTES: usize = 16 * 1024;

/// Where the servers are and how to be let in.
#[derive(Clone)]
pub struct ConnectOptions {
    pub(super) urls: Vec<String>,
    pub(super) key: Option<String>,
    pub(super) attempts: Option<u32>,
    pub(super) first_attempts: u32,
    pub(super) read_buffer_bytes: usize,
}

// The key must not reach a log through `{:?}`.
impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("urls", &self.urls)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}

impl ConnectOptions {
    /// The address of a node or of a balancer before several: `http(s)://host:port` or `ws(s)://host:port`.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            urls: vec![url.into()],
            key: None,
            attempts: Some(DEFAULT_ATTEMPTS),
            first_attempts: FIRST_ATTEMPTS,
            read_buffer_bytes: DEFAULT_READ_BUFFER_BYTES,
        }
    }

    /// Another node of the same cluster; each attempt takes the next one.
    #[must_use]
    pub fn or(mut self, url: impl Into<String>) -> Self {
        self.urls.push(url.into());
        self
    }

    /// The API key, sent as `Authorization: Bearer`.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// How many attempts in a row may fail before the client gives up, at the first connection and after a loss; 0 never
    /// reconnects. Without it a first connection is given up after a few.
    #[must_use]
    pub const fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = Some(attempts);
        self.first_attempts = attempts.saturating_sub(1);
        self
    }

    /// Try for as long as the process lives. (The first connection is still given up after a few attempts.)
    #[must_use]
    pub const fn unlimited_attempts(mut self) -> Self {
        self.attempts = None;
        self
    }

    /// Bytes that a connection reads at once: larger for throughput, smaller for thousands of clients in a process.
    #[must_use]
    pub const fn read_buffer_bytes(mut self, bytes: usize) -> Self {
        self.read_buffer_bytes = bytes;
        self
    }

    /// The addresses as WebSocket URLs.
    pub(super) fn endpoints(&self) -> Result<Vec<Url>, ClientError> {
        self.urls.iter().map(|url| endpoint(url)).collect()
    }
}

/// `http` becomes `ws`, and the protocol's path is added where it is missing.
fn endpoint(given: &str) -> Result<Url, ClientError> {
    const PATH: &str = "/v1/ws";
    // What stands before an `@` may be a password: it is not repeated.
    let shown = given.rsplit('@').next().unwrap_or_default().to_owned();
    let bad = |reason: &str| ClientError::BadUrl { url: shown.clone(), reason: reason.to_owned() };
    let mut url = Url::parse(given).map_err(|error| bad(&error.to_string()))?;
    let scheme = match url.scheme() {
        "http" | "ws" => "ws",
        "https" | "wss" => "wss",
        other => return Err(bad(&format!("the scheme is `{other}`"))),
    };
    if url.host_str().is_none_or(str::is_empty) {
        return Err(bad("it has no host"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("it holds credentials, which end up in logs: give the API key apart"));
    }
    url.set_scheme(scheme).map_err(|()| bad("its scheme cannot be changed to WebSocket"))?;
    let path = url.path().trim_end_matches('/');
    if !path.ends_with(PATH) {
        let path = format!("{path}{PATH}");
        url.set_path(&path);
    }
    url.set_query(None);
    url.set_fragment(None);
    Ok(url)
}

/// Where a subscription begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// With the next change.
    #[default]
    Now,
    /// With the oldest whole transaction that the log still has. The key needs the history scope.
    Oldest,
    /// After this position: the text of a cursor, exactly as the server or [`position`](super::Subscription::position)
    /// gave it.
    After(String),
}

impl std::convert::From<Cursor> for Start {
    fn from(cursor: Cursor) -> Self {
        Self::After(cursor.to_string())
    }
}

/// What a subscription wants to hear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubscribeOptions {
    pub(super) id: Option<String>,
    pub(super) tables: Vec<String>,
    pub(super) ops: Option<Vec<String>>,
    pub(super) filter: Option<String>,
    pub(super) columns: Option<Vec<String>>,
    pub(super) start: Start,
}

impl SubscribeOptions {
    /// Tables (`public.orders`), globs (`sales.*`, `*`) or domain events (`event:invoice`, `event:*`).
    pub fn tables<T: Into<String>>(tables: impl IntoIterator<Item = T>) -> Self {
        Self { tables: tables.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// A SQL condition over the row's columns.
    #[must_use]
    pub fn filter(mut self, filter: impl Into<String>) -> Self {
        self.filter = Some(filter.into());
        self
    }

    /// Only these operations, such as `INSERT`.
    #[must_use]
    pub fn ops<T: Into<String>>(mut self, ops: impl IntoIterator<Item = T>) -> Self {
        self.ops = Some(ops.into_iter().map(Into::into).collect());
        self
    }

    /// Only these columns of the rows.
    #[must_use]
    pub fn columns<T: Into<String>>(mut self, columns: impl IntoIterator<Item = T>) -> Self {
        self.columns = Some(columns.into_iter().map(Into::into).collect());
        self
    }

    /// Where to begin; [`Start::Now`] unless told otherwise. A [`Cursor`] will do.
    #[must_use]
    pub fn from(mut self, start: impl Into<Start>) -> Self {
        self.start = start.into();
        self
    }

    /// A name for the server's logs and listings, unique on this client, at most 64 characters; one is made otherwise.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// The request as it stands on the wire, except for a position gained since.
    pub(super) fn into_request(self, id: String) -> Subscribe {
        let from = match self.start {
            Start::Now => WireFrom::Now,
            Start::Oldest => WireFrom::Oldest,
            Start::After(cursor) => WireFrom::Cursor(cursor),
        };
        Subscribe { id, tables: self.tables, ops: self.ops, filter: self.filter, columns: self.columns, from }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_people_become_endpoints() {
        for (given, want) in [
            ("http://127.0.0.1:7400", "ws://127.0.0.1:7400/v1/ws"),
            ("https://feed.example.com/", "wss://feed.example.com/v1/ws"),
            ("ws://h:1/v1/ws", "ws://h:1/v1/ws"),
            ("wss://h/prefix/?x=1#y", "wss://h/prefix/v1/ws"),
            ("http://[::1]:80/v1/ws/", "ws://[::1]/v1/ws/"),
        ] {
            assert_eq!(endpoint(given).unwrap().as_str(), want, "{given}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused_without_repeating_a_password() {
        for given in ["127.0.0.1:7400", "ftp://h", "http://", "http://me:hush@h:1", "hush@"] {
            let text = endpoint(given).unwrap_err().to_string();
            assert!(!text.contains("hush"), "{text}");
        }
    }

    #[test]
    fn the_key_is_not_printed() {
        assert!(!format!("{:?}", ConnectOptions::new("http://h").key("cdc_secret")).contains("secret"));
    }
}
