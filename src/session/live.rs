//! A live session: one machine, the places of its subscriptions in the hub, and the work that waits for Postgres.
//!
//! [`Session::poll_emit`] gives what is to be sent next, and is called only when the transport can take it: nothing is
//! queued for a slow client, whose positions simply stay behind. The session registers for wake-ups before it looks for
//! news, so news that comes in between wakes it.

mod dear;
mod grant;
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

use self::dear::{Budget, Over};
use self::grant::{Admitted, Grant};
use self::supply::Next;
use crate::auth::store::{Access, AuthError};
use crate::cluster::ConnectionGuard;
use crate::cursor::{Cursor, Seq};
use crate::hub::group::{Frame, Group, Signal};
use crate::hub::look::Worked;
use crate::hub::pages::{Left, Page};
use crate::hub::{Pull, Tap};
use crate::mutant::{self, Mutant};
use crate::protocol::close::CloseCode;
use crate::protocol::error::{ErrorCode, WireError};
use crate::protocol::message::{ServerMessage, Subscribe};
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
    Authenticated(Result<Admitted, (WireError, CloseCode)>),
    Started { serial: u64, view: u64, subscribe: Arc<Subscribe>, outcome: Result<Started, NotStarted> },
    Checked { id: Arc<str>, view: u64, tap: Result<Tap, WireError> },
    Page(Arc<str>, u64, Result<Page, ()>),
    Looked { id: Arc<str>, generation: u64, group: Arc<Group>, worked: Worked, took: Duration },
    Rested,
    Synced(u64, Result<Cursor, WireError>),
}

type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

/// One subscription's place.
struct Place {
    id: Arc<str>,
    // As it was asked for: it is checked again when the connection's key becomes another.
    subscribe: Arc<Subscribe>,
    tap: Tap,
    // It is being checked again and delivers nothing.
    suspended: bool,
    // Everything up to here has been handed over or was not for it.
    passed: Seq,
    generation: u64,
    // Events of the log that follow `passed`. Never held while the transport takes nothing.
    page: Option<Page>,
    // One that was let go of.
    left: Left,
    reading: bool,
    fell_back: bool,
    // What comes next was dear to find out the last time; found, it waits to be taken.
    dear: bool,
    found: Option<Pull>,
    over: Option<Over>,
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
    budget: Budget,
    // A dear look is going on, or waits for the budget.
    looking: bool,
    timer: Pin<Box<tokio::time::Sleep>>,
    // None until it is authenticated.
    grant: Option<Grant>,
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
            budget: Budget::new(now),
            looking: false,
            timer: Box::pin(tokio::time::sleep_until((now + timing.heartbeat).into())),
            grant: None,
            drain_seen: drain_seen(drain.clone()),
            drain,
            progress_due: false,
            context,
        };
        if let Some((access, guard)) = admitted {
            session.admit(Admitted::new(access, guard));
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

    /// The client is there.
    pub fn heard(&mut self) {
        self.machine.heard(Instant::now());
    }

    /// A ping or a pong came in.
    pub fn control(&mut self) {
        self.machine.control(Instant::now());
    }

    /// Whether credentials are being checked: the client is not read meanwhile.
    #[must_use]
    pub const fn is_authenticating(&self) -> bool {
        self.machine.is_authenticating()
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

    /// The client has left: nothing can be said to it any more. What serves it is let go of at once, whatever its transport still
    /// has to write.
    pub fn leave(&mut self) {
        self.machine.close(CloseCode::Normal);
        while let Some(output) = self.machine.poll() {
            if matches!(output, Output::Close(_)) {
                self.act(output);
            }
        }
    }

    /// Says what is wrong and ends the connection.
    pub fn refuse(&mut self, error: WireError, code: CloseCode) {
        self.machine.refuse(error, code);
    }

    /// While the transport takes nothing: what waits for Postgres goes on, as others may wait for the same answer, and pages of
    /// the log are let go of; they are read again. What was dear to find out stays with the group.
    pub fn poll_work(&mut self, task: &mut TaskContext<'_>) {
        while let Poll::Ready(Some(done)) = self.work.poll_next_unpin(task) {
            self.settle(done);
        }
        for place in &mut self.places {
            place.let_go_of_page();
            if let Some(found) = place.found.take() {
                place.leave(&self.context.hub, found);
            }
        }
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
        if let Some(grant) = self.grant.as_mut()
            && let Poll::Ready(code) = grant.ended.as_mut().poll(task)
        {
            grant.ended = Box::pin(std::future::pending());
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
        if self.machine.is_authenticating() {
            // Not read, so not silent.
            self.machine.heard(now);
        }
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
                self.start(serial, Arc::from(subscribe));
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

    /// Work that waited for Postgres is done.
    fn settle(&mut self, done: Done) {
        match done {
            Done::Authenticated(Ok(admitted)) => self.admit(admitted),
            Done::Authenticated(Err((error, code))) => self.machine.refuse(error, code),
            Done::Started { serial, view, subscribe, .. }
                if self.grant.as_ref().is_none_or(|grant| grant.view != view) =>
            {
                // An `auth` came meanwhile: what the old key was granted or refused says nothing.
                self.start(serial, subscribe);
            }
            Done::Started { serial, subscribe, outcome, .. } => match outcome {
                Ok(started) => self.started(serial, subscribe, started),
                Err(NotStarted::Refused(error)) => self.machine.not_started(serial, error),
                Err(NotStarted::Resync(resync)) => {
                    let reason = resync.reason.as_str();
                    self.context.metrics.resyncs_total.with_label_values(&[reason]).inc();
                    self.machine.not_resumed(serial, resync);
                }
            },
            Done::Checked { id, view, tap } => self.checked(&id, view, tap),
            Done::Page(id, generation, page) => self.page_read(&id, generation, page),
            Done::Looked { id, generation, group, worked, took } => {
                self.looked(&id, (generation, &group), worked, took)
            }
            Done::Rested => self.looking = false,
            Done::Synced(serial, Ok(cursor)) => self.machine.sync_found(serial, cursor),
            Done::Synced(serial, Err(error)) => self.machine.sync_failed(serial, error),
        }
    }

    fn start(&mut self, serial: u64, subscribe: Arc<Subscribe>) {
        let Some(grant) = &self.grant else { return };
        let (context, scopes, view) = (Arc::clone(&self.context), Arc::clone(&grant.access.scopes), grant.view);
        let signal = Arc::clone(&self.signal);
        self.work.push(Box::pin(async move {
            let outcome = start::start(&context, &scopes, &subscribe, &signal).await;
            Done::Started { serial, view, subscribe, outcome }
        }));
    }

    fn started(&mut self, serial: u64, subscribe: Arc<Subscribe>, started: Started) {
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
        let place = Place {
            id,
            subscribe,
            tap,
            suspended: false,
            passed,
            generation,
            page: None,
            left: Left::default(),
            reading: false,
            fell_back: false,
            dear: false,
            found: None,
            over: None,
        };
        self.places.push(place);
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
