//! A raw WebSocket, for tests of the protocol itself: it says what it is told to and hears what comes.

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderName;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::within;

/// What comes from the server.
#[derive(Debug)]
pub(crate) enum Heard {
    Message(Value),
    Ping,
    Pong,
    /// With its close code; 1006 when there was no close frame.
    Closed(u16),
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Wire {
    /// Connects to `url` (`ws://…`) with these headers, or gives the status and body that came instead of an upgrade.
    pub(crate) async fn connect(url: &str, headers: &[(&str, &str)]) -> Result<Self, (u16, String)> {
        let mut request = url.into_client_request().unwrap();
        for (name, value) in headers {
            let name: HeaderName = name.parse().unwrap();
            request.headers_mut().append(name, value.parse().unwrap());
        }
        match within("the upgrade", Box::pin(connect_async(request))).await {
            Ok((socket, _)) => Ok(Self { socket }),
            Err(Error::Http(response)) => {
                let body = response.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default().into_owned();
                Err((response.status().as_u16(), body))
            }
            Err(error) => panic!("no connection to {url}: {error}"),
        }
    }

    /// Sends JSON text.
    pub(crate) async fn say(&mut self, message: Value) {
        self.send(Message::text(message.to_string())).await;
    }

    /// Sends these in one write.
    pub(crate) async fn say_at_once(&mut self, messages: &[Value]) {
        for message in messages {
            within("sending", self.socket.feed(Message::text(message.to_string()))).await.expect("the socket takes it");
        }
        within("sending", self.socket.flush()).await.expect("the socket takes messages");
    }

    /// Sends anything.
    pub(crate) async fn send(&mut self, message: Message) {
        within("sending", self.socket.send(message)).await.expect("the socket takes a message");
    }

    /// Sends, if the connection takes it within a second.
    pub(crate) async fn takes(&mut self, message: Message) -> bool {
        matches!(tokio::time::timeout(std::time::Duration::from_secs(1), self.socket.send(message)).await, Ok(Ok(())))
    }

    /// Subscribes from now and waits until that stands.
    pub(crate) async fn subscribe(&mut self, id: &str, table: &str) -> Value {
        self.say(json!({"type": "subscribe", "id": id, "tables": [table]})).await;
        self.expect("subscribed").await
    }

    /// Whatever comes next.
    pub(crate) async fn hear(&mut self) -> Heard {
        loop {
            return match within("the server's next word", self.socket.next()).await {
                Some(Ok(Message::Text(text))) => Heard::Message(serde_json::from_str(&text).expect("JSON")),
                Some(Ok(Message::Ping(_))) => Heard::Ping,
                Some(Ok(Message::Pong(_))) => Heard::Pong,
                Some(Ok(Message::Close(Some(frame)))) => Heard::Closed(frame.code.into()),
                Some(Ok(Message::Close(None))) => Heard::Closed(1005),
                Some(Ok(_)) => continue,
                Some(Err(_)) | None => Heard::Closed(1006),
            };
        }
    }

    /// The next message, whatever its type.
    pub(crate) async fn message(&mut self) -> Value {
        loop {
            match self.hear().await {
                Heard::Message(message) => return message,
                Heard::Closed(code) => panic!("closed with {code} instead of a message"),
                Heard::Ping | Heard::Pong => {}
            }
        }
    }

    /// The next message but `progress`, which may come at any time; it must be of this type.
    pub(crate) async fn expect(&mut self, kind: &str) -> Value {
        loop {
            let message = self.message().await;
            if message["type"] == kind {
                return message;
            }
            assert_eq!(message["type"], "progress", "instead of {kind} came {message}");
        }
    }

    /// The next message of this type; others are passed over.
    pub(crate) async fn find(&mut self, kind: &str) -> Value {
        loop {
            let message = self.message().await;
            if message["type"] == kind {
                return message;
            }
        }
    }

    /// The next `error`; gives its code, and the whole.
    pub(crate) async fn error(&mut self) -> (String, Value) {
        let error = self.expect("error").await;
        (error["code"].as_str().unwrap().to_owned(), error)
    }

    /// Waits for the end; gives the close code. What comes before it is passed over.
    pub(crate) async fn closed(&mut self) -> u16 {
        loop {
            if let Heard::Closed(code) = self.hear().await {
                return code;
            }
        }
    }
}
