//! A history, taken apart: transactions, subscriptions, faults, and the truth from the end.

use std::collections::{BTreeMap, HashMap};

use tidewire::client::Cursor;

use super::Counts;
use crate::history::{FaultDone, FaultOn, Line, LogRow, Micros, Record, Want, Write};

/// A transaction of a writer.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    /// When COMMIT was sent, and what it was to commit.
    pub(super) commit: Option<(Micros, Vec<Write>)>,
    pub(super) xid: u64,
    pub(super) end: Option<(Micros, End)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Ok,
    Fail,
    Unknown,
}

/// What a subscription saw, in order.
#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) s: u32,
    pub(super) client: u32,
    pub(super) want: Want,
    pub(super) asked: Option<Cursor>,
    pub(super) asked_at: Micros,
    pub(super) first: Option<(Micros, Cursor)>,
    pub(super) events: Vec<Seen>,
    pub(super) steps: Vec<Step>,
    /// Which of the steps were a caught_up.
    pub(super) caught_up: Vec<usize>,
    pub(super) resync: Option<(Micros, String, Cursor)>,
    pub(super) stopped: Option<(Micros, Cursor)>,
    pub(super) refused: Option<(Micros, String)>,
}

/// An event in the handler.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) at: Micros,
    pub(super) seq: u64,
    pub(super) fingerprint: u64,
    /// Of the batch's cursor.
    pub(super) epoch: u32,
    pub(super) mark: Mark,
}

/// How an event is said to move its row over the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    None,
    Enter,
    Leave,
    /// It cannot be told; or a word that no document knows.
    Unknown,
}

/// What Postgres says of a condition: runs of seqs, ascending.
#[derive(Debug)]
pub(super) struct Matches {
    pub(super) seqs: Vec<(u64, u64)>,
    pub(super) enter: Vec<(u64, u64)>,
    pub(super) leave: Vec<(u64, u64)>,
}

/// A change of the position, or of the connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) at: Micros,
    pub(super) kind: Kind,
    /// The last event handed over so far.
    pub(super) last: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// After a batch.
    Batch {
        /// The seq of its first event.
        first: u64,
        cursor: Cursor,
        /// It said that it ends inside a transaction.
        open: bool,
    },
    /// By a progress or a caught_up.
    Position(Cursor),
    Lost,
    Resumed,
}

/// How a connection was lost, or refused before it was one.
#[derive(Debug)]
pub(super) struct Loss {
    pub(super) at: Micros,
    pub(super) s: u32,
    pub(super) code: Option<u16>,
    pub(super) status: Option<u16>,
    pub(super) cause: String,
}

/// Everything that the rules look at.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    pub(super) counts: Counts,
    pub(super) transactions: BTreeMap<(u32, u64), Transaction>,
    pub(super) subscriptions: BTreeMap<u32, Subscription>,
    pub(super) on: BTreeMap<u32, (Micros, FaultOn)>,
    pub(super) off: BTreeMap<u32, Micros>,
    pub(super) done: BTreeMap<u32, (Micros, FaultDone)>,
    /// The log as it is in the end.
    pub(super) log: Vec<LogRow>,
    /// When it was read.
    pub(super) log_read: Option<Micros>,
    /// What lossy failovers lost.
    pub(super) lost: Vec<LogRow>,
    pub(super) terms: Vec<(u64, u32, String, i64, Option<i64>)>,
    /// (epoch, the highest seq before it).
    pub(super) epochs: Vec<(u32, u64)>,
    pub(super) rows: BTreeMap<(String, i64), String>,
    pub(super) matches: HashMap<Want, Matches>,
    pub(super) outbox: Option<u64>,
    pub(super) losses: Vec<Loss>,
    /// Of clients that were turned away before they could subscribe.
    pub(super) refused: Vec<(Micros, String)>,
    pub(super) planned: Option<serde_json::Value>,
    pub(super) end: Micros,
}

