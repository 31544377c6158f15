//! Whether scopes fit the database, told when a key is made and not months later by a client that hears nothing.
//!
//! An **error** is what cannot work whatever is tracked later: a condition that is not of the language or does not fit the
//! table as it is, a column that an existing table does not have, a view, operations that never happen. A **warning** is
//! what does not work yet: a table that is still to be made or tracked, or to be tracked otherwise.

use crate::auth::scope::{OpSet, Scopes, TableScope};
use crate::event::Operation;
use crate::filter::{Column, Filter, Server};
use crate::postgres::Pool;
use crate::schema::TableInfo;
use crate::schema::described::{self, Described};
use crate::table_name::{TableName, TablePattern};

/// Tables that a warning names at most.
const MAX_NAMED: usize = 5;
/// Schemas whose tables are never tracked.
const SYSTEM_SCHEMAS: &[&str] = &["tidewire.", "pg_catalog.", "information_schema.", "pg_toast."];

/// What was found, one sentence each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// What can never work.
    pub errors: Vec<String>,
    /// What does not work yet.
    pub warnings: Vec<String>,
}

/// Holds scopes against the database.
///
/// # Errors
/// Postgres could not be asked.
pub async fn check(pool: &Pool, scopes: &Scopes) -> Result<Findings, sqlx::Error> {
    let names: Vec<TableName> = scopes.tables().iter().filter_map(|scope| table_of(&scope.pattern)).cloned().collect();
    let described = described::describe(pool, &names).await?;
    let tracked = match scopes.tables().iter().any(|scope| scope.pattern.is_glob() && !scope.pattern.is_event()) {
        true => described::tracked(pool).await?,
        false => Vec::new(),
    };
    let server = described::server_of(pool).await?;
    let mut findings = Findings::default();
    for scope in scopes.tables().iter().filter(|scope| !scope.ops.is_empty()) {
        let checker = Checker { scope, server, findings: &mut findings };
        match &scope.pattern {
            pattern if pattern.is_event() => checker.events(),
            TablePattern::Exact(name) => checker.table(name, described.get(name)),
            pattern => {
                let matching: Vec<_> = tracked.iter().filter(|info| pattern.matches(info.name.as_str())).collect();
                checker.glob(&matching);
            }
        }
    }
    Ok(findings)
}

fn table_of(pattern: &TablePattern) -> Option<&TableName> {
    match pattern {
        TablePattern::Exact(name) if !name.is_event() => Some(name),
        _ => None,
    }
}

/// One entry of the scopes.
struct Checker<'a> {
    scope: &'a TableScope,
    server: Server,
    findings: &'a mut Findings,
}

