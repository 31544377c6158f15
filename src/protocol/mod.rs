//! The wire protocol, version 1: message types, error codes, close codes. `docs/PROTOCOL.md` is the contract.
//!
//! Pure: text in, text out. Who may say what, and when, is `session::machine`'s.

pub mod close;
pub mod error;
pub mod framing;
pub mod inbound;
pub mod message;

/// The version that this program speaks.
pub const VERSION: u32 = 1;

/// The WebSocket subprotocol; optional, the conversation is the same without it.
pub const SUBPROTOCOL: &str = "tidewire.v1.json";
