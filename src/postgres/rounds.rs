//! Questions to Postgres that many ask at the same time, as one.
//!
//! Those who ask while a round is under way share the next one, whose question begins after all of them asked: nobody is
//! given an answer that is older than the wish for it. One round runs at a time, and not before a pause since the last, so
//! what clients can make a node ask is bounded in connections (one) and in rate, however many they are.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio::time::Instant;

/// Rounds of one kind of question. `K` is what each asks about, `A` the answer for all.
#[derive(Debug)]
pub struct Rounds<K, A> {
    // The one that is still joined.
    next: Mutex<Arc<Round<K, A>>>,
    // When the last one began.
    turn: tokio::sync::Mutex<Option<Instant>>,
    pause: Duration,
}

#[derive(Debug)]
struct Round<K, A> {
    keys: Mutex<BTreeSet<K>>,
    answer: OnceCell<A>,
}

impl<K, A> Round<K, A> {
    fn new() -> Arc<Self> {
        Arc::new(Self { keys: Mutex::new(BTreeSet::new()), answer: OnceCell::new() })
    }
}

impl<K: Ord + Clone, A: Clone> Rounds<K, A> {
    /// Rounds that begin at least `pause` apart.
    #[must_use]
    pub fn new(pause: Duration) -> Self {
        Self { next: Mutex::new(Round::new()), turn: tokio::sync::Mutex::default(), pause }
    }

    /// Asks about `key` together with everyone who asks now. `question` is given all keys and must end by itself. Whoever comes
    /// first asks for all; if it is cancelled, another takes over.
    pub async fn ask<F: Future<Output = A>>(&self, key: K, question: impl FnOnce(BTreeSet<K>) -> F) -> A {
        let round = {
            let next = self.next.lock();
            next.keys.lock().insert(key);
            Arc::clone(&next)
        };
        round.answer.get_or_init(|| self.run(&round, question)).await.clone()
    }

    async fn run<F: Future<Output = A>>(&self, round: &Arc<Round<K, A>>, question: impl FnOnce(BTreeSet<K>) -> F) -> A {
        let mut began = self.turn.lock().await;
        if let Some(began) = *began {
            tokio::time::sleep_until(began + self.pause).await;
        }
        *began = Some(Instant::now());
        {
            let mut next = self.next.lock();
            if Arc::ptr_eq(&next, round) {
                *next = Round::new();
            }
        }
        // A copy: whoever takes over after a cancellation needs them too.
        let keys = round.keys.lock().clone();
        question(keys).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_who_ask_during_a_round_share_the_next() {
        let rounds: Rounds<u64, usize> = Rounds::new(Duration::from_millis(20));
        let asked = AtomicUsize::new(0);
        let ask = |key| {
            rounds.ask(key, |keys| {
                asked.fetch_add(1, Ordering::Relaxed);
                async move {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    keys.len()
                }
            })
        };
        let began = Instant::now();
        let first = async { ask(1).await };
        let others = async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            futures_util::future::join_all((2..100).map(ask)).await
        };
        let (first, others) = tokio::join!(first, others);
        assert_eq!((first, asked.load(Ordering::Relaxed)), (1, 2));
        assert!(others.iter().all(|keys| *keys == 98), "{others:?}");
        assert!(began.elapsed() >= Duration::from_millis(25), "rounds are apart");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_takes_over_asks_for_all() {
        let rounds: Rounds<u64, usize> = Rounds::new(Duration::ZERO);
        let first = rounds.ask(1, |_| std::future::pending());
        let second = async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            rounds.ask(2, async |keys: BTreeSet<u64>| keys.len()).await
        };
        let first = tokio::time::timeout(Duration::from_millis(5), first);
        let (first, second) = tokio::join!(first, second);
        assert!(first.is_err());
        assert_eq!(second, 1, "it came after the first round had begun");
    }
}
