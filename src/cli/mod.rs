<<<<<<< HEAD
//! The commands of the `tidewire` program; one file each.

pub mod keys;
=======
//! The commands of the `tidewire` program: each parses its arguments, asks the rooms below, and tells a person or, with
//! `--json`, a program. They decide nothing.

pub mod bench;
pub mod tail;
>>>>>>> client
