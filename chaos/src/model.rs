//! The core of the protocol as small models that are searched exhaustively: every order of every step, up to a handful
//! of transactions, nodes and clients.
//!
//! - [`relay`]: ids and xids are given in one order and committed in another; who claims, in which order, and who may
//!   commit a claim after the lock has passed to somebody else.
//! - [`feed`]: notifications are lost or come late, rings and the log are trimmed, clients resume on either node.
//! - [`failover`]: a tail is lost or not, epochs and cursors, the old primary comes back.
//! - [`snapshot`]: the hand-over from a snapshot to the stream. The server has no snapshots yet; the rule is checked
//!   before it is built.
//!
//! Each model also holds wrong designs, and for each the search must find the history in which it breaks a promise: a
//! model that lets everything pass proves nothing. For the same reason each has "sometimes" properties, which demand that
//! what is interesting really happens. Time, sizes, bytes and SQL are not modelled, nor are chunks that come twice or in
//! another order, parts of large transactions and the snapshot's numbers (who runs is known here), nor how an old primary
//! is told from a new one (that it is refused is assumed): those are the campaign's and the tests' business.

mod failover;
mod feed;
mod relay;
mod snapshot;

use stateright::{Checker, HasDiscoveries, Model};

/// Everything that the model says of itself holds, the "sometimes" properties included.
#[track_caller]
fn holds<M>(model: M)
where
    M: Model + Send + Sync + 'static,
    M::State: Send + Sync + std::hash::Hash + std::fmt::Debug + Clone + PartialEq,
    M::Action: std::fmt::Debug + Clone + PartialEq,
{
    let checker = model.checker().threads(2).spawn_bfs().join();
    println!("{} states", checker.unique_state_count());
    checker.assert_properties();
}

/// The search finds a history in which the wrong design breaks `property`.
#[track_caller]
fn breaks<M>(model: M, property: &'static str)
where
    M: Model + Send + Sync + 'static,
    M::State: Send + Sync + std::hash::Hash + std::fmt::Debug + Clone + PartialEq,
    M::Action: std::fmt::Debug + Clone + PartialEq,
{
    let found = HasDiscoveries::AllOf([property].into());
    let checker = model.checker().threads(2).finish_when(found).spawn_bfs().join();
    assert!(
        checker.discovery(property).is_some(),
        "{property} was not broken in {} states",
        checker.unique_state_count()
    );
}
