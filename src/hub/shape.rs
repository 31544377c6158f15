//! What a SCHEMA event means for a subscription: whether it ends it, and what of it a key may see.
//!
//! Pure. The description is what the leader's watcher wrote:
//! `{"changes":[{"kind":…,"column":…,"from":…,"to":…,"type":…}],"columns":[{"name":…,"type":…}],"relid":…}`.
//! A column counts as used when the client's `where`, the key's row condition or the client's `columns` names it; clients
//! of other columns go on. Whoever began after a change, but before its SCHEMA event, goes on as well ([`Basis`]).
//!
//! What a key may not read is named nowhere: neither in the event nor in the reason why a subscription ends.

use serde::Deserialize;
use serde_json::Value;

use crate::auth::scope::ColumnMask;
use crate::hub::plan::TablePlan;
use crate::mutant::{self, Mutant};
use crate::protocol::message::ResyncReason;

/// The changes that a SCHEMA event tells.
#[derive(Debug, Deserialize)]
struct Described {
    #[serde(default)]
    changes: Vec<Change>,
    // 0: not told.
    #[serde(default)]
    relid: u32,
}

#[derive(Debug, Deserialize)]
struct Change {
    kind: String,
    #[serde(default)]
    column: Option<String>,
    #[serde(default)]
    from: Value,
    #[serde(default)]
    to: Value,
}

/// The table as it was when a subscription that begins now was planned. A SCHEMA event comes up to seconds after its
/// change: one that tells of an earlier table of this name, or of a change that the plan was made after, is no news to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Basis {
    /// The table's OID.
    pub relid: u32,
    /// Its columns: names, and types as SQL writes them.
    pub columns: Vec<(Box<str>, Box<str>)>,
}

impl Basis {
    /// Whether a SCHEMA event, whose `after` is given, tells of another table, which had this name before.
    #[must_use]
    pub fn is_of_another(&self, after: &str) -> bool {
        serde_json::from_str::<Described>(after).is_ok_and(|described| self.differs_from(described.relid))
    }

    fn differs_from(&self, relid: u32) -> bool {
        relid != 0 && relid != self.relid
    }

    /// Whether the columns are as `change` left them, and were otherwise before it.
    fn knows(&self, change: &Change) -> bool {
        let (from, to) = (change.from.as_str().unwrap_or_default(), change.to.as_str().unwrap_or_default());
        match change.kind.as_str() {
            "rename_column" => self.type_of(to).is_some() && self.type_of(from).is_none(),
            // Values may have been rewritten under the same type, which columns do not show.
            "alter_column" => from != to && change.column.as_deref().and_then(|name| self.type_of(name)) == Some(to),
            _ => false,
        }
    }

    fn type_of(&self, column: &str) -> Option<&str> {
        self.columns.iter().find(|(name, _)| **name == *column).map(|(_, of_type)| &**of_type)
    }
}

/// Why a subscription with this plan cannot go on after a SCHEMA event of its table, whose `after` is given; None: it can.
#[must_use]
pub fn broken_by(plan: &TablePlan, after: &str) -> Option<(ResyncReason, String)> {
    let described: Described = serde_json::from_str(after).ok()?;
    let basis = plan.basis.as_deref();
    if basis.is_some_and(|basis| basis.differs_from(described.relid)) {
        return None;
    }
    let mut news = described.changes.iter().filter(|change| !basis.is_some_and(|basis| basis.knows(change)));
    news.find_map(|change| broken_by_change(plan, change))
}

