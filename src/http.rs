//! HTTP: one resource a file, one mapping of errors.

pub mod credentials;
#[cfg(feature = "chaos")]
mod failpoints;
pub mod health;
pub mod problem;
pub mod serve;
pub mod sse;
pub mod tickets;
pub mod ws;

use std::sync::Arc;

use axum::Router;
use axum::routing::{any, get, post};

use crate::http::problem::Problem;
use crate::session::Context;

/// Everything that a node answers.
pub fn router(context: Arc<Context>) -> Router {
    let router = Router::new();
    #[cfg(feature = "chaos")]
    let router = router.merge(failpoints::routes());
    router
        .route("/v1/ws", any(ws::upgrade))
        .route("/v1/sse", get(sse::stream))
        .route("/v1/tickets", post(tickets::issue))
        .route("/health", get(health::health))
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics))
        .fallback(async || Problem::not_found())
        .method_not_allowed_fallback(async || Problem::method_not_allowed())
        .with_state(context)
}
