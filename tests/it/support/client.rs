//! A subscriber, by the public client: what it got is checked as it comes.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::FutureExt as _;
use sqlx::PgPool;
use tidewire::client::{Client, ConnectOptions, Cursor, Event, Item, Resumed, SubscribeOptions, Subscription};

use super::{DEADLINE, within};

/// One subscription on a connection of its own. Whatever it reads must rise in seq.
#[derive(Debug)]
pub(crate) struct TestClient {
    pub(crate) client: Client,
    pub(crate) subscription: Subscription,
    waiting: VecDeque<Event>,
    last_seq: u64,
    resumed: Vec<Resumed>,
}

impl TestClient {
    pub(crate) async fn connect(options: ConnectOptions, subscribe: SubscribeOptions) -> Self {
        let client = within("a connection", Client::connect(options)).await.expect("connect");
        let subscription = within("a subscription", client.subscribe(subscribe)).await.expect("subscribe");
        let last_seq = subscription.position().seq;
        Self { client, subscription, waiting: VecDeque::new(), last_seq, resumed: Vec::new() }
    }

    /// The next event.
    pub(crate) async fn event(&mut self) -> Event {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while self.waiting.is_empty() {
            let item = tokio::time::timeout_at(deadline, self.subscription.next()).await;
            let Ok(item) = item else { panic!("no event after seq {} in time", self.last_seq) };
            self.take(item.expect("the subscription goes on").expect("the subscription goes on"));
        }
        self.waiting.pop_front().unwrap()
    }

    /// This many events.
    pub(crate) async fn events(&mut self, count: usize) -> Vec<Event> {
        let mut events = Vec::with_capacity(count);
        for _ in 0..count {
            events.push(self.event().await);
        }
        events
    }

    /// The next events are of the rows with these ids, in this order, and no others.
    pub(crate) async fn expect_keys(&mut self, keys: impl IntoIterator<Item = i64>) {
        let keys: Vec<i64> = keys.into_iter().collect();
        let events = self.events(keys.len()).await;
        assert_eq!(events.iter().map(key_of).collect::<Vec<_>>(), keys);
    }

    /// Nothing is on its way: everything that was committed before this call has been seen.
    pub(crate) async fn expect_nothing_more(&mut self, pool: &PgPool) {
        let tx: String = sqlx::query_scalar("SELECT pg_current_xact_id()::text").fetch_one(pool).await.unwrap();
        within("synced", self.client.sync(tx, Duration::from_secs(20))).await.expect("synced");
        while let Some(Some(item)) = self.subscription.next().now_or_never() {
            self.take(item.expect("the subscription goes on"));
        }
        assert!(self.waiting.is_empty(), "unexpected: {:?}", self.waiting);
    }

    /// Waits until the replay has reached the present; events before it are kept for later.
    pub(crate) async fn caught_up(&mut self) -> Cursor {
        loop {
            let item = within("caught_up", self.subscription.next()).await;
            let item = item.expect("the subscription goes on").expect("the subscription goes on");
            if let Item::CaughtUp { cursor } = item {
                return cursor;
            }
            self.take(item);
        }
    }

    /// The resumes that were seen so far.
    pub(crate) fn resumed(&self) -> &[Resumed] {
        &self.resumed
    }

    /// The node that serves now.
    pub(crate) fn node(&self) -> Option<String> {
        self.client.server().map(|welcome| welcome.node)
    }

    /// Says goodbye; gives the position after what was looked at, which is all that was read.
    pub(crate) async fn disconnect(self) -> Cursor {
        assert!(self.waiting.is_empty(), "read but not looked at: {:?}", self.waiting);
        self.leave().await
    }

    /// Says goodbye; gives the position after what was read, looked at or not.
    pub(crate) async fn leave(mut self) -> Cursor {
        self.subscription.ack();
        let cursor = self.subscription.position();
        within("goodbye", self.client.close()).await;
        cursor
    }

    fn take(&mut self, item: Item) {
        match item {
            Item::Batch(batch) => {
                for event in batch.events {
                    assert!(event.seq > self.last_seq, "seq {} after {}", event.seq, self.last_seq);
                    self.last_seq = event.seq;
                    self.waiting.push_back(event);
                }
            }
            Item::Resumed(resumed) => self.resumed.push(resumed),
            Item::Resync(resync) => panic!("resync: {resync:?}"),
            _ => {}
        }
    }
}

/// The `id` of an event's key.
pub(crate) fn key_of(event: &Event) -> i64 {
    let key: Option<serde_json::Value> = event.key.parse().unwrap();
    key.and_then(|key| key["id"].as_i64()).unwrap_or_else(|| panic!("no key: {event:?}"))
}
