//! The rules of what is shown: masks, conditions, transitions.

use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::event::NewEvent;
use crate::filter::{Column, ColumnType};

/// The plan of a key that may read all but `secret`, of rows where `condition` holds, asked for rows where `filter` does.
fn plan(filter: Option<&str>, condition: Option<&str>, hidden: &[&str]) -> TablePlan {
    let columns = ["id", "a", "tenant", "secret"].map(|name| Column::new(name, ColumnType::Int4));
    let compiled = |text: &str| Filter::compile(text, &columns).unwrap();
    let mask = match hidden {
        [] => ColumnMask::All,
        names => ColumnMask::AllBut(Arc::new(names.iter().map(|name| (*name).into()).collect())),
    };
    TablePlan {
        ops: OpSet::ALL,
        filter: filter.map(compiled),
        condition: condition.map(compiled),
        mask,
        columns: None,
        basis: None,
    }
}

/// An event of a row `[id, a, tenant, secret]`.
fn event(operation: Operation, before: Option<[i32; 4]>, after: Option<[i32; 4]>) -> Event {
    let image = |row: [i32; 4]| json!({"id": row[0], "a": row[1], "tenant": row[2], "secret": row[3]}).to_string();
    let key = |row: [i32; 4]| json!({"id": row[0]}).to_string();
    let (old, new) = (before.map(key), after.map(key));
    let old_key = old.clone().filter(|old| new.as_ref().is_some_and(|new| new != old));
    let (before, after) = (before.map(image), after.map(image));
    compose(operation, new.or(old).as_deref(), old_key.as_deref(), before.as_deref(), after.as_deref(), false)
}

fn compose(
    operation: Operation,
    key: Option<&str>,
    old_key: Option<&str>,
    before: Option<&str>,
    after: Option<&str>,
    omitted: bool,
) -> Event {
    let id = Uuid::from_u128(1);
    let new = NewEvent {
        event_id: id,
        table: "public.t",
        operation,
        key,
        old_key,
        before,
        after,
        event_type: (operation == Operation::Event).then_some("paid"),
        headers: None,
        xid: 5,
        created_at: chrono::DateTime::UNIX_EPOCH,
        omitted,
    };
    let mut body = String::new();
    new.compose(&mut body);
    Event { seq: 1, id, xid: 5, operation, tx_end: true, omitted, table: "public.t".into(), body: body.into() }
}

fn shown(plan: &TablePlan, event: &Event) -> Option<Value> {
    let mut out = b"before".to_vec();
    if !plan.render(&Opened::new(event), &mut out) {
        assert_eq!(out, b"before", "what is not shown leaves nothing");
        return None;
    }
    Some(serde_json::from_slice(&out["before".len()..]).unwrap())
}

fn update(before: [i32; 4], after: [i32; 4]) -> Event {
    event(Operation::Update, Some(before), Some(after))
}

/// The transition of an UPDATE that is shown, "none" without one; None: it is not shown.
fn transition(plan: &TablePlan, event: &Event) -> Option<String> {
    let value = shown(plan, event)?;
    Some(value.get("transition").map_or_else(|| "none".to_owned(), |text| text.as_str().unwrap().to_owned()))
}

#[test]
fn a_filter_passes_what_is_in_it_or_crosses_it() {
    let plan = plan(Some("a = 1"), None, &[]);
    let (inside, outside) = ([1, 1, 7, 0], [1, 2, 7, 0]);
    assert_eq!(transition(&plan, &update(inside, [1, 1, 8, 0])).as_deref(), Some("none"));
    assert_eq!(transition(&plan, &update(outside, inside)).as_deref(), Some("enter"));
    assert_eq!(transition(&plan, &update(inside, outside)).as_deref(), Some("leave"));
    assert_eq!(transition(&plan, &update(outside, [1, 3, 7, 0])), None);
    for (operation, row, passes) in [
        (Operation::Insert, inside, true),
        (Operation::Insert, outside, false),
        (Operation::Delete, inside, true),
        (Operation::Delete, outside, false),
    ] {
        let (before, after) = if operation == Operation::Insert { (None, Some(row)) } else { (Some(row), None) };
        assert_eq!(shown(&plan, &event(operation, before, after)).is_some(), passes, "{operation:?} {row:?}");
    }
    assert!(shown(&plan, &compose(Operation::Truncate, None, None, None, None, false)).is_some());
}

