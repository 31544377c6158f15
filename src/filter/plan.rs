//! Syntax to a typed plan: names looked up, literals given their types, operators resolved as
//! Postgres resolves them.
//!
//! What Postgres would refuse at parse time is refused here, with the position; what is left
//! cannot fail. `BETWEEN`, `NOT IN` and their like are spelled out, so that evaluation, canonical
//! text and index keys know few nodes. Knows no rows.

use super::json::Step;
use super::kind::{ColumnType, common_type};
use super::like::Pattern;
use super::operand::{self, Operand};
use super::server::Server;
use super::syntax::{Comparison, Kind, Syntax};
use super::value::Value;
use super::{Column, FilterError};

/// Nodes of a plan, and copies of literals counted by their length. A text of the greatest length has
/// about two thousand nodes; the left side of `BETWEEN` and `IN` is copied for what it is compared
/// with.
const MAX_NODES: usize = 4_096;
/// Bytes of a copied literal that count as one node.
const LITERAL_BYTES_PER_NODE: usize = 16;

/// A three-valued test.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Const(Option<bool>),
    /// A boolean scalar.
    Test(Scalar),
    Compare(Comparison, Scalar, Scalar),
    /// `IS NOT DISTINCT FROM`.
    Same(Scalar, Scalar),
    /// Sorted values without NULL.
    In {
        item: Scalar,
        list: Vec<Value<'static>>,
        kind: ColumnType,
        has_null: bool,
    },
    /// Without a pattern (NULL) the answer is unknown.
    Like(Scalar, Option<Pattern>),
    IsNull(Scalar),
    /// `IS TRUE`, `IS FALSE`, `IS UNKNOWN`.
    IsTruth(Box<Node>, Option<bool>),
    Not(Box<Node>),
    And(Vec<Node>),
    Or(Vec<Node>),
}

/// Something with a value.
#[derive(Clone, Debug)]
pub(super) enum Scalar {
    /// `None` is NULL.
    Const(Option<Value<'static>>, ColumnType),
    Column(Box<str>, ColumnType),
    Path {
        column: Box<str>,
        binary: bool,
        steps: Vec<Step>,
        text: bool,
    },
    /// Text read as another type; what cannot be read is NULL.
    Cast(Box<Scalar>, ColumnType, Server),
    Truth(Box<Node>),
}

impl Scalar {
    /// Bytes of literals and keys, conditions left out.
    pub(super) fn text_bytes(&self) -> usize {
        match self {
            Self::Const(Some(Value::Text(text)), _) => text.len(),
            Self::Path { steps, .. } => steps.iter().map(Step::text_bytes).sum(),
            Self::Cast(inner, ..) => inner.text_bytes(),
            Self::Const(..) | Self::Column(..) | Self::Truth(_) => 0,
        }
    }
}

/// A plan and the columns it refers to.
pub(super) struct Plan {
    pub(super) root: Node,
    pub(super) columns: Vec<String>,
}

pub(super) fn plan(syntax: &Syntax, columns: &[Column], server: Server) -> Result<Plan, FilterError> {
    let mut planner = Planner { columns, server, used: Vec::new(), nodes: 0 };
    let root = planner.condition(syntax)?;
    Ok(Plan { root, columns: planner.used })
}

pub(super) struct Planner<'c> {
    columns: &'c [Column],
    server: Server,
    used: Vec<String>,
    nodes: usize,
}

