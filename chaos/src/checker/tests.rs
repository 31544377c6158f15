//! The checker is only worth what it notices: histories that must fail, each by exactly its rule, and near misses that
//! must pass.

mod broken;
mod caught_up;
mod conduct;
mod positions;
mod random;
mod sound;

use std::collections::BTreeMap;
use std::convert::Infallible;

use tidewire::client::Cursor;
use uuid::Uuid;

use super::{Verdict, check};
use crate::history::{Delivered, FaultDone, FaultOn, Line, LogRow, Record, Run, VERSION, Want, Write};

const TABLE: &str = "public.accounts";

/// Runs of seqs, ascending.
type Runs = Vec<(u64, u64)>;

/// A history under construction. Everything is public to the tests, which break it.
#[derive(Clone, Debug, Default)]
struct History {
    lines: Vec<Record>,
    /// At the end, in this order.
    log: Vec<LogRow>,
    rows: BTreeMap<i64, String>,
    epochs: Vec<(u32, u64)>,
    terms: Vec<(u64, u32, i64)>,
    matches: Vec<(Want, Runs)>,
    /// Of every condition: what enters, and what leaves.
    moved: (Runs, Runs),
    plan: serde_json::Value,
    outbox: u64,
}

fn everything() -> Want {
    Want { tables: vec!["*".into()], filter: None, ops: None }
}

/// The cursor of an event of the log.
fn at(epoch: u32, seq: u64) -> Cursor {
    cursor(epoch, 0, seq)
}

/// The cursor of an event of the lost tail.
fn lost_at(seq: u64) -> Cursor {
    cursor(1, 1, seq)
}

fn cursor(epoch: u32, branch: u32, seq: u64) -> Cursor {
    if seq == 0 { Cursor::origin(epoch) } else { Cursor::at(epoch, seq, event_id(branch, seq)) }
}

fn event_id(branch: u32, seq: u64) -> Uuid {
    Uuid::from_u128(u128::from(print(branch, seq)))
}

/// What an event of the log is recognised by; a lost tail has others.
fn print(branch: u32, seq: u64) -> u64 {
    u64::from(branch) << 32 | seq
}

fn insert(key: i64, val: &str) -> Write {
    Write { table: TABLE.into(), op: "INSERT".into(), key, val: val.into(), prev: None }
}

fn update(key: i64, val: &str, prev: &str) -> Write {
    Write { prev: Some(prev.into()), op: "UPDATE".into(), ..insert(key, val) }
}

fn delete(key: i64, val: &str) -> Write {
    Write { op: "DELETE".into(), ..insert(key, val) }
}

/// A domain event: no table holds it.
fn event(key: i64, val: &str) -> Write {
    Write { table: "event:bid".into(), op: "EVENT".into(), ..insert(key, val) }
}

impl History {
    /// One epoch, one term, nothing written.
    fn new() -> Self {
        Self { epochs: vec![(1, 0)], terms: vec![(1, 1, 0)], ..Self::default() }
    }

    /// Three transactions, one of two rows; one is rolled back; one client sees everything.
    fn small() -> Self {
        let mut history = Self::new();
        history.transaction(1, &[insert(1, "a")]);
        history.transaction(2, &[insert(2, "b"), update(1, "c", "a")]);
        history.rolled_back(3, &[insert(9, "never")]);
        history.transaction(4, &[delete(2, "b")]);
        history.subscribe(1, None, at(1, 0));
        history.deliver(1, &[1]);
        history.deliver(1, &[2, 3]);
        history.deliver(1, &[4]);
        history.stop(1, at(1, 4));
        history.matched(&[(1, 4)]);
        history
    }

    fn say(&mut self, record: Record) {
        self.lines.push(record);
    }

    /// Written, acknowledged and relayed.
    fn transaction(&mut self, n: u64, ops: &[Write]) {
        self.written(n, ops);
        self.say(Record::Ok { w: 0, n });
        self.relay(n, ops);
    }

    fn rolled_back(&mut self, n: u64, ops: &[Write]) {
        self.written(n, ops);
        self.say(Record::Fail { w: 0, n, error: "rollback".into() });
    }

    fn written(&mut self, n: u64, ops: &[Write]) {
        self.say(Record::Begin { w: 0, n });
        self.say(Record::Commit { w: 0, n, xid: n, ops: ops.to_vec() });
    }

    fn relay(&mut self, xid: u64, ops: &[Write]) {
        for (i, write) in ops.iter().enumerate() {
            let seq = self.log.iter().filter(|row| row.branch == 0).count() as u64 + 1;
            let row = row(0, seq, xid, i + 1 == ops.len(), write);
            self.log.push(row);
            match write.op.as_str() {
                "DELETE" => drop(self.rows.remove(&write.key)),
                "EVENT" => {}
                _ => drop(self.rows.insert(write.key, write.val.clone())),
            }
        }
    }

    fn subscribe(&mut self, s: u32, from: Option<Cursor>, first: Cursor) {
        self.say(Record::Subscribe { s, client: s, want: everything(), from });
        self.say(Record::Subscribed { s, cursor: first, source: "live".into(), node: None });
    }

