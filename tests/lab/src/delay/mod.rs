//! A link with a delay, for kernels without netem: two network namespaces, a TUN device in each, and one process that carries packets
//! from one to the other, each so much later. Packets are carried as large as TCP made them (segmentation offload), so that a fast link
//! costs little.
//!
//! The process is this program started again ([`CARRIER`]), so that what it costs is seen apart.

mod tun;

use crate::Namespace;
use crate::process::{Guard, run, tied, wait_for};
use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::time::{Duration, Instant};

/// First argument of this program when it is only to carry packets.
pub const CARRIER: &str = "--carry";
/// The devices.
const DEVICE: &str = "moordelay";
/// Bytes that may be under way in one direction; more are dropped, as a router would.
const UNDER_WAY: usize = 64 << 20;
/// The largest packet and its header.
const LARGEST: usize = (64 << 10) + 64;
/// A packet that fills a buffer by less than this is copied out of it: many small ones would hold as many buffers.
const SMALL: usize = 16 << 10;
/// Packets that are taken from one end before the other has its turn.
const AT_ONCE: usize = 16;
/// A packet is on time by so much before its time: to sleep for less costs more than the sleep.
const EARLY: Duration = Duration::from_micros(20);

/// Address of the end in the first namespace.
pub const NEAR: &str = "10.99.0.1";
/// Address of the end in the second.
pub const FAR: &str = "10.99.0.2";

/// The link; gone on drop.
pub struct Delay {
    carrier: Guard,
    pid: u32,
}

impl Delay {
    /// Joins two namespaces; each packet takes `one_way`.
    ///
    /// # Errors
    /// No TUN devices, or the carrier does not start.
    pub fn between(near: &Namespace, far: &Namespace, one_way: Duration) -> anyhow::Result<Self> {
        let mut command = tied(std::env::current_exe().context("finding this program")?);
        command.arg(CARRIER).arg(near.pid().to_string()).arg(far.pid().to_string());
        let child = command.arg(one_way.as_micros().to_string()).spawn().context("starting the carrier")?;
        let pid = child.id();
        let carrier = Guard::new(child);
        for (namespace, address) in [(near, NEAR), (far, FAR)] {
            wait_for("the TUN device", Duration::from_secs(10), || {
                Ok(run(&mut namespace.enter(tied("ip").args(["link", "show", DEVICE]))).is_ok())
            })?;
            let address = format!("{address}/24");
            run(&mut namespace.enter(tied("ip").args(["address", "add", &address, "dev", DEVICE])))?;
            run(&mut namespace.enter(tied("ip").args(["link", "set", DEVICE, "mtu", "9000", "up"])))?;
        }
        Ok(Self { carrier, pid })
    }

    /// Seconds of processor time that carrying took so far.
    ///
    /// # Errors
    /// The carrier is gone.
    pub fn cpu(&mut self) -> anyhow::Result<f64> {
        anyhow::ensure!(self.carrier.is_running(), "the carrier of packets is gone");
        crate::process::cpu(self.pid)
    }
}

/// The carrier's side: process ids of the two namespaces, and the delay in microseconds.
///
/// One thread does it all. With one for each end of each direction a packet cost four changes of threads, a quarter of all the time; now the
/// next packet is mostly there when one has been carried.
///
/// # Errors
/// A device cannot be made, or fails.
pub fn carry(arguments: &[OsString]) -> anyhow::Result<()> {
    let [near, far, micros] = arguments else { anyhow::bail!("{CARRIER} NEAR FAR MICROSECONDS") };
    let micros = micros.to_str().and_then(|text| text.parse().ok()).context("a delay in microseconds")?;
    let delay = Duration::from_micros(micros);
    let device = |pid: &OsString| tun::open(&std::path::Path::new("/proc").join(pid).join("ns/net"), DEVICE);
    let (near, far) = (device(near)?, device(far)?);
    // The kernel wakes a thread up to 50 us late unless it is told not to: as much as the whole way on a quick link.
    let _ = nix::sys::prctl::set_timerslack(1);
    let (mut there, mut back) = (Line::default(), Line::default());
    loop {
        let is_more = there.fill(&near, delay)? | back.fill(&far, delay)?;
        there.drain(&far);
        back.drain(&near);
        let next = if is_more { Some(Instant::now()) } else { there.next().into_iter().chain(back.next()).min() };
        let wait = next.map(|due| due.saturating_duration_since(Instant::now()));
        let wait = wait.map(Timespec::try_from).transpose().context("a time to wait")?;
        let mut devices = [PollFd::new(&near, PollFlags::IN), PollFd::new(&far, PollFlags::IN)];
        match poll(&mut devices, wait.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for packets"),
        }
    }
}

/// What fills the beginning of a buffer, whose length stays as it is: to clear the rest for the next packet would cost as much as to carry this one.
struct Packet {
    due: Instant,
    buffer: Vec<u8>,
    length: usize,
}

/// Packets under way in one direction.
#[derive(Default)]
struct Line {
    packets: VecDeque<Packet>,
    bytes: usize,
    /// Buffers that large packets have left: a copy of each would cost as much as one of the two system calls.
    free: Vec<Vec<u8>>,
}

impl Line {
    /// Takes what has come. Whether there may be more.
    fn fill(&mut self, mut from: &File, delay: Duration) -> anyhow::Result<bool> {
        for _ in 0..AT_ONCE {
            let mut buffer = self.free.pop().unwrap_or_else(|| vec![0; LARGEST]);
            let length = match from.read(&mut buffer) {
                Ok(length) => length,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    self.free.push(buffer);
                    return Ok(false);
                }
                Err(error) => return Err(error).context("reading packets"),
            };
            if self.bytes + length > UNDER_WAY {
                self.free.push(buffer);
                continue;
            }
            if length < SMALL {
                let copy = buffer[..length].to_vec();
                self.free.push(std::mem::replace(&mut buffer, copy));
            }
            self.bytes += length;
            self.packets.push_back(Packet { due: Instant::now() + delay, buffer, length });
        }
        Ok(true)
    }

    /// Hands over what is due.
    fn drain(&mut self, mut to: &File) {
        while let Some(packet) = self.packets.pop_front_if(|packet| packet.due <= Instant::now() + EARLY) {
            // A device that is down drops packets.
            let _ = to.write(&packet.buffer[..packet.length]);
            self.bytes -= packet.length;
            if packet.buffer.len() == LARGEST {
                self.free.push(packet.buffer);
            }
        }
    }

    /// When the next packet is due.
    fn next(&self) -> Option<Instant> {
        self.packets.front().map(|packet| packet.due)
    }
}
