//! What each subscription saw against the log: all of it, once, in order, whole, and no lie about a position.

mod caught_up;
mod cursors;

use std::collections::HashMap;

use tidewire::client::Cursor;

use super::gather::{Gathered, Kind, Mark, Seen, Subscription};
use super::log::Sent;
use super::{Counts, Findings};
use crate::history::{LogRow, Micros};

/// Who ends this long before the history does ended with the run, after the drain.
const ENDED_IN_TIME: Micros = 5_000_000;

pub(super) fn check(gathered: &Gathered, sent: &Sent, counts: &mut Counts, findings: &mut Findings) {
    counts.conditions = gathered.matches.len() as u64;
    let mut lost: HashMap<u64, Vec<&LogRow>> = HashMap::new();
    for row in &gathered.lost {
        lost.entry(row.seq).or_default().push(row);
    }
    for subscription in gathered.subscriptions.values() {
        let rules = Rules { gathered, subscription, lost: &lost };
        rules.known(findings);
        rules.committed(sent, findings);
        rules.ordered(findings);
        rules.positions(findings);
        rules.genuine(findings);
        rules.complete(findings);
        rules.atomic(findings);
        rules.between(findings);
        rules.caught_up(findings);
        rules.stands_still(findings);
        rules.resync(findings);
    }
}

struct Rules<'a> {
    gathered: &'a Gathered,
    subscription: &'a Subscription,
    lost: &'a HashMap<u64, Vec<&'a LogRow>>,
}

