//! What a key may do, as `tidewire.api_keys.scopes` holds it.
//!
//! ```json
//! {"tables":[{"table":"public.*","hidden_columns":["email"]},
//!            {"table":"public.orders","ops":["INSERT","UPDATE"],"columns":["id","status"],"condition":"tenant = 7"}],
//!  "admin":false,"history":true,"max_connections":1000}
//! ```
//!
//! **The most specific entry decides alone**: a table's own entry, else its schema's glob, else `*` (`event:x`, else
//! `event:*`). Entries are never added up: two grants with different columns and conditions have no union that leaks
//! nothing, and an order that decides would turn a swapped line into a leak. So an entry narrows every wider one, and one
//! with `"ops":[]` takes its table out of them. A name stands in one entry only.
//!
//! Absent fields: `ops`, all; `columns`, all; `hidden_columns`, none; `condition`, every row; `admin`, `history`, no;
//! `max_connections`, [`DEFAULT_MAX_CONNECTIONS`]. An unknown field is an error: a misspelt `columns` must not mean "all".
//!
//! Pure. Conditions are texts here: whether one fits a table is the filter's to say, when the table is subscribed to.

mod ops;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use self::ops::OpSet;

use crate::table_name::{TableName, TablePattern};

/// Connections of a key over the whole cluster, unless its scopes say otherwise.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 1_000;
/// Most entries in `tables`.
pub const MAX_TABLE_SCOPES: usize = 1_000;
/// Most columns in one list: what a Postgres table can have (`MaxHeapAttributeNumber`).
pub const MAX_COLUMNS: usize = 1_600;
/// Longest row condition, bytes: the protocol's limit of a filter text.
pub const MAX_CONDITION_BYTES: usize = 4_096;

/// Everything that a key may do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "ScopesText", into = "ScopesText")]
pub struct Scopes {
    tables: Vec<TableScope>,
    admin: bool,
    history: bool,
    max_connections: u32,
    by_name: HashMap<TableName, Arc<TableAccess>>,
    // Schema globs first, so that the first match is the most specific.
    by_glob: Vec<(TablePattern, Arc<TableAccess>)>,
}

/// One entry of `tables`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableScope {
    /// The tables meant.
    #[serde(rename = "table")]
    pub pattern: TablePattern,
    /// Operations whose events may be read; none takes the table out of wider entries.
    #[serde(default, skip_serializing_if = "OpSet::is_all")]
    pub ops: OpSet,
    /// Only these columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// Not these columns, even where `columns` names them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hidden_columns: Vec<String>,
    /// Only rows that satisfy this SQL condition, in the language of `where`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<String>,
}

/// What a key may read of one table. Equal accesses show the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TableAccess {
    /// Operations whose events may be read; at least one.
    pub ops: OpSet,
    /// Columns that may be read.
    pub columns: ColumnMask,
    /// Rows that may be read: a condition in the language of `where`. It may name columns that `columns` hides.
    pub condition: Option<Arc<str>>,
}

/// Which columns of a table may be read. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ColumnMask {
    /// Every column, later ones included.
    All,
    /// Only these; a column added later is hidden.
    Only(Arc<BTreeSet<Box<str>>>),
    /// All but these; a column added later is shown.
    AllBut(Arc<BTreeSet<Box<str>>>),
}

/// The scopes cannot be used as they are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadScopes {
    /// Two entries for one name would leave open which counts.
    #[error("two entries for {0:?}: put what the key may read of it into one")]
    Twice(String),
    /// Above [`MAX_TABLE_SCOPES`].
    #[error("more than {MAX_TABLE_SCOPES} tables: use globs")]
    TooManyTables,
    /// Above [`MAX_COLUMNS`].
    #[error("more than {MAX_COLUMNS} columns for {0:?}: a Postgres table cannot have as many")]
    TooManyColumns(String),
    /// A name that no column can have.
    #[error("an empty column name for {0:?}")]
    EmptyColumn(String),
    /// A payload is one value.
    #[error("columns of {0:?}: a domain event's payload is one value and cannot be masked")]
    ColumnsOfEvents(String),
    /// Blank or above [`MAX_CONDITION_BYTES`].
    #[error("the condition for {0:?} is empty or longer than {MAX_CONDITION_BYTES} bytes")]
    BadCondition(String),
    /// The key could not even connect.
    #[error("max_connections is 0: revoke the key instead")]
    NoConnections,
}

