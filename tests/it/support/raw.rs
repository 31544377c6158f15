//! A WebSocket by hand, for what no library lets a client do: any handshake, any bytes, in any pieces.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::within;

/// What a handshake has, when it is as it should be.
pub(crate) const HANDSHAKE: [(&str, &str); 4] = [
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// One connection.
#[derive(Debug)]
pub(crate) struct Raw {
    stream: TcpStream,
    seen: Vec<u8>,
    /// The head of the answer: status and headers, names in lower case.
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
}

/// One frame of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) first: u8,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// The code of a close frame; 1005 when it has none.
    pub(crate) fn close_code(&self) -> Option<u16> {
        let code = self.payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
        (self.first == 0x88).then_some(code)
    }
}

impl Raw {
    /// Asks for `target` with these headers and reads the head of the answer.
    pub(crate) async fn ask(address: SocketAddr, target: &str, headers: &[(&str, &str)]) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut head = format!("GET {target} HTTP/1.1\r\nHost: {address}\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{head}\r\n").as_bytes()).await.unwrap();
        let mut raw = Self { stream, seen: Vec::new(), status: 0, headers: Vec::new() };
        let end = loop {
            if let Some(at) = raw.seen.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            assert!(raw.more().await, "the connection ended: {}", String::from_utf8_lossy(&raw.seen));
        };
        let head = String::from_utf8(raw.seen.drain(..end).collect()).unwrap();
        raw.status = head.split_whitespace().nth(1).and_then(|code| code.parse().ok()).unwrap();
        let lines = head.lines().skip(1).filter_map(|line| line.split_once(": "));
        raw.headers = lines.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
        raw
    }

    /// A WebSocket at `target`.
    pub(crate) async fn connect(address: SocketAddr, target: &str, headers: &[(&str, &str)]) -> Self {
        let headers: Vec<_> = HANDSHAKE.iter().chain(headers).copied().collect();
        let raw = Self::ask(address, target, &headers).await;
        assert_eq!(raw.status, 101);
        raw
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    async fn more(&mut self) -> bool {
        // A connection that was reset has ended, too.
        within("the server's bytes", self.stream.read_buf(&mut self.seen)).await.unwrap_or(0) > 0
    }

    /// Sends these bytes in one segment, as far as the system does so. A connection that has ended takes none.
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        let _ = within("sending", self.stream.write_all(bytes)).await;
    }

    /// The next frame; None at the end.
    pub(crate) async fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.take() {
                return Some(frame);
            }
            if !self.more().await {
                return None;
            }
        }
    }

    fn take(&mut self) -> Option<Frame> {
        let [first, second, ..] = self.seen[..] else { return None };
        let (head, length) = match second {
            126 => (4, usize::from(u16::from_be_bytes(*self.seen[2..].first_chunk()?))),
            127 => (10, usize::try_from(u64::from_be_bytes(*self.seen[2..].first_chunk()?)).unwrap()),
            length => (2, usize::from(length)),
        };
        assert!(second & 0x80 == 0, "a server's frame is not masked");
        let payload = self.seen.get(head..head + length)?.to_vec();
        self.seen.drain(..head + length);
        Some(Frame { first, payload })
    }

    /// The next text, as JSON; pings of the server are passed over.
    pub(crate) async fn json(&mut self) -> serde_json::Value {
        loop {
            let frame = self.frame().await.expect("a message");
            match frame.first {
                0x81 => return serde_json::from_slice(&frame.payload).unwrap(),
                0x89 => {}
                _ => panic!("instead of a message came {frame:?}"),
            }
        }
    }

    /// Waits for the close frame; gives its code. 1006 when the connection ends without one.
    pub(crate) async fn closed(&mut self) -> u16 {
        loop {
            match self.frame().await {
                None => return 1006,
                Some(frame) => match frame.close_code() {
                    Some(code) => return code,
                    None => continue,
                },
            }
        }
    }
}

/// A client's frame, masked, its length in the fewest bytes.
pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = match payload.len() {
        length @ 0..=125 => vec![length as u8],
        length @ 126..=0xffff => [&[126][..], &(length as u16).to_be_bytes()].concat(),
        length => [&[127][..], &(length as u64).to_be_bytes()].concat(),
    };
    framed(first, &length, payload)
}

/// A client's frame with the length written as it is said.
pub(crate) fn framed(first: u8, length: &[u8], payload: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
    let mut bytes = vec![first, length[0] | 0x80];
    bytes.extend(&length[1..]);
    bytes.extend(MASK);
    bytes.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

/// A client's text message.
pub(crate) fn text(message: &str) -> Vec<u8> {
    frame(0x81, message.as_bytes())
}
