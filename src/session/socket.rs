//! A session over a WebSocket: one task that reads, writes and waits, all in one poll.
//!
//! Frames are fed into the socket's small write buffer while it takes them and flushed together. When it does not, the
//! session is simply not asked for more: its positions wait in the ring. A client that accepts nothing for
//! `slow_after` is closed with 4008 and may resume.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use futures_util::{Sink as _, Stream as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Bytes, Error as WireFault, Message, Utf8Bytes};

use crate::failpoint;
use crate::protocol::close::CloseCode;
use crate::protocol::error::{ErrorCode, WireError};
use crate::protocol::framing::HeadFault;
use crate::protocol::message::ServerMessage;
use crate::session::Context;
use crate::session::live::{Emit, Session};

/// Answers that wait for a client that does not read them; with more, it is not read either.
const MAX_BACKLOG: usize = 64;
/// Continuation frames that are read before they are counted: no more than the burst of messages that a client may send at once.
const MAX_PIECES: u32 = 50;
/// Time for the client to answer our close frame, or to take what is on its way to it after its own.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Frames that one poll writes before other tasks of the thread get their turn.
const EMITS_A_POLL: usize = 64;
/// And bytes of events: a thousand of them may have been rendered for this client alone, which takes milliseconds.
const BYTES_A_POLL: usize = 256 << 10;

/// Frames of a client that continue a message, counted by whoever reads its bytes and taken note of by its session: a message
/// in a thousand pieces is as much work as a thousand messages.
#[derive(Clone, Debug, Default)]
pub struct Pieces(Arc<AtomicU32>);

impl Pieces {
    /// So many more.
    pub fn add(&self, count: u32) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Whether the session is to take note of them before more is read.
    #[must_use]
    pub fn are_many(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= MAX_PIECES
    }

    fn take(&self) -> u32 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

/// Serves one WebSocket to its end. `pieces` are those of the client's bytes.
pub async fn serve<S>(context: Arc<Context>, socket: WebSocketStream<S>, session: Session, pieces: Pieces)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let hard = context.lifecycle.hard().clone();
    let transport = context.metrics.connections.with_label_values(&["websocket"]);
    transport.inc();
    context.metrics.connections_total.with_label_values(&["websocket"]).inc();
    let served = Served {
        socket,
        session,
        pieces,
        slow_after: context.options.slow_after,
        blocked_since: None,
        slow_timer: None,
        pause: None,
        closing: None,
        slow: false,
        left: false,
        held_back: false,
        held_back_total: context.metrics.held_back_total.clone(),
        dirty: false,
    };
    tokio::select! {
        slow = served.run() => if slow {
            context.metrics.slow_consumers_total.inc();
        },
        () = hard.cancelled() => {}
    }
    transport.dec();
}

