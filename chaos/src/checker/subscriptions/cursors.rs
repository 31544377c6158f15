//! Whether the cursors that a subscription was given are the log's: of an epoch that it has, at an event that it has, and
//! with that event's check.

use tidewire::client::Cursor;

use super::Rules;
use crate::checker::Findings;
use crate::checker::gather::Kind;
use crate::history::Micros;

impl Rules<'_> {
    pub(super) fn genuine(&self, findings: &mut Findings) {
        let told = self.subscription.steps.iter().filter_map(|step| match step.kind {
            Kind::Batch { cursor, .. } | Kind::Position(cursor) => Some((step.at, cursor)),
            Kind::Lost | Kind::Resumed => None,
        });
        let mut before = None;
        for (at, cursor) in self.subscription.first.into_iter().chain(told) {
            // Progress that says the same again.
            if before.replace(cursor) == Some(cursor) {
                continue;
            }
            if let Some(why) = self.fault_of(at, cursor) {
                findings.violation("cursor", at, format!("{} was given the cursor {cursor}: {why}", self.name()));
            }
        }
    }

    /// What is wrong with a cursor.
    fn fault_of(&self, at: Micros, cursor: Cursor) -> Option<String> {
        let gathered = self.gathered;
        if gathered.log.is_empty() || gathered.epochs.is_empty() {
            return None;
        }
        if gathered.epochs.iter().all(|(epoch, _)| *epoch != cursor.epoch) {
            return Some("the log has no such epoch".into());
        }
        if gathered.diverged(cursor) {
            // Where no tail was read that far, nobody knows what stood there.
            let tails = self.lost.get(&cursor.seq)?;
            let own = tails.iter().any(|row| cursor.matches(row.event_id));
            return (!own).then(|| "its check is of no event that a lost tail has there".into());
        }
        if cursor.seq == 0 {
            return (cursor != Cursor::origin(cursor.epoch)).then(|| "its check is not that of the beginning".into());
        }
        let Some(row) = self.row(cursor.seq) else {
            // A client may hear of what came after the log was read.
            let heard_in_time = gathered.log_read.is_none_or(|read| at < read);
            let beyond = gathered.log.last().is_some_and(|last| last.seq < cursor.seq);
            return (heard_in_time && beyond).then(|| "the log ends before it".into());
        };
        let right = Cursor::at(gathered.epoch_of(cursor.seq), cursor.seq, row.event_id);
        (cursor != right).then(|| format!("that of the event there is {right}"))
    }
}
