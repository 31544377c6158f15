//! What one table's events look like to one subscription: whether they are shown, with which columns, as what transition.
//!
//! Pure. The rules are those of the protocol's "Event" and "Masks and conditions". A row image that a key's row condition
//! does not admit is never shown, not even to say that a row has left.

mod opened;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

pub use self::opened::{Image, Opened};
use self::opened::{Stop, Texts};

use crate::auth::scope::{ColumnMask, OpSet, TableAccess};
use crate::event::row::Row;
use crate::event::{Event, Operation, push_json_string};
use crate::filter::{Filter, Outcome, RowImage};
use crate::hub::shape::{self, Basis};
use crate::mutant::{self, Mutant};

/// Copying is this much faster than reading byte for byte.
const COPY_SPEED: usize = 8;
/// Above this, in bytes read, it pays to look how long the columns are that a condition reads. Below, a whole call of such
/// events is within what one group may cost.
const EXACT_FROM: usize = 4 << 10;

/// One table's part of a subscription.
#[derive(Clone, Debug)]
pub struct TablePlan {
    /// Operations that are both wished for and allowed.
    pub ops: OpSet,
    /// The subscription's `where`.
    pub filter: Option<Filter>,
    /// The key's row condition.
    pub condition: Option<Filter>,
    /// Columns that the key may read.
    pub mask: ColumnMask,
    /// Columns that the subscription wishes for.
    pub columns: Option<Arc<BTreeSet<Box<str>>>>,
    /// The table as it was when the plan was made, of a subscription that begins now; None: it may have to hear of changes
    /// before that.
    pub basis: Option<Arc<Basis>>,
}

/// What an event costs one plan, in bytes read (see [`crate::filter::Cost`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanCost {
    /// To find out whether it is shown.
    pub conditions: usize,
    /// To show it.
    pub rendering: usize,
}

impl PlanCost {
    /// Both.
    #[must_use]
    pub const fn sum(self) -> usize {
        self.conditions.saturating_add(self.rendering)
    }
}

/// How an image stands to filter and condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Shown,
    Filtered,
    /// The row condition does not admit it: it does not exist for this key.
    Hidden,
    Unknown,
}

/// What is left out of an event, and the transition that it makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Show {
    transition: Option<&'static str>,
    without_before: bool,
    without_after: bool,
}

impl TablePlan {
    /// Everything that the key may read, unfiltered.
    #[must_use]
    pub fn of_access(access: &TableAccess, ops: OpSet) -> Self {
        let both = access.ops.iter().filter(|operation| ops.allows(*operation)).collect();
        Self { ops: both, filter: None, condition: None, mask: access.columns.clone(), columns: None, basis: None }
    }

