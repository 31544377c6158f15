//! Questions to Postgres that many ask at the same time, as one.
//!
//! Those who ask while a round is under way share the next one, whose question begins after all of them asked: nobody is
//! given an answer that is older than the request for it. One round runs at a time, and not before a pause since the last, so
//! what clients can make a node ask is bounded in connections (one) and in rate, however many they are.
//!
//! A round runs in a task of its own and holds its turn there: whether those who wait for it are polled, or dropped, is
//! nothing to anybody else. A round that nobody waits for any more asks nothing.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::lifecycle::Lifecycle;

/// Rounds of one kind of question. `K` is what each asks about, `A` the answer for all.
#[derive(Debug)]
pub struct Rounds<K, A> {
    shared: Arc<Shared<K, A>>,
    lifecycle: Lifecycle,
}

#[derive(Debug)]
struct Shared<K, A> {
    // The round that is still joined; its task waits for its turn.
    next: Mutex<Option<Round<K, A>>>,
    // When the last one began.
    turn: tokio::sync::Mutex<Option<Instant>>,
    pause: Duration,
    most: usize,
}

#[derive(Debug)]
struct Round<K, A> {
    keys: BTreeSet<K>,
    answer: watch::Receiver<Option<A>>,
}

/// How one who asks stands to the round whose answer comes next.
enum Place {
    /// Its question has the key.
    Inside,
    /// Its question is as long as it may be: there is room in the one after it.
    Outside,
}

