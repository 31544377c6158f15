//! A live session: one machine, the places of its subscriptions in the hub, and the work that waits for Postgres.
//!
//! [`Session::poll_emit`] gives what is to be sent next, and is called only when the transport can take it: nothing is
//! queued for a slow client, whose positions simply stay behind. The session registers for wake-ups before it looks for
//! news, so news that comes in between wakes it.

mod supply;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;

use self::supply::Next;
use crate::auth::store::{Access, AuthError};
use crate::cluster::ConnectionGuard;
use crate::cursor::{Cursor, Seq};
use crate::event::Event;
use crate::hub::Tap;
use crate::hub::group::{Frame, Signal};
use crate::hub::pages::Page;
use crate::mutant::{self, Mutant};
use crate::protocol::VERSION;
use crate::protocol::close::CloseCode;
use crate::protocol::error::{ErrorCode, WireError};
use crate::protocol::message::{Auth, ServerMessage, Welcome, Window};
use crate::session::machine::{Machine, Output, Timing, unavailable};
use crate::session::start::{self, NotStarted, Started};
use crate::session::sync;
use crate::session::{Context, Drain};

/// What is to be sent.
#[derive(Debug)]
pub enum Emit {
    /// A message.
    Message(ServerMessage),
    /// A frame of events.
    Events {
        /// The subscription.
        id: Arc<str>,
        /// The position before it.
        prev: Cursor,
        /// The events.
        frame: Arc<Frame>,
    },
    /// A ping.
    Ping,
    /// The last thing: say why and close.
    Close(CloseCode),
}

/// Work that waits for Postgres.
enum Done {
    Authenticated(Result<(Access, ConnectionGuard), (WireError, CloseCode)>),
    Renewed(Result<Access, (WireError, CloseCode)>),
    Started(u64, Result<Started, NotStarted>),
    Page(Arc<str>, u64, Result<Page, ()>),
    Synced(u64, Result<Cursor, WireError>),
}

type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

/// One subscription's place.
struct Place {
    id: Arc<str>,
    tap: Tap,
    // Everything up to here has been handed over or was not for it.
    passed: Seq,
    generation: u64,
    // Events of the log that follow `passed`.
    carry: Vec<Event>,
    reading: bool,
    fell_back: bool,
}

/// One connection.
pub struct Session {
    context: Arc<Context>,
    name: String,
    machine: Machine,
    signal: Arc<Signal>,
    places: Vec<Place>,
    turn: usize,
    work: FuturesUnordered<Work>,
    timer: Pin<Box<tokio::time::Sleep>>,
    access: Option<Access>,
    ended: Option<Pin<Box<dyn Future<Output = CloseCode> + Send>>>,
    // Counts for the key until the session ends.
    guard: Option<ConnectionGuard>,
    drain: watch::Receiver<Option<Drain>>,
    drain_seen: Pin<Box<dyn Future<Output = ()> + Send>>,
    progress_due: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.context.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Session {
    /// A connection that begins. `admitted` when its credentials came with the upgrade; `expects_answers` when the client
    /// can answer pings.
    #[must_use]
    pub fn new(context: Arc<Context>, admitted: Option<(Access, ConnectionGuard)>, expects_answers: bool) -> Self {
        let now = Instant::now();
        context.connections.fetch_add(1, Ordering::Relaxed);
        let options = &context.options;
        let timing = Timing {
            heartbeat: options.heartbeat,
            progress: options.progress,
            auth_timeout: options.auth_timeout,
            expects_answers,
        };
        let machine = Machine::new(now, timing, options.limits);
        let drain = context.drain.clone();
        let mut session = Self {
            name: format!("c-{:016x}", rand::random::<u64>()),
            machine,
            signal: Arc::default(),
            places: Vec::new(),
            turn: 0,
            work: FuturesUnordered::new(),
            timer: Box::pin(tokio::time::sleep_until((now + timing.heartbeat).into())),
            access: None,
            ended: None,
            guard: None,
            drain_seen: drain_seen(drain.clone()),
            drain,
            progress_due: false,
            context,
        };
        if let Some((access, guard)) = admitted {
            session.admit(access, guard);
        }
        session
    }

    /// Its name in logs.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A text message came in.
    pub fn message(&mut self, text: &str) {
        self.machine.message(Instant::now(), text);
    }

    /// Something else came in: a ping, a pong.
    pub fn heard(&mut self) {
        self.machine.heard(Instant::now());
    }

    /// Answers that wait to be sent.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.machine.backlog()
    }

    /// Until when the client is not to be read.
    #[must_use]
    pub fn paused_until(&self) -> Option<Instant> {
        self.machine.paused_until(Instant::now())
    }

    /// Ends the connection.
    pub fn close(&mut self, code: CloseCode) {
        self.machine.close(code);
    }

