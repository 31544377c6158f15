//! Tidewire: a live, resumable change feed from Postgres.
//!
//! `docs/ARCHITECTURE.md` draws the house; each module's head says what lives there.

pub mod auth;
pub mod backoff;
pub mod cli;
<<<<<<< HEAD
pub mod cluster;
=======
pub mod client;
>>>>>>> client
pub mod cursor;
pub mod dev;
pub mod event;
pub mod feed;
pub mod filter;
pub mod follower;
pub mod http;
pub mod hub;
pub mod lifecycle;
pub mod log;
pub mod postgres;
pub mod protocol;
pub mod relay;
pub mod schema;
pub mod session;
pub mod table_name;
pub mod telemetry;
