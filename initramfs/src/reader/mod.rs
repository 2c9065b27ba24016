//! The verified reader: random reads of a sealed image that lies on several HTTPS servers. Offsets go in, plaintext comes out, and
//! every byte of it was verified: leaf hash, then tag. Nothing else is cached or returned.
//!
//! An outage is not an error: a read waits until some member serves the chunk. The one error is a chunk that is bad in the image
//! itself, whoever serves it ([`ReadError`]).
//!
//! What it needs of the world is in [`world`]; [`https`] over [`secure`] and its [`record`]s, and [`real`] are the world there is, and tests bring another. [`open`] finds a
//! good header. [`fleet`] chooses a [`member`] by its [`pace`], [`link`] asks it, [`fault`] says what it did wrong, and [`recovery`] takes
//! it back. [`change`] takes up another list of members. [`flight`] fetches one thing from whoever brings it first, by one [`attempt`] or two, [`hedges`] bounds how often two are asked. [`table`] holds the
//! hashes to verify against, [`cache`] what was verified, in memory from [`buffers`], [`store`] what somebody keeps over restarts. [`ahead`] and [`prefetch`] guess what comes next, [`class`] makes guesses wait
//! for what is wanted, and [`trace`] notes what was.

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
mod pace;
mod prefetch;
mod real;
mod record;
mod recovery;
mod secure;
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
pub use real::Real;
pub use store::{Find, FindStore, Store};
pub use trace::Trace;

use ahead::Ahead;
use attempt::{Item, Need};
use buffers::Buffers;
use bytes::Bytes;
use cache::{Cache, Landed, Lookup};
use class::{Class, DEMAND_RANGE, Lines, Ticket};
use fleet::Fleet;
use flight::{Flight, Run};
use hedges::Hedges;
use moor_image::{Header, ImageError, LEAVES_PER_PAGE, LeafPage, OpenOptions, TAG_LENGTH, Verifier};
use prefetch::Prefetch;
use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;
use table::Table;
use tokio::sync::{Semaphore, oneshot};
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

    /// From now on an outage of all members ends reads with an error after half a minute: the machine shuts down, and what waits for a
    /// server that may never come back keeps it from that.
    pub fn end(&self) {
        self.0.fleet.end();
    }
}

/// A read that has begun.
pub struct Read {
    reader: Reader,
    offset: u64,
    end: u64,
    /// What was found, from the chunk of the offset on.
    chunks: Vec<Lookup>,
}

impl Read {
    /// What is read, in parts, if all of it is there already.
    #[must_use]
    pub fn now(&self) -> Option<Vec<Bytes>> {
        let cached = |lookup: &Lookup| if let Lookup::Cached(bytes) = lookup { Some(bytes.clone()) } else { None };
        let chunks: Vec<_> = self.chunks.iter().map(cached).collect::<Option<_>>()?;
        Some((self.first()..).zip(chunks).map(|(chunk, bytes)| self.part(chunk, &bytes)).collect())
    }

    /// What is read, in parts. Waits as long as no member serves it.
    ///
    /// # Errors
    /// The image itself is bad there; or [`Reader::end`] was called, and no member answers.
    pub async fn wait(self) -> Result<Vec<Bytes>, ReadError> {
        let fleet = self.reader.0.fleet.clone();
        let (mut all, mut end) = (pin!(self.all()), pin!(fleet.given_up()));
        poll_fn(|context| match all.as_mut().poll(context) {
            Poll::Ready(result) => Poll::Ready(result),
            Poll::Pending => end.as_mut().poll(context).map(|()| Err(ReadError::GaveUp)),
        })
        .await
    }

    async fn all(mut self) -> Result<Vec<Bytes>, ReadError> {
        let chunks = std::mem::take(&mut self.chunks);
        let mut parts = Vec::with_capacity(chunks.len());
        for (chunk, lookup) in (self.first()..).zip(chunks) {
            let bytes = self.reader.0.arrive(chunk, lookup).await?;
            parts.push(self.part(chunk, &bytes));
        }
        Ok(parts)
    }

