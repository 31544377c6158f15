//! What was written against what the log and the tables hold: nothing lost, invented, torn or reordered.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::gather::{End, Gathered};
use super::{Counts, Findings};
use crate::history::{LogRow, Micros, Write};

/// What a standby may lack when its link is cut: WAL that was on its way.
const ON_ITS_WAY: Micros = 2_000_000;

/// A transaction's identity.
type Id = (u32, u64);

/// What a log has of a transaction.
#[derive(Debug, Default)]
struct Found {
    /// Which of its changes, counted from 0, in the log's order.
    changes: Vec<usize>,
    /// The last row is marked as its end.
    ended: bool,
}

/// When the COMMIT of each event's transaction was sent, by the event's fingerprint.
pub(super) type Sent = HashMap<u64, Micros>;

pub(super) fn check(gathered: &Gathered, counts: &mut Counts, findings: &mut Findings) -> Sent {
    counts.log_rows = gathered.log.len() as u64;
    counts.lost_rows = gathered.lost.len() as u64;
    dense(gathered, findings);
    let written = Written::index(gathered);
    let found = runs(gathered, &written, &gathered.log, findings);
    let lost = runs(gathered, &written, &gathered.lost, findings);
    settled(gathered, &found, &lost, counts, findings);
    chains(gathered, findings);
    tables(gathered, findings);
    let rows = gathered.log.iter().chain(&gathered.lost);
    let sent = |row: &LogRow| Some((row.fingerprint, gathered.transactions[&written.of(row)?.0].commit.as_ref()?.0));
    rows.filter_map(sent).collect()
}

