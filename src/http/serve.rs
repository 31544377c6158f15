//! The listener: accepts, bounds, and serves HTTP/1.1 with upgrades.
//!
//! Not `axum::serve`: that has no time limit for a request's head, so idle handshakes would hold files for ever.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};

use crate::http::router;
use crate::session::Context;

/// Longest wait for a request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Wait after a failed accept (no files left, say), so that the loop does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Serves until the hard stop. While draining it still answers, so that a balancer reads "not ready" and not "dead".
pub async fn serve(listener: TcpListener, context: Arc<Context>) {
    let app = router(Arc::clone(&context));
    let hard = context.lifecycle.hard().clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = hard.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let (app, hard) = (app.clone(), hard.clone());
                give_up_after(&stream, context.options.slow_after * 2);
                context.lifecycle.spawn("connection", async move {
                    tokio::select! {
                        () = connection(stream, app) => {}
                        () = hard.cancelled() => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Has the system end a connection whose peer takes nothing for so long: a stream that was cut off for that, or an answer that
/// nobody reads, would keep its file for ever. Later than the session itself gives up, which says why.
fn give_up_after(stream: &TcpStream, patience: Duration) {
    #[cfg(target_os = "linux")]
    {
        use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};
        let millis = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
        if let Err(error) = setsockopt(stream, TcpUserTimeout, &millis) {
            tracing::debug!(%error, "TCP_USER_TIMEOUT could not be set");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (stream, patience);
}

async fn connection(stream: TcpStream, app: Router) {
    // Frames are flushed when they are whole; waiting for more would only add latency.
    let _ = stream.set_nodelay(true);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app))
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended badly");
    }
}