impl Scopes {
    /// Checks the entries and makes them quick to ask.
    ///
    /// # Errors
    /// See [`BadScopes`].
    pub fn new(tables: Vec<TableScope>, admin: bool, history: bool, max_connections: u32) -> Result<Self, BadScopes> {
        if max_connections == 0 {
            return Err(BadScopes::NoConnections);
        }
        if tables.len() > MAX_TABLE_SCOPES {
            return Err(BadScopes::TooManyTables);
        }
        let mut by_name = HashMap::new();
        let mut by_glob: Vec<(TablePattern, Arc<TableAccess>)> = Vec::new();
        for scope in &tables {
            let access = Arc::new(scope.access()?);
            let twice = match &scope.pattern {
                TablePattern::Exact(name) => by_name.insert(name.clone(), access).is_some(),
                glob => {
                    let twice = by_glob.iter().any(|(other, _)| other == glob);
                    by_glob.push((glob.clone(), access));
                    twice
                }
            };
            if twice {
                return Err(BadScopes::Twice(scope.pattern.to_string()));
            }
        }
        by_glob.sort_by_key(|(pattern, _)| !matches!(pattern, TablePattern::Schema(_)));
        Ok(Self { tables, admin, history, max_connections, by_name, by_glob })
    }

    /// Everything: all tables and domain events, history, administration.
    #[must_use]
    pub fn all(max_connections: u32) -> Self {
        let entry = |pattern: TablePattern| {
            (pattern, Arc::new(TableAccess { ops: OpSet::ALL, columns: ColumnMask::All, condition: None }))
        };
        let patterns = [TablePattern::AllTables, TablePattern::AllEvents];
        Self {
            tables: patterns.clone().map(TableScope::new).into(),
            admin: true,
            history: true,
            max_connections: max_connections.max(1),
            by_name: HashMap::new(),
            by_glob: patterns.map(entry).into(),
        }
    }

    /// What may be read of the table of this canonical name; none: nothing at all.
    #[must_use]
    pub fn table(&self, canonical: &str) -> Option<&Arc<TableAccess>> {
        let access = self
            .by_name
            .get(canonical)
            .or_else(|| self.by_glob.iter().find(|(pattern, _)| pattern.matches(canonical)).map(|(_, access)| access));
        access.filter(|access| !access.ops.is_empty())
    }

    /// The entries as they were given.
    #[must_use]
    pub fn tables(&self) -> &[TableScope] {
        &self.tables
    }

    /// Whether administrative resources may be used.
    #[must_use]
    pub fn admin(&self) -> bool {
        self.admin
    }

    /// Whether what is older than the window in memory may be read.
    #[must_use]
    pub fn history(&self) -> bool {
        self.history
    }

    /// Most connections over the whole cluster, at least 1.
    #[must_use]
    pub fn max_connections(&self) -> u32 {
        self.max_connections
    }
}

impl TableScope {
    /// Everything of these tables.
    #[must_use]
    pub fn new(pattern: TablePattern) -> Self {
        Self { pattern, ops: OpSet::ALL, columns: None, hidden_columns: Vec::new(), condition: None }
    }

    fn access(&self) -> Result<TableAccess, BadScopes> {
        let name = || self.pattern.to_string();
        let mut named = self.columns.iter().flatten().chain(&self.hidden_columns);
        if self.columns.as_ref().map_or(0, Vec::len).max(self.hidden_columns.len()) > MAX_COLUMNS {
            return Err(BadScopes::TooManyColumns(name()));
        }
        if named.any(String::is_empty) {
            return Err(BadScopes::EmptyColumn(name()));
        }
        if self.pattern.is_event() && (self.columns.is_some() || !self.hidden_columns.is_empty()) {
            return Err(BadScopes::ColumnsOfEvents(name()));
        }
        if self.condition.as_ref().is_some_and(|text| text.trim().is_empty() || text.len() > MAX_CONDITION_BYTES) {
            return Err(BadScopes::BadCondition(name()));
        }
        Ok(TableAccess {
            ops: self.ops,
            columns: ColumnMask::new(self.columns.as_deref(), &self.hidden_columns),
            condition: self.condition.as_deref().map(Arc::from),
        })
    }
}

