//! Tidewire: a live, resumable change feed from Postgres.
//!
//! `docs/ARCHITECTURE.md` draws the house; each module's head says what lives there.

pub mod client;
pub mod cursor;
pub mod protocol;
