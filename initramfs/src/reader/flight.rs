//! Fetching one thing, whatever the members do: a request goes to the best member; when it keeps somebody waiting it goes to another one
//! too (a *hedge*), or moves there. What verifies first counts, and the other is given up.

use super::class::{Class, Ticket};
use super::fault::Fault;
use super::link::Answer;
use super::member::{Counted, Member, Standing};
use super::world::Boxed;
use super::{Inner, Landed, lock};
use moor_image::{ImageError, LeafPage};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

/// No request is sent twice sooner.
const HEDGE_AFTER: Duration = Duration::from_millis(10);
/// The same while nothing is known of a member yet.
const HEDGE_UNKNOWN_AFTER: Duration = Duration::from_millis(100);
/// A request that somebody waits for moves to another member after so long, if that one is clearly quicker.
const MOVE_AFTER: Duration = Duration::from_millis(400);
/// After so long also to one that counts as slow, keeps others waiting, or is not as much quicker: a move is no request more, and a slow
/// server is better than one that is about to be found dead.
const MOVE_ANYWAY_AFTER: Duration = Duration::from_millis(600);
/// The same where nobody waits.
const MOVE_UNWANTED_AFTER: Duration = Duration::from_secs(1);
/// So many times quicker.
const QUICKER: u32 = 4;
const QUICKER_ANYWAY: u32 = 2;
/// How often a request that is overdue is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(25);
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
    fn items(&self) -> u64 {
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
struct Attempt {
    inner: Arc<Inner>,
    member: Arc<Member>,
    need: Need,
    ticket: Arc<Ticket>,
    answer: Option<Answer>,
    /// Bytes of the answer that are on their way, and the answer with them.
    taking: Option<Taking>,
    /// What came together with the item before.
    beside: VecDeque<Outcome>,
    /// When it was asked, or the last item's bytes were all there.
    last: Arc<Moment>,
}

type Taking = Boxed<'static, (Answer, Result<Vec<u8>, Fault>)>;

/// Bytes, and how long they took from those before.
type Taken = (Vec<u8>, Duration);

/// An item, and how long its bytes took from those of the item before.
type Outcome = Result<(Item, Duration), Fault>;

type Step = Boxed<'static, (Attempt, Outcome)>;

/// A time since the beginning of the world, which one sets and others see.
struct Moment(AtomicU64);

impl Moment {
    fn new(time: Duration) -> Self {
        let moment = Self(AtomicU64::new(0));
        moment.set(time);
        moment
    }

    fn set(&self, time: Duration) {
        self.0.store(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn get(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// An attempt at the next item. Dropped, it gives its request up.
struct Runner {
    member: Arc<Member>,
    step: Step,
    /// When it was asked, or its last bytes were all there.
    last: Arc<Moment>,
    /// Whether it is the first one of its answer.
    is_first: bool,
    running: Counted,
    late: Option<Counted>,
}

/// The attempts at one need: one, or two while it is hedged.
pub(super) struct Flight {
    inner: Arc<Inner>,
    ticket: Arc<Ticket>,
    lead: Option<Runner>,
    second: Option<Runner>,
}

enum Event {
    Item(bool, Attempt, Item, Duration),
    Fault(bool, Attempt, Fault),
    Promoted,
    Due,
}

impl Flight {
    pub(super) fn new(inner: Arc<Inner>, ticket: Arc<Ticket>) -> Self {
        if ticket.is_wanted() {
            inner.hedges.earn();
        }
        Self { inner, ticket, lead: None, second: None }
    }

    /// The next item of `need`: its page, or its first chunk. Waits as long as no member serves it.
    pub(super) async fn next(&mut self, need: &Need) -> Item {
        loop {
            if self.lead.is_none() {
                let member = self.inner.fleet.pick(need.items()).await;
                self.lead = Some(self.begin(member, need));
            }
            match self.event().await {
                Event::Item(is_second, attempt, item, took) => {
                    self.won(is_second, attempt, took);
                    return item;
                }
                Event::Fault(is_second, attempt, fault) => {
                    let lost = if is_second { self.second.take() } else { self.lead.take() };
                    drop(lost);
                    if !is_second {
                        self.lead = self.second.take();
                    }
                    self.inner.failed(&attempt.member, &fault);
                }
                Event::Promoted => self.inner.hedges.earn(),
                Event::Due => self.overdue(need),
            }
        }
    }

    /// A new lead: nothing of the need is there.
    fn begin(&self, member: Arc<Member>, need: &Need) -> Runner {
        if let Need::Chunks(chunks, _) = need {
            self.ticket.begins(chunks.start);
        }
        self.start(member, need)
    }

    fn start(&self, member: Arc<Member>, need: &Need) -> Runner {
        let last = Arc::new(Moment::new(self.inner.world.now()));
        let attempt = Attempt {
            inner: self.inner.clone(),
            member: member.clone(),
            need: need.clone(),
            ticket: self.ticket.clone(),
            answer: None,
            taking: None,
            beside: VecDeque::new(),
            last: last.clone(),
        };
        let running = member.running();
        Runner { member, step: Box::pin(attempt.next()), last, is_first: true, running, late: None }
    }

    /// One of the two has an item: the other is given up, and it goes on with what is left.
    fn won(&mut self, is_second: bool, attempt: Attempt, took: Duration) {
        let now = self.inner.world.now();
        let (winner, loser) =
            if is_second { (self.second.take(), self.lead.take()) } else { (self.lead.take(), self.second.take()) };
        if let Some(loser) = loser {
            let waited = now.saturating_sub(loser.last.get());
            loser.member.pace().gave_up(waited, now);
            if is_second && loser.member.was_overtaken() {
                self.inner.failed(&loser.member, &Fault::Slow(waited));
            }
        }
        let Some(Runner { member, last, is_first, running, .. }) = winner else { return };
        if is_first {
            member.pace().first(took, now);
        } else {
            member.pace().next(took, now);
        }
        if is_second {
            self.inner.counts.hedges_won.fetch_add(1, Ordering::Relaxed);
        }
        if attempt.is_done() {
            member.answered();
        } else {
            let step = Box::pin(attempt.next());
            self.lead = Some(Runner { member, step, last, is_first: false, running, late: None });
        }
    }

    /// What happens next.
    async fn event(&mut self) -> Event {
        let mut due = self.inner.world.sleep(self.patience());
        let ticket = self.ticket.clone();
        let mut promotion = pin!(ticket.promotion());
        poll_fn(|context| {
            for (is_second, runner) in [(false, &mut self.lead), (true, &mut self.second)] {
                if let Some(runner) = runner
                    && let Poll::Ready((attempt, result)) = runner.step.as_mut().poll(context)
                {
                    return Poll::Ready(match result {
                        Ok((item, took)) => Event::Item(is_second, attempt, item, took),
                        Err(fault) => Event::Fault(is_second, attempt, fault),
                    });
                }
            }
            if promotion.as_mut().poll(context).is_ready() {
                return Poll::Ready(Event::Promoted);
            }
            due.as_mut().poll(context).map(|()| Event::Due)
        })
        .await
    }

    /// How long to wait before it is asked whether the lead is overdue.
    fn patience(&self) -> Duration {
        let Some(lead) = &self.lead else { return LOOK_AGAIN };
        let waited = self.inner.world.since(lead.last.get());
        let limit = if self.ticket.is_wanted() { usual(&lead.member) } else { MOVE_UNWANTED_AFTER };
        limit.checked_sub(waited).filter(|left| !left.is_zero()).unwrap_or(LOOK_AGAIN)
    }

    /// The lead takes longer than usual: somebody else may do it better.
    fn overdue(&mut self, need: &Need) {
        let is_wanted = self.ticket.is_wanted();
        let Some(lead) = &mut self.lead else { return };
        let now = self.inner.world.now();
        let waited = now.saturating_sub(lead.last.get());
        if is_wanted && lead.late.is_none() {
            lead.late = Some(lead.member.late());
        }
        if let Some(second) = &mut self.second {
            // It is judged as the lead was: if both keep waiting, no third is asked.
            if now.saturating_sub(second.last.get()) >= usual(&second.member) && second.late.is_none() {
                second.late = Some(second.member.late());
            }
        }
        let anyway = is_wanted && waited >= MOVE_ANYWAY_AFTER;
        let fleet = &self.inner.fleet;
        let best = fleet.other(&lead.member);
        // A slow one is better than one that rests, or is about to be found dead. Not from slow to slow: a request that goes back and forth
        // never ends.
        let other = match lead.member.standing() {
            Standing::Slow => best,
            Standing::Good if !anyway => best,
            _ => best.or_else(|| fleet.any_other(&lead.member)),
        };
        let Some(other) = other else { return };
        let limit = if is_wanted { MOVE_AFTER } else { MOVE_UNWANTED_AFTER };
        let quicker = if anyway { QUICKER_ANYWAY } else { QUICKER };
        let is_resting = lead.member.standing() != Standing::Good;
        let expected = other.pace().expected().unwrap_or_default();
        if is_resting || (waited >= limit && waited > expected * quicker) {
            let member = lead.member.clone();
            member.pace().gave_up(waited, now);
            self.lead = match self.second.take() {
                Some(second) => Some(second),
                None => Some(self.begin(other, need)),
            };
            if !is_resting {
                self.inner.failed(&member, &Fault::Slow(waited));
            }
        } else if is_wanted && self.second.is_none() && !anyway && expected <= waited && self.inner.hedges.spend() {
            self.inner.counts.hedges.fetch_add(1, Ordering::Relaxed);
            self.second = Some(self.start(other, need));
        }
    }
}

/// The time after which a member is overdue.
fn usual(member: &Member) -> Duration {
    member.pace().percentile().map_or(HEDGE_UNKNOWN_AFTER, |time| time.max(HEDGE_AFTER))
}

impl Attempt {
    /// Whether all of its need is there.
    fn is_done(&self) -> bool {
        self.answer.is_none() && self.taking.is_none() && self.beside.is_empty()
    }

    async fn next(mut self) -> (Self, Outcome) {
        if self.beside.is_empty()
            && let Err(fault) = self.more().await
        {
            return (self, Err(fault));
        }
        let outcome = self.beside.pop_front().unwrap_or_else(|| Err(missing()));
        (self, outcome)
    }

    /// Brings the next items, one at least.
    async fn more(&mut self) -> Result<(), Fault> {
        let (start, length, size) = self.range()?;
        if self.answer.is_none() && self.taking.is_none() {
            let total = self.inner.verifier.header().file_length();
            self.answer = Some(self.member.get(start, length, Some(total)).await?);
        }
        let mut taking = self.take(size)?;
        let (first, took) = self.arrived((&mut taking).await)?;
        match self.need.clone() {
            Need::Page(index) => {
                let page = self.inner.verifier.verify_page(index, &first).map_err(Fault::Wrong)?;
                self.beside.push_back(Ok((Item::Page(Arc::new(page)), took)));
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
                self.beside.extend(items.into_iter().zip(times).map(|(item, took)| item.map(|item| (item, took))));
                // What came before it is whole all the same.
                self.beside.extend(fault.map(Err));
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
            let bytes = member.take_into(&mut answer, size, buffer).await;
            (answer, bytes)
        }))
    }

    /// They are there.
    fn arrived(&mut self, (answer, bytes): (Answer, Result<Vec<u8>, Fault>)) -> Result<Taken, Fault> {
        let bytes = bytes?;
        self.answer = Some(answer);
        let now = self.inner.world.now();
        let took = now.saturating_sub(self.last.get());
        self.last.set(now);
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

/// Chunks that one task fetches; those that it did not land when it is dropped are free for others.
pub(super) struct Run {
    pub(super) inner: Arc<Inner>,
    pub(super) class: Class,
    pub(super) ticket: Arc<Ticket>,
    pub(super) left: Range<u64>,
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.left.is_empty() {
            let mut cache = lock(&self.inner.cache);
            for chunk in self.left.clone() {
                cache.crash(chunk, &self.ticket);
            }
        }
    }
}

impl Run {
    /// Brings the run from the store, or from whoever serves it, and lands it chunk by chunk.
    pub(super) async fn fly(mut self) {
        let inner = self.inner.clone();
        let page = inner.page(inner.verifier.page_of_chunk(self.left.start)).await;
        while !self.left.is_empty() {
            if let Some((chunk, landed)) = self.stored(&page).await {
                self.lands(chunk, &landed);
                continue;
            }
            let end = self.missing();
            let mut flight = Flight::new(inner.clone(), self.ticket.clone());
            while self.left.start < end {
                let need = Need::Chunks(self.left.start..end, page.clone());
                if let Item::Chunk(chunk, landed) = flight.next(&need).await {
                    self.lands(chunk, &landed);
                }
            }
        }
    }
}
