//! The cluster under test: child processes only.
