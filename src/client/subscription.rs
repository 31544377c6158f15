//! [`Subscription`]: the stream that an application reads, and the items on it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::Stream;

use crate::client::delivery::{Delivery, Resumed};
use crate::client::error::{ClientError, Disconnect};
use crate::client::event::Event;
use crate::client::frame::Frame;
use crate::client::inbox::Inbox;
use crate::cursor::Cursor;
use crate::protocol::message::{Resync, Source};

/// What a subscription tells. Only [`Batch`](Item::Batch) and [`Resync`](Item::Resync) ask for an answer; the rest is
/// news.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Item<B = Batch> {
    /// Events, in order.
    Batch(B),
    /// The replay has reached the present: once after each beginning and each resume.
    CaughtUp {
        /// The position.
        cursor: Cursor,
    },
    /// Everything up to here that matches was sent; a good place to keep.
    Progress {
        /// The position.
        cursor: Cursor,
    },
    /// The connection was lost. The client is at work on another one; nothing is lost.
    Disconnected {
        /// Why.
        cause: Disconnect,
        /// How long it waits before the next attempt.
        retry_in: Duration,
    },
    /// The subscription goes on, without a gap.
    Resumed(Resumed),
    /// What was missed cannot be had any more. The stream ends after this: fetch the state anew, then subscribe from
    /// now.
    Resync(Resync),
}

/// A run of events.
#[derive(Clone, Debug)]
pub struct Batch {
    /// In `seq` order.
    pub events: Vec<Event>,
    /// The position after them.
    pub cursor: Cursor,
    /// The batch ends inside a transaction; the rest follows.
    pub open: bool,
}

/// Changes as they commit, in one order, without gaps and repetitions for as long as this value lives.
///
/// An item counts as **handled** when the next one is asked for, or at [`ack`](Self::ack).
/// [`position`](Self::position) is after the last handled one: keep it with what you made of the events, and begin
/// there ([`Start::After`](super::Start::After)) in the next process.
///
/// Dropping it unsubscribes. A subscription that is not read holds up the others of the same client once its buffer
/// is full: read each in a task of its own, or give it a client of its own.
#[derive(Debug)]
pub struct Subscription {
    reader: Reader,
}

impl Subscription {
    pub(super) fn new(inbox: Arc<Inbox>, id: String, cursor: Cursor, source: Source) -> Self {
        Self { reader: Reader { inbox, id, begun: (cursor, source), failed: false } }
    }

    /// The next item; `None` when the subscription has ended. Cancel safe.
    ///
    /// # Errors
    /// The subscription has ended; the error says why and what to do.
    pub async fn next(&mut self) -> Option<Result<Item, ClientError>> {
        std::future::poll_fn(|context| self.poll_item(context)).await
    }

    /// Says that the last item was handled, without asking for another.
    pub fn ack(&mut self) {
        self.reader.ack();
    }

    /// After the last event that was handled.
    #[must_use]
    pub fn position(&self) -> Cursor {
        self.reader.position()
    }

    /// Its name on the wire, in the server's logs and listings.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.reader.id
    }

    /// Where the first events come from.
    #[must_use]
    pub fn source(&self) -> Source {
        self.reader.begun.1
    }

    /// The same subscription without the parse: for forwarding and for measuring.
    #[must_use]
    pub fn into_frames(self) -> Frames {
        Frames { reader: self.reader }
    }

    fn poll_item(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Item, ClientError>>> {
        loop {
            let Some((delivery, before)) = ready!(self.reader.poll_take(context)) else { return Poll::Ready(None) };
            let item = match item(delivery) {
                Ok(Some(Item::Batch(frame))) => match parse(&frame, before) {
                    Ok(batch) if batch.events.is_empty() => continue,
                    Ok(batch) => Ok(Item::Batch(batch)),
                    Err(error) => {
                        self.reader.fail();
                        Err(error)
                    }
                },
                Ok(Some(other)) => Ok(other.without_batch()),
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            return Poll::Ready(Some(item));
        }
    }
}

impl Stream for Subscription {
    type Item = Result<Item, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_item(context)
    }
}

