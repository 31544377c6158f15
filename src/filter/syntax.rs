//! The syntax tree of a condition, of bounded height.
//!
//! Built by `parse`, read by `plan`. Every node knows the position to blame.

use std::cmp::Ordering;

use super::FilterError;
use super::kind::ColumnType;

/// Nesting of the syntax tree. Debug builds need about 2 KiB of stack for each level, a
/// thread has 2 MiB.
pub(super) const MAX_DEPTH: u16 = 64;

#[derive(Debug)]
pub(super) struct Syntax {
    /// Position of the token that stands for the node: an operator, a literal, a name.
    pub(super) at: usize,
    pub(super) kind: Kind,
    height: u16,
}

#[derive(Debug)]
pub(super) enum Kind {
    Column(String),
    Null,
    Bool(bool),
    /// A number with its sign, as written.
    Number(String),
    /// A string literal, which takes the type that its surroundings want.
    Text(String),
    Negated(Box<Syntax>),
    Cast(Box<Syntax>, ColumnType),
    /// `->` and, with `text`, `->>`.
    Path {
        json: Box<Syntax>,
        key: Box<Syntax>,
        text: bool,
    },
    Compare(Comparison, Box<Syntax>, Box<Syntax>),
    Distinct(Box<Syntax>, Box<Syntax>),
    In(Box<Syntax>, Vec<Syntax>),
    Between {
        item: Box<Syntax>,
        low: Box<Syntax>,
        high: Box<Syntax>,
        symmetric: bool,
    },
    Like {
        item: Box<Syntax>,
        pattern: Box<Syntax>,
        escape: Option<Box<Syntax>>,
        fold: bool,
    },
    IsNull(Box<Syntax>),
    /// `IS TRUE`, `IS FALSE`, and with `None` `IS UNKNOWN`.
    IsTruth(Box<Syntax>, Option<bool>),
    Not(Box<Syntax>),
    And(Vec<Syntax>),
    Or(Vec<Syntax>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Syntax {
    /// A node over sound nodes, unless it would stand too high.
    pub(super) fn new(at: usize, kind: Kind) -> Result<Self, FilterError> {
        let below = match &kind {
            Kind::Column(_) | Kind::Null | Kind::Bool(_) | Kind::Number(_) | Kind::Text(_) => 0,
            Kind::Negated(inner)
            | Kind::Cast(inner, _)
            | Kind::IsNull(inner)
            | Kind::IsTruth(inner, _)
            | Kind::Not(inner) => inner.height,
            Kind::Path { json: left, key: right, .. } | Kind::Compare(_, left, right) | Kind::Distinct(left, right) => {
                left.height.max(right.height)
            }
            Kind::In(item, elements) => item.height.max(highest(elements)),
            Kind::Between { item, low, high, .. } => item.height.max(low.height).max(high.height),
            Kind::Like { item, pattern, escape, .. } => {
                item.height.max(pattern.height).max(escape.as_ref().map_or(0, |escape| escape.height))
            }
            Kind::And(parts) | Kind::Or(parts) => highest(parts),
        };
        let height = below + 1;
        if height > MAX_DEPTH {
            return Err(too_deep(at));
        }
        Ok(Self { at, kind, height })
    }

    /// Whether the node is a column, a literal, a path or a cast of one: what may be planned
    /// twice at a bounded price.
    pub(super) fn is_plain(&self) -> bool {
        match &self.kind {
            Kind::Column(_) | Kind::Null | Kind::Bool(_) | Kind::Number(_) | Kind::Text(_) => true,
            Kind::Negated(inner) | Kind::Cast(inner, _) => inner.is_plain(),
            Kind::Path { json, key, .. } => json.is_plain() && key.is_plain(),
            _ => false,
        }
    }
}

fn highest(parts: &[Syntax]) -> u16 {
    parts.iter().map(|part| part.height).max().unwrap_or(0)
}

pub(super) fn too_deep(at: usize) -> FilterError {
    FilterError::new(at, format!("the condition is nested more than {MAX_DEPTH} levels deep; write it flatter"))
}

impl Comparison {
    /// The comparison with its sides exchanged.
    pub(super) fn mirrored(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessOrEqual => Self::GreaterOrEqual,
            Self::Greater => Self::Less,
            Self::GreaterOrEqual => Self::LessOrEqual,
            same => same,
        }
    }

    pub(super) fn holds(self, order: Ordering) -> bool {
        match self {
            Self::Equal => order.is_eq(),
            Self::NotEqual => order.is_ne(),
            Self::Less => order.is_lt(),
            Self::LessOrEqual => order.is_le(),
            Self::Greater => order.is_gt(),
            Self::GreaterOrEqual => order.is_ge(),
        }
    }

    pub(super) fn symbol(self) -> &'static str {
        match self {
            Self::Equal => "=",
            Self::NotEqual => "<>",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
        }
    }
}