    /// Says what is wrong and ends the connection.
    pub fn refuse(&mut self, error: WireError, code: CloseCode) {
        self.machine.refuse(error, code);
    }

    /// What is to be sent next. After [`Emit::Close`] nothing comes.
    pub fn poll_emit(&mut self, task: &mut TaskContext<'_>) -> Poll<Emit> {
        self.signal.register(task.waker());
        loop {
            while let Some(output) = self.machine.poll() {
                if let Some(emit) = self.act(output) {
                    return Poll::Ready(emit);
                }
            }
            if self.machine.is_closed() {
                return Poll::Pending;
            }
            if let Poll::Ready(Some(done)) = self.work.poll_next_unpin(task) {
                self.settle(done);
                continue;
            }
            if self.poll_ends(task) || self.poll_timer(task) {
                continue;
            }
            match self.next_events(task) {
                Next::Emit(emit) => return Poll::Ready(emit),
                Next::Again => continue,
                Next::Nothing => {}
            }
            self.machine.settle_syncs();
            if std::mem::take(&mut self.progress_due) {
                let current = !self.context.hub.edge().held && self.context.follower.current();
                self.machine.progress(Instant::now(), current);
                continue;
            }
            let Some(output) = self.machine.poll() else { return Poll::Pending };
            if let Some(emit) = self.act(output) {
                return Poll::Ready(emit);
            }
        }
    }

    /// A revoked or expired key, a drain: true when something happened.
    fn poll_ends(&mut self, task: &mut TaskContext<'_>) -> bool {
        if let Some(ended) = self.ended.as_mut()
            && let Poll::Ready(code) = ended.as_mut().poll(task)
        {
            self.ended = None;
            let what = "this connection's key was revoked, expired or changed: connect with a valid one";
            self.machine.refuse(WireError::never(ErrorCode::Unauthenticated, what), code);
            return true;
        }
        if self.drain_seen.as_mut().poll(task).is_ready() {
            self.drain_seen = Box::pin(std::future::pending());
            if let Some(drain) = *self.drain.borrow() {
                let now = Instant::now();
                let left = |until: Duration| (drain.began + until).saturating_duration_since(now);
                self.machine.drain(now, left(drain.window.mul_f64(rand::random())), left(drain.deadline));
            }
            return true;
        }
        false
    }

    /// True when the machine's time has come.
    fn poll_timer(&mut self, task: &mut TaskContext<'_>) -> bool {
        let now = Instant::now();
        let deadline = self.machine.deadline();
        if deadline <= now {
            self.progress_due = self.machine.progress_due(now);
            self.machine.tick(now);
            if self.progress_due {
                // Said after everything that is there has been delivered.
                return false;
            }
            return true;
        }
        // A timer that fires early costs a look; moving it with every frame would cost more.
        if self.timer.deadline().into_std() > deadline || self.timer.is_elapsed() {
            self.timer.as_mut().reset(deadline.into());
        }
        self.timer.as_mut().poll(task).is_ready()
    }

    fn act(&mut self, output: Output) -> Option<Emit> {
        match output {
            Output::Send(message) => {
                if let ServerMessage::Error { code, .. } = &message {
                    self.context.metrics.errors_total.with_label_values(&[code.as_str()]).inc();
                }
                return Some(Emit::Message(message));
            }
            Output::Ping => return Some(Emit::Ping),
            Output::Close(code) => {
                self.places.clear();
                self.work.clear();
                self.context.metrics.closes_total.with_label_values(&[&code.code().to_string()]).inc();
                return Some(Emit::Close(code));
            }
            Output::Authenticate(auth) => self.authenticate(auth),
            Output::Start { serial, subscribe } => {
                let Some(access) = &self.access else { return None };
                let (context, scopes) = (Arc::clone(&self.context), Arc::clone(&access.scopes));
                let signal = Arc::clone(&self.signal);
                self.work.push(Box::pin(async move {
                    Done::Started(serial, start::start(&context, &scopes, &subscribe, &signal).await)
                }));
            }
            Output::Stop(id) => self.places.retain(|place| place.id != id),
            Output::Sync { serial, xid, until } => {
                let context = Arc::clone(&self.context);
                self.work.push(Box::pin(async move {
                    Done::Synced(serial, sync::find_transaction(&context, xid, until).await)
                }));
            }
        }
        None
    }

