//! One connection's protocol, sans-IO: messages and instants in, messages and wishes out.
//!
//! `Greeting → Open → Draining → Closed`. Each subscription is `Starting` (its wish is being judged), then running at a
//! position. Invariants, kept whatever comes in and tried with random scripts: a position never goes back; `events`
//! carries the position before it; `caught_up` comes exactly once; every wish is answered or the connection closes;
//! nothing is said after a close.
//!
//! Pure: no clock, no sockets, no hub. Who drives it asks [`Machine::poll`] for what to do next and tells it the time.

mod positions;
mod syncs;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::syncs::Sync;
use crate::cursor::{Cursor, Seq};
use crate::protocol::close::CloseCode;
use crate::protocol::error::{ErrorCode, Retry, WireError};
use crate::protocol::inbound::Fault;
use crate::protocol::message::{Auth, ClientMessage, Limits, Resync, ServerMessage, Source, Subscribe, Welcome};

/// Messages that may come at once above the sustained rate.
const BURST: f64 = 50.0;
/// A client that stays above the rate for this long is closed.
const INSISTENCE: Duration = Duration::from_secs(10);

/// Times that a machine keeps.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two pings.
    pub heartbeat: Duration,
    /// Longest silence of a caught-up subscription.
    pub progress: Duration,
    /// Wait for `auth`.
    pub auth_timeout: Duration,
    /// Whether silence of the client ends the connection (a WebSocket answers pings, an event stream cannot).
    pub expects_answers: bool,
}

/// What the driver is to do.
#[derive(Debug, PartialEq)]
pub enum Output {
    /// Send this.
    Send(ServerMessage),
    /// Send a ping.
    Ping,
    /// Say goodbye and close.
    Close(CloseCode),
    /// Judge these credentials; answer with [`Machine::welcome`] or [`Machine::refuse`].
    Authenticate(Auth),
    /// Judge this wish; answer with [`Machine::started`] or [`Machine::not_started`].
    Start {
        /// Tells this wish from a later one of the same id.
        serial: u64,
        /// The wish.
        subscribe: Box<Subscribe>,
    },
    /// The subscription of this id is over: let go of what serves it.
    Stop(Arc<str>),
    /// Find out where this transaction stands; answer with [`Machine::sync_found`] or [`Machine::sync_failed`].
    Sync {
        /// Tells this question from another of the same transaction.
        serial: u64,
        /// Its id.
        xid: u64,
        /// When to give up.
        until: Instant,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Greeting { until: Instant },
    Authenticating,
    Open,
    Draining { close_at: Instant },
    Closed,
}

#[derive(Debug)]
struct Subscription {
    id: Arc<str>,
    serial: u64,
    // None while it starts.
    position: Option<Cursor>,
    caught_up: bool,
    last_said: Instant,
    // Everything up to here that matches has been handed over, said or not.
    passed: Seq,
    // The end of the newest whole transaction that it had everything of; what `progress` may say.
    reached: Option<Cursor>,
    // The position stands inside a transaction.
    open: bool,
}

/// One connection's state.
#[derive(Debug)]
pub struct Machine {
    timing: Timing,
    limits: Limits,
    phase: Phase,
    subscriptions: Vec<Subscription>,
    serial: u64,
    syncs: Vec<Sync>,
    outputs: VecDeque<Output>,
    heard: Instant,
    ping_at: Instant,
    tokens: f64,
    tokens_at: Instant,
    limited_since: Option<Instant>,
    // Credentials that are being checked.
    authenticating: u32,
}

impl Machine {
    /// A connection that begins. Without credentials the server says nothing until `auth` comes.
    #[must_use]
    pub fn new(now: Instant, timing: Timing, limits: Limits) -> Self {
        Self {
            timing,
            limits,
            phase: Phase::Greeting { until: now + timing.auth_timeout },
            subscriptions: Vec::new(),
            serial: 0,
            syncs: Vec::new(),
            outputs: VecDeque::new(),
            heard: now,
            ping_at: now + timing.heartbeat,
            tokens: BURST,
            tokens_at: now,
            limited_since: None,
            authenticating: 0,
        }
    }

    /// What to do next.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// What is still to be done.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.outputs.len()
    }

