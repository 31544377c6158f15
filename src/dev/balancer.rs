//! A small TCP balancer before the nodes of `tidewire dev`: round robin over those that are ready.
//!
//! It copies bytes and understands none. A node that answers `/readyz` with 200 gets new connections; one that
//! answers anything else keeps the ones it has and gets no new ones; one that does not answer is dead, which its
//! connections find out by themselves. No connection of a client is ever cut because of a health check.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// As many as the demo's key may open, and some to spare.
const MAX_CONNECTIONS: usize = 110_000;
/// Half a node's death that clients may notice (five seconds) would be a lot; a check costs microseconds.
const HEALTH_INTERVAL: Duration = Duration::from_millis(200);
const HEALTH_TIMEOUT: Duration = Duration::from_secs(1);
/// On loopback a connect takes microseconds or is refused.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a new client waits for some node to become ready: a failover of Postgres fits into it.
const READY_WAIT: Duration = Duration::from_secs(10);
/// After an accept that failed (no file descriptors, for instance).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Clients send little; nodes send much.
const UP_BUFFER_BYTES: usize = 2 * 1024;
const DOWN_BUFFER_BYTES: usize = 16 * 1024;
/// "HTTP/1.1 200" is twelve.
const STATUS_BYTES: usize = 12;

/// What the last look at a node said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Health {
    /// Takes new connections.
    Ready = 0,
    /// Alive, wants no new connections.
    NotReady = 1,
    /// Does not answer.
    Dead = 2,
}

/// The balancer: bound, not yet running.
#[derive(Debug)]
pub(super) struct Balancer {
    listener: TcpListener,
    nodes: Arc<Nodes>,
}

#[derive(Debug)]
struct Nodes {
    addresses: Vec<SocketAddr>,
    health: Vec<AtomicU8>,
    next: AtomicUsize,
    /// Rung whenever a node becomes ready.
    ready: watch::Sender<()>,
}

