//! The history of a run: everything that writers did, clients saw and faults changed, and at the end what Postgres holds.
//!
//! JSON lines, each `[t, {"kind": {…}}]`, `t` in microseconds of the harness's monotonic clock since the run began. The
//! first line is [`Record::Run`], the last one [`Record::Done`]: without it the history was cut short and proves nothing.
//!
//! A delivered event is kept as its number and a fingerprint of its whole content ([`fingerprint`]); the log's rows at the
//! end carry the same fingerprint, so a changed byte on the way shows.

mod file;

use serde::{Deserialize, Serialize};
use tidewire::client::Cursor;

pub use self::file::{HistoryError, Reader, Recorder};

/// Rises when a reader of an older version would misread a history. A plan of another version is refused.
pub const VERSION: u32 = 2;

/// Microseconds since the run began, on the harness's monotonic clock.
pub type Micros = u64;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line(pub Micros, pub Record);

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// The first line.
    Run(Run),

    // Writers. A transaction is (`w`, `n`). Begin, then Commit and one of Ok, Fail, Unknown; or Begin and Fail.
    /// A transaction begins.
    Begin {
        /// The writer.
        w: u32,
        /// Its transaction.
        n: u64,
    },
    /// COMMIT is about to be sent; all statements succeeded.
    Commit {
        /// The writer.
        w: u32,
        /// Its transaction.
        n: u64,
        /// `pg_current_xact_id()`.
        xid: u64,
        /// What it did, in statement order.
        ops: Vec<Write>,
    },
    /// Postgres acknowledged the COMMIT.
    Ok {
        /// The writer.
        w: u32,
        /// Its transaction.
        n: u64,
    },
    /// It certainly did not commit: rolled back, refused, or the connection broke before COMMIT was sent.
    Fail {
        /// The writer.
        w: u32,
        /// Its transaction.
        n: u64,
        /// Why; `rollback` where the plan wanted it.
        error: String,
    },
    /// COMMIT was sent and no answer came.
    Unknown {
        /// The writer.
        w: u32,
        /// Its transaction.
        n: u64,
        /// Why.
        error: String,
    },

    // Clients. `s` is one subscription of one client process life: a client that "restarts" from a saved cursor gets a
    // new `s`, whose `from` is the cursor that it saved.
    /// A subscription is asked for.
    Subscribe {
        /// The subscription.
        s: u32,
        /// The client.
        client: u32,
        /// What it wants.
        want: Want,
        /// The cursor that it starts after; `None` for now.
        from: Option<Cursor>,
    },
    /// It stands.
    Subscribed {
        /// The subscription.
        s: u32,
        /// Its first position.
        cursor: Cursor,
        /// `live`, `memory` or `history`.
        source: String,
        /// The node's name.
        node: Option<String>,
    },
    /// Events were handed to the handler.
    Deliver {
        /// The subscription.
        s: u32,
        /// In the order of the handler's calls.
        e: Vec<Delivered>,
        /// The position after them.
        cursor: Cursor,
        /// The batch ended inside a transaction.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        open: bool,
    },
    /// Everything up to here that matches was delivered.
    Progress {
        /// The subscription.
        s: u32,
        /// The position.
        cursor: Cursor,
    },
    /// The replay reached the present.
    CaughtUp {
        /// The subscription.
        s: u32,
        /// The position.
        cursor: Cursor,
    },
    /// The connection was lost; the client goes on by itself.
    Disconnected {
        /// The subscription.
        s: u32,
        /// The close code, if one came.
        code: Option<u16>,
        /// An HTTP status instead of the upgrade, if one came.
        status: Option<u16>,
        /// The text of the cause.
        cause: String,
    },
    /// It goes on.
    Resumed {
        /// The subscription.
        s: u32,
        /// `memory` or `history` or `live`.
        source: String,
        /// The node's name.
        node: Option<String>,
    },
    /// The server cannot resume it; it has ended.
    Resync {
        /// The subscription.
        s: u32,
        /// The protocol's reason, such as `history_diverged`.
        reason: String,
        /// The position that was asked for or held.
        position: Cursor,
        /// The server's text.
        message: String,
    },
    /// The client library gave up, or the server refused for good.
    Refused {
        /// The subscription.
        s: u32,
        /// The close code, if one came.
        code: Option<u16>,
        /// The text.
        error: String,
    },
    /// The client ended it by plan (a "process restart", or the end of the run).
    Stop {
        /// The subscription.
        s: u32,
        /// After the last event that was handled.
        position: Cursor,
    },

    // Faults.
    /// A fault begins.
    FaultOn(FaultOn),
    /// It is healed: from now on figures of recovery count.
    FaultOff {
        /// The fault's number in the plan.
        f: u32,
    },
    /// How it went.
    FaultDone(FaultDone),
    /// The machine, or the state of the cluster, did not allow it.
    FaultSkipped {
        /// The fault's number in the plan.
        f: u32,
        /// `F1`…
        class: String,
        /// Why.
        why: String,
    },

    // The truth, read from Postgres after the last drain.
    /// One row of the log.
    Log(LogRow),
    /// One leadership, from `tidewire.terms`.
    Term {
        /// The number.
        term: u64,
        /// The epoch.
        epoch: u32,
        /// The node.
        node: String,
        /// When, on the run's clock (may precede it: negative).
        acquired: i64,
        /// When, if it ended in order.
        released: Option<i64>,
    },
    /// One incarnation of the log, from `tidewire.epochs`.
    Epoch {
        /// The number.
        epoch: u32,
        /// Its first seq.
        start_seq: u64,
        /// Why it began.
        reason: String,
    },
    /// One row of a user's table.
    Row {
        /// `public.accounts`…
        table: String,
        /// The primary key.
        key: i64,
        /// The value.
        val: String,
    },
    /// What Postgres itself says of a subscription's condition: the seqs of the log that it lets through.
    Matches {
        /// What was wanted.
        want: Want,
        /// Ascending; runs of consecutive seqs as (first, last).
        seqs: Vec<(u64, u64)>,
        /// Of these, the UPDATEs whose row matches after it and did not before, as runs.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        enter: Vec<(u64, u64)>,
        /// Of these, the UPDATEs whose row matched before it and does not after, as runs.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        leave: Vec<(u64, u64)>,
    },
    /// Rows that were left in the outbox.
    Outbox {
        /// How many.
        rows: u64,
    },
    /// The last line.
    Done {
        /// Lines before this one.
        lines: u64,
    },
}