impl ColumnMask {
    fn new(columns: Option<&[String]>, hidden: &[String]) -> Self {
        let boxed = |name: &String| name.as_str().into();
        match columns {
            Some(columns) => {
                Self::Only(Arc::new(columns.iter().filter(|name| !hidden.contains(name)).map(boxed).collect()))
            }
            None if hidden.is_empty() => Self::All,
            None => Self::AllBut(Arc::new(hidden.iter().map(boxed).collect())),
        }
    }

    /// Whether this column, as the catalog spells it, may be read.
    #[must_use]
    pub fn allows(&self, column: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(shown) => shown.contains(column),
            Self::AllBut(hidden) => !hidden.contains(column),
        }
    }

    /// Whether nothing is hidden, so that events can be passed on as they are.
    #[must_use]
    pub fn is_all(&self) -> bool {
        matches!(self, Self::All)
    }
}

/// [`Scopes`] as JSON has them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScopesText {
    #[serde(default)]
    tables: Vec<TableScope>,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    history: bool,
    #[serde(default = "default_max_connections")]
    max_connections: u32,
}

const fn default_max_connections() -> u32 {
    DEFAULT_MAX_CONNECTIONS
}

impl TryFrom<ScopesText> for Scopes {
    type Error = BadScopes;

    fn try_from(text: ScopesText) -> Result<Self, BadScopes> {
        Self::new(text.tables, text.admin, text.history, text.max_connections)
    }
}

