//! `GET /v1/ws`: the WebSocket.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::{RawQuery, State};
use axum::http::HeaderMap;
use axum::response::Response;
use futures_util::SinkExt as _;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use crate::http::checked_frames::CheckedFrames;
use crate::http::credentials;
use crate::http::handshake::Handshake;
use crate::http::problem::Problem;
use crate::http::query::Query;
use crate::protocol::SUBPROTOCOL;
use crate::protocol::close::CloseCode;
use crate::protocol::error::{ErrorCode, WireError};
use crate::session::live::Session;
use crate::session::socket::Pieces;
use crate::session::{Context, socket};

/// Allocated for each connection at once; clients send little.
const READ_BUFFER_BYTES: usize = 1 << 10;
/// Written to the kernel beyond this; a connection keeps its largest message's size.
const WRITE_BUFFER_BYTES: usize = 16 << 10;

/// A connection's frames.
type Socket = WebSocketStream<CheckedFrames<TokioIo<Upgraded>>>;

/// Upgrades, after judging the handshake and the credentials that came along.
///
/// # Errors
/// A [`Problem`] before the upgrade.
pub async fn upgrade(
    State(context): State<Arc<Context>>,
    RawQuery(raw): RawQuery,
    headers: HeaderMap,
    handshake: Result<Handshake, Problem>,
) -> Result<Response, Problem> {
    let handshake = handshake?;
    has_room(&context)?;
    let access = credentials::access(&context, &headers, &Query::read(raw.as_deref())?).await?;
    let admitted = match access {
        Some(access) => {
            let guard = credentials::connection(&context, &access)?;
            Some((access, guard))
        }
        None => None,
    };
    let other_version = handshake.other_version();
    let (response, on_upgrade) = handshake.accept();
    let spawner = Arc::clone(&context);
    spawner.lifecycle.spawn("websocket", async move {
        let upgraded = match on_upgrade.await {
            Ok(upgraded) => upgraded,
            Err(error) => {
                tracing::debug!(%error, "a connection ended before it was a WebSocket");
                return;
            }
        };
        let pieces = Pieces::default();
        let socket = socket(&context, upgraded, pieces.clone()).await;
        if other_version {
            return close_version(socket).await;
        }
        let session = Session::new(Arc::clone(&context), admitted, true);
        socket::serve(context, socket, session, pieces).await;
    });
    Ok(response)
}

async fn socket(context: &Context, upgraded: Upgraded, pieces: Pieces) -> Socket {
    let message_bytes = Some(context.options.limits.message_bytes);
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_message_size(message_bytes)
        .max_frame_size(message_bytes);
    let frames = CheckedFrames::new(TokioIo::new(upgraded), pieces);
    WebSocketStream::from_raw_socket(frames, Role::Server, Some(config)).await
}

async fn close_version(mut socket: Socket) {
    let what = format!("no offered version is served: offer {SUBPROTOCOL} in Sec-WebSocket-Protocol");
    let error = socket::error_text(WireError::never(ErrorCode::Unsupported, what));
    // Whoever has gone need not be told.
    if socket.feed(error).await.is_ok() {
        let _ = socket.send(socket::close_frame(CloseCode::Version)).await;
    }
}

/// A node that drains or is full sends newcomers elsewhere.
pub(super) fn has_room(context: &Context) -> Result<(), Problem> {
    if context.drain.borrow().is_some() || context.lifecycle.soft().is_cancelled() {
        return Err(Problem::unavailable("this node is going away: connect to another", 1));
    }
    if context.connections.load(Ordering::Relaxed) >= context.options.max_connections {
        return Err(Problem::unavailable("this node has as many connections as it may: connect to another", 5));
    }
    Ok(())
}