    fn first(&self) -> u64 {
        self.offset / self.reader.header().chunk_size()
    }

    /// The part of a chunk that is read.
    fn part(&self, chunk: u64, bytes: &Bytes) -> Bytes {
        let start = chunk * self.reader.header().chunk_size();
        bytes.slice(within(self.offset.saturating_sub(start), bytes)..within(self.end - start, bytes))
    }
}

impl Inner {
    /// Looks chunks `first` to `last` up, and starts flights for what is missing and for what is likely to be wanted next.
    fn order(self: &Arc<Self>, first: u64, last: u64) -> Vec<Lookup> {
        let now = self.world.now();
        self.read_at.store(millis(now), Ordering::Relaxed);
        if self.is_at_rest.swap(false, Ordering::Relaxed) {
            self.keep();
        }
        lock(&self.trace).wanted(first, last, now);
        let ahead = if self.is_short() { 0..0 } else { self.guess(first, last) };
        let mut missing = Vec::new();
        let mut lookups = Vec::new();
        let runs: Vec<_> = {
            let mut cache = lock(&self.cache);
            for chunk in first..=last {
                let lookup = cache.lookup(chunk);
                if matches!(lookup, Lookup::Missing(_)) {
                    missing.push(chunk);
                }
                lookups.push(lookup);
            }
            self.take(&mut cache, Class::Demand, &missing)
        };
        for (run, ticket) in runs {
            self.launch(Class::Demand, run, ticket);
        }
        lock(&self.prefetch).wanted(first, last);
        lock(&self.lines).push(ahead.start.max(last + 1)..ahead.end.min(self.verifier.header().chunks));
        self.pump();
        lookups
    }

    /// What to fetch ahead of somebody who wants chunks `first` to `last`. While it boots, a list of what earlier boots read knows better than
    /// any guess where they stopped.
    fn guess(&self, first: u64, last: u64) -> Range<u64> {
        let end = if self.is_booting() { lock(&self.prefetch).end(first, last) } else { None };
        lock(&self.ahead).observe(first, last, end.unwrap_or(u64::MAX))
    }

    /// Whether it boots, and has a list of what that takes.
    fn is_booting(&self) -> bool {
        self.world.since(self.begun) < BOOT && lock(&self.prefetch).has_list()
    }

    /// Joins chunks into runs, each with a ticket of its own, and says that they are on their way.
    fn take(&self, cache: &mut Cache, class: Class, chunks: &[u64]) -> Vec<(Range<u64>, Arc<Ticket>)> {
        let with_ticket = |run: Range<u64>| {
            let ticket = Arc::new(Ticket::new(class, run.start));
            cache.taken(run.clone(), &ticket);
            (run, ticket)
        };
        runs(chunks, self.verifier.header().chunk_size()).into_iter().map(with_ticket).collect()
    }

