//! Sealed chunks on a disk of the node, over restarts: a partition or a file of bounded size.
//!
//! How it lies there is in [`form`].
//!
//! Nothing in it is believed: each chunk is compared with the image's signed hashes when it comes back, so a write that was cut off, an
//! index that is older or newer than its slots, and a disk that lies cost a fetch each, and nothing is ever synced for its sake. Chunks
//! stay sealed: the disk alone opens nothing. For another image all of it is cleared.

mod form;
mod rest;

use crate::reader::world::Boxed;
use crate::reader::{FindStore, Store};
use form::{ENTRY, Layout, MAGIC, Opened, PAGE, clear, is_blank, read_at_most};
use moor_image::Header;
use rest::Rest;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Fewer slots are not worth a disk.
const FEWEST: u64 = 16;
/// Chunks that wait to be written; more are not kept.
const WAITING: usize = 32;
/// It is opened, and then set up, in this time each, or done without.
const SET_UP: Duration = Duration::from_secs(15);
/// Reads, or writes, in a row that fail; after them it is used no more.
const FAILURES: u32 = 4;

/// There is no disk cache.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A step failed.
    #[error("cannot {doing} '{}': {source}", path.display())]
    Step {
        /// What.
        doing: &'static str,
        /// The file or partition.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It holds something else.
    #[error(
        "'{}' holds something that is no cache of Mooring's, and is left alone: if nothing in it is needed, clear its beginning (`wipefs --all`, `dd if=/dev/zero bs=128K count=1`)",
        .0.display()
    )]
    Foreign(PathBuf),
    /// It is too small.
    #[error("'{}' has room for {slots} chunks of the image, and {FEWEST} are the least", path.display())]
    TooSmall {
        /// Which.
        path: PathBuf,
        /// How many fit.
        slots: u64,
    },
}

/// How it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The file or partition.
    pub path: PathBuf,
    /// Chunks that fit.
    pub slots: u64,
    /// Chunks in it.
    pub held: u64,
    /// Chunks that came from it.
    pub hits: u64,
    /// Chunks in it that were not what they should be.
    pub bad: u64,
    /// How often it kept readers waiting, so that they went to a server.
    #[serde(default)]
    pub late: u64,
    /// Why it is not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl DiskStatus {
    /// One that cannot be used.
    fn unusable(path: &Path, error: &DiskError) -> Self {
        Self { path: path.to_owned(), slots: 0, held: 0, hits: 0, bad: 0, late: 0, error: Some(error.to_string()) }
    }
}

/// The disk cache of a mount: opened at the start, set up once the image is known, and done without where it cannot be used.
pub struct DiskCache {
    path: PathBuf,
    size: Option<u64>,
    opened: Mutex<Option<Result<Opened, DiskError>>>,
    found: OnceLock<Result<Arc<Disk>, DiskStatus>>,
}

impl DiskCache {
    /// Opens the partition or file at `path`. A file is as large as the image wants, at most `mib` MiB; with a size it is made where there
    /// is none.
    #[must_use]
    pub fn new(path: &Path, mib: Option<u64>) -> Arc<Self> {
        let size = mib.map(|mib| mib.saturating_mul(1 << 20));
        let at = path.to_owned();
        let opened = in_time(path, "open", move || Opened::new(&at, size));
        let opened = Mutex::new(Some(opened));
        Arc::new(Self { path: path.to_owned(), size, opened, found: OnceLock::new() })
    }

    /// Sets it up for an image. Reads run on `runtime`.
    #[must_use]
    pub fn find(self: &Arc<Self>, runtime: &Handle) -> FindStore {
        let (cache, runtime) = (self.clone(), runtime.clone());
        FindStore(Arc::new(move |header| {
            // Once: what was opened is taken once.
            if let Some(opened) = lock(&cache.opened).take() {
                let disk = opened.and_then(|opened| cache.set_up(opened, header, &runtime)).map_err(|error| {
                    tracing::warn!("goes on without the disk cache: {error}");
                    DiskStatus::unusable(&cache.path, &error)
                });
                let _ = cache.found.set(disk);
            }
            let disk = cache.found.get()?.as_ref().ok()?;
            Some(disk.clone() as Arc<dyn Store>)
        }))
    }

