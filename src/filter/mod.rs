//! Conditions on rows: the `where` language of the protocol.
//!
//! A condition is SQL over one table's columns with Postgres's semantics. It is compiled once, when
//! a client subscribes, and then evaluated for each row image of that table:
//!
//! ```text
//! text ─ lex ▸ parse ─▶ syntax ─ plan (operand, kind) ─▶ typed plan ─ eval ─▶ true, false, NULL, or cannot be told
//!                                                          ├─ canonical: equal text = same filter
//!                                                          └─ index: keys by which routes find it
//! ```
//!
//! Invariants: hostile text is refused with a position and never panics, overflows the stack or
//! costs more than its length; a compiled filter cannot fail; where it gives an answer, Postgres
//! gives the same (tried against Postgres itself in `tests/it/filter.rs`). What differs is listed in
//! the protocol ("`where`"): where Postgres would raise an error at run time, where JSON cannot tell,
//! and forms of text that depend on a session or on the clock, which are not read.
//!
//! Pure: no I/O, no clock, no catalog. The caller brings columns and row images.

mod canonical;
mod constant;
mod cost;
mod decimal;
mod digits;
mod eval;
mod index;
mod interval;
mod json;
mod kind;
mod lex;
mod like;
mod moment;
mod operand;
mod parse;
mod plan;
mod server;
mod syntax;
mod typename;
mod value;

use std::borrow::Cow;
use std::fmt;

pub use cost::Cost;
pub use index::{IndexConjunct, IndexKey, index_key_of};
pub use kind::ColumnType;
pub use server::Server;

/// Bytes of a condition's text that are accepted unless the caller asks for less. Bounds the syntax
/// tree before it is built.
pub const MAX_FILTER_BYTES: usize = 4 * 1024;

/// A column of the table that a condition is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// The name as in the catalog, case-sensitive.
    pub name: String,
    /// Its type, domains resolved.
    pub kind: ColumnType,
}

impl Column {
    /// A column.
    pub fn new(name: impl Into<String>, kind: ColumnType) -> Self {
        Self { name: name.into(), kind }
    }
}

/// One image of a row (before or after a change).
pub trait RowImage {
    /// The column's value as raw JSON, as Postgres's `to_json` writes it under the settings in
    /// the protocol's "Values"; `null` is SQL's NULL. `None`: the image does not carry the column
    /// (an unchanged TOAST value, a trimmed image), so its value is not known.
    fn column(&self, name: &str) -> Option<&str>;

    /// The content of a JSON string that [`RowImage::column`] gave; `folded`: as `ILIKE` compares it. An image that many
    /// conditions are asked of keeps what it has decoded.
    fn text<'a>(&'a self, raw: &'a str, folded: bool) -> Option<Cow<'a, str>> {
        decode(raw, folded)
    }

    /// Whether the evaluation is to end as soon as it can, with an outcome that nobody uses. Once true, always true.
    fn is_interrupted(&self) -> bool {
        false
    }
}

/// The content of a JSON string, and with its ASCII letters in lower case if `folded`; borrowed where that is the same.
pub fn decode(raw: &str, folded: bool) -> Option<Cow<'_, str>> {
    let content = json::string_content(raw)?;
    Some(if folded { like::folded(content) } else { content })
}

/// What a condition says of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The row satisfies the condition.
    Matches,
    /// It does not: the condition is false or NULL.
    Differs,
    /// It depends on a column that the image does not carry.
    Undetermined,
}

/// A compiled condition.
#[derive(Clone, Debug)]
pub struct Filter {
    root: plan::Node,
    columns: Vec<String>,
    canonical: String,
    index: Option<IndexConjunct>,
    cost: Cost,
}

