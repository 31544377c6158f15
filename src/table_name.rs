//! Names of tables as the protocol writes them, and the globs over them.
//!
//! A name has one canonical text, which is what events carry, scopes are matched with and maps are keyed by:
//!
//! - a table is `schema.table`, verbatim and case-sensitive. A part that contains `.`, `"`, `*`, `:` or a space is
//!   written in double quotes with `""` for `"`; every other part is written bare;
//! - a domain event is `event:` and the aggregate type, verbatim, never quoted.
//!
//! No table's text begins with `event:`, since a schema with a colon is quoted. So comparing texts is comparing names.
//!
//! Globs: `schema.*` is every table of a schema, `*` every table, `event:*` every domain event. `*` does **not** cover
//! domain events: they are not tables, and a key for "every table" must not begin to read an application's messages the
//! day it emits its first one. Both together are `["*", "event:*"]`.
//!
//! Pure: whether a table exists or is tracked is not known here.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest name that is read from a client, bytes: two quoted identifiers of 63 bytes fit four times over.
pub const MAX_NAME_BYTES: usize = 1024;

/// Before the aggregate type of a domain event.
pub const EVENT_PREFIX: &str = "event:";

/// The schema of an unqualified name.
pub const DEFAULT_SCHEMA: &str = "public";

/// The canonical name of one table or of one type of domain events. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableName(Arc<str>);

/// Names that a client or a key asks for: one, or a glob.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TablePattern {
    /// One table or one type of domain events.
    Exact(TableName),
    /// `schema.*`. Holds the canonical schema and the dot, which every name of the schema begins with.
    Schema(Arc<str>),
    /// `*`: every table, no domain events.
    AllTables,
    /// `event:*`: every domain event, no tables.
    AllEvents,
}

/// The text is not a name or a glob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedName {
    /// Nothing, or nothing where a part should be.
    #[error("a table name has an empty part: write `table`, `schema.table` or `event:type`")]
    Empty,
    /// Above [`MAX_NAME_BYTES`].
    #[error("the table name is longer than {MAX_NAME_BYTES} bytes")]
    TooLong,
    /// Postgres holds no such text.
    #[error("the table name contains a NUL character")]
    Nul,
    /// More than a schema and a table.
    #[error("the table name has more than two parts: a part that contains a dot is written in double quotes")]
    TooManyParts,
    /// A character that only a quoted part may have.
    #[error("{0:?} in a table name: a part that contains it is written in double quotes")]
    MustBeQuoted(char),
    /// No closing quote, or text right behind one.
    #[error("the table name's double quotes do not match: a part is quoted whole, with \"\" for a quote inside")]
    BadQuotes,
    /// A glob where one name is asked for.
    #[error("a single table is asked for, not a glob")]
    Glob,
}

impl TableName {
    /// The table of a schema, both as the catalog spells them.
    #[must_use]
    pub fn table(schema: &str, table: &str) -> Self {
        let mut text = String::with_capacity(schema.len() + table.len() + 1);
        push_part(&mut text, schema);
        text.push('.');
        push_part(&mut text, table);
        Self(text.into())
    }

    /// The domain events of an aggregate type.
    #[must_use]
    pub fn event(aggregate_type: &str) -> Self {
        Self([EVENT_PREFIX, aggregate_type].concat().into())
    }

    /// Takes a text that is canonical by its origin: the log's `table_name`.
    #[must_use]
    pub fn from_canonical(text: &str) -> Self {
        Self(text.into())
    }

    /// The canonical text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether these are domain events.
    #[must_use]
    pub fn is_event(&self) -> bool {
        is_event(&self.0)
    }

    /// The aggregate type, where these are domain events.
    #[must_use]
    pub fn aggregate_type(&self) -> Option<&str> {
        self.0.strip_prefix(EVENT_PREFIX)
    }

    /// Schema and table as the catalog spells them; none for domain events.
    #[must_use]
    pub fn schema_and_table(&self) -> Option<(Cow<'_, str>, Cow<'_, str>)> {
        if self.is_event() {
            return None;
        }
        let (schema, rest) = take_part(&self.0).ok()?;
        let (table, _) = take_part(rest.strip_prefix('.')?).ok()?;
        Some((schema, table))
    }
}

/// Whether a canonical text names domain events.
#[must_use]
pub fn is_event(canonical: &str) -> bool {
    canonical.starts_with(EVENT_PREFIX)
}