    fn set_up(&self, opened: Opened, header: &Header, runtime: &Handle) -> Result<Arc<Disk>, DiskError> {
        let (path, size, header, runtime) = (self.path.clone(), self.size, header.clone(), runtime.clone());
        let set_up = move || {
            // Better with them than not at all.
            let _ = crate::survive::drop_capabilities();
            Disk::new(opened, &path, size, &header, runtime).map(Arc::new)
        };
        in_time(&self.path, "set up", set_up)
    }

    /// How it stands; `None` before the image is open.
    #[must_use]
    pub fn status(&self) -> Option<DiskStatus> {
        self.found.get().map(|found| match found {
            Ok(disk) => disk.status(),
            Err(unusable) => unusable.clone(),
        })
    }
}

/// Does something with a disk on a thread of its own: one that answers late must not keep anybody from a root that servers have.
fn in_time<T: Send + 'static>(
    path: &Path,
    doing: &'static str,
    work: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
) -> Result<T, DiskError> {
    let (tell, told) = sync_channel(1);
    let failed = |source| DiskError::Step { doing, path: path.to_owned(), source };
    let run = move || {
        // Nobody may wait any more.
        let _ = tell.send(work());
    };
    std::thread::Builder::new().name("disk set-up".into()).spawn(run).map_err(failed)?;
    let late = |_| Err(failed(io::Error::new(io::ErrorKind::TimedOut, "it does not answer in time")));
    told.recv_timeout(SET_UP).unwrap_or_else(late)
}

/// The cache.
pub struct Disk {
    path: PathBuf,
    file: Arc<File>,
    layout: Layout,
    /// Of each slot: its chunk + 1.
    index: Arc<Mutex<Vec<u64>>>,
    writes: SyncSender<(u64, Vec<u8>)>,
    runtime: Handle,
    /// Chunks that were read, the bad ones too.
    hits: AtomicU64,
    bad: Arc<AtomicU64>,
    late: AtomicU64,
    rest: Arc<Mutex<Rest>>,
    /// Reads in a row that failed.
    failures: Arc<AtomicU32>,
    is_off: Arc<AtomicBool>,
}

impl Disk {
    fn new(
        opened: Opened,
        path: &Path,
        size: Option<u64>,
        header: &Header,
        runtime: Handle,
    ) -> Result<Self, DiskError> {
        let failed = |doing| move |source: io::Error| DiskError::Step { doing, path: path.to_owned(), source };
        let Opened { file, is_device, there } = opened;
        let capacity = if is_device { there } else { size.unwrap_or(u64::MAX) };
        let layout = Layout::new(header, capacity);
        if layout.slots < FEWEST.min(header.chunks) {
            return Err(DiskError::TooSmall { path: path.to_owned(), slots: layout.slots });
        }
        let page = layout.page(header);
        let first = read_at_most(&file, 0, PAGE).map_err(failed("read"))?;
        let index = if first == page && there >= layout.end() {
            let bytes = read_at_most(&file, PAGE, layout.slots * ENTRY).map_err(failed("read"))?;
            let entry = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
            bytes.chunks(8).map(entry).collect()
        } else {
            if !first.starts_with(MAGIC) && !is_blank(&file, there).map_err(failed("read"))? {
                return Err(DiskError::Foreign(path.to_owned()));
            }
            clear(&file, is_device, layout, &page).map_err(failed("clear"))?;
            vec![0; usize::try_from(layout.slots).unwrap_or(0)]
        };
        let (file, index, is_off) = (Arc::new(file), Arc::new(Mutex::new(index)), Arc::new(AtomicBool::new(false)));
        let (writes, waiting) = sync_channel(WAITING);
        let writer = Writer { file: file.clone(), layout, index: index.clone(), is_off: is_off.clone() };
        let run = move || {
            // Better with them than not at all.
            let _ = crate::survive::drop_capabilities();
            writer.run(&waiting);
        };
        std::thread::Builder::new().name("disk".into()).spawn(run).map_err(failed("write"))?;
        let path = path.to_owned();
        let (hits, bad, late) = (AtomicU64::new(0), Arc::default(), AtomicU64::new(0));
        let (rest, failures) = (Arc::default(), Arc::default());
        Ok(Self { path, file, layout, index, writes, runtime, hits, bad, late, rest, failures, is_off })
    }

    fn slot(&self, chunk: u64) -> usize {
        usize::try_from(chunk % self.layout.slots.max(1)).unwrap_or(0)
    }