fn broken_by_change(plan: &TablePlan, change: &Change) -> Option<(ResyncReason, String)> {
    let changed = |message: String| Some((ResyncReason::SchemaChanged, message));
    let (from, to) = (change.from.as_str().unwrap_or_default(), change.to.as_str().unwrap_or_default());
    let column = change.column.as_deref().unwrap_or_default();
    match change.kind.as_str() {
        "drop_table" => {
            let what = "the table was dropped: a table of the same name is another one, subscribe to it anew";
            Some((ResyncReason::TableDropped, what.to_owned()))
        }
        "untrack" | "capture_gap" | "capture_restored" => not_in_the_log(&change.kind, to),
        "rename_table" => changed(format!("the table is now named {to}: subscribe to that")),
        "drop_column" if uses(plan, column) && plan.mask.allows(column) => changed(dropped(column)),
        // Also the new name: before the change, rows had no such column, or another one.
        "rename_column" if uses(plan, from) || uses(plan, to) => {
            changed(match (plan.mask.allows(from), plan.mask.allows(to)) {
                (true, true) => format!("the column {from:?}, which this subscription uses, is now named {to:?}"),
                (true, false) => dropped(from),
                (false, true) => format!("the column {to:?}, which this subscription uses, is another one now"),
                (false, false) => HIDDEN_CHANGE.to_owned(),
            })
        }
        "alter_column" if uses(plan, column) && unmodified(from) != unmodified(to) && plan.mask.allows(column) => {
            changed(format!("the column {column:?}, which this subscription uses, was of type {from} and is now {to}"))
        }
        "drop_column" if uses(plan, column) => changed(HIDDEN_CHANGE.to_owned()),
        "alter_column" if uses(plan, column) && unmodified(from) != unmodified(to) => changed(HIDDEN_CHANGE.to_owned()),
        // Of one type, it was rewritten: every row has another value, and none an event.
        "alter_column" if uses(plan, column) && from == to => changed(match plan.mask.allows(column) {
            true => format!("the values of column {column:?}, which this subscription uses, were rewritten"),
            false => HIDDEN_CHANGE.to_owned(),
        }),
        // Labels that only came are in no filter yet.
        "alter_type" if filters(plan, column) && loses(&change.from, &change.to) => {
            changed(match plan.mask.allows(column) {
                true => format!("the type of column {column:?}, which this subscription's filter uses, has changed"),
                false => HIDDEN_CHANGE.to_owned(),
            })
        }
        "row_security" if change.to == Value::Bool(true) && plan.condition.is_none() => changed(
            "row level security was switched on: the key needs a row condition that covers the table".to_owned(),
        ),
        _ => None,
    }
}

/// Of a column that only the key's row condition knows of.
const HIDDEN_CHANGE: &str = "what decides which rows this key may read has changed: subscribe again";

fn dropped(column: &str) -> String {
    format!("the column {column:?}, which this subscription uses, was dropped")
}

fn filters(plan: &TablePlan, column: &str) -> bool {
    let filters = [&plan.filter, &plan.condition];
    filters.into_iter().flatten().any(|filter| filter.columns().any(|used| used == column))
}

/// Whether a name of the one list is not in the other.
fn loses(from: &Value, to: &Value) -> bool {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let kept = list(to);
    list(from).iter().any(|name| !kept.contains(name))
}

/// After a gap rows are not what the events before it made of them (invariant I8).
fn not_in_the_log(kind: &str, root: &str) -> Option<(ResyncReason, String)> {
    let (reason, what) = match kind {
        "untrack" if mutant::is(Mutant::UntrackNotTold) => return None,
        "untrack" if root.is_empty() => {
            (ResyncReason::NotTracked, "the table is not tracked any more: what changes from here on is not in the log")
        }
        "untrack" => {
            return Some((
                ResyncReason::NotTracked,
                format!("the table is a partition of {root} now: subscribe to that"),
            ));
        }
        _ if mutant::is(Mutant::GapNotTold) => return None,
        _ => (ResyncReason::CaptureGap, "changes of the table were made that are not in the log: read the table again"),
    };
    Some((reason, what.to_owned()))
}

fn uses(plan: &TablePlan, column: &str) -> bool {
    filters(plan, column) || plan.columns.as_ref().is_some_and(|columns| columns.contains(column))
}

/// A type without its length or precision, which no condition depends on: `character varying(10)` → `character varying`.
fn unmodified(name: &str) -> String {
    let mut depth = 0_usize;
    let kept = name.chars().filter(|character| {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => return depth == 0,
        }
        false
    });
    kept.collect()
}