impl Balancer {
    /// Binds `listen` (port 0: any free one).
    ///
    /// # Errors
    /// When the port is taken.
    pub(super) async fn bind(listen: SocketAddr, nodes: Vec<SocketAddr>) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        Ok(Self { listener, nodes: Arc::new(Nodes::new(nodes)) })
    }

    /// Where clients connect.
    ///
    /// # Errors
    /// Only if the operating system cannot tell.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Balances until cancelled; then every connection is cut.
    pub(super) async fn run(self, cancel: CancellationToken) {
        let tasks = TaskTracker::new();
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        for index in 0..self.nodes.addresses.len() {
            let nodes = self.nodes.clone();
            let watch = async move { nodes.watch(index).await };
            tasks.spawn(cancel.clone().run_until_cancelled_owned(watch));
        }
        let accept = async {
            loop {
                // Held by the connection; without room the kernel's backlog is the queue.
                let Ok(permit) = room.clone().acquire_owned().await else { return };
                match self.listener.accept().await {
                    Ok((client, _)) => {
                        let nodes = self.nodes.clone();
                        let carry = async move {
                            if let Err(error) = nodes.carry(client).await {
                                tracing::debug!(%error, "a balanced connection ended");
                            }
                            drop(permit);
                        };
                        tasks.spawn(cancel.clone().run_until_cancelled_owned(carry));
                    }
                    Err(error) => {
                        tracing::debug!(%error, "the balancer cannot accept");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        cancel.run_until_cancelled(accept).await;
        tasks.close();
        tasks.wait().await;
    }
}

impl Nodes {
    fn new(addresses: Vec<SocketAddr>) -> Self {
        let health = addresses.iter().map(|_| AtomicU8::new(Health::Dead as u8)).collect();
        Self { addresses, health, next: AtomicUsize::new(0), ready: watch::Sender::new(()) }
    }

    fn set_health(&self, index: usize, health: Health) {
        let before = self.health[index].swap(health as u8, Ordering::Relaxed);
        if before != health as u8 && health == Health::Ready {
            self.ready.send_replace(());
        }
    }

    /// Looks at one node, for ever.
    async fn watch(&self, index: usize) {
        loop {
            let started = Instant::now();
            self.set_health(index, health_of(self.addresses[index]).await);
            sleep_until(started + HEALTH_INTERVAL).await;
        }
    }

    /// The ready nodes, the one whose turn it is first.
    fn in_turn(&self) -> Vec<usize> {
        let count = self.addresses.len();
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        (0..count)
            .map(|offset| first.wrapping_add(offset) % count)
            .filter(|index| self.health[*index].load(Ordering::Relaxed) == Health::Ready as u8)
            .collect()
    }

    /// Connects to a ready node; waits a while for one if there is none.
    async fn connect(&self) -> io::Result<TcpStream> {
        let mut ready = self.ready.subscribe();
        let deadline = Instant::now() + READY_WAIT;
        loop {
            ready.mark_unchanged();
            for index in self.in_turn() {
                match timeout(CONNECT_TIMEOUT, TcpStream::connect(self.addresses[index])).await {
                    Ok(Ok(stream)) => return Ok(stream),
                    // No need to wait for the next look.
                    Ok(Err(_)) | Err(_) => self.set_health(index, Health::Dead),
                }
            }
            if !matches!(tokio::time::timeout_at(deadline, ready.changed()).await, Ok(Ok(()))) {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no node is ready"));
            }
        }
    }

    async fn carry(&self, mut client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut node = self.connect().await?;
        node.set_nodelay(true)?;
        // Each side's end of stream is passed on while the other direction goes on.
        copy_bidirectional_with_sizes(&mut client, &mut node, UP_BUFFER_BYTES, DOWN_BUFFER_BYTES).await?;
        Ok(())
    }
}

/// One look at `/readyz`.
pub(super) async fn health_of(node: SocketAddr) -> Health {
    match timeout(HEALTH_TIMEOUT, readyz(node)).await {
        Ok(Ok(200)) => Health::Ready,
        Ok(Ok(_)) => Health::NotReady,
        Ok(Err(_)) | Err(_) => Health::Dead,
    }
}

async fn readyz(node: SocketAddr) -> io::Result<u16> {
    let mut stream = TcpStream::connect(node).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {node}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut start = [0; STATUS_BYTES];
    stream.read_exact(&mut start).await?;
    status(&start).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an HTTP answer"))
}

/// The status code at the start of an HTTP/1 answer.
fn status(start: &[u8; STATUS_BYTES]) -> Option<u16> {
    let text = std::str::from_utf8(start).ok()?;
    let (version, code) = text.split_once(' ')?;
    version.starts_with("HTTP/1.").then(|| code.parse().ok())?
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]
mod tests {
    use super::*;

    /// A node that answers `/readyz` with the status, and everything else with its name and what it was sent, once
    /// the client has ended its side.
    async fn node(name: &'static str, status: u16) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut start = vec![0; 11];
                    stream.read_exact(&mut start).await.unwrap();
                    if start == b"GET /readyz" {
                        stream.write_all(format!("HTTP/1.1 {status} X\r\n\r\n").as_bytes()).await.unwrap();
                        return;
                    }
                    stream.read_to_end(&mut start).await.unwrap();
                    stream.write_all(format!("{name}:{}", String::from_utf8_lossy(&start)).as_bytes()).await.unwrap();
                });
            }
        });
        address
    }

    async fn ask(balancer: SocketAddr) -> String {
        let mut stream = TcpStream::connect(balancer).await.unwrap();
        stream.write_all(b"hello, is somebody there?").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.split(':').next().unwrap().to_owned()
    }

    async fn balancer(nodes: Vec<SocketAddr>) -> (SocketAddr, CancellationToken) {
        let balancer = Balancer::bind("127.0.0.1:0".parse().unwrap(), nodes).await.unwrap();
        let address = balancer.address().unwrap();
        let cancel = CancellationToken::new();
        tokio::spawn(balancer.run(cancel.clone()));
        (address, cancel)
    }

    async fn dead_address() -> SocketAddr {
        super::super::port::loopback(super::super::port::free_port().unwrap())
    }

    #[tokio::test]
    async fn new_connections_go_in_turn_to_ready_nodes_only_and_a_half_closed_one_still_gets_its_answer() {
        let nodes = vec![node("a", 200).await, node("b", 404).await, dead_address().await, node("c", 200).await];
        let (address, _cancel) = balancer(nodes).await;
        let mut seen = std::collections::BTreeMap::<String, usize>::new();
        // Both are ready only after the first looks; afterwards each has its turns.
        for _ in 0..200 {
            *seen.entry(ask(address).await).or_default() += 1;
            if seen.get("a").is_some_and(|n| *n > 3) && seen.get("c").is_some_and(|n| *n > 3) {
                break;
            }
        }
        assert_eq!(seen.keys().collect::<Vec<_>>(), ["a", "c"]);
    }

    #[tokio::test]
    async fn a_node_that_dies_between_two_looks_costs_no_connection() {
        let nodes = Nodes::new(vec![dead_address().await, node("b", 200).await]);
        for index in 0..2 {
            nodes.set_health(index, Health::Ready);
        }
        for _ in 0..4 {
            nodes.connect().await.unwrap();
        }
        assert_eq!(nodes.in_turn(), [1]);
    }

    #[tokio::test]
    async fn the_end_of_the_balancer_ends_its_connections() {
        let (address, cancel) = balancer(vec![node("a", 200).await]).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        cancel.cancel();
        let mut rest = Vec::new();
        // Ended or reset, but not left hanging.
        let _ = timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await.expect("in time");
    }

    #[test]
    fn a_status_is_read_from_http_only() {
        assert_eq!(status(b"HTTP/1.1 200"), Some(200));
        assert_eq!(status(b"HTTP/1.0 404"), Some(404));
        assert_eq!(status(b"SSH-2.0-Open"), None);
        assert_eq!(status(&[0xff; 12]), None);
    }
}