impl Planner<'_> {
    /// Plans what must be boolean.
    fn condition(&mut self, syntax: &Syntax) -> Result<Node, FilterError> {
        self.count(syntax.at)?;
        match &syntax.kind {
            Kind::Compare(comparison, left, right) => self.compare(syntax.at, *comparison, left, right),
            Kind::Distinct(left, right) => {
                let left = self.operand(left)?;
                let right = self.operand(right)?;
                let (left, right) = operand::resolve(left, right, Comparison::Equal, syntax.at)?;
                Ok(negation(Node::Same(left, right)))
            }
            Kind::In(item, elements) => self.in_list(syntax.at, item, elements),
            Kind::Between { item, low, high, symmetric } => self.between(syntax.at, item, (low, high), *symmetric),
            Kind::Like { item, pattern, escape, fold } => self.like(syntax.at, item, pattern, escape.as_deref(), *fold),
            Kind::IsNull(inner) => self.operand(inner)?.into_null_test(syntax.at),
            Kind::IsTruth(inner, truth) => Ok(Node::IsTruth(Box::new(self.condition(inner)?), *truth)),
            Kind::Not(inner) => Ok(negation(self.condition(inner)?)),
            Kind::And(parts) => Ok(Node::And(self.conditions(parts)?)),
            Kind::Or(parts) => Ok(Node::Or(self.conditions(parts)?)),
            _ => self.operand(syntax)?.into_condition(),
        }
    }

    fn conditions(&mut self, parts: &[Syntax]) -> Result<Vec<Node>, FilterError> {
        parts.iter().map(|part| self.condition(part)).collect()
    }

    /// Plans what has a value of any type.
    pub(super) fn operand(&mut self, syntax: &Syntax) -> Result<Operand, FilterError> {
        self.count(syntax.at)?;
        let at = syntax.at;
        match &syntax.kind {
            Kind::Null => Ok(Operand::untyped(at, None, self.server)),
            Kind::Text(text) => Ok(Operand::untyped(at, Some(text.clone()), self.server)),
            Kind::Bool(value) => Ok(Operand::constant(at, Value::Bool(*value), ColumnType::Bool, self.server)),
            Kind::Number(digits) => operand::number(at, digits, self.server),
            Kind::Column(name) => {
                let kind = self.column(at, name)?;
                Ok(Operand::typed(at, Scalar::Column(name.as_str().into(), kind), kind, self.server))
            }
            Kind::Negated(inner) => self.operand(inner)?.negated(at),
            Kind::Cast(inner, kind) => self.operand(inner)?.cast(at, *kind),
            Kind::Path { json, key, text } => {
                let json = self.operand(json)?;
                let key = self.operand(key)?;
                json.step(at, key, *text)
            }
            _ => {
                let node = self.condition(syntax)?;
                Ok(Operand::typed(at, Scalar::Truth(Box::new(node)), ColumnType::Bool, self.server))
            }
        }
    }

    fn column(&mut self, at: usize, name: &str) -> Result<ColumnType, FilterError> {
        let Some(column) = self.columns.iter().find(|column| column.name == name) else {
            let error = FilterError::new(at, self.unknown_column(name));
            return Err(FilterError { unknown_column: true, ..error });
        };
        if !self.used.iter().any(|used| used == name) {
            self.used.push(name.to_owned());
        }
        Ok(column.kind)
    }

    fn unknown_column(&self, name: &str) -> String {
        let folded = self.columns.iter().find(|column| column.name.eq_ignore_ascii_case(name));
        match folded {
            Some(column) => format!(
                "there is no column \"{name}\"; a name that is not all lower case is written in double quotes: \"{}\"",
                column.name
            ),
            None => format!("there is no column \"{name}\""),
        }
    }

    fn count(&mut self, at: usize) -> Result<(), FilterError> {
        self.spend(at, 1)
    }

    fn spend(&mut self, at: usize, nodes: usize) -> Result<(), FilterError> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            let reason = format!("the condition has more than {MAX_NODES} parts; write it shorter");
            return Err(FilterError::new(at, reason));
        }
        Ok(())
    }

    fn compare(
        &mut self,
        at: usize,
        comparison: Comparison,
        left: &Syntax,
        right: &Syntax,
    ) -> Result<Node, FilterError> {
        let left = self.operand(left)?;
        let right = self.operand(right)?;
        let (left, right) = operand::resolve(left, right, comparison, at)?;
        Ok(comparison_node(comparison, left, right))
    }

    /// Each bound is compared on its own, as Postgres resolves it.
    fn between(
        &mut self,
        at: usize,
        item: &Syntax,
        (low, high): (&Syntax, &Syntax),
        symmetric: bool,
    ) -> Result<Node, FilterError> {
        for side in [item, low, high] {
            plain(side)?;
        }
        let mut within = |low, high| {
            Ok(Node::And(vec![
                self.compare(at, Comparison::GreaterOrEqual, item, low)?,
                self.compare(at, Comparison::LessOrEqual, item, high)?,
            ]))
        };
        let forth = within(low, high)?;
        if !symmetric {
            return Ok(forth);
        }
        Ok(Node::Or(vec![forth, within(high, low)?]))
    }

    /// Constants, if there are several, take their common type first and form a list (Postgres:
    /// `= ANY (array)`); everything else is compared one by one.
    fn in_list(&mut self, at: usize, item: &Syntax, elements: &[Syntax]) -> Result<Node, FilterError> {
        plain(item)?;
        let item = self.operand(item)?;
        let mut constants = Vec::new();
        let mut others = Vec::new();
        for element in elements {
            let element = self.operand(element)?;
            if element.is_constant() {
                constants.push(element);
            } else {
                others.push(element);
            }
        }
        let kinds = std::iter::once(&item).chain(&constants).map(Operand::kind);
        let common = if constants.len() > 1 { common_type(kinds) } else { None };
        let mut parts = Vec::new();
        if let Some(common) = common {
            parts.push(operand::list(item.clone(), constants, common, at)?);
        } else {
            others.splice(0..0, constants);
        }
        self.spend(at, others.len().saturating_mul(item.text_bytes() / LITERAL_BYTES_PER_NODE))?;
        for other in others {
            let (left, right) = operand::resolve(item.clone(), other, Comparison::Equal, at)?;
            parts.push(comparison_node(Comparison::Equal, left, right));
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Node::Or(parts) })
    }

    fn like(
        &mut self,
        at: usize,
        item: &Syntax,
        pattern: &Syntax,
        escape: Option<&Syntax>,
        fold: bool,
    ) -> Result<Node, FilterError> {
        let item = self.operand(item)?.into_like_item(at)?;
        let pattern_at = pattern.at;
        let mut pattern = self.operand(pattern)?.into_literal_text("the pattern of LIKE")?;
        let mut escape_character = Some('\\');
        if let Some(escape) = escape {
            let escape_at = escape.at;
            match self.operand(escape)?.into_literal_text("the escape of LIKE")? {
                None => pattern = None,
                Some(text) => {
                    let mut characters = text.chars();
                    escape_character = characters.next();
                    if characters.next().is_some() {
                        let reason = "the escape of LIKE must be one character or empty";
                        return Err(FilterError::new(escape_at, reason.to_owned()));
                    }
                }
            }
        }
        let pattern = pattern
            .map(|pattern| Pattern::compile(&pattern, escape_character, fold))
            .transpose()
            .map_err(|fault| FilterError::new(pattern_at, fault.reason()))?;
        Ok(Node::Like(item, pattern))
    }
}

/// Sides that are planned or copied more than once must not hold conditions: nested, these would
/// grow without bound.
fn plain(side: &Syntax) -> Result<(), FilterError> {
    if side.is_plain() {
        return Ok(());
    }
    let reason = "BETWEEN, and IN on its left, take columns and literals, not conditions; spell it out with AND and OR";
    Err(FilterError::new(side.at, reason.to_owned()))
}

fn negation(node: Node) -> Node {
    match node {
        Node::Not(inner) => *inner,
        node => Node::Not(Box::new(node)),
    }
}

/// With a constant on the right, so that equal tests are equal plans.
pub(super) fn comparison_node(comparison: Comparison, left: Scalar, right: Scalar) -> Node {
    if matches!(left, Scalar::Const(..)) && !matches!(right, Scalar::Const(..)) {
        Node::Compare(comparison.mirrored(), right, left)
    } else {
        Node::Compare(comparison, left, right)
    }
}