    /// Whether events are passed on byte for byte.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.filter.is_none() && self.condition.is_none() && self.shows_all_columns()
    }

    fn shows_all_columns(&self) -> bool {
        self.mask.is_all() && self.columns.is_none()
    }

    /// What [`TablePlan::render`] may cost beside parsing; a bound that only looks at the event's parts when it must.
    #[must_use]
    pub fn cost(&self, opened: &Opened<'_>) -> PlanCost {
        let event = opened.event();
        let bound = self.bound(event);
        let has_rows = matches!(event.operation, Operation::Insert | Operation::Update | Operation::Delete);
        if bound.conditions <= EXACT_FROM || !has_rows {
            return bound;
        }
        let images = [opened.before(), opened.after()];
        let length =
            |column: &str| images.iter().flatten().filter_map(|image| image.get(column)).map(str::len).sum::<usize>();
        PlanCost { conditions: self.conditions(|filter| filter.cost().of_row(length)), ..bound }
    }

    /// As [`TablePlan::cost`], by the event's size alone.
    #[must_use]
    pub fn bound(&self, event: &Event) -> PlanCost {
        if event.operation != Operation::Schema && !self.ops.contains(OpSet::of(event.operation)) {
            return PlanCost { conditions: 0, rendering: 0 };
        }
        let bytes = event.body.len();
        let rendering = if self.shows_all_columns() { bytes / COPY_SPEED } else { bytes };
        PlanCost { conditions: self.conditions(|filter| filter.cost().bound(bytes)), rendering }
    }

    fn conditions(&self, cost: impl Fn(&Filter) -> usize) -> usize {
        [&self.filter, &self.condition].into_iter().flatten().map(cost).fold(0, usize::saturating_add)
    }

    /// Appends the event as this plan shows it; false when it does not show it at all.
    pub fn render(&self, opened: &Opened<'_>, out: &mut Vec<u8>) -> bool {
        let event = opened.event();
        if event.operation == Operation::Schema {
            return self.render_schema(opened, out);
        }
        if !self.ops.contains(OpSet::of(event.operation)) {
            return false;
        }
        if self.is_plain() {
            event.write_json(out);
            return true;
        }
        let Some(body) = opened.body() else { return false };
        let Some(show) = self.judge(opened, body) else { return false };
        let untouched = self.shows_all_columns() && !show.without_before && !show.without_after;
        if untouched {
            event.write_json_with(out, &event.body, show.transition);
            return true;
        }
        // A row that enters or leaves by a hidden column must be told of: the client would keep it, or never have it.
        let moves = show.without_before || show.without_after || matches!(show.transition, Some("enter" | "leave"));
        if event.operation == Operation::Update && !moves && self.hides_the_whole_change(body) {
            return false;
        }
        let mut rewritten = String::with_capacity(event.body.len());
        self.rewrite(event.operation, body, show, &mut rewritten);
        event.write_json_with(out, rewritten.as_bytes(), show.transition);
        true
    }

    /// SCHEMA passes `where` and `ops`: a client must hear that the shape of what it sees has changed.
    fn render_schema(&self, opened: &Opened<'_>, out: &mut Vec<u8>) -> bool {
        let event = opened.event();
        if self.mask.is_all() && self.basis.is_none() {
            event.write_json(out);
            return true;
        }
        let Some(body) = opened.body() else { return false };
        if let Some(after) = body.get("after") {
            let of_another = self.basis.as_ref().is_some_and(|basis| basis.is_of_another(after));
            if of_another || shape::masked(after, &self.mask).is_none() {
                return false;
            }
        }
        let mut rewritten = String::with_capacity(event.body.len());
        self.rewrite(event.operation, body, Show::default(), &mut rewritten);
        event.write_json_with(out, rewritten.as_bytes(), None);
        true
    }

    fn judge<'e>(&self, opened: &Opened<'e>, body: &Row<'e>) -> Option<Show> {
        let event = opened.event();
        if event.omitted {
            return self.condition.is_none().then(Show::default);
        }
        if event.operation == Operation::Truncate {
            return Some(Show::default());
        }
        if self.filter.is_none() && self.condition.is_none() {
            return Some(Show::default());
        }
        match event.operation {
            Operation::Update => self.judge_update(opened),
            Operation::Delete => match opened.before() {
                Some(before) => one_image(self.verdict(before)),
                // Nothing to test; a condition must not be passed on trust.
                None => self.condition.is_none().then_some(UNKNOWN),
            },
            Operation::Event => one_image(self.verdict(&DomainEvent::new(body, opened.stop()))),
            _ => one_image(opened.after().map_or(Verdict::Unknown, |after| self.verdict(after))),
        }
    }

    fn judge_update(&self, opened: &Opened<'_>) -> Option<Show> {
        let after = opened.after().map_or(Verdict::Unknown, |after| self.verdict(after));
        let Some(before) = opened.before().map(|before| self.verdict(before)) else {
            // Without a before image `after` alone is tested and no transition told.
            return match after {
                Verdict::Shown => Some(Show::default()),
                Verdict::Unknown if self.condition.is_none() => Some(UNKNOWN),
                _ => None,
            };
        };
        let (without_before, without_after) = (before == Verdict::Hidden, after == Verdict::Hidden);
        let transition = match (before, after) {
            (Verdict::Shown, Verdict::Shown) => None,
            (Verdict::Filtered | Verdict::Hidden, Verdict::Shown) => Some("enter"),
            (Verdict::Shown, _) if mutant::is(Mutant::FilterForgetsLeave) => return None,
            (Verdict::Shown, Verdict::Filtered | Verdict::Hidden) => Some("leave"),
            (Verdict::Filtered | Verdict::Hidden, Verdict::Filtered | Verdict::Hidden) => return None,
            (Verdict::Unknown, _) | (_, Verdict::Unknown) => Some("unknown"),
        };
        Some(Show { transition, without_before, without_after })
    }

    fn verdict(&self, row: &dyn RowImage) -> Verdict {
        if let Some(condition) = &self.condition
            && condition.eval_checked(row) != Outcome::Matches
        {
            return Verdict::Hidden;
        }
        match self.filter.as_ref().map_or(Outcome::Matches, |filter| filter.eval_checked(row)) {
            Outcome::Matches => Verdict::Shown,
            Outcome::Differs => Verdict::Filtered,
            Outcome::Undetermined => Verdict::Unknown,
        }
    }

    /// Only columns that the key may not read have changed. (Columns that the client did not wish for do not count.)
    fn hides_the_whole_change(&self, body: &Row<'_>) -> bool {
        if self.mask.is_all() {
            return false;
        }
        let Some(changed) = body.get("changed") else { return false };
        let Ok(names) = serde_json::from_str::<Vec<String>>(changed) else { return false };
        !names.iter().any(|name| self.mask.allows(name))
    }

    fn rewrite(&self, operation: Operation, body: &Row<'_>, show: Show, out: &mut String) {
        let mut separator = '{';
        for (name, value) in body.iter() {
            let dropped = match name {
                "before" => show.without_before,
                "after" => show.without_after,
                // A `leave` has only the old key, an `enter` only the new one: neither tells of the other image.
                "key" => show.without_after && body.get("old_key").is_some(),
                "old_key" => show.without_before || show.without_after,
                "changed" => show.without_before || show.without_after,
                _ => false,
            };
            if dropped {
                continue;
            }
            out.push(separator);
            separator = ',';
            push_json_string(out, name);
            out.push(':');
            match name {
                "before" | "after" if operation == Operation::Schema => {
                    out.push_str(shape::masked(value, &self.mask).as_deref().unwrap_or("null"));
                }
                "before" | "after" if operation != Operation::Event => {
                    self.mask_columns(value, out, |column| self.shows(column));
                }
                "key" | "old_key" if operation != Operation::Event => {
                    self.mask_columns(value, out, |column| self.mask.allows(column));
                }
                "changed" | "unchanged" => self.mask_names(value, out),
                _ => out.push_str(value),
            }
        }
        if show.without_after
            && let Some(old_key) = body.get("old_key")
        {
            out.push_str(",\"key\":");
            self.mask_columns(old_key, out, |column| self.mask.allows(column));
        }
        out.push('}');
    }

    fn shows(&self, column: &str) -> bool {
        self.mask.allows(column) && self.columns.as_ref().is_none_or(|columns| columns.contains(column))
    }

    fn mask_columns(&self, value: &str, out: &mut String, shown: impl Fn(&str) -> bool) {
        let Ok(row) = Row::parse(value) else {
            // null, or not a row at all: nothing that has columns.
            out.push_str(if value == "null" { value } else { "{}" });
            return;
        };
        out.push('{');
        let mut first = true;
        for (name, value) in row.iter().filter(|(name, _)| shown(name)) {
            if !std::mem::take(&mut first) {
                out.push(',');
            }
            push_json_string(out, name);
            out.push(':');
            out.push_str(value);
        }
        out.push('}');
    }

    fn mask_names(&self, value: &str, out: &mut String) {
        let names = serde_json::from_str::<Vec<String>>(value).unwrap_or_default();
        out.push('[');
        for (index, name) in names.iter().filter(|name| self.shows(name)).enumerate() {
            if index > 0 {
                out.push(',');
            }
            push_json_string(out, name);
        }
        out.push(']');
    }
}