impl<'a> Rules<'a> {
    fn row(&self, seq: u64) -> Option<&'a LogRow> {
        let first = self.gathered.log.first()?.seq;
        self.gathered.log.get(usize::try_from(seq.checked_sub(first)?).ok()?).filter(|row| row.seq == seq)
    }

    fn name(&self) -> String {
        format!("subscription {} of client {}", self.subscription.s, self.subscription.client)
    }

    /// Each event stands in the log under its number, byte for byte, or in a tail that was lost later.
    fn known(&self, findings: &mut Findings) {
        for event in &self.subscription.events {
            let kept = self.gathered.epoch_of(event.seq) <= event.epoch;
            let row = if kept { self.row(event.seq) } else { None };
            if row.is_some_and(|row| row.fingerprint == event.fingerprint) {
                continue;
            }
            let tails = self.lost.get(&event.seq).map_or(&[][..], Vec::as_slice);
            if !kept && tails.iter().any(|row| row.fingerprint == event.fingerprint) {
                continue;
            }
            let (rule, why) = match (kept, row, tails.is_empty()) {
                (true, Some(_), _) => ("same_log", "another event stands there in the log"),
                (true, None, _) => ("durable", "the log has nothing there"),
                (false, _, true) => ("durable", "no lost tail has anything there"),
                (false, _, false) => ("same_log", "another event stands there in the lost tail"),
            };
            let text = format!("{} saw seq {} (epoch {}): {why}", self.name(), event.seq, event.epoch);
            findings.violation(rule, event.at, text);
        }
    }

    /// Nobody sees an event before the COMMIT of its transaction was sent. (Commits and deliveries are stamped by one
    /// clock, under one lock, a commit before it is sent and a delivery when it is there.)
    fn committed(&self, sent: &Sent, findings: &mut Findings) {
        for event in &self.subscription.events {
            if let Some(sent) = sent.get(&event.fingerprint).filter(|sent| event.at < **sent) {
                let text = format!(
                    "{} saw seq {} before it was committed: COMMIT was sent {:.3} s later",
                    self.name(),
                    event.seq,
                    (sent - event.at) as f64 / 1e6
                );
                findings.violation("durable", event.at, text);
            }
        }
    }

    fn ordered(&self, findings: &mut Findings) {
        for pair in self.subscription.events.windows(2) {
            if pair[1].seq <= pair[0].seq {
                let rule = if pair[1].seq == pair[0].seq { "unique" } else { "ordered" };
                let text = format!("{} saw seq {} after seq {}", self.name(), pair[1].seq, pair[0].seq);
                findings.violation(rule, pair[1].at, text);
            }
        }
    }

    /// Positions never go back, no event comes after a position that covers it, and nobody goes on past a lost tail.
    fn positions(&self, findings: &mut Findings) {
        let Some((began, first)) = self.subscription.first else { return };
        if let Some(asked) = self.subscription.asked
            && first != asked
        {
            let text = format!("{} asked to go on after {asked} and was begun after {first}", self.name());
            findings.violation("resumable", began, text);
        }
        let mut held = first;
        for step in &self.subscription.steps {
            let (event, cursor) = match step.kind {
                Kind::Batch { first, cursor, .. } => (Some(first), cursor),
                Kind::Position(cursor) => (None, cursor),
                Kind::Lost | Kind::Resumed => continue,
            };
            if let Some(event) = event
                && event <= held.seq
            {
                let text = format!("{} saw seq {event} although its position was {held} already", self.name());
                findings.violation("bookmark", step.at, text);
            }
            if (cursor.epoch, cursor.seq) < (held.epoch, held.seq) {
                let text = format!("the position of {} went back from {held} to {cursor}", self.name());
                findings.violation("bookmark", step.at, text);
            }
            if let Kind::Batch { cursor, .. } = step.kind
                && step.last > cursor.seq
            {
                let text = format!("{} was told {cursor} after seq {}", self.name(), step.last);
                findings.violation("bookmark", step.at, text);
            }
            if cursor.epoch > held.epoch && self.gathered.diverged(held) {
                let text = format!(
                    "{} was at {held}, in a tail that was lost, and went on to {cursor} without being told",
                    self.name()
                );
                findings.violation("honest", step.at, text);
            }
            held = cursor;
        }
        // The drain waited for everybody: who still stands in a lost tail then was never told.
        if let Some((at, position)) = self.subscription.stopped
            && self.gathered.diverged(position)
            && at + ENDED_IN_TIME > self.gathered.end
        {
            let text = format!("{} ended at {position}, in a tail that was lost, and was never told", self.name());
            findings.violation("honest", at, text);
        }
    }

    /// The last position that it was told.
    fn reached(&self) -> Option<(Micros, Cursor)> {
        let first = self.subscription.first?;
        let steps = self.subscription.steps.iter().rev();
        let told = steps.filter_map(|step| match step.kind {
            Kind::Batch { cursor, .. } | Kind::Position(cursor) => Some((step.at, cursor)),
            Kind::Lost | Kind::Resumed => None,
        });
        let last = told.chain([first]).next()?;
        Some(match self.subscription.stopped {
            Some((at, position)) if (position.epoch, position.seq) > (last.1.epoch, last.1.seq) => (at, position),
            _ => last,
        })
    }

    /// Between its first and its last position it saw exactly what Postgres lets through its condition.
    fn complete(&self, findings: &mut Findings) {
        let (Some((_, first)), Some((at, last))) = (self.subscription.first, self.reached()) else { return };
        let Some(matches) = self.gathered.matches.get(&self.subscription.want) else { return };
        // What lies in a lost tail stands under other numbers now, or under none.
        let fork = |cursor: Cursor| {
            let later = self.gathered.epochs.iter().filter(|(epoch, _)| *epoch > cursor.epoch);
            later.map(|(_, start)| *start).min().unwrap_or(u64::MAX)
        };
        let (from, to) = (first.seq.min(fork(first)), last.seq.min(fork(last)));
        let mut due = matches.seqs.iter().flat_map(|(low, high)| (*low).max(from + 1)..=(*high).min(to)).peekable();
        for event in self.subscription.events.iter().filter(|event| event.seq > from && event.seq <= to) {
            if self.gathered.epoch_of(event.seq) > event.epoch {
                continue;
            }
            while let Some(missed) = due.next_if(|seq| *seq < event.seq) {
                self.missed(missed, event.at, findings);
            }
            if due.next_if_eq(&event.seq).is_some() {
                self.marked(event, matches.mark(event.seq), findings);
            } else if self.row(event.seq).is_some() {
                let text = format!(
                    "{} saw seq {}, which {:?} does not let through",
                    self.name(),
                    event.seq,
                    self.subscription.want
                );
                findings.violation("filter", event.at, text);
            }
        }
        for missed in due {
            self.missed(missed, at, findings);
        }
    }

    /// An UPDATE that moves a row over the condition says so, and nothing else does: who keeps a picture of the rows drops
    /// one by it.
    fn marked(&self, event: &Seen, due: Mark, findings: &mut Findings) {
        if event.mark != due {
            let text = format!(
                "{} saw seq {} marked as {:?}; by Postgres it is {due:?} for {:?}",
                self.name(),
                event.seq,
                event.mark,
                self.subscription.want
            );
            findings.violation("transition", event.at, text);
        }
    }

    fn missed(&self, seq: u64, at: Micros, findings: &mut Findings) {
        let what = self.row(seq).map_or_else(String::new, |row| {
            format!("{} {} {:?}, relayed at {:.3} s", row.op, row.table, row.key, row.relayed as f64 / 1e6)
        });
        let text = format!(
            "{} never saw seq {seq} ({what}) and has passed it; it wants {:?}",
            self.name(),
            self.subscription.want
        );
        findings.violation("missed", at, text);
    }

    /// A batch that does not say that it is open ends with the last event of its transaction that is due: whoever saves
    /// its cursor and begins there again would have half a transaction.
    fn atomic(&self, findings: &mut Findings) {
        let matches = self.gathered.matches.get(&self.subscription.want);
        for step in &self.subscription.steps {
            let Kind::Batch { cursor, open: false, .. } = step.kind else { continue };
            let Some((xid, rest)) = self.inside(cursor) else { continue };
            let mut rest = rest.take_while(|row| row.xid == xid);
            let due = rest.find(|row| row.seq > step.last && matches.is_some_and(|matches| matches.has(row.seq)));
            if let Some(due) = due {
                let text = format!(
                    "{}: a batch ended with {cursor} as if it were whole, seq {} is of the same transaction",
                    self.name(),
                    due.seq
                );
                findings.violation("atomic", step.at, text);
            }
        }
    }

    /// What is no batch's end stands between transactions: neither inside one of the log, nor where a batch has just said
    /// that it ends inside one. (Of a lost tail only the batch can say so.)
    fn between(&self, findings: &mut Findings) {
        // Who begins with now is given a position; a cursor of a batch that said `open` may well be resumed from.
        if self.subscription.asked.is_none()
            && let Some((at, cursor)) = self.subscription.first
            && self.inside(cursor).is_some()
        {
            let text = format!("{} began at {cursor}, which is inside a transaction", self.name());
            findings.violation("atomic", at, text);
        }
        let mut open = None;
        for step in &self.subscription.steps {
            match step.kind {
                Kind::Batch { cursor, open: inside, .. } => open = inside.then_some(cursor),
                Kind::Position(cursor) if open == Some(cursor) || self.inside(cursor).is_some() => {
                    let text = format!("{} was told {cursor}, which is inside a transaction", self.name());
                    findings.violation("atomic", step.at, text);
                }
                Kind::Position(_) | Kind::Lost | Kind::Resumed => {}
            }
        }
    }

    /// The transaction that the position stands inside, and the rows of the log after it; nothing where it stands between
    /// two, or in a lost tail, of which nobody knows any more what was to follow.
    fn inside(&self, cursor: Cursor) -> Option<(u64, impl Iterator<Item = &'a LogRow> + use<'a>)> {
        if self.gathered.diverged(cursor) {
            return None;
        }
        let row = self.row(cursor.seq).filter(|row| !row.tx_end)?;
        let place = usize::try_from(cursor.seq - self.gathered.log.first()?.seq).ok()?;
        let rest = self.gathered.log.get(place + 1..)?;
        (rest.first()?.xid == row.xid).then(|| (row.xid, rest.iter()))
    }

    /// Who is told to start over was in a lost tail.
    fn resync(&self, findings: &mut Findings) {
        let Some((at, reason, position)) = &self.subscription.resync else { return };
        if reason != "history_diverged" || !self.gathered.diverged(*position) {
            let text = format!("{} at {position} was told to start over ({reason}) without need", self.name());
            findings.violation("honest", *at, text);
        }
    }
}