/// Values, in their transactions, to the changes that wrote them. Neither says it alone: a failover that loses a tail gives
/// xids a second time, and has a value deleted a second time.
struct Written<'a>(HashMap<(u64, bool, &'a str), (Id, usize, &'a Write)>);

impl<'a> Written<'a> {
    fn index(gathered: &'a Gathered) -> Self {
        let all = gathered.transactions.iter().filter_map(|(id, t)| Some((*id, t.xid, &t.commit.as_ref()?.1)));
        Self(
            all.flat_map(|(id, xid, ops)| {
                let numbered = ops.iter().enumerate();
                numbered.map(move |(n, write)| ((xid, write.op == "DELETE", write.val.as_str()), (id, n, write)))
            })
            .collect(),
        )
    }

    fn of(&self, row: &LogRow) -> Option<(Id, usize, &'a Write)> {
        self.0.get(&(row.xid, row.op == "DELETE", row.val.as_deref()?)).copied()
    }
}

/// Rows that no writer wrote: what the tracking itself tells.
fn is_news(row: &LogRow) -> bool {
    row.op == "SCHEMA"
}

fn time(row: &LogRow) -> Micros {
    Micros::try_from(row.relayed).unwrap_or(0)
}

fn dense(gathered: &Gathered, findings: &mut Findings) {
    for pair in gathered.log.windows(2) {
        if pair[1].seq != pair[0].seq + 1 {
            let text = format!("after seq {} the log goes on with {}", pair[0].seq, pair[1].seq);
            findings.violation("dense", time(&pair[1]), text);
        }
    }
    if let Some(first) = gathered.log.first()
        && first.seq != 1
    {
        findings.violation("dense", time(first), format!("the log begins with seq {}", first.seq));
    }
}

/// Walks the log run by run of one transaction: each must be whole, consecutive, and somebody's who committed it.
fn runs(gathered: &Gathered, written: &Written<'_>, rows: &[LogRow], findings: &mut Findings) -> HashMap<Id, Found> {
    let mut seen: HashMap<Id, Found> = HashMap::new();
    let mut previous: Option<(&LogRow, Id)> = None;
    for row in rows.iter().filter(|row| !is_news(row)) {
        let Some((id, n, write)) = written.of(row) else {
            let text = format!(
                "seq {} of the log ({} {} {:?}, value {:?}) was never committed by anybody",
                row.seq, row.op, row.table, row.key, row.val
            );
            findings.violation("invented", time(row), text);
            previous = None;
            continue;
        };
        let transaction = &gathered.transactions[&id];
        if transaction.end.is_some_and(|(_, end)| end == End::Fail) {
            let text = format!("seq {}: transaction {id:?} was rolled back and stands in the log", row.seq);
            findings.violation("invented", time(row), text);
        }
        content(row, write, findings);
        let same = previous.is_some_and(|(before, other)| other == id && before.branch == row.branch);
        if let Some((before, other)) = previous
            && before.branch == row.branch
            && before.tx_end == same
        {
            let text = if same {
                format!("seq {} is marked as the end of transaction {other:?}, which goes on", before.seq)
            } else {
                format!("seq {} is the last of transaction {other:?} and not marked as its end", before.seq)
            };
            findings.violation("atomic", time(row), text);
        }
        let found = seen.entry(id).or_default();
        if !found.changes.is_empty() && !same {
            let text = format!("seq {}: transaction {id:?} goes on here, others lie between its events", row.seq);
            findings.violation("atomic", time(row), text);
        }
        found.changes.push(n);
        found.ended = row.tx_end;
        previous = Some((row, id));
    }
    seen
}

fn content(row: &LogRow, write: &Write, findings: &mut Findings) {
    let same = row.table == write.table
        && row.op == write.op
        && row.key == Some(write.key)
        && (write.op != "UPDATE" || row.prev == write.prev && row.before == write.prev);
    if !same {
        findings.violation(
            "changed",
            time(row),
            format!("seq {}: written was {write:?}, the log has {row:?}", row.seq),
        );
    }
}

/// Every acknowledged transaction is there once, whole and in the order of its changes; an unknown one is, or is not.
fn settled(
    gathered: &Gathered,
    found: &HashMap<Id, Found>,
    lost: &HashMap<Id, Found>,
    counts: &mut Counts,
    findings: &mut Findings,
) {
    let lossy = lossy_windows(gathered);
    for (id, transaction) in &gathered.transactions {
        let Some((committed, ops)) = &transaction.commit else { continue };
        let (end_at, end) = transaction.end.unwrap_or((gathered.end, End::Unknown));
        let (here, there) = (found.get(id), lost.get(id));
        if end == End::Unknown && (here.is_some() || there.is_some()) {
            counts.unknown_that_happened += 1;
        }
        if let Some(here) = here {
            same_changes(*id, ops, &here.changes, end_at, findings);
            continue;
        }
        if let Some(there) = there {
            // A tail may end anywhere, and a transaction that is relayed in parts with it; but what is there is its
            // beginning, and is not called whole.
            let begins = there.changes.iter().copied().eq(0..there.changes.len());
            if !begins || (there.ended && there.changes.len() != ops.len()) {
                let text = format!(
                    "of {} changes of transaction {id:?} the lost tail has {}, or has them in another order",
                    ops.len(),
                    there.changes.len()
                );
                findings.violation("atomic", end_at, text);
                continue;
            }
        }
        if end == End::Ok {
            let excused = lossy.iter().any(|(from, to)| end_at + ON_ITS_WAY >= *from && *committed <= *to);
            if !excused {
                let text = format!(
                    "transaction {id:?} (COMMIT sent at {:.3} s, acknowledged) is not in the log: {:?}",
                    *committed as f64 / 1e6,
                    ops.first()
                );
                findings.violation("lost", end_at, text);
            } else if ops.iter().any(|write| gathered.rows.get(&(write.table.clone(), write.key)) == Some(&write.val)) {
                let text = format!("transaction {id:?} is in the tables and not in the log");
                findings.violation("lost", end_at, text);
            }
        }
    }
}

/// The log has exactly the changes that the writer made, in the order in which it made them. Their number alone does not
/// say so: one may stand there twice in the place of another.
fn same_changes(id: Id, ops: &[Write], changes: &[usize], at: Micros, findings: &mut Findings) {
    if changes.iter().copied().eq(0..ops.len()) {
        return;
    }
    let distinct: BTreeSet<usize> = changes.iter().copied().collect();
    if distinct.len() < changes.len() {
        let text =
            format!("transaction {id:?} has {} changes and stands {} times in the log", ops.len(), changes.len());
        findings.violation("repeated", at, text);
    }
    if distinct.len() < ops.len() {
        let missing = (0..ops.len()).find(|n| !distinct.contains(n)).map(|n| &ops[n]);
        let text = format!(
            "of {} changes of transaction {id:?} the log has {}; the first that is missing: {missing:?}",
            ops.len(),
            distinct.len()
        );
        findings.violation("lost", at, text);
    } else if distinct.len() == changes.len() {
        let moved = changes.iter().enumerate().find(|(place, n)| *place != **n).map(|(_, n)| &ops[*n]);
        let text = format!("the log has the changes of transaction {id:?} in another order: {moved:?} comes too soon");
        findings.violation("order", at, text);
    }
}

/// From the cut of the replication to the new primary: what was committed then may be lost with the old one.
fn lossy_windows(gathered: &Gathered) -> Vec<(Micros, Micros)> {
    // A failover that never came about excuses nothing.
    let took = |f: &u32| gathered.done.get(f).is_none_or(|(_, done)| done.took) && gathered.epochs.len() > 1;
    let lossy = gathered.on.iter().filter(|(f, (_, on))| on.class == "F11" && took(f));
    lossy.map(|(f, (t, _))| (*t, gathered.off.get(f).copied().unwrap_or(gathered.end))).collect()
}

/// Row by row, each value follows on the one that it replaced.
fn chains(gathered: &Gathered, findings: &mut Findings) {
    let mut now: HashMap<(&str, i64), Option<&str>> = HashMap::new();
    for row in &gathered.log {
        let (Some(key), false) = (row.key, is_news(row) || row.op == "EVENT") else { continue };
        let held = now.get(&(row.table.as_str(), key)).copied().flatten();
        let expected = if row.op == "INSERT" { None } else { row.before.as_deref() };
        if held != expected {
            let text = format!(
                "seq {}: {} of {} {key} replaces {expected:?}, but the log left the row at {held:?}",
                row.seq, row.op, row.table
            );
            findings.violation("order", time(row), text);
        }
        let after = if row.op == "DELETE" { None } else { row.val.as_deref() };
        now.insert((&row.table, key), after);
    }
}

/// The log, played back, is the users' tables.
fn tables(gathered: &Gathered, findings: &mut Findings) {
    let mut played: BTreeMap<(&str, i64), &str> = BTreeMap::new();
    for row in gathered.log.iter().filter(|row| !is_news(row) && row.op != "EVENT") {
        let (Some(key), Some(val)) = (row.key, row.val.as_deref()) else { continue };
        if row.op == "DELETE" {
            played.remove(&(row.table.as_str(), key));
        } else {
            played.insert((&row.table, key), val);
        }
    }
    let held = gathered.rows.iter().map(|((table, key), val)| ((table.as_str(), *key), val.as_str()));
    let held: BTreeMap<(&str, i64), &str> = held.collect();
    let keys: BTreeSet<&(&str, i64)> = played.keys().chain(held.keys()).collect();
    for key in keys {
        let (played, held) = (played.get(key), held.get(key));
        if played != held {
            let text = format!("{} {}: the table has {held:?}, the log ends with {played:?}", key.0, key.1);
            findings.violation("table", gathered.end, text);
        }
    }
}
