//! The client's side of the protocol, sans-IO: messages, instants and losses in; actions and a deadline out.
//!
//! Invariants: a frame is delivered only if it follows on the position held (`prev`); a position never goes back; a
//! lost connection is resumed from what was *handed out* (the [`Rewind`] that the driver gives), so whatever was
//! received and not handed out is asked for again; attempts without progress are counted, and the count is reset only
//! by progress, so a server that accepts and drops clients is not hammered.
//!
//! Knows nothing of sockets, tasks and clocks: instants and dice are arguments.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::client::delivery::{Delivery, Resumed};
use crate::client::error::{ClientError, Disconnect, mismatch};
use crate::client::frame::{Frame, Incoming};
use crate::client::requests::{Requests, Token};
use crate::cursor::Cursor;
use crate::protocol::error::{ErrorCode, Retry, WireError};
use crate::protocol::inbound::RawJson;
use crate::protocol::message::{ClientMessage, From as WireFrom, ServerMessage, Source, Subscribe, Welcome};

/// The longest wait between attempts, by protocol.
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// The first attempt's longest wait, by protocol; it doubles with each.
const BASE_BACKOFF: Duration = Duration::from_millis(500);
/// A server cannot make a client wait longer than this by `Retry-After` or `retry_after_ms`.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);
/// From a wish to connect to `welcome`: TCP, TLS, upgrade, authentication.
pub(super) const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// Attempts after the first one of a client that was never connected, unless told otherwise: a wrong address should be
/// known within seconds.
pub(super) const FIRST_ATTEMPTS: u32 = 3;
/// How often a subscription that is refused for now asks again on one connection.
const MAX_SUBSCRIBE_RETRIES: u32 = 10;

/// A subscription's name on the wire.
pub(super) type Id = Arc<str>;

/// What the driver has to do.
#[derive(Debug)]
pub(super) enum Action {
    Send(ClientMessage),
    Deliver(Id, Delivery),
    Answer(Token, Result<Cursor, ClientError>),
    /// Leave the connection; then call [`Machine::lost`] with this cause.
    Leave(Disconnect),
    /// Nothing will come any more, for anyone.
    GiveUp(ClientError),
}

/// What the driver does after a lost connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    ConnectAfter(Duration),
    Stop,
}

/// How far a subscription's events were handed out, by its id.
pub(super) type Rewind<'a> = &'a dyn Fn(&str) -> Option<Cursor>;

/// Where one subscription stands on the present connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not asked for, or refused until then.
    Waiting(Option<Instant>),
    Asked,
    CatchingUp,
    Live,
    /// `unsubscribe` was sent.
    Leaving,
}

#[derive(Debug)]
struct Sub {
    id: Id,
    request: Subscribe,
    phase: Phase,
    held: Option<Cursor>,
    lost_at: Option<Instant>,
    retries: Backoff,
}

#[derive(Debug)]
enum Link {
    Down,
    Greeting { since: Instant },
    Open { welcome: Welcome, heard: Instant, paused: bool, slot: Option<Instant> },
}

/// One client's protocol state.
#[derive(Debug)]
pub(super) struct Machine {
    attempts: Option<u32>,
    /// The same for a client that was never connected; its very first attempt does not count.
    first_attempts: u32,
    /// Counts the attempts without progress.
    backoff: Backoff,
    welcomed: bool,
    link: Link,
    subs: BTreeMap<Id, Sub>,
    requests: Requests,
    last_error: Option<WireError>,
    out: VecDeque<Action>,
}

impl Machine {
    /// `attempts`: how many may fail in a row; none for no limit.
    pub(super) fn new(attempts: Option<u32>, first_attempts: u32) -> Self {
        Self {
            attempts,
            first_attempts,
            backoff: new_backoff(),
            welcomed: false,
            link: Link::Down,
            subs: BTreeMap::new(),
            requests: Requests::default(),
            last_error: None,
            out: VecDeque::new(),
        }
    }

    /// What is to be done next.
    pub(super) fn next_action(&mut self) -> Option<Action> {
        self.out.pop_front()
    }