/// The first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// [`VERSION`].
    pub version: u32,
    /// Gives writer plan, client plan and fault plan.
    pub seed: u64,
    /// Version of the server under test.
    pub server: String,
    /// The mutant that it runs with, in a run that must fail.
    pub mutant: Option<String>,
    /// Wall clock at t = 0, microseconds of the Unix epoch.
    pub wall: i64,
    /// The resolved plan, for `replay`.
    pub plan: serde_json::Value,
}

/// What a subscription wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Want {
    /// As on the wire.
    pub tables: Vec<String>,
    /// As on the wire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// As on the wire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<Vec<String>>,
}

/// One change that a writer made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    /// `public.accounts`…, or `event:…`.
    pub table: String,
    /// `INSERT`, `UPDATE`, `DELETE`, `EVENT`.
    pub op: String,
    /// The primary key; the aggregate id of a domain event.
    pub key: i64,
    /// The new value, unique over the whole run: `<writer>-<n>-<i>`. Of a DELETE: the value that it deleted.
    pub val: String,
    /// The value that it replaced (UPDATE).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prev: Option<String>,
}

/// One event in the handler: its seq, its [`fingerprint`], and how it moved over the filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivered(pub u64, pub u64, #[serde(default, skip_serializing_if = "Option::is_none")] pub Option<String>);

/// A fault begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FaultOn {
    /// Its number in the plan.
    pub f: u32,
    /// `F1`…`F27`, or `FP` for a fail point.
    pub class: String,
    /// The variant: `reset`, `blackhole`, `60s`…
    pub variant: String,
    /// The target as it was resolved: a node's name, `primary`, `client`…
    pub target: String,
}

/// How a fault went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FaultDone {
    /// Its number in the plan.
    pub f: u32,
    /// `F1`…
    pub class: String,
    /// The target held the role at the time, and the fault took effect (the process died, the socket was cut…).
    pub took: bool,
    /// After the heal a fresh write reached clients, and every client passed the log's head of the heal.
    pub progressed: bool,
    /// From the heal to the last client having passed the log's head of that moment, microseconds.
    pub caught_up: Option<u64>,
    /// Figures that only the fault itself can measure: name to value; names end in their unit (`_us`, `_bytes`, `_rows`).
    #[serde(default)]
    pub figures: std::collections::BTreeMap<String, f64>,
    /// A failed promise that only the fault itself can see (a node that died, a row by an old leader): a violation.
    #[serde(default)]
    pub violations: Vec<String>,
}

/// One row of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogRow {
    /// 0 for the log as it is at the end; n for the tail that the n-th lossy failover lost, read from the old primary.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub branch: u32,
    /// The number.
    pub seq: u64,
    /// The transaction.
    pub xid: u64,
    /// Last of its transaction.
    pub tx_end: bool,
    /// The idempotency key.
    pub event_id: uuid::Uuid,
    /// The table.
    pub table: String,
    /// The operation.
    pub op: String,
    /// The primary key, where the row has one.
    pub key: Option<i64>,
    /// `val` of the row after; of a DELETE, before.
    pub val: Option<String>,
    /// `prev` of the row after.
    pub prev: Option<String>,
    /// `val` of the row before, where there was one.
    pub before: Option<String>,
    /// When it was relayed, on the run's clock.
    pub relayed: i64,
    /// Of its whole content.
    pub fingerprint: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_zero(branch: &u32) -> bool {
    *branch == 0
}

/// What a fingerprint is made of. Images are JSON text, exactly as on the wire and in the log.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    /// The idempotency key.
    pub event_id: uuid::Uuid,
    /// The table.
    pub table: &'a str,
    /// The operation.
    pub op: &'a str,
    /// The transaction, decimal.
    pub tx: &'a str,
    /// Last of its transaction.
    pub tx_end: bool,
    /// The key.
    pub key: Option<&'a str>,
    /// The row before.
    pub before: Option<&'a str>,
    /// The row after.
    pub after: Option<&'a str>,
}

/// A 64-bit FNV-1a over every field, each closed by a separator.
#[must_use]
pub fn fingerprint(content: &Content<'_>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut take = |bytes: &[u8]| {
        for byte in bytes.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    take(content.event_id.as_bytes());
    take(content.table.as_bytes());
    take(content.op.as_bytes());
    take(content.tx.as_bytes());
    take(&[u8::from(content.tx_end)]);
    for image in [content.key, content.before, content.after] {
        take(image.unwrap_or("\u{1}").as_bytes());
    }
    hash
}