    #[expect(clippy::disallowed_methods, reason = "the edge: keys expire by the clock on the wall")]
    fn authenticate(&mut self, auth: Auth) {
        let context = Arc::clone(&self.context);
        let renewal = self.access.is_some();
        self.work.push(Box::pin(async move {
            if auth.role.is_some() || auth.password.is_some() {
                let what = "database credentials are not offered by this version: send an API key as token";
                let refused = (WireError::never(ErrorCode::Unsupported, what), CloseCode::Unauthenticated);
                return if renewal { Done::Renewed(Err(refused)) } else { Done::Authenticated(Err(refused)) };
            }
            let judged = context.keys.authenticate(auth.token.as_deref().unwrap_or(""), chrono::Utc::now()).await;
            let judged = judged.map_err(|error| refused(&error));
            if renewal {
                return Done::Renewed(judged);
            }
            let access = match judged {
                Ok(access) => access,
                Err(refused) => return Done::Authenticated(Err(refused)),
            };
            let limit = access.scopes.max_connections();
            if let Ok(guard) = context.limiter.try_acquire(&access.key_id, limit) {
                return Done::Authenticated(Ok((access, guard)));
            }
            context.metrics.admissions_deferred_total.inc();
            let admitted = context.limiter.acquire(&access.key_id, limit).await.map_err(|over| {
                let error = WireError::backoff(ErrorCode::RateLimited, over.to_string(), 5_000);
                (error, CloseCode::TooManyConnections)
            });
            Done::Authenticated(admitted.map(|guard| (access, guard)))
        }));
    }

    fn admit(&mut self, access: Access, guard: ConnectionGuard) {
        self.guard = Some(guard);
        self.follow_key(access);
        let options = &self.context.options;
        let memory = self.context.hub.ring_age();
        self.machine.welcome(Welcome {
            version: VERSION,
            connection: self.name.clone(),
            node: self.context.node.clone(),
            heartbeat_ms: millis(options.heartbeat),
            progress_ms: millis(options.progress),
            window: Window { memory_ms: millis(memory), history_ms: millis(options.history) },
            limits: options.limits,
        });
    }

    fn follow_key(&mut self, access: Access) {
        let followed = access.clone();
        self.ended = Some(Box::pin(async move { followed.ended().await }));
        self.access = Some(access);
    }

    /// Work that waited for Postgres is done.
    fn settle(&mut self, done: Done) {
        match done {
            Done::Authenticated(Ok((access, guard))) => self.admit(access, guard),
            // A renewed token takes effect for what comes; what runs was granted under the old one and keeps its view
            // only while both say the same.
            Done::Renewed(Ok(access)) => {
                let same = self.access.as_ref().is_some_and(|old| old.scopes == access.scopes);
                self.follow_key(access);
                if !same && !self.places.is_empty() {
                    let what = "the new token has other scopes: reconnect with it";
                    let error = WireError::never(ErrorCode::Unauthenticated, what);
                    self.machine.refuse(error, CloseCode::TokenExpired);
                }
            }
            Done::Authenticated(Err((error, code))) | Done::Renewed(Err((error, code))) => {
                self.machine.refuse(error, code);
            }
            Done::Started(serial, Ok(started)) => self.started(serial, started),
            Done::Started(serial, Err(NotStarted::Refused(error))) => self.machine.not_started(serial, error),
            Done::Started(serial, Err(NotStarted::Resync(resync))) => self.machine.not_resumed(serial, resync),
            Done::Page(id, generation, page) => self.page_read(&id, generation, page),
            Done::Synced(serial, Ok(cursor)) => self.machine.sync_found(serial, cursor),
            Done::Synced(serial, Err(error)) => self.machine.sync_failed(serial, error),
        }
    }

    fn started(&mut self, serial: u64, started: Started) {
        let Started { tap, cursor, recovered, source, generation } = started;
        let Some(id) = self.machine.started(Instant::now(), serial, cursor, recovered, source) else { return };
        if recovered.is_some() {
            self.context.metrics.resumes_total.with_label_values(&[source.as_str()]).inc();
        }
        let passed = match recovered {
            Some(_) if mutant::is(Mutant::ResumeSkipsOne) => cursor.seq + 1,
            Some(_) if mutant::is(Mutant::ResumeRepeatsOne) => cursor.seq.saturating_sub(1),
            Some(_) if mutant::is(Mutant::ResumeFromNow) => self.context.hub.edge().deliverable.seq.max(cursor.seq),
            _ => cursor.seq,
        };
        if mutant::is(Mutant::CaughtUpAtOnce) {
            self.machine.reached(Instant::now(), &id, cursor);
        }
        let carry = Vec::new();
        self.places.push(Place { id, tap, passed, generation, carry, reading: false, fell_back: false });
    }
}

fn drain_seen(mut drain: watch::Receiver<Option<Drain>>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(async move {
        if drain.wait_for(Option::is_some).await.is_err() {
            // The node is gone without a drain; its sockets end with it.
            std::future::pending::<()>().await;
        }
    })
}

fn refused(error: &AuthError) -> (WireError, CloseCode) {
    let wire = match error {
        AuthError::Unavailable => unavailable("the API key cannot be checked"),
        _ => WireError::never(ErrorCode::Unauthenticated, error.to_string()),
    };
    (wire, error.close_code())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