    /// The node that serves now.
    pub(super) fn welcome(&self) -> Option<&Welcome> {
        match &self.link {
            Link::Open { welcome, .. } => Some(welcome),
            Link::Down | Link::Greeting { .. } => None,
        }
    }

    /// The upgrade succeeded.
    pub(super) fn connected(&mut self, now: Instant) {
        self.link = Link::Greeting { since: now };
        self.last_error = None;
    }

    /// Begin `request`, whose id nobody else uses.
    pub(super) fn subscribe(&mut self, request: Subscribe) -> Result<(), ClientError> {
        if self.subs.contains_key(request.id.as_str()) {
            return Err(ClientError::DuplicateId(request.id));
        }
        let id: Id = request.id.as_str().into();
        let sub = Sub {
            id: id.clone(),
            request,
            phase: Phase::Waiting(None),
            held: None,
            lost_at: None,
            retries: new_backoff(),
        };
        self.subs.insert(id.clone(), sub);
        self.ask(&id);
        Ok(())
    }

    /// The subscription is no longer wanted.
    pub(super) fn unsubscribe(&mut self, id: &str) {
        let Some(sub) = self.subs.get_mut(id) else { return };
        match sub.phase {
            Phase::Leaving => {}
            Phase::Waiting(_) => drop(self.subs.remove(id)),
            Phase::Asked | Phase::CatchingUp | Phase::Live => {
                sub.phase = Phase::Leaving;
                self.out.push_back(Action::Send(ClientMessage::Unsubscribe { id: id.to_owned() }));
            }
        }
    }

    /// Be told once everything of `tx` was sent.
    pub(super) fn sync(&mut self, token: Token, tx: String, timeout: Duration, now: Instant) {
        self.requests.add(token, tx, timeout, now);
        self.ask_next_sync(now);
    }

    /// Ask for an echo of `t`.
    pub(super) fn ping(&mut self, t: u64) {
        self.out.push_back(Action::Send(ClientMessage::Ping { t: RawJson::try_from(t.to_string()).ok() }));
    }

    /// Anything at all came, a ping included.
    pub(super) fn heard(&mut self, now: Instant) {
        if let Link::Open { heard, .. } = &mut self.link {
            *heard = now;
        }
    }

    /// The driver stops reading because nobody takes what came, or reads again. Silence of a connection that is not
    /// read means nothing.
    pub(super) fn pause(&mut self, pause: bool, now: Instant) {
        if let Link::Open { heard, paused, .. } = &mut self.link {
            *paused = pause;
            *heard = now;
        }
    }

    /// One message of the server.
    pub(super) fn message(&mut self, incoming: Incoming, now: Instant) {
        self.heard(now);
        let opening = matches!(&incoming, Incoming::Message(message)
            if matches!(**message, ServerMessage::Welcome(_) | ServerMessage::Error { .. }));
        if !opening && !matches!(self.link, Link::Open { .. }) && !matches!(incoming, Incoming::Unknown) {
            return self.leave(Disconnect::Protocol("a message came before `welcome`".into()));
        }
        match incoming {
            Incoming::Events { id, frame } => self.events(&id, frame),
            Incoming::Message(message) => self.other(*message, now),
            Incoming::Unknown => {}
        }
    }

