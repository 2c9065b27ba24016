//! The verified reader: random reads of a sealed image that lies on several HTTPS servers. Offsets go in, plaintext comes out, and
//! every byte of it was verified: leaf hash, then tag. Nothing else is cached or returned.
//!
//! An outage is not an error: a read waits until some member serves the chunk. The one error is a chunk that is bad in the image
//! itself, whoever serves it ([`ReadError`]).
//!
//! [`open`] finds a good header. [`fleet`] chooses a [`member`], [`link`] asks it, [`fault`] says what it did wrong, [`table`] holds
//! the hashes to verify against, [`cache`] what was verified, [`ahead`] guesses what comes next.

mod address;
mod ahead;
mod cache;
mod fault;
mod fleet;
mod link;
mod member;
mod open;
mod table;

pub use address::{Address, AddressError};
pub use fault::Fault;
pub use member::{MemberStatus, Standing};
pub use open::OpenError;

use ahead::Ahead;
use bytes::Bytes;
use cache::{Cache, Landed, Lookup};
use fleet::Fleet;
use member::Member;
use moor_image::{Header, ImageError, LEAVES_PER_PAGE, LeafPage, OpenOptions, Verifier};
use rustls::ClientConfig;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use table::Table;
use tokio::sync::{Semaphore, oneshot};

/// Bound of the cache of verified chunks, in bytes.
pub const DEFAULT_CACHE: u64 = 8 << 20;
/// Longest range of one request, in bytes of plaintext.
const RANGE: u64 = 1 << 20;
/// Bytes of all requests that run at one time.
const BUDGET: u64 = 8 << 20;
/// Unit of the budget's semaphore.
const BUDGET_UNIT: u64 = 4096;

/// The image is bad at this place, and no server has a better one.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the image is bad: {0}")]
pub struct ReadError(Arc<ImageError>);

/// What the reader has done so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    /// Bytes of answers received from all members.
    pub bytes_fetched: u64,
    /// Whole chunks received.
    pub chunks_fetched: u64,
    /// Chunks that verified.
    pub chunks_verified: u64,
    /// Bytes of verified chunks in the cache.
    pub cache_bytes: u64,
    /// Each member.
    pub members: Vec<MemberStatus>,
}

/// An opened image. Clones share everything.
#[derive(Clone)]
pub struct Reader(Arc<Inner>);

struct Inner {
    verifier: Verifier,
    fleet: Arc<Fleet>,
    cache: Mutex<Cache>,
    table: Mutex<Table>,
    /// Held while a page is fetched, so that each is fetched once.
    table_flight: tokio::sync::Mutex<()>,
    ahead: Mutex<Ahead>,
    budget: Semaphore,
    fetched: AtomicU64,
    verified: AtomicU64,
    /// A chunk that somebody wanted lately: what a member that comes back is tried with.
    recent: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Chunks that one task fetches; those that it did not land when it is dropped are free for others.
struct Run {
    inner: Arc<Inner>,
    left: Range<u64>,
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.left.is_empty() {
            let mut cache = lock(&self.inner.cache);
            for chunk in self.left.clone() {
                cache.crash(chunk);
            }
        }
    }
}

impl Run {
    fn land(&mut self, landed: &Landed) {
        lock(&self.inner.cache).land(self.left.start, landed);
        self.left.start += 1;
    }
}

impl Reader {
    /// Opens the image at `addresses`, which all serve the same bytes. Must be called within a tokio runtime, which has to outlive
    /// the reader.
    ///
    /// # Errors
    /// No member serves an image that passes `options`.
    pub async fn open(
        addresses: Vec<Address>,
        tls: &Arc<ClientConfig>,
        options: &OpenOptions,
        cache: u64,
    ) -> Result<Self, OpenError> {
        let (verifier, members) = open::open(addresses, tls, options).await?;
        let chunk_size = verifier.header().chunk_size();
        let fleet = Arc::new(Fleet::new(members));
        fleet.recount();
        tokio::spawn(fleet.clone().watch_outages());
        let reader = Self(Arc::new(Inner {
            verifier,
            fleet: fleet.clone(),
            cache: Mutex::new(Cache::new(cache)),
            table: Mutex::new(Table::new()),
            table_flight: tokio::sync::Mutex::new(()),
            ahead: Mutex::new(Ahead::new(chunk_size)),
            budget: Semaphore::new(usize::try_from(BUDGET / BUDGET_UNIT).unwrap_or(usize::MAX)),
            fetched: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            recent: AtomicU64::new(0),
        }));
        for member in fleet.members().iter().filter(|member| member.standing() != Standing::Good) {
            tracing::warn!("{} fails and rests: {}", member.url(), member.last_fault().unwrap_or_default());
            reader.0.bring_back(member);
        }
        Ok(reader)
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
        Figures {
            bytes_fetched: members.iter().map(|member| member.bytes).sum(),
            chunks_fetched: self.0.fetched.load(Ordering::Relaxed),
            chunks_verified: self.0.verified.load(Ordering::Relaxed),
            cache_bytes: lock(&self.0.cache).size(),
            members,
        }
    }

