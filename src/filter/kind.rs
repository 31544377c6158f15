//! The column types that the condition language knows, and Postgres's rules for mixing them.
//!
//! Pure tables: which types compare with each other, which casts are implicit, and the common
//! type of an `IN` list. Source of the rules: PostgreSQL manual, chapter 10 "Type Conversion".
//! Knows no syntax and no values.

/// The type of a column, as far as conditions are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ColumnType {
    /// `boolean`
    Bool,
    /// `smallint`
    Int2,
    /// `integer`
    Int4,
    /// `bigint`
    Int8,
    /// `numeric` of any precision
    Numeric,
    /// `real`
    Float4,
    /// `double precision`
    Float8,
    /// `text`, `varchar`
    Text,
    /// `name`: a literal beside it becomes one, so it has at most 63 bytes
    Name,
    /// `character(n)`: trailing blanks do not count in comparisons, but do in `LIKE`
    Char,
    /// `uuid`
    Uuid,
    /// `date`
    Date,
    /// `time without time zone`
    Time,
    /// `time with time zone`
    TimeTz,
    /// `timestamp without time zone`
    Timestamp,
    /// `timestamp with time zone`
    TimestampTz,
    /// `interval`
    Interval,
    /// `json`: only `->`, `->>` and `IS NULL`
    Json,
    /// `jsonb`: only `->`, `->>` and `IS NULL`
    Jsonb,
    /// An enum: equality and `IN` with literals
    Enum,
    /// A composite type: nothing, since its `IS NULL` asks for its fields
    Composite,
    /// Anything else: only `IS NULL`
    Other,
}

/// Postgres's type categories, as `pg_type.typcategory` has them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Category {
    Boolean,
    Numeric,
    String,
    DateTime,
    Timespan,
    None,
}

impl ColumnType {
    /// The type for `pg_type.typname` and `pg_type.typtype`. Domains (`typtype = 'd'`) are to be
    /// resolved to their base type by the caller; unresolved they are [`ColumnType::Other`].
    pub fn from_postgres(typname: &str, typtype: char) -> Self {
        if typtype == 'e' {
            return Self::Enum;
        }
        if typtype == 'c' {
            return Self::Composite;
        }
        if typtype != 'b' {
            return Self::Other;
        }
        match typname {
            "bool" => Self::Bool,
            "int2" => Self::Int2,
            "int4" => Self::Int4,
            "int8" => Self::Int8,
            "numeric" => Self::Numeric,
            "float4" => Self::Float4,
            "float8" => Self::Float8,
            "text" | "varchar" => Self::Text,
            "name" => Self::Name,
            "bpchar" => Self::Char,
            "uuid" => Self::Uuid,
            "date" => Self::Date,
            "time" => Self::Time,
            "timetz" => Self::TimeTz,
            "timestamp" => Self::Timestamp,
            "timestamptz" => Self::TimestampTz,
            "interval" => Self::Interval,
            "json" => Self::Json,
            "jsonb" => Self::Jsonb,
            _ => Self::Other,
        }
    }

