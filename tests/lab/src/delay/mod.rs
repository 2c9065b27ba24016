//! A link with a delay, for kernels without netem: two network namespaces, a TUN device in each, and one process that carries packets
//! from one to the other, each so much later. Packets are carried as large as TCP made them (segmentation offload), so that a fast link
//! costs little.
//!
//! The process is this program started again ([`CARRIER`]), so that what it costs is seen apart.

mod tun;

use crate::Namespace;
use crate::process::{Guard, run, tied, wait_for};
use anyhow::Context as _;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
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
/// # Errors
/// A device cannot be made; later failures end the thread that met them.
pub fn carry(arguments: &[OsString]) -> anyhow::Result<()> {
    let [near, far, micros] = arguments else { anyhow::bail!("{CARRIER} NEAR FAR MICROSECONDS") };
    let micros = micros.to_str().and_then(|text| text.parse().ok()).context("a delay in microseconds")?;
    let delay = Duration::from_micros(micros);
    let device = |pid: &OsString| -> anyhow::Result<Arc<File>> {
        Ok(Arc::new(tun::open(&std::path::Path::new("/proc").join(pid).join("ns/net"), DEVICE)?))
    };
    let (near, far) = (device(near)?, device(far)?);
    std::thread::scope(|scope| {
        for (from, to) in [(near.clone(), far.clone()), (far, near)] {
            let line = Arc::new(Line::default());
            let sender = line.clone();
            scope.spawn(move || sender.fill(&from, delay));
            scope.spawn(move || line.drain(&to));
        }
    });
    Ok(())
}

/// What fills the beginning of a buffer, whose length stays as it is: to clear the rest for the next packet would cost as much as to carry this one.
struct Packet {
    buffer: Vec<u8>,
    length: usize,
}

/// Packets under way in one direction, and when each arrives.
#[derive(Default)]
struct Line {
    state: Mutex<UnderWay>,
    filled: Condvar,
}

#[derive(Default)]
struct UnderWay {
    packets: VecDeque<(Instant, Packet)>,
    bytes: usize,
    /// Buffers that large packets have left: a copy of each would cost as much as one of the two system calls.
    free: Vec<Vec<u8>>,
}

impl Line {
    fn fill(&self, mut from: &File, delay: Duration) {
        let mut buffer = vec![0; LARGEST];
        while let Ok(length) = from.read(&mut buffer) {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.bytes + length <= UNDER_WAY {
                state.bytes += length;
                let packet = if length < SMALL {
                    Packet { buffer: buffer[..length].to_vec(), length }
                } else {
                    let next = state.free.pop().unwrap_or_else(|| vec![0; LARGEST]);
                    Packet { buffer: std::mem::replace(&mut buffer, next), length }
                };
                state.packets.push_back((Instant::now() + delay, packet));
                if state.packets.len() == 1 {
                    self.filled.notify_one();
                }
            }
        }
    }

    fn drain(&self, mut to: &File) {
        // The kernel wakes a thread up to 50 us late unless it is told not to: as much as the whole way on a quick link.
        let _ = nix::sys::prctl::set_timerslack(1);
        let mut written: Option<Packet> = None;
        loop {
            let (due, packet) = {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(Packet { buffer, .. }) = written.take().filter(|packet| packet.buffer.len() == LARGEST) {
                    state.free.push(buffer);
                }
                loop {
                    if let Some((due, packet)) = state.packets.pop_front() {
                        state.bytes -= packet.length;
                        break (due, packet);
                    }
                    state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            // A device that is down drops packets.
            let _ = to.write(&packet.buffer[..packet.length]);
            written = Some(packet);
        }
    }
}