impl<K, A> Rounds<K, A>
where
    K: Ord + Clone + Send + 'static,
    A: Clone + Send + Sync + 'static,
{
    /// Rounds about at most `most` keys each that begin at least `pause` apart, in tasks of this life.
    #[must_use]
    pub fn new(lifecycle: Lifecycle, pause: Duration, most: usize) -> Self {
        let shared = Shared { next: Mutex::new(None), turn: tokio::sync::Mutex::default(), pause, most };
        Self { shared: Arc::new(shared), lifecycle }
    }

    /// Asks about `key` together with everyone who asks now. The `question` of whoever comes first is asked for all: it is given
    /// all keys and must end by itself. None: the node stops.
    pub async fn ask<F>(&self, key: K, question: impl FnOnce(BTreeSet<K>) -> F + Send + 'static) -> Option<A>
    where
        F: Future<Output = A> + Send + 'static,
    {
        let mut question = Some(question);
        loop {
            let (place, mut answer) = self.join(&key, &mut question);
            let given = answer.wait_for(Option::is_some).await.ok().and_then(|given| given.clone());
            match (place, given) {
                (Place::Outside, Some(_)) => {}
                (_, given) => return given,
            }
        }
    }

    fn join<F>(
        &self,
        key: &K,
        question: &mut Option<impl FnOnce(BTreeSet<K>) -> F + Send + 'static>,
    ) -> (Place, watch::Receiver<Option<A>>)
    where
        F: Future<Output = A> + Send + 'static,
    {
        let mut next = self.shared.next.lock();
        if let Some(round) = next.as_mut() {
            let has_room = round.keys.len() < self.shared.most || round.keys.contains(key);
            if has_room {
                round.keys.insert(key.clone());
            }
            return (if has_room { Place::Inside } else { Place::Outside }, round.answer.clone());
        }
        let (sender, answer) = watch::channel(None);
        // Asked once: whoever has begun a round is inside it.
        if let Some(question) = question.take() {
            *next = Some(Round { keys: BTreeSet::from([key.clone()]), answer: answer.clone() });
            let (shared, hard) = (Arc::clone(&self.shared), self.lifecycle.hard().clone());
            self.lifecycle.spawn("round", async move {
                tokio::select! {
                    () = shared.run(sender, question) => {}
                    () = hard.cancelled() => {}
                }
            });
        }
        (Place::Inside, answer)
    }
}

impl<K, A> Shared<K, A> {
    async fn run<F: Future<Output = A>>(
        &self,
        sender: watch::Sender<Option<A>>,
        question: impl FnOnce(BTreeSet<K>) -> F,
    ) {
        let mut began = self.turn.lock().await;
        if let Some(began) = *began {
            tokio::time::sleep_until(began + self.pause).await;
        }
        let Some(Round { keys, answer }) = self.next.lock().take() else { return };
        drop(answer);
        if sender.is_closed() {
            return;
        }
        *began = Some(Instant::now());
        let _ = sender.send(Some(question(keys).await));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt as _;

    use super::*;

    const PAUSE: Duration = Duration::from_millis(20);
    const ANSWER: Duration = Duration::from_millis(5);

    fn rounds(most: usize) -> Rounds<u64, usize> {
        Rounds::new(Lifecycle::new(), PAUSE, most)
    }

    /// Answers with the number of keys, after a while; counts the questions.
    async fn count(asked: Arc<AtomicUsize>, keys: BTreeSet<u64>) -> usize {
        asked.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(ANSWER).await;
        keys.len()
    }

    #[tokio::test(start_paused = true)]
    async fn all_who_ask_during_a_round_share_the_next() {
        let (rounds, asked) = (rounds(1_000), Arc::new(AtomicUsize::new(0)));
        let ask = |key| {
            let asked = Arc::clone(&asked);
            rounds.ask(key, move |keys| count(asked, keys))
        };
        let began = Instant::now();
        let others = async {
            tokio::time::sleep(ANSWER / 2).await;
            futures_util::future::join_all((2..100).map(ask)).await
        };
        let (first, others) = tokio::join!(ask(1), others);
        assert_eq!((first, asked.load(Ordering::Relaxed)), (Some(1), 2));
        assert!(others.iter().all(|keys| *keys == Some(98)), "{others:?}");
        assert!(began.elapsed() >= PAUSE + ANSWER, "rounds are apart");
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_has_no_more_keys_than_it_may() {
        let (rounds, asked) = (rounds(10), Arc::new(AtomicUsize::new(0)));
        let all = (0..25).map(|key| {
            let asked = Arc::clone(&asked);
            rounds.ask(key, move |keys| count(asked, keys))
        });
        let mut answers = futures_util::future::join_all(all).await;
        answers.sort_unstable();
        assert_eq!(answers, [vec![Some(5); 5], vec![Some(10); 20]].concat());
        assert_eq!(asked.load(Ordering::Relaxed), 3);
    }

    /// Found in review: a WebSocket client that has sent its close frame and reads nothing is not polled, and the turn that its
    /// question held stopped every other client's.
    #[tokio::test(start_paused = true)]
    async fn one_who_is_not_polled_or_gone_holds_up_nobody() {
        let (rounds, asked) = (rounds(10), Arc::new(AtomicUsize::new(0)));
        let ask = |key| {
            let asked = Arc::clone(&asked);
            Box::pin(rounds.ask(key, move |keys| count(asked, keys)))
        };
        // In the middle of a question, and while waiting for the next.
        let mut first = ask(1);
        assert_eq!(first.as_mut().now_or_never(), None);
        tokio::time::sleep(ANSWER / 2).await;
        let mut second = ask(2);
        assert_eq!(second.as_mut().now_or_never(), None);
        assert_eq!(tokio::time::timeout(PAUSE * 3, ask(3)).await, Ok(Some(2)), "held up");
        let third = tokio::time::timeout(ANSWER / 2, ask(4)).await;
        assert!(third.is_err());
        assert_eq!(tokio::time::timeout(PAUSE * 3, ask(5)).await, Ok(Some(2)), "4 has gone; its round is asked");
        assert_eq!((first.await, second.await), (Some(1), Some(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_that_nobody_waits_for_asks_nothing() {
        let (rounds, asked) = (rounds(10), Arc::new(AtomicUsize::new(0)));
        for key in 0..3 {
            let asked = Arc::clone(&asked);
            let ask = rounds.ask(key, move |keys| count(asked, keys));
            assert!(tokio::time::timeout(ANSWER / 2, ask).await.is_err());
        }
        tokio::time::sleep(PAUSE * 3).await;
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_stops_answers_nobody() {
        let rounds = rounds(10);
        rounds.lifecycle.abort();
        assert_eq!(rounds.ask(1, |_| std::future::pending()).await, None);
    }
}