    /// Reads verified plaintext; less than `length` only at the end of the image. Waits as long as no member serves it.
    ///
    /// # Errors
    /// The image itself is bad there.
    pub async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, ReadError> {
        let end = offset.saturating_add(length as u64).min(self.size());
        if offset >= end {
            return Ok(Vec::new());
        }
        let size = self.header().chunk_size();
        let (first, last) = (offset / size, (end - 1) / size);
        self.0.recent.store(first, Ordering::Relaxed);
        let waiting = self.0.order(first, last);
        let mut out = Vec::with_capacity(length);
        for (chunk, lookup) in (first..).zip(waiting) {
            let bytes = self.0.arrive(chunk, lookup).await?;
            let from = within(offset.saturating_sub(chunk * size), &bytes);
            let to = within(end - chunk * size, &bytes);
            out.extend_from_slice(&bytes[from..to]);
        }
        Ok(out)
    }
}

impl Inner {
    /// Looks chunks `first` to `last` up, and starts flights for what is missing and for what is likely to be wanted next.
    fn order(self: &Arc<Self>, first: u64, last: u64) -> Vec<Lookup> {
        let ahead = lock(&self.ahead).observe(first, last);
        let mut missing = Vec::new();
        let lookups: Vec<_> = {
            let mut cache = lock(&self.cache);
            let lookups = (first..=last)
                .map(|chunk| {
                    let lookup = cache.lookup(chunk);
                    if matches!(lookup, Lookup::Missing(_)) {
                        missing.push(chunk);
                    }
                    lookup
                })
                .collect();
            // While nothing is served, guesses would only stand in the way of what is wanted.
            if !self.fleet.is_down() {
                let ahead = ahead.start.max(last + 1)..ahead.end.min(self.verifier.header().chunks);
                missing.extend(ahead.filter(|chunk| cache.claim(*chunk)));
            }
            lookups
        };
        for run in runs(&missing, self.verifier.header().chunk_size()) {
            let run = Run { inner: self.clone(), left: run };
            tokio::spawn(run.fly());
        }
        lookups
    }

    /// Waits for a chunk. A flight that was lost is started once more.
    async fn arrive(self: &Arc<Self>, chunk: u64, lookup: Lookup) -> Result<Bytes, ReadError> {
        let mut receiver: oneshot::Receiver<Landed> = match lookup {
            Lookup::Cached(bytes) => return Ok(bytes),
            Lookup::Waiting(receiver) | Lookup::Missing(receiver) => receiver,
        };
        loop {
            if let Ok(landed) = receiver.await {
                return landed.map_err(ReadError);
            }
            let again = lock(&self.cache).lookup(chunk);
            receiver = match again {
                Lookup::Cached(bytes) => return Ok(bytes),
                Lookup::Waiting(receiver) => receiver,
                Lookup::Missing(receiver) => {
                    tokio::spawn(Run { inner: self.clone(), left: chunk..chunk + 1 }.fly());
                    receiver
                }
            };
        }
    }

    /// A page of leaf hashes, from memory or from any member. Waits as long as none serves it.
    async fn page(self: &Arc<Self>, index: u64) -> Arc<LeafPage> {
        if let Some(page) = lock(&self.table).get(index) {
            return page;
        }
        let _flight = self.table_flight.lock().await;
        loop {
            if let Some(page) = lock(&self.table).get(index) {
                return page;
            }
            let member = self.fleet.pick().await;
            let _running = member.running();
            match self.page_from(&member, index).await {
                Ok(page) => {
                    self.fleet.succeeded(&member, false);
                    return page;
                }
                Err(fault) => self.failed(&member, &fault),
            }
        }
    }

    async fn page_from(&self, member: &Member, index: u64) -> Result<Arc<LeafPage>, Fault> {
        let missing = || Fault::Wrong(ImageError::Argument("the image has no such table page"));
        let (start, length) = self.verifier.page_range(index).ok_or_else(missing)?;
        let size = usize::try_from(length).map_err(|_| missing())?;
        let mut answer = member.get(start, length, Some(self.verifier.header().file_length())).await?;
        let bytes = member.take(&mut answer, size).await?;
        let page = Arc::new(self.verifier.verify_page(index, &bytes).map_err(Fault::Wrong)?);
        lock(&self.table).insert(page.clone());
        member.keep(answer);
        Ok(page)
    }

    fn failed(self: &Arc<Self>, member: &Arc<Member>, fault: &Fault) {
        if self.fleet.failed(member, fault, false) {
            self.bring_back(member);
        }
    }

