//! Integration tests: real Postgres, real nodes; a module for each promise.

mod auth;
mod capture;
mod deliver;
mod emit;
mod filter;
mod migrations;
mod private_server;
mod schema;
mod support;
mod tidy;
mod tracking;