impl Gathered {
    pub(super) fn take(&mut self, Line(t, record): Line) {
        match record {
            Record::Begin { .. }
            | Record::Commit { .. }
            | Record::Ok { .. }
            | Record::Fail { .. }
            | Record::Unknown { .. } => self.writer(t, record),
            Record::Log(row) if row.branch == 0 => {
                self.log_read.get_or_insert(t);
                self.log.push(row);
            }
            Record::Log(row) => self.lost.push(row),
            Record::Term { term, epoch, node, acquired, released } => {
                self.terms.push((term, epoch, node, acquired, released));
            }
            Record::Epoch { epoch, start_seq, .. } => self.epochs.push((epoch, start_seq)),
            Record::Row { table, key, val } => drop(self.rows.insert((table, key), val)),
            Record::Matches { want, seqs, enter, leave } => {
                self.matches.insert(want, Matches { seqs, enter, leave });
            }
            Record::Outbox { rows } => self.outbox = Some(rows),
            Record::FaultOn(on) => drop(self.on.insert(on.f, (t, on))),
            Record::FaultOff { f } => drop(self.off.insert(f, t)),
            // Counted when it is known how it went.
            Record::FaultDone(done) => {
                *self.counts.faults.entry(done.class.clone()).or_default() += 1;
                self.done.insert(done.f, (t, done));
            }
            Record::FaultSkipped { .. } => {}
            Record::Run(run) => self.planned = Some(run.plan),
            Record::Done { .. } => self.end = t,
            client => self.client(t, client),
        }
    }

    fn writer(&mut self, t: Micros, record: Record) {
        match record {
            Record::Begin { w, n } => drop(self.transactions.insert((w, n), Transaction::default())),
            Record::Commit { w, n, xid, ops } => {
                self.counts.transactions_of_several_rows += u64::from(ops.len() > 1);
                let transaction = self.transactions.entry((w, n)).or_default();
                transaction.commit = Some((t, ops));
                transaction.xid = xid;
            }
            Record::Ok { w, n } => {
                self.counts.transactions_ok += 1;
                self.transactions.entry((w, n)).or_default().end = Some((t, End::Ok));
            }
            Record::Fail { w, n, .. } => {
                self.counts.transactions_failed += 1;
                self.transactions.entry((w, n)).or_default().end = Some((t, End::Fail));
            }
            Record::Unknown { w, n, .. } => {
                self.counts.transactions_unknown += 1;
                self.transactions.entry((w, n)).or_default().end = Some((t, End::Unknown));
            }
            _ => {}
        }
    }

    fn client(&mut self, t: Micros, record: Record) {
        if let Record::Subscribe { s, client, want, from } = record {
            self.counts.subscriptions += 1;
            let subscription = Subscription {
                s,
                client,
                want,
                asked: from,
                asked_at: t,
                first: None,
                events: Vec::new(),
                steps: Vec::new(),
                caught_up: Vec::new(),
                resync: None,
                stopped: None,
                refused: None,
            };
            self.subscriptions.insert(s, subscription);
            return;
        }
        match &record {
            Record::Disconnected { s, code, status, cause } => {
                let name = match (code, status) {
                    (Some(code), _) => code.to_string(),
                    (None, Some(status)) => format!("HTTP {status}"),
                    (None, None) => "network".into(),
                };
                *self.counts.disconnects.entry(name).or_default() += 1;
                let (s, code, status, cause) = (*s, *code, *status, cause.clone());
                self.losses.push(Loss { at: t, s, code, status, cause });
            }
            Record::Subscribed { source, .. } | Record::Resumed { source, .. } => {
                *self.counts.resumes.entry(source.clone()).or_default() += 1;
            }
            Record::Resync { reason, .. } => *self.counts.resyncs.entry(reason.clone()).or_default() += 1,
            Record::Deliver { e, .. } => self.counts.deliveries += e.len() as u64,
            _ => {}
        }
        let (Record::Subscribed { s, .. }
        | Record::Deliver { s, .. }
        | Record::Progress { s, .. }
        | Record::CaughtUp { s, .. }
        | Record::Disconnected { s, .. }
        | Record::Resumed { s, .. }
        | Record::Resync { s, .. }
        | Record::Refused { s, .. }
        | Record::Stop { s, .. }) = &record
        else {
            return;
        };
        let Some(subscription) = self.subscriptions.get_mut(s) else {
            if let Record::Refused { error, .. } = record {
                self.refused.push((t, error));
            }
            return;
        };
        subscription.take(t, record);
    }

