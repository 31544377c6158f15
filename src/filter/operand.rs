//! Operands while a plan is made: what has a type, what has none yet, and how two of them meet.
//!
//! A string literal (and NULL) has no type until it meets an operator; then it takes the other
//! side's, and its text must be valid for it. Source of the rules: PostgreSQL manual, "Operators"
//! in "Type Conversion".

use std::borrow::Cow;

use super::FilterError;
use super::constant::{cast_constant, convert, literal, reason};
use super::json::Step;
use super::kind::ColumnType;
use super::plan::{Node, Scalar};
use super::server::Server;
use super::syntax::Comparison;
use super::value::{self, Fault, Value};

#[derive(Clone, Debug)]
pub(super) struct Operand {
    at: usize,
    form: Form,
    server: Server,
}

#[derive(Clone, Debug)]
enum Form {
    /// A string literal, or NULL.
    Untyped(Option<String>),
    Typed(Scalar, ColumnType),
}

impl Operand {
    pub(super) fn untyped(at: usize, text: Option<String>, server: Server) -> Self {
        Self { at, form: Form::Untyped(text), server }
    }

    pub(super) fn typed(at: usize, scalar: Scalar, kind: ColumnType, server: Server) -> Self {
        Self { at, form: Form::Typed(scalar, kind), server }
    }

    pub(super) fn constant(at: usize, value: Value<'static>, kind: ColumnType, server: Server) -> Self {
        Self::typed(at, Scalar::Const(Some(value), kind), kind, server)
    }

    pub(super) fn kind(&self) -> Option<ColumnType> {
        match &self.form {
            Form::Untyped(_) => None,
            Form::Typed(_, kind) => Some(*kind),
        }
    }

    pub(super) fn is_constant(&self) -> bool {
        matches!(self.form, Form::Untyped(_) | Form::Typed(Scalar::Const(..), _))
    }

    /// Bytes that a copy of a plain operand's texts takes.
    pub(super) fn text_bytes(&self) -> usize {
        match &self.form {
            Form::Untyped(text) => text.as_ref().map_or(0, String::len),
            Form::Typed(scalar, _) => scalar.text_bytes(),
        }
    }

    /// An untyped literal that nothing gives a type is text.
    pub(super) fn into_scalar(self) -> Scalar {
        match self.form {
            Form::Typed(scalar, _) => scalar,
            Form::Untyped(text) => Scalar::Const(text.map(|text| Value::Text(Cow::Owned(text))), ColumnType::Text),
        }
    }

    pub(super) fn into_condition(self) -> Result<Node, FilterError> {
        let at = self.at;
        match self.form {
            Form::Untyped(None) => Ok(Node::Const(None)),
            Form::Untyped(Some(text)) => match literal(at, &text, ColumnType::Bool, self.server)? {
                Value::Bool(value) => Ok(Node::Const(Some(value))),
                _ => Ok(Node::Const(None)),
            },
            Form::Typed(Scalar::Const(Some(Value::Bool(value)), _), _) => Ok(Node::Const(Some(value))),
            Form::Typed(Scalar::Const(None, _), ColumnType::Bool) => Ok(Node::Const(None)),
            Form::Typed(Scalar::Truth(node), _) => Ok(*node),
            Form::Typed(scalar, ColumnType::Bool) => Ok(Node::Test(scalar)),
            Form::Typed(_, kind) => Err(FilterError::new(
                at,
                format!("a condition must be boolean, this is {}; compare it with something", kind.sql_name()),
            )),
        }
    }

    pub(super) fn negated(self, at: usize) -> Result<Self, FilterError> {
        let refused = || FilterError::new(at, "a sign may stand only before a number".to_owned());
        let Form::Typed(Scalar::Const(value, kind), _) = self.form else {
            return Err(refused());
        };
        let value = match value {
            Some(Value::Int(value)) => {
                let negated = value.checked_neg().map(Value::Int).ok_or(Fault::Range);
                let fits = negated.and_then(|value| convert(value, kind));
                Some(fits.map_err(|fault| reason(at, fault, "the number", kind))?)
            }
            Some(Value::OwnedDecimal(value)) => Some(Value::OwnedDecimal(value.negated())),
            Some(Value::Float(value)) => Some(Value::Float(-value)),
            Some(_) => return Err(refused()),
            None => None,
        };
        Ok(Self::typed(at, Scalar::Const(value, kind), kind, self.server))
    }

    /// `self::target`.
    pub(super) fn cast(self, at: usize, target: ColumnType) -> Result<Self, FilterError> {
        let server = self.server;
        let scalar = match self.form {
            Form::Untyped(None) => Scalar::Const(None, target),
            Form::Untyped(Some(text)) => Scalar::Const(Some(literal(self.at, &text, target, server)?), target),
            Form::Typed(scalar, kind) if kind == target => scalar,
            Form::Typed(Scalar::Const(None, _), _) => Scalar::Const(None, target),
            Form::Typed(Scalar::Const(Some(Value::Text(text)), _), ColumnType::Text) => {
                Scalar::Const(Some(literal(self.at, &text, target, server)?), target)
            }
            Form::Typed(Scalar::Const(Some(value), from), _) => {
                Scalar::Const(Some(cast_constant(at, value, from, target)?), target)
            }
            Form::Typed(scalar, kind) if kind.is_text() => Scalar::Cast(Box::new(scalar), target, server),
            Form::Typed(_, kind) => {
                return Err(FilterError::new(
                    at,
                    format!(
                        "only literals, text columns and results of ->> can be cast, this is {}; compare it as it is",
                        kind.sql_name()
                    ),
                ));
            }
        };
        Ok(Self::typed(at, scalar, target, server))
    }