    /// Fetches a run, in a task of its own.
    fn launch(self: &Arc<Self>, class: Class, run: Range<u64>, ticket: Arc<Ticket>) {
        let chunks = run.end - run.start;
        lock(&self.lines).begins(class, chunks);
        let place = Place { inner: self.clone(), class, chunks };
        let run = Run { inner: self.clone(), class, ticket, left: run };
        self.world.spawn(Box::pin(async move {
            let inner = place.inner.clone();
            let units = u32::try_from((chunks * inner.verifier.header().chunk_size()).min(BUDGET) / BUDGET_UNIT);
            // Guesses are bounded by their lines, and must not hold up what is wanted.
            let budget = match class {
                Class::Demand => Some(inner.budget.acquire_many(units.unwrap_or(1)).await),
                Class::Ahead | Class::Prefetch => None,
            };
            run.fly().await;
            drop(budget);
            drop(place);
            inner.pump();
        }));
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

    /// Starts what may be fetched without anybody waiting for it, as far as there is room.
    fn pump(self: &Arc<Self>) {
        // While nothing is served, guesses would only stand in the way of what is wanted.
        while !self.fleet.is_down() && !self.is_short() {
            let (class, chunks) = {
                let mut lines = lock(&self.lines);
                match lines.ahead() {
                    Some(chunks) => (Class::Ahead, chunks),
                    None => match lock(&self.prefetch).take(lines.prefetch()) {
                        Some(chunks) => (Class::Prefetch, chunks),
                        None => return,
                    },
                }
            };
            let runs = {
                let mut cache = lock(&self.cache);
                let missing: Vec<_> = chunks.filter(|chunk| cache.is_missing(*chunk)).collect();
                self.take(&mut cache, class, &missing)
            };
            for (run, ticket) in runs {
                self.launch(class, run, ticket);
            }
        }
    }

    /// Waits for a chunk. A flight that was lost is started once more.
    async fn arrive(self: &Arc<Self>, chunk: u64, lookup: Lookup) -> Result<Bytes, ReadError> {
        let mut lookup = lookup;
        loop {
            let receiver: oneshot::Receiver<Landed> = match lookup {
                Lookup::Cached(bytes) => return Ok(bytes),
                Lookup::Waiting(receiver) | Lookup::Missing(receiver) => receiver,
            };
            if let Ok(landed) = receiver.await {
                return landed.map_err(ReadError::Bad);
            }
            let runs = {
                let mut cache = lock(&self.cache);
                lookup = cache.lookup(chunk);
                let missing = if matches!(lookup, Lookup::Missing(_)) { vec![chunk] } else { Vec::new() };
                self.take(&mut cache, Class::Demand, &missing)
            };
            for (run, ticket) in runs {
                self.launch(Class::Demand, run, ticket);
            }
        }
    }

    /// A page of leaf hashes, from memory or from any member. Waits as long as none serves it.
    async fn page(self: &Arc<Self>, index: u64) -> Arc<LeafPage> {
        if let Some(page) = lock(&self.table).get(index) {
            return page;
        }
        let _flight = self.table_flight.lock().await;
        if let Some(page) = lock(&self.table).get(index) {
            return page;
        }
        let mut flight = Flight::new(self.clone(), Arc::new(Ticket::new(Class::Demand, 0)));
        loop {
            if let Item::Page(page) = flight.next(&Need::Page(index)).await {
                lock(&self.table).insert(page.clone());
                return page;
            }
        }
    }
}

/// A fetch's place in its line, as long as it lasts.
struct Place {
    inner: Arc<Inner>,
    class: Class,
    chunks: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.inner.lines).ends(self.class, self.chunks);
    }
}

/// An offset relative to a chunk, at most its end.
fn within(offset: u64, chunk: &Bytes) -> usize {
    usize::try_from(offset).map_or(chunk.len(), |offset| offset.min(chunk.len()))
}

/// Joins chunks (in ascending order) into ranges of at most [`DEMAND_RANGE`] bytes that stay within one page of the table.
fn runs(chunks: &[u64], chunk_size: u64) -> Vec<Range<u64>> {
    let longest = (DEMAND_RANGE / chunk_size).max(1);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for &chunk in chunks {
        match runs.last_mut() {
            Some(run) if run.end == chunk && run.end - run.start < longest && chunk % LEAVES_PER_PAGE != 0 => {
                run.end += 1;
            }
            _ => runs.push(chunk..chunk + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_chunks_join_into_ranges() {
        let size = 64 << 10;
        assert_eq!(runs(&[], size), []);
        assert_eq!(runs(&[1, 2, 3, 5], size), [1..4, 5..6]);
        assert_eq!(runs(&(0..40).collect::<Vec<_>>(), size), [0..16, 16..32, 32..40]);
        assert_eq!(runs(&[2046, 2047, 2048], size), [2046..2048, 2048..2049]);
        assert_eq!(runs(&[0, 1], 1 << 20), [0..1, 1..2]);
    }
}