    fn other(&mut self, message: ServerMessage, now: Instant) {
        match message {
            ServerMessage::Welcome(welcome) => self.welcomed(welcome, now),
            ServerMessage::Subscribed { id, cursor, source, .. } => self.subscribed(&id, cursor, source, now),
            ServerMessage::CaughtUp { id, cursor } => {
                if self.moved(&id, cursor) {
                    self.set_phase(&id, Phase::Live);
                    self.deliver(&id, Delivery::CaughtUp(cursor));
                }
            }
            ServerMessage::Progress { ids, cursor } => {
                for id in ids {
                    if self.moved(&id, cursor) {
                        self.deliver(&id, Delivery::Progress(cursor));
                    }
                }
            }
            ServerMessage::ResyncRequired(resync) => {
                let id = resync.id.clone();
                self.end(&id, Delivery::Resync(resync));
            }
            ServerMessage::Unsubscribed { id } => {
                self.subs.retain(|known, sub| known[..] != *id || sub.phase != Phase::Leaving)
            }
            ServerMessage::Synced { tx, cursor } => {
                if let Some(token) = self.requests.synced(&tx) {
                    self.out.push_back(Action::Answer(token, Ok(cursor)));
                }
                self.ask_next_sync(now);
            }
            ServerMessage::Drain { reconnect_after_ms, .. } => {
                if let Link::Open { slot, .. } = &mut self.link {
                    *slot = Some(now + Duration::from_millis(reconnect_after_ms).min(MAX_RETRY_AFTER));
                }
            }
            ServerMessage::Pong { .. } => {}
            ServerMessage::Error { id, tx, code, message, retry, retry_after_ms } => {
                self.error(id, tx, WireError { code, message, retry, retry_after_ms }, now);
            }
        }
    }

    fn welcomed(&mut self, welcome: Welcome, now: Instant) {
        if welcome.version != crate::protocol::VERSION {
            self.out.push_back(Action::GiveUp(ClientError::Version(welcome.version)));
            return;
        }
        self.welcomed = true;
        self.link = Link::Open { welcome, heard: now, paused: false, slot: None };
        if self.subs.is_empty() {
            self.backoff.reset();
        }
        let ids: Vec<Id> = self.subs.keys().cloned().collect();
        for id in ids {
            self.ask(&id);
        }
        self.requests.restart();
        self.ask_next_sync(now);
    }

    /// Sends `subscribe`, if the connection is open.
    fn ask(&mut self, id: &Id) {
        let Link::Open { welcome, .. } = &self.link else { return };
        let Some(sub) = self.subs.get_mut(id) else { return };
        let mut request = sub.request.clone();
        if let Some(held) = sub.held {
            request.from = WireFrom::Cursor(held.to_string());
        }
        let message = ClientMessage::Subscribe(request);
        // Sent as it is, it would cost the connection (1009), and every other subscription with it.
        let limit = welcome.limits.message_bytes;
        if serde_json::to_string(&message).is_ok_and(|text| text.len() > limit) {
            let text = format!("the subscribe message is larger than the server's limit of {limit} bytes: shorten it");
            return self.end(id, Delivery::End(ClientError::Refused(WireError::never(ErrorCode::TooLarge, text))));
        }
        sub.phase = Phase::Asked;
        self.out.push_back(Action::Send(message));
    }

    fn subscribed(&mut self, id: &str, cursor: Option<Cursor>, source: Source, now: Instant) {
        let node = self.welcome().map_or_else(String::new, |welcome| welcome.node.clone());
        let attempt = self.backoff.attempts();
        let Some(sub) = self.subs.get_mut(id).filter(|sub| sub.phase == Phase::Asked) else { return };
        let Some(cursor) = cursor else {
            return self.leave(Disconnect::Protocol("`subscribed` without a cursor".into()));
        };
        sub.phase = Phase::CatchingUp;
        sub.retries.reset();
        let delivery = match (sub.held, sub.lost_at.take()) {
            (Some(held), _) if held != cursor => return self.leave(mismatch(id, Some(held), Some(cursor))),
            (Some(held), Some(lost_at)) => {
                Delivery::Resumed(Resumed { from: held, source, attempt, node, away: now.duration_since(lost_at) })
            }
            (Some(_), None) => return,
            (None, _) => Delivery::Started { cursor, source },
        };
        sub.held = Some(cursor);
        self.deliver(id, delivery);
    }

    fn events(&mut self, id: &str, frame: Frame) {
        let Some(sub) = self.subs.get_mut(id) else { return };
        if !matches!(sub.phase, Phase::CatchingUp | Phase::Live) {
            return;
        }
        if frame.prev() != sub.held || sub.held.is_none_or(|held| frame.cursor() < held) {
            let cause = mismatch(id, sub.held, frame.prev());
            return self.leave(cause);
        }
        sub.held = Some(frame.cursor());
        let id = sub.id.clone();
        self.backoff.reset();
        self.out.push_back(Action::Deliver(id, Delivery::Frame(frame)));
    }

