//! The commands of the `tidewire` program: each parses its arguments, asks the rooms below, and tells a person or, with
//! `--json`, a program. They decide nothing.

pub mod bench;
pub mod connect;
pub mod keys;
pub mod serve;
pub mod tail;
