//! The log: the append-only table of numbered events, and the only SQL that reads or writes it.

pub mod append;
pub mod incarnation;
pub mod read;
pub mod retention;
mod row;

pub use append::{Claim, ClaimError, Position};
