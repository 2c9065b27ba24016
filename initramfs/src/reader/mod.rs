//! The verified reader: random reads of a sealed image that lies on several HTTPS servers. Offsets go in, plaintext comes out, and
//! every byte of it was verified: leaf hash, then tag. Nothing else is cached or returned.
//!
//! An outage is not an error: a read waits until some member serves the chunk. The one error is a chunk that is bad in the image
//! itself, whoever serves it ([`ReadError`]).
//!
//! What it needs of the world is in [`world`]; [`https`] over [`secure`] and its [`record`]s, and [`real`] are the world there is, and tests bring
//! another. [`open`] finds a good header. [`read`] is one read, and [`order`] says what is fetched for it and after it. [`fleet`] chooses a
//! [`member`] by its [`pace`], [`link`] asks it on one of its [`slots`], [`fault`] says what it did wrong, and [`recovery`] takes it back. [`change`] takes up another list
//! of members. [`flight`] fetches one thing from whoever brings it first, by one [`attempt`] or two, [`hedges`] bounds how often two are asked.
//! [`table`] holds the hashes to verify against, [`cache`] what was verified, in memory from [`buffers`], [`store`] what somebody keeps over
//! restarts. [`ahead`] and [`prefetch`] guess what comes next, [`class`] makes guesses wait for what is wanted, and [`trace`] notes what was.

mod address;
mod ahead;
mod attempt;
mod buffers;
mod cache;
mod change;
mod class;
mod fault;
mod fleet;
mod flight;
mod hedges;
mod https;
mod link;
mod member;
mod open;
mod order;
mod pace;
mod prefetch;
mod read;
mod real;
mod record;
mod recovery;
mod secure;
mod slots;
mod store;
mod table;
mod trace;
pub mod world;

pub use address::{Address, AddressError};
pub use change::ChangeError;
pub use fault::Fault;
pub use https::Https;
pub use member::{MemberStatus, Standing};
pub use open::OpenError;
pub use read::Read;
pub use real::Real;
pub use store::{Find, FindStore, Store};
pub use trace::Trace;

use ahead::Ahead;
use buffers::Buffers;
use cache::{Cache, Landed};
use class::Lines;
use fleet::Fleet;
use hedges::Hedges;
use moor_image::{Header, ImageError, OpenOptions, TAG_LENGTH, Verifier};
use prefetch::Prefetch;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use table::Table;
use tokio::sync::Semaphore;
use trace::Recorder;
use world::{Path, World};

/// Bound of the cache of verified chunks, in bytes.
pub const DEFAULT_CACHE: u64 = 8 << 20;
/// The same while memory is short or nothing is read, unless two chunks are more: the longest read of the kernel, so that neighbours which share a chunk still fetch it once.
const LITTLE_CACHE: u64 = 1 << 20;
/// Without a read for so long, little is kept.
pub const AT_REST_AFTER: Duration = Duration::from_secs(20);
/// So long a boot may take that has a list of what to prefetch.
const BOOT: Duration = Duration::from_mins(5);
/// Bytes of all requests that somebody waits for and that run at one time.
const BUDGET: u64 = 8 << 20;
/// Unit of the budget's semaphore.
const BUDGET_UNIT: u64 = 4096;

/// A read has no result.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The image is bad at this place, and no server has a better one.
    #[error("the image is bad: {0}")]
    Bad(Arc<ImageError>),
    /// The machine shuts down, and no server has answered for a while.
    #[error("no server of the image answers, and the machine shuts down")]
    GaveUp,
}

/// What the reader has done so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    /// Bytes of answers received from all members.
    pub bytes_fetched: u64,
    /// Whole chunks received.
    pub chunks_fetched: u64,
    /// Chunks that verified.
    pub chunks_verified: u64,
    /// Chunks that came because earlier boots read them.
    pub prefetched: u64,
    /// Requests that were sent to a second member too, because the first one kept somebody waiting.
    pub hedges: u64,
    /// Of those, how often the second was first.
    pub hedges_won: u64,
    /// Bytes of verified chunks in the cache.
    pub cache_bytes: u64,
    /// Bytes that it may have just now.
    pub cache_limit: u64,
    /// Each member.
    pub members: Vec<MemberStatus>,
}

/// An opened image. Clones share everything.
#[derive(Clone)]
pub struct Reader(Arc<Inner>);

