//! What a connection may see and what it counts against: one value, which an `auth` message replaces as a whole.
//!
//! What is asked and not yet answered is checked again under the new value, and every subscription that runs delivers
//! nothing until it has been: so nothing is ever sent that the key in force may not read.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use super::{Done, Session, millis, refused};
use crate::auth::store::Access;
use crate::cluster::ConnectionGuard;
use crate::hub::Tap;
use crate::protocol::VERSION;
use crate::protocol::close::CloseCode;
use crate::protocol::error::{ErrorCode, WireError};
use crate::protocol::message::{Auth, Welcome, Window};
use crate::session::start;

/// A connection's key, its place among that key's connections, and the end of both.
pub(super) struct Grant {
    /// Rises when an `auth` brings other scopes: what was decided under another view does not count.
    pub(super) view: u64,
    pub(super) access: Access,
    pub(super) ended: Pin<Box<dyn Future<Output = CloseCode> + Send>>,
    guard: ConnectionGuard,
}

/// Credentials that are good.
pub(super) struct Admitted {
    access: Access,
    // None: the key is the one that the connection has, and its place stays.
    guard: Option<ConnectionGuard>,
}

impl Admitted {
    pub(super) const fn new(access: Access, guard: ConnectionGuard) -> Self {
        Self { access, guard: Some(guard) }
    }
}

impl Session {
    #[expect(clippy::disallowed_methods, reason = "the edge: keys expire by the clock on the wall")]
    pub(super) fn authenticate(&mut self, auth: Auth) {
        let context = Arc::clone(&self.context);
        let held = self.grant.as_ref().map(|grant| grant.access.key_id.clone());
        self.work.push(Box::pin(async move {
            if auth.role.is_some() || auth.password.is_some() {
                let what = "database credentials are not offered by this version: send an API key as token";
                let refused = (WireError::never(ErrorCode::Unsupported, what), CloseCode::Unauthenticated);
                return Done::Authenticated(Err(refused));
            }
            let checked = context.keys.authenticate(auth.token.as_deref().unwrap_or(""), chrono::Utc::now()).await;
            let outcome = if checked.is_ok() { "accepted" } else { "refused" };
            context.metrics.auth_total.with_label_values(&[outcome]).inc();
            let access = match checked {
                Ok(access) => access,
                Err(error) => return Done::Authenticated(Err(refused(&error))),
            };
            if held.as_ref() == Some(&access.key_id) {
                return Done::Authenticated(Ok(Admitted { access, guard: None }));
            }
            let limit = access.scopes.max_connections();
            if let Ok(guard) = context.limiter.try_acquire(&access.key_id, limit) {
                return Done::Authenticated(Ok(Admitted::new(access, guard)));
            }
            context.metrics.admissions_deferred_total.inc();
            let guard = context.limiter.acquire(&access.key_id, limit).await.map_err(|over| {
                let error = WireError::backoff(ErrorCode::RateLimited, over.to_string(), 5_000);
                (error, CloseCode::TooManyConnections)
            });
            Done::Authenticated(guard.map(|guard| Admitted::new(access, guard)))
        }));
    }

    /// The connection is this key's from now on. A place of another key's is given back once the new one is taken.
    pub(super) fn admit(&mut self, Admitted { access, guard }: Admitted) {
        let before = self.grant.take();
        let (first, same) = (before.is_none(), before.as_ref().is_some_and(|old| old.access.scopes == access.scopes));
        let view = before.as_ref().map_or(0, |old| old.view + u64::from(!same));
        let Some(guard) = guard.or(before.map(|old| old.guard)) else {
            let what = "the connection has no place among its key's: connect again";
            self.machine.refuse(WireError::backoff(ErrorCode::Internal, what, 1_000), CloseCode::Internal);
            return;
        };
        let followed = access.clone();
        let ended = Box::pin(async move { followed.ended().await });
        self.grant = Some(Grant { view, access, ended, guard });
        if first {
            self.welcome();
            return;
        }
        self.machine.renewed();
        if !same {
            self.check_again();
        }
    }

    fn welcome(&mut self) {
        let options = &self.context.options;
        let memory = self.context.hub.ring_age();
        self.machine.welcome(Welcome {
            version: VERSION,
            connection: self.name.clone(),
            node: self.context.node.clone(),
            heartbeat_ms: millis(options.heartbeat),
            progress_ms: millis(options.progress),
            window: Window { memory_ms: millis(memory), history_ms: millis(options.history) },
            limits: options.limits,
        });
    }

    /// Every running subscription is checked under the new scopes; until then it delivers nothing.
    fn check_again(&mut self) {
        let Some(grant) = &self.grant else { return };
        for place in &mut self.places {
            place.suspended = true;
            place.page = None;
            let (context, scopes, view) = (Arc::clone(&self.context), Arc::clone(&grant.access.scopes), grant.view);
            let (id, subscribe, signal) =
                (Arc::clone(&place.id), Arc::clone(&place.subscribe), Arc::clone(&self.signal));
            self.work.push(Box::pin(async move {
                let tap = start::rejoin(&context, &scopes, &subscribe, &signal).await;
                Done::Checked { id, view, tap }
            }));
        }
    }

    /// A running subscription was checked: it goes on from its position with what the key may see, or ends.
    pub(super) fn checked(&mut self, id: &Arc<str>, view: u64, tap: Result<Tap, WireError>) {
        // Another `auth` came meanwhile: its own check is under way.
        if self.grant.as_ref().is_none_or(|grant| grant.view != view) {
            return;
        }
        // By pointer: a later subscription of the same id is not the one that was checked.
        let Some(place) = self.places.iter_mut().find(|place| Arc::ptr_eq(&place.id, id)) else { return };
        match tap {
            Ok(tap) => {
                // What was found but not sent yet was found for the old key.
                place.found = None;
                place.tap = tap;
                place.suspended = false;
            }
            Err(error) => self.machine.refused(id, error),
        }
    }
}
