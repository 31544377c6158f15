//! Integration tests: real Postgres, real nodes; a module for each promise.

mod capture;
mod emit;
mod migrations;
mod private_server;
mod support;
mod tracking;
