//! One request to one member: its answer is taken chunk by chunk, as many as come together are verified side by side, and each is handed out
//! alone, in order.

use super::class::Ticket;
use super::fault::Fault;
use super::link::Answer;
use super::member::Member;
use super::world::Boxed;
use super::{Inner, Landed};
use moor_image::{ImageError, LeafPage};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

/// Chunks that are verified together: their hashes are made side by side.
const TOGETHER: usize = 16;
/// Who waits for a chunk that is there waits so much longer for those behind it, so that it is not hashed alone; and then for the next.
const GATHER: Duration = Duration::from_micros(300);
/// The same where nobody waits: what came must not wait for long to be verified, since a flight that is moved loses it.
const GATHER_UNWANTED: Duration = Duration::from_millis(50);

/// What is fetched.
#[derive(Clone)]
pub(super) enum Need {
    /// A page of leaf hashes.
    Page(u64),
    /// Chunks, whose hashes are in this page.
    Chunks(Range<u64>, Arc<LeafPage>),
}

impl Need {
    /// How many items it has.
    pub(super) fn items(&self) -> u64 {
        match self {
            Self::Page(_) => 1,
            Self::Chunks(chunks, _) => chunks.end - chunks.start,
        }
    }
}

/// A part of it, verified.
pub(super) enum Item {
    Page(Arc<LeafPage>),
    /// A chunk, or the finding that the image is bad there.
    Chunk(u64, Landed),
}

/// One request to one member.
pub(super) struct Attempt {
    inner: Arc<Inner>,
    pub(super) member: Arc<Member>,
    need: Need,
    ticket: Arc<Ticket>,
    answer: Option<Answer>,
    /// Bytes of the answer that are on their way, and the answer with them.
    taking: Option<Taking>,
    /// Items that are verified and were not handed out.
    ready: VecDeque<Outcome>,
    progress: Arc<Progress>,
}

type Taking = Boxed<'static, (Answer, Result<Vec<u8>, Fault>)>;

/// Bytes, and how long they took from those before.
type Taken = (Vec<u8>, Duration);

/// An item, and how long its bytes took from those of the item before.
pub(super) type Outcome = Result<(Item, Duration), Fault>;

pub(super) type Step = Boxed<'static, (Attempt, Outcome)>;

/// A time since the beginning of the world, which one sets and others see.
pub(super) struct Moment(AtomicU64);

/// How far an attempt is.
pub(super) struct Progress {
    /// When it began, or the last item's bytes were all there.
    pub(super) last: Moment,
    /// Whether its member was asked: it may have to wait its turn there, of which the member can do nothing.
    is_asked: AtomicBool,
}

impl Progress {
    pub(super) fn new(now: Duration) -> Self {
        Self { last: Moment::new(now), is_asked: AtomicBool::new(false) }
    }

    pub(super) fn is_asked(&self) -> bool {
        self.is_asked.load(Ordering::Relaxed)
    }
}

impl Moment {
    pub(super) fn new(time: Duration) -> Self {
        let moment = Self(AtomicU64::new(0));
        moment.set(time);
        moment
    }