/// A SCHEMA event's `after` without what it says of columns that the key may not read. A rename from or to such a name is,
/// for the key, a column that appears or goes. None: it says nothing else.
#[must_use]
pub fn masked(after: &str, mask: &ColumnMask) -> Option<String> {
    let mut described: Value = serde_json::from_str(after).unwrap_or_default();
    if let Some(columns) = described.get_mut("columns").and_then(Value::as_array_mut) {
        columns.retain(|column| shown(&column["name"], mask));
    }
    if let Some(changes) = described.get_mut("changes").and_then(Value::as_array_mut) {
        let told = changes.len();
        changes.retain_mut(|change| mask_change(change, mask));
        if changes.is_empty() && told > 0 {
            return None;
        }
    }
    Some(described.to_string())
}

/// False: nothing of it is left.
fn mask_change(change: &mut Value, mask: &ColumnMask) -> bool {
    if change["kind"] == "key" {
        for side in ["from", "to"] {
            if let Some(names) = change.get_mut(side).and_then(Value::as_array_mut) {
                names.retain(|name| shown(name, mask));
            }
        }
        return change["from"] != change["to"];
    }
    if change["kind"] != "rename_column" {
        return shown(&change["column"], mask);
    }
    let (from, to, of_type) = (change["from"].take(), change["to"].take(), change["type"].take());
    let (kind, column) = match (shown(&from, mask), shown(&to, mask)) {
        (true, true) => {
            (change["from"], change["to"], change["type"]) = (from, to, of_type);
            return true;
        }
        (true, false) => ("drop_column", from),
        (false, true) => ("add_column", to),
        (false, false) => return false,
    };
    *change = serde_json::json!({ "kind": kind, "column": column });
    if kind == "add_column" {
        change["type"] = of_type;
    }
    true
}

