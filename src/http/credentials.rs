//! Who asks: the credentials of a request, and the key's place in the limits.

use axum::http::{HeaderMap, StatusCode, header};

use crate::auth::store::{Access, AuthError};
use crate::auth::ticket::TicketError;
use crate::cluster::ConnectionGuard;
use crate::http::problem::Problem;
use crate::http::query::Query;
use crate::protocol::error::ErrorCode;
use crate::session::Context;

/// Parameters in which people put keys; a key in a URL ends up in logs.
const REFUSED_PARAMETERS: [&str; 5] = ["key", "api_key", "apikey", "token", "access_token"];

/// Refuses a key in the query.
///
/// # Errors
/// 400 that says where keys belong.
pub fn refuse_keys(query: &Query) -> Result<(), Problem> {
    let is_refused = |name: &str| REFUSED_PARAMETERS.iter().any(|refused| refused.eq_ignore_ascii_case(name));
    if query.names().any(is_refused) {
        let what =
            "a key in the URL ends up in logs: send it as Authorization: Bearer, or a ticket from POST /v1/tickets";
        return Err(Problem::new(StatusCode::BAD_REQUEST, ErrorCode::BadMessage, what));
    }
    Ok(())
}

/// The key that a request comes with; None when it comes without any credential. A ticket is used up, unless a key comes
/// beside it.
///
/// # Errors
/// A [`Problem`] for whatever is not good.
#[expect(clippy::disallowed_methods, reason = "the edge: keys expire by the clock on the wall")]
pub async fn access(context: &Context, headers: &HeaderMap, query: &Query) -> Result<Option<Access>, Problem> {
    let unauthenticated = |what: &str| Problem::new(StatusCode::UNAUTHORIZED, ErrorCode::Unauthenticated, what);
    refuse_keys(query)?;
    let ticket = query.one("ticket")?;
    let mut authorizations = headers.get_all(header::AUTHORIZATION).iter();
    if let Some(value) = authorizations.next() {
        if authorizations.next().is_some() {
            return Err(unauthenticated("there is more than one Authorization header"));
        }
        let text = value.to_str().map_err(|_| unauthenticated("the Authorization header is not text"))?;
        let Some((scheme, token)) = text.split_once(' ') else {
            return Err(unauthenticated("the Authorization header is not `Bearer <key>`"));
        };
        if scheme.eq_ignore_ascii_case("basic") {
            return Err(unauthenticated("database credentials are not offered by this version: use an API key"));
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(unauthenticated("the Authorization header is not `Bearer <key>`"));
        }
        let judged = context.keys.authenticate(token.trim(), chrono::Utc::now()).await;
        return count(context, judged).map(Some);
    }
    let Some(ticket) = ticket else { return Ok(None) };
    let key_id = context.tickets.redeem(ticket).await.map_err(|error| match error {
        TicketError::Unavailable => Problem::unavailable(error.to_string(), 1),
        _ => unauthenticated(&error.to_string()),
    })?;
    let judged = context.keys.admit(&key_id, chrono::Utc::now()).await;
    count(context, judged).map(Some)
}

fn count(context: &Context, judged: Result<Access, AuthError>) -> Result<Access, Problem> {
    let outcome = if judged.is_ok() { "accepted" } else { "refused" };
    context.metrics.auth_total.with_label_values(&[outcome]).inc();
    judged.map_err(|error| match error {
        AuthError::Unavailable => Problem::unavailable(error.to_string(), 1),
        _ => Problem::new(StatusCode::UNAUTHORIZED, ErrorCode::Unauthenticated, error.to_string()),
    })
}

/// Takes one of the key's connections.
///
/// # Errors
/// 429 over the limit.
pub fn connection(context: &Context, access: &Access) -> Result<ConnectionGuard, Problem> {
    context.limiter.try_acquire(&access.key_id, access.scopes.max_connections()).map_err(|over| {
        Problem::new(StatusCode::TOO_MANY_REQUESTS, ErrorCode::RateLimited, over.to_string()).retry_after(5)
    })
}