    /// Whether the connection is over.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Anything came from the client.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// A frame came from the client that is no message: a ping, a pong. It counts against the rate as a message does.
    pub fn control(&mut self, now: Instant) {
        self.heard = now;
        if self.phase != Phase::Closed {
            self.spend(now);
        }
    }

    /// Whether credentials are being checked. Until that is over the driver reads nothing more from the client, so that what
    /// follows an `auth` is checked against its outcome.
    #[must_use]
    pub const fn is_authenticating(&self) -> bool {
        self.authenticating > 0
    }

    /// When the client may be read again; None: now. Above the rate the server stops reading for a while.
    #[must_use]
    pub fn paused_until(&self, now: Instant) -> Option<Instant> {
        let rate = f64::from(self.limits.messages_per_s.max(1));
        let available = self.tokens + now.saturating_duration_since(self.tokens_at).as_secs_f64() * rate;
        (available < 1.0).then(|| now + Duration::from_secs_f64((1.0 - available) / rate))
    }

    fn spend(&mut self, now: Instant) {
        let rate = f64::from(self.limits.messages_per_s.max(1));
        let refill = now.saturating_duration_since(self.tokens_at).as_secs_f64() * rate;
        // A debt is at most what the time to insist pays.
        self.tokens = ((self.tokens + refill).min(BURST) - 1.0).max(-rate * INSISTENCE.as_secs_f64());
        self.tokens_at = now;
        if self.tokens >= BURST / 2.0 {
            self.limited_since = None;
        } else if self.tokens < 1.0 {
            let since = *self.limited_since.get_or_insert(now);
            if now.saturating_duration_since(since) >= INSISTENCE {
                let what = "too many messages: stay within limits.messages_per_s";
                self.fail(WireError::backoff(ErrorCode::RateLimited, what, 1_000), CloseCode::RateLimited);
            }
        }
    }

    /// A text message of the client.
    pub fn message(&mut self, now: Instant, text: &str) {
        self.heard = now;
        if self.phase == Phase::Closed {
            return;
        }
        self.spend(now);
        if self.phase == Phase::Closed {
            return;
        }
        match ClientMessage::read(text) {
            Ok(message) => self.client(now, message),
            Err(fault) => self.not_read(fault),
        }
    }

    /// Before `welcome` whatever is not understood is no credential.
    fn not_read(&mut self, fault: Fault) {
        let bad = |what: String| WireError::never(ErrorCode::BadMessage, what);
        match fault {
            Fault::Form(what) | Fault::Subscribe { what, .. } | Fault::Sync { what, .. } | Fault::Ping(what)
                if matches!(self.phase, Phase::Greeting { .. }) =>
            {
                self.fail(WireError::never(ErrorCode::Unauthenticated, what), CloseCode::Unauthenticated);
            }
            Fault::Form(what) => self.fail(bad(what), CloseCode::BadMessage),
            Fault::Subscribe { id, what } => self.error(Some(id), bad(what)),
            Fault::Sync { tx, what } => self.sync_error(tx, bad(what)),
            Fault::Ping(what) => self.error(None, WireError::never(ErrorCode::TooLarge, what)),
        }
    }

    fn client(&mut self, now: Instant, message: ClientMessage) {
        match (self.phase, message) {
            (Phase::Closed, _) => {}
            (Phase::Greeting { .. } | Phase::Open | Phase::Draining { .. }, ClientMessage::Auth(auth)) => {
                if matches!(self.phase, Phase::Greeting { .. }) {
                    self.phase = Phase::Authenticating;
                }
                self.authenticating += 1;
                self.outputs.push_back(Output::Authenticate(auth));
            }
            (Phase::Greeting { .. }, _) => {
                let what = "the first message must be auth, as no credential came with the upgrade";
                self.fail(WireError::never(ErrorCode::Unauthenticated, what), CloseCode::Unauthenticated);
            }
            (Phase::Authenticating, _) => {
                let what = "wait for welcome before the next message";
                self.fail(WireError::never(ErrorCode::Unauthenticated, what), CloseCode::Unauthenticated);
            }
            (_, ClientMessage::Ping { t }) => self.send(ServerMessage::Pong { t }),
            (_, ClientMessage::Subscribe(subscribe)) => self.subscribe(now, subscribe),
            (_, ClientMessage::Unsubscribe { id }) => {
                self.end(&id);
                self.send(ServerMessage::Unsubscribed { id });
            }
            (_, ClientMessage::Sync { tx, timeout_ms }) => self.sync(now, tx, timeout_ms),
        }
    }

