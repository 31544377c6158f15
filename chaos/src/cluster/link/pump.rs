//! One direction of one connection.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use super::{Cut, Direction, Inner, Stream};

/// Read at once.
const CHUNK: usize = 16 << 10;
/// Bytes on their way in one direction; beyond, nothing more is read.
const WINDOW: usize = 1 << 20;

/// Carries bytes until the source ends, passes its end on, and returns. An error means: reset both sides.
pub(super) async fn pump(
    from: &TcpStream,
    to: &TcpStream,
    way: Direction,
    inner: &Inner,
    stream: &Stream,
) -> io::Result<()> {
    let mut state = inner.state.subscribe();
    let mut orders = stream.orders.subscribe();
    let counter = if way == Direction::ToServer { &inner.to_server } else { &inner.to_client };
    let mut waiting: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let (mut held, mut free, mut ended) = (0, Instant::now(), false);
    loop {
        let now_orders = *orders.borrow_and_update();
        if now_orders.reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let stalled = now_orders.stall.is_some_and(|stall| stall.covers(way));
        let link = *state.borrow_and_update();
        if ended && waiting.is_empty() {
            return shut(to);
        }
        let due = waiting.front().map(|(due, _)| *due);
        tokio::select! {
            changed = orders.changed() => changed.map_err(|_| io::ErrorKind::ConnectionReset)?,
            changed = state.changed() => changed.map_err(|_| io::ErrorKind::ConnectionReset)?,
            () = until(due), if due.is_some() && !stalled => {
                if let Some((_, bytes)) = waiting.pop_front() {
                    held -= bytes.len();
                    if vanish(inner, stream, way) {
                        continue;
                    }
                    counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    write(to, &bytes, &mut orders).await?;
                }
            }
            readable = from.readable(), if !ended && !stalled && held < WINDOW => {
                readable?;
                let bytes = match read(from) {
                    Ok(Some(bytes)) => bytes,
                    Ok(None) => continue,
                    // A reset vanishes, too.
                    Err(error) => {
                        if vanish(inner, stream, way) {
                            let _ = orders.wait_for(|orders| orders.reset).await;
                        }
                        return Err(error);
                    }
                };
                if vanish(inner, stream, way) {
                    // Its end vanishes like its bytes: the other side hears nothing of it before the heal.
                    if bytes.is_empty() {
                        let _ = orders.wait_for(|orders| orders.reset).await;
                        return Err(io::ErrorKind::ConnectionReset.into());
                    }
                } else if bytes.is_empty() {
                    ended = true;
                } else if waiting.is_empty() && link.shape == super::Shape::default() {
                    counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    write(to, &bytes, &mut orders).await?;
                } else {
                    let now = Instant::now();
                    if let Some(rate) = link.shape.bytes_per_second {
                        free = free.max(now) + Duration::from_secs_f64(bytes.len() as f64 / rate.max(1) as f64);
                    }
                    // Order is kept: nothing overtakes what was read before it.
                    let last = waiting.back().map_or(now, |(due, _)| *due);
                    let due = (free.max(now) + inner.jitter(&link.shape)).max(last);
                    held += bytes.len();
                    waiting.push_back((due, bytes));
                }
            }
        }
    }
}

/// Whether what is to be carried vanishes. The stream is marked under the link's own lock, where a heal looks for the
/// mark: none can come between the look and the mark and leave a stream with a hole.
fn vanish(inner: &Inner, stream: &Stream, way: Direction) -> bool {
    let state = inner.state.borrow();
    let vanishes = state.cut.is_some_and(|(cut, direction)| cut == Cut::Blackhole && direction.covers(way));
    if vanishes {
        stream.lost.store(true, Ordering::Release);
    }
    vanishes
}

async fn until(due: Option<Instant>) {
    if let Some(due) = due {
        sleep_until(due).await;
    }
}

/// The buffer lives on the stack only while there is something to read: ten thousand idle connections hold none.
fn read(from: &TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = [0; CHUNK];
    match from.try_read(&mut buffer) {
        Ok(n) => Ok(Some(buffer[..n].to_vec())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

async fn write(
    to: &TcpStream,
    mut bytes: &[u8],
    orders: &mut tokio::sync::watch::Receiver<super::Orders>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        tokio::select! {
            writable = to.writable() => writable?,
            reset = orders.wait_for(|orders| orders.reset) => {
                drop(reset);
                return Err(io::ErrorKind::ConnectionReset.into());
            }
        }
        match to.try_write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Passes the end on: the other side may still have something to say.
fn shut(to: &TcpStream) -> io::Result<()> {
    Ok(shutdown(to.as_raw_fd(), Shutdown::Write)?)
}
