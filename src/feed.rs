//! The feed: how the leader's batches reach every node inside NOTIFY payloads.
//!
//! An optimisation and never the truth (invariant I4): whatever does not open, does not follow, or does not come at all
//! is read from the log.

pub mod chunk;
pub mod seal;
