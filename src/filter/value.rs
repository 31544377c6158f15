//! Values: read from a row's JSON, read from text as Postgres's input functions do, compared in
//! Postgres's order.
//!
//! A [`Value`] borrows from the row or from a constant; nothing is copied for the common types.
//! Which types may meet is decided by `plan`; here values of different domains simply do not
//! compare. Knows no columns and no syntax.

use std::borrow::Cow;
use std::cmp::Ordering;

use super::decimal::{Decimal, OwnedDecimal};
use super::digits;
use super::interval;
use super::json;
use super::kind::ColumnType;
use super::moment::{self, ZonedTime};
use super::server::Server;

/// Why a text is not a value of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Not the type's form.
    Syntax,
    /// The right form, but out of the type's range.
    Range,
}

#[derive(Clone, Debug)]
pub(super) enum Value<'a> {
    Bool(bool),
    Int(i64),
    Decimal(Decimal<'a>),
    OwnedDecimal(OwnedDecimal),
    /// Also `real`, widened, as Postgres compares the two.
    Float(f64),
    /// Also enum labels, and `character(n)` without its trailing blanks.
    Text(Cow<'a, str>),
    Uuid(u128),
    /// Days since 2000-01-01.
    Date(i32),
    /// Microseconds since midnight.
    Time(i64),
    ZonedTime(ZonedTime),
    /// Microseconds since 2000-01-01 UTC, with or without time zone.
    Instant(i64),
    /// Microseconds, with months of 30 days.
    Span(i128),
    /// Found by a path; only ever tested for NULL.
    Json,
}

impl Value<'_> {
    /// The same value, borrowed.
    pub(super) fn view(&self) -> Value<'_> {
        match self {
            Self::OwnedDecimal(owned) => Value::Decimal(owned.view()),
            Self::Text(text) => Value::Text(Cow::Borrowed(text)),
            Self::Decimal(decimal) => Value::Decimal(*decimal),
            Self::Bool(value) => Value::Bool(*value),
            Self::Int(value) => Value::Int(*value),
            Self::Float(value) => Value::Float(*value),
            Self::Uuid(value) => Value::Uuid(*value),
            Self::Date(value) => Value::Date(*value),
            Self::Time(value) => Value::Time(*value),
            Self::ZonedTime(value) => Value::ZonedTime(*value),
            Self::Instant(value) => Value::Instant(*value),
            Self::Span(value) => Value::Span(*value),
            Self::Json => Value::Json,
        }
    }

    /// The same value, owned.
    pub(super) fn into_owned(self) -> Value<'static> {
        match self {
            Self::Decimal(decimal) => Value::OwnedDecimal(decimal.to_owned()),
            Self::OwnedDecimal(owned) => Value::OwnedDecimal(owned),
            Self::Text(text) => Value::Text(Cow::Owned(text.into_owned())),
            Self::Bool(value) => Value::Bool(value),
            Self::Int(value) => Value::Int(value),
            Self::Float(value) => Value::Float(value),
            Self::Uuid(value) => Value::Uuid(value),
            Self::Date(value) => Value::Date(value),
            Self::Time(value) => Value::Time(value),
            Self::ZonedTime(value) => Value::ZonedTime(value),
            Self::Instant(value) => Value::Instant(value),
            Self::Span(value) => Value::Span(value),
            Self::Json => Value::Json,
        }
    }

    /// Postgres's order; `None` where the values do not compare.
    pub(super) fn compare(&self, other: &Self) -> Option<Ordering> {
        use Value::{Bool, Date, Float, Instant, Int, Span, Text, Time, Uuid};
        Some(match (self, other) {
            (Text(left), Text(right)) => left.as_bytes().cmp(right.as_bytes()),
            (Int(left), Int(right)) => left.cmp(right),
            (Bool(left), Bool(right)) => left.cmp(right),
            (Uuid(left), Uuid(right)) => left.cmp(right),
            (Instant(left), Instant(right)) | (Time(left), Time(right)) => left.cmp(right),
            (Date(left), Date(right)) => left.cmp(right),
            (Date(left), Instant(right)) => moment::midnight(*left).cmp(right),
            (Instant(left), Date(right)) => left.cmp(&moment::midnight(*right)),
            (Float(left), Float(right)) => compare_floats(*left, *right),
            (Float(left), right) => compare_floats(*left, right.as_float()?),
            (left, Float(right)) => compare_floats(left.as_float()?, *right),
            (Span(left), Span(right)) => left.cmp(right),
            (left, right) => match (left.as_zoned_time(), right.as_zoned_time()) {
                (Some(left), Some(right)) => left.compare(right),
                _ => return compare_decimals(left, right),
            },
        })
    }

    /// As `double precision`; a `numeric` that no double can hold is an error in Postgres, and
    /// here does not compare.
    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            // The nearest double, as in Postgres.
            Self::Int(value) => Some(*value as f64),
            Self::Decimal(value) => value.to_f64().ok(),
            Self::OwnedDecimal(value) => value.view().to_f64().ok(),
            _ => None,
        }
    }

    fn as_zoned_time(&self) -> Option<ZonedTime> {
        match self {
            Self::Time(micros) => Some(ZonedTime::utc(*micros)),
            Self::ZonedTime(time) => Some(*time),
            _ => None,
        }
    }

    pub(super) fn as_decimal<'b>(&'b self, buffer: &'b mut [u8; 20]) -> Option<Decimal<'b>> {
        match self {
            Self::Decimal(decimal) => Some(*decimal),
            Self::OwnedDecimal(owned) => Some(owned.view()),
            Self::Int(value) => Some(Decimal::of_int(*value, buffer)),
            _ => None,
        }
    }
}

