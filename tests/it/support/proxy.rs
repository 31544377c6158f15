//! A TCP proxy that breaks on demand, one before Postgres for each node.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the proxy does with what comes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Open,
    /// Nothing passes and nobody is told, like a network that drops packets.
    Stalled,
    /// Each piece waits this long.
    Slow(Duration),
    /// Connections are reset, also new ones.
    Cut,
}

/// A proxy of one target.
#[derive(Debug)]
pub(crate) struct Proxy {
    port: u16,
    way: watch::Sender<Way>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Starts on a free port.
    pub(crate) async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (way, watched) = watch::channel(Way::Open);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, target, watched.clone()));
            }
        });
        Self { port, way, accepting }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Resets every connection, and every new one, until [`Proxy::restore`].
    pub(crate) fn cut(&self) {
        self.way.send_replace(Way::Cut);
    }

    /// Lets nothing through, without a word, until [`Proxy::restore`].
    pub(crate) fn stall(&self) {
        self.way.send_replace(Way::Stalled);
    }

    /// Lets each piece wait, until [`Proxy::restore`].
    pub(crate) fn delay(&self, by: Duration) {
        self.way.send_replace(Way::Slow(by));
    }

    /// Mends everything; what was stalled goes on where it stood.
    pub(crate) fn restore(&self) {
        self.way.send_replace(Way::Open);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn carry(client: TcpStream, target: SocketAddr, way: watch::Receiver<Way>) {
    let mut cut = way.clone();
    let both = async {
        let Ok(mut server) = TcpStream::connect(target).await else { return };
        let mut client = client;
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        // Closing resets: the other side learns of it at once, as from a machine that is gone.
        let _ = (client.set_zero_linger(), server.set_zero_linger());
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        tokio::select! {
            () = pump(from_client, to_server, way.clone()) => {}
            () = pump(from_server, to_client, way) => {}
        }
    };
    tokio::select! {
        () = both => {}
        _ = cut.wait_for(|way| *way == Way::Cut) => {}
    }
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, mut way: watch::Receiver<Way>) {
    let mut piece = vec![0; 16 << 10];
    loop {
        let Ok(length @ 1..) = from.read(&mut piece).await else { return };
        loop {
            let now = *way.borrow_and_update();
            match now {
                Way::Stalled => {
                    if way.changed().await.is_err() {
                        return;
                    }
                }
                Way::Slow(by) => {
                    tokio::time::sleep(by).await;
                    break;
                }
                Way::Open | Way::Cut => break,
            }
        }
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}
