//! What integration tests stand on: a real Postgres and, for each test, a database of its own in it.
pub(crate) mod postgres;
pub(crate) mod relay;

/// Every wait on a fact in these tests ends here, in failure. Generous: machines under load are slow, not wrong.
pub(crate) const DEADLINE: std::time::Duration = std::time::Duration::from_secs(30);
