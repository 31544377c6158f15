//! Leaders, close codes, what faults saw themselves, what came late, and whether the run proves anything.

use std::collections::{BTreeMap, BTreeSet};

use super::gather::{End, Gathered, Kind, Subscription};
use super::{CLOSE_CODES, Counts, Findings};
use crate::history::{Micros, Want};

/// From the heal to every client having caught up.
const CAUGHT_UP: Micros = 30_000_000;
/// Progress is promised every 5 s; twice that is late on any machine.
const PROGRESS: Micros = 10_000_000;
/// Answers to an upgrade after which a client tries again: of a server that cannot serve now (docs/PROTOCOL.md), and of a
/// balancer that reaches none. The others that the protocol names end a client, and are found as `refused`.
const STATUSES: [u16; 4] = [429, 502, 503, 504];
/// What the client says in the place of a close frame that never came, with its words for it. No server may send it.
const CONNECTION_LOST: (u16, &str) = (1006, "without a goodbye");
/// From the heal to every client having come back: it waits up to 10 s between two attempts, an attempt takes up to 10 s,
/// and one of them may have met a node that was not ready yet.
const BACK: Micros = 45_000_000;
/// Fewer prove nothing.
const DELIVERIES: u64 = 1_000;

pub(super) fn check(gathered: &Gathered, counts: &mut Counts, findings: &mut Findings) {
    leaders(gathered, counts, findings);
    codes(gathered, findings);
    faults(gathered, findings);
    progress(gathered, findings);
    absent(gathered, findings);
    vacuous(gathered, counts, findings);
}

fn leaders(gathered: &Gathered, counts: &mut Counts, findings: &mut Findings) {
    counts.terms = gathered.terms.len() as u64;
    counts.epochs = gathered.epochs.len() as u64;
    for pair in gathered.terms.windows(2) {
        let ((term, epoch, node, acquired, _), (next, later, other, taken, _)) = (&pair[0], &pair[1]);
        let at = Micros::try_from(*taken).unwrap_or(0);
        if next <= term || later < epoch || taken < acquired {
            let text =
                format!("term {next} of {other} in epoch {later} follows on term {term} of {node} in epoch {epoch}");
            findings.violation("one_leader", at, text);
        }
    }
    for pair in gathered.epochs.windows(2) {
        if pair[1].0 <= pair[0].0 || pair[1].1 < pair[0].1 {
            let text = format!(
                "epoch {} begins after seq {}, epoch {} after seq {}",
                pair[1].0, pair[1].1, pair[0].0, pair[0].1
            );
            findings.violation("one_leader", gathered.end, text);
        }
    }
}

fn codes(gathered: &Gathered, findings: &mut Findings) {
    for loss in &gathered.losses {
        let (s, cause) = (loss.s, &loss.cause);
        let lost = |code| code == CONNECTION_LOST.0 && cause.contains(CONNECTION_LOST.1);
        let known = loss.code.is_none_or(|code| CLOSE_CODES.contains(&code) || lost(code))
            && loss.status.is_none_or(|status| STATUSES.contains(&status));
        if !known {
            let text = format!("subscription {s} was disconnected in a way that no document knows: {cause}");
            findings.violation("codes", loss.at, text);
        }
        if cause.contains("follows on") {
            let text = format!("subscription {s} found a gap between two frames: {cause}");
            findings.violation("resumable", loss.at, text);
        }
    }
    for (at, error) in &gathered.refused {
        findings.violation("refused", *at, format!("a client was turned away for good: {error}"));
    }
    for subscription in gathered.subscriptions.values() {
        if let Some((at, error)) = &subscription.refused {
            let text = format!(
                "subscription {} of client {} was refused for good: {error}",
                subscription.s, subscription.client
            );
            findings.violation("refused", *at, text);
        }
    }
}

fn faults(gathered: &Gathered, findings: &mut Findings) {
    for (t, done) in gathered.done.values() {
        for text in &done.violations {
            findings.violation("fault", *t, format!("fault {} ({}): {text}", done.f, done.class));
        }
        if done.took && !done.progressed {
            findings.late("progress", *t, format!("after fault {} ({}) no progress was seen", done.f, done.class));
        }
        if let Some(caught_up) = done.caught_up.filter(|caught_up| *caught_up > CAUGHT_UP) {
            let seconds = caught_up as f64 / 1e6;
            let text = format!("after fault {} ({}) clients caught up in {seconds:.1} s", done.f, done.class);
            findings.late("caught_up", *t, text);
        }
    }
    let head = gathered.log.last().map_or(0, |row| row.seq);
    for subscription in gathered.subscriptions.values() {
        if let Some((at, position)) = subscription.stopped
            && position.seq < head
            && at + 1_000_000 > gathered.end.saturating_sub(20_000_000)
            && gathered
                .subscriptions
                .values()
                .all(|other| other.client != subscription.client || other.s <= subscription.s)
        {
            let text = format!("subscription {} ended at seq {}, the log at {head}", subscription.s, position.seq);
            findings.late("drain", at, text);
        }
    }
    if let Some(rows) = gathered.outbox.filter(|rows| *rows > 0) {
        findings.late("drain", gathered.end, format!("{rows} rows were left in the outbox"));
    }
}

