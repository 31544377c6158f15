//! Free loopback ports for processes that are started, killed and started again on the same port.
//!
//! Ports are drawn below the range from which operating systems serve outgoing connections (Linux 32768+, macOS
//! 49152+). From inside that range a client that keeps knocking at a dead server's port can be given that very port
//! as its own source, connect to itself, and so keep the restarted server from binding it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;

use rand::RngExt;

/// Below every common ephemeral range, above the well-known services.
const PORTS: RangeInclusive<u16> = 15_000..=29_999;

/// With a tenth of the range taken, the chance that all of these are is 1e-20.
const ATTEMPTS: usize = 20;

/// A port of 127.0.0.1 that was free a moment ago. The caller binds it soon and tries again if it lost the race.
///
/// # Errors
/// When no port of the range could be bound.
pub(super) fn free_port() -> io::Result<u16> {
    let mut rng = rand::rng();
    let mut last = io::Error::other("no port was tried");
    for _ in 0..ATTEMPTS {
        let port = rng.random_range(PORTS);
        match TcpListener::bind(loopback(port)) {
            Ok(_) => return Ok(port),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// 127.0.0.1 with this port.
pub(super) fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_can_be_bound_and_is_never_one_that_outgoing_connections_use() {
        let port = free_port().unwrap();
        assert!(PORTS.contains(&port));
        TcpListener::bind(loopback(port)).unwrap();
    }
}