    /// The type's name in messages and in canonical text.
    pub fn sql_name(self) -> &'static str {
        match self {
            Self::Bool => "boolean",
            Self::Int2 => "smallint",
            Self::Int4 => "integer",
            Self::Int8 => "bigint",
            Self::Numeric => "numeric",
            Self::Float4 => "real",
            Self::Float8 => "double precision",
            Self::Text => "text",
            Self::Name => "name",
            Self::Char => "character",
            Self::Uuid => "uuid",
            Self::Date => "date",
            Self::Time => "time",
            Self::TimeTz => "time with time zone",
            Self::Timestamp => "timestamp",
            Self::TimestampTz => "timestamp with time zone",
            Self::Interval => "interval",
            Self::Json => "json",
            Self::Jsonb => "jsonb",
            Self::Enum => "an enum",
            Self::Composite => "a composite type",
            Self::Other => "a type without comparisons here",
        }
    }

    pub(super) fn is_float(self) -> bool {
        matches!(self, Self::Float4 | Self::Float8)
    }

    /// Kept as text.
    pub(super) fn is_text(self) -> bool {
        matches!(self, Self::Text | Self::Name)
    }

    pub(super) fn is_json(self) -> bool {
        matches!(self, Self::Json | Self::Jsonb)
    }

    fn category(self) -> Category {
        match self {
            Self::Bool => Category::Boolean,
            Self::Int2 | Self::Int4 | Self::Int8 | Self::Numeric | Self::Float4 | Self::Float8 => Category::Numeric,
            Self::Text | Self::Name | Self::Char => Category::String,
            Self::Date | Self::Time | Self::TimeTz | Self::Timestamp | Self::TimestampTz => Category::DateTime,
            Self::Interval => Category::Timespan,
            Self::Uuid | Self::Json | Self::Jsonb | Self::Enum | Self::Composite | Self::Other => Category::None,
        }
    }

    /// `pg_type.typispreferred`.
    fn is_preferred(self) -> bool {
        matches!(self, Self::Bool | Self::Float8 | Self::Text | Self::TimestampTz | Self::Interval)
    }

    /// Place in the chain of implicit numeric casts.
    fn numeric_rank(self) -> Option<u8> {
        match self {
            Self::Int2 => Some(0),
            Self::Int4 => Some(1),
            Self::Int8 => Some(2),
            Self::Numeric => Some(3),
            Self::Float4 => Some(4),
            Self::Float8 => Some(5),
            _ => None,
        }
    }

    /// Whether Postgres casts `self` to `target` without being asked (`pg_cast.castcontext = 'i'`).
    pub(super) fn casts_implicitly(self, target: Self) -> bool {
        if self == target {
            return true;
        }
        if let (Some(from), Some(to)) = (self.numeric_rank(), target.numeric_rank()) {
            return from < to;
        }
        matches!(
            (self, target),
            (Self::Text, Self::Char | Self::Name)
                | (Self::Char, Self::Text | Self::Name)
                | (Self::Name, Self::Text)
                | (Self::Date, Self::Timestamp | Self::TimestampTz)
                | (Self::Timestamp, Self::TimestampTz)
                | (Self::Time, Self::TimeTz)
        )
    }

    /// Whether an operator `self = other` exists. Ordering exists for the same pairs, except enums.
    pub(super) fn compares_with(self, other: Self) -> bool {
        if self.numeric_rank().is_some() && other.numeric_rank().is_some() {
            return true;
        }
        match (self, other) {
            (Self::Json | Self::Jsonb | Self::Composite | Self::Other, _) => false,
            // Two enum columns may be of different types, which Postgres refuses; nobody can tell here.
            (Self::Enum, _) => false,
            (Self::Text | Self::Name | Self::Char, Self::Text | Self::Name | Self::Char) => true,
            (Self::Date | Self::Timestamp | Self::TimestampTz, Self::Date | Self::Timestamp | Self::TimestampTz) => {
                true
            }
            (Self::Time | Self::TimeTz, Self::Time | Self::TimeTz) => true,
            (left, right) => left == right,
        }
    }
}

/// The common type of an `IN` list and its left side, as Postgres's `select_common_type` finds it;
/// `None` where there is none, and each element is compared on its own. Untyped literals
/// (`None` in `kinds`) do not vote.
pub(super) fn common_type(kinds: impl Iterator<Item = Option<ColumnType>> + Clone) -> Option<ColumnType> {
    let mut chosen: Option<ColumnType> = None;
    for kind in kinds.clone().flatten() {
        let Some(current) = chosen else {
            chosen = Some(kind);
            continue;
        };
        if kind == current {
            continue;
        }
        if kind.category() != current.category() || kind.category() == Category::None {
            return None;
        }
        if !current.is_preferred() && current.casts_implicitly(kind) && !kind.casts_implicitly(current) {
            chosen = Some(kind);
        }
    }
    let common = chosen.unwrap_or(ColumnType::Text);
    let fits = kinds.flatten().all(|kind| kind.casts_implicitly(common));
    fits.then_some(common)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_known_by_their_catalog_names() {
        assert_eq!(ColumnType::from_postgres("varchar", 'b'), ColumnType::Text);
        assert_eq!(ColumnType::from_postgres("bpchar", 'b'), ColumnType::Char);
        assert_eq!(ColumnType::from_postgres("name", 'b'), ColumnType::Name);
        assert_eq!(ColumnType::from_postgres("text", 'c'), ColumnType::Composite);
        assert_eq!(ColumnType::from_postgres("order_status", 'e'), ColumnType::Enum);
        assert_eq!(ColumnType::from_postgres("text", 'd'), ColumnType::Other);
        assert_eq!(ColumnType::from_postgres("_int4", 'b'), ColumnType::Other);
        assert_eq!(ColumnType::from_postgres("citext", 'b'), ColumnType::Other);
    }

    #[test]
    fn an_in_list_takes_its_widest_numeric_type_but_not_past_real() {
        let common = |kinds: &[ColumnType]| common_type(kinds.iter().map(|kind| Some(*kind)));
        assert_eq!(common(&[ColumnType::Int4, ColumnType::Numeric]), Some(ColumnType::Numeric));
        assert_eq!(common(&[ColumnType::Float4, ColumnType::Numeric]), Some(ColumnType::Float4));
        assert_eq!(common(&[ColumnType::Int4, ColumnType::Text]), None);
        assert_eq!(common_type([None, None].into_iter()), Some(ColumnType::Text));
    }
}