/// While nothing is wrong, a connected subscription hears of its position every few seconds.
fn progress(gathered: &Gathered, findings: &mut Findings) {
    let windows = gathered.windows();
    let calm = |from: Micros, to: Micros| windows.iter().all(|(on, off, _)| to < *on || from > off + CAUGHT_UP);
    for subscription in gathered.subscriptions.values() {
        let mut heard = subscription.first.map(|(at, _)| at);
        for step in &subscription.steps {
            if matches!(step.kind, Kind::Lost) {
                heard = None;
                continue;
            }
            if let Some(before) = heard
                && step.at - before > PROGRESS
                && calm(before, step.at)
            {
                let text = format!(
                    "subscription {} heard nothing for {:.1} s",
                    subscription.s,
                    (step.at - before) as f64 / 1e6
                );
                findings.late("bookmark", step.at, text);
            }
            heard = Some(step.at);
        }
    }
}

/// Who was asking, was cut off, or had ended to begin again, and was not back long after the last heal. Only the last
/// subscription of a client to the same thing says so: an attempt without an answer is made again under another number.
fn absent(gathered: &Gathered, findings: &mut Findings) {
    // Clients are ended by plan only after the log has been read.
    let until = gathered.log_read.unwrap_or(gathered.end);
    let healed = gathered.windows().iter().map(|(_, off, _)| *off).max().unwrap_or(0);
    let mut last: BTreeMap<(u32, &Want), &Subscription> = BTreeMap::new();
    for subscription in gathered.subscriptions.values() {
        last.insert((subscription.client, &subscription.want), subscription);
    }
    for subscription in last.values() {
        let Some((since, what)) = subscription.waits(until) else { continue };
        if since.max(healed).saturating_add(BACK) < until {
            let text = format!(
                "subscription {} of client {} {what} at {:.3} s, and that was the last of it",
                subscription.s,
                subscription.client,
                since as f64 / 1e6
            );
            findings.late("back", until, text);
        }
    }
    let planned = gathered.planned.as_ref().and_then(|plan| plan["workload"]["clients"].as_u64()).unwrap_or(0);
    let asked: BTreeSet<u32> = gathered.subscriptions.values().map(|subscription| subscription.client).collect();
    let silent = planned.saturating_sub(asked.len() as u64);
    // Who was refused is a violation already.
    if silent > 0 && gathered.refused.is_empty() && healed.saturating_add(BACK) < until {
        findings.late("back", until, format!("{silent} clients of {planned} never got as far as a subscription"));
    }
}

impl Subscription {
    /// Since when it waits for the server at that time, and for what; nothing for one that stands, or was refused.
    fn waits(&self, until: Micros) -> Option<(Micros, &'static str)> {
        if self.refused.is_some() || self.resync.is_some() {
            return None;
        }
        if let Some((at, _)) = self.stopped.filter(|(at, _)| *at < until) {
            return Some((at, "ended, to begin again"));
        }
        if self.first.is_none() {
            return Some((self.asked_at, "was asked for"));
        }
        let before = self.steps.iter().rev().skip_while(|step| step.at >= until);
        let lost = before.take_while(|step| matches!(step.kind, Kind::Lost)).last()?;
        Some((lost.at, "was cut off"))
    }
}

fn vacuous(gathered: &Gathered, counts: &Counts, findings: &mut Findings) {
    let mut weak = |is: bool, text: String| {
        if is {
            findings.vacuous.push(text);
        }
    };
    weak(counts.deliveries < DELIVERIES, format!("only {} deliveries", counts.deliveries));
    weak(gathered.log.is_empty(), "the log was not read".into());
    weak(counts.transactions_of_several_rows == 0, "no transaction had several rows".into());
    weak(
        !gathered.transactions.values().any(|t| t.end.is_some_and(|(_, end)| end == End::Fail)),
        "no transaction was rolled back".into(),
    );
    let unmatched = gathered.subscriptions.values().filter(|s| !gathered.matches.contains_key(&s.want)).count();
    weak(unmatched > 0, format!("of {unmatched} subscriptions nobody asked Postgres what they should see"));
    for (f, (at, on)) in &gathered.on {
        let seconds = *at as f64 / 1e6;
        let text = format!("fault {f} ({}) began at {seconds:.3} s and has no end: the run was cut short", on.class);
        weak(!gathered.done.contains_key(f), text);
    }
    let planned = gathered.planned.as_ref().and_then(|plan| plan["faults"].as_array()).map_or(0, Vec::len);
    let any = gathered.done.values().any(|(_, done)| done.took);
    weak(planned > 0 && !any, format!("of {planned} planned faults none took effect"));
    for class in counts.faults.keys() {
        let took = gathered.done.values().any(|(_, done)| done.class == *class && done.took);
        weak(!took, format!("{class} never took effect"));
    }
}
