//! The driver against a server that says what a real one never would, or not on demand.

use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::{WebSocketStream, accept_async};

use super::*;

/// No step of these tests takes longer, unless it hangs.
const DEADLINE: Duration = Duration::from_secs(20);

fn cursor(seq: u64) -> Cursor {
    Cursor { epoch: 1, seq, check: 0 }
}

fn welcome(heartbeat_ms: u64, progress_ms: u64) -> String {
    format!(
        r#"{{"type":"welcome","version":1,"connection":"c","node":"n","heartbeat_ms":{heartbeat_ms},"progress_ms":{progress_ms},"window":{{"memory_ms":1,"history_ms":2}},"limits":{{"message_bytes":65536,"subscriptions":128,"filter_bytes":4096,"messages_per_s":20,"frame_bytes":1048576}}}}"#
    )
}

fn events(prev: u64, seqs: std::ops::RangeInclusive<u64>) -> String {
    let event = |seq| {
        format!(
            r#"{{"seq":{seq},"id":"5f0c0e4c-9a39-4f9b-8f54-6a3b7f1f2a10","table":"public.t","op":"INSERT","before":null,"after":{{"n":{seq}}},"tx":"9","tx_end":true,"ts":"2026-11-20T10:00:00+00:00"}}"#
        )
    };
    let last = cursor(*seqs.end());
    let list: Vec<_> = seqs.map(event).collect();
    format!(
        r#"{{"type":"events","id":"s1","prev":"{}","cursor":"{last}","events":[{}]}}"#,
        cursor(prev),
        list.join(",")
    )
}

