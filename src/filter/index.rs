//! Index keys: bytes that are equal if and only if Postgres's `=` says that the values are.
//!
//! A filter whose top-level `AND` chain has `column = constant` (or `IN`) can only match rows whose
//! key for that column is one of its keys, so subscriptions are found by hash. Where equality is not
//! that of keys (an integer column beside a double) there is no conjunct.

use std::borrow::Borrow;

use smallvec::SmallVec;

use super::kind::ColumnType;
use super::moment;
use super::plan::{Node, Scalar};
use super::syntax::Comparison;
use super::value::{self, Value};

/// Bytes kept without allocation: a UUID, a short text.
const INLINE_BYTES: usize = 24;

/// A value in normal form. Keys of one column compare; keys of columns of different types do not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IndexKey(SmallVec<[u8; INLINE_BYTES]>);

impl IndexKey {
    /// The normal form.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    fn of(bytes: &[u8]) -> Self {
        Self(SmallVec::from_slice(bytes))
    }
}

/// Hashes like its bytes, so that a map can be asked with either.
impl Borrow<[u8]> for IndexKey {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// A condition on one column that every matching row satisfies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexConjunct {
    /// The column.
    pub column: String,
    /// Its type: what [`index_key_of`] is asked with.
    pub kind: ColumnType,
    /// The row's key must be one of these. None at all (`column = NULL`): no row ever matches.
    pub keys: Vec<IndexKey>,
}

/// The key of a row's value: `None` for NULL, for JSON that is not of the type, and for types
/// that have no keys. A row whose value has no key matches no filter that is indexed by the
/// column.
pub fn index_key_of(kind: ColumnType, raw_json: &str) -> Option<IndexKey> {
    if raw_json == "null" || kind.is_json() {
        return None;
    }
    value::from_json(kind, raw_json).map(|value| value_key(&value))
}

/// The conjunct with the fewest keys; booleans, which split rows badly, only for want of another.
pub(super) fn conjunct(node: &Node) -> Option<IndexConjunct> {
    let mut found: Vec<(bool, IndexConjunct)> = Vec::new();
    collect(node, &mut found);
    found.into_iter().min_by_key(|(boolean, conjunct)| (*boolean, conjunct.keys.len())).map(|(_, conjunct)| conjunct)
}

fn collect(node: &Node, found: &mut Vec<(bool, IndexConjunct)>) {
    let (name, kind, keys) = match node {
        Node::And(parts) => {
            for part in parts {
                collect(part, found);
            }
            return;
        }
        Node::Compare(Comparison::Equal, Scalar::Column(name, kind), Scalar::Const(value, _)) => {
            (name, *kind, value.iter().map(|value| key_for(*kind, value)).collect())
        }
        Node::In { item: Scalar::Column(name, kind), list, .. } => {
            (name, *kind, list.iter().map(|value| key_for(*kind, value)).collect())
        }
        _ => return,
    };
    let keys: Option<Vec<IndexKey>> = keys;
    if let Some(keys) = keys {
        let conjunct = IndexConjunct { column: name.to_string(), kind, keys };
        found.push((kind == ColumnType::Bool, conjunct));
    }
}

/// The key that rows of a column of type `kind` have if they equal `value`.
fn key_for(kind: ColumnType, value: &Value<'_>) -> Option<IndexKey> {
    use ColumnType::{
        Bool, Char, Date, Enum, Float4, Float8, Int2, Int4, Int8, Interval, Name, Numeric, Text, Time, TimeTz,
        Timestamp, TimestampTz, Uuid,
    };
    match (kind, value) {
        (Bool, Value::Bool(_))
        | (Int2 | Int4 | Int8 | Numeric, Value::Int(_) | Value::Decimal(_) | Value::OwnedDecimal(_))
        | (Float4 | Float8, Value::Float(_))
        | (Text | Name | Char | Enum, Value::Text(_))
        | (Uuid, Value::Uuid(_))
        | (Date, Value::Date(_))
        | (Time, Value::Time(_))
        | (Timestamp | TimestampTz, Value::Instant(_))
        | (TimeTz, Value::ZonedTime(_))
        | (Interval, Value::Span(_)) => Some(value_key(value)),
        (Timestamp | TimestampTz, Value::Date(days)) => Some(value_key(&Value::Instant(moment::midnight(*days)))),
        _ => None,
    }
}

/// Equal values of one column's type, and only those, have equal keys.
pub(super) fn value_key(value: &Value<'_>) -> IndexKey {
    let mut buffer = [0; 20];
    if let Some(decimal) = value.as_decimal(&mut buffer) {
        let mut key = IndexKey::default();
        decimal.write_key(|bytes| key.0.extend_from_slice(bytes));
        return key;
    }
    match value {
        Value::Text(text) => IndexKey::of(text.as_bytes()),
        Value::Bool(value) => IndexKey::of(&[u8::from(*value)]),
        Value::Float(value) => IndexKey::of(&normal_float(*value).to_bits().to_be_bytes()),
        Value::Uuid(value) => IndexKey::of(&value.to_be_bytes()),
        Value::Date(days) => IndexKey::of(&days.to_be_bytes()),
        Value::Time(micros) | Value::Instant(micros) => IndexKey::of(&micros.to_be_bytes()),
        Value::ZonedTime(time) => {
            let (utc, zone) = time.parts();
            let mut key = IndexKey::of(&utc.to_be_bytes());
            key.0.extend_from_slice(&zone.to_be_bytes());
            key
        }
        Value::Span(micros) => IndexKey::of(&micros.to_be_bytes()),
        Value::Int(_) | Value::Decimal(_) | Value::OwnedDecimal(_) | Value::Json => IndexKey::default(),
    }
}

/// One NaN, one zero.
fn normal_float(value: f64) -> f64 {
    if value.is_nan() {
        f64::NAN
    } else if value == 0.0 {
        0.0
    } else {
        value
    }
}
