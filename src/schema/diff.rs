//! What has changed between two looks at a table.
//!
//! Pure. A [`Fingerprint`] is what `tidewire.table_fingerprint()` says, with what the watcher adds to it: the options of
//! tracking, the partitions by OID, and what is wrong with the capture. Columns are their attribute numbers, partitions
//! their OIDs: a rename is told from a drop and an addition.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How a table looked.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Fingerprint {
    /// Canonical name.
    pub name: String,
    /// Row security is switched on.
    pub row_security: bool,
    /// Names of the key's columns.
    pub key: Option<Vec<String>>,
    /// In the order of their numbers.
    pub columns: Vec<ColumnShape>,
    /// Partitions that hold rows, by OID; None: not looked at.
    #[serde(default)]
    pub leaves: Option<BTreeMap<String, String>>,
    /// Those of them that may have brought rows when they were attached, by OID.
    #[serde(default)]
    pub attached: Vec<String>,
    /// What ties each partition to the root, by OID: another text after every ATTACH.
    #[serde(default)]
    pub links: BTreeMap<String, String>,
    /// Where Postgres keeps the rows of the table and its partitions, by OID: another number after every rewrite.
    #[serde(default)]
    pub storage: BTreeMap<String, i64>,
    /// The transaction that last changed each column's definition, by its number.
    #[serde(default)]
    pub moved: BTreeMap<i16, String>,
    /// What the columns' enums and composite types consist of, by the column's number: labels or members, by OID or number.
    #[serde(default)]
    pub types: BTreeMap<i16, BTreeMap<String, String>>,
    /// The same, and what they consist of in turn, by the path to it; a column that is missing was not looked at.
    #[serde(default)]
    pub parts: BTreeMap<i16, BTreeMap<String, String>>,
    /// The options of `tidewire.track()`; None: not looked at, or the triggers that carry them are gone.
    #[serde(default)]
    pub options: Option<Value>,
    /// What keeps changes from being captured.
    #[serde(default)]
    pub faults: Vec<String>,
}

/// How a column looked.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ColumnShape {
    attnum: i16,
    name: String,
    #[serde(rename = "type")]
    of_type: String,
    type_oid: i64,
}

/// One change, as the SCHEMA event tells it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// What kind of change.
    pub kind: &'static str,
    /// The column; of a renamed one the old name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// What was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<Value>,
    /// What is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<Value>,
    /// The column's type now; of a dropped one its last.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub of_type: Option<String>,
    /// In words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Change {
    const fn new(kind: &'static str) -> Self {
        Self { kind, column: None, from: None, to: None, of_type: None, message: None }
    }

    fn moved(kind: &'static str, from: impl Into<Value>, to: impl Into<Value>) -> Self {
        Self { from: Some(from.into()), to: Some(to.into()), ..Self::new(kind) }
    }

    fn of(self, column: &str, of_type: &str) -> Self {
        Self { column: Some(column.to_owned()), of_type: Some(of_type.to_owned()), ..self }
    }
}

/// The `after` of a SCHEMA event.
#[must_use]
pub fn described(changes: &[Change], now: &Fingerprint, relid: u32) -> Value {
    let columns: Vec<Value> =
        now.columns.iter().map(|column| serde_json::json!({ "name": column.name, "type": column.of_type })).collect();
    serde_json::json!({ "changes": changes, "columns": columns, "relid": relid })
}

/// What a subscriber of the table has to hear.
#[must_use]
pub fn changes(was: &Fingerprint, now: &Fingerprint) -> Vec<Change> {
    let mut found = Vec::new();
    if was.name != now.name {
        found.push(Change::moved("rename_table", was.name.as_str(), now.name.as_str()));
    }
    column_changes(was, now, &mut found);
    if key_changed(was, now) {
        found.push(Change::moved("key", was.key.clone(), now.key.clone()));
    }
    if was.row_security != now.row_security {
        found.push(Change::moved("row_security", was.row_security, now.row_security));
    }
    partition_changes(was, now, &mut found);
    if now.faults.iter().any(|fault| !was.faults.contains(fault)) {
        let message = format!("changes are not captured: {}", now.faults.join("; "));
        found.push(Change { message: Some(message), ..Change::new("capture_broken") });
    } else if now.faults.is_empty() && !was.faults.is_empty() {
        let message = "changes made meanwhile were not captured".to_owned();
        found.push(Change { message: Some(message), ..Change::new("capture_restored") });
    }
    found
}

