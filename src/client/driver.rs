//! The client's one task: it owns the socket, reads and writes, and does what the [`Machine`] says.
//!
//! Every wait of the task ends in a [`Wake`]; what follows from it is decided without waiting, except for the writes
//! of small messages, which have a limit of time. A full [`Inbox`] stops the reading (TCP does the rest), and while
//! nothing is read the server is told by unasked pongs that the client lives.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{sleep_until, timeout};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Bytes, Error, Message};
use url::Url;

use crate::client::Shared;
use crate::client::delivery::Delivery;
use crate::client::dial::{Credential, Socket, dial};
use crate::client::error::{ClientError, Disconnect};
use crate::client::frame::{self, Incoming};
use crate::client::inbox::Inbox;
use crate::client::machine::{Action, Id, Machine, Next, WELCOME_TIMEOUT};
use crate::client::requests::Token;
use crate::cursor::Cursor;
use crate::protocol::message::{ClientMessage, ServerMessage, Subscribe};

/// A small message that cannot be written for so long means that the connection is dead.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a goodbye may take.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);
/// Far away: a timer that nobody waits for.
const IDLE: Duration = Duration::from_hours(1);
/// Pings under way at once; more are refused.
const MAX_PINGS: usize = 16;

/// What the application asks of the task.
#[derive(Debug)]
pub(super) enum Command {
    Subscribe { request: Subscribe, inbox: Arc<Inbox> },
    Sync { tx: String, timeout: Duration, reply: oneshot::Sender<Result<Cursor, ClientError>> },
    Ping { reply: oneshot::Sender<Result<Duration, ClientError>> },
    Close,
}

/// Why the task woke.
enum Wake {
    Socket(Option<Result<Message, Error>>),
    Command(Option<Command>),
    /// An inbox has room again, or was abandoned.
    Inbox,
    Time,
}

/// How a connection, or the attempt to make one, ended.
enum End {
    Lost(Disconnect),
    Stop(ClientError),
}

