//! Clients that do not behave: raw sockets that read slowly, or that send what no client would.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, sleep, timeout};

/// For a connection and its upgrade.
const CONNECT: Duration = Duration::from_secs(5);
/// What a slow consumer's kernel takes in before the sender feels it, bytes.
const SMALL_WINDOW: u32 = 16 << 10;
/// For what a server still sends when its client suddenly reads again.
const FLUSH: Duration = Duration::from_secs(10);
/// Bytes of a frame that no limit allows.
const HUGE: usize = 1 << 20;
/// Close codes of the protocol and of WebSocket itself.
const DOCUMENTED: [u16; 19] =
    [1000, 1001, 1002, 1003, 1005, 1006, 1007, 1008, 1009, 1011, 1012, 1013, 4000, 4001, 4003, 4008, 4012, 4029, 4441];

/// A connection that has subscribed to everything and reads so many bytes a second, or none.
#[derive(Debug)]
pub struct SlowConsumer {
    stream: TcpStream,
    bytes_per_second: u32,
    seen: Vec<u8>,
}

impl SlowConsumer {
    /// Connects and subscribes.
    ///
    /// # Errors
    /// The server does not let it in.
    pub async fn start(url: &str, api_key: &str, bytes_per_second: u32) -> anyhow::Result<Self> {
        let mut stream = upgrade(url, Some(api_key)).await?;
        let subscribe = br#"{"type":"subscribe","id":"slow","tables":["*","event:*"],"from":"now"}"#;
        stream.write_all(&frame(0x1, subscribe)).await?;
        Ok(Self { stream, bytes_per_second, seen: Vec::new() })
    }

    /// Reads slowly for `time`, then everything that is left; returns the code of the close frame, if one came.
    ///
    /// # Errors
    /// None: a connection that was cut has no code.
    pub async fn suffer(mut self, time: Duration) -> Option<u16> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            sleep(Duration::from_millis(100)).await;
            if self.bytes_per_second > 0 {
                let mut some = vec![0; (self.bytes_per_second / 10).max(1) as usize];
                match timeout(Duration::from_millis(100), self.stream.read(&mut some)).await {
                    Ok(Ok(0) | Err(_)) => break,
                    Ok(Ok(n)) => self.seen.extend_from_slice(&some[..n]),
                    Err(_) => {}
                }
            }
        }
        let _ = timeout(FLUSH, read_on(&mut self.stream, &mut self.seen)).await;
        close_code(&self.seen)
    }
}

/// Reads to the end; the connection may still be alive, so a close frame ends it as well.
async fn read_on(stream: &mut TcpStream, seen: &mut Vec<u8>) {
    let mut some = vec![0; 64 << 10];
    while let Ok(n @ 1..) = stream.read(&mut some).await {
        seen.extend_from_slice(&some[..n]);
        if close_code(seen).is_some() {
            return;
        }
        shorten(seen);
    }
}

/// Forgets whole frames that are no close.
fn shorten(seen: &mut Vec<u8>) {
    let mut at = 0;
    while let Some((opcode, _, next)) = next_frame(seen, at) {
        if opcode == 0x8 {
            break;
        }
        at = next;
    }
    seen.drain(..at);
}

/// Knocks with everything that no client would send. Returns what the server did that the protocol does not say.
///
/// # Errors
/// The server cannot be reached at all.
pub async fn hostile(url: &str, api_key: &str, seed: u64, time: Duration) -> anyhow::Result<Vec<String>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let until = Instant::now() + time;
    let (mut faults, mut codes) = (Vec::new(), BTreeSet::new());
    // Handshakes that never end, held for the whole time.
    let mut held = Vec::new();
    for _ in 0..8 {
        if let Ok(mut stream) = connect(url).await {
            let _ = stream.write_all(b"GET /v1/ws HTTP/1.1\r\nhost: x\r\nx-slow: ").await;
            held.push(stream);
        }
    }
    while Instant::now() < until {
        let bytes = mischief(&mut rng);
        let Ok(mut stream) = upgrade(url, Some(api_key)).await else {
            // The balancer or the node may be away: that is other faults' business.
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let _ = timeout(CONNECT, stream.write_all(&bytes)).await;
        let mut seen = Vec::new();
        let _ = timeout(Duration::from_secs(1), read_on(&mut stream, &mut seen)).await;
        if let Some(code) = close_code(&seen) {
            codes.insert(code);
        }
        sleep(Duration::from_millis(20)).await;
    }
    for code in codes.iter().filter(|code| !DOCUMENTED.contains(code)) {
        faults.push(format!("a hostile client was closed with {code}, which is not in the protocol"));
    }
    Ok(faults)
}