    fn deliver(&mut self, s: u32, seqs: &[u64]) {
        self.deliver_of(s, 1, 0, seqs, false);
    }

    fn deliver_of(&mut self, s: u32, epoch: u32, branch: u32, seqs: &[u64], open: bool) {
        let e = seqs.iter().map(|seq| Delivered(*seq, print(branch, *seq), None)).collect();
        let last = seqs.last().copied().unwrap_or(0);
        self.say(Record::Deliver { s, e, cursor: cursor(epoch, branch, last), open });
    }

    /// A minute passes in which nothing is said.
    fn minute(&mut self) {
        self.lines.extend(std::iter::repeat_n(Record::Outbox { rows: 0 }, 60_000));
    }

    fn stop(&mut self, s: u32, position: Cursor) {
        self.say(Record::Stop { s, position });
    }

    fn matched(&mut self, seqs: &[(u64, u64)]) {
        self.matches = vec![(everything(), seqs.to_vec())];
    }

    /// A failover that loses what the old log had after `fork`.
    fn lossy(&mut self, fork: u64) {
        let target = "primary".to_owned();
        self.say(Record::FaultOn(FaultOn { f: 7, class: "F11".into(), variant: "lossy".into(), target }));
        self.epochs.push((2, fork));
        self.terms.push((2, 2, 50));
    }

    fn healed(&mut self) {
        self.healed_with(|_| {});
    }

    /// Healed, and something of how it went was otherwise.
    fn healed_with(&mut self, change: impl FnOnce(&mut FaultDone)) {
        let mut done = FaultDone {
            f: 7,
            class: "F11".into(),
            took: true,
            progressed: true,
            caught_up: Some(1),
            figures: BTreeMap::new(),
            violations: Vec::new(),
        };
        change(&mut done);
        self.say(Record::FaultOff { f: 7 });
        self.say(Record::FaultDone(done));
    }

    fn check(self) -> Verdict {
        let run = Run { version: VERSION, seed: 1, server: String::new(), mutant: None, wall: 0, plan: self.plan };
        let mut lines = vec![Record::Run(run)];
        lines.extend(self.lines);
        lines.extend(self.log.into_iter().map(Record::Log));
        lines.extend(self.terms.into_iter().map(|(term, epoch, acquired)| Record::Term {
            term,
            epoch,
            node: format!("node{term}"),
            acquired,
            released: None,
        }));
        let epochs = self.epochs.into_iter();
        lines.extend(epochs.map(|(epoch, start_seq)| Record::Epoch { epoch, start_seq, reason: String::new() }));
        lines.extend(self.rows.into_iter().map(|(key, val)| Record::Row { table: TABLE.into(), key, val }));
        let (enter, leave) = self.moved;
        let matches = self.matches.into_iter();
        lines.extend(matches.map(|(want, seqs)| {
            let (enter, leave) = (enter.clone(), leave.clone());
            Record::Matches { want, seqs, enter, leave }
        }));
        lines.push(Record::Outbox { rows: self.outbox });
        lines.push(Record::Done { lines: 0 });
        let stamped =
            lines.into_iter().enumerate().map(|(n, record)| Ok::<_, Infallible>(Line(n as u64 * 1_000, record)));
        let Ok(verdict) = check(stamped);
        verdict
    }

    /// Fails by exactly this rule.
    #[track_caller]
    fn breaks(self, rule: &str) {
        let verdict = self.check();
        let rules: Vec<&str> = verdict.violations.iter().map(|violation| violation.rule).collect();
        assert!(!rules.is_empty(), "nobody noticed; {rule} should have");
        assert!(rules.iter().all(|broken| *broken == rule), "{rule} was expected: {:#?}", verdict.violations);
    }

    /// No promise of safety is broken, and this is late, once.
    #[track_caller]
    fn comes_late(self, rule: &str) {
        let verdict = self.check();
        assert!(verdict.violations.is_empty(), "{:#?}", verdict.violations);
        let rules: Vec<&str> = verdict.late.iter().map(|late| late.rule).collect();
        assert_eq!(rules, [rule], "{:#?}", verdict.late);
    }

    /// Nothing is broken, nothing is late.
    #[track_caller]
    fn comes_in_time(self) {
        let verdict = self.check();
        assert!(verdict.violations.is_empty(), "{:#?}", verdict.violations);
        assert!(verdict.late.is_empty(), "{:#?}", verdict.late);
    }

    #[track_caller]
    fn passes(self) {
        let verdict = self.check();
        assert!(verdict.violations.is_empty(), "{:#?}", verdict.violations);
    }
}

fn row(branch: u32, seq: u64, xid: u64, tx_end: bool, write: &Write) -> LogRow {
    LogRow {
        branch,
        seq,
        xid,
        tx_end,
        event_id: event_id(branch, seq),
        table: write.table.clone(),
        op: write.op.clone(),
        key: Some(write.key),
        val: Some(write.val.clone()),
        prev: write.prev.clone(),
        before: if write.op == "DELETE" { Some(write.val.clone()) } else { write.prev.clone() },
        relayed: i64::try_from(seq).unwrap(),
        fingerprint: print(branch, seq),
    }
}
