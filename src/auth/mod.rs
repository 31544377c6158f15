//! Who may do what: API keys, their scopes, and the store that judges tokens.
//!
//! [`key`] and [`scope`] are pure (ground floor); [`store`] and [`ticket`] hold the SQL (first floor).

pub mod key;
pub mod scope;
pub mod store;
pub mod ticket;