    pub(super) fn set(&self, time: Duration) {
        self.0.store(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

impl Attempt {
    /// Nothing is asked yet. `progress` is set as bytes come.
    pub(super) fn new(
        inner: Arc<Inner>,
        member: Arc<Member>,
        need: Need,
        ticket: Arc<Ticket>,
        progress: Arc<Progress>,
    ) -> Self {
        Self { inner, member, need, ticket, answer: None, taking: None, ready: VecDeque::new(), progress }
    }

    /// Whether all of its need is there.
    pub(super) fn is_done(&self) -> bool {
        self.answer.is_none() && self.taking.is_none() && self.ready.is_empty()
    }

    pub(super) async fn next(mut self) -> (Self, Outcome) {
        if self.ready.is_empty()
            && let Err(fault) = self.more().await
        {
            return (self, Err(fault));
        }
        let outcome = self.ready.pop_front().unwrap_or_else(|| Err(missing()));
        (self, outcome)
    }

    /// Brings the next items, one at least.
    async fn more(&mut self) -> Result<(), Fault> {
        let (start, length, size) = self.range()?;
        if self.answer.is_none() && self.taking.is_none() {
            let total = self.inner.verifier.header().file_length();
            let slot = self.member.turn().await?;
            self.progress.is_asked.store(true, Ordering::Relaxed);
            self.answer = Some(self.member.ask(slot, start, length, Some(total)).await?);
        }
        let mut taking = self.take(size)?;
        let (first, took) = self.arrived((&mut taking).await)?;
        match self.need.clone() {
            Need::Page(index) => {
                let page = self.inner.verifier.verify_page(index, &first).map_err(Fault::Wrong)?;
                self.ready.push_back(Ok((Item::Page(Arc::new(page)), took)));
                self.rest();
            }
            Need::Chunks(left, page) => {
                self.ticket.arrived(left.start);
                let mut taken = vec![(first, took)];
                let fault = self.gather(&left, &mut taken).await.err();
                let end = left.start + taken.len() as u64;
                let (sealed, times): (Vec<_>, Vec<_>) = taken.into_iter().unzip();
                let items = self.verify(left.start, &page, sealed);
                let is_good = fault.is_none() && items.iter().all(Result::is_ok);
                self.ready.extend(items.into_iter().zip(times).map(|(item, took)| item.map(|item| (item, took))));
                // What came before it is whole all the same.
                self.ready.extend(fault.map(Err));
                self.need = Need::Chunks(end..left.end, page);
                if !is_good {
                    (self.answer, self.taking) = (None, None);
                } else if end == left.end {
                    self.rest();
                }
            }
        }
        Ok(())
    }

    /// Takes the chunks of `left` behind the first, as many as are verified together. Who waits for those that are there does not wait long for the
    /// others.
    async fn gather(&mut self, left: &Range<u64>, taken: &mut Vec<Taken>) -> Result<(), Fault> {
        let world = self.inner.world.clone();
        let ticket = self.ticket.clone();
        let begun = world.now();
        let limit = || if ticket.is_wanted() { GATHER } else { GATHER_UNWANTED };
        let (mut soon, mut late) = (None, None);
        // While memory is short, what is not verified yet takes no more than it has to.
        let together = if self.inner.is_short() { 2 } else { TOGETHER };
        for chunk in (left.start + 1..left.end).take(together - 1) {
            if world.since(begun) >= limit() {
                break;
            }
            let mut taking = self.take(self.size(chunk)?)?;
            let taken_now = poll_fn(|context| {
                if let Poll::Ready(taken) = taking.as_mut().poll(context) {
                    return Poll::Ready(Some(taken));
                }
                // Once somebody waits for it, the flight comes by.
                let (limit, sleep) = (limit(), if ticket.is_wanted() { &mut soon } else { &mut late });
                let left = limit.saturating_sub(world.since(begun));
                if left.is_zero() {
                    return Poll::Ready(None);
                }
                sleep.get_or_insert_with(|| world.sleep(left)).as_mut().poll(context).map(|()| None)
            });
            let Some(arrived) = taken_now.await else {
                self.taking = Some(taking);
                break;
            };
            taken.push(self.arrived(arrived)?);
            ticket.arrived(chunk);
        }
        Ok(())
    }

    /// The next bytes of the answer, which are on their way already or are from now on.
    fn take(&mut self, size: usize) -> Result<Taking, Fault> {
        if let Some(taking) = self.taking.take() {
            return Ok(taking);
        }
        let mut answer = self.answer.take().ok_or_else(missing)?;
        let (member, buffer) = (self.member.clone(), self.inner.buffers.get(size));
        Ok(Box::pin(async move {
            let bytes = member.take_into(&mut answer, buffer).await;
            (answer, bytes)
        }))
    }

    /// They are there.
    fn arrived(&mut self, (answer, bytes): (Answer, Result<Vec<u8>, Fault>)) -> Result<Taken, Fault> {
        let bytes = bytes?;
        self.answer = Some(answer);
        let now = self.inner.world.now();
        let took = now.saturating_sub(self.progress.last.get());
        self.progress.last.set(now);
        Ok((bytes, took))
    }

    /// All of the answer is there, and good: its connection serves others.
    fn rest(&mut self) {
        if let Some(answer) = self.answer.take() {
            self.member.keep(answer);
        }
    }

    /// The length of a chunk in the file.
    fn size(&self, chunk: u64) -> Result<usize, Fault> {
        let range = self.inner.verifier.chunk_range(chunk).and_then(|(_, size)| usize::try_from(size).ok());
        range.ok_or_else(missing)
    }

    /// Where the need is in the file, and the length of its first item.
    fn range(&self) -> Result<(u64, u64, usize), Fault> {
        let verifier = &self.inner.verifier;
        let (start, end, size) = match &self.need {
            Need::Page(index) => {
                let (start, length) = verifier.page_range(*index).ok_or_else(missing)?;
                (start, start + length, length)
            }
            Need::Chunks(chunks, _) => {
                let (start, size) = verifier.chunk_range(chunks.start).ok_or_else(missing)?;
                let (last, length) = verifier.chunk_range(chunks.end.saturating_sub(1)).ok_or_else(missing)?;
                (start, last + length, size)
            }
        };
        Ok((start, end - start, usize::try_from(size).map_err(|_| missing())?))
    }

    /// Verifies chunks in a row, each for itself.
    fn verify(&self, first: u64, page: &LeafPage, mut chunks: Vec<Vec<u8>>) -> Vec<Result<Item, Fault>> {
        let sealed: Vec<_> = chunks.iter().map(|bytes| self.sealed(bytes)).collect();
        let opened = self.inner.verifier.open_chunks(first, page, &mut chunks);
        let each = (first..).zip(opened).zip(chunks.into_iter().zip(sealed));
        each.map(|((chunk, opened), (bytes, sealed))| self.judge(chunk, opened, bytes, sealed)).collect()
    }

    /// A copy, for who keeps chunks over restarts.
    fn sealed(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        self.inner.store.as_ref().map(|_| bytes.to_vec())
    }

    /// What comes of a chunk that was opened.
    fn judge(
        &self,
        chunk: u64,
        opened: Result<(), ImageError>,
        bytes: Vec<u8>,
        sealed: Option<Vec<u8>>,
    ) -> Result<Item, Fault> {
        // Here, because of those that came together the first may be dropped while others are still on their way.
        self.inner.counts.fetched.fetch_add(1, Ordering::Relaxed);
        let landed = match opened {
            Ok(()) => {
                self.inner.counts.verified.fetch_add(1, Ordering::Relaxed);
                if let (Some(store), Some(sealed)) = (&self.inner.store, sealed) {
                    store.keep(chunk, sealed);
                }
                Ok(self.inner.buffers.share(bytes))
            }
            // The bytes are those of the image: nobody has better ones.
            Err(error @ ImageError::Forged { .. }) => {
                tracing::error!("{error}");
                Err(Arc::new(error))
            }
            Err(error) => return Err(Fault::Wrong(error)),
        };
        Ok(Item::Chunk(chunk, landed))
    }
}

fn missing() -> Fault {
    Fault::Wrong(ImageError::Argument("the image has no such place"))
}
