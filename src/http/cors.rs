//! Which pages a browser lets in: `allowed_origins`, for everything below `/v1/`.
//!
//! Without a list any page may ask, as whatever is below `/v1/` needs a key or a ticket that the page must have. With
//! one, other pages are refused before anything is done for them. No cookie is ever read, so browsers are never told to
//! send any. `/health`, `/metrics` and the like are for operators: no page of another origin may read them.
//!
//! Source of the rules: the Fetch standard, "CORS protocol".

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use crate::http::problem::Problem;
use crate::protocol::error::ErrorCode;
use crate::session::Context;

/// What a page may send.
const METHODS: HeaderValue = HeaderValue::from_static("GET, POST");
/// Beside those that need no permission. `*` would not cover Authorization. The last three are sent by clients of event
/// streams that are no `EventSource`, and by tracing.
const HEADERS: HeaderValue =
    HeaderValue::from_static("authorization, content-type, last-event-id, cache-control, traceparent, tracestate");
/// What a page may read beside the body.
const EXPOSED: HeaderValue = HeaderValue::from_static("retry-after, www-authenticate");
/// How long a browser need not ask again, seconds: the most that Chromium keeps.
const MAX_AGE_S: u64 = 7_200;
/// A list has this entry when it allows everybody.
const ANY: &str = "*";

/// Refuses pages that may not ask, answers preflights, and lets the others read what they get.
pub(super) async fn check(State(context): State<Arc<Context>>, request: Request, next: Next) -> Response {
    if !request.uri().path().starts_with("/v1/") {
        return next.run(request).await;
    }
    let allowed = &context.options.allowed_origins;
    let mut response = match permission(allowed, request.headers()) {
        Err(problem) => problem.into_response(),
        Ok(permission) => {
            let mut response = match is_preflight(&request) {
                true => preflight(),
                false => next.run(request).await,
            };
            if let Some(origin) = permission {
                response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
                response.headers_mut().insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
            }
            response
        }
    };
    if !allows_any(allowed) {
        response.headers_mut().append(header::VARY, HeaderValue::from_static("Origin"));
    }
    response
}

fn allows_any(allowed: &[String]) -> bool {
    allowed.is_empty() || allowed.iter().any(|one| one == ANY)
}

/// The origin to name in the answer; None for who is no page.
fn permission(allowed: &[String], headers: &HeaderMap) -> Result<Option<HeaderValue>, Problem> {
    if allows_any(allowed) {
        return Ok(Some(HeaderValue::from_static(ANY)));
    }
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let (Some(origin), more) = (origins.next(), origins.next()) else { return Ok(None) };
    let matches = |one: &String| one.as_bytes().eq_ignore_ascii_case(origin.as_bytes());
    if more.is_none() && allowed.iter().any(matches) {
        return Ok(Some(origin.clone()));
    }
    let what =
        format!("pages of {} may not connect: add it to allowed_origins", origin.to_str().unwrap_or("this origin"));
    Err(Problem::new(StatusCode::FORBIDDEN, ErrorCode::Forbidden, what))
}

fn is_preflight(request: &Request) -> bool {
    let headers = request.headers();
    request.method() == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

fn preflight() -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HEADERS);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from(MAX_AGE_S));
    response
}
