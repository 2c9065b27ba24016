//! What the tether tells others: a small JSON file in `/run/mooring`, replaced atomically while something changes.

use crate::disk::DiskStatus;
use crate::progress::Arrived;
use crate::reader::{MemberStatus, Reader};
use rustix::fs::{AtFlags, Mode as Bits, OFlags, open, openat, renameat, unlinkat};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{File, TryLockError};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where it is unless told otherwise.
pub const DEFAULT_PATH: &str = "/run/mooring/tether.json";
/// How often a change is written at most.
const EVERY: Duration = Duration::from_secs(1);
/// The same of the trace.
const TRACE_EVERY: u32 = 10;
/// How long a tether that ends just now may take to be gone.
const GONE: Duration = Duration::from_secs(5);
/// How often it is looked whether it is.
const LOOK: Duration = Duration::from_millis(50);

/// How the image is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Chunk by chunk, for as long as it is mounted.
    #[default]
    Tethered,
    /// As a whole, into memory.
    Untethered,
}

impl Mode {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tethered => "tethered",
            Self::Untethered => "untethered",
        }
    }
}

/// The content of the file. More members may be added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The process that serves.
    pub pid: u32,
    /// How the image is read.
    #[serde(default)]
    pub mode: Mode,
    /// Whether all of it is in memory: then nobody serves it any more.
    #[serde(default)]
    pub is_whole: bool,
    /// How much of it is, where all of it is to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrived: Option<Arrived>,
    /// Digest of the image.
    pub digest: String,
    /// Size of the sealed image in bytes.
    pub image_size: u64,
    /// Bytes of answers received from all members.
    pub bytes_fetched: u64,
    /// Whole chunks received.
    pub chunks_fetched: u64,
    /// Chunks that verified.
    pub chunks_verified: u64,
    /// Chunks that came because earlier boots read them.
    #[serde(default)]
    pub prefetched: u64,
    /// Bytes of verified chunks in the cache.
    pub cache_bytes: u64,
    /// Bytes that it may have just now: less while the machine is short of memory.
    #[serde(default)]
    pub cache_limit: u64,
    /// Requests that were sent to a second member too, because the first one kept somebody waiting.
    #[serde(default)]
    pub hedges: u64,
    /// Of those, how often the second was first.
    #[serde(default)]
    pub hedges_won: u64,
    /// The disk cache, where there is to be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskStatus>,
    /// Each member.
    pub members: Vec<MemberStatus>,
}

impl State {
    /// As the reader stands now.
    #[must_use]
    pub fn of(reader: &Reader, mode: Mode) -> Self {
        let figures = reader.figures();
        Self {
            pid: std::process::id(),
            mode,
            is_whole: false,
            arrived: None,
            digest: hex::encode(reader.header().digest()),
            image_size: reader.header().file_length(),
            bytes_fetched: figures.bytes_fetched,
            chunks_fetched: figures.chunks_fetched,
            chunks_verified: figures.chunks_verified,
            prefetched: figures.prefetched,
            cache_bytes: figures.cache_bytes,
            cache_limit: figures.cache_limit,
            hedges: figures.hedges,
            hedges_won: figures.hedges_won,
            disk: None,
            members: figures.members,
        }
    }

    /// Whether somebody serves the image, or nobody has to.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.is_whole || Path::new("/proc").join(self.pid.to_string()).exists()
    }

    /// Reads the file.
    ///
    /// # Errors
    /// It is not there (nothing is tethered), or is something else.
    pub fn read(path: &Path) -> io::Result<Self> {
        serde_json::from_slice(&std::fs::read(path)?).map_err(io::Error::from)
    }
}