struct Served<S> {
    socket: WebSocketStream<S>,
    session: Session,
    pieces: Pieces,
    slow_after: Duration,
    blocked_since: Option<Instant>,
    slow_timer: Option<Pin<Box<tokio::time::Sleep>>>,
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
    // A close frame is out or has come; until then we wait for the other.
    closing: Option<Pin<Box<tokio::time::Sleep>>>,
    // Why: it accepted nothing for too long.
    slow: bool,
    // The client has sent its close frame: nothing can be written any more but the library's answer to it.
    left: bool,
    // Its messages wait until it has taken our answers, or its credentials have been checked.
    held_back: bool,
    held_back_total: prometheus::IntCounter,
    dirty: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Served<S> {
    /// True: the client was too slow.
    async fn run(mut self) -> bool {
        std::future::poll_fn(|task| self.poll(task)).await;
        self.slow
    }

    fn poll(&mut self, task: &mut TaskContext<'_>) -> Poll<()> {
        if self.poll_inbound(task) || self.poll_outbound(task) || self.poll_slow(task) {
            return Poll::Ready(());
        }
        if self.held_back && self.session.backlog() < MAX_BACKLOG && !self.session.is_authenticating() {
            task.waker().wake_by_ref();
        }
        match self.closing.as_mut() {
            Some(timer) => timer.as_mut().poll(task),
            None => Poll::Pending,
        }
    }

    /// True: the connection is gone.
    fn poll_inbound(&mut self, task: &mut TaskContext<'_>) -> bool {
        loop {
            let backlog = self.session.backlog() >= MAX_BACKLOG;
            if backlog && !self.held_back {
                self.held_back_total.inc();
            }
            self.held_back = backlog || self.session.is_authenticating();
            if self.held_back {
                return false;
            }
            if let Some(pause) = self.pause.as_mut() {
                if pause.as_mut().poll(task).is_pending() {
                    return false;
                }
                self.pause = None;
            }
            // What was asked is answered before a close frame behind it is read: after that nothing can be written any more.
            if self.session.backlog() > 0 && self.poll_feed(task) {
                return true;
            }
            let read = Pin::new(&mut self.socket).poll_next(task);
            let pieces = self.pieces.take();
            (0..pieces).for_each(|_| self.session.control());
            match read {
                Poll::Pending if pieces == 0 => return false,
                // They count, though they are no message yet.
                Poll::Pending => {}
                Poll::Ready(None) => return true,
                Poll::Ready(Some(Err(error))) => {
                    if !self.fault(&error) {
                        return true;
                    }
                    return false;
                }
                Poll::Ready(Some(Ok(message))) => {
                    self.dirty = true;
                    match message {
                        Message::Text(text) => self.session.message(text.as_str()),
                        Message::Binary(_) => self.session.refuse(
                            WireError::never(
                                ErrorCode::BadMessage,
                                "binary messages are not understood: send JSON text",
                            ),
                            CloseCode::Unsupported,
                        ),
                        Message::Ping(_) | Message::Pong(_) => self.session.control(),
                        // The library answers it; the stream ends once that is out.
                        Message::Close(_) => {
                            self.left = true;
                            self.session.leave();
                            self.closing.get_or_insert_with(|| Box::pin(tokio::time::sleep(CLOSE_TIMEOUT)));
                        }
                        // Only ever written.
                        Message::Frame(_) => {}
                    }
                }
            }
            if let Some(until) = self.session.paused_until() {
                self.pause = Some(Box::pin(tokio::time::sleep_until(until.into())));
            }
        }
    }

    /// False: nothing more can be said on this connection.
    fn fault(&mut self, error: &WireFault) -> bool {
        let (code, what) = match error {
            WireFault::Capacity(CapacityError::MessageTooLong { .. }) => {
                (CloseCode::TooLarge, "the message is larger than limits.message_bytes".to_owned())
            }
            WireFault::Utf8(_) => (CloseCode::NotUtf8, "the text is not UTF-8".to_owned()),
            // Gone without a word: nobody is left to be told, and nothing was wrong with what it said.
            WireFault::Protocol(ProtocolError::ResetWithoutClosingHandshake) => return false,
            WireFault::Protocol(fault) => (CloseCode::Protocol, format!("these bytes are not WebSocket: {fault}")),
            WireFault::Io(error) => match error.get_ref().and_then(|inner| inner.downcast_ref::<HeadFault>()) {
                Some(fault) => (CloseCode::Protocol, format!("these bytes are not WebSocket: {fault}")),
                None => return false,
            },
            _ => return false,
        };
        let kind = if code == CloseCode::TooLarge { ErrorCode::TooLarge } else { ErrorCode::BadMessage };
        self.session.refuse(WireError::never(kind, what), code);
        // What was read is not in step any more; say goodbye and do not read on.
        self.pause = Some(Box::pin(tokio::time::sleep(CLOSE_TIMEOUT)));
        true
    }

    /// Hands what there is to the socket's buffer, as long as that takes it. True: the connection is gone.
    fn poll_feed(&mut self, task: &mut TaskContext<'_>) -> bool {
        if self.left {
            self.session.poll_work(task);
            return false;
        }
        let (mut emitted, mut bytes) = (0, 0);
        loop {
            match Pin::new(&mut self.socket).poll_ready(task) {
                Poll::Ready(Ok(())) => self.blocked_since = None,
                Poll::Ready(Err(_)) => return true,
                Poll::Pending => {
                    self.blocked();
                    self.session.poll_work(task);
                    return false;
                }
            }
            if emitted == EMITS_A_POLL || bytes >= BYTES_A_POLL {
                task.waker().wake_by_ref();
                break;
            }
            let Poll::Ready(emit) = self.session.poll_emit(task) else { break };
            emitted += 1;
            if let Emit::Events { frame, .. } = &emit {
                bytes += frame.body.len();
            }
            if self.send(emit) {
                return true;
            }
        }
        false
    }

    /// True: the connection is gone.
    fn poll_outbound(&mut self, task: &mut TaskContext<'_>) -> bool {
        if self.poll_feed(task) {
            return true;
        }
        if self.dirty {
            match Pin::new(&mut self.socket).poll_flush(task) {
                Poll::Ready(Ok(())) => {
                    self.dirty = false;
                    self.blocked_since = None;
                }
                Poll::Ready(Err(_)) => return true,
                Poll::Pending => self.blocked(),
            }
        }
        false
    }

    /// Hands one message to the socket. True: the connection is gone.
    fn send(&mut self, emit: Emit) -> bool {
        self.dirty = true;
        if let Emit::Close(_) = emit {
            self.closing = Some(Box::pin(tokio::time::sleep(CLOSE_TIMEOUT)));
        }
        failpoint::fails("session.send") || Pin::new(&mut self.socket).start_send(message(emit)).is_err()
    }

    fn blocked(&mut self) {
        self.blocked_since.get_or_insert_with(Instant::now);
    }

    /// A client that has accepted nothing for too long is told so. True: the connection is gone.
    fn poll_slow(&mut self, task: &mut TaskContext<'_>) -> bool {
        let Some(since) = self.blocked_since.filter(|_| self.closing.is_none()) else {
            self.slow_timer = None;
            return false;
        };
        let until = since + self.slow_after;
        let timer = self.slow_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until.into())));
        if timer.deadline().into_std() < until {
            timer.as_mut().reset(until.into());
        }
        if timer.as_mut().poll(task).is_pending() {
            return false;
        }
        // The goodbye goes behind what is stuck; it is written if the client reads on within the close time.
        self.slow = true;
        self.session.close(CloseCode::Slow);
        while self.closing.is_none()
            && let Poll::Ready(emit) = self.session.poll_emit(task)
        {
            // What the machine had to say before is of no use any more.
            if matches!(emit, Emit::Close(_)) && self.send(emit) {
                return true;
            }
        }
        false
    }
}

fn message(emit: Emit) -> Message {
    match emit {
        Emit::Message(message) => Message::Text(text_of(&message).into()),
        Emit::Events { id, prev, frame } => match Utf8Bytes::try_from(frame.message(&id, &prev)) {
            Ok(text) => Message::Text(text),
            // Composed from texts that were checked when they came in.
            Err(_) => close_frame(CloseCode::Internal),
        },
        Emit::Ping => Message::Ping(Bytes::new()),
        Emit::Close(code) => close_frame(code),
    }
}

/// The close frame of this code.
#[must_use]
pub fn close_frame(code: CloseCode) -> Message {
    Message::Close(Some(CloseFrame { code: code.code().into(), reason: Utf8Bytes::from_static(code.reason()) }))
}

/// An error that ends the connection, which comes before the close frame.
#[must_use]
pub fn error_text(error: WireError) -> Message {
    let WireError { code, message, retry, retry_after_ms } = error;
    Message::Text(text_of(&ServerMessage::Error { id: None, tx: None, code, message, retry, retry_after_ms }).into())
}

/// A message as it stands on the wire.
#[must_use]
pub fn text_of(message: &ServerMessage) -> String {
    serde_json::to_string(message).unwrap_or_else(|_| String::from("{}"))
}