/// Where event triggers tell these at once, the fingerprint has them already.
fn partition_changes(was: &Fingerprint, now: &Fingerprint, found: &mut Vec<Change>) {
    let attached = &now.attached;
    // It left and came back between two looks: what happened to its rows meanwhile is not in the log.
    let relinked =
        |oid: &String| was.links.get(oid).is_some_and(|link| now.links.get(oid).is_some_and(|now| now != link));
    if let (Some(was), Some(now)) = (&was.leaves, &now.leaves) {
        let gone = was.iter().filter(|(oid, _)| !now.contains_key(*oid) || relinked(oid));
        found.extend(gone.map(|(_, name)| Change {
            from: Some(name.as_str().into()),
            message: Some("its rows left the table without an event for each".to_owned()),
            ..Change::new("detach_partition")
        }));
        let come = now.iter().filter(|(oid, _)| attached.contains(oid) && (!was.contains_key(*oid) || relinked(oid)));
        found.extend(come.map(|(_, name)| Change {
            to: Some(name.as_str().into()),
            message: Some("rows that it already had came into the table without an event for each".to_owned()),
            ..Change::new("attach_partition")
        }));
    }
}

fn column_changes(was: &Fingerprint, now: &Fingerprint, found: &mut Vec<Change>) {
    // Neither is enough: VACUUM FULL moves the rows, SET DEFAULT the definition.
    let rewritten = was.storage.iter().any(|(oid, number)| now.storage.get(oid).is_some_and(|now| now != number));
    for old in &was.columns {
        let Some(new) = now.columns.iter().find(|new| new.attnum == old.attnum) else {
            found.push(Change::new("drop_column").of(&old.name, &old.of_type));
            continue;
        };
        if old.name != new.name {
            let renamed = Change::moved("rename_column", old.name.as_str(), new.name.as_str());
            found.push(renamed.of(&old.name, &new.of_type));
        }
        if (old.type_oid, &old.of_type) != (new.type_oid, &new.of_type) {
            let altered = Change::moved("alter_column", old.of_type.as_str(), new.of_type.as_str());
            found.push(altered.of(&new.name, &new.of_type));
        } else if rewritten && was.moved.get(&old.attnum).is_some_and(|moved| now.moved.get(&old.attnum) != Some(moved))
        {
            let altered = Change::moved("alter_column", old.of_type.as_str(), new.of_type.as_str());
            let message = Some("its values were rewritten without an event for each row".to_owned());
            found.push(Change { message, ..altered }.of(&new.name, &new.of_type));
        }
        let nested = was.parts.get(&old.attnum).zip(now.parts.get(&old.attnum));
        if let Some((before, after)) = nested.or_else(|| was.types.get(&old.attnum).zip(now.types.get(&old.attnum)))
            && old.type_oid == new.type_oid
            && before != after
        {
            let parts = |of: &BTreeMap<String, String>| of.values().cloned().collect::<Vec<_>>();
            found.push(Change::moved("alter_type", parts(before), parts(after)).of(&new.name, &new.of_type));
        }
    }
    for new in &now.columns {
        if was.columns.iter().all(|old| old.attnum != new.attnum) {
            found.push(Change::new("add_column").of(&new.name, &new.of_type));
        }
    }
}

/// Not where a key column was only renamed, nor where `tidewire.track()` set another key: tracking makes no event.
fn key_changed(was: &Fingerprint, now: &Fingerprint) -> bool {
    let numbers = |of: &Fingerprint| -> Option<Vec<Option<i16>>> {
        let number = |name: &String| of.columns.iter().find(|column| column.name == *name).map(|column| column.attnum);
        of.key.as_ref().map(|names| names.iter().map(number).collect())
    };
    if numbers(was) == numbers(now) {
        return false;
    }
    match (&was.options, &now.options) {
        (Some(was), Some(now)) => wish(was) == wish(now),
        // Without triggers there are no events that could have another key.
        (_, None) => false,
        (None, Some(_)) => true,
    }
}