#[test]
fn without_a_before_image_a_delete_is_unknown_and_an_update_is_judged_by_what_it_became() {
    let plan = plan(Some("a = 1"), None, &[]);
    let delete = compose(Operation::Delete, Some(r#"{"id":1}"#), None, None, None, false);
    assert_eq!(transition(&plan, &delete).as_deref(), Some("unknown"));
    let update = |a: i32| {
        let after = format!(r#"{{"id":1,"a":{a},"tenant":7,"secret":0}}"#);
        compose(Operation::Update, Some(r#"{"id":1}"#), None, None, Some(&after), false)
    };
    assert_eq!(transition(&plan, &update(1)).as_deref(), Some("none"));
    assert_eq!(transition(&plan, &update(2)), None);
}

#[test]
fn a_row_that_the_condition_does_not_admit_is_never_shown_not_even_to_say_that_it_left() {
    let plan = plan(None, Some("tenant = 7"), &[]);
    let (own, other) = ([1, 1, 7, 3], [2, 2, 8, 4]);
    assert_eq!(shown(&plan, &event(Operation::Insert, None, Some(other))), None);
    assert_eq!(shown(&plan, &event(Operation::Delete, Some(other), None)), None);
    assert_eq!(shown(&plan, &update(other, [2, 9, 8, 4])), None);

    let leaves = shown(&plan, &update(own, other)).unwrap();
    assert_eq!(
        (&leaves["transition"], &leaves["key"], &leaves["before"]["a"]),
        (&json!("leave"), &json!({"id": 1}), &json!(1))
    );
    let enters = shown(&plan, &update(other, own)).unwrap();
    assert_eq!(
        (&enters["transition"], &enters["key"], &enters["after"]["a"]),
        (&json!("enter"), &json!({"id": 1}), &json!(1))
    );
    for (value, gone) in [(&leaves, "after"), (&enters, "before")] {
        for name in [gone, "old_key", "changed"] {
            assert!(value.get(name).is_none(), "{name} of {value}");
        }
        let text = value.to_string();
        assert!(!text.contains(r#""id":2"#) && !text.contains(r#""tenant":8"#), "{text}");
    }
    // Nothing to judge by is not trusted.
    let bare = compose(Operation::Delete, Some(r#"{"id":1}"#), None, None, None, false);
    assert_eq!(shown(&plan, &bare), None);
    let omitted = compose(Operation::Update, Some(r#"{"id":1}"#), None, None, None, true);
    assert_eq!(shown(&plan, &omitted), None);
    let unknown = compose(Operation::Insert, Some(r#"{"id":1}"#), None, None, Some(r#"{"id":1}"#), false);
    assert_eq!(shown(&plan, &unknown), None, "the condition's column is not there");
}

#[test]
fn the_filter_is_asked_only_about_rows_that_the_condition_admits() {
    let plan = plan(Some("a = 1"), Some("tenant = 7"), &[]);
    // From another tenant's matching row into an own one that does not match: nothing to see on either side.
    assert_eq!(shown(&plan, &update([1, 1, 8, 0], [1, 2, 7, 0])), None);
    let enters = shown(&plan, &update([1, 1, 8, 0], [1, 1, 7, 0])).unwrap();
    assert_eq!((&enters["transition"], enters.get("before")), (&json!("enter"), None));
    let leaves = shown(&plan, &update([1, 1, 7, 0], [1, 2, 7, 0])).unwrap();
    assert_eq!((&leaves["transition"], &leaves["after"]["a"]), (&json!("leave"), &json!(2)), "it is still its own row");
}

#[test]
fn hidden_columns_appear_nowhere_and_a_change_of_them_alone_is_no_event() {
    let plan = plan(None, None, &["secret"]);
    let value = shown(&plan, &update([1, 1, 7, 41], [1, 2, 7, 42])).unwrap();
    assert_eq!(value["changed"], json!(["a"]));
    let text = value.to_string();
    assert!(!text.contains("secret") && !text.contains("41") && !text.contains("42"), "{text}");
    assert_eq!(shown(&plan, &update([1, 1, 7, 41], [1, 1, 7, 42])), None);
    assert!(shown(&plan, &update([1, 1, 7, 41], [1, 1, 7, 41])).is_none(), "nothing changed that it may see");
    // A hidden key column is hidden in the key as well.
    let keyless = self::plan(None, None, &["id"]);
    let value = shown(&keyless, &event(Operation::Insert, None, Some([9, 1, 7, 0]))).unwrap();
    assert_eq!((&value["key"], value["after"].get("id")), (&json!({}), None));
}

#[test]
fn a_row_that_leaves_by_a_hidden_column_leaves() {
    // Otherwise the client would keep a row that is no longer its own.
    let plan = plan(None, Some("tenant = 7"), &["tenant"]);
    let leaves = shown(&plan, &update([1, 1, 7, 0], [1, 1, 8, 0])).unwrap();
    assert_eq!((&leaves["transition"], leaves.get("after")), (&json!("leave"), None));
    let enters = shown(&plan, &update([1, 1, 8, 0], [1, 1, 7, 0])).unwrap();
    assert_eq!((&enters["transition"], enters.get("before")), (&json!("enter"), None));
    assert!(!leaves.to_string().contains("tenant") && !enters.to_string().contains("tenant"));
}

#[test]
fn chosen_columns_narrow_the_images_but_not_the_key_nor_what_is_sent() {
    let mut plan = plan(None, None, &[]);
    plan.columns = Some(Arc::new(BTreeSet::from(["a".into()])));
    let value = shown(&plan, &update([1, 1, 7, 1], [1, 1, 8, 2])).unwrap();
    assert_eq!((&value["after"], &value["changed"], &value["key"]), (&json!({"a": 1}), &json!([]), &json!({"id": 1})));
}

#[test]
fn what_is_not_wished_for_is_not_shown_except_that_the_shape_changed() {
    let mut plan = plan(Some("a = 1"), None, &[]);
    plan.ops = OpSet::INSERT;
    assert_eq!(shown(&plan, &update([1, 1, 7, 0], [1, 1, 8, 0])), None);
    let schema = compose(Operation::Schema, None, None, None, Some(r#"{"changes":[],"columns":[]}"#), false);
    assert!(shown(&plan, &schema).is_some());
}

#[test]
fn a_plain_plan_passes_bytes_on() {
    let plan = plan(None, None, &[]);
    let event = update([1, 1, 7, 0], [1, 2, 7, 0]);
    let (mut ours, mut plain) = (Vec::new(), Vec::new());
    assert!(plan.is_plain() && plan.render(&Opened::new(&event), &mut ours));
    event.write_json(&mut plain);
    assert_eq!(ours, plain);
}
