//! Constants: literals read as a type, cast, and fitted to what they are compared with; and the
//! reasons why one is refused.

use std::borrow::Cow;

use super::FilterError;
use super::kind::ColumnType;
use super::moment;
use super::server::Server;
use super::value::{self, Fault, Value};

/// Characters of a literal that a message repeats.
const QUOTED_CHARACTERS: usize = 40;

/// Most bytes of a `name`. Postgres cuts a longer literal off, by bytes of its own encoding.
const MAX_NAME_BYTES: usize = 63;

pub(super) fn literal(at: usize, text: &str, kind: ColumnType, server: Server) -> Result<Value<'static>, FilterError> {
    value::read(kind, text, server).and_then(short_name(kind)).map(Value::into_owned).map_err(|fault| {
        let mut shown: String = text.chars().take(QUOTED_CHARACTERS).collect();
        if shown.len() < text.len() {
            shown.push('…');
        }
        reason(at, fault, &format!("'{shown}'"), kind)
    })
}

fn short_name<'a>(kind: ColumnType) -> impl FnOnce(Value<'a>) -> Result<Value<'a>, Fault> {
    move |value| match &value {
        Value::Text(text) if kind == ColumnType::Name && text.len() > MAX_NAME_BYTES => Err(Fault::Range),
        _ => Ok(value),
    }
}

pub(super) fn reason(at: usize, fault: Fault, what: &str, kind: ColumnType) -> FilterError {
    let name = kind.sql_name();
    let advice = match kind {
        ColumnType::Date => "; write it as '2026-11-20'",
        ColumnType::Time | ColumnType::TimeTz => "; write it as '10:00:00'",
        ColumnType::Timestamp => "; write it as '2026-11-20T10:00:00'",
        ColumnType::TimestampTz => "; write it as '2026-11-20T10:00:00+00:00'",
        ColumnType::Interval => "; write it as '1 day 02:00:00' or 'P1DT2H'",
        _ => "",
    };
    FilterError::new(
        at,
        match fault {
            Fault::Syntax => format!("{what} is not a value of type {name}{advice}"),
            Fault::Range if kind == ColumnType::Name => {
                format!("{what} is longer than the {MAX_NAME_BYTES} bytes of a name; cast it to text")
            }
            Fault::Range => format!("{what} is out of range for type {name}"),
        },
    )
}

/// A constant as another type, by the casts that Postgres makes unasked. Types that compare with
/// each other as they are need no conversion.
pub(super) fn convert(value: Value<'static>, target: ColumnType) -> Result<Value<'static>, Fault> {
    let in_range = |value: i64, least: i64, greatest: i64| {
        if (least..=greatest).contains(&value) { Ok(Value::Int(value)) } else { Err(Fault::Range) }
    };
    match (target, value) {
        (ColumnType::Int2, Value::Int(value)) => in_range(value, i16::MIN.into(), i16::MAX.into()),
        (ColumnType::Int4, Value::Int(value)) => in_range(value, i32::MIN.into(), i32::MAX.into()),
        (ColumnType::Float4, Value::Int(value)) => Ok(Value::Float(f64::from(value as f32))),
        (ColumnType::Float4, Value::OwnedDecimal(value)) => Ok(Value::Float(f64::from(value.view().to_f32()?))),
        (ColumnType::Float8, value) => match value.as_float() {
            Some(float) => Ok(Value::Float(float)),
            None => Err(Fault::Range),
        },
        (ColumnType::Char, value @ Value::Text(_)) => match value {
            Value::Text(text) => value::read(ColumnType::Char, &text, Server::ANY).map(Value::into_owned),
            other => Ok(other),
        },
        (ColumnType::Name, value @ Value::Text(_)) => short_name(ColumnType::Name)(value),
        (_, value) => Ok(value),
    }
}

/// An explicit cast of a constant that is not text.
pub(super) fn cast_constant(
    at: usize,
    value: Value<'static>,
    from: ColumnType,
    target: ColumnType,
) -> Result<Value<'static>, FilterError> {
    use ColumnType::{Bool, Date, Float4, Float8, Int2, Int4, Int8, Numeric, Text, Timestamp, TimestampTz};
    let cast = match (value, target) {
        (value @ Value::Int(_), Int2 | Int4 | Int8 | Float4 | Float8 | Numeric) => convert(value, target),
        (value @ Value::OwnedDecimal(_), Float4 | Float8 | Numeric) => convert(value, target),
        (Value::OwnedDecimal(value), Int2 | Int4 | Int8) => {
            value.view().to_i64().and_then(|value| convert(Value::Int(value), target))
        }
        (Value::Float(value), Float8) => Ok(Value::Float(value)),
        (Value::Int(value), Bool) if from == Int4 => Ok(Value::Bool(value != 0)),
        (Value::Bool(value), Int4) => Ok(Value::Int(value.into())),
        (Value::Bool(value), Text) => Ok(Value::Text(Cow::Owned(value.to_string()))),
        (Value::Int(value), Text) => Ok(Value::Text(Cow::Owned(value.to_string()))),
        (value @ (Value::Date(_) | Value::Instant(_)), Timestamp | TimestampTz) => Ok(value),
        (Value::Instant(value), Date) => Ok(Value::Date(moment::day_of(value))),
        _ => {
            return Err(FilterError::new(
                at,
                format!(
                    "a literal of type {} cannot be cast to {} here; write it as a string, '…'::{}",
                    from.sql_name(),
                    target.sql_name(),
                    target.sql_name()
                ),
            ));
        }
    };
    cast.map_err(|fault| reason(at, fault, "the literal", target))
}