    /// `self -> key` or `self ->> key`.
    pub(super) fn step(self, at: usize, key: Self, text: bool) -> Result<Self, FilterError> {
        let server = self.server;
        let step = key.into_step()?;
        let refused = |what: &str| {
            FilterError::new(at, format!("-> and ->> take a json or jsonb column on their left, not {what}"))
        };
        let Form::Typed(scalar, kind) = self.form else {
            return Err(refused("a literal"));
        };
        if !kind.is_json() {
            return Err(refused(kind.sql_name()));
        }
        let result = if text { ColumnType::Text } else { kind };
        let scalar = match scalar {
            Scalar::Column(column, _) => {
                Scalar::Path { column, binary: kind == ColumnType::Jsonb, steps: vec![step], text }
            }
            Scalar::Path { column, binary, mut steps, .. } => {
                steps.push(step);
                Scalar::Path { column, binary, steps, text }
            }
            _ => return Err(refused("a literal")),
        };
        Ok(Self::typed(at, scalar, result, server))
    }

    fn into_step(self) -> Result<Step, FilterError> {
        match self.form {
            Form::Untyped(Some(text)) => return Ok(Step::Key(text.into())),
            Form::Typed(Scalar::Const(Some(Value::Text(text)), _), ColumnType::Text) => {
                return Ok(Step::Key(text.into()));
            }
            Form::Typed(Scalar::Const(Some(Value::Int(index)), _), ColumnType::Int2 | ColumnType::Int4) => {
                if let Ok(index) = i32::try_from(index) {
                    return Ok(Step::Index(index));
                }
            }
            _ => {}
        }
        Err(FilterError::new(
            self.at,
            "-> and ->> take a string (an object's key) or an integer (an array's index) on their right".to_owned(),
        ))
    }

    /// The left side of `LIKE`: text as it is, `character(n)` with its padding.
    pub(super) fn into_like_item(self, at: usize) -> Result<Scalar, FilterError> {
        match self.form {
            Form::Typed(Scalar::Column(name, ColumnType::Char), _) => Ok(Scalar::Column(name, ColumnType::Text)),
            Form::Typed(scalar, kind) if kind.is_text() => Ok(scalar),
            Form::Untyped(_) => Ok(self.into_scalar()),
            Form::Typed(_, kind) => {
                Err(FilterError::new(at, format!("LIKE and ILIKE take text, not {}", kind.sql_name())))
            }
        }
    }

    /// What `IS NULL` asks.
    pub(super) fn into_null_test(self, at: usize) -> Result<Node, FilterError> {
        if self.kind() == Some(ColumnType::Composite) {
            let reason = "IS NULL of a composite value asks for its fields, which is not part of the language";
            return Err(FilterError::new(at, reason.to_owned()));
        }
        Ok(Node::IsNull(self.into_scalar()))
    }

    pub(super) fn into_literal_text(self, what: &str) -> Result<Option<String>, FilterError> {
        match self.form {
            Form::Untyped(text) => Ok(text),
            Form::Typed(Scalar::Const(None, _), ColumnType::Text) => Ok(None),
            Form::Typed(Scalar::Const(Some(Value::Text(text)), _), ColumnType::Text) => Ok(Some(text.into_owned())),
            Form::Typed(..) => Err(FilterError::new(self.at, format!("{what} must be a string literal"))),
        }
    }
}

/// A numeric literal: the narrowest of integer, bigint and numeric, as in Postgres.
pub(super) fn number(at: usize, digits: &str, server: Server) -> Result<Operand, FilterError> {
    for kind in [ColumnType::Int4, ColumnType::Int8] {
        if let Ok(value) = value::read(kind, digits, server) {
            return Ok(Operand::constant(at, value.into_owned(), kind, server));
        }
    }
    let value = literal(at, digits, ColumnType::Numeric, server)?;
    Ok(Operand::constant(at, value, ColumnType::Numeric, server))
}

