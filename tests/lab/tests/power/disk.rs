//! A disk whose power can be cut, for QEMU over NBD: of what was written and not flushed, each block is on it afterwards or not, whichever was written
//! first. QEMU keeps nothing of it and passes the guest's flushes on, so this is what a real disk with a cache of its own may lose.
//! Of the protocol (`doc/proto.md` of NetworkBlockDevice/nbd) it speaks the fixed newstyle handshake and simple replies.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

/// What a disk writes whole or not at all, in bytes: as today's do, and as ext4 needs it, whose superblock of 1024 bytes has one checksum.
const BLOCK: usize = 4096;

/// Largest request, in bytes: QEMU's limit for servers that name none.
const MAX_REQUEST: usize = 32 << 20;
/// Largest option of the handshake that is looked at, in bytes.
const MAX_OPTION: usize = 8 << 10;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;

/// Fixed newstyle, and no zeroes behind the old answer.
const HANDSHAKE: u16 = 1 | 2;
/// There are flags, and flushes.
const EXPORT: u16 = 1 | 4;
const INVALID: u32 = 22;

struct State {
    seen: Vec<u8>,
    durable: Vec<u8>,
    /// What was written and not flushed, in that order.
    pending: Vec<(usize, Vec<u8>)>,
    /// Writes until the power goes; none: it stays.
    left: Option<u64>,
}

/// Blocks that were pending when the power went.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cut {
    pub(crate) lost: u64,
    pub(crate) kept: u64,
}

/// The disk.
pub(crate) struct Disk {
    state: Mutex<State>,
    is_honest: bool,
}

fn array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn bytes(from: &mut impl Read, length: usize, limit: usize) -> io::Result<Vec<u8>> {
    if length > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("NBD: {length} bytes at once")));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn expect<T: PartialEq>(is: &T, wanted: &T) -> io::Result<()> {
    if is == wanted { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidData, "NBD: another magic number")) }
}

fn size(length: u32) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// The handshake, until the client has chosen the disk.
fn agree(client: &mut (impl Read + Write), bytes_of_disk: u64) -> io::Result<()> {
    client.write_all(&MAGIC.to_be_bytes())?;
    client.write_all(&OPTION.to_be_bytes())?;
    client.write_all(&HANDSHAKE.to_be_bytes())?;
    let _flags: [u8; 4] = array(client)?;
    loop {
        expect(&u64::from_be_bytes(array(client)?), &OPTION)?;
        let option = u32::from_be_bytes(array(client)?);
        let length = size(u32::from_be_bytes(array(client)?));
        let _what = bytes(client, length, MAX_OPTION)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut reply = OPTION_REPLY.to_be_bytes().to_vec();
            reply.extend(option.to_be_bytes());
            reply.extend(kind.to_be_bytes());
            reply.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            reply.extend(data);
            client.write_all(&reply)
        };
        match option {
            // NBD_OPT_INFO, NBD_OPT_GO: NBD_REP_INFO with NBD_INFO_EXPORT, NBD_REP_ACK.
            6 | 7 => {
                let mut export = vec![0, 0];
                export.extend(bytes_of_disk.to_be_bytes());
                export.extend(EXPORT.to_be_bytes());
                reply(3, &export)?;
                reply(1, &[])?;
                if option == 7 {
                    return Ok(());
                }
            }
            // NBD_REP_ERR_UNSUP: it goes on without.
            _ => reply((1 << 31) | 1, &[])?,
        }
    }
}

impl Disk {
    /// A disk of this content. One that is not honest says that it has flushed, and loses all that it was told since it was switched on.
    pub(crate) fn new(content: Vec<u8>, is_honest: bool) -> Self {
        let state = State { seen: content.clone(), durable: content, pending: Vec::new(), left: None };
        Self { state: Mutex::new(state), is_honest }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Serves one machine until that is gone.
    ///
    /// # Errors
    /// It speaks another language.
    pub(crate) fn serve(&self, mut client: UnixStream) -> io::Result<()> {
        match self.talk(&mut client) {
            // Killed, whatever it was about to say.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                ) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    fn talk(&self, client: &mut UnixStream) -> io::Result<()> {
        let end = self.with(|state| state.seen.len());
        agree(client, end as u64)?;
        loop {
            expect(&u32::from_be_bytes(array(client)?), &REQUEST)?;
            let _flags: [u8; 2] = array(client)?;
            let kind = u16::from_be_bytes(array(client)?);
            let cookie: [u8; 8] = array(client)?;
            let offset = usize::try_from(u64::from_be_bytes(array(client)?)).unwrap_or(usize::MAX);
            let length = size(u32::from_be_bytes(array(client)?));
            let place = offset..offset.saturating_add(length);
            let is_inside = place.end <= end && length <= MAX_REQUEST;
            let (mut error, mut data) = (0, Vec::new());
            match kind {
                0 if is_inside => data = self.with(|state| state.seen[place].to_vec()),
                1 => {
                    // It comes behind the request, good or not.
                    let written = bytes(client, length, MAX_REQUEST)?;
                    if is_inside {
                        let is_dark = self.with(|state| {
                            state.seen[place].copy_from_slice(&written);
                            state.pending.push((offset, written));
                            state.left = state.left.map(|left| left.saturating_sub(1));
                            state.left == Some(0)
                        });
                        if is_dark {
                            // What comes now gets nowhere, and nobody is told anything.
                            return io::copy(client, &mut io::sink()).map(drop);
                        }
                    } else {
                        error = INVALID;
                    }
                }
                2 => return Ok(()),
                3 => self.flush(),
                _ => error = INVALID,
            }
            let mut reply = REPLY.to_be_bytes().to_vec();
            reply.extend(u32::to_be_bytes(error));
            reply.extend(cookie);
            reply.extend(data);
            client.write_all(&reply)?;
        }
    }

    fn flush(&self) {
        if self.is_honest {
            self.with(|state| {
                for (offset, data) in state.pending.drain(..) {
                    state.durable[offset..offset + data.len()].copy_from_slice(&data);
                }
            });
        }
    }

    /// The power goes after so many writes, at least one.
    pub(crate) fn arm(&self, writes: u64) {
        self.with(|state| state.left = Some(writes.max(1)));
    }

    /// Whether it has gone.
    pub(crate) fn is_dark(&self) -> bool {
        self.with(|state| state.left == Some(0))
    }

    /// Cuts the power, if it has not gone yet; the machine is off. It is back at once, with what is left.
    pub(crate) fn cut(&self, random: &mut fastrand::Rng) -> Cut {
        // Now and then all of it has got there, or nothing.
        let chances: &[f64] = if self.is_honest { &[0.0, 0.2, 0.5, 0.8, 1.0] } else { &[0.0] };
        let chance = *random.choice(chances).unwrap_or(&0.0);
        let mut cut = Cut::default();
        self.with(|state| {
            state.left = None;
            random.shuffle(&mut state.pending);
            for (offset, data) in state.pending.drain(..) {
                let mut at = 0;
                while at < data.len() {
                    let end = (((offset + at) / BLOCK + 1) * BLOCK - offset).min(data.len());
                    if random.f64() < chance {
                        state.durable[offset + at..offset + end].copy_from_slice(&data[at..end]);
                        cut.kept += 1;
                    } else {
                        cut.lost += 1;
                    }
                    at = end;
                }
            }
            state.seen.copy_from_slice(&state.durable);
        });
        cut
    }
}