impl Checker<'_> {
    fn error(&mut self, what: &str) {
        self.findings.errors.push(format!("{}: {what}", self.scope.pattern));
    }

    fn warn(&mut self, what: &str) {
        self.findings.warnings.push(format!("{}: {what}", self.scope.pattern));
    }

    fn events(mut self) {
        self.operations(&[Operation::Event]);
        self.condition(&Filter::domain_event_columns());
    }

    fn table(mut self, name: &TableName, described: Option<&Described>) {
        self.table_operations();
        let Some(described) = described else {
            self.syntax();
            return match SYSTEM_SCHEMAS.iter().any(|schema| name.as_str().starts_with(schema)) {
                true => self.error("tables of this schema cannot be tracked"),
                false => {
                    self.warn("there is no such table yet; names are case-sensitive and mean public when unqualified")
                }
            };
        };
        let kind = match described.kind.as_str() {
            "v" => Some("a view"),
            "m" => Some("a materialized view"),
            "f" => Some("a foreign table"),
            _ if SYSTEM_SCHEMAS.iter().any(|schema| name.as_str().starts_with(schema)) => Some("a system table"),
            _ => None,
        };
        if let Some(kind) = kind {
            return self.error(&format!("this is {kind}, which has no events"));
        }
        if let Some(root) = described.root.as_ref().filter(|_| !described.tracked) {
            return self.error(&format!("this is a partition, and its events are those of {root}: name that"));
        }
        self.columns(&described.info);
        self.condition(&described.info.columns);
        if described.tracked {
            self.tracking(&described.info);
        } else {
            let name = name.as_str().replace('\'', "''");
            self.warn(&format!("the table is not tracked yet: SELECT tidewire.track('{name}')"));
        }
    }

    /// What tracking the table otherwise would cure.
    fn tracking(&mut self, info: &TableInfo) {
        let scope = self.scope;
        if info.row_security && scope.condition.is_none() {
            self.warn("the table has row level security: a key without a condition may not read it");
        }
        if !info.before_image && scope.condition.is_some() {
            self.warn("the table is tracked without before images: a key with a condition may not read it");
        }
        let masked = scope.columns.is_some() || !scope.hidden_columns.is_empty();
        if !info.before_image && masked && scope.ops.contains(OpSet::UPDATE) {
            self.warn(
                "the table is tracked without before images: an UPDATE of hidden columns alone is sent, without them",
            );
        }
        let Some(captured) = &info.captured else { return };
        let condition = scope.condition.as_deref();
        let compiled = condition.and_then(|text| Filter::compile_for(text, &info.columns, self.server).ok());
        if let Some(column) = compiled.iter().flat_map(Filter::columns).find(|column| !captured.contains(*column)) {
            self.warn(&format!("the table is tracked without {column:?} of the condition: nothing of it can be read"));
        }
        if scope
            .columns
            .as_ref()
            .is_some_and(|columns| !columns.iter().any(|column| captured.contains(column.as_str())))
        {
            self.warn("the table is tracked without any of these columns");
        }
    }

    fn columns(&mut self, info: &TableInfo) {
        let scope = self.scope;
        for column in scope.columns.iter().flatten().chain(&scope.hidden_columns) {
            if info.columns.iter().any(|known| known.name == *column) {
                continue;
            }
            let folded = info.columns.iter().find(|known| known.name.eq_ignore_ascii_case(column));
            let hint = folded.map_or_else(String::new, |known| format!("; there is {:?}", known.name));
            self.error(&format!("there is no column {column:?}{hint}"));
        }
        if scope.columns.as_ref().is_some_and(|shown| shown.iter().all(|column| scope.hidden_columns.contains(column)))
        {
            self.warn("no column can be read");
        }
    }

    fn glob(mut self, tracked: &[&TableInfo]) {
        self.table_operations();
        self.syntax();
        let scope = self.scope;
        if tracked.is_empty() {
            return self.warn("no tracked table has such a name yet");
        }
        for column in scope.columns.iter().flatten().chain(&scope.hidden_columns) {
            if !tracked.iter().any(|info| info.columns.iter().any(|known| known.name == *column)) {
                self.warn(&format!("no tracked table has a column {column:?}"));
            }
        }
        let Some(condition) = &scope.condition else { return };
        let fits = |info: &TableInfo| {
            let filter = Filter::compile_for(condition, &info.columns, self.server).ok();
            let captured = |column: &str| info.captured.as_ref().is_none_or(|captured| captured.contains(column));
            info.before_image && filter.is_some_and(|filter| filter.columns().all(captured))
        };
        let unfit: Vec<&str> = tracked.iter().filter(|info| !fits(info)).map(|info| info.name.as_str()).collect();
        if !unfit.is_empty() {
            let more = unfit.len().saturating_sub(MAX_NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let named = unfit[..unfit.len().min(MAX_NAMED)].join(", ");
            self.warn(&format!("the condition does not fit {named}{more}: nothing of that can be read"));
        }
    }

    fn condition(&mut self, columns: &[Column]) {
        let Some(condition) = &self.scope.condition else { return };
        match Filter::compile_for(condition, columns, self.server) {
            Ok(filter) if filter.matches_nothing() => self.warn("no row satisfies the condition"),
            Ok(_) => {}
            Err(error) => self.error(&format!("the condition cannot be used, {error}")),
        }
    }

    /// All that can be said of a condition whose columns are not known.
    fn syntax(&mut self) {
        if let Some(Err(error)) = self.scope.condition.as_deref().map(Filter::check_syntax) {
            self.error(&format!("the condition cannot be used, {error}"));
        }
    }

    fn table_operations(&mut self) {
        self.operations(&[Operation::Insert, Operation::Update, Operation::Delete, Operation::Truncate]);
    }

    /// One of them must be allowed. What else is allowed does no harm: options hold for all tables given with them.
    fn operations(&mut self, happen: &[Operation]) {
        if !happen.iter().any(|operation| self.scope.ops.allows(*operation)) {
            let named: Vec<&str> = self.scope.ops.iter().map(Operation::as_str).collect();
            self.error(&format!("{} never happens to it", named.join(", ")));
        }
    }
}