/// The options as they were asked for: where the key follows the primary key, the key is not among them. A key that lost a
/// column was asked for all the same.
fn wish(options: &Value) -> Value {
    let mut options = options.clone();
    if let Some(members) = options.as_object_mut()
        && members.get("primary") == Some(&Value::Bool(true))
    {
        members.remove("key");
    }
    if let Some(members) = options.as_object_mut()
        && let Some(asked) = members.remove("key_gone")
    {
        members.insert("key".to_owned(), asked);
    }
    options
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn column(attnum: i16, name: &str, of_type: &str) -> Value {
        json!({"attnum": attnum, "name": name, "type": of_type, "type_oid": of_type.len(), "type_name": "x",
            "type_kind": "b", "not_null": false})
    }

    fn base() -> Value {
        json!({"name": "public.t", "kind": "r", "row_security": false, "key": ["id"],
            "columns": [column(1, "id", "bigint"), column(2, "a", "text")], "triggers": {}, "partitions": [],
            "leaves": {"10": "public.p1", "11": "public.p2"},
            "storage": {"9": 9}, "moved": {"1": "700", "2": "700"}, "types": {"2": {"50": "new", "51": "paid"}}, "options": {"primary": true, "key": [1]}, "faults": []})
    }

    fn diff(change: impl FnOnce(&mut Value)) -> Vec<Value> {
        let mut now = base();
        change(&mut now);
        let read = |value: Value| serde_json::from_value::<Fingerprint>(value).unwrap();
        changes(&read(base()), &read(now)).into_iter().map(|change| serde_json::to_value(change).unwrap()).collect()
    }

    #[test]
    fn nothing_changed_is_no_change() {
        assert!(diff(|_| ()).is_empty());
        assert!(diff(|now| now["triggers"] = json!({"!tidewire": "O"})).is_empty());
    }

    #[test]
    fn columns_are_their_numbers_not_their_names() {
        assert_eq!(
            diff(|now| now["columns"][1]["name"] = json!("b")),
            [json!({"kind": "rename_column", "column": "a", "from": "a", "to": "b", "type": "text"})]
        );
        assert_eq!(
            diff(|now| now["columns"] = json!([column(1, "id", "bigint"), column(3, "a", "text")])),
            [
                json!({"kind": "drop_column", "column": "a", "type": "text"}),
                json!({"kind": "add_column", "column": "a", "type": "text"})
            ]
        );
        assert_eq!(
            diff(|now| now["columns"][1] = column(2, "a", "integer")),
            [json!({"kind": "alter_column", "column": "a", "from": "text", "to": "integer", "type": "integer"})]
        );
    }

    #[test]
    fn a_table_keeps_its_story_under_a_new_name() {
        assert_eq!(
            diff(|now| now["name"] = json!("public.u")),
            [json!({"kind": "rename_table", "from": "public.t", "to": "public.u"})]
        );
    }

    #[test]
    fn a_key_changes_by_its_columns_and_not_by_tracking_anew() {
        assert!(
            diff(|now| {
                now["columns"][0]["name"] = json!("ident");
                now["key"] = json!(["ident"]);
            })
            .iter()
            .all(|change| change["kind"] == "rename_column")
        );
        let other = diff(|now| {
            now["key"] = json!(["a"]);
            now["options"]["key"] = json!([2]);
        });
        assert_eq!(other, [json!({"kind": "key", "from": ["id"], "to": ["a"]})]);
        let tracked_anew = diff(|now| {
            now["key"] = json!(["a"]);
            now["options"] = json!({"key": [2]});
        });
        assert!(tracked_anew.is_empty());
        let triggers_gone = diff(|now| {
            now["key"] = json!(["a"]);
            now["options"] = Value::Null;
        });
        assert!(triggers_gone.is_empty());
    }

    #[test]
    fn a_partition_that_leaves_is_told_and_one_that_is_renamed_is_not() {
        assert!(diff(|now| now["leaves"]["10"] = json!("public.renamed")).is_empty());
        let left = diff(|now| now["leaves"] = json!({"11": "public.p2", "12": "public.p3"}));
        assert_eq!(
            (left.len(), &left[0]["kind"], &left[0]["from"]),
            (1, &json!("detach_partition"), &json!("public.p1"))
        );
    }

    #[test]
    fn a_partition_that_brings_rows_is_told_and_one_made_in_place_is_not() {
        assert!(diff(|now| now["leaves"]["12"] = json!("public.p3")).is_empty());
        let came = diff(|now| {
            now["leaves"]["12"] = json!("public.p3");
            now["attached"] = json!(["10", "12"]);
        });
        assert_eq!(
            (came.len(), &came[0]["kind"], &came[0]["to"]),
            (1, &json!("attach_partition"), &json!("public.p3"))
        );
    }

    #[test]
    fn a_partition_that_left_and_came_back_is_told_as_both() {
        let mut was = base();
        was["links"] = json!({"10": "700", "11": "700"});
        let told = |links: Value, attached: Value| -> Vec<Value> {
            let mut now = base();
            (now["links"], now["attached"]) = (links, attached);
            let read = |value: &Value| serde_json::from_value::<Fingerprint>(value.clone()).unwrap();
            changes(&read(&was), &read(&now)).into_iter().map(|change| json!(change.kind)).collect()
        };
        let again = json!({"10": "701", "11": "700"});
        assert_eq!(told(again.clone(), json!(["10", "11"])), ["detach_partition", "attach_partition"]);
        assert_eq!(told(again.clone(), json!(["11"])), ["detach_partition"], "it came back empty");
        assert!(told(was["links"].clone(), json!(["10"])).is_empty());
        // A look of an older release knew no links.
        was.as_object_mut().unwrap().remove("links");
        let read = |value: &Value| serde_json::from_value::<Fingerprint>(value.clone()).unwrap();
        let mut now = base();
        now["links"] = again;
        assert!(changes(&read(&was), &read(&now)).is_empty());
    }

    #[test]
    fn a_key_that_loses_a_column_is_told_as_none() {
        let mut was = base();
        (was["key"], was["options"]) = (json!(["id", "a"]), json!({"key": [1, 2]}));
        let mut now = base();
        (now["key"], now["options"]) = (Value::Null, json!({"key_gone": [1, 2]}));
        let read = |value: Value| serde_json::from_value::<Fingerprint>(value).unwrap();
        let found = changes(&read(was), &read(now));
        assert_eq!(serde_json::to_value(&found).unwrap(), json!([{"kind": "key", "from": ["id", "a"], "to": null}]));
    }

    #[test]
    fn a_change_deep_inside_a_type_is_told() {
        let told = |was: Option<&str>| -> Vec<Value> {
            let mut before = base();
            if let Some(label) = was {
                before["parts"] = json!({"2": {".1": "x mood", ".1#50": label}});
            }
            let mut now = base();
            now["parts"] = json!({"2": {".1": "x mood", ".1#50": "new"}});
            let read = |value: Value| serde_json::from_value::<Fingerprint>(value).unwrap();
            let found = changes(&read(before), &read(now));
            found.into_iter().map(|change| serde_json::to_value(change).unwrap()).collect()
        };
        assert_eq!(told(Some("old"))[0]["kind"], "alter_type");
        assert!(told(Some("new")).is_empty());
        assert!(told(None).is_empty(), "a look of an older release saw no parts");
    }

    #[test]
    fn other_values_are_told_only_where_definition_and_rows_moved() {
        assert!(diff(|now| now["storage"]["9"] = json!(10)).is_empty());
        assert!(diff(|now| now["moved"]["2"] = json!("701")).is_empty());
        let rewritten = diff(|now| {
            now["storage"]["9"] = json!(10);
            now["moved"]["2"] = json!("701");
        });
        assert_eq!(rewritten.len(), 1);
        assert_eq!((&rewritten[0]["kind"], &rewritten[0]["column"]), (&json!("alter_column"), &json!("a")));
        assert_eq!(rewritten[0]["from"], rewritten[0]["to"]);
    }

    #[test]
    fn a_renamed_label_is_told() {
        assert_eq!(
            diff(|now| now["types"]["2"]["51"] = json!("settled")),
            [
                json!({"kind": "alter_type", "column": "a", "from": ["new", "paid"], "to": ["new", "settled"], "type": "text"})
            ]
        );
    }

    #[test]
    fn broken_capture_is_told_once_and_so_is_its_mending() {
        let broken = diff(|now| now["faults"] = json!(["trigger_disabled: !tidewire"]));
        assert_eq!(broken[0]["kind"], "capture_broken");
        let mut was = base();
        was["faults"] = json!(["trigger_disabled: !tidewire"]);
        let was: Fingerprint = serde_json::from_value(was).unwrap();
        assert!(changes(&was, &was).is_empty());
        let now: Fingerprint = serde_json::from_value(base()).unwrap();
        assert_eq!(changes(&was, &now)[0].kind, "capture_restored");
    }

    #[test]
    fn the_event_tells_the_columns_as_they_are_now() {
        let now: Fingerprint = serde_json::from_value(base()).unwrap();
        let after = described(&[Change::new("capture_broken")], &now, 7);
        assert_eq!(
            after,
            json!({"changes": [{"kind": "capture_broken"}], "relid": 7,
                "columns": [{"name": "id", "type": "bigint"}, {"name": "a", "type": "text"}]})
        );
    }
}
