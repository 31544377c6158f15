//! `GET /v1/sse`: one subscription as Server-Sent Events.
//!
//! The same session as a WebSocket's, with one subscription and a client that cannot speak. A reconnecting `EventSource`
//! sends `Last-Event-ID`, which is the cursor.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::SendTimeoutError;

use crate::http::credentials;
use crate::http::problem::Problem;
use crate::http::query::Query;
use crate::http::ws::has_room;
use crate::protocol::error::{ErrorCode, Retry};
use crate::protocol::message::{ClientMessage, From, ServerMessage, Subscribe};
use crate::session::Context;
use crate::session::live::{Emit, Session};
use crate::session::socket::text_of;

/// A comment at least this often, so that nothing in between believes the stream dead.
const COMMENT_INTERVAL: Duration = Duration::from_secs(15);
/// Reconnect after a cut, milliseconds; jittered by half.
const RETRY_MS: u64 = 1_000;
/// Reconnect where the same request would fail again: not without a person's doing.
const RETRY_NEVER_MS: u64 = 3_600_000;
/// The id of the only subscription.
const ID: &str = "sse";
/// What the query may hold.
const PARAMETERS: [&str; 7] = ["table", "where", "op", "column", "cursor", "from", "ticket"];

/// Opens the stream.
///
/// # Errors
/// A [`Problem`] before the stream begins; later errors are events.
pub async fn stream(
    State(context): State<Arc<Context>>,
    RawQuery(raw): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    has_room(&context)?;
    let query = Query::read(raw.as_deref())?;
    let subscribe = read(&headers, &query)?;
    let Some(access) = credentials::access(&context, &headers, &query).await? else {
        let what = "send the key as Authorization: Bearer, or a ticket from POST /v1/tickets";
        return Err(Problem::new(StatusCode::UNAUTHORIZED, ErrorCode::Unauthenticated, what));
    };
    let guard = credentials::connection(&context, &access)?;
    let mut session = Session::new(Arc::clone(&context), Some((access, guard)), false);
    let text = serde_json::to_string(&ClientMessage::Subscribe(subscribe)).unwrap_or_default();
    session.message(&text);
    let hard = context.lifecycle.hard().clone();
    let transport = context.metrics.connections.with_label_values(&["sse"]);
    transport.inc();
    context.metrics.connections_total.with_label_values(&["sse"]).inc();
    let retry = rand::random_range(RETRY_MS / 2..RETRY_MS * 3 / 2);
    let events = Events {
        session,
        transport,
        greeting: Some(format!("retry: {retry}\n\n")),
        comment: Box::pin(tokio::time::sleep(COMMENT_INTERVAL)),
        over: false,
        stopped: Box::pin(hard.cancelled_owned()),
    };
    // In a task of its own: a body that nobody reads is not polled, and revocation, drain and slowness happen in there.
    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    context.lifecycle.spawn("sse", hand_over(events, sender, Arc::clone(&context)));
    let pieces = futures_util::stream::poll_fn(move |task| receiver.poll_recv(task));
    let mut response = Response::new(Body::from_stream(pieces));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // nginx would collect the stream.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Passes the stream on until it ends, or the client goes, or accepts nothing for too long.
async fn hand_over(events: Events, sender: Sender<Result<Bytes, Infallible>>, context: Arc<Context>) {
    let mut events = std::pin::pin!(events);
    loop {
        let piece = tokio::select! {
            piece = events.next() => piece,
            () = sender.closed() => None,
        };
        let Some(piece) = piece else { return };
        let sending = sender.send_timeout(piece, context.options.slow_after);
        let working = std::future::poll_fn(|task| {
            events.session.poll_work(task);
            Poll::Pending::<std::convert::Infallible>
        });
        let sent = tokio::select! {
            biased;
            sent = sending => sent,
            never = working => match never {},
        };
        match sent {
            Ok(()) => {}
            Err(SendTimeoutError::Timeout(_)) => {
                context.metrics.slow_consumers_total.inc();
                return;
            }
            Err(SendTimeoutError::Closed(_)) => return,
        }
    }
}

/// The subscription, as the query and `Last-Event-ID` have it.
fn read(headers: &HeaderMap, query: &Query) -> Result<Subscribe, Problem> {
    let bad = |what: String| Problem::new(StatusCode::BAD_REQUEST, ErrorCode::BadMessage, what);
    // Before the parameters: a key's own advice is better than "there is no parameter".
    credentials::refuse_keys(query)?;
    query.only(&PARAMETERS)?;
    query.one("ticket")?;
    let (last_id, cursor, from) = (last_event_id(headers)?, query.one("cursor")?, query.one("from")?);
    if let Some(from) = from.filter(|from| !["now", "oldest", "snapshot"].contains(from)) {
        return Err(bad(format!("from={from}: use now, oldest or snapshot")));
    }
    let from = match (last_id.or_else(|| cursor.map(str::to_owned)), from) {
        (Some(cursor), _) => From::Cursor(cursor),
        (None, Some("snapshot")) => From::Snapshot,
        (None, Some("oldest")) => From::Oldest,
        (None, _) => From::Now,
    };
    let tables = query.all("table");
    if tables.is_empty() {
        return Err(bad("name at least one table: /v1/sse?table=public.orders".to_owned()));
    }
    let (ops, columns) = (query.all("op"), query.all("column"));
    Ok(Subscribe {
        id: ID.to_owned(),
        tables,
        ops: (!ops.is_empty()).then_some(ops),
        filter: query.one("where")?.map(str::to_owned),
        columns: (!columns.is_empty()).then_some(columns),
        from,
    })
}

/// The cursor that a reconnecting `EventSource` sends. What is no cursor is handed on as it is and answered as such: a stream
/// that began at now instead would hide a hole. Empty means none, as in the HTML standard.
fn last_event_id(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all("last-event-id").iter().filter(|value| !value.is_empty());
    let value = values.next();
    if values.next().is_some() {
        let what = "there is more than one Last-Event-ID header";
        return Err(Problem::new(StatusCode::BAD_REQUEST, ErrorCode::BadMessage, what));
    }
    Ok(value.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()))
}

