//! HTTP: one resource a file, one mapping of errors.

mod checked_frames;
mod cors;
pub mod credentials;
#[cfg(feature = "chaos")]
mod failpoints;
pub mod handshake;
pub mod health;
pub mod problem;
pub mod query;
pub mod serve;
pub mod sse;
pub mod tickets;
pub mod ws;

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::{get, post};

use crate::http::problem::Problem;
use crate::session::Context;

/// Everything that a node answers.
pub fn router(context: Arc<Context>) -> Router {
    let router = Router::new();
    #[cfg(feature = "chaos")]
    let router = router.merge(failpoints::routes());
    router
        // HEAD would run GET's handler, open what nobody reads and use up a ticket.
        .route("/v1/ws", get(ws::upgrade).head(get_only).fallback(get_only))
        .route("/v1/sse", get(sse::stream).head(get_only).fallback(get_only))
        .route("/v1/tickets", post(tickets::issue))
        .route("/health", get(health::health))
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics))
        .fallback(async || Problem::not_found())
        .method_not_allowed_fallback(async || Problem::method_not_allowed())
        .layer(from_fn_with_state(Arc::clone(&context), cors::check))
        .with_state(context)
}

async fn get_only() -> impl IntoResponse {
    ([(header::ALLOW, "GET")], Problem::method_not_allowed())
}
