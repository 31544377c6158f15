//! `GET /v1/ws`: the WebSocket.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;

use crate::http::credentials;
use crate::http::problem::Problem;
use crate::http::query::Query;
use crate::protocol::SUBPROTOCOL;
use crate::protocol::close::CloseCode;
use crate::protocol::error::ErrorCode;
use crate::session::live::Session;
use crate::session::{Context, socket};

/// Allocated for each connection at once; clients send little.
const READ_BUFFER_BYTES: usize = 1 << 10;
/// Written to the kernel beyond this; a connection keeps its largest message's size.
const WRITE_BUFFER_BYTES: usize = 16 << 10;

/// Upgrades, after judging the credentials that came along.
///
/// # Errors
/// A [`Problem`] before the upgrade.
pub async fn upgrade(
    State(context): State<Arc<Context>>,
    RawQuery(raw): RawQuery,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    let upgrade = upgrade.map_err(|rejection| {
        let what = format!("this is a WebSocket: {rejection}");
        Problem::new(StatusCode::UPGRADE_REQUIRED, ErrorCode::BadMessage, what)
    })?;
    has_room(&context)?;
    let access = credentials::access(&context, &headers, &Query::read(raw.as_deref())?).await?;
    let admitted = match access {
        Some(access) => {
            let guard = credentials::connection(&context, &access)?;
            Some((access, guard))
        }
        None => None,
    };
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_message_size(context.options.limits.message_bytes)
        .max_frame_size(context.options.limits.message_bytes);
    let other_version = speaks_another_version(&headers);
    Ok(upgrade.on_upgrade(async move |socket| {
        if other_version {
            return close_version(socket).await;
        }
        let session = Session::new(Arc::clone(&context), admitted, true);
        socket::serve(context, socket, session).await;
    }))
}

async fn close_version(mut socket: WebSocket) {
    let code = CloseCode::Version;
    let frame = CloseFrame { code: code.code(), reason: code.reason().into() };
    let _ = socket.send(Message::Close(Some(frame))).await;
}

/// Offers only versions of our protocol that we do not speak. Names that are not ours are no concern of ours.
fn speaks_another_version(headers: &HeaderMap) -> bool {
    let offered: Vec<&str> = headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    !offered.contains(&SUBPROTOCOL) && offered.iter().any(|name| name.starts_with("tidewire."))
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
