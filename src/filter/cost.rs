//! What an evaluation may cost: known from the plan, before any row is seen.
//!
//! The unit is one byte that is read once. A condition reads a column's bytes as often as its terms make it: `LIKE`
//! between two `%` goes through the text, with `_` in the worst case once for each of its characters; a path walks the
//! document; a number of any length is read at each use. A text is decoded once, whoever asks (the image keeps it), and its
//! comparison with a literal ends with the literal. It is a bound, rarely reached: what is over a limit by it is done
//! elsewhere, not refused.

use super::kind::ColumnType;
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
            Node::Test(item) => self.scalar(item, 0),
            // Of a column it only asks whether it is there.
            Node::IsNull(Scalar::Column(..)) => {}
            Node::IsNull(item) => self.scalar(item, 0),
            Node::In { item, list, kind, .. } => {
                let is_float = matches!(kind, ColumnType::Float4 | ColumnType::Float8);
                // Each comparison with a float makes one of the item.
                let comparisons = list.len().checked_ilog2().map_or(0, |bits| bits as usize + 1);
                self.scalar(item, if is_float { comparisons } else { 0 });
            }
            Node::Compare(_, left, right) | Node::Same(left, right) => {
                let constant = |side: &Scalar| matches!(side, Scalar::Const(..));
                self.scalar(left, usize::from(!constant(left) && !constant(right)));
                self.scalar(right, 0);
            }
            Node::Like(item, Some(pattern)) => {
                // The image keeps a text column in lower case, and nothing else.
                let folds = pattern.folds() && !matches!(item, Scalar::Column(_, ColumnType::Text));
                self.scalar(item, pattern.passes() + usize::from(folds));
            }
            Node::Like(_, None) => {}
            Node::IsTruth(inner, _) | Node::Not(inner) => self.node(inner),
            Node::And(parts) | Node::Or(parts) => parts.iter().for_each(|part| self.node(part)),
        }
    }

    /// A scalar whose value is then read `passes` times.
    fn scalar(&mut self, scalar: &Scalar, passes: usize) {
        match scalar {
            Scalar::Const(..) => {}
            Scalar::Column(name, kind) => self.pass(name, passes + reading(*kind)),
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

/// How often a column is read through to have its value, at each use. All others are short, or decoded once.
const fn reading(kind: ColumnType) -> usize {
    match kind {
        // Its digits, and once more to compare them or to make them a float.
        ColumnType::Numeric => 2,
        // Its content, and its blanks.
        ColumnType::Char => 2,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use crate::filter::{Column, ColumnType, Filter};

    fn passes(text: &str) -> usize {
        let columns = [
            ("a", ColumnType::Text),
            ("b", ColumnType::Text),
            ("j", ColumnType::Jsonb),
            ("n", ColumnType::Numeric),
            ("c", ColumnType::Char),
            ("i", ColumnType::Int8),
            ("f", ColumnType::Float8),
        ];
        let columns = columns.map(|(name, kind)| Column::new(name, kind));
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
            ("j->>'k' ILIKE 'x%'", 2),
            ("i = 1 OR i IN (1, 2) OR f > 1.5 OR a IN ('x', 'y')", 0),
            // Found in review: these were taken as free, whatever their length.
            ("n = 1", 2),
            ("n > 1 AND n < 3 OR n IN (1, 2)", 6),
            ("n BETWEEN 1 AND 2", 4),
            ("n IN ('1'::float8, '2'::float8)", 4),
            ("n IS NULL AND a IS NULL", 0),
            ("c = 'x' OR c = 'y'", 4),
            ("c ILIKE 'x%'", 0),
            ("a = b", 1),
            ("a IS DISTINCT FROM b", 1),
            ("n = f", 3),
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
