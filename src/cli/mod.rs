//! The commands of the `tidewire` program: each parses its arguments, asks the rooms below, and tells a person or, with
//! `--json`, a program. They decide nothing.

/// Reads a structure whose fields are named as the query's columns.
macro_rules! from_row {
    ($structure:ident { $($field:ident),+ $(,)? }) => {
        impl sqlx::FromRow<'_, sqlx::postgres::PgRow> for $structure {
            fn from_row(row: &sqlx::postgres::PgRow) -> Result<Self, sqlx::Error> {
                Ok(Self { $($field: sqlx::Row::try_get(row, stringify!($field))?),+ })
            }
        }
    };
}

pub mod bench;
pub mod connect;
pub mod doctor;
pub mod keys;
pub mod migrate;
pub mod serve;
pub mod status;
pub mod tables;
pub mod tail;
pub mod track;
