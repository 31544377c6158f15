//! Evaluation of a plan over one row, in three-valued logic, with a fourth state for "cannot be
//! told".
//!
//! An outcome is the *set* of truths that are still possible: one for a row that has every
//! column, several where a column was not sent. The operators work on sets, so that
//! `absent OR true` is true, `absent AND false` is false, and `(absent = 1) IS UNKNOWN` is not
//! mistaken for true. Nothing here allocates for rows without JSON escapes, and nothing fails.

use std::borrow::Cow;
use std::cmp::Ordering;

use super::RowImage;
use super::json;
use super::kind::ColumnType;
use super::like::Pattern;
use super::plan::{Node, Scalar};
use super::value::{self, Value};

/// A set of possible truths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Truths(u8);

impl Truths {
    const NONE: Self = Self(0);
    const TRUE: Self = Self(1);
    const FALSE: Self = Self(2);
    const NULL: Self = Self(4);
    const ANY: Self = Self(7);

    fn of(truth: Option<bool>) -> Self {
        match truth {
            Some(true) => Self::TRUE,
            Some(false) => Self::FALSE,
            None => Self::NULL,
        }
    }

    /// The truth, if it is certain. The outer `None` is "cannot be told", the inner one NULL.
    pub(super) fn certain(self) -> Option<Option<bool>> {
        match self {
            Self::TRUE => Some(Some(true)),
            Self::FALSE => Some(Some(false)),
            Self::NULL => Some(None),
            _ => None,
        }
    }

    /// Whether the row may satisfy the condition.
    pub(super) fn may_be_true(self) -> bool {
        self.has(Self::TRUE)
    }

    fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    fn when(self, condition: bool) -> Self {
        if condition { self } else { Self::NONE }
    }

    fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn not(self) -> Self {
        Self::TRUE
            .when(self.has(Self::FALSE))
            .with(Self::FALSE.when(self.has(Self::TRUE)))
            .with(Self::NULL.when(self.has(Self::NULL)))
    }

    fn and(self, other: Self) -> Self {
        let not_false = Self::TRUE.with(Self::NULL);
        let null = self.has(Self::NULL) && other.has(not_false) || other.has(Self::NULL) && self.has(not_false);
        Self::TRUE
            .when(self.has(Self::TRUE) && other.has(Self::TRUE))
            .with(Self::FALSE.when(self.has(Self::FALSE) || other.has(Self::FALSE)))
            .with(Self::NULL.when(null))
    }

    fn or(self, other: Self) -> Self {
        self.not().and(other.not()).not()
    }

    /// `IS TRUE`, `IS FALSE`, `IS UNKNOWN`.
    fn is(self, truth: Option<bool>) -> Self {
        let wanted = Self::of(truth);
        Self::TRUE.when(self.has(wanted)).with(Self::FALSE.when(self.0 & !wanted.0 != 0))
    }
}

/// What a scalar is in a row.
enum Cell<'a> {
    /// Not sent, or not of the column's type.
    Absent,
    Null,
    Is(Value<'a>),
}

pub(super) fn truths(node: &Node, row: &dyn RowImage) -> Truths {
    match node {
        Node::Const(truth) => Truths::of(*truth),
        Node::Test(item) => test(item, row),
        Node::Compare(comparison, left, right) => {
            match (cell(left, row), cell(right, row)) {
                // NULL decides even beside a column that is not there.
                (Cell::Null, _) | (_, Cell::Null) => Truths::NULL,
                (Cell::Absent, _) | (_, Cell::Absent) => Truths::ANY,
                (Cell::Is(left), Cell::Is(right)) => {
                    Truths::of(left.compare(&right).map(|order| comparison.holds(order)))
                }
            }
        }
        Node::Same(left, right) => match (cell(left, row), cell(right, row)) {
            (Cell::Absent, _) | (_, Cell::Absent) => Truths::TRUE.with(Truths::FALSE),
            (Cell::Null, Cell::Null) => Truths::TRUE,
            (Cell::Null, _) | (_, Cell::Null) => Truths::FALSE,
            (Cell::Is(left), Cell::Is(right)) => Truths::of(left.compare(&right).map(Ordering::is_eq)),
        },
        Node::In { item, list, has_null, .. } => contains(item, list, *has_null, row),
        Node::Like(_, None) => Truths::NULL,
        Node::Like(item, Some(pattern)) => like(item, pattern, row),
        Node::IsNull(item) => is_null(item, row),
        Node::IsTruth(inner, truth) => truths(inner, row).is(*truth),
        Node::Not(inner) => truths(inner, row).not(),
        Node::And(parts) => all(parts, row),
        Node::Or(parts) => any(parts, row),
    }
}

fn all(parts: &[Node], row: &dyn RowImage) -> Truths {
    let mut result = Truths::TRUE;
    for part in parts {
        result = result.and(truths(part, row));
        if result == Truths::FALSE || row.is_interrupted() {
            break;
        }
    }
    result
}

