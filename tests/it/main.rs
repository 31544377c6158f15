//! Integration tests: real Postgres, real nodes; a module for each promise.

mod private_server;
mod support;
