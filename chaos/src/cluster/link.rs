//! A TCP proxy that can do to connections what networks do: delay, throttle, stall, reset, swallow.
//!
//! Knows nothing of what it carries. All choices come from its seed.

mod pump;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

/// For the connection to the target.
const CONNECT: Duration = Duration::from_secs(5);
/// After a refused `accept`, as when there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Both ways.
    Both,
    /// From whoever connects to the target.
    ToServer,
    /// Back.
    ToClient,
}

impl Direction {
    const fn covers(self, way: Self) -> bool {
        matches!((self, way), (Self::Both, _) | (Self::ToServer, Self::ToServer) | (Self::ToClient, Self::ToClient))
    }
}

/// How a link is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    /// Connections are reset, and new ones as soon as they come.
    Reset,
    /// Bytes vanish and nobody is told; new connections reach nobody.
    Blackhole,
}

/// How a link is slowed down, in each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Added to every byte's way.
    pub delay: Duration,
    /// Up to so much more or less; order is kept.
    pub jitter: Duration,
    /// For each connection; no limit if there is none.
    pub bytes_per_second: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    cut: Option<(Cut, Direction)>,
    shape: Shape,
}

/// What one connection is told.
#[derive(Clone, Copy, Debug, Default)]
struct Orders {
    reset: bool,
    stall: Option<Direction>,
}

#[derive(Debug)]
struct Stream {
    orders: watch::Sender<Orders>,
    /// Bytes of it vanished: it cannot be healed, only reset.
    lost: AtomicBool,
}

#[derive(Debug)]
struct Inner {
    name: String,
    address: SocketAddr,
    target: Mutex<SocketAddr>,
    state: watch::Sender<State>,
    streams: Mutex<BTreeMap<u64, Arc<Stream>>>,
    next: AtomicU64,
    rng: Mutex<StdRng>,
    to_server: AtomicU64,
    to_client: AtomicU64,
}

/// A proxy in front of one target. It ends with its last clone.
#[derive(Clone, Debug)]
pub struct Link {
    inner: Arc<Inner>,
    _accepting: Arc<AbortOnDropHandle<()>>,
}

impl Link {
    /// Listens on a free port of the loopback.
    ///
    /// # Errors
    /// It cannot listen.
    pub async fn start(name: &str, target: SocketAddr, seed: u64) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let inner = Arc::new(Inner {
            name: name.to_owned(),
            address: listener.local_addr()?,
            target: Mutex::new(target),
            state: watch::Sender::new(State::default()),
            streams: Mutex::default(),
            next: AtomicU64::new(0),
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
            to_server: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
        });
        let accepting = AbortOnDropHandle::new(tokio::spawn(accept(listener, Arc::clone(&inner))));
        Ok(Self { inner, _accepting: Arc::new(accepting) })
    }

    /// Where to connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.inner.address
    }

    /// For people.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Where new connections go.
    pub fn set_target(&self, target: SocketAddr) {
        *self.inner.target.lock() = target;
    }

    /// Cuts it, until [`heal`](Self::heal).
    pub fn cut(&self, cut: Cut, direction: Direction) {
        self.inner.state.send_modify(|state| state.cut = Some((cut, direction)));
        if cut == Cut::Reset {
            self.reset_all();
        }
    }

    /// Slows it down, until [`heal`](Self::heal).
    pub fn shape(&self, shape: Shape) {
        self.inner.state.send_modify(|state| state.shape = shape);
    }

    /// No cut, no shape, no stall. Connections that lost bytes are reset: a TCP stream with a hole is none.
    pub fn heal(&self) {
        self.inner.state.send_modify(|state| *state = State::default());
        for stream in self.inner.streams.lock().values() {
            if stream.lost.load(Ordering::Acquire) {
                stream.orders.send_modify(|orders| orders.reset = true);
            } else {
                stream.orders.send_modify(|orders| orders.stall = None);
            }
        }
    }

    /// Resets all open connections and returns how many.
    pub fn reset_all(&self) -> usize {
        self.reset_some(usize::MAX)
    }

    /// Resets `n` connections, chosen by the seed, and returns how many there were.
    pub fn reset_some(&self, n: usize) -> usize {
        self.choose(n, |orders| orders.reset = true)
    }

    /// `n` connections, chosen by the seed, stand still until [`heal`](Self::heal): their bytes wait, none is lost.
    pub fn stall_some(&self, n: usize, direction: Direction) -> usize {
        self.choose(n, |orders| orders.stall = Some(direction))
    }

    fn choose(&self, n: usize, order: impl Fn(&mut Orders)) -> usize {
        let streams = self.inner.streams.lock();
        let chosen: Vec<&Arc<Stream>> = if n >= streams.len() {
            streams.values().collect()
        } else {
            streams.values().sample(&mut *self.inner.rng.lock(), n)
        };
        chosen.iter().for_each(|stream| stream.orders.send_modify(&order));
        chosen.len()
    }

    /// Open connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.inner.streams.lock().len()
    }

    /// Bytes carried (to the server, to the client).
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.inner.to_server.load(Ordering::Relaxed), self.inner.to_client.load(Ordering::Relaxed))
    }
}

async fn accept(listener: TcpListener, inner: Arc<Inner>) {
    // The connections end with the listener: a link that is gone carries nothing.
    let mut carrying = tokio::task::JoinSet::new();
    loop {
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(_) => {
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while carrying.try_join_next().is_some() {}
        carrying.spawn(carry(client, Arc::clone(&inner)));
    }
}

async fn carry(client: TcpStream, inner: Arc<Inner>) {
    let cut = inner.state.borrow().cut;
    if matches!(cut, Some((Cut::Reset, _))) {
        let _ = client.set_zero_linger();
        return;
    }
    let id = inner.next.fetch_add(1, Ordering::Relaxed);
    let stream = Arc::new(Stream { orders: watch::Sender::new(Orders::default()), lost: AtomicBool::new(false) });
    inner.streams.lock().insert(id, Arc::clone(&stream));
    let registered = Registered(&inner, id);
    // Looked at again now that a heal or a cut can see the stream.
    let cut = inner.state.borrow().cut.inspect(|_| stream.lost.store(true, Ordering::Release));
    if cut.is_some() {
        let mut orders = stream.orders.subscribe();
        if matches!(cut, Some((Cut::Blackhole, _))) {
            let _ = orders.wait_for(|orders| orders.reset).await;
        }
        let _ = client.set_zero_linger();
        return;
    }
    let target = *inner.target.lock();
    match timeout(CONNECT, TcpStream::connect(target)).await {
        Ok(Ok(server)) => {
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let (client, server) = (Arc::new(client), Arc::new(server));
            let ended = tokio::try_join!(
                pump::pump(&client, &server, Direction::ToServer, &inner, &stream),
                pump::pump(&server, &client, Direction::ToClient, &inner, &stream),
            );
            if ended.is_err() {
                let _ = (client.set_zero_linger(), server.set_zero_linger());
            }
        }
        _ => drop(client.set_zero_linger()),
    }
    drop(registered);
}

/// Takes the connection off the list, whichever way it ends.
struct Registered<'a>(&'a Inner, u64);

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.0.streams.lock().remove(&self.1);
    }
}

impl Inner {
    fn jitter(&self, shape: &Shape) -> Duration {
        let most = u64::try_from(shape.jitter.as_micros()).unwrap_or(u64::MAX / 2);
        if most == 0 {
            return shape.delay;
        }
        let more = self.rng.lock().random_range(0..=2 * most);
        (shape.delay + Duration::from_micros(more)).saturating_sub(shape.jitter)
    }
}

#[cfg(test)]
mod tests;
