//! Integration tests: real Postgres, real nodes; a module for each promise.
