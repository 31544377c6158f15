//! Single-use tickets: what stands in a URL where a key must not.
//!
//! A browser's `EventSource` cannot send headers, and a key in a query string ends up in logs. So the page asks with its
//! key for a ticket (`POST /v1/tickets`) and opens `?ticket=…` within [`TICKET_TTL`]. Whoever redeems it comes in as the
//! key does at that moment.
//!
//! Tickets live in Postgres, since a balancer may send their bearer to another node: the hash alone, in an unlogged table
//! that may be empty after a crash, which only makes clients ask again. Redeeming is one DELETE, so a ticket works once
//! in the whole cluster. Time is the database's.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use sqlx::Row;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::auth::key::{KeyId, SECRET_CHARS, push_random};
use crate::postgres::Database;
use crate::telemetry::repeats::Repeats;

/// How long a ticket can be redeemed.
pub const TICKET_TTL: Duration = Duration::from_secs(30);
/// Tickets of one key that wait to be redeemed: a page load of a thousand browsers within [`TICKET_TTL`].
pub const MAX_PENDING_TICKETS: i64 = 1_000;
/// Before every ticket, so that it is not taken for a key.
const TICKET_PREFIX: &str = "tkt_";
/// Expired tickets that each new one takes away: more than come in, so they cannot pile up.
const SWEPT_TICKETS: i64 = 100;
/// Statements at a time: whoever guesses tickets, which needs no key, leaves connections to clients that are let in.
const MAX_STATEMENTS: usize = 2;
/// Longest wait for Postgres, a place among the statements included.
const QUERY_TIMEOUT: Duration = Duration::from_secs(4);

/// A ticket. Its `Debug` shows nothing; [`Ticket::expose`] is the only way to the text.
pub struct Ticket(String);

impl Ticket {
    /// The text, for the one who asked for it. Never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(..)")
    }
}

/// A ticket was not given, or not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Mistyped, used, expired, or lost in a crash of Postgres: which, is not told.
    #[error("the ticket is not valid: a ticket works once and for {} seconds, ask for a new one", TICKET_TTL.as_secs())]
    Invalid,
    /// More than [`MAX_PENDING_TICKETS`] of the key are waiting.
    #[error("this key has {MAX_PENDING_TICKETS} tickets that nobody has used: wait until they expire")]
    TooMany,
    /// Postgres did not answer.
    #[error("tickets cannot be given or checked right now: try again with backoff")]
    Unavailable,
}

/// Gives and takes tickets. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tickets {
    database: Arc<Database>,
    places: Arc<Semaphore>,
    // For the log: whoever redeems needs no key, so an outage is told as often as somebody likes.
    repeats: Arc<Repeats>,
}

impl Tickets {
    /// Over this database.
    #[must_use]
    pub fn new(database: Arc<Database>) -> Self {
        Self { database, places: Arc::new(Semaphore::new(MAX_STATEMENTS)), repeats: Arc::default() }
    }

    /// A ticket that stands for this key. The limit of pending ones is not exact when several are asked for at once.
    ///
    /// # Errors
    /// [`TicketError::TooMany`], [`TicketError::Unavailable`].
    pub async fn issue(&self, key_id: &KeyId) -> Result<Ticket, TicketError> {
        let mut text = String::from(TICKET_PREFIX);
        push_random(&mut text, SECRET_CHARS, &mut rand::rng());
        let pool = self.database.clients();
        let insert = sqlx::query(
            "WITH expired AS MATERIALIZED (
                 SELECT ticket_hash FROM tidewire.tickets
                 WHERE expires_at <= clock_timestamp()
                 LIMIT $5
                 FOR UPDATE SKIP LOCKED
             ), swept AS (
                 DELETE FROM tidewire.tickets AS t USING expired WHERE t.ticket_hash = expired.ticket_hash
             ), pending AS (
                 SELECT FROM tidewire.tickets
                 WHERE key_id = $2 AND expires_at > clock_timestamp()
                 LIMIT $4
             )
             INSERT INTO tidewire.tickets (ticket_hash, key_id, expires_at)
             SELECT $1, $2, clock_timestamp() + $3 * interval '1 second'
             WHERE (SELECT count(*) FROM pending) < $4",
        )
        .bind(hash(&text))
        .bind(key_id.as_str())
        .bind(TICKET_TTL.as_secs_f64())
        .bind(MAX_PENDING_TICKETS)
        .bind(SWEPT_TICKETS)
        .execute(&pool);
        match self.answered(insert).await?.rows_affected() {
            0 => Err(TicketError::TooMany),
            _ => Ok(Ticket(text)),
        }
    }

    /// Takes a ticket: whose key it stands for. Judge that key anew with `KeyStore::admit`.
    ///
    /// # Errors
    /// [`TicketError::Invalid`], [`TicketError::Unavailable`].
    pub async fn redeem(&self, ticket: &str) -> Result<KeyId, TicketError> {
        let shaped = ticket.strip_prefix(TICKET_PREFIX).is_some_and(|secret| secret.len() == SECRET_CHARS);
        if !shaped {
            return Err(TicketError::Invalid);
        }
        let pool = self.database.clients();
        let delete = sqlx::query(
            "DELETE FROM tidewire.tickets WHERE ticket_hash = $1
             RETURNING key_id, expires_at > clock_timestamp() AS valid",
        )
        .bind(hash(ticket))
        .fetch_optional(&pool);
        let row = self.answered(delete).await?.ok_or(TicketError::Invalid)?;
        match (row.try_get("valid"), row.try_get("key_id")) {
            (Ok(true), Ok(key_id)) => Ok(KeyId::from_stored(key_id)),
            _ => Err(TicketError::Invalid),
        }
    }

    async fn answered<T>(&self, query: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, TicketError> {
        let bounded = async {
            let _place = self.places.acquire().await;
            query.await
        };
        let failed = match timeout(QUERY_TIMEOUT, bounded).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".to_owned(),
        };
        if let Some(repeated) = self.repeats.happened(Instant::now(), &failed) {
            tracing::warn!(error = failed, repeated, "tickets cannot be read or written");
        }
        Err(TicketError::Unavailable)
    }
}

/// The table is asked for a hash, so how far an index lookup goes says nothing about any ticket.
fn hash(ticket: &str) -> Vec<u8> {
    Sha256::digest(ticket.as_bytes()).to_vec()
}
