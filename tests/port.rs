//! Where servers of tests listen; part of each of them by `#[path]`.

use std::hash::{BuildHasher as _, RandomState};
use std::net::{Ipv4Addr, TcpListener};

/// Below what Linux gives to those who connect (`ip_local_port_range`, from 32768 on): a port from there can be taken by any connection
/// before its server starts, or while it is down.
const FIRST: u64 = 10_000;
const COUNT: u64 = 22_000;

/// The first of so many ports of the loopback in a row that are free. Drawn, because what else could tell tests apart that run at the same
/// time is the same in all of them: each may be process 1 of its own namespace.
pub(crate) fn free_ports(count: u16) -> u16 {
    for draw in 0..COUNT {
        let drawn = FIRST + RandomState::new().hash_one(draw) % COUNT;
        let Ok(port) = u16::try_from(drawn) else { continue };
        if (port..port + count).all(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()) {
            return port;
        }
    }
    panic!("no {count} ports of the loopback are free in a row");
}
