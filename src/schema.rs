//! What the catalog says about tracked tables: known to every node, and watched by the leader.
//!
//! [`registry`] answers "which columns has this table, and is it tracked" for whoever subscribes. [`watch`] is the
//! leader's look at what has changed since the last event about a table's shape; [`diff`], which is pure, says what that
//! change was. A table is its OID here: a name may come to mean another table.

pub mod described;
pub mod diff;
pub mod registry;
pub mod watch;

use std::collections::BTreeSet;

use crate::filter::{Column, Server};
use crate::table_name::TableName;

pub use registry::{Lookup, Registry};

/// A tracked table as the catalog has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableInfo {
    /// Its name at that moment.
    pub name: TableName,
    /// Its OID.
    pub relid: u32,
    /// The server that said so.
    pub server: Server,
    /// All its columns, in their order; types with domains resolved.
    pub columns: Vec<Column>,
    /// The columns' types as SQL writes them, in the same order.
    pub declared_types: Vec<String>,
    /// The columns that events carry; None: all of them.
    pub captured: Option<BTreeSet<Box<str>>>,
    /// Whether events carry the row before the change.
    pub before_image: bool,
    /// The columns of events' `key`, in their order; None: events have no key.
    pub key_columns: Option<Vec<String>>,
    /// Row security is switched on.
    pub row_security: bool,
    /// What keeps its changes from being captured, as the leader has noted it.
    pub faults: Vec<String>,
    /// The channel of plain LISTEN users, if the table was tracked with one.
    pub notify_channel: Option<String>,
}