    /// The new token of a live connection is good. Nothing is said.
    pub fn renewed(&mut self) {
        self.authenticating = self.authenticating.saturating_sub(1);
    }

    /// The credentials are good: says `welcome`.
    pub fn welcome(&mut self, welcome: Welcome) {
        self.authenticating = self.authenticating.saturating_sub(1);
        if matches!(self.phase, Phase::Greeting { .. } | Phase::Authenticating) {
            self.phase = Phase::Open;
            self.send(ServerMessage::Welcome(welcome));
        }
    }

    /// The credentials are not good, or no longer: says why and closes.
    pub fn refuse(&mut self, error: WireError, close: CloseCode) {
        self.fail(error, close);
    }

    fn subscribe(&mut self, now: Instant, subscribe: Subscribe) {
        let refusal = if self.find(&subscribe.id).is_some() {
            WireError::never(ErrorCode::DuplicateId, "this id is in use on this connection: unsubscribe first")
        } else if self.subscriptions.len() >= self.limits.subscriptions {
            let what = format!("at most {} subscriptions a connection: open another", self.limits.subscriptions);
            WireError::never(ErrorCode::TooManySubscriptions, what)
        } else if subscribe.filter.as_ref().is_some_and(|filter| filter.len() > self.limits.filter_bytes) {
            let what = format!("a filter has at most {} bytes", self.limits.filter_bytes);
            WireError::never(ErrorCode::TooLarge, what)
        } else {
            self.serial += 1;
            self.subscriptions.push(Subscription {
                id: subscribe.id.as_str().into(),
                serial: self.serial,
                position: None,
                caught_up: false,
                last_said: now,
                passed: 0,
                reached: None,
                open: false,
            });
            self.outputs.push_back(Output::Start { serial: self.serial, subscribe: Box::new(subscribe) });
            return;
        };
        self.error(Some(subscribe.id), refusal);
    }

    /// The wish is granted, from `cursor` on. Gives the subscription's id; None when nobody waits for it any more.
    pub fn started(
        &mut self,
        now: Instant,
        serial: u64,
        cursor: Cursor,
        recovered: Option<bool>,
        source: Source,
    ) -> Option<Arc<str>> {
        let subscription = self.subscriptions.iter_mut().find(|subscription| subscription.serial == serial)?;
        subscription.position = Some(cursor);
        subscription.passed = cursor.seq;
        subscription.last_said = now;
        let id = Arc::clone(&subscription.id);
        self.send(ServerMessage::Subscribed { id: id.to_string(), cursor: Some(cursor), recovered, source });
        Some(id)
    }

    /// The wish is refused.
    pub fn not_started(&mut self, serial: u64, error: WireError) {
        if let Some(id) = self.forget_serial(serial) {
            self.error(Some(id), error);
            self.settle_syncs();
        }
    }

    /// The wish cannot be granted from the position that it names.
    pub fn not_resumed(&mut self, serial: u64, resync: Resync) {
        if let Some(id) = self.forget_serial(serial) {
            self.send(ServerMessage::ResyncRequired(Resync { id, ..resync }));
            self.settle_syncs();
        }
    }

    fn forget_serial(&mut self, serial: u64) -> Option<String> {
        let index = self.subscriptions.iter().position(|subscription| subscription.serial == serial)?;
        Some(self.subscriptions.remove(index).id.to_string())
    }

    /// The subscription has ended because its position cannot be resumed from.
    pub fn resync(&mut self, resync: Resync) {
        if self.forget(&resync.id) {
            self.outputs.push_back(Output::Stop(resync.id.as_str().into()));
            self.send(ServerMessage::ResyncRequired(resync));
            self.settle_syncs();
        }
    }

    /// The subscription has ended for this reason: the key may not have it any more, or it costs too much.
    pub fn refused(&mut self, id: &str, error: WireError) {
        if self.forget(id) {
            self.outputs.push_back(Output::Stop(id.into()));
            self.error(Some(id.to_owned()), error);
            self.settle_syncs();
        }
    }