    /// How it stands.
    #[must_use]
    pub fn status(&self) -> DiskStatus {
        let held = lock(&self.index).iter().filter(|entry| **entry != 0).count() as u64;
        let is_off = self.is_off.load(Ordering::Relaxed);
        DiskStatus {
            path: self.path.clone(),
            slots: self.layout.slots,
            held,
            hits: self.hits.load(Ordering::Relaxed).saturating_sub(self.bad.load(Ordering::Relaxed)),
            bad: self.bad.load(Ordering::Relaxed),
            late: self.late.load(Ordering::Relaxed),
            error: is_off.then(|| "the disk fails, and is not used any more".to_owned()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store for Disk {
    fn has(&self, chunk: u64) -> bool {
        !self.is_off.load(Ordering::Relaxed)
            && lock(&self.index).get(self.slot(chunk)) == Some(&(chunk + 1))
            && !lock(&self.rest).is_on(Instant::now())
    }

    fn read(&self, chunk: u64, length: usize) -> Boxed<'static, Option<Vec<u8>>> {
        let offset = self.layout.data() + self.slot(chunk) as u64 * self.layout.length;
        let (file, is_off, rest) = (self.file.clone(), self.is_off.clone(), self.rest.clone());
        let (failures, bad, index, slot) =
            (self.failures.clone(), self.bad.clone(), self.index.clone(), self.slot(chunk));
        self.hits.fetch_add(1, Ordering::Relaxed);
        let read = self.runtime.spawn_blocking(move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset).map(|()| bytes)
        });
        Box::pin(async move {
            match read.await {
                Ok(Ok(bytes)) => {
                    lock(&rest).was_in_time(Instant::now());
                    failures.store(0, Ordering::Relaxed);
                    Some(bytes)
                }
                Ok(Err(error)) => {
                    // A bad place or two are no bad disk; one that is written to again may be good again.
                    bad.fetch_add(1, Ordering::Relaxed);
                    note(&index, slot, 0);
                    if failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES {
                        off(&is_off, &error.to_string());
                    }
                    None
                }
                // The runtime ends.
                Err(_) => None,
            }
        })
    }

    fn was_bad(&self, chunk: u64) {
        self.bad.fetch_add(1, Ordering::Relaxed);
        note(&self.index, self.slot(chunk), 0);
    }

    fn was_late(&self) {
        self.hits.fetch_sub(1, Ordering::Relaxed);
        self.late.fetch_add(1, Ordering::Relaxed);
        if let Some(rest) = lock(&self.rest).was_late(Instant::now()) {
            tracing::warn!("the disk cache keeps readers waiting, and is left alone for {} s", rest.as_secs());
        }
    }

    fn keep(&self, chunk: u64, sealed: Vec<u8>) {
        if !self.is_off.load(Ordering::Relaxed) {
            // What does not fit into the queue is fetched once more after a restart.
            let _ = self.writes.try_send((chunk, sealed));
        }
    }
}

/// What is in a slot from now on: a chunk + 1, or nothing (0).
fn note(index: &Mutex<Vec<u64>>, slot: usize, value: u64) {
    if let Some(entry) = lock(index).get_mut(slot) {
        *entry = value;
    }
}

fn off(is_off: &AtomicBool, why: &str) {
    if !is_off.swap(true, Ordering::Relaxed) {
        tracing::warn!("the disk cache is not used any more: {why}");
    }
}

/// Writes chunks, one at a time, for as long as somebody may bring one.
struct Writer {
    file: Arc<File>,
    layout: Layout,
    index: Arc<Mutex<Vec<u64>>>,
    is_off: Arc<AtomicBool>,
}

impl Writer {
    fn run(self, waiting: &Receiver<(u64, Vec<u8>)>) {
        let mut failures = 0;
        while let Ok((chunk, sealed)) = waiting.recv() {
            match self.write(chunk, &sealed) {
                Ok(()) => failures = 0,
                // A block that cannot be read cannot be written in part either.
                Err(error) => {
                    failures += 1;
                    if failures >= FAILURES {
                        off(&self.is_off, &error.to_string());
                        return;
                    }
                }
            }
        }
    }

    fn write(&self, chunk: u64, sealed: &[u8]) -> io::Result<()> {
        let slot = chunk % self.layout.slots;
        let at = usize::try_from(slot).map_err(io::Error::other)?;
        note(&self.index, at, 0);
        self.file.write_all_at(sealed, self.layout.data() + slot * self.layout.length)?;
        self.file.write_all_at(&(chunk + 1).to_le_bytes(), PAGE + slot * ENTRY)?;
        note(&self.index, at, chunk + 1);
        Ok(())
    }
}
