//! Where servers of tests listen; part of each of them by `#[path]`.

use std::net::{Ipv4Addr, TcpListener};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

/// Below what Linux gives to those who connect (`ip_local_port_range`, from 32768 on): a port from there can be taken by any connection
/// before its server starts, or while it is down.
const FIRST: u32 = 10_000;
const COUNT: u32 = 22_000;
/// Programs that run at the same time begin so far apart.
const APART: u32 = 256;

/// The first of so many ports of the loopback in a row that are free.
pub(crate) fn free_ports(count: u16) -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let begin = process::id().wrapping_mul(APART);
    for _ in 0..COUNT {
        let drawn = NEXT.fetch_add(count.into(), Ordering::Relaxed);
        let Ok(port) = u16::try_from(FIRST + begin.wrapping_add(drawn) % COUNT) else { continue };
        if (port..port + count).all(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()) {
            return port;
        }
    }
    panic!("no {count} ports of the loopback are free in a row");
}