pub(super) struct Driver {
    pub(super) endpoints: Vec<Url>,
    pub(super) credential: Credential,
    pub(super) read_buffer_bytes: usize,
    pub(super) machine: Machine,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) changed: Arc<Notify>,
    pub(super) shared: Arc<Shared>,
    /// Told once: the first welcome, or why there is none.
    pub(super) ready: Option<oneshot::Sender<Result<(), ClientError>>>,
    pub(super) inboxes: BTreeMap<Id, Arc<Inbox>>,
    pub(super) syncs: BTreeMap<Token, oneshot::Sender<Result<Cursor, ClientError>>>,
    pub(super) pings: BTreeMap<u64, (Instant, oneshot::Sender<Result<Duration, ClientError>>)>,
    pub(super) next_token: Token,
    /// This connection's `welcome` was told.
    pub(super) welcomed: bool,
    /// The application has dropped its `Client`.
    pub(super) orphaned: bool,
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Driver {
    pub(super) async fn run(mut self) {
        let mut wait = Duration::ZERO;
        // Clients that start together do not all begin with the first address.
        let mut turn = rand::random_range(0..self.endpoints.len());
        let last = loop {
            let url = self.endpoints[turn % self.endpoints.len()].clone();
            turn += 1;
            let end = match self.connect(&url, wait).await {
                Ok(mut socket) => self.serve(&mut socket).await,
                Err(end) => end,
            };
            match self.ended(end) {
                Ok(next_wait) => wait = next_wait,
                Err(error) => break error,
            }
        };
        self.finish(last).await;
    }

    /// Waits, then connects; does the application's business meanwhile.
    async fn connect(&mut self, url: &Url, wait: Duration) -> Result<Socket, End> {
        let (credential, read_buffer_bytes) = (self.credential.clone(), self.read_buffer_bytes);
        let attempt = async move {
            tokio::time::sleep(wait).await;
            let dialled = timeout(WELCOME_TIMEOUT, dial(url, &credential, read_buffer_bytes)).await;
            dialled.unwrap_or(Err(Disconnect::NoWelcome(WELCOME_TIMEOUT)))
        };
        tokio::pin!(attempt);
        loop {
            let deadline = self.machine.deadline().unwrap_or_else(|| now() + IDLE);
            let wake = tokio::select! {
                dialled = &mut attempt => return dialled.map_err(End::Lost),
                command = self.commands.recv(), if !self.orphaned => Wake::Command(command),
                () = self.changed.notified() => Wake::Inbox,
                () = sleep_until(deadline.into()) => Wake::Time,
            };
            self.note(wake)?;
            self.perform(None).await?;
        }
    }

    /// One connection, from the upgrade to its end.
    async fn serve(&mut self, socket: &mut Socket) -> End {
        self.machine.connected(now());
        let mut stalled = false;
        let timer = sleep_until((now() + IDLE).into());
        tokio::pin!(timer);
        loop {
            let due = self.due(stalled);
            // A deadline that moved away is met early and looked at again: cheaper than a timer set for each message.
            if due < timer.deadline().into_std() || timer.is_elapsed() {
                timer.as_mut().reset(due.into());
            }
            let wake = tokio::select! {
                message = socket.next(), if !stalled => Wake::Socket(message),
                command = self.commands.recv(), if !self.orphaned => Wake::Command(command),
                () = self.changed.notified() => Wake::Inbox,
                () = &mut timer => Wake::Time,
            };
            if stalled && matches!(wake, Wake::Time) && write(socket, Message::Pong(Bytes::new())).await.is_err() {
                return End::Lost(Disconnect::Network("the connection does not take bytes any more".into()));
            }
            let done = match self.note(wake) {
                Ok(()) => self.perform(Some(socket)).await,
                Err(end) => Err(end),
            };
            match done {
                Ok(full) if full || stalled => {
                    let still = self.inboxes.values().any(|inbox| inbox.is_full());
                    if still != stalled {
                        self.machine.pause(still, now());
                    }
                    stalled = still;
                }
                Ok(_) => {}
                Err(end) => {
                    if matches!(end, End::Stop(_) | End::Lost(Disconnect::Drain)) {
                        // Politeness only: the server finds out by itself, too.
                        let _ = timeout(GOODBYE_TIMEOUT, socket.close(None)).await;
                    }
                    return end;
                }
            }
        }
    }

    /// When the task must look again although nothing happens.
    fn due(&self, stalled: bool) -> Instant {
        let due = self.machine.deadline().unwrap_or_else(|| now() + IDLE);
        match self.machine.welcome() {
            Some(welcome) if stalled => due.min(now() + Duration::from_millis(welcome.heartbeat_ms)),
            _ => due,
        }
    }

    /// Tells the machine.
    fn note(&mut self, wake: Wake) -> Result<(), End> {
        match wake {
            Wake::Socket(Some(Ok(message))) => self.received(message),
            Wake::Socket(Some(Err(error))) => Err(End::Lost(broken(&error))),
            Wake::Socket(None) => Err(End::Lost(closed(None))),
            Wake::Command(Some(command)) => self.command(command),
            Wake::Command(None) => {
                self.orphaned = true;
                self.sweep()
            }
            Wake::Inbox => self.sweep(),
            Wake::Time => {
                self.machine.tick(now());
                Ok(())
            }
        }
    }

    fn received(&mut self, message: Message) -> Result<(), End> {
        let text = match message {
            Message::Text(text) => text,
            Message::Close(frame) => return Err(End::Lost(closed(frame))),
            Message::Ping(_) | Message::Pong(_) | Message::Binary(_) | Message::Frame(_) => {
                self.machine.heard(now());
                return Ok(());
            }
        };
        let incoming = frame::read(&text).map_err(|error| End::Lost(Disconnect::Protocol(error.to_string())))?;
        if let Incoming::Message(message) = &incoming
            && let ServerMessage::Pong { t: Some(t) } = &**message
            && let Some((since, reply)) = t.text().parse::<u64>().ok().and_then(|t| self.pings.remove(&t))
        {
            // Whoever asked may have gone.
            let _ = reply.send(Ok(now().duration_since(since)));
        }
        self.machine.message(incoming, now());
        if !self.welcomed
            && let Some(welcome) = self.machine.welcome()
        {
            self.welcomed = true;
            self.shared.set_server(Some(welcome.clone()));
            if let Some(ready) = self.ready.take() {
                // Whoever connects may have gone.
                let _ = ready.send(Ok(()));
            }
        }
        Ok(())
    }

    fn command(&mut self, command: Command) -> Result<(), End> {
        match command {
            Command::Subscribe { request, inbox } => {
                let id: Id = request.id.as_str().into();
                match self.machine.subscribe(request) {
                    Ok(()) => drop(self.inboxes.insert(id, inbox)),
                    Err(error) => drop(inbox.push(Delivery::End(error))),
                }
                // Whoever asked may have given up before the inbox was known here: nobody tells of that again.
                self.sweep()?;
            }
            Command::Sync { tx, timeout, reply } => {
                self.next_token += 1;
                self.syncs.insert(self.next_token, reply);
                self.machine.sync(self.next_token, tx, timeout, now());
            }
            Command::Ping { reply } => {
                self.pings.retain(|_, (_, reply)| !reply.is_closed());
                if self.machine.welcome().is_none() || self.pings.len() >= MAX_PINGS {
                    let _ = reply.send(Err(ClientError::Interrupted(Disconnect::Network("not connected".into()))));
                } else {
                    self.next_token += 1;
                    self.pings.insert(self.next_token, (now(), reply));
                    self.machine.ping(self.next_token);
                }
            }
            Command::Close => return Err(End::Stop(ClientError::Stopped)),
        }
        Ok(())
    }

    /// Finds the subscriptions that were dropped; ends with the last one once the client is dropped, too.
    fn sweep(&mut self) -> Result<(), End> {
        let machine = &mut self.machine;
        self.inboxes.retain(|id, inbox| {
            let abandoned = inbox.is_abandoned();
            if abandoned {
                machine.unsubscribe(id);
            }
            !abandoned
        });
        if self.orphaned && self.inboxes.is_empty() { Err(End::Stop(ClientError::Stopped)) } else { Ok(()) }
    }

    /// Does what the machine wants; whether an inbox is full now.
    async fn perform(&mut self, mut socket: Option<&mut Socket>) -> Result<bool, End> {
        let (mut full, mut end) = (false, None);
        while let Some(action) = self.machine.next_action() {
            match action {
                Action::Send(message) => {
                    if let Some(socket) = &mut socket {
                        full |= self.send(socket, &message).await?;
                    }
                }
                Action::Deliver(id, delivery) => full |= self.deliver(&id, delivery),
                Action::Answer(token, answer) => self.answer(token, answer),
                Action::Leave(cause) => drop(end.get_or_insert(End::Lost(cause))),
                Action::GiveUp(error) => end = Some(End::Stop(error)),
            }
        }
        end.map_or(Ok(full), Err)
    }

    async fn send(&self, socket: &mut Socket, message: &ClientMessage) -> Result<bool, End> {
        // Only maps with keys that are no strings fail to serialize, and a message has none.
        let text =
            serde_json::to_string(message).map_err(|error| End::Lost(Disconnect::Protocol(error.to_string())))?;
        write(socket, Message::text(text)).await.map_err(End::Lost)?;
        Ok(false)
    }

    fn deliver(&mut self, id: &Id, delivery: Delivery) -> bool {
        let last = matches!(delivery, Delivery::Resync(_) | Delivery::End(_));
        let full = self.inboxes.get(id).is_some_and(|inbox| inbox.push(delivery));
        if last {
            self.inboxes.remove(id);
        }
        full
    }

    /// What follows the end of a connection: a wait, or the client's end.
    fn ended(&mut self, end: End) -> Result<Duration, ClientError> {
        self.welcomed = false;
        self.shared.set_server(None);
        let cause = match end {
            End::Lost(cause) => cause,
            End::Stop(error) => return Err(error),
        };
        for (_, (_, reply)) in std::mem::take(&mut self.pings) {
            let _ = reply.send(Err(ClientError::Interrupted(cause.clone())));
        }
        // A write that failed may have left last words behind; what else was wanted of the lost connection is void.
        if let Some(error) = self.last_words() {
            return Err(error);
        }
        let inboxes = &self.inboxes;
        let rewind = |id: &str| inboxes.get(id).and_then(|inbox| inbox.rewind());
        let next = self.machine.lost(cause, now(), rand::random(), &rewind);
        let give_up = self.last_words();
        match next {
            Next::ConnectAfter(wait) => Ok(wait),
            Next::Stop => Err(give_up.unwrap_or(ClientError::Stopped)),
        }
    }

    /// Does what can be done without a connection; the reason where the machine gives up.
    fn last_words(&mut self) -> Option<ClientError> {
        let mut give_up = None;
        while let Some(action) = self.machine.next_action() {
            match action {
                // A frame stays with the server: the resume brings it again.
                Action::Send(_) | Action::Leave(_) | Action::Deliver(_, Delivery::Frame(_)) => {}
                Action::Deliver(id, delivery) => drop(self.deliver(&id, delivery)),
                Action::Answer(token, answer) => self.answer(token, answer),
                Action::GiveUp(error) => give_up = Some(error),
            }
        }
        give_up
    }

    fn answer(&mut self, token: Token, answer: Result<Cursor, ClientError>) {
        if let Some(reply) = self.syncs.remove(&token) {
            // Whoever asked may have gone.
            let _ = reply.send(answer);
        }
    }

    /// Tells everyone that there is nothing more to come.
    async fn finish(mut self, error: ClientError) {
        self.shared.end(error.clone());
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(Err(error.clone()));
        }
        self.commands.close();
        while let Some(command) = self.commands.recv().await {
            match command {
                Command::Subscribe { inbox, .. } => drop(inbox.push(Delivery::End(error.clone()))),
                Command::Sync { reply, .. } => drop(reply.send(Err(error.clone()))),
                Command::Ping { reply } => drop(reply.send(Err(error.clone()))),
                Command::Close => {}
            }
        }
        for inbox in self.inboxes.into_values() {
            inbox.push(Delivery::End(error.clone()));
        }
        for reply in self.syncs.into_values() {
            let _ = reply.send(Err(error.clone()));
        }
        for (_, reply) in self.pings.into_values() {
            let _ = reply.send(Err(error.clone()));
        }
    }
}

async fn write(socket: &mut Socket, message: Message) -> Result<(), Disconnect> {
    match timeout(WRITE_TIMEOUT, socket.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(broken(&error)),
        Err(_) => Err(Disconnect::Network("the connection does not take bytes any more".into())),
    }
}

fn broken(error: &Error) -> Disconnect {
    match error {
        Error::ConnectionClosed | Error::AlreadyClosed => closed(None),
        other => Disconnect::Network(other.to_string()),
    }
}

/// RFC 6455, 7.1.5: 1005 stands for a close frame without a code, 1006 for an end without a close frame. Only the
/// latter reaches us without a frame, and both are treated alike.
fn closed(frame: Option<CloseFrame>) -> Disconnect {
    let (code, reason) = frame.map_or((1006, "without a goodbye".to_owned()), |frame| {
        (u16::from(frame.code), frame.reason.as_str().to_owned())
    });
    Disconnect::Closed { code, reason, message: String::new() }
}
