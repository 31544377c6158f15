//! What an evaluation may cost: known from the plan, before any row is seen.
//!
//! The unit is one byte that is read once. A condition reads a column's bytes as often as its terms make it: `LIKE`
//! between two `%` goes through the text, with `_` in the worst case once for each of its characters; a path walks the
//! document; a comparison ends with the shorter side. It is a bound, rarely reached: what is over a limit by it is done
//! elsewhere, not refused.

use super::plan::{Node, Scalar};

/// What a term costs that reads next to nothing.
const TERM: usize = 32;

/// The cost of one condition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    terms: usize,
    /// How often each column is read through.
    passes: Vec<(Box<str>, usize)>,
}

impl Cost {
    /// For a row whose columns are `bytes` long.
    #[must_use]
    pub fn bound(&self, bytes: usize) -> usize {
        self.of_row(|_| bytes)
    }

    /// For a row whose columns have these lengths, bytes.
    #[must_use]
    pub fn of_row(&self, length: impl Fn(&str) -> usize) -> usize {
        let read = self.passes.iter().map(|(column, passes)| passes.saturating_mul(length(column)));
        read.fold(self.terms.saturating_mul(TERM), usize::saturating_add)
    }

    pub(super) fn of(root: &Node) -> Self {
        let mut cost = Self::default();
        cost.node(root);
        cost
    }

    fn node(&mut self, node: &Node) {
        self.terms += 1;
        match node {
            Node::Const(_) => {}
            Node::Test(item) | Node::IsNull(item) | Node::In { item, .. } => self.scalar(item, 0),
            Node::Compare(_, left, right) | Node::Same(left, right) => {
                self.scalar(left, 0);
                self.scalar(right, 0);
            }
            Node::Like(item, pattern) => self.scalar(item, pattern.as_ref().map_or(0, super::like::Pattern::passes)),
            Node::IsTruth(inner, _) | Node::Not(inner) => self.node(inner),
            Node::And(parts) | Node::Or(parts) => parts.iter().for_each(|part| self.node(part)),
        }
    }

    /// A scalar whose value is then read `passes` times.
    fn scalar(&mut self, scalar: &Scalar, passes: usize) {
        match scalar {
            Scalar::Const(..) => {}
            Scalar::Column(name, _) => self.pass(name, passes),
            Scalar::Path { column, steps, .. } => self.pass(column, passes + steps.len().max(1)),
            Scalar::Cast(inner, ..) => self.scalar(inner, passes + 1),
            Scalar::Truth(node) => self.node(node),
        }
    }

    fn pass(&mut self, column: &str, passes: usize) {
        match self.passes.iter_mut().find(|(name, _)| **name == *column) {
            Some((_, sum)) => *sum += passes,
            None => self.passes.push((column.into(), passes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::filter::{Column, ColumnType, Filter};

    fn passes(text: &str) -> usize {
        let columns = [Column::new("a", ColumnType::Text), Column::new("j", ColumnType::Jsonb)];
        let filter = Filter::compile(text, &columns).unwrap();
        filter.cost().bound(1_000_000) / 1_000_000
    }

    #[test]
    fn a_condition_costs_what_it_may_read() {
        for (text, expected) in [
            ("a = 'x'", 0),
            ("a LIKE 'x%'", 0),
            ("a LIKE '%x'", 0),
            ("a LIKE '%x%'", 1),
            ("a LIKE '%x%y%'", 1),
            ("a LIKE '%_x_%'", 3),
            ("a ILIKE '%x%' OR a LIKE '%y%' AND NOT a LIKE '%z_%'", 4),
            ("j->>'k' = 'x'", 1),
            ("j->'k'->>'l' LIKE '%x%'", 3),
        ] {
            assert_eq!(passes(text), expected, "{text}");
        }
    }

    #[test]
    fn other_columns_do_not_count() {
        let columns = [Column::new("a", ColumnType::Text), Column::new("b", ColumnType::Text)];
        let filter = Filter::compile("a LIKE '%x%' AND b = 'y'", &columns).unwrap();
        let length = |column: &str| if column == "a" { 10 } else { 1_000_000 };
        assert!(filter.cost().of_row(length) < 1_000);
    }
}
