use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use super::*;

const SOON: Duration = Duration::from_secs(10);
/// Long enough that a byte would have come, were it to come.
const SILENCE: Duration = Duration::from_millis(200);

/// A server that answers every byte with itself.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    address
}

async fn linked() -> (Link, TcpStream) {
    let link = Link::start("test", echo().await, 7).await.unwrap();
    let stream = TcpStream::connect(link.address()).await.unwrap();
    (link, stream)
}

async fn answers(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"x").await?;
    let mut byte = [0];
    timeout(SOON, stream.read_exact(&mut byte)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))?;
    Ok(())
}

async fn silent(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    timeout(SILENCE, stream.read(&mut byte)).await.is_err()
}

#[tokio::test]
async fn bytes_come_back_in_order_under_jitter() {
    let (link, mut stream) = linked().await;
    link.shape(Shape { delay: Duration::from_millis(5), jitter: Duration::from_millis(5), bytes_per_second: None });
    let sent: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    let (mut read, mut write) = stream.split();
    let mut got = vec![0; sent.len()];
    let (wrote, read) = tokio::join!(write.write_all(&sent), timeout(SOON, read.read_exact(&mut got)));
    wrote.unwrap();
    read.unwrap().unwrap();
    assert_eq!(got, sent);
}

#[tokio::test]
async fn an_end_is_passed_on_and_the_rest_still_comes() {
    let (_link, mut stream) = linked().await;
    stream.write_all(b"last words").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut all = Vec::new();
    timeout(SOON, stream.read_to_end(&mut all)).await.unwrap().unwrap();
    assert_eq!(all, b"last words");
}

#[tokio::test]
async fn a_reset_is_a_reset_and_new_connections_get_one_until_the_heal() {
    let (link, mut stream) = linked().await;
    answers(&mut stream).await.unwrap();
    link.cut(Cut::Reset, Direction::Both);
    let mut byte = [0];
    let error = timeout(SOON, stream.read(&mut byte)).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let mut refused = TcpStream::connect(link.address()).await.unwrap();
    assert!(answers(&mut refused).await.is_err());
    link.heal();
    let mut healed = TcpStream::connect(link.address()).await.unwrap();
    answers(&mut healed).await.unwrap();
}

#[tokio::test]
async fn a_blackhole_says_nothing_and_its_victims_are_reset_by_the_heal() {
    let (link, mut stream) = linked().await;
    answers(&mut stream).await.unwrap();
    let mut bystander = TcpStream::connect(link.address()).await.unwrap();
    answers(&mut bystander).await.unwrap();
    link.cut(Cut::Blackhole, Direction::ToClient);
    stream.write_all(b"x").await.unwrap();
    assert!(silent(&mut stream).await);
    link.heal();
    assert!(stream.read(&mut [0]).await.is_err(), "its byte is lost: it must not go on");
    answers(&mut bystander).await.unwrap();
}

#[tokio::test]
async fn a_stalled_connection_loses_nothing() {
    let (link, mut stream) = linked().await;
    answers(&mut stream).await.unwrap();
    assert_eq!(link.stall_some(1, Direction::ToServer), 1);
    stream.write_all(b"x").await.unwrap();
    assert!(silent(&mut stream).await);
    link.heal();
    timeout(SOON, stream.read_exact(&mut [0])).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_throttled_connection_is_not_faster_than_its_limit() {
    let (link, mut stream) = linked().await;
    link.shape(Shape { bytes_per_second: Some(100_000), ..Shape::default() });
    let began = Instant::now();
    stream.write_all(&[7; 30_000]).await.unwrap();
    timeout(SOON, stream.read_exact(&mut [0; 30_000])).await.unwrap().unwrap();
    assert!(began.elapsed() >= Duration::from_millis(290), "{:?}", began.elapsed());
}

#[tokio::test]
async fn new_connections_go_to_the_new_target() {
    let (link, mut stream) = linked().await;
    answers(&mut stream).await.unwrap();
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    link.set_target(other.local_addr().unwrap());
    let _second = TcpStream::connect(link.address()).await.unwrap();
    timeout(SOON, other.accept()).await.unwrap().unwrap();
    answers(&mut stream).await.unwrap();
}