fn compare_decimals(left: &Value<'_>, right: &Value<'_>) -> Option<Ordering> {
    let (mut left_buffer, mut right_buffer) = ([0; 20], [0; 20]);
    let left = left.as_decimal(&mut left_buffer)?;
    let right = right.as_decimal(&mut right_buffer)?;
    Some(left.compare(&right))
}

/// Postgres's `float8` order: NaN equals NaN and is above infinity; the zeros are equal.
fn compare_floats(left: f64, right: f64) -> Ordering {
    left.partial_cmp(&right).unwrap_or_else(|| left.is_nan().cmp(&right.is_nan()))
}

/// A column's value from its JSON, which is not `null`. `None`: the JSON is not of this type (a
/// row from before a change of the column's type).
pub(super) fn from_json(kind: ColumnType, raw: &str) -> Option<Value<'_>> {
    match kind {
        ColumnType::Text | ColumnType::Name | ColumnType::Enum => json::string_content(raw).map(Value::Text),
        ColumnType::Int2 | ColumnType::Int4 | ColumnType::Int8 => raw.parse().ok().map(Value::Int),
        ColumnType::Bool => match raw {
            "true" => Some(Value::Bool(true)),
            "false" => Some(Value::Bool(false)),
            _ => None,
        },
        ColumnType::Numeric => Decimal::parse(unquoted(raw)).ok().map(Value::Decimal),
        ColumnType::Char => json::string_content(raw).map(|text| Value::Text(without_padding(text))),
        ColumnType::Json | ColumnType::Jsonb => Some(Value::Json),
        ColumnType::Composite | ColumnType::Other => None,
        _ => match json::string_content(raw) {
            Some(Cow::Borrowed(text)) => read(kind, text, Server::ANY).ok(),
            Some(Cow::Owned(text)) => read(kind, &text, Server::ANY).ok().map(Value::into_owned),
            None => read(kind, raw, Server::ANY).ok(),
        },
    }
}

/// Numbers come bare, `"NaN"` and the infinities as strings.
fn unquoted(raw: &str) -> &str {
    raw.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(raw)
}

/// Without trailing blanks, which do not count in comparisons of `character(n)`.
fn without_padding(text: Cow<'_, str>) -> Cow<'_, str> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(text.trim_end_matches(' ')),
        Cow::Owned(mut text) => {
            text.truncate(text.trim_end_matches(' ').len());
            Cow::Owned(text)
        }
    }
}