fn mischief(rng: &mut StdRng) -> Vec<u8> {
    match rng.random_range(0..9) {
        // Reserved bits, an unknown opcode, an unmasked frame.
        0 => vec![0xf1, 0x80, 0, 0, 0, 0],
        1 => frame(0xb, b"?"),
        2 => vec![0x81, 0x02, b'h', b'i'],
        // More than any message may have; one that says it has 2^62 bytes.
        3 => frame(0x1, &vec![b'['; HUGE]),
        4 => [&[0x81, 0xff][..], &(1_u64 << 62).to_be_bytes(), &[0; 4]].concat(),
        5 => frame(0x1, b"\xff\xfe not text"),
        6 => frame(0x1, format!("{}1{}", "[".repeat(5_000), "]".repeat(5_000)).as_bytes()),
        7 => {
            let filter = format!("{}w = 1{}", "(".repeat(1_500), ")".repeat(1_500));
            let text = format!(r#"{{"type":"subscribe","id":"x","tables":["public.notes"],"where":"{filter}"}}"#);
            frame(0x1, text.as_bytes())
        }
        _ => {
            let (epoch, seq, check): (u32, u64, u32) = (rng.random(), rng.random(), rng.random());
            let cursor = format!("{epoch:08x}-{seq:016x}-{check:08x}");
            let text = format!(r#"{{"type":"subscribe","id":"x","tables":["*"],"from":{{"cursor":"{cursor}"}}}}"#);
            frame(0x1, text.as_bytes())
        }
    }
}

async fn connect(url: &str) -> anyhow::Result<TcpStream> {
    let address: SocketAddr = url.trim_start_matches("http://").trim_end_matches('/').parse()?;
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(SMALL_WINDOW)?;
    Ok(timeout(CONNECT, socket.connect(address)).await??)
}

/// A WebSocket by hand.
async fn upgrade(url: &str, api_key: Option<&str>) -> anyhow::Result<TcpStream> {
    let mut stream = connect(url).await?;
    let credential = api_key.map_or_else(String::new, |key| format!("authorization: Bearer {key}\r\n"));
    let head = format!(
        "GET /v1/ws HTTP/1.1\r\nhost: chaos\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: tidewire.v1\r\n{credential}\r\n"
    );
    let answer = async {
        stream.write_all(head.as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await?);
        }
        std::io::Result::Ok(answer)
    };
    let answer = timeout(CONNECT, answer).await.context("no answer to an upgrade")??;
    ensure!(answer.starts_with(b"HTTP/1.1 101"), "no upgrade: {}", String::from_utf8_lossy(&answer));
    Ok(stream)
}

/// A masked frame; the mask is zero, which is as good as any here.
fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x80 | opcode];
    match payload.len() {
        n @ 0..126 => bytes.push(0x80 | n as u8),
        n @ 126..65_536 => {
            bytes.push(0x80 | 126);
            bytes.extend_from_slice(&(n as u16).to_be_bytes());
        }
        n => {
            bytes.push(0x80 | 127);
            bytes.extend_from_slice(&(n as u64).to_be_bytes());
        }
    }
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(payload);
    bytes
}

/// Opcode, payload and end of the server's frame at `at`, if it is all there.
fn next_frame(bytes: &[u8], at: usize) -> Option<(u8, &[u8], usize)> {
    let opcode = bytes.get(at)? & 0x0f;
    let (length, start) = match *bytes.get(at + 1)? & 0x7f {
        126 => (usize::from(u16::from_be_bytes(bytes.get(at + 2..at + 4)?.try_into().ok()?)), at + 4),
        127 => (u64::from_be_bytes(bytes.get(at + 2..at + 10)?.try_into().ok()?) as usize, at + 10),
        short => (usize::from(short), at + 2),
    };
    let end = start.checked_add(length)?;
    Some((opcode, bytes.get(start..end)?, end))
}

fn close_code(bytes: &[u8]) -> Option<u16> {
    let mut at = 0;
    while let Some((opcode, payload, next)) = next_frame(bytes, at) {
        if opcode == 0x8 {
            return Some(payload.get(..2).map_or(1005, |code| u16::from_be_bytes([code[0], code[1]])));
        }
        at = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_close_is_found_behind_other_frames_and_half_frames_are_kept() {
        let mut bytes = vec![0x81, 2, b'h', b'i', 0x81, 126, 1, 0];
        assert_eq!(close_code(&bytes), None);
        shorten(&mut bytes);
        assert_eq!(bytes, [0x81, 126, 1, 0]);
        bytes.extend_from_slice(&[0; 256]);
        bytes.extend_from_slice(&[0x88, 2, 0x0f, 0xa8]);
        assert_eq!(close_code(&bytes), Some(4008));
    }
}
