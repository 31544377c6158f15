//! Integration tests: real Postgres, real nodes; a module for each promise.

#![expect(clippy::unwrap_used, reason = "in a test, what cannot be had is a failure")]
#![expect(
    clippy::disallowed_methods,
    reason = "a test's tasks end with its runtime, and tests are told where Postgres is"
)]

mod access;
mod auth;
mod busy;
mod capture;
mod capture_binding;
mod capture_writes;
mod container;
mod contents;
mod cors;
mod deliver;
mod deployment;
mod doctor;
mod drain;
mod election;
mod emit;
mod encodings;
mod endpoints;
mod failover;
mod filter;
mod first_hour;
mod gaps;
mod hidden;
mod history_memory;
mod key_check;
mod left;
mod limits;
mod listen;
mod locks;
mod looks;
mod migrations;
mod neighbour;
mod oldest;
mod partitions;
mod patience;
mod pooler;
mod private_server;
mod protocol;
mod query;
mod relay;
mod reshaped;
mod resume;
mod revocation;
mod schema;
mod settings_of_others;
mod shape;
mod sse;
mod starvation;
mod strictness;
mod support;
mod tidy;
mod tracking;
mod values;
mod websocket_cases;
