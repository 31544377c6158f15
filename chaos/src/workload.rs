//! Writers and clients of the run.