fn shown(name: &Value, mask: &ColumnMask) -> bool {
    name.as_str().is_none_or(|name| mask.allows(name))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::auth::scope::OpSet;
    use crate::filter::{Column, ColumnType, Filter};

    fn plan(filter: Option<&str>, condition: Option<&str>, columns: Option<&[&str]>) -> TablePlan {
        let known = [
            Column::new("id", ColumnType::Int8),
            Column::new("status", ColumnType::Text),
            Column::new("tenant", ColumnType::Int4),
        ];
        let compile = |text| Filter::compile(text, &known).unwrap();
        TablePlan {
            ops: OpSet::ALL,
            filter: filter.map(compile),
            condition: condition.map(compile),
            mask: ColumnMask::All,
            columns: columns.map(|names| Arc::new(names.iter().map(|name| Box::from(*name)).collect())),
            basis: None,
        }
    }

    fn after(change: &str) -> String {
        format!(r#"{{"changes":[{{"kind":"add_column","column":"x","type":"text"}},{change}],"columns":[],"relid":1}}"#)
    }

    #[test]
    fn a_subscription_ends_when_what_it_uses_is_dropped_renamed_or_retyped() {
        let plans = [
            plan(Some("status = 'paid'"), None, None),
            plan(None, Some("status IS NOT NULL"), None),
            plan(None, None, Some(&["id", "status"])),
        ];
        for plan in &plans {
            for change in [
                r#"{"kind":"drop_column","column":"status"}"#,
                r#"{"kind":"rename_column","column":"state","from":"status","to":"state"}"#,
                r#"{"kind":"rename_column","column":"status","from":"state","to":"status"}"#,
                r#"{"kind":"alter_column","column":"status","from":"text","to":"integer"}"#,
            ] {
                let (reason, message) = broken_by(plan, &after(change)).unwrap();
                assert_eq!(reason, ResyncReason::SchemaChanged);
                assert!(message.contains("status"), "{message}");
            }
        }
    }

    #[test]
    fn a_subscription_goes_on_when_other_columns_change() {
        let plan = plan(Some("status = 'paid'"), Some("tenant = 7"), Some(&["id"]));
        for change in [
            r#"{"kind":"drop_column","column":"note"}"#,
            r#"{"kind":"rename_column","column":"b","from":"a","to":"b"}"#,
            r#"{"kind":"alter_column","column":"status","from":"character varying(10)","to":"character varying(20)"}"#,
            r#"{"kind":"key","from":["id"],"to":null}"#,
            r#"{"kind":"capture_broken","message":"disabled"}"#,
            r#"{"kind":"attach_partition","to":"public.p1"}"#,
            r#"{"kind":"alter_type","column":"status","type":"s","from":["new"],"to":["new","paid"]}"#,
            r#"{"kind":"alter_type","column":"note","type":"s","from":["new"],"to":["old"]}"#,
            r#"{"kind":"something_later","column":"status"}"#,
        ] {
            assert_eq!(broken_by(&plan, &after(change)), None, "{change}");
        }
        assert_eq!(broken_by(&plan, "not json"), None);
    }

    #[test]
    fn a_table_that_is_gone_or_renamed_ends_every_subscription() {
        let everything = plan(None, None, None);
        let dropped = broken_by(&everything, &after(r#"{"kind":"drop_table"}"#)).unwrap();
        assert_eq!(dropped.0, ResyncReason::TableDropped);
        let renamed = r#"{"kind":"rename_table","from":"public.a","to":"public.b"}"#;
        let (reason, message) = broken_by(&everything, &after(renamed)).unwrap();
        assert_eq!(reason, ResyncReason::SchemaChanged);
        assert!(message.contains("public.b"), "{message}");
    }

    #[test]
    fn untracking_and_a_gap_end_every_subscription() {
        let everything = plan(None, None, None);
        for (change, reason) in [
            (r#"{"kind":"untrack"}"#, ResyncReason::NotTracked),
            (r#"{"kind":"untrack","to":"public.p"}"#, ResyncReason::NotTracked),
            (r#"{"kind":"capture_gap","message":"disabled"}"#, ResyncReason::CaptureGap),
            (r#"{"kind":"capture_restored"}"#, ResyncReason::CaptureGap),
        ] {
            assert_eq!(broken_by(&everything, &after(change)).unwrap().0, reason, "{change}");
        }
    }

    #[test]
    fn other_values_and_other_labels_end_those_that_use_them() {
        let filter = plan(Some("status = 'paid'"), None, None);
        for change in [
            r#"{"kind":"alter_column","column":"status","from":"text","to":"text"}"#,
            r#"{"kind":"alter_type","column":"status","type":"s","from":["new","paid"],"to":["new","settled"]}"#,
        ] {
            assert_eq!(broken_by(&filter, &after(change)).unwrap().0, ResyncReason::SchemaChanged, "{change}");
            assert_eq!(broken_by(&plan(None, None, None), &after(change)), None, "{change}");
        }
    }

    #[test]
    fn row_security_ends_those_whose_key_has_no_condition() {
        let change = after(r#"{"kind":"row_security","from":false,"to":true}"#);
        assert!(broken_by(&plan(None, None, None), &change).is_some());
        assert!(broken_by(&plan(None, Some("tenant = 1"), None), &change).is_none());
    }

    #[test]
    fn hidden_columns_are_not_told_of_under_any_name() {
        let mask = ColumnMask::AllBut(Arc::new(["secret".into()].into_iter().collect()));
        let told = masked(
            r#"{"changes":[{"kind":"drop_column","column":"secret"},
                {"kind":"rename_column","column":"secret","from":"plain","to":"secret","type":"text"},
                {"kind":"rename_column","column":"open","from":"secret","to":"open","type":"text"},
                {"kind":"key","from":["id","secret"],"to":["id"]}],
               "columns":[{"name":"id","type":"bigint"},{"name":"secret","type":"text"}],"relid":7}"#,
            &mask,
        )
        .unwrap();
        assert!(!told.contains("secret"), "{told}");
        let told: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["changes"][0], serde_json::json!({"kind": "drop_column", "column": "plain"}));
        assert_eq!(told["changes"][1], serde_json::json!({"kind": "add_column", "column": "open", "type": "text"}));
    }

    #[test]
    fn an_event_about_hidden_columns_alone_is_not_told() {
        let mask = ColumnMask::AllBut(Arc::new(["secret".into(), "later".into()].into_iter().collect()));
        for change in [
            r#"{"kind":"drop_column","column":"secret","type":"text"}"#,
            r#"{"kind":"add_column","column":"later","type":"text"}"#,
            r#"{"kind":"alter_column","column":"secret","from":"text","to":"integer","type":"integer"}"#,
            r#"{"kind":"rename_column","column":"secret","from":"secret","to":"later","type":"text"}"#,
            r#"{"kind":"key","from":["id","secret"],"to":["id"]}"#,
        ] {
            let told = format!(r#"{{"changes":[{change}],"columns":[{{"name":"secret","type":"text"}}],"relid":7}}"#);
            assert_eq!(masked(&told, &mask), None, "{change}");
        }
    }

    #[test]
    fn why_a_subscription_ends_names_no_hidden_column() {
        let mask = ColumnMask::AllBut(Arc::new(["tenant".into(), "owner".into()].into_iter().collect()));
        for (change, named) in [
            (r#"{"kind":"drop_column","column":"tenant","type":"integer"}"#, ""),
            (r#"{"kind":"alter_column","column":"tenant","from":"integer","to":"text","type":"text"}"#, ""),
            (r#"{"kind":"rename_column","column":"tenant","from":"tenant","to":"owner","type":"integer"}"#, ""),
            (r#"{"kind":"rename_column","column":"tenant","from":"tenant","to":"open","type":"integer"}"#, "open"),
            (r#"{"kind":"rename_column","column":"status","from":"status","to":"owner","type":"text"}"#, "status"),
        ] {
            let plan = TablePlan { mask: mask.clone(), ..plan(Some("status = 'x'"), Some("tenant = 7"), None) };
            let (reason, message) = broken_by(&plan, &after(change)).unwrap();
            assert_eq!(reason, ResyncReason::SchemaChanged);
            assert!(message.contains(named), "{message}");
            for hidden in ["tenant", "owner", "integer"] {
                assert!(!message.contains(hidden), "{message}");
            }
        }
    }

    #[test]
    fn who_began_after_a_change_is_not_ended_by_its_event() {
        let basis = |relid, status: &str| {
            let columns = vec![("id".into(), "bigint".into()), ("status".into(), status.into())];
            Some(Arc::new(Basis { relid, columns }))
        };
        let rename = r#"{"kind":"rename_column","column":"state","from":"state","to":"status","type":"text"}"#;
        let retype = r#"{"kind":"alter_column","column":"status","from":"integer","to":"text","type":"text"}"#;
        let rewrite = r#"{"kind":"alter_column","column":"status","from":"text","to":"text","type":"text"}"#;
        let swap = r#"{"kind":"rename_column","column":"id","from":"id","to":"status","type":"text"}"#;
        let drop_column = r#"{"kind":"drop_column","column":"status","type":"text"}"#;
        let drop_table = r#"{"kind":"drop_table"}"#;
        let older = TablePlan { basis: basis(1, "integer"), ..plan(Some("status = '1'"), None, None) };
        let newer = TablePlan { basis: basis(1, "text"), ..older.clone() };
        let next = TablePlan { basis: basis(2, "text"), ..older.clone() };
        let anyone = TablePlan { basis: None, ..older.clone() };
        for (change, ended) in [
            (rename, [false, false, false, true]),
            (retype, [true, false, false, true]),
            (rewrite, [true, true, false, true]),
            (swap, [true, true, false, true]),
            (drop_column, [true, true, false, true]),
            (drop_table, [true, true, false, true]),
        ] {
            let found = [&older, &newer, &next, &anyone].map(|plan| broken_by(plan, &after(change)).is_some());
            assert_eq!(found, ended, "{change}");
        }
        assert!(next.basis.as_ref().unwrap().is_of_another(&after(drop_table)));
        assert!(!newer.basis.as_ref().unwrap().is_of_another(&after(drop_table)));
    }
}
