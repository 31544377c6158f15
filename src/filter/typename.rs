//! Names of types in casts, and SQL's reserved words.

use super::FilterError;
use super::kind::ColumnType;
use super::lex::Tok;
use super::parse::Parser;

/// Words that Postgres does not take as a column's name without quotes ("reserved" in appendix C
/// of its manual), beyond those that the language itself uses. Some, like `user` and
/// `current_date`, are functions there: taken for columns they would mean something else.
const RESERVED: &[&str] = &[
    "all",
    "analyse",
    "analyze",
    "and",
    "any",
    "array",
    "as",
    "asc",
    "asymmetric",
    "authorization",
    "between",
    "binary",
    "both",
    "case",
    "cast",
    "check",
    "collate",
    "collation",
    "column",
    "concurrently",
    "constraint",
    "create",
    "cross",
    "current_catalog",
    "current_date",
    "current_role",
    "current_schema",
    "current_time",
    "current_timestamp",
    "current_user",
    "default",
    "deferrable",
    "desc",
    "distinct",
    "do",
    "else",
    "end",
    "except",
    "false",
    "fetch",
    "for",
    "foreign",
    "freeze",
    "from",
    "full",
    "grant",
    "group",
    "having",
    "ilike",
    "in",
    "initially",
    "inner",
    "intersect",
    "into",
    "is",
    "isnull",
    "join",
    "lateral",
    "leading",
    "left",
    "like",
    "limit",
    "localtime",
    "localtimestamp",
    "natural",
    "not",
    "notnull",
    "null",
    "offset",
    "on",
    "only",
    "or",
    "order",
    "outer",
    "overlaps",
    "placing",
    "primary",
    "references",
    "returning",
    "right",
    "select",
    "session_user",
    "similar",
    "some",
    "symmetric",
    "system_user",
    "table",
    "tablesample",
    "then",
    "to",
    "trailing",
    "true",
    "union",
    "unique",
    "user",
    "using",
    "variadic",
    "verbose",
    "when",
    "where",
    "window",
    "with",
];

const KNOWN: &str = "a type: boolean, smallint, integer, bigint, numeric, real, double precision, text, uuid, date, time, \
                     timestamp, timestamptz or interval";

pub(super) fn is_reserved(word: &str) -> bool {
    RESERVED.binary_search(&word).is_ok()
}

/// Reads a type's name where one must stand.
pub(super) fn parse(parser: &mut Parser) -> Result<ColumnType, FilterError> {
    let Some((kind, words)) = peek(parser) else {
        return Err(parser.unexpected(KNOWN));
    };
    parser.advance(words);
    match parser.peek() {
        Tok::Open => Err(FilterError::new(
            parser.position(),
            "a type takes no length or precision here; leave the parenthesis out".to_owned(),
        )),
        Tok::Foreign(symbol) if symbol == "[" => {
            Err(FilterError::new(parser.position(), "arrays are not part of the language of conditions".to_owned()))
        }
        _ => Ok(kind),
    }
}

/// Reads a type's name if a string follows it, as in `date '2026-11-20'`; leaves the string.
pub(super) fn before_literal(parser: &mut Parser) -> Result<Option<ColumnType>, FilterError> {
    let Some((kind, words)) = peek(parser) else {
        return Ok(None);
    };
    if !matches!(parser.peek_at(words), Tok::Text(_)) {
        return Ok(None);
    }
    parser.advance(words);
    Ok(Some(kind))
}

/// The type whose name stands next, and how many words it has.
fn peek(parser: &Parser) -> Option<(ColumnType, usize)> {
    let Tok::Word(first) = parser.peek() else {
        return None;
    };
    let simple = match first.as_str() {
        "bool" | "boolean" => ColumnType::Bool,
        "int2" | "smallint" => ColumnType::Int2,
        "int" | "int4" | "integer" => ColumnType::Int4,
        "int8" | "bigint" => ColumnType::Int8,
        "numeric" | "decimal" | "dec" => ColumnType::Numeric,
        "float4" | "real" => ColumnType::Float4,
        "float8" | "float" => ColumnType::Float8,
        "text" | "varchar" => ColumnType::Text,
        "uuid" => ColumnType::Uuid,
        "date" => ColumnType::Date,
        "timetz" => ColumnType::TimeTz,
        "timestamptz" => ColumnType::TimestampTz,
        "interval" => ColumnType::Interval,
        "double" if parser.is_word(1, "precision") => return Some((ColumnType::Float8, 2)),
        "character" if parser.is_word(1, "varying") => return Some((ColumnType::Text, 2)),
        "time" => return Some(zoned(parser, ColumnType::Time, ColumnType::TimeTz)),
        "timestamp" => {
            return Some(zoned(parser, ColumnType::Timestamp, ColumnType::TimestampTz));
        }
        _ => return None,
    };
    Some((simple, 1))
}

fn zoned(parser: &Parser, without: ColumnType, with: ColumnType) -> (ColumnType, usize) {
    let zone = parser.is_word(2, "time") && parser.is_word(3, "zone");
    if zone && parser.is_word(1, "with") {
        (with, 4)
    } else if zone && parser.is_word(1, "without") {
        (without, 4)
    } else {
        (without, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_words_are_found() {
        assert!(RESERVED.is_sorted());
        assert!(is_reserved("user"));
        assert!(is_reserved("current_date"));
        assert!(!is_reserved("status"));
        assert!(!is_reserved("date"));
    }
}
