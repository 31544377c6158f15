//! The commands of the `tidewire` program: each parses its arguments, asks the rooms below, and tells a person or, with
//! `--json`, a program. They decide nothing.

use std::io::{ErrorKind, Write as _};

use anyhow::Context as _;

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

/// Prints on standard output. Whoever has stopped reading, as `head` does, wants no more: that is no error.
///
/// # Errors
/// Standard output cannot be written, as on a full disk.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("standard output"),
        _ => Ok(()),
    }
}

/// [`print`] for a program: one line of JSON.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string(value)?))
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