/// For people.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = if self.is_whole { ", all of it in memory" } else { "" };
        writeln!(f, "image     {} ({}{whole})", self.digest, self.mode.as_str())?;
        // A share of a file's size: the loss of precision is far below what is printed.
        #[expect(clippy::cast_precision_loss, reason = "printed with one digit after the point")]
        let share = self.bytes_fetched as f64 * 100.0 / (self.image_size.max(1) as f64);
        writeln!(f, "fetched   {} of {} bytes ({share:.1} %)", self.bytes_fetched, self.image_size)?;
        if let Some(Arrived { bytes, of, seconds_left }) = self.arrived.filter(|_| !self.is_whole) {
            write!(f, "memory    {bytes} of {of} bytes")?;
            match seconds_left {
                Some(seconds) => writeln!(f, ", about {seconds} s left")?,
                None => writeln!(f)?,
            }
        }
        writeln!(f, "chunks    {} received, {} verified", self.chunks_fetched, self.chunks_verified)?;
        writeln!(f, "prefetch  {} chunks", self.prefetched)?;
        writeln!(f, "cache     {} of {} bytes", self.cache_bytes, self.cache_limit)?;
        writeln!(f, "hedges    {}, {} of them first", self.hedges, self.hedges_won)?;
        if let Some(DiskStatus { path, slots, held, hits, bad, late, error }) = &self.disk {
            write!(f, "disk      {}: {held} of {slots} chunks, {hits} read, {bad} bad, {late} late", path.display())?;
            match error {
                Some(error) => writeln!(f, "; not used: {error}")?,
                None => writeln!(f)?,
            }
        }
        for member in &self.members {
            let standing = serde_json::to_value(member.state).unwrap_or_default();
            write!(
                f,
                "server    {}: {}, {} bytes in {} requests, first chunk after {}.{:03} ms, {} faults",
                member.url,
                standing.as_str().unwrap_or_default(),
                member.bytes,
                member.requests,
                member.latency_us / 1000,
                member.latency_us % 1000,
                member.faults
            )?;
            match &member.last_fault {
                Some(fault) => writeln!(f, "; last: {fault}")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

/// The lock stays where it is when its holder ends: who waited for one that is removed would hold what nobody else finds.
fn lock(dir: &OwnedFd, name: &Path) -> io::Result<File> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = File::from(openat(dir, name, flags, Bits::from_raw_mode(0o600))?);
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if begun.elapsed() < GONE => std::thread::sleep(LOOK),
            Err(TryLockError::WouldBlock) => {
                let why = "a tether that runs has it already; give another one with --state";
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, why));
            }
        }
    }
}

fn temporary(name: &OsStr) -> OsString {
    let mut temporary = name.to_owned();
    temporary.push(".new");
    temporary
}

/// The file, and beside it that of the trace and the control socket, by their directory's descriptor: at `switch_root` `/run` moves away from under this process, and the path leads nowhere.
pub struct StateFile {
    dir: OwnedFd,
    state: OsString,
    trace: OsString,
    socket: OsString,
    /// Held for as long as this process lives: the files are of one tether.
    _lock: File,
}

impl StateFile {
    /// Prepares to write `path`; makes its directory (0700) where it is missing. Waits 5 s at most for another tether to be gone that has it.
    ///
    /// # Errors
    /// The directory cannot be made or opened; `path` has no file name; another tether goes on writing to it.
    pub fn new(path: &Path) -> io::Result<Self> {
        let dir = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let state = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let mut trace = path.file_stem().unwrap_or_default().to_owned();
        trace.push("-trace.json");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let dir = open(&dir, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Bits::empty())?;
        let socket = Path::new(&state).with_extension("sock").into_os_string();
        let lock = lock(&dir, &Path::new(&state).with_extension("lock"))?;
        Ok(Self { dir, state, trace, socket, _lock: lock })
    }

    /// Replaces the file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, state: &State) -> io::Result<()> {
        self.replace(&self.state, state)
    }

    fn replace(&self, name: &OsStr, content: &impl Serialize) -> io::Result<()> {
        let temporary = temporary(name);
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut file = File::from(openat(&self.dir, &temporary, flags, Bits::from_raw_mode(0o600))?);
        let mut text = serde_json::to_vec(content)?;
        text.push(b'\n');
        file.write_all(&text)?;
        renameat(&self.dir, &temporary, &self.dir, name)?;
        Ok(())
    }

    /// Removes the files: nothing is tethered any more.
    pub fn remove(&self) {
        for name in [&self.state, &self.trace, &self.socket] {
            for name in [name.clone(), temporary(name)] {
                // Not there is as good.
                let _ = unlinkat(&self.dir, name, AtFlags::empty());
            }
        }
    }

    /// Writes about once a second while something changes, and beside it the trace until it is whole. `state` says how it stands now.
    pub async fn follow(&self, reader: &Reader, state: impl Fn() -> State) -> Infallible {
        let mut written = None;
        // What is fetched as a whole says nothing of a boot.
        let (mut seconds, mut is_traced) = (0_u32, state().mode != Mode::Tethered);
        loop {
            seconds = seconds.wrapping_add(1);
            if !is_traced && seconds.is_multiple_of(TRACE_EVERY) {
                let trace = reader.trace();
                is_traced = trace.is_whole;
                if let Err(error) = self.replace(&self.trace, &trace) {
                    tracing::debug!("cannot write the trace: {error}");
                }
            }
            let state = state();
            if written.as_ref() != Some(&state) {
                if let Err(error) = self.write(&state) {
                    tracing::debug!("cannot write the state: {error}");
                }
                written = Some(state);
            }
            tokio::time::sleep(EVERY).await;
        }
    }
}