impl From<Scopes> for ScopesText {
    fn from(scopes: Scopes) -> Self {
        let Scopes { tables, admin, history, max_connections, .. } = scopes;
        Self { tables, admin, history, max_connections }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::event::Operation;

    fn scopes(value: serde_json::Value) -> Scopes {
        serde_json::from_value(value).unwrap()
    }

    fn refused(value: serde_json::Value) -> String {
        serde_json::from_value::<Scopes>(value).unwrap_err().to_string()
    }

    #[test]
    fn a_key_without_entries_reads_nothing() {
        let scopes = scopes(json!({}));
        assert_eq!(scopes.table("public.orders"), None);
        assert_eq!((scopes.admin(), scopes.history(), scopes.max_connections()), (false, false, 1_000));
    }

    #[test]
    fn all_reads_every_table_and_every_domain_event() {
        let all = Scopes::all(100_000);
        for name in ["public.orders", "event:order", r#""a.b".c"#] {
            let access = all.table(name).unwrap();
            assert!(access.ops.is_all() && access.columns.is_all() && access.condition.is_none());
        }
        assert!(all.admin() && all.history());
        assert_eq!(scopes(serde_json::to_value(&all).unwrap()), all);
    }

    #[test]
    fn the_most_specific_entry_decides_alone_in_whatever_order_they_stand() {
        let mut entries = vec![
            json!({"table": "*", "ops": ["INSERT"]}),
            json!({"table": "sales.*", "ops": ["UPDATE"], "hidden_columns": ["cost"]}),
            json!({"table": "sales.orders", "columns": ["id"]}),
            json!({"table": "sales.secrets", "ops": []}),
        ];
        for _ in 0..entries.len() {
            entries.rotate_left(1);
            let scopes = scopes(json!({"tables": entries}));
            let ops = |name: &str| scopes.table(name).map(|access| access.ops);
            assert_eq!(ops("public.orders"), Some(OpSet::INSERT));
            assert_eq!(ops("sales.lines"), Some(OpSet::UPDATE));
            assert_eq!(ops("sales.orders"), Some(OpSet::ALL));
            assert_eq!(ops("sales.secrets"), None);
            assert_eq!(ops("event:order"), None);
            assert!(!scopes.table("sales.orders").unwrap().columns.allows("cost"));
        }
    }

    #[test]
    fn masks_show_what_is_allowed_and_never_what_is_hidden() {
        let mask = |entry| scopes(json!({"tables": [entry]})).table("public.t").unwrap().columns.clone();
        assert!(mask(json!({"table": "t"})).is_all());
        let only = mask(json!({"table": "t", "columns": ["a", "b"], "hidden_columns": ["b"]}));
        assert_eq!(["a", "b", "c"].map(|column| only.allows(column)), [true, false, false]);
        let but = mask(json!({"table": "t", "hidden_columns": ["b"]}));
        assert_eq!(["a", "b", "c"].map(|column| but.allows(column)), [true, false, true]);
        let none = mask(json!({"table": "t", "columns": []}));
        assert!(!none.is_all() && !none.allows("a"));
    }

    #[test]
    fn what_would_be_misunderstood_is_refused() {
        assert!(refused(json!({"table": []})).contains("unknown field"));
        assert!(refused(json!({"tables": [{"table": "t", "column": ["a"]}]})).contains("unknown field"));
        assert!(refused(json!({"tables": [{"table": "t", "ops": ["insert"]}]})).contains("cannot be granted"));
        assert!(refused(json!({"tables": [{"table": "a b"}]})).contains("double quotes"));
        assert!(refused(json!({"tables": [{"table": "t"}, {"table": "public.t"}]})).contains("two entries"));
        assert!(refused(json!({"tables": [{"table": "t.*"}, {"table": "\"t\".*"}]})).contains("two entries"));
        assert!(refused(json!({"tables": [{"table": "t", "condition": " "}]})).contains("condition"));
        assert!(refused(json!({"tables": [{"table": "t", "columns": [""]}]})).contains("empty column"));
        assert!(refused(json!({"tables": [{"table": "event:*", "columns": ["a"]}]})).contains("payload"));
        assert!(refused(json!({"max_connections": 0})).contains("revoke"));
        let many: Vec<_> = (0..=MAX_TABLE_SCOPES).map(|n| json!({"table": format!("t{n}")})).collect();
        assert!(refused(json!({"tables": many})).contains("globs"));
    }

    fn any_scope() -> impl Strategy<Value = TableScope> {
        let pattern = prop_oneof![Just("*"), Just("a.*"), Just("b.*"), Just("a.t"), Just("b.t"), Just("a.\"x.y\"")];
        let columns = prop::option::of(prop::collection::vec("[a-c]", 0..3));
        let ops = prop::sample::subsequence(&Operation::ALL, 0..=6).prop_map(OpSet::from_iter);
        (pattern, ops, columns, prop::collection::vec("[a-c]", 0..3), prop::option::of("[a-z]{1,9}")).prop_map(
            |(pattern, ops, columns, hidden_columns, condition)| TableScope {
                pattern: pattern.parse().unwrap(),
                ops,
                columns,
                hidden_columns,
                condition,
            },
        )
    }

    fn rank(pattern: &TablePattern) -> u8 {
        match pattern {
            TablePattern::Exact(_) => 0,
            TablePattern::Schema(_) => 1,
            TablePattern::AllTables | TablePattern::AllEvents => 2,
        }
    }

    proptest! {
        #[test]
        fn scopes_survive_their_json_and_agree_with_a_plain_search(
            tables in prop::collection::vec(any_scope(), 0..5), admin: bool, history: bool, max in 1u32..,
        ) {
            let Ok(made) = Scopes::new(tables.clone(), admin, history, max) else {
                let mut patterns: Vec<_> = tables.iter().map(|scope| scope.pattern.clone()).collect();
                patterns.sort();
                patterns.dedup();
                prop_assert!(patterns.len() < tables.len());
                return Ok(());
            };
            let json = serde_json::to_string(&made).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Scopes>(&json).unwrap(), &made);
            for name in ["a.t", "a.u", "b.t", "c.t", "a.\"x.y\"", "event:a.t"] {
                let plain = tables.iter().filter(|scope| scope.pattern.matches(name));
                let plain = plain.min_by_key(|scope| rank(&scope.pattern)).filter(|scope| !scope.ops.is_empty());
                let found = made.table(name);
                prop_assert_eq!(found.is_some(), plain.is_some());
                if let (Some(found), Some(plain)) = (found, plain) {
                    prop_assert_eq!(found.ops, plain.ops);
                    prop_assert_eq!(found.condition.as_deref(), plain.condition.as_deref());
                    for column in ["a", "b", "c"] {
                        let shown = plain.columns.as_ref().is_none_or(|list| list.iter().any(|name| name == column));
                        let shown = shown && !plain.hidden_columns.iter().any(|name| name == column);
                        prop_assert_eq!(found.columns.allows(column), shown);
                    }
                }
            }
        }
    }
}