impl FromStr for TableName {
    type Err = MalformedName;

    /// Reads what a client sends; an unqualified name is `public`'s.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse()? {
            TablePattern::Exact(name) => Ok(name),
            _ => Err(MalformedName::Glob),
        }
    }
}

impl TablePattern {
    /// Whether the name of this canonical text is meant.
    #[must_use]
    pub fn matches(&self, canonical: &str) -> bool {
        match self {
            Self::Exact(name) => name.as_str() == canonical,
            Self::Schema(prefix) => canonical.starts_with(&**prefix),
            Self::AllTables => !is_event(canonical),
            Self::AllEvents => is_event(canonical),
        }
    }

    /// Whether more than one name can match.
    #[must_use]
    pub fn is_glob(&self) -> bool {
        !matches!(self, Self::Exact(_))
    }

    /// Whether only domain events can match.
    #[must_use]
    pub fn is_event(&self) -> bool {
        match self {
            Self::Exact(name) => name.is_event(),
            Self::AllEvents => true,
            Self::Schema(_) | Self::AllTables => false,
        }
    }
}

impl FromStr for TablePattern {
    type Err = MalformedName;

    /// Reads what a client sends; an unqualified name is `public`'s.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > MAX_NAME_BYTES {
            return Err(MalformedName::TooLong);
        }
        if text.contains('\0') {
            return Err(MalformedName::Nul);
        }
        match text.strip_prefix(EVENT_PREFIX) {
            Some("") => return Err(MalformedName::Empty),
            Some("*") => return Ok(Self::AllEvents),
            Some(aggregate_type) => return Ok(Self::Exact(TableName::event(aggregate_type))),
            None if text == "*" => return Ok(Self::AllTables),
            None => {}
        }
        let (first, rest) = take_part(text)?;
        if rest.is_empty() {
            return Ok(Self::Exact(TableName::table(DEFAULT_SCHEMA, &first)));
        }
        let rest = after_dot(rest)?;
        if rest == "*" {
            let mut prefix = String::with_capacity(first.len() + 1);
            push_part(&mut prefix, &first);
            prefix.push('.');
            return Ok(Self::Schema(prefix.into()));
        }
        let (second, rest) = take_part(rest)?;
        if rest.is_empty() {
            return Ok(Self::Exact(TableName::table(&first, &second)));
        }
        after_dot(rest)?;
        Err(MalformedName::TooManyParts)
    }
}

fn must_be_quoted(c: char) -> bool {
    matches!(c, '.' | '"' | '*' | ':' | ' ')
}

fn push_part(text: &mut String, part: &str) {
    if !part.contains(must_be_quoted) {
        text.push_str(part);
        return;
    }
    text.push('"');
    text.push_str(&part.replace('"', "\"\""));
    text.push('"');
}

/// The first part, unquoted, and what stands behind it.
fn take_part(text: &str) -> Result<(Cow<'_, str>, &str), MalformedName> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (part, rest) = text.split_at(text.find(must_be_quoted).unwrap_or(text.len()));
        return match rest.chars().next() {
            Some(c) if c != '.' => Err(MalformedName::MustBeQuoted(c)),
            _ if part.is_empty() => Err(MalformedName::Empty),
            _ => Ok((Cow::Borrowed(part), rest)),
        };
    };
    let mut end = quoted.find('"').ok_or(MalformedName::BadQuotes)?;
    while quoted[end + 1..].starts_with('"') {
        let next = quoted[end + 2..].find('"').ok_or(MalformedName::BadQuotes)?;
        end += 2 + next;
    }
    let (part, rest) = (&quoted[..end], &quoted[end + 1..]);
    if part.is_empty() {
        return Err(MalformedName::Empty);
    }
    let part = if part.contains('"') { Cow::Owned(part.replace("\"\"", "\"")) } else { Cow::Borrowed(part) };
    Ok((part, rest))
}

fn after_dot(rest: &str) -> Result<&str, MalformedName> {
    rest.strip_prefix('.').ok_or(MalformedName::BadQuotes)
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableName({})", self.0)
    }
}

impl fmt::Display for TablePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => name.fmt(f),
            Self::Schema(prefix) => write!(f, "{prefix}*"),
            Self::AllTables => f.write_str("*"),
            Self::AllEvents => f.write_str("event:*"),
        }
    }
}