/// Reads `text` as Postgres's input function of the type does. Not for json, and for enums without
/// a check of the label.
pub(super) fn read(kind: ColumnType, text: &str, server: Server) -> Result<Value<'_>, Fault> {
    let trimmed = text.trim_matches(moment::is_blank);
    Ok(match kind {
        ColumnType::Text | ColumnType::Name | ColumnType::Enum => Value::Text(Cow::Borrowed(text)),
        ColumnType::Char => Value::Text(without_padding(Cow::Borrowed(text))),
        ColumnType::Bool => Value::Bool(read_bool(trimmed)?),
        ColumnType::Int2 => Value::Int(read_int(trimmed, i64::from(i16::MIN), i64::from(i16::MAX), server)?),
        ColumnType::Int4 => Value::Int(read_int(trimmed, i64::from(i32::MIN), i64::from(i32::MAX), server)?),
        ColumnType::Int8 => Value::Int(read_int(trimmed, i64::MIN, i64::MAX, server)?),
        ColumnType::Numeric => read_numeric(trimmed, server)?,
        ColumnType::Float4 => Value::Float(read_float4(trimmed)?),
        ColumnType::Float8 => Value::Float(read_float8(trimmed)?),
        ColumnType::Uuid => Value::Uuid(read_uuid(text)?),
        ColumnType::Date => Value::Date(moment::parse_date(text, server)?),
        ColumnType::Time => Value::Time(moment::parse_time(text)?),
        ColumnType::TimeTz => Value::ZonedTime(moment::parse_zoned_time(text)?),
        ColumnType::Timestamp => Value::Instant(moment::parse_timestamp(text, server)?),
        ColumnType::TimestampTz => Value::Instant(moment::parse_timestamptz(text, server)?),
        ColumnType::Interval => Value::Span(interval::parse(text, server)?),
        ColumnType::Json | ColumnType::Jsonb | ColumnType::Composite | ColumnType::Other => return Err(Fault::Syntax),
    })
}

/// `boolin`: unambiguous beginnings of true, false, yes, no, and on, off, 1, 0.
fn read_bool(text: &str) -> Result<bool, Fault> {
    let begins = |word: &str, least: usize| {
        text.len() >= least && word.get(..text.len()).is_some_and(|start| start.eq_ignore_ascii_case(text))
    };
    if begins("true", 1) || begins("yes", 1) || begins("on", 2) || text == "1" {
        Ok(true)
    } else if begins("false", 1) || begins("no", 1) || begins("off", 2) || text == "0" {
        Ok(false)
    } else {
        Err(Fault::Syntax)
    }
}

fn read_int(text: &str, least: i64, greatest: i64, server: Server) -> Result<i64, Fault> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if server.reads_digit_forms() && digits::is_written_otherwise(digits) {
        let size = digits::read_integer(digits)?;
        let size = i128::try_from(size).map_err(|_| Fault::Range)?;
        let value = if text.starts_with('-') { -size } else { size };
        return match i64::try_from(value) {
            Ok(value) if (least..=greatest).contains(&value) => Ok(value),
            _ => Err(Fault::Range),
        };
    }
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Fault::Syntax);
    }
    match text.parse() {
        Ok(value) if (least..=greatest).contains(&value) => Ok(value),
        _ => Err(Fault::Range),
    }
}

fn read_numeric(text: &str, server: Server) -> Result<Value<'_>, Fault> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !server.reads_digit_forms() || !digits::is_written_otherwise(digits) {
        return Decimal::parse(text).map(Value::Decimal);
    }
    let plain = digits::plain_numeric(digits)?;
    let sign = if text.starts_with('-') { "-" } else { "" };
    Ok(Value::OwnedDecimal(Decimal::parse(&format!("{sign}{plain}"))?.to_owned()))
}

fn read_float8(text: &str) -> Result<f64, Fault> {
    let value: f64 = text.parse().map_err(|_| Fault::Syntax)?;
    if is_sound(text, value.is_infinite(), value == 0.0) { Ok(value) } else { Err(Fault::Range) }
}

/// Rounded once, to single precision, then widened without loss.
pub(super) fn read_float4(text: &str) -> Result<f64, Fault> {
    let value: f32 = text.parse().map_err(|_| Fault::Syntax)?;
    if is_sound(text, value.is_infinite(), value == 0.0) { Ok(f64::from(value)) } else { Err(Fault::Range) }
}