const UNKNOWN: Show = Show { transition: Some("unknown"), without_before: false, without_after: false };

fn one_image(verdict: Verdict) -> Option<Show> {
    match verdict {
        Verdict::Shown => Some(Show::default()),
        Verdict::Unknown => Some(UNKNOWN),
        Verdict::Filtered | Verdict::Hidden => None,
    }
}

fn image<'a>(body: &Row<'a>, name: &str) -> Option<Row<'a>> {
    Row::parse(body.get(name)?).ok()
}

impl RowImage for Row<'_> {
    fn column(&self, name: &str) -> Option<&str> {
        self.get(name)
    }
}

/// A domain event as a row: `aggregate_id`, `event_type`, `payload`. It is always whole: what is not there is NULL.
struct DomainEvent<'a> {
    key: Option<Row<'a>>,
    event_type: Option<&'a str>,
    payload: Option<&'a str>,
    stop: Option<Stop<'a>>,
    texts: Texts,
}

/// SQL's NULL in an image.
const NULL_JSON: &str = "null";

impl<'a> DomainEvent<'a> {
    fn new(body: &Row<'a>, stop: Option<Stop<'a>>) -> Self {
        let (event_type, payload) = (body.get("type"), body.get("after"));
        Self { key: image(body, "key"), event_type, payload, stop, texts: Texts::default() }
    }
}

impl RowImage for DomainEvent<'_> {
    fn column(&self, name: &str) -> Option<&str> {
        let found = match name {
            "aggregate_id" => self.key.as_ref().and_then(|key| key.get("aggregate_id")),
            "event_type" => self.event_type,
            "payload" => self.payload,
            _ => return None,
        };
        found.or(Some(NULL_JSON))
    }

    fn text<'a>(&'a self, raw: &'a str, folded: bool) -> Option<Cow<'a, str>> {
        self.texts.get(raw, folded)
    }

    fn is_interrupted(&self) -> bool {
        self.stop.is_some_and(|stop| stop())
    }
}

#[cfg(test)]
mod tests;
