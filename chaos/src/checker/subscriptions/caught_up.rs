//! That `caught_up` means what it says, and that whoever is connected gets on.

use super::Rules;
use crate::checker::Findings;
use crate::checker::gather::Kind;
use crate::history::{LogRow, Micros};

/// Before an answer to a subscribe the node met the log's end: what was relayed this long before it, it knew.
const KNOWN: Micros = 1_000_000;
/// Around a fault a node may know less.
const AROUND: Micros = 5_000_000;
/// Whoever is connected for so long and misses what was relayed before that stands still.
const STILL: Micros = 30_000_000;

impl Rules<'_> {
    /// Once for every answer to a subscribe, and not before everything that was there then.
    pub(super) fn caught_up(&self, findings: &mut Findings) {
        let Some((mut since, _)) = self.subscription.first else { return };
        let (mut said, mut next) = (false, self.subscription.caught_up.iter().peekable());
        for (n, step) in self.subscription.steps.iter().enumerate() {
            match step.kind {
                Kind::Resumed => (since, said) = (step.at, false),
                Kind::Position(cursor) if next.next_if_eq(&&n).is_some() => {
                    if said {
                        let text = format!("{} was told twice that it had caught up", self.name());
                        findings.violation("caught_up", step.at, text);
                    }
                    said = true;
                    let log = &self.gathered.log;
                    let known = log.partition_point(|row| relayed(row) + KNOWN <= since);
                    let Some(row) = known.checked_sub(1).map(|last| &log[last]) else { continue };
                    let calm = self.calm(since, step.at);
                    if calm && cursor.seq < row.seq && self.gathered.epoch_of(row.seq) <= cursor.epoch {
                        let text = format!(
                            "{} was told at {cursor} that it had caught up; seq {} was there before it asked",
                            self.name(),
                            row.seq
                        );
                        findings.violation("caught_up", step.at, text);
                    }
                }
                _ => {}
            }
        }
    }

    /// Who has been connected for long at the end, with no fault near, has what was relayed before that.
    pub(super) fn stands_still(&self, findings: &mut Findings) {
        let (Some((began, _)), Some((at, position))) = (self.subscription.first, self.subscription.stopped) else {
            return;
        };
        let change = self.subscription.steps.iter().rev().find(|step| matches!(step.kind, Kind::Lost | Kind::Resumed));
        let since = match change {
            Some(step) if matches!(step.kind, Kind::Lost) => return,
            Some(step) => step.at,
            None => began,
        };
        let Some(before) = at.checked_sub(STILL).filter(|before| since <= *before && self.calm(*before, at)) else {
            return;
        };
        let log = &self.gathered.log;
        let old = log.partition_point(|row| relayed(row) <= before);
        if let Some(row) = old.checked_sub(1).map(|last| &log[last])
            && position.seq < row.seq
        {
            let text =
                format!("{} ended at {position} and was connected for 30 s; seq {} is older", self.name(), row.seq);
            findings.violation("stands_still", at, text);
        }
    }

    fn calm(&self, from: Micros, to: Micros) -> bool {
        let windows = self.gathered.windows();
        windows.iter().all(|(on, off, _)| to < on.saturating_sub(AROUND) || from > off + AROUND)
    }
}

fn relayed(row: &LogRow) -> Micros {
    Micros::try_from(row.relayed).unwrap_or(0)
}
