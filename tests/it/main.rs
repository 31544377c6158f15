//! Integration tests: real Postgres, real nodes; a module for each promise.

mod migrations;
mod private_server;
mod support;