    /// Lets a member rest, then tries it with a real read that is verified, until one succeeds. Ends with the reader.
    fn bring_back(self: &Arc<Self>, member: &Arc<Member>) {
        let (reader, member): (Weak<Self>, _) = (Arc::downgrade(self), member.clone());
        tokio::spawn(async move {
            loop {
                let Some(inner) = reader.upgrade() else { return };
                let rest = member.rest(inner.fleet.is_down());
                drop(inner);
                tokio::time::sleep(rest).await;
                let Some(inner) = reader.upgrade() else { return };
                match member.standing() {
                    Standing::Good => return,
                    Standing::Excluded if !inner.fleet.all_excluded() => continue,
                    _ => {}
                }
                match inner.try_out(&member).await {
                    Ok(()) => {
                        inner.fleet.succeeded(&member, true);
                        return;
                    }
                    Err(fault) => _ = inner.fleet.failed(&member, &fault, true),
                }
            }
        });
    }

    /// One verified read of a page and a chunk on this member alone; what it brings is not kept.
    async fn try_out(&self, member: &Member) -> Result<(), Fault> {
        let chunk = self.recent.load(Ordering::Relaxed);
        let Some((start, length)) = self.verifier.chunk_range(chunk) else { return Ok(()) };
        let index = self.verifier.page_of_chunk(chunk);
        let held = lock(&self.table).get(index);
        let page = match held {
            Some(page) => page,
            None => self.page_from(member, index).await?,
        };
        let size = usize::try_from(length).map_err(|_| Fault::Broken("a chunk does not fit into memory".into()))?;
        let mut answer = member.get(start, length, Some(self.verifier.header().file_length())).await?;
        let mut bytes = member.take(&mut answer, size).await?;
        match self.verifier.open_chunk(chunk, &page, &mut bytes) {
            // A chunk that was sealed badly is none of the member's doing.
            Ok(()) | Err(ImageError::Forged { .. }) => {}
            Err(error) => return Err(Fault::Wrong(error)),
        }
        member.keep(answer);
        Ok(())
    }
}

impl Run {
    /// Fetches the run from whoever serves it, verifies and lands chunk by chunk.
    async fn fly(mut self) {
        let inner = self.inner.clone();
        let units = (self.left.end - self.left.start) * inner.verifier.header().chunk_size() / BUDGET_UNIT;
        let units = u32::try_from(units.min(BUDGET / BUDGET_UNIT)).unwrap_or(1);
        let Ok(_budget) = inner.budget.acquire_many(units).await else { return };
        let page = inner.page(inner.verifier.page_of_chunk(self.left.start)).await;
        while !self.left.is_empty() {
            let member = inner.fleet.pick().await;
            let _running = member.running();
            match self.stream(&member, &page).await {
                Ok(()) => inner.fleet.succeeded(&member, false),
                Err(fault) => inner.failed(&member, &fault),
            }
        }
    }

    /// One request for all that is left. What verified before a fault is landed.
    async fn stream(&mut self, member: &Member, page: &LeafPage) -> Result<(), Fault> {
        let inner = self.inner.clone();
        let verifier = &inner.verifier;
        let missing = || Fault::Broken("the image has no such chunk".into());
        let (start, _) = verifier.chunk_range(self.left.start).ok_or_else(missing)?;
        let (last, length) = verifier.chunk_range(self.left.end - 1).ok_or_else(missing)?;
        let mut answer = member.get(start, last + length - start, Some(verifier.header().file_length())).await?;
        while !self.left.is_empty() {
            let chunk = self.left.start;
            let (_, length) = verifier.chunk_range(chunk).ok_or_else(missing)?;
            let size = usize::try_from(length).map_err(|_| missing())?;
            let mut bytes = member.take(&mut answer, size).await?;
            inner.fetched.fetch_add(1, Ordering::Relaxed);
            match verifier.open_chunk(chunk, page, &mut bytes) {
                Ok(()) => {
                    inner.verified.fetch_add(1, Ordering::Relaxed);
                    self.land(&Ok(Bytes::from(bytes)));
                }
                // The bytes are those of the image: nobody has better ones.
                Err(error @ ImageError::Forged { .. }) => {
                    tracing::error!("{error}");
                    self.land(&Err(Arc::new(error)));
                }
                Err(error) => return Err(Fault::Wrong(error)),
            }
        }
        member.keep(answer);
        Ok(())
    }
}

/// An offset relative to a chunk, at most its end.
fn within(offset: u64, chunk: &Bytes) -> usize {
    usize::try_from(offset).map_or(chunk.len(), |offset| offset.min(chunk.len()))
}

/// Joins chunks (in ascending order) into ranges of at most [`RANGE`] bytes that stay within one page of the table.
fn runs(chunks: &[u64], chunk_size: u64) -> Vec<Range<u64>> {
    let longest = (RANGE / chunk_size).max(1);
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