fn any(parts: &[Node], row: &dyn RowImage) -> Truths {
    let mut result = Truths::FALSE;
    for part in parts {
        result = result.or(truths(part, row));
        if result == Truths::TRUE || row.is_interrupted() {
            break;
        }
    }
    result
}

fn like(item: &Scalar, pattern: &Pattern, row: &dyn RowImage) -> Truths {
    if let Scalar::Column(name, ColumnType::Text) = item
        && pattern.folds()
    {
        // The image keeps the folded text for the next condition on the column.
        return match row.column(name) {
            Some(NULL_JSON) => Truths::NULL,
            Some(raw) => {
                row.text(raw, true).map_or(Truths::ANY, |text| Truths::of(Some(pattern.matches_folded(&text))))
            }
            None => Truths::ANY,
        };
    }
    match cell(item, row) {
        Cell::Absent => Truths::ANY,
        Cell::Is(Value::Text(text)) => Truths::of(Some(pattern.matches(&text))),
        Cell::Null | Cell::Is(_) => Truths::NULL,
    }
}

fn test(item: &Scalar, row: &dyn RowImage) -> Truths {
    match cell(item, row) {
        Cell::Absent => Truths::ANY,
        Cell::Is(Value::Bool(value)) => Truths::of(Some(value)),
        Cell::Null | Cell::Is(_) => Truths::NULL,
    }
}

fn contains(item: &Scalar, list: &[Value<'static>], has_null: bool, row: &dyn RowImage) -> Truths {
    let value = match cell(item, row) {
        Cell::Absent => return Truths::ANY,
        Cell::Null => return Truths::NULL,
        Cell::Is(value) => value,
    };
    // A `numeric` that no double can hold compares with no double: Postgres would raise an error.
    let mut comparable = true;
    let found = list.binary_search_by(|element| {
        element.view().compare(&value).unwrap_or_else(|| {
            comparable = false;
            Ordering::Less
        })
    });
    match found {
        Ok(_) => Truths::TRUE,
        Err(_) if has_null || !comparable => Truths::NULL,
        Err(_) => Truths::FALSE,
    }
}

/// Asks only for the JSON's presence, so that it works for every type.
fn is_null(item: &Scalar, row: &dyn RowImage) -> Truths {
    match item {
        Scalar::Column(name, _) => match row.column(name) {
            None => Truths::TRUE.with(Truths::FALSE),
            Some(raw) => Truths::of(Some(raw == NULL_JSON)),
        },
        item => match cell(item, row) {
            Cell::Absent => Truths::TRUE.with(Truths::FALSE),
            Cell::Null => Truths::TRUE,
            Cell::Is(_) => Truths::FALSE,
        },
    }
}

/// How a row's JSON writes SQL's NULL.
const NULL_JSON: &str = "null";

fn cell<'a>(scalar: &'a Scalar, row: &'a dyn RowImage) -> Cell<'a> {
    match scalar {
        Scalar::Column(name, kind) => match row.column(name) {
            None => Cell::Absent,
            Some(NULL_JSON) => Cell::Null,
            // Decoded once a row, however many conditions ask.
            Some(raw) if matches!(kind, ColumnType::Text | ColumnType::Enum) => {
                row.text(raw, false).map_or(Cell::Absent, |text| Cell::Is(Value::Text(text)))
            }
            Some(raw) => value::from_json(*kind, raw).map_or(Cell::Absent, Cell::Is),
        },
        Scalar::Const(value, _) => match value {
            None => Cell::Null,
            Some(value) => Cell::Is(value.view()),
        },
        Scalar::Path { column, binary, steps, text } => match row.column(column) {
            None => Cell::Absent,
            Some(NULL_JSON) => Cell::Null,
            Some(raw) => match json::follow(raw, steps, *binary) {
                None => Cell::Null,
                Some(_) if !text => Cell::Is(Value::Json),
                Some(found) if found.starts_with('"') => {
                    row.text(found, false).map_or(Cell::Null, |text| Cell::Is(Value::Text(text)))
                }
                Some(found) => json::as_text(found).map_or(Cell::Null, |text| Cell::Is(Value::Text(text))),
            },
        },
        Scalar::Cast(inner, kind, server) => match cell(inner, row) {
            Cell::Is(Value::Text(Cow::Borrowed(text))) => {
                value::read(*kind, text, *server).map_or(Cell::Null, Cell::Is)
            }
            Cell::Is(Value::Text(Cow::Owned(text))) => {
                value::read(*kind, &text, *server).map_or(Cell::Null, |value| Cell::Is(value.into_owned()))
            }
            Cell::Is(_) => Cell::Null,
            absent_or_null => absent_or_null,
        },
        Scalar::Truth(node) => match truths(node, row).certain() {
            Some(Some(value)) => Cell::Is(Value::Bool(value)),
            Some(None) => Cell::Null,
            None => Cell::Absent,
        },
    }
}
