//! Just enough HTTP for tests. Version 1.0: answers end with the connection and nothing comes in chunks.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use super::within;

/// An answer whose body is still to be read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    body: BufReader<TcpStream>,
}

/// One event of a stream of Server-Sent Events.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SseEvent {
    pub(crate) name: String,
    pub(crate) id: Option<String>,
    pub(crate) data: Value,
}

/// Asks; gives the answer once its head is there.
pub(crate) async fn ask(method: &str, address: SocketAddr, target: &str, headers: &[(&str, &str)]) -> Answer {
    within("an HTTP answer", async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut head = format!("{method} {target} HTTP/1.0\r\nHost: {address}\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut body = BufReader::new(stream);
        let mut line = String::new();
        body.read_line(&mut line).await.unwrap();
        let status = line.split_whitespace().nth(1).and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("not an HTTP answer: {line:?}"));
        let mut headers = Vec::new();
        loop {
            line.clear();
            body.read_line(&mut line).await.unwrap();
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Answer { status, headers, body }
    })
    .await
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Whether the server's end of the connection is still there: who is cut off without reading does not learn it.
    #[cfg(target_os = "linux")]
    pub(crate) fn server_holds_on(&self) -> bool {
        let stream = self.body.get_ref();
        let [server, client] = [stream.peer_addr(), stream.local_addr()].map(|address| address.unwrap().port());
        let pair = format!(" 0100007F:{server:04X} 0100007F:{client:04X} ");
        std::fs::read_to_string("/proc/net/tcp").unwrap().contains(&pair)
    }

    /// The whole body.
    pub(crate) async fn text(mut self) -> String {
        let mut text = String::new();
        within("an HTTP body", self.body.read_to_string(&mut text)).await.unwrap();
        text
    }

    /// The whole body, as JSON.
    pub(crate) async fn json(self) -> Value {
        let text = self.text().await;
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("not JSON ({error}): {text}"))
    }

    /// The next line of the body; None at its end.
    pub(crate) async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = within("a line of the stream", self.body.read_line(&mut line)).await.unwrap_or(0);
        (read > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned())
    }

    /// The next event of a stream; comments and `retry:` alone are passed over. None at its end.
    pub(crate) async fn event(&mut self) -> Option<SseEvent> {
        let mut event = SseEvent::default();
        loop {
            let line = self.line().await?;
            match line.split_once(": ") {
                Some(("event", name)) => event.name = name.to_owned(),
                Some(("id", id)) => event.id = Some(id.to_owned()),
                Some(("data", data)) => event.data = serde_json::from_str(data).expect("JSON in data"),
                _ if line.is_empty() && !event.name.is_empty() => return Some(event),
                _ => {}
            }
        }
    }

    /// The next event of this name; `progress` may come before it, nothing else.
    pub(crate) async fn expect(&mut self, name: &str) -> SseEvent {
        loop {
            let event = self.event().await.unwrap_or_else(|| panic!("the stream ended before {name}"));
            if event.name == name {
                return event;
            }
            assert_eq!(event.name, "progress", "instead of {name} came {event:?}");
        }
    }
}
