//! `/health`, `/livez`, `/readyz`, `/metrics`.
//!
//! Ready is for *new* connections only. A balancer must keep the sockets of a node that answers 404 here (HAProxy:
//! `http-check disable-on-404`). The absence of a leader makes no node unready: else one paused leader, or one restart
//! of Postgres, would cut every client at once.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::http::problem::Problem;
use crate::protocol::error::ErrorCode;
use crate::session::Context;

/// Why this node takes no new connections; None when it does.
#[must_use]
pub fn unready(context: &Context) -> Option<&'static str> {
    if context.drain.borrow().is_some() || context.lifecycle.soft().is_cancelled() {
        return Some("draining");
    }
    if !context.follower.listening() {
        return Some("Postgres is not reached");
    }
    if context.hub.edge().held {
        return Some("the log's state is not known yet");
    }
    if !context.follower.current() {
        return Some("behind the log");
    }
    if !context.cluster.heard() {
        return Some("the other nodes' connections are not known yet");
    }
    None
}

/// 200: the process runs.
pub async fn live() -> &'static str {
    "alive\n"
}

/// 200: takes new connections. 404: does not; existing ones stay.
pub async fn ready(State(context): State<Arc<Context>>) -> (StatusCode, String) {
    match unready(&context) {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(reason) => (StatusCode::NOT_FOUND, format!("{reason}\n")),
    }
}

/// Each component's state.
pub async fn health(State(context): State<Arc<Context>>) -> Json<serde_json::Value> {
    let (edge, metrics) = (context.hub.edge(), &context.metrics);
    let log_newest = metrics.log_newest_seq.get();
    Json(serde_json::json!({
        "node": context.node,
        "version": env!("CARGO_PKG_VERSION"),
        "ready": unready(&context).is_none(),
        "reason": unready(&context),
        "postgres": { "listening": context.follower.listening(), "silence_ms": context.follower.silence().as_millis() as u64 },
        "log": { "epoch": context.hub.epochs().newest(), "cursor": edge.boundary, "newest_seq": log_newest, "held": edge.held },
        "ring": { "events": metrics.ring_events.get(), "bytes": metrics.ring_bytes.get(), "age_ms": metrics.ring_age_ms.get() },
        "relay": { "leader": metrics.leader.get() == 1, "term": metrics.term.get(), "parked": metrics.relay_parked.get() == 1, "foreign_locks": context.intruders.seen() },
        "capture": capture(&context),
        "connections": context.connections.load(Ordering::Relaxed),
        "subscriptions": metrics.subscriptions.get(),
    }))
}

/// Tables whose changes do not all come into the log. Of no consequence for readiness: another node would not do better.
fn capture(context: &Context) -> serde_json::Value {
    let broken = context.registry.faults();
    match broken.is_empty() {
        true => serde_json::json!({ "broken": {} }),
        false => serde_json::json!({ "broken": broken, "run": "tidewire doctor says which statement repairs each" }),
    }
}

/// Prometheus text.
///
/// # Errors
/// 500 when a collector is inconsistent.
pub async fn metrics(State(context): State<Arc<Context>>) -> Result<Response, Problem> {
    let metrics = &context.metrics;
    metrics.ready.set(i64::from(unready(&context).is_none()));
    let lag = metrics.log_newest_seq.get() - context.hub.edge().deliverable.seq.cast_signed();
    metrics.event_lag_seqs.set(lag.max(0));
    let text = metrics
        .render()
        .map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::Internal, error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}
