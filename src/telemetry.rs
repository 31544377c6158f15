//! What the operator sees: metrics as a value each node owns, logs, traces.

pub mod metrics;
pub mod trace;
pub mod tracing;