/// Both sides of a comparison as one type or as two that compare.
pub(super) fn resolve(
    left: Operand,
    right: Operand,
    comparison: Comparison,
    at: usize,
) -> Result<(Scalar, Scalar), FilterError> {
    match (left.form, right.form) {
        (Form::Untyped(left_text), Form::Untyped(right_text)) => Ok((
            Operand::untyped(left.at, left_text, left.server).into_scalar(),
            Operand::untyped(right.at, right_text, right.server).into_scalar(),
        )),
        (Form::Typed(scalar, kind), Form::Untyped(text)) => {
            let constant = beside((right.at, right.server), text, kind, comparison, at)?;
            Ok((scalar, constant))
        }
        (Form::Untyped(text), Form::Typed(scalar, kind)) => {
            let constant = beside((left.at, left.server), text, kind, comparison, at)?;
            Ok((constant, scalar))
        }
        (Form::Typed(left_scalar, left_kind), Form::Typed(right_scalar, right_kind)) => {
            if !left_kind.compares_with(right_kind) {
                return Err(no_operator(at, left_kind, right_kind.sql_name(), comparison));
            }
            check_strings(at, (&left_scalar, left_kind), (&right_scalar, right_kind))?;
            Ok((fitted(left_scalar, right_kind, left.at)?, fitted(right_scalar, left_kind, right.at)?))
        }
    }
}

/// `item = ANY (constants)`, all of them of the type `common`.
pub(super) fn list(item: Operand, constants: Vec<Operand>, common: ColumnType, at: usize) -> Result<Node, FilterError> {
    let mut list = Vec::with_capacity(constants.len());
    let mut has_null = false;
    let server = item.server;
    let item_kind = item.kind().unwrap_or(common);
    for constant in constants {
        let value = match constant.form {
            Form::Untyped(text) => beside((constant.at, server), text, common, Comparison::Equal, at)?,
            Form::Typed(Scalar::Const(value, _), _) => {
                let value = value.map(|value| convert(value, common)).transpose();
                let what = if common == ColumnType::Name { "the string" } else { "the number" };
                Scalar::Const(value.map_err(|fault| reason(constant.at, fault, what, common))?, common)
            }
            Form::Typed(scalar, _) => scalar,
        };
        match fitted(value, item_kind, constant.at)? {
            Scalar::Const(Some(value), _) => list.push(value),
            _ => has_null = true,
        }
    }
    let stand_in = Operand::typed(at, Scalar::Const(None, common), common, server);
    let item = match common {
        // Only literals meet an enum, and only an enum makes the common type one.
        ColumnType::Enum => item.into_scalar(),
        _ => resolve(item, stand_in, Comparison::Equal, at)?.0,
    };
    list.sort_by(|left, right| left.compare(right).unwrap_or(std::cmp::Ordering::Equal));
    list.dedup_by(|left, right| left.compare(right) == Some(std::cmp::Ordering::Equal));
    Ok(Node::In { item, list, kind: common, has_null })
}

/// An untyped literal as a constant of the type of the other side.
fn beside(
    (literal_at, server): (usize, Server),
    text: Option<String>,
    kind: ColumnType,
    comparison: Comparison,
    at: usize,
) -> Result<Scalar, FilterError> {
    let comparable = match kind {
        ColumnType::Enum => matches!(comparison, Comparison::Equal | Comparison::NotEqual),
        kind => kind.compares_with(kind),
    };
    if !comparable {
        return Err(no_operator(at, kind, "a literal", comparison));
    }
    let value = text.map(|text| literal(literal_at, &text, kind, server)).transpose()?;
    Ok(Scalar::Const(value, kind))
}

fn no_operator(at: usize, left: ColumnType, right: &str, comparison: Comparison) -> FilterError {
    let advice = match left {
        ColumnType::Json | ColumnType::Jsonb => "compare one of its fields as text: column ->> 'field'",
        ColumnType::Enum => "an enum is compared with string literals, by =, <> and IN",
        ColumnType::Composite => "a column of a composite type is not part of the language",
        ColumnType::Other => "a column of this type can only be tested by IS NULL",
        _ => "write the literal as the column's type, or cast it",
    };
    FilterError::new(
        at,
        format!("operator does not exist: {} {} {right}; {advice}", left.sql_name(), comparison.symbol()),
    )
}

/// `character(n)` beside a column of text: Postgres decides by whether that is `text` or
/// `varchar`, which is not known here.
fn check_strings(at: usize, left: (&Scalar, ColumnType), right: (&Scalar, ColumnType)) -> Result<(), FilterError> {
    let is_text_column =
        |side: (&Scalar, ColumnType)| matches!(side, (Scalar::Column(..), ColumnType::Text | ColumnType::Name));
    let is_padded = |side: (&Scalar, ColumnType)| side.1 == ColumnType::Char;
    if is_padded(left) && is_text_column(right) || is_text_column(left) && is_padded(right) {
        let reason = "a character(n) column and a text column do not compare here; compare each with a literal";
        return Err(FilterError::new(at, reason.to_owned()));
    }
    Ok(())
}

/// A constant beside a `real` or `double precision` becomes a double once, not for each row.
fn fitted(scalar: Scalar, beside: ColumnType, at: usize) -> Result<Scalar, FilterError> {
    match scalar {
        Scalar::Const(Some(value), kind) if beside.is_float() && !kind.is_float() => {
            let double = ColumnType::Float8;
            let value = convert(value, double).map_err(|fault| reason(at, fault, "the number", double))?;
            Ok(Scalar::Const(Some(value), double))
        }
        other => Ok(other),
    }
}
