//! `/chaos/failpoints`, in test builds only: see `failpoint`.

use std::collections::BTreeMap;

use axum::extract::Path;
use axum::http::StatusCode;
use axum::routing::{get, put};
use axum::{Json, Router};

use crate::failpoint::{NotArmed, arm, states};

/// GET lists, PUT arms.
pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new().route("/chaos/failpoints", get(list)).route("/chaos/failpoints/{name}", put(set))
}

async fn list() -> Json<BTreeMap<&'static str, String>> {
    Json(states())
}

async fn set(Path(name): Path<String>, action: String) -> (StatusCode, String) {
    match arm(&name, &action) {
        Ok(()) => (StatusCode::OK, "armed\n".to_owned()),
        Err(error @ NotArmed::Unknown(_)) => (StatusCode::NOT_FOUND, format!("{error}\n")),
        Err(error @ NotArmed::BadAction) => (StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}