/// How to read.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bound of the cache of verified chunks, in bytes.
    pub cache: u64,
    /// Chunks that earlier boots read, in order: they are fetched before anybody asks.
    pub prefetch: Vec<u64>,
    /// Who keeps chunks over restarts.
    pub store: Option<FindStore>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { cache: DEFAULT_CACHE, prefetch: Vec::new(), store: None }
    }
}

struct Inner {
    world: Arc<dyn World>,
    verifier: Verifier,
    fleet: Arc<Fleet>,
    buffers: Buffers,
    cache: Mutex<Cache>,
    /// Bound of the cache while there is memory.
    cache_limit: u64,
    /// Whether the machine is short of memory.
    is_short: AtomicBool,
    /// Whether nothing was read for a while, and little is kept because of that.
    is_at_rest: AtomicBool,
    begun: Duration,
    /// When something was read last, in milliseconds of the world.
    read_at: AtomicU64,
    store: Option<Arc<dyn Store>>,
    table: Mutex<Table>,
    /// Held while a page is fetched, so that each is fetched once.
    table_flight: tokio::sync::Mutex<()>,
    ahead: Mutex<Ahead>,
    prefetch: Mutex<Prefetch>,
    lines: Mutex<Lines>,
    budget: Semaphore,
    hedges: Hedges,
    trace: Mutex<Recorder>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    fetched: AtomicU64,
    verified: AtomicU64,
    prefetched: AtomicU64,
    hedges: AtomicU64,
    hedges_won: AtomicU64,
    /// A chunk that somebody wanted lately: what a member that comes back is tried with.
    recent: AtomicU64,
}