/// A [`Subscription`] whose batches are the server's frames as they came; made by [`Subscription::into_frames`].
#[derive(Debug)]
pub struct Frames {
    reader: Reader,
}

impl Frames {
    /// The next item; `None` when the subscription has ended. Cancel safe.
    ///
    /// # Errors
    /// The subscription has ended; the error says why and what to do.
    pub async fn next(&mut self) -> Option<Result<Item<Frame>, ClientError>> {
        std::future::poll_fn(|context| self.poll_item(context)).await
    }

    /// Says that the last item was handled, without asking for another.
    pub fn ack(&mut self) {
        self.reader.ack();
    }

    /// After the last event that was handled.
    #[must_use]
    pub fn position(&self) -> Cursor {
        self.reader.position()
    }

    fn poll_item(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Item<Frame>, ClientError>>> {
        loop {
            let Some((delivery, _)) = ready!(self.reader.poll_take(context)) else { return Poll::Ready(None) };
            if let Some(item) = item(delivery).transpose() {
                return Poll::Ready(Some(item));
            }
        }
    }
}

impl Stream for Frames {
    type Item = Result<Item<Frame>, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_item(context)
    }
}

/// The application's end of an [`Inbox`]; its drop unsubscribes.
#[derive(Debug)]
struct Reader {
    inbox: Arc<Inbox>,
    id: String,
    begun: (Cursor, Source),
    /// A frame could not be read: nothing behind it may be handed out, nor the position move past it.
    failed: bool,
}

impl Reader {
    fn poll_take(&self, context: &mut Context<'_>) -> Poll<Option<(Delivery, Option<Cursor>)>> {
        if self.failed { Poll::Ready(None) } else { self.inbox.poll_take(context) }
    }

    fn fail(&mut self) {
        self.failed = true;
        self.inbox.abandon();
    }

    fn ack(&self) {
        if !self.failed {
            self.inbox.acknowledge();
        }
    }

    fn position(&self) -> Cursor {
        self.inbox.handled().unwrap_or(self.begun.0)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.inbox.abandon();
    }
}

/// `None` for what `Client::subscribe` has told already.
fn item(delivery: Delivery) -> Result<Option<Item<Frame>>, ClientError> {
    Ok(Some(match delivery {
        Delivery::Started { .. } => return Ok(None),
        Delivery::Frame(frame) => Item::Batch(frame),
        Delivery::CaughtUp(cursor) => Item::CaughtUp { cursor },
        Delivery::Progress(cursor) => Item::Progress { cursor },
        Delivery::Disconnected { cause, retry_in } => Item::Disconnected { cause, retry_in },
        Delivery::Resumed(resumed) => Item::Resumed(resumed),
        Delivery::Resync(resync) => Item::Resync(resync),
        Delivery::End(error) => return Err(error),
    }))
}

impl Item<Frame> {
    /// The same news for the reader of parsed batches; an empty batch never occurs, frames are parsed before.
    fn without_batch(self) -> Item {
        match self {
            Self::Batch(frame) => Item::Batch(Batch { events: Vec::new(), cursor: frame.cursor(), open: frame.open() }),
            Self::CaughtUp { cursor } => Item::CaughtUp { cursor },
            Self::Progress { cursor } => Item::Progress { cursor },
            Self::Disconnected { cause, retry_in } => Item::Disconnected { cause, retry_in },
            Self::Resumed(resumed) => Item::Resumed(resumed),
            Self::Resync(resync) => Item::Resync(resync),
        }
    }
}

/// The frame's events above `before`: by protocol there are no others.
fn parse(frame: &Frame, before: Option<Cursor>) -> Result<Batch, ClientError> {
    let mut events = frame.parse().map_err(|error| ClientError::Unreadable {
        after: before.map_or_else(String::new, |cursor| cursor.to_string()),
        reason: error.to_string(),
    })?;
    let handled = before.map_or(0, |cursor| cursor.seq);
    events.retain(|event| event.seq > handled);
    Ok(Batch { events, cursor: frame.cursor(), open: frame.open() })
}