/// Postgres refuses numbers that overflow to infinity or vanish to zero.
fn is_sound(text: &str, infinite: bool, zero: bool) -> bool {
    let mantissa = text.split(['e', 'E']).next().unwrap_or(text);
    let written_infinite = text.contains(['n', 'N']);
    let written_zero = !mantissa.bytes().any(|byte| matches!(byte, b'1'..=b'9'));
    infinite <= written_infinite && zero <= written_zero
}

/// `uuid_in`: 32 hex digits, a hyphen allowed after each group of four, braces allowed around.
fn read_uuid(text: &str) -> Result<u128, Fault> {
    let bare = match text.strip_prefix('{') {
        Some(rest) => rest.strip_suffix('}').ok_or(Fault::Syntax)?,
        None => text,
    };
    let mut value: u128 = 0;
    let mut count = 0;
    let mut hyphen_allowed = false;
    for byte in bare.bytes() {
        if byte == b'-' && hyphen_allowed {
            hyphen_allowed = false;
            continue;
        }
        let digit = char::from(byte).to_digit(16).ok_or(Fault::Syntax)?;
        if count == 32 {
            return Err(Fault::Syntax);
        }
        value = value << 4 | u128::from(digit);
        count += 1;
        hyphen_allowed = count % 4 == 0 && count < 32;
    }
    if count == 32 { Ok(value) } else { Err(Fault::Syntax) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(kind: ColumnType, left: &str, right: &str) -> Option<Ordering> {
        from_json(kind, left)?.compare(&from_json(kind, right)?)
    }

    #[test]
    fn nan_is_equal_to_itself_and_above_infinity() {
        for kind in [ColumnType::Float4, ColumnType::Float8, ColumnType::Numeric] {
            assert_eq!(order(kind, "\"NaN\"", "\"NaN\""), Some(Ordering::Equal));
            assert_eq!(order(kind, "\"NaN\"", "\"Infinity\""), Some(Ordering::Greater));
            assert_eq!(order(kind, "-0", "0"), Some(Ordering::Equal));
        }
    }

    #[test]
    fn a_real_is_rounded_once() {
        let real = from_json(ColumnType::Float4, "0.1");
        assert!(matches!(real, Some(Value::Float(value)) if value == f64::from(0.1_f32)));
    }

    #[test]
    fn uuids_are_read_in_every_form_that_postgres_takes() {
        let plain = read_uuid("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11");
        for text in [
            "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11",
            "{a0eebc99-9c0b4ef8-bb6d6bb9-bd380a11}",
            "a0eebc999c0b4ef8bb6d6bb9bd380a11",
            "a0ee-bc99-9c0b-4ef8-bb6d-6bb9-bd38-0a11",
        ] {
            assert_eq!(read_uuid(text), plain, "{text}");
        }
        for text in [
            "",
            "a0eebc99",
            "a0eebc99--9c0b4ef8bb6d6bb9bd380a11",
            "a0eebc999c0b4ef8bb6d6bb9bd380a11-",
            "{a0eebc999c0b4ef8bb6d6bb9bd380a11",
        ] {
            assert_eq!(read_uuid(text), Err(Fault::Syntax), "{text}");
        }
    }

    #[test]
    fn booleans_are_read_by_their_beginnings() {
        for (text, value) in [
            ("t", Ok(true)),
            ("TRUE", Ok(true)),
            ("ye", Ok(true)),
            ("of", Ok(false)),
            ("o", Err(Fault::Syntax)),
            ("", Err(Fault::Syntax)),
            ("truer", Err(Fault::Syntax)),
        ] {
            assert_eq!(read_bool(text), value, "{text}");
        }
    }

    #[test]
    fn numbers_out_of_range_are_told_from_malformed_ones() {
        assert_eq!(read(ColumnType::Int2, "32768", Server::default()).err(), Some(Fault::Range));
        assert_eq!(read(ColumnType::Int8, "1.5", Server::default()).err(), Some(Fault::Syntax));
        assert_eq!(read(ColumnType::Float8, "1e400", Server::default()).err(), Some(Fault::Range));
        assert_eq!(read(ColumnType::Float8, "1e-400", Server::default()).err(), Some(Fault::Range));
        assert!(read(ColumnType::Float8, "-inf", Server::default()).is_ok());
        assert!(read(ColumnType::Float8, "0e-400", Server::default()).is_ok());
        assert!(read(ColumnType::Int4, " 7 ", Server::default()).is_ok());
    }
}
