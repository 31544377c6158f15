//! The normal text of a plan: two filters over columns of equal types with equal text are the same
//! filter.
//!
//! Operands of `AND`, `OR` and `IN` are sorted and deduplicated, names quoted, constants written in
//! one form with their type. The text is for comparing and hashing; it is not meant to be parsed
//! again.

use std::fmt::Write;

use super::index;
use super::json::Step;
use super::kind::ColumnType;
use super::plan::{Node, Scalar};
use super::syntax::Comparison;
use super::value::Value;

pub(super) fn text(node: &Node) -> String {
    match node {
        Node::Const(None) => "null".to_owned(),
        Node::Const(Some(value)) => value.to_string(),
        Node::Test(item) => scalar(item),
        Node::Compare(comparison, left, right) => compare(*comparison, left, right),
        Node::Same(left, right) => {
            let (left, right) = sorted_pair(scalar(left), scalar(right));
            format!("({left} is not distinct from {right})")
        }
        Node::In { item, list, kind, has_null } => {
            let mut elements: Vec<_> = list.iter().map(|value| constant(Some(value), *kind)).collect();
            if *has_null {
                elements.push("null".to_owned());
            }
            format!("({} in ({}))", scalar(item), elements.join(","))
        }
        Node::Like(item, None) => format!("({} like null)", scalar(item)),
        Node::Like(item, Some(pattern)) => format!(
            "({} {} {})",
            scalar(item),
            if pattern.folds() { "ilike" } else { "like" },
            quoted(pattern.text(), '\'')
        ),
        Node::IsNull(item) => format!("({} is null)", scalar(item)),
        Node::IsTruth(inner, truth) => {
            let truth = truth.map_or("unknown".to_owned(), |truth| truth.to_string());
            format!("({} is {truth})", text(inner))
        }
        Node::Not(inner) => format!("(not {})", text(inner)),
        Node::And(parts) => joined(parts, "and"),
        Node::Or(parts) => joined(parts, "or"),
    }
}

fn joined(parts: &[Node], operator: &str) -> String {
    let mut texts: Vec<_> = parts.iter().map(text).collect();
    texts.sort_unstable();
    texts.dedup();
    match texts.as_slice() {
        [only] => only.clone(),
        _ => format!("({operator} {})", texts.join(" ")),
    }
}

fn compare(comparison: Comparison, left: &Scalar, right: &Scalar) -> String {
    let (left, right) = (scalar(left), scalar(right));
    let (left, comparison, right) = match comparison {
        Comparison::Equal | Comparison::NotEqual => {
            let (left, right) = sorted_pair(left, right);
            (left, comparison, right)
        }
        Comparison::Greater | Comparison::GreaterOrEqual => (right, comparison.mirrored(), left),
        Comparison::Less | Comparison::LessOrEqual => (left, comparison, right),
    };
    format!("({left} {} {right})", comparison.symbol())
}

fn sorted_pair(left: String, right: String) -> (String, String) {
    if left <= right { (left, right) } else { (right, left) }
}

fn scalar(scalar: &Scalar) -> String {
    match scalar {
        Scalar::Const(value, kind) => constant(value.as_ref(), *kind),
        Scalar::Column(name, kind) => {
            // `character(n)` under LIKE is read as text, with its padding.
            let mark = if *kind == ColumnType::Text { "" } else { ":" };
            format!("{mark}{}", quoted(name, '"'))
        }
        Scalar::Path { column, steps, text, .. } => {
            let mut path = quoted(column, '"');
            for step in steps {
                path.push_str("->");
                match step {
                    Step::Key(key) => path.push_str(&quoted(key, '\'')),
                    Step::Index(index) => path.push_str(&index.to_string()),
                }
            }
            if *text {
                path.push_str("::text");
            }
            path
        }
        Scalar::Cast(inner, kind, _) => format!("({}::{})", self::scalar(inner), kind.sql_name()),
        Scalar::Truth(node) => text(node),
    }
}

/// The value's key bytes in hexadecimal: equal values of one type, and only those, look alike.
fn constant(value: Option<&Value<'_>>, kind: ColumnType) -> String {
    match value {
        None => "null".to_owned(),
        Some(Value::Text(text)) => quoted(text, '\''),
        Some(value) => {
            let mut text = format!("{}:", kind.sql_name());
            for byte in index::value_key(value).as_bytes() {
                // Writing to a string does not fail.
                let _ = write!(text, "{byte:02x}");
            }
            text
        }
    }
}

fn quoted(text: &str, quote: char) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push(quote);
    for character in text.chars() {
        if character == quote {
            quoted.push(quote);
        }
        quoted.push(character);
    }
    quoted.push(quote);
    quoted
}
