//! What the machine hands to a subscription, in order, through its inbox.

use std::time::Duration;

use crate::client::error::{ClientError, Disconnect};
use crate::client::frame::Frame;
use crate::cursor::Cursor;
use crate::protocol::message::{Resync, Source};

/// What a subscription is told.
#[derive(Debug)]
pub(super) enum Delivery {
    Started { cursor: Cursor, source: Source },
    Frame(Frame),
    CaughtUp(Cursor),
    Progress(Cursor),
    Disconnected { cause: Disconnect, retry_in: Duration },
    Resumed(Resumed),
    Resync(Resync),
    End(ClientError),
}

/// A subscription goes on after a lost connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// The position it goes on after.
    pub from: Cursor,
    /// Where the missed events come from; they are complete with the next `CaughtUp`.
    pub source: Source,
    /// How many attempts it took.
    pub attempt: u32,
    /// The node that serves now.
    pub node: String,
    /// How long the subscription was cut off.
    pub away: Duration,
}