    /// The node is about to go: this client's slot and the node's end, from now.
    pub fn drain(&mut self, now: Instant, slot: Duration, deadline: Duration) {
        match self.phase {
            Phase::Greeting { .. } | Phase::Authenticating => self.close(CloseCode::Restart),
            Phase::Open => {
                self.send(ServerMessage::Drain { reconnect_after_ms: millis(slot), deadline_ms: millis(deadline) });
                self.phase = Phase::Draining { close_at: now + slot };
            }
            Phase::Draining { .. } | Phase::Closed => {}
        }
    }

    /// When [`Machine::tick`] must be called at the latest.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        let mut deadline = self.ping_at;
        match self.phase {
            Phase::Greeting { until } => deadline = deadline.min(until),
            Phase::Draining { close_at } => deadline = deadline.min(close_at),
            _ => {}
        }
        if self.timing.expects_answers {
            deadline = deadline.min(self.heard + self.timing.heartbeat * 2);
        }
        let syncs = self.syncs.iter().map(|sync| sync.until).min();
        [self.progress_at(), syncs].into_iter().flatten().fold(deadline, Instant::min)
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant) {
        match self.phase {
            Phase::Closed => return,
            Phase::Greeting { until } if until <= now => {
                let what = "no auth message came in time";
                return self.fail(WireError::never(ErrorCode::Unauthenticated, what), CloseCode::AuthTimeout);
            }
            Phase::Draining { close_at } if close_at <= now => return self.close(CloseCode::Restart),
            _ => {}
        }
        if self.timing.expects_answers && self.heard + self.timing.heartbeat * 2 <= now {
            return self.close(CloseCode::NoPong);
        }
        if self.ping_at <= now {
            self.ping_at = now + self.timing.heartbeat;
            self.outputs.push_back(Output::Ping);
        }
        let late = self.syncs.extract_if(.., |sync| sync.until <= now).collect::<Vec<_>>();
        for sync in late {
            let what = format!("transaction {} was not over, or not relayed, within the time given", sync.tx);
            self.sync_error(sync.tx, WireError::backoff(ErrorCode::Unavailable, what, 1_000));
        }
    }

    /// Closes for a reason of the server's, or because the client has gone.
    pub fn close(&mut self, code: CloseCode) {
        if self.phase != Phase::Closed {
            self.phase = Phase::Closed;
            self.subscriptions.clear();
            self.syncs.clear();
            self.outputs.push_back(Output::Close(code));
        }
    }

    fn fail(&mut self, error: WireError, close: CloseCode) {
        if self.phase != Phase::Closed {
            self.error(None, error);
            self.close(close);
        }
    }

    fn error(&mut self, id: Option<String>, error: WireError) {
        let WireError { code, message, retry, retry_after_ms } = error;
        self.send(ServerMessage::Error { id, tx: None, code, message, retry, retry_after_ms });
    }

    fn sync_error(&mut self, tx: String, error: WireError) {
        let WireError { code, message, retry, retry_after_ms } = error;
        self.send(ServerMessage::Error { id: None, tx: Some(tx), code, message, retry, retry_after_ms });
    }

    fn send(&mut self, message: ServerMessage) {
        if self.phase != Phase::Closed {
            self.outputs.push_back(Output::Send(message));
        }
    }

    fn find(&mut self, id: &str) -> Option<&mut Subscription> {
        self.subscriptions.iter_mut().find(|subscription| *subscription.id == *id)
    }

    fn forget(&mut self, id: &str) -> bool {
        let before = self.subscriptions.len();
        self.subscriptions.retain(|subscription| *subscription.id != *id);
        self.subscriptions.len() < before
    }

    fn end(&mut self, id: &str) {
        if self.forget(id) {
            self.outputs.push_back(Output::Stop(id.into()));
            self.settle_syncs();
        }
    }

    /// The position of a subscription.
    #[must_use]
    pub fn position(&self, id: &str) -> Option<Cursor> {
        self.subscriptions.iter().find(|subscription| *subscription.id == *id)?.position
    }
}

/// An error whose cause is that Postgres, or this node's knowledge of it, is away.
#[must_use]
pub fn unavailable(what: &str) -> WireError {
    WireError {
        code: ErrorCode::Unavailable,
        message: format!("{what}: try again with backoff"),
        retry: Retry::Backoff,
        retry_after_ms: Some(1_000),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