impl Filter {
    /// Parses `text` and checks it against one table's columns. Identifiers fold as in SQL. What
    /// only newer servers read is not read; see [`Filter::compile_for`].
    ///
    /// # Errors
    /// The text is longer than [`MAX_FILTER_BYTES`], is not of the language, names a column that is
    /// not there, or mixes types as Postgres would refuse; with the position of the token to blame.
    pub fn compile(text: &str, columns: &[Column]) -> Result<Self, FilterError> {
        Self::compile_for(text, columns, Server::default())
    }

    /// As [`Filter::compile`], with the forms of literals that `server` reads.
    ///
    /// # Errors
    /// As [`Filter::compile`].
    pub fn compile_for(text: &str, columns: &[Column], server: Server) -> Result<Self, FilterError> {
        check_length(text)?;
        let syntax = parse::parse(text)?;
        let plan::Plan { root, columns } = plan::plan(&syntax, columns, server)?;
        Ok(Self {
            canonical: canonical::text(&root),
            index: index::conjunct(&root),
            cost: Cost::of(&root),
            root,
            columns,
        })
    }

    /// Checks the language alone, where the columns are not known.
    ///
    /// # Errors
    /// As [`Filter::compile`], as far as they need no columns.
    pub fn check_syntax(text: &str) -> Result<(), FilterError> {
        check_length(text)?;
        parse::parse(text).map(|_| ())
    }

    /// The columns of domain events (tables `event:…`).
    pub fn domain_event_columns() -> Vec<Column> {
        vec![
            Column::new("aggregate_id", ColumnType::Text),
            Column::new("event_type", ColumnType::Text),
            Column::new("payload", ColumnType::Json),
        ]
    }

    /// The condition's truth for a row; `None` is SQL's NULL, and also the answer where a column
    /// that decides it is absent. [`Filter::eval_checked`] tells the two apart.
    pub fn eval(&self, row: &dyn RowImage) -> Option<bool> {
        eval::truths(&self.root, row).certain().flatten()
    }

    /// Whether the row satisfies the condition, does not, or cannot be judged for want of a column.
    /// Absent columns that do not decide (`absent OR true`) do no harm.
    pub fn eval_checked(&self, row: &dyn RowImage) -> Outcome {
        let truths = eval::truths(&self.root, row);
        if truths.certain() == Some(Some(true)) {
            Outcome::Matches
        } else if truths.may_be_true() {
            Outcome::Undetermined
        } else {
            Outcome::Differs
        }
    }

    /// Whether it is plain that no row satisfies the condition: `false`, `id = NULL`.
    #[must_use]
    pub fn matches_nothing(&self) -> bool {
        let never = matches!(self.root, plan::Node::Const(Some(false) | None));
        never || self.index.as_ref().is_some_and(|conjunct| conjunct.keys.is_empty())
    }

    /// What an evaluation may cost.
    pub fn cost(&self) -> &Cost {
        &self.cost
    }

    /// Names of the columns that the condition refers to, each once.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(String::as_str)
    }

    /// Normal text. Filters over columns of equal types with equal normal text are the same.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// An equality that every matching row satisfies, for finding the filter by hash.
    pub fn index_conjunct(&self) -> Option<IndexConjunct> {
        self.index.clone()
    }
}

fn check_length(text: &str) -> Result<(), FilterError> {
    if text.len() > MAX_FILTER_BYTES {
        let reason = format!("the condition has {} bytes, at most {MAX_FILTER_BYTES} are allowed", text.len());
        return Err(FilterError::new(1, reason));
    }
    Ok(())
}

/// Why a condition is refused, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterError {
    /// Position of the token to blame, in characters from 1.
    pub position: usize,
    /// Cause, and what to do.
    pub reason: String,
    /// The cause is a column that is not there.
    pub unknown_column: bool,
}

impl FilterError {
    fn new(position: usize, reason: String) -> Self {
        Self { position, reason, unknown_column: false }
    }
}

impl fmt::Display for FilterError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "at character {}: {}", self.position, self.reason)
    }
}

impl std::error::Error for FilterError {}

#[cfg(test)]
mod tests;