    /// Faults with their times, for the texts.
    pub(super) fn windows(&self) -> Vec<(Micros, Micros, String)> {
        let named = |(t, on): &(Micros, FaultOn)| {
            let off = self.off.get(&on.f).copied().unwrap_or(self.end);
            (*t, off, format!("{} {} on {}", on.class, on.variant, on.target))
        };
        self.on.values().map(named).collect()
    }

    /// The epoch in which the row at `seq` of the final log was numbered.
    pub(super) fn epoch_of(&self, seq: u64) -> u32 {
        let owner = self.epochs.iter().rev().find(|(_, start)| *start < seq).or(self.epochs.first());
        owner.map_or(0, |(epoch, _)| *epoch)
    }

    /// Whether a position lies in a tail that a later epoch does not have.
    pub(super) fn diverged(&self, position: Cursor) -> bool {
        self.epochs.iter().any(|(epoch, start)| *epoch > position.epoch && *start < position.seq)
    }
}

impl Mark {
    fn said(transition: Option<&str>) -> Self {
        match transition {
            None => Self::None,
            Some("enter") => Self::Enter,
            Some("leave") => Self::Leave,
            Some(_) => Self::Unknown,
        }
    }
}

impl Matches {
    pub(super) fn has(&self, seq: u64) -> bool {
        within(&self.seqs, seq)
    }

    /// The mark that the event must carry.
    pub(super) fn mark(&self, seq: u64) -> Mark {
        match (within(&self.enter, seq), within(&self.leave, seq)) {
            (true, _) => Mark::Enter,
            (_, true) => Mark::Leave,
            _ => Mark::None,
        }
    }
}

/// Whether ascending runs hold the number.
fn within(runs: &[(u64, u64)], seq: u64) -> bool {
    let after = runs.partition_point(|(first, _)| *first <= seq);
    after.checked_sub(1).is_some_and(|n| seq <= runs[n].1)
}

impl Subscription {
    fn take(&mut self, at: Micros, record: Record) {
        let kind = match record {
            Record::Subscribed { cursor, .. } => {
                self.first = Some((at, cursor));
                return;
            }
            Record::Deliver { e, cursor, open, .. } => {
                let first = e.first().map_or(cursor.seq, |event| event.0);
                self.events.extend(e.iter().map(|event| Seen {
                    at,
                    seq: event.0,
                    fingerprint: event.1,
                    epoch: cursor.epoch,
                    mark: Mark::said(event.2.as_deref()),
                }));
                Kind::Batch { first, cursor, open }
            }
            Record::Progress { cursor, .. } => Kind::Position(cursor),
            Record::CaughtUp { cursor, .. } => {
                self.caught_up.push(self.steps.len());
                Kind::Position(cursor)
            }
            Record::Disconnected { .. } => Kind::Lost,
            Record::Resumed { .. } => Kind::Resumed,
            Record::Resync { reason, position, .. } => {
                self.resync = Some((at, reason, position));
                return;
            }
            Record::Refused { error, .. } => {
                self.refused = Some((at, error));
                return;
            }
            Record::Stop { position, .. } => {
                self.stopped = Some((at, position));
                return;
            }
            _ => return,
        };
        let last = self.events.last().map_or(0, |event| event.seq);
        self.steps.push(Step { at, kind, last });
    }
}
