//! The commands of the `tidewire` program; one file each.

pub mod keys;