    /// A position that stands in the stream; whether the subscription is there to hear of it.
    fn moved(&mut self, id: &str, cursor: Cursor) -> bool {
        let Some(sub) = self.subs.get_mut(id) else { return false };
        if !matches!(sub.phase, Phase::CatchingUp | Phase::Live) {
            return false;
        }
        if sub.held.is_some_and(|held| cursor < held) {
            let cause = mismatch(id, sub.held, Some(cursor));
            self.leave(cause);
            return false;
        }
        sub.held = Some(cursor);
        self.backoff.reset();
        true
    }

    fn error(&mut self, id: Option<String>, tx: Option<String>, error: WireError, now: Instant) {
        if let Some(tx) = tx {
            if let Some(token) = self.requests.refused(&tx) {
                self.out.push_back(Action::Answer(token, Err(ClientError::Refused(error))));
                self.ask_next_sync(now);
            }
            return;
        }
        let Some(id) = id.filter(|id| self.subs.contains_key(id.as_str())) else {
            self.last_error = Some(error);
            return;
        };
        let Some(sub) = self.subs.get_mut(id.as_str()) else { return };
        let may = sub.retries.attempts() < MAX_SUBSCRIBE_RETRIES;
        let again = may && matches!(error.retry, Retry::Now | Retry::Backoff);
        // No jitter: the connections' own wait has spread them, and this one stays.
        let wait = sub.retries.next_wait(1.0);
        if sub.phase == Phase::Leaving || !again {
            return self.end(&id, Delivery::End(ClientError::Refused(error)));
        }
        let wait = match (error.retry, error.retry_after_ms) {
            (Retry::Now, None) => Duration::ZERO,
            (_, Some(ms)) => Duration::from_millis(ms).min(MAX_RETRY_AFTER),
            (_, None) => wait,
        };
        sub.phase = Phase::Waiting(Some(now + wait));
    }

    /// The connection ended or could not be made. `dice` in 0..1 draws the wait.
    pub(super) fn lost(&mut self, cause: Disconnect, now: Instant, dice: f64, rewind: Rewind<'_>) -> Next {
        let asked = self.wait_of_error(&cause);
        let cause = self.explained(cause);
        let drained = matches!(&self.link, Link::Open { slot: Some(_), .. });
        self.link = Link::Down;
        self.subs.retain(|_, sub| sub.phase != Phase::Leaving);
        // Refusals are counted on one connection: another node may well be able to serve it.
        self.subs.values_mut().for_each(|sub| sub.retries.reset());
        if let Some(error) = cause.stops() {
            self.out.push_back(Action::GiveUp(error));
            return Next::Stop;
        }
        let jitter = self.backoff.next_wait(dice);
        let wait = if drained { Duration::ZERO } else { jitter };
        let wait = wait.max(cause.retry_after().or(asked).unwrap_or_default().min(MAX_RETRY_AFTER));
        let attempts = self.backoff.attempts();
        let limit = if self.welcomed { self.attempts.unwrap_or(u32::MAX) } else { self.first_attempts };
        if attempts > limit {
            // The loss of a connection that stood is no attempt.
            let attempts = if self.welcomed { attempts - 1 } else { attempts };
            self.out.push_back(Action::GiveUp(ClientError::GaveUp { attempts, last: cause }));
            return Next::Stop;
        }
        for (id, sub) in &mut self.subs {
            sub.phase = Phase::Waiting(None);
            sub.held = rewind(id);
            if sub.held.is_some() {
                sub.lost_at.get_or_insert(now);
                let delivery = Delivery::Disconnected { cause: cause.clone(), retry_in: wait };
                self.out.push_back(Action::Deliver(id.clone(), delivery));
            }
        }
        Next::ConnectAfter(wait)
    }

    /// The wait that the error before a close asks for.
    fn wait_of_error(&self, cause: &Disconnect) -> Option<Duration> {
        let error = self.last_error.as_ref().filter(|_| matches!(cause, Disconnect::Closed { .. }));
        error.and_then(|error| error.retry_after_ms).map(Duration::from_millis)
    }