// Maps keyed by `TableName` are asked with the text that an event carries.
impl Borrow<str> for TableName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for TableName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Serialize for TableName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for TableName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for TablePattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TablePattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> String {
        text.parse::<TableName>().unwrap().to_string()
    }

    fn pattern(text: &str) -> TablePattern {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_has_one_canonical_text() {
        assert_eq!(name("orders"), "public.orders");
        assert_eq!(name("Sales.Orders"), "Sales.Orders");
        assert_eq!(name(r#""sales"."orders""#), "sales.orders");
        assert_eq!(name(r#"sales."a.b""#), r#"sales."a.b""#);
        assert_eq!(name(r#""say ""hi""""#), r#"public."say ""hi""""#);
        assert_eq!(name(r#""*""#), r#"public."*""#);
        assert_eq!(name("event:Order Line"), "event:Order Line");
    }

    #[test]
    fn what_is_no_name_is_refused_with_its_reason() {
        let refused = |text: &str| text.parse::<TablePattern>().unwrap_err();
        for text in ["", ".", "a.", ".a", "event:", r#""""#] {
            assert_eq!(refused(text), MalformedName::Empty, "{text}");
        }
        assert_eq!(refused("a.b.c"), MalformedName::TooManyParts);
        assert_eq!(refused("a b"), MalformedName::MustBeQuoted(' '));
        assert_eq!(refused("ord*"), MalformedName::MustBeQuoted('*'));
        assert_eq!(refused("*.orders"), MalformedName::MustBeQuoted('*'));
        assert_eq!(refused(r#"a"b""#), MalformedName::MustBeQuoted('"'));
        assert_eq!(refused(r#""a"b"#), MalformedName::BadQuotes);
        assert_eq!(refused(r#""a"#), MalformedName::BadQuotes);
        assert_eq!(refused("a\0"), MalformedName::Nul);
        assert_eq!(refused(&"a".repeat(MAX_NAME_BYTES + 1)), MalformedName::TooLong);
        assert_eq!("public.*".parse::<TableName>(), Err(MalformedName::Glob));
    }

    #[test]
    fn a_star_covers_every_table_and_no_domain_event() {
        assert!(pattern("*").matches("public.orders"));
        assert!(!pattern("*").matches("event:order"));
        assert!(pattern("event:*").matches("event:order"));
        assert!(!pattern("event:*").matches("public.orders"));
        assert!(!pattern("event:*").matches(r#""event:x".orders"#));
    }

    #[test]
    fn a_schema_glob_covers_that_schema_only() {
        assert!(pattern("sales.*").matches("sales.orders"));
        assert!(!pattern("sales.*").matches("sales2.orders"));
        assert!(!pattern("sales.*").matches("Sales.orders"));
        assert!(pattern(r#""a.b".*"#).matches(r#""a.b".orders"#));
        assert!(!pattern("a.*").matches(r#""a.b".orders"#));
    }

    proptest! {
        #[test]
        fn any_catalog_name_survives_its_text(schema in "[^\0]{1,30}", table in "[^\0]{1,30}") {
            let made = TableName::table(&schema, &table);
            prop_assert_eq!(made.as_str().parse::<TableName>(), Ok(made.clone()));
            let (s, t) = made.schema_and_table().unwrap();
            prop_assert_eq!((s.as_ref(), t.as_ref()), (schema.as_str(), table.as_str()));
            prop_assert!(!made.is_event());
        }

        #[test]
        fn no_text_panics_and_what_is_read_reads_again(text in r#"[a-c.":* ]{0,12}|event:.{0,4}|.{0,20}"#) {
            if let Ok(read) = text.parse::<TablePattern>() {
                prop_assert_eq!(read.to_string().parse::<TablePattern>(), Ok(read));
            }
        }

        #[test]
        fn a_schema_glob_matches_exactly_the_names_of_its_schema(
            schema in r#"[ab.":* ]{1,4}"#, other in r#"[ab.":* ]{1,4}"#, table in r#"[ab.":* ]{1,4}"#,
        ) {
            let mut glob = String::new();
            push_part(&mut glob, &schema);
            let glob = pattern(&format!("{glob}.*"));
            prop_assert_eq!(glob.matches(TableName::table(&other, &table).as_str()), schema == other);
            prop_assert!(!glob.matches(TableName::event(&table).as_str()));
            prop_assert_eq!(pattern("*").matches(TableName::table(&other, &table).as_str()), true);
        }
    }
}
