//! `POST /v1/tickets`: a single-use ticket for an `EventSource`, which cannot send headers.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};

use crate::auth::ticket::{TICKET_TTL, TicketError};
use crate::http::credentials;
use crate::http::problem::Problem;
use crate::http::query::Query;
use crate::protocol::error::ErrorCode;
use crate::session::Context;

/// Issues a ticket to the bearer of a key.
///
/// # Errors
/// 401 without a key, 429 with too many tickets pending, 503 while Postgres is away.
pub async fn issue(
    State(context): State<Arc<Context>>,
    RawQuery(raw): RawQuery,
    headers: HeaderMap,
) -> Result<(StatusCode, Json<serde_json::Value>), Problem> {
    let query = Query::read(raw.as_deref())?;
    // A ticket in the URL buys no other: whoever was given one for a stream would keep access as long as the key has it.
    let query = query.without("ticket");
    let Some(access) = credentials::access(&context, &headers, &query).await? else {
        let what = "send the key as Authorization: Bearer";
        return Err(Problem::new(StatusCode::UNAUTHORIZED, ErrorCode::Unauthenticated, what));
    };
    let ticket = context.tickets.issue(&access.key_id).await.map_err(|error| match error {
        TicketError::TooMany => {
            Problem::new(StatusCode::TOO_MANY_REQUESTS, ErrorCode::RateLimited, error.to_string()).retry_after(30)
        }
        _ => Problem::unavailable(error.to_string(), 1),
    })?;
    let body = serde_json::json!({ "ticket": ticket.expose(), "expires_in_ms": TICKET_TTL.as_millis() });
    Ok((StatusCode::CREATED, Json(body)))
}
