//! The language as a whole: what is accepted, refused and found true.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

struct Row(HashMap<&'static str, &'static str>);

impl RowImage for Row {
    fn column(&self, name: &str) -> Option<&str> {
        self.0.get(name).copied()
    }
}

fn columns() -> Vec<Column> {
    [
        ("id", ColumnType::Int4),
        ("big", ColumnType::Int8),
        ("price", ColumnType::Numeric),
        ("ratio", ColumnType::Float8),
        ("rough", ColumnType::Float4),
        ("name", ColumnType::Text),
        ("code", ColumnType::Char),
        ("status", ColumnType::Enum),
        ("active", ColumnType::Bool),
        ("ref", ColumnType::Uuid),
        ("day", ColumnType::Date),
        ("at", ColumnType::TimestampTz),
        ("payload", ColumnType::Json),
        ("doc", ColumnType::Jsonb),
        ("blob", ColumnType::Other),
        ("Mixed", ColumnType::Text),
    ]
    .map(|(name, kind)| Column::new(name, kind))
    .into()
}

fn compile(text: &str) -> Filter {
    Filter::compile(text, &columns()).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refusal(text: &str) -> FilterError {
    match Filter::compile(text, &columns()) {
        Ok(_) => panic!("{text} must be refused"),
        Err(error) => error,
    }
}

fn order() -> Row {
    Row(HashMap::from([
        ("id", "42"),
        ("big", "9007199254740993"),
        ("price", "10.50"),
        ("ratio", "\"NaN\""),
        ("rough", "0.1"),
        ("name", "\"caf\\u00e9 \\\"x\\\"\""),
        ("code", "\"ab  \""),
        ("status", "\"paid\""),
        ("active", "null"),
        ("ref", "\"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11\""),
        ("day", "\"2026-11-20\""),
        ("at", "\"2026-11-20T10:00:00.5+00:00\""),
        ("payload", "{\"n\": 7, \"s\": \"x\", \"z\": null, \"l\": [1, 2]}"),
        ("doc", "null"),
    ]))
}

fn eval(text: &str) -> Option<bool> {
    compile(text).eval(&order())
}

#[test]
fn conditions_are_true_false_or_null_as_in_sql() {
    for text in [
        "id = 42",
        "ID = '42' AND id <> 43",
        "big = 9007199254740993",
        "NOT big = 9007199254740992",
        "price = 10.5 AND price > 10",
        "ratio = 'NaN' AND ratio > 'Infinity'",
        "rough = '0.1' AND rough <> 0.1",
        "name LIKE 'caf_ \"%' AND name = 'café \"x\"'",
        "name ILIKE 'CAF%'",
        "code = 'ab' AND code LIKE 'ab  '",
        "status IN ('new', 'paid')",
        "status <> 'new'",
        "active IS NULL AND active IS UNKNOWN",
        "ref = 'A0EEBC999C0B4EF8BB6D6BB9BD380A11'",
        "day BETWEEN '2026-11-01' AND '2026-11-30'",
        "at = '2026-11-20 12:00:00.5+02' AND at >= date '2026-11-20'",
        "(payload->>'n')::int > 5 AND payload->>'s' = 'x'",
        "payload->'z' IS NOT NULL AND payload->>'z' IS NULL",
        "payload->'l'->>-1 = '2' AND payload -> 'l' ->> 0 = '1'",
        "active IS NOT DISTINCT FROM NULL",
        "id IN (1, 42, NULL)",
        "id <>-1 AND id >-1",
        "(payload->>'s')::int IS NULL",
        "(id = 42) = true",
        "id NOT IN (1, 2)",
        "id BETWEEN SYMMETRIC 50 AND 40",
        "cast('42' as bigint) = id",
    ] {
        assert_eq!(eval(text), Some(true), "{text}");
    }
    for text in ["id = 41", "id NOT IN (42, NULL)", "name LIKE 'x%'", "NOT (id = 42)", "id IS NULL"] {
        assert_eq!(eval(text), Some(false), "{text}");
    }
    for text in ["active", "id = NULL", "id IN (1, NULL)", "NOT active", "active AND id = 42", "doc->>'x' = 'y'"] {
        assert_eq!(eval(text), None, "{text}");
    }
}

#[test]
fn refusals_name_the_position_and_the_reason() {
    for (text, position, reason) in [
        ("", 1, "expected a column"),
        ("id = 1 ; DROP TABLE x", 8, "not part of the language"),
        ("id = 1 foo", 8, "found \"foo\""),
        ("name = 5", 6, "operator does not exist: text = integer"),
        ("id = 'x'", 6, "'x' is not a value of type integer"),
        ("id = '3000000000'", 6, "out of range"),
        ("missing = 1", 1, "no column \"missing\""),
        ("Mixed = 'x'", 1, "\"Mixed\""),
        ("lower(name) = 'x'", 1, "functions"),
        ("orders.id = 1", 1, "without its table's name"),
        ("user = 'x'", 1, "reserved word"),
        ("id", 1, "must be boolean, this is integer"),
        ("id = 1 = true", 8, "do not chain"),
        ("status < 'x'", 8, "an enum is compared"),
        ("payload = '{}'", 9, "->> 'field'"),
        ("blob = 'x'", 6, "IS NULL"),
        ("id LIKE '4%'", 4, "LIKE and ILIKE take text"),
        ("name LIKE Mixed", 11, "no column"),
        ("name LIKE name", 11, "must be a string literal"),
        ("name LIKE 'x\\'", 11, "must not end"),
        ("id::text = '42'", 3, "can be cast"),
        ("day > 'yesterday'", 7, "2026-11-20"),
        ("id + 1 = 2", 4, "found \"+\""),
        ("id = $1", 6, "not part of the language"),
        ("id = (SELECT 1)", 7, "reserved word"),
        ("(id, big) = (1, 2)", 4, "rows of several values"),
        ("id = 1::numeric(4,2)", 16, "no length or precision"),
        ("payload->name = 'x'", 10, "-> and ->> take a string"),
        ("price = 1e1000000", 9, "out of range"),
        ("id IN ()", 8, "expected a column"),
        ("(id = 1) IN (active, active)", 5, "take columns and literals"),
        ("name = 'x", 8, "Unterminated"),
    ] {
        let error = refusal(text);
        assert_eq!(error.position, position, "{text}: {error}");
        assert!(error.reason.contains(reason), "{text}: {error}");
    }
    assert!(refusal("id = 1 foo").to_string().starts_with("at character 8: "));
}

#[test]
fn a_long_text_is_refused_unread() {
    let text = format!("id = 1{}", " OR id = 1".repeat(1_000));
    assert!(refusal(&text).reason.contains("4096 are allowed"));
}

#[test]
fn hostile_nesting_neither_overflows_a_small_stack_nor_panics() {
    let hostile: Vec<String> = [
        ("(", "id = 1", ")"),
        ("NOT ", "active", ""),
        ("", "active", " IS NULL"),
        ("", "id = 1", " OR id = 1"),
        ("", "id = 1", " AND id = 1"),
        ("", "'1'", "::text"),
        ("", "payload", "->'a'"),
        ("- ", "1", ""),
        ("(active = ", "active", ")"),
        ("active IN (", "active", ")"),
        ("(", "active", " IN (active, active))"),
        ("", "'x' IN (name", ",name"),
        ("CAST(", "'1'", " AS text)"),
        ("(", "active", ") BETWEEN SYMMETRIC active AND active"),
        ("active = ANY(ARRAY[", "1", "])"),
        ("CASE WHEN ", "active", " THEN 1 END"),
        ("/*", "", ""),
    ]
    .iter()
    .map(|(before, middle, after)| {
        let count = MAX_FILTER_BYTES / (before.len() + after.len()) - 8;
        format!("{}{middle}{}", before.repeat(count), after.repeat(count))
    })
    .collect();
    // A quarter of what a thread has.
    let thread = std::thread::Builder::new().stack_size(512 * 1024).spawn(move || {
        for text in hostile {
            if let Ok(filter) = Filter::compile(&text, &columns()) {
                let _ = filter.eval(&order());
                assert!(filter.clone().canonical().len() < 64 * MAX_FILTER_BYTES, "{text}");
            }
        }
    });
    thread.expect("a thread").join().expect("no overflow, no panic");
}

#[test]
fn an_absent_column_is_neither_null_nor_false() {
    let row = Row(HashMap::from([("id", "1")]));
    let outcome = |text: &str| compile(text).eval_checked(&row);
    for text in [
        "name = 'x'",
        "name IS NULL",
        "name IS NOT NULL",
        "(name = 'x') IS UNKNOWN",
        "name IS DISTINCT FROM 'x'",
        "id = 1 AND name LIKE 'x%'",
        "NOT active",
        "name IN ('x')",
    ] {
        assert_eq!(outcome(text), Outcome::Undetermined, "{text}");
        assert_eq!(compile(text).eval(&row), None, "{text}");
    }
    assert_eq!(outcome("id = 1 OR name = 'x'"), Outcome::Matches);
    assert_eq!(outcome("id = 2 AND name = 'x'"), Outcome::Differs);
    assert_eq!(outcome("name = NULL"), Outcome::Differs);
}

#[test]
fn json_that_is_not_of_the_columns_type_cannot_be_judged() {
    let row = Row(HashMap::from([("id", "\"text\"")]));
    assert_eq!(compile("id = 1").eval_checked(&row), Outcome::Undetermined);
    assert_eq!(compile("id IS NOT NULL").eval_checked(&row), Outcome::Matches);
}

#[test]
fn equal_filters_have_equal_canonical_text() {
    for (left, right) in [
        ("id = 1 AND name = 'x'", "((name) = 'x') and \"id\" = 1"),
        ("1 = id", "id = '1'"),
        ("id > 1", "1 < id"),
        ("id IN (3, 1, 2, 1)", "id IN (1, 2, 3)"),
        ("price = 1.50", "price = '1.5'"),
        ("id BETWEEN 1 AND 2", "id <= 2 AND id >= 1"),
        ("name NOT LIKE 'a%'", "NOT name LIKE 'a%'"),
        ("code = 'ab '", "code = 'ab'"),
        ("NOT NOT active", "active"),
        ("at = '2026-11-20T00:00Z'", "at = '2026-11-20 02:00+02'"),
    ] {
        assert_eq!(compile(left).canonical(), compile(right).canonical());
    }
    for (left, right) in [
        ("name = 'a'' = ''b'", "name = 'a = b'"),
        ("name LIKE 'a%'", "name ILIKE 'a%'"),
        ("name LIKE 'a\\%'", "name LIKE 'a%'"),
        ("payload->'a'->'b' IS NULL", "payload->'a''->''b' IS NULL"),
        ("payload->'0' IS NULL", "payload->0 IS NULL"),
        ("id = 1 OR active", "id = 1 AND active"),
        ("active IS NULL", "active IS NOT TRUE"),
    ] {
        assert_ne!(compile(left).canonical(), compile(right).canonical());
    }
}

#[test]
fn columns_are_named_once() {
    let filter = compile("id = 1 AND (name = 'x' OR id > 5) AND payload->>'a' = 'b'");
    assert_eq!(filter.columns().collect::<Vec<_>>(), ["id", "name", "payload"]);
}

#[test]
fn an_equality_is_found_by_the_keys_of_matching_rows() {
    for (text, column, kind, hits, misses) in [
        ("id = 5 AND name LIKE 'x%'", "id", ColumnType::Int4, vec!["5"], vec!["6", "null"]),
        ("id = 5.0", "id", ColumnType::Int4, vec!["5"], vec!["50"]),
        ("price IN (1.5, 2)", "price", ColumnType::Numeric, vec!["1.50", "2", "2.000"], vec!["1.51", "\"NaN\""]),
        ("price = 'NaN'", "price", ColumnType::Numeric, vec!["\"NaN\""], vec!["0"]),
        ("ratio = 0", "ratio", ColumnType::Float8, vec!["0", "-0"], vec!["1e-300"]),
        ("rough = 0.5", "rough", ColumnType::Float4, vec!["0.5"], vec!["0.1"]),
        ("code = 'ab'", "code", ColumnType::Char, vec!["\"ab   \"", "\"ab\""], vec!["\" ab\""]),
        ("name = 'é\"'", "name", ColumnType::Text, vec!["\"é\\\"\"", "\"\\u00e9\\\"\""], vec!["\"e\""]),
        ("at = '2026-11-20'", "at", ColumnType::TimestampTz, vec!["\"2026-11-20T00:00:00+00:00\""], vec![]),
        ("status = 'paid'", "status", ColumnType::Enum, vec!["\"paid\""], vec!["\"new\""]),
        ("active = true AND id IN (1,2,3)", "id", ColumnType::Int4, vec!["1", "3"], vec!["4"]),
    ] {
        let conjunct = compile(text).index_conjunct().expect(text);
        assert_eq!(conjunct.column, column, "{text}");
        let found = |raw: &str| index_key_of(kind, raw).is_some_and(|key| conjunct.keys.contains(&key));
        for raw in hits {
            assert!(found(raw), "{text}: {raw}");
        }
        for raw in misses {
            assert!(!found(raw), "{text}: {raw}");
        }
    }
    assert_eq!(compile("id = NULL").index_conjunct().map(|conjunct| conjunct.keys.len()), Some(0));
    for text in [
        "id = 5 OR name = 'x'",
        "NOT id = 5",
        "id > 5",
        "id = 5::float8",
        "payload->>'a' = 'x'",
        "id = big",
        "id NOT IN (1)",
        "day = '2026-11-20'::timestamp",
    ] {
        assert_eq!(compile(text).index_conjunct(), None, "{text}");
    }
}

#[test]
fn domain_events_are_filtered_by_their_fields() {
    let filter = Filter::compile(
        "event_type = 'order.paid' AND aggregate_id::bigint > 10 AND payload->'total'->>'currency' = 'EUR'",
        &Filter::domain_event_columns(),
    )
    .expect("a sound condition");
    let row = Row(HashMap::from([
        ("aggregate_id", "\"42\""),
        ("event_type", "\"order.paid\""),
        ("payload", "{\"total\":{\"currency\":\"EUR\"}}"),
    ]));
    assert_eq!(filter.eval(&row), Some(true));
}

/// Pieces that occur in conditions, and some that do not.
const PIECES: &[&str] = &[
    "id",
    "big",
    "price",
    "ratio",
    "name",
    "code",
    "status",
    "active",
    "ref",
    "day",
    "at",
    "payload",
    "doc",
    "blob",
    "\"Mixed\"",
    "=",
    "<>",
    "<",
    "<=",
    ">",
    ">=",
    "AND",
    "OR",
    "NOT",
    "IS",
    "NULL",
    "TRUE",
    "FALSE",
    "UNKNOWN",
    "DISTINCT",
    "FROM",
    "IN",
    "BETWEEN",
    "SYMMETRIC",
    "LIKE",
    "ILIKE",
    "ESCAPE",
    "->",
    "->>",
    "::",
    "CAST",
    "AS",
    "int",
    "numeric",
    "text",
    "date",
    "timestamp",
    "with",
    "time",
    "zone",
    "interval",
    "(",
    ")",
    ",",
    "-",
    "+",
    "1",
    "0.5",
    "1e9",
    "1e999999",
    "'x'",
    "'1'",
    "''",
    "'%_\\'",
    "'2026-11-20'",
    "E'\\x41'",
    ".",
    ";",
    "$1",
    "[",
    "]",
    "--",
    "/*",
    "é",
    "\u{0}",
];

fn token() -> impl Strategy<Value = String> {
    let fixed = prop::sample::select(PIECES);
    prop_oneof![9 => fixed.prop_map(str::to_owned), 1 => "\\PC{0,6}"]
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,80}") {
        let _ = Filter::compile(&text, &columns());
    }

    #[test]
    fn no_tokens_make_it_panic(tokens in prop::collection::vec(token(), 0..40), blank in "[ \n]?") {
        let text = tokens.join(if blank.is_empty() { " " } else { &blank });
        match Filter::compile(&text, &columns()) {
            Ok(filter) => {
                let _ = filter.eval(&order());
                let _ = filter.index_conjunct();
            }
            Err(error) => {
                prop_assert!((1..=text.chars().count() + 1).contains(&error.position), "{text}: {error}");
            }
        }
    }
}
