//! Tidewire: a live, resumable change feed from Postgres.
//!
//! `docs/ARCHITECTURE.md` draws the house; each module's head says what lives there.

pub mod auth;
pub mod backoff;
pub mod cli;
pub mod client;
pub mod cluster;
pub mod config;
pub mod cursor;
pub mod dev;
pub mod event;
pub mod failpoint;
pub mod feed;
pub mod filter;
pub mod follower;
pub mod http;
pub mod hub;
pub mod lifecycle;
pub mod log;
pub mod mutant;
pub mod node;
pub mod postgres;
pub mod protocol;
pub mod relay;
pub mod schema;
pub mod session;
pub mod table_name;
pub mod telemetry;

/// Raises this process's limit of open files to what it may have: a connection is a file.
///
/// # Errors
/// When the system refuses.
pub fn raise_file_limit() -> std::io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}
