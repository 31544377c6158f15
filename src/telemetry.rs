//! What the operator sees: metrics as a value each node owns, logs, traces.

pub mod cause;
pub mod metrics;
pub mod repeats;
pub mod trace;
pub mod tracing;
