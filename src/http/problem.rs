//! Errors as RFC 9457 problem documents, with the protocol's codes.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::protocol::error::{ErrorCode, WireError};

/// An error as an HTTP answer.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    code: Option<ErrorCode>,
    detail: String,
    retry_after_s: Option<u64>,
}

impl Problem {
    /// An error with its status.
    pub fn new(status: StatusCode, code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { status, code: Some(code), detail: detail.into(), retry_after_s: None }
    }

    /// No such resource.
    #[must_use]
    pub fn not_found() -> Self {
        let detail = "no such resource: docs/PROTOCOL.md lists them".to_owned();
        Self { status: StatusCode::NOT_FOUND, code: None, detail, retry_after_s: None }
    }

    /// The resource has other methods.
    #[must_use]
    pub fn method_not_allowed() -> Self {
        let detail = "this resource has other methods: docs/PROTOCOL.md lists them".to_owned();
        Self { status: StatusCode::METHOD_NOT_ALLOWED, code: None, detail, retry_after_s: None }
    }

    /// Not now.
    pub fn unavailable(detail: impl Into<String>, retry_after_s: u64) -> Self {
        let detail = detail.into();
        let (status, code) = (StatusCode::SERVICE_UNAVAILABLE, Some(ErrorCode::Unavailable));
        Self { status, code, detail, retry_after_s: Some(retry_after_s) }
    }

    /// When to try again, seconds.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }
}

impl From<WireError> for Problem {
    fn from(error: WireError) -> Self {
        let status = match error.code {
            ErrorCode::BadMessage | ErrorCode::BadFilter | ErrorCode::DuplicateId => StatusCode::BAD_REQUEST,
            ErrorCode::Unauthenticated => StatusCode::UNAUTHORIZED,
            ErrorCode::Forbidden => StatusCode::FORBIDDEN,
            ErrorCode::UnknownTable | ErrorCode::NotTracked => StatusCode::NOT_FOUND,
            ErrorCode::TooManySubscriptions | ErrorCode::RateLimited | ErrorCode::TooExpensive => {
                StatusCode::TOO_MANY_REQUESTS
            }
            ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorCode::Unsupported => StatusCode::NOT_IMPLEMENTED,
            ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let retry_after_s = error.retry_after_ms.map(|millis| millis.div_ceil(1000));
        Self { status, code: Some(error.code), detail: error.message, retry_after_s }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or("error"),
            "status": self.status.as_u16(),
            "code": self.code,
            "detail": self.detail,
        });
        let mut response = (self.status, body.to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        // RFC 9110, 15.5.22 and RFC 6455, 4.2.2: what to change to.
        if self.status == StatusCode::UPGRADE_REQUIRED {
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
