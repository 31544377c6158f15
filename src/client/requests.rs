//! The `sync` requests of a client: one is under way at a time, so that a slow one costs the server one place.
//!
//! Pure. A request outlives its connection and is asked again on the next one, until its own deadline.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Names a request between the machine and the driver.
pub(super) type Token = u64;

/// A little more than the server's own limit, so that its answer wins.
const GRACE: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Pending {
    token: Token,
    tx: String,
    timeout: Duration,
    deadline: Instant,
    asked: bool,
}

/// Most answers that are still awaited of requests that have expired.
const MAX_OWED: usize = 64;

/// Requests in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pending: VecDeque<Pending>,
    // Transactions of expired requests whose answer may still come on this connection.
    owed: VecDeque<String>,
}

impl Requests {
    pub(super) fn add(&mut self, token: Token, tx: String, timeout: Duration, now: Instant) {
        self.pending.push_back(Pending { token, tx, timeout, deadline: now + timeout, asked: false });
    }

    /// The request to send now, with the time that it has left.
    pub(super) fn next(&mut self, now: Instant) -> Option<(String, Duration)> {
        let head = self.pending.front_mut().filter(|head| !head.asked)?;
        head.asked = true;
        Some((head.tx.clone(), head.deadline.saturating_duration_since(now)))
    }

    /// A new connection knows of none.
    pub(super) fn restart(&mut self) {
        self.owed.clear();
        for request in &mut self.pending {
            request.asked = false;
        }
    }

    /// The one that `synced` answers.
    pub(super) fn synced(&mut self, tx: &str) -> Option<Token> {
        let found = self.pending.pop_front_if(|head| head.asked && head.tx == tx).map(|head| head.token);
        if found.is_none()
            && let Some(late) = self.owed.iter().position(|owed| owed == tx)
        {
            self.owed.remove(late);
        }
        found
    }

    /// The one that an `error` of this transaction answers. Of two about the same one the overdue answer comes first.
    pub(super) fn refused(&mut self, tx: &str) -> Option<Token> {
        if let Some(late) = self.owed.iter().position(|owed| owed == tx) {
            self.owed.remove(late);
            return None;
        }
        self.pending.pop_front_if(|head| head.asked && head.tx == tx).map(|head| head.token)
    }

    /// When [`expired`](Self::expired) has something to say.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.pending.iter().map(|request| request.deadline + GRACE).min()
    }

    /// Those without an answer in time.
    pub(super) fn expired(&mut self, now: Instant) -> Vec<(Token, Duration)> {
        let Self { pending, owed } = self;
        let mut expired = Vec::new();
        pending.retain_mut(|request| {
            let late = now >= request.deadline + GRACE;
            if late {
                expired.push((request.token, request.timeout));
                if request.asked {
                    owed.push_back(std::mem::take(&mut request.tx));
                }
            }
            !late
        });
        let excess = owed.len().saturating_sub(MAX_OWED);
        owed.drain(..excess);
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_is_under_way_at_a_time_and_is_asked_again_after_a_loss() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let mut requests = Requests::default();
        requests.add(1, "70".into(), second, now);
        requests.add(2, "71".into(), second, now);
        assert_eq!(requests.next(now), Some(("70".into(), second)));
        assert_eq!(requests.next(now), None);
        assert_eq!(requests.synced("71"), None);
        requests.restart();
        assert_eq!(requests.next(now).map(|next| next.0), Some("70".into()));
        assert_eq!(requests.synced("70"), Some(1));
        assert_eq!(requests.next(now).map(|next| next.0), Some("71".into()));
        assert_eq!(requests.refused("71"), Some(2));
    }

    #[test]
    fn a_request_without_an_answer_expires_after_the_servers_own_limit() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let mut requests = Requests::default();
        requests.add(1, "70".into(), second, now);
        assert!(requests.expired(now + second).is_empty());
        assert_eq!(requests.expired(now + second + GRACE), [(1, second)]);
        assert_eq!(requests.deadline(), None);
    }

    #[test]
    fn the_late_answer_to_an_expired_request_is_not_taken_for_the_next_ones() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let mut requests = Requests::default();
        requests.add(1, "70".into(), second, now);
        requests.next(now).unwrap();
        let later = now + second + GRACE;
        requests.expired(later);
        requests.add(2, "71".into(), second, later);
        requests.next(later).unwrap();
        assert_eq!(requests.refused("70"), None, "that one is over");
        assert_eq!(requests.refused("71"), Some(2));
        requests.add(3, "71".into(), second, later);
        requests.next(later).unwrap();
        requests.expired(later + second + GRACE);
        requests.add(4, "71".into(), second, later);
        requests.next(later).unwrap();
        assert_eq!(requests.refused("71"), None, "the first answer is the first request's");
        assert_eq!(requests.refused("71"), Some(4));
    }
}