    /// A close frame says little; the `error` before it says why.
    fn explained(&mut self, cause: Disconnect) -> Disconnect {
        match (cause, self.last_error.take()) {
            (Disconnect::Closed { code, reason, .. }, Some(error)) => {
                Disconnect::Closed { code, reason, message: error.message }
            }
            (cause, _) => cause,
        }
    }

    /// When [`tick`](Self::tick) is due, at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let link = match &self.link {
            Link::Down => None,
            Link::Greeting { since } => Some(*since + WELCOME_TIMEOUT),
            Link::Open { heard, paused, slot, .. } => {
                let silence = (!paused).then(|| *heard + self.patience());
                [silence, *slot].into_iter().flatten().min()
            }
        };
        let asks = self.subs.values().filter_map(|sub| match sub.phase {
            Phase::Waiting(at) if self.welcome().is_some() => at,
            _ => None,
        });
        asks.chain(link).chain(self.requests.deadline()).min()
    }

    /// How long silence is life.
    fn patience(&self) -> Duration {
        let Some(welcome) = self.welcome() else { return WELCOME_TIMEOUT };
        let all_live = !self.subs.is_empty() && self.subs.values().all(|sub| sub.phase == Phase::Live);
        let (times, interval_ms) = if all_live { (3, welcome.progress_ms) } else { (2, welcome.heartbeat_ms) };
        Duration::from_millis(interval_ms).saturating_mul(times).max(Duration::from_millis(1))
    }

    /// Time passed.
    pub(super) fn tick(&mut self, now: Instant) {
        for token in self.requests.expired(now) {
            self.out.push_back(Action::Answer(token.0, Err(ClientError::TimedOut(token.1))));
        }
        self.ask_next_sync(now);
        match &self.link {
            Link::Greeting { since } if now >= *since + WELCOME_TIMEOUT => {
                self.leave(Disconnect::NoWelcome(WELCOME_TIMEOUT));
            }
            Link::Open { slot: Some(slot), .. } if now >= *slot => self.leave(Disconnect::Drain),
            Link::Open { heard, paused: false, .. } if now >= *heard + self.patience() => {
                self.leave(Disconnect::Silence(self.patience()));
            }
            Link::Open { .. } => {
                let due = |sub: &Sub| matches!(sub.phase, Phase::Waiting(Some(at)) if now >= at);
                let due: Vec<Id> = self.subs.iter().filter(|(_, sub)| due(sub)).map(|(id, _)| id.clone()).collect();
                for id in due {
                    self.ask(&id);
                }
            }
            Link::Down | Link::Greeting { .. } => {}
        }
    }

    fn ask_next_sync(&mut self, now: Instant) {
        if self.welcome().is_some()
            && let Some((tx, timeout)) = self.requests.next(now)
        {
            let timeout_ms = u64::try_from(timeout.as_millis()).ok();
            self.out.push_back(Action::Send(ClientMessage::Sync { tx, timeout_ms }));
        }
    }

    fn set_phase(&mut self, id: &str, phase: Phase) {
        if let Some(sub) = self.subs.get_mut(id) {
            sub.phase = phase;
        }
    }

    fn deliver(&mut self, id: &str, delivery: Delivery) {
        self.out.push_back(Action::Deliver(id.into(), delivery));
    }

    /// The subscription's last word. One that is leaving waits for `unsubscribed` all the same, which would else be taken for
    /// the answer to a later one of that id.
    fn end(&mut self, id: &str, delivery: Delivery) {
        if self.subs.get(id).is_some_and(|sub| sub.phase != Phase::Leaving) {
            self.subs.remove(id);
            self.deliver(id, delivery);
        }
    }

    fn leave(&mut self, cause: Disconnect) {
        self.out.push_back(Action::Leave(cause));
    }
}

/// By protocol: 0..min(10 s, 0.5·2ⁿ s).
const fn new_backoff() -> Backoff {
    Backoff::new(BASE_BACKOFF, MAX_BACKOFF)
}

#[cfg(test)]
mod tests;