/// For an atomic; bounded far beyond any uptime.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reader {
    /// Opens the image that is at the end of all `paths`, the same bytes everywhere.
    ///
    /// # Errors
    /// No member serves an image that passes `options`.
    pub async fn open(
        paths: Vec<Box<dyn Path>>,
        world: Arc<dyn World>,
        options: &OpenOptions,
        settings: Settings,
    ) -> Result<Self, OpenError> {
        let (verifier, members) = open::open(paths, &world, options).await?;
        let header = verifier.header();
        let (chunk_size, chunks) = (header.chunk_size(), header.chunks);
        let fleet = Arc::new(Fleet::new(members, world.clone()));
        fleet.recount();
        world.spawn(Box::pin(fleet.clone().watch_outages()));
        let begun = world.now();
        let store = settings.store.and_then(|find| (find.0)(verifier.header()));
        let inner = Arc::new(Inner {
            world,
            verifier,
            fleet: fleet.clone(),
            buffers: Buffers::new(usize::try_from(chunk_size + TAG_LENGTH).unwrap_or(usize::MAX)),
            cache: Mutex::new(Cache::new(settings.cache)),
            cache_limit: settings.cache,
            is_short: AtomicBool::new(false),
            is_at_rest: AtomicBool::new(false),
            begun,
            read_at: AtomicU64::new(millis(begun)),
            store,
            table: Mutex::new(Table::new()),
            table_flight: tokio::sync::Mutex::new(()),
            ahead: Mutex::new(Ahead::new(chunk_size)),
            prefetch: Mutex::new(Prefetch::new(&settings.prefetch, chunks, settings.cache / chunk_size)),
            lines: Mutex::new(Lines::new(chunk_size)),
            budget: Semaphore::new(usize::try_from(BUDGET / BUDGET_UNIT).unwrap_or(usize::MAX)),
            hedges: Hedges::new(),
            trace: Mutex::new(Recorder::new(begun)),
            counts: Counts::default(),
        });
        for member in fleet.members().iter().filter(|member| member.standing() != Standing::Good) {
            tracing::warn!("{} fails and rests: {}", member.url(), member.last_fault().unwrap_or_default());
            inner.bring_back(member);
        }
        inner.look_at_the_others();
        inner.pump();
        Ok(Self(inner))
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        self.0.verifier.header()
    }

    /// Length of the plaintext in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.header().plaintext_length
    }

    /// What was done so far.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let members: Vec<_> = self.0.fleet.members().iter().map(|member| member.status()).collect();
        let (cache_bytes, cache_limit) = {
            let cache = lock(&self.0.cache);
            (cache.size(), cache.limit())
        };
        Figures {
            bytes_fetched: self.0.fleet.earlier_bytes() + members.iter().map(|member| member.bytes).sum::<u64>(),
            chunks_fetched: self.0.counts.fetched.load(Ordering::Relaxed),
            chunks_verified: self.0.counts.verified.load(Ordering::Relaxed),
            prefetched: self.0.counts.prefetched.load(Ordering::Relaxed),
            hedges: self.0.counts.hedges.load(Ordering::Relaxed),
            hedges_won: self.0.counts.hedges_won.load(Ordering::Relaxed),
            cache_bytes,
            cache_limit,
            members,
        }
    }

    /// What was read of the image in the first two minutes.
    #[must_use]
    pub fn trace(&self) -> Trace {
        lock(&self.0.trace).trace(&self.0.verifier, self.0.world.now())
    }

    /// Begins to read verified plaintext; less than `length` only at the end of the image. What is missing is on its way from here on.
    #[must_use]
    pub fn start(&self, offset: u64, length: usize) -> Read {
        let end = offset.saturating_add(length as u64).min(self.size());
        let mut read = Read { reader: self.clone(), offset, end, chunks: Vec::new() };
        if offset < end {
            let size = self.header().chunk_size();
            let (first, last) = (offset / size, (end - 1) / size);
            self.0.counts.recent.store(first, Ordering::Relaxed);
            read.chunks = self.0.order(first, last);
        }
        read
    }

    /// Reads to the end. Waits as long as no member serves it.
    ///
    /// # Errors
    /// As [`Read::wait`].
    pub async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, ReadError> {
        Ok(self.start(offset, length).wait().await?.concat())
    }

    /// Whether `plaintext`, which was verified once and lay somewhere since, still is that of a chunk: by the hashes of the image. Waits as long as no
    /// member serves those.
    pub async fn is_chunk(&self, chunk: u64, plaintext: &[u8]) -> bool {
        let page = self.0.page(self.0.verifier.page_of_chunk(chunk)).await;
        self.0.verifier.check_plaintext(chunk, &page, plaintext).is_ok()
    }

    /// The machine is short of memory, or not any more. While it is, the cache is small, and nothing is fetched on a guess: it would fall out of
    /// the cache before it is read. What somebody waits for is read as ever.
    pub fn save_memory(&self, is_short: bool) {
        let inner = &self.0;
        inner.is_short.store(is_short, Ordering::Relaxed);
        if is_short {
            lock(&inner.lines).clear();
        }
        inner.keep();
        inner.pump();
    }

    /// Gives memory back when nothing was read for [`AT_REST_AFTER`]; the next read takes it again. What was read lies in the kernel's page cache, too.
    pub fn rest(&self) {
        let inner = &self.0;
        inner.fleet.members().iter().for_each(|member| member.trim());
        let since = millis(inner.world.now()).saturating_sub(inner.read_at.load(Ordering::Relaxed));
        // What was fetched for the boot is there to be read, however long that takes.
        let is_booting = inner.is_booting();
        if !is_booting {
            lock(&inner.cache).expect_no_more();
        }
        if since >= millis(AT_REST_AFTER) && !is_booting && !inner.is_at_rest.swap(true, Ordering::Relaxed) {
            inner.keep();
            // What was fetched ahead is gone.
            *lock(&inner.ahead) = Ahead::new(inner.verifier.header().chunk_size());
        }
    }

    /// Whether an outage of all members ends reads with an error after half a minute from now on: the machine shuts down, and what waits for a
    /// server that may never come back keeps it from that.
    pub fn end(&self, ends: bool) {
        self.0.fleet.end(ends);
    }
}

impl Inner {
    /// Whether it boots, and has a list of what that takes.
    fn is_booting(&self) -> bool {
        self.world.since(self.begun) < BOOT && lock(&self.prefetch).has_list()
    }

    fn is_short(&self) -> bool {
        self.is_short.load(Ordering::Relaxed)
    }

    /// Keeps as much as is right just now: while memory is short, or nothing is read, little.
    fn keep(&self) {
        let small = LITTLE_CACHE.max(2 * self.verifier.header().chunk_size());
        // Whoever comes last here has seen what everybody before has set.
        let mut cache = lock(&self.cache);
        let little = self.is_short() || self.is_at_rest.load(Ordering::Relaxed);
        cache.set_limit(if little { small.min(self.cache_limit) } else { self.cache_limit });
        // What fell out of the cache came back as buffers.
        self.buffers.keep_few(little);
    }
}