/// The body: what the session says, as event-stream text.
struct Events {
    session: Session,
    transport: prometheus::IntGauge,
    greeting: Option<String>,
    comment: Pin<Box<tokio::time::Sleep>>,
    over: bool,
    stopped: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.transport.dec();
    }
}

impl Stream for Events {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Some(greeting) = this.greeting.take() {
            return Poll::Ready(Some(Ok(greeting.into())));
        }
        if this.over || this.stopped.as_mut().poll(task).is_ready() {
            return Poll::Ready(None);
        }
        while let Poll::Ready(emit) = this.session.poll_emit(task) {
            this.session.heard();
            let (text, over) = event_text(emit);
            this.over = over;
            if !text.is_empty() {
                let next = Instant::now() + COMMENT_INTERVAL;
                this.comment.as_mut().reset(next.into());
                return Poll::Ready(Some(Ok(text.into())));
            }
            if over {
                return Poll::Ready(None);
            }
        }
        if this.comment.as_mut().poll(task).is_ready() {
            let next = Instant::now() + COMMENT_INTERVAL;
            this.comment.as_mut().reset(next.into());
            return Poll::Ready(Some(Ok(Bytes::from_static(b": \n\n"))));
        }
        Poll::Pending
    }
}

/// The text of one event, and whether the stream ends after it.
fn event_text(emit: Emit) -> (String, bool) {
    match emit {
        Emit::Events { frame, .. } => {
            let body = String::from_utf8_lossy(&frame.body);
            let data = format!("{{\"cursor\":\"{}\",\"events\":[{body}]}}", frame.cursor);
            (event("events", Some(&frame.cursor.to_string()), &data), false)
        }
        Emit::Message(message) => match &message {
            ServerMessage::CaughtUp { cursor, .. } => {
                (event("caught_up", Some(&cursor.to_string()), &text_of(&message)), false)
            }
            ServerMessage::Progress { cursor, .. } => {
                (event("progress", Some(&cursor.to_string()), &text_of(&message)), false)
            }
            ServerMessage::ResyncRequired(_) => {
                let text = event("resync_required", None, &text_of(&message));
                (format!("retry: {RETRY_NEVER_MS}\n{text}"), true)
            }
            ServerMessage::Error { retry, .. } => {
                let text = event("error", None, &text_of(&message));
                (format!("retry: {}\n{text}", retry_ms(*retry)), true)
            }
            ServerMessage::Drain { reconnect_after_ms, .. } => (format!("retry: {reconnect_after_ms}\n\n"), false),
            _ => (String::new(), false),
        },
        Emit::Ping => (String::from(": \n\n"), false),
        Emit::Close(_) => (String::new(), true),
    }
}

/// When to reconnect after an error that advises `retry`.
const fn retry_ms(retry: Retry) -> u64 {
    match retry {
        Retry::Never | Retry::Resync => RETRY_NEVER_MS,
        Retry::Now => RETRY_MS,
        Retry::Backoff => RETRY_MS * 10,
    }
}

fn event(name: &str, id: Option<&str>, data: &str) -> String {
    let mut out = String::with_capacity(data.len() + 96);
    let _ = writeln!(out, "event: {name}");
    if let Some(id) = id {
        let _ = writeln!(out, "id: {id}");
    }
    // One line: line breaks in JSON text stand between tokens only.
    out.push_str("data: ");
    out.extend(data.chars().map(|c| if c == '\n' || c == '\r' { ' ' } else { c }));
    out.push_str("\n\n");
    out
}
