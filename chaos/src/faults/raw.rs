//! A WebSocket client by hand, which may do what the public client never would: not read, drip, send broken frames.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// The upgrade, or one answer.
pub(super) const ANSWER: Duration = Duration::from_secs(10);
/// So little that the server soon notices when nobody reads.
const RECEIVE_BUFFER_BYTES: u32 = 4_096;
/// Longest head of an HTTP answer.
const HEAD_BYTES: usize = 8_192;
/// Any 16 bytes in base64 will do: the answer to it is not checked.
const NONCE: &str = "Y2hhb3MgY2hhb3MgY2hhbw==";

pub(super) const TEXT: u8 = 1;
pub(super) const BINARY: u8 = 2;
const CLOSE: u8 = 8;
pub(super) const PING: u8 = 9;

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// A close frame with this code.
    Code(u16),
    /// The stream ended or was reset without one.
    Cut,
    /// Not in the time allowed.
    Open,
}

/// An upgraded connection.
pub(super) struct Raw {
    stream: TcpStream,
}

impl Raw {
    /// Connects, and sends these bytes as they are.
    pub(super) async fn plain(address: SocketAddr, bytes: &[u8]) -> anyhow::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
        let mut stream = tokio::time::timeout(ANSWER, socket.connect(address)).await.context("connecting")??;
        tokio::time::timeout(ANSWER, stream.write_all(bytes)).await.context("sending")??;
        Ok(stream)
    }

    /// Connects and upgrades.
    pub(super) async fn upgrade(address: SocketAddr, key: &str) -> anyhow::Result<Self> {
        let mut stream = Self::plain(address, &request(address, key)).await?;
        let status = tokio::time::timeout(ANSWER, status(&mut stream)).await.context("no answer to the upgrade")??;
        ensure!(status == 101, "the upgrade was answered by {status}");
        Ok(Self { stream })
    }

    /// A whole text message.
    pub(super) async fn text(&mut self, text: &str) -> anyhow::Result<()> {
        self.frame(TEXT, text.as_bytes(), true).await
    }

    /// One whole frame. Without a mask it breaks the protocol.
    pub(super) async fn frame(&mut self, opcode: u8, payload: &[u8], masked: bool) -> anyhow::Result<()> {
        let bytes = frame(opcode, payload, masked);
        tokio::time::timeout(ANSWER, self.stream.write_all(&bytes)).await.context("sending a frame")??;
        Ok(())
    }

    /// Reads so many bytes and throws them away; false at the end.
    pub(super) async fn drip(&mut self, bytes: usize) -> bool {
        let mut buffer = vec![0; bytes];
        matches!(self.stream.read(&mut buffer).await, Ok(read) if read > 0)
    }

    /// Reads on until the connection ends.
    pub(super) async fn end(&mut self, within: Duration) -> End {
        tokio::time::timeout(within, self.read_to_close()).await.unwrap_or(End::Open)
    }

    /// The first text that names this subscription, which is the answer to the subscribe; None if there is none in time.
    pub(super) async fn answer(&mut self, id: &str, within: Duration) -> anyhow::Result<Option<String>> {
        let named = format!(r#""id":"{id}""#);
        let answer = async {
            loop {
                let (opcode, payload) = self.next_frame().await.context("the connection ended before the answer")?;
                let text = String::from_utf8_lossy(&payload);
                if opcode == TEXT && text.contains(&named) {
                    return Ok(Some(text.into_owned()));
                }
            }
        };
        tokio::time::timeout(within, answer).await.unwrap_or(Ok(None))
    }

    async fn read_to_close(&mut self) -> End {
        loop {
            match self.next_frame().await {
                Ok((CLOSE, payload)) => {
                    let code = payload.first_chunk().map(|code| u16::from_be_bytes(*code));
                    return code.map_or(End::Cut, End::Code);
                }
                Ok(_) => {}
                Err(_) => return End::Cut,
            }
        }
    }

    async fn next_frame(&mut self) -> std::io::Result<(u8, Vec<u8>)> {
        let head = self.stream.read_u16().await?;
        let length = match head & 0x7f {
            126 => u64::from(self.stream.read_u16().await?),
            127 => self.stream.read_u64().await?,
            length => u64::from(length),
        };
        let mut payload = Vec::new();
        (&mut self.stream).take(length).read_to_end(&mut payload).await?;
        Ok((u8::try_from(head >> 8 & 0x0f).unwrap_or_default(), payload))
    }
}

/// An upgrade with this key.
pub(super) fn request(address: SocketAddr, key: &str) -> Vec<u8> {
    format!(
        "GET /v1/ws HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {NONCE}\r\nAuthorization: Bearer {key}\r\n\r\n"
    )
    .into_bytes()
}

/// Reads the head of an HTTP answer; its status.
pub(super) async fn status(stream: &mut TcpStream) -> anyhow::Result<u16> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > HEAD_BYTES {
            bail!("the answer's head is longer than {HEAD_BYTES} bytes");
        }
        head.push(stream.read_u8().await.context("the connection ended before the answer")?);
    }
    let text = String::from_utf8_lossy(&head);
    text.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no HTTP answer")
}

/// A frame with the mask 0, or none.
fn frame(opcode: u8, payload: &[u8], masked: bool) -> Vec<u8> {
    let mask = if masked { 0x80 } else { 0 };
    let mut bytes = vec![0x80 | opcode];
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(short), _) if short < 126 => bytes.push(mask | short),
        (_, Ok(medium)) => {
            bytes.push(mask | 126);
            bytes.extend(medium.to_be_bytes());
        }
        _ => {
            bytes.push(mask | 127);
            bytes.extend((payload.len() as u64).to_be_bytes());
        }
    }
    if masked {
        bytes.extend([0; 4]);
    }
    bytes.extend(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_three_lengths_of_the_standard() {
        assert_eq!(frame(TEXT, b"hi", true), [0x81, 0x82, 0, 0, 0, 0, b'h', b'i']);
        assert_eq!(frame(TEXT, &[7; 125], false)[..2], [0x81, 125]);
        assert_eq!(frame(BINARY, &[7; 126], false)[..4], [0x82, 126, 0, 126]);
        assert_eq!(frame(TEXT, &[7; 65_536], true)[..10], [0x81, 0xff, 0, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[tokio::test]
    async fn the_close_code_is_found_behind_other_frames() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; 4_096];
            assert!(stream.read(&mut asked).await.unwrap() > 0);
            stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n").await.unwrap();
            stream.write_all(&frame(TEXT, &[b'x'; 300], false)).await.unwrap();
            stream.write_all(&frame(CLOSE, &[0x0f, 0xa8, b's'], false)).await.unwrap();
            stream
        };
        let client = async { Raw::upgrade(address, "cdc_key").await.unwrap().end(ANSWER).await };
        let (end, _stream) = tokio::join!(client, server);
        assert_eq!(end, End::Code(4008));
    }
}