fn at(kind: &str, seq: u64) -> String {
    match kind {
        "subscribed" => {
            format!(
                r#"{{"type":"subscribed","id":"s1","cursor":"{}","recovered":true,"source":"memory"}}"#,
                cursor(seq)
            )
        }
        kind => format!(r#"{{"type":"{kind}","id":"s1","cursor":"{}"}}"#, cursor(seq)),
    }
}

/// One server, whose connections the test plays by hand.
struct Stage {
    listener: TcpListener,
}

struct Actor(WebSocketStream<TcpStream>);

impl Stage {
    async fn new() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    fn options(&self) -> ConnectOptions {
        ConnectOptions::new(format!("http://{}", self.listener.local_addr().unwrap())).key("cdc_test")
    }

    async fn accept(&self) -> Actor {
        let (stream, _) = self.listener.accept().await.unwrap();
        Actor(accept_async(stream).await.unwrap())
    }

    /// A client with one subscription that stands at 5, and the server's side of it.
    async fn subscribed(&self, options: ConnectOptions) -> (Client, Subscription, Actor) {
        let server = async {
            let mut actor = self.accept().await;
            actor.say(&welcome(30_000, 5_000)).await;
            actor.hear().await;
            actor.say(&at("subscribed", 5)).await;
            actor
        };
        let client = async {
            let client = Client::connect(options).await.unwrap();
            let subscription = client.subscribe(SubscribeOptions::tables(["t"])).await.unwrap();
            (client, subscription)
        };
        let ((client, subscription), actor) = tokio::join!(client, server);
        (client, subscription, actor)
    }
}

impl Actor {
    async fn say(&mut self, text: &str) {
        self.0.send(Message::text(text)).await.unwrap();
    }

    async fn hear(&mut self) -> serde_json::Value {
        loop {
            if let Message::Text(text) = self.0.next().await.unwrap().unwrap() {
                return serde_json::from_str(&text).unwrap();
            }
        }
    }
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.expect("a step of the test hangs")
}

async fn seqs(subscription: &mut Subscription) -> Vec<u64> {
    loop {
        if let Item::Batch(batch) = subscription.next().await.unwrap().unwrap() {
            return batch.events.iter().map(|event| event.seq).collect();
        }
    }
}

#[tokio::test]
async fn a_wrong_prev_makes_the_client_reconnect_and_resume_from_what_it_handed_out() {
    within(async {
        let stage = Stage::new().await;
        let (_client, mut subscription, mut actor) = stage.subscribed(stage.options()).await;
        actor.say(&events(5, 6..=7)).await;
        assert_eq!(seqs(&mut subscription).await, [6, 7]);
        actor.say(&events(8, 9..=9)).await;
        let (news, mut actor) = tokio::join!(subscription.next(), stage.accept());
        let Some(Ok(Item::Disconnected { cause: Disconnect::Mismatch { .. }, .. })) = news else { panic!("{news:?}") };
        actor.say(&welcome(30_000, 5_000)).await;
        assert_eq!(actor.hear().await["from"]["cursor"], cursor(7).to_string());
        actor.say(&at("subscribed", 7)).await;
        actor.say(&events(7, 8..=9)).await;
        let news = subscription.next().await;
        let Some(Ok(Item::Resumed(resumed))) = news else { panic!("{news:?}") };
        assert_eq!((resumed.from, resumed.attempt), (cursor(7), 1));
        assert_eq!(seqs(&mut subscription).await, [8, 9]);
        assert_eq!(subscription.position(), cursor(7));
        subscription.ack();
        assert_eq!(subscription.position(), cursor(9));
    })
    .await;
}

#[tokio::test]
async fn what_was_received_but_not_handed_out_comes_again_and_only_once() {
    within(async {
        let stage = Stage::new().await;
        let (client, mut subscription, mut actor) = stage.subscribed(stage.options()).await;
        actor.say(&events(5, 6..=6)).await;
        actor.say(&events(6, 7..=7)).await;
        // The echo says that both frames are in the client's hands; one is handed out.
        let (pong, ()) = tokio::join!(client.ping(), async {
            let t = actor.hear().await["t"].clone();
            actor.say(&format!(r#"{{"type":"pong","t":{t}}}"#)).await;
        });
        pong.unwrap();
        assert_eq!(seqs(&mut subscription).await, [6]);
        drop(actor);
        let mut actor = stage.accept().await;
        actor.say(&welcome(30_000, 5_000)).await;
        assert_eq!(actor.hear().await["from"]["cursor"], cursor(6).to_string());
        actor.say(&at("subscribed", 6)).await;
        actor.say(&events(6, 6..=8)).await;
        assert_eq!(seqs(&mut subscription).await, [7, 8]);
    })
    .await;
}

#[tokio::test]
async fn silence_is_noticed() {
    within(async {
        let stage = Stage::new().await;
        let server = async {
            let mut actor = stage.accept().await;
            actor.say(&welcome(30_000, 20)).await;
            actor.hear().await;
            actor.say(&at("subscribed", 5)).await;
            actor.say(&at("caught_up", 5)).await;
            actor
        };
        let client = async {
            let client = Client::connect(stage.options()).await.unwrap();
            client.subscribe(SubscribeOptions::tables(["t"])).await.unwrap()
        };
        let (mut subscription, _silent) = tokio::join!(client, server);
        loop {
            match subscription.next().await {
                Some(Ok(Item::Disconnected { cause: Disconnect::Silence(_), .. })) => break,
                Some(Ok(Item::CaughtUp { .. })) => {}
                other => panic!("{other:?}"),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_final_close_ends_every_subscription_with_its_reason() {
    within(async {
        let stage = Stage::new().await;
        let (client, mut subscription, mut actor) = stage.subscribed(stage.options()).await;
        actor.say(r#"{"type":"error","code":"unauthenticated","message":"revoked by ada","retry":"never"}"#).await;
        let frame = CloseFrame { code: 4440.into(), reason: "key revoked".into() };
        actor.0.send(Message::Close(Some(frame))).await.unwrap();
        let error = subscription.next().await.unwrap().unwrap_err();
        assert!(matches!(error, ClientError::Closed { code: 4440, .. }));
        assert!(error.to_string().contains("revoked by ada"), "{error}");
        assert!(subscription.next().await.is_none());
        assert_eq!(client.ping().await, Err(error));
    })
    .await;
}

#[tokio::test]
async fn a_client_whose_server_is_gone_gives_up_at_the_limit() {
    within(async {
        let stage = Stage::new().await;
        let (_client, mut subscription, actor) = stage.subscribed(stage.options().attempts(1)).await;
        drop((actor, stage));
        assert!(matches!(subscription.next().await, Some(Ok(Item::Disconnected { .. }))));
        let error = subscription.next().await.unwrap().unwrap_err();
        assert!(matches!(error, ClientError::GaveUp { attempts: 1, .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn an_unread_subscription_stops_the_reading_and_loses_nothing() {
    within(async {
        let stage = Stage::new().await;
        let (_client, mut subscription, mut actor) = stage.subscribed(stage.options()).await;
        const FRAMES: u64 = 2_000;
        let server = async {
            for seq in 6..6 + FRAMES {
                actor.say(&events(seq - 1, seq..=seq)).await;
            }
        };
        let reader = async {
            for seq in 6..6 + FRAMES {
                assert_eq!(seqs(&mut subscription).await, [seq]);
            }
        };
        tokio::join!(server, reader);
    })
    .await;
}

#[tokio::test]
async fn dropping_a_subscription_unsubscribes_and_dropping_the_rest_says_goodbye() {
    within(async {
        let stage = Stage::new().await;
        let (client, subscription, mut actor) = stage.subscribed(stage.options()).await;
        drop(subscription);
        let message = actor.hear().await;
        assert_eq!((message["type"].as_str(), message["id"].as_str()), (Some("unsubscribe"), Some("s1")));
        drop(client);
        assert!(matches!(actor.0.next().await, Some(Ok(Message::Close(_)))));
    })
    .await;
}

#[tokio::test]
async fn an_address_where_nobody_listens_is_told_within_seconds() {
    let stage = Stage::new().await;
    let options = stage.options();
    drop(stage);
    let error = within(Client::connect(options)).await.unwrap_err();
    assert!(matches!(error, ClientError::GaveUp { .. }), "{error}");
}
