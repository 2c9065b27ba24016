//! Fetching one thing, whatever the members do: a request goes to the best member; when it keeps somebody waiting it goes to another one
//! too (a *hedge*), or moves there. What verifies first counts, and the other is given up.

use super::attempt::{Attempt, Item, Need, Progress, Step};
use super::class::{Class, Ticket};
use super::fault::Fault;
use super::member::{Member, Standing};
use super::slots::Counted;
use super::{Inner, lock};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

/// No request is sent twice sooner.
const HEDGE_AFTER: Duration = Duration::from_millis(10);
/// The same while nothing is known of a member yet.
const HEDGE_UNKNOWN_AFTER: Duration = Duration::from_millis(100);
/// A request that somebody waits for moves to another member after so long, if that one is clearly quicker.
const MOVE_AFTER: Duration = Duration::from_millis(400);
/// One that was moved already has lost that time, and the next may fail as well: it moves on after half of it, and so on down to this, also to one
/// that is not as much quicker.
const MOVE_ON_AFTER: Duration = Duration::from_millis(100);
/// So many times as long as usual takes an answer on a new connection: TCP, TLS, the request.
const NEW_CONNECTION: u32 = 3;
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

/// An attempt at the next item. Dropped, it gives its request up.
struct Runner {
    member: Arc<Member>,
    step: Step,
    progress: Arc<Progress>,
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
    /// How many members its present item was with in vain, while somebody waited.
    moves: u32,
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
        Self { inner, ticket, lead: None, second: None, moves: 0 }
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
                    if let Some(lost) = lost {
                        self.moved(self.inner.world.since(lost.progress.last.get()));
                    }
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
        let progress = Arc::new(Progress::new(self.inner.world.now()));
        let attempt =
            Attempt::new(self.inner.clone(), member.clone(), need.clone(), self.ticket.clone(), progress.clone());
        let running = member.running();
        Runner { member, step: Box::pin(attempt.next()), progress, is_first: true, running, late: None }
    }

    /// One of the two has an item: the other is given up, and it goes on with what is left.
    fn won(&mut self, is_second: bool, attempt: Attempt, took: Duration) {
        let now = self.inner.world.now();
        self.moves = 0;
        let (winner, loser) =
            if is_second { (self.second.take(), self.lead.take()) } else { (self.lead.take(), self.second.take()) };
        if let Some(loser) = loser
            && loser.progress.is_asked()
        {
            let waited = now.saturating_sub(loser.progress.last.get());
            loser.member.pace().gave_up(waited, now);
            if is_second && loser.member.was_overtaken() {
                self.inner.failed(&loser.member, &Fault::Slow(waited));
            }
        }
        let Some(Runner { member, progress, is_first, running, .. }) = winner else { return };
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
            self.lead = Some(Runner { member, step, progress, is_first: false, running, late: None });
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
        let waited = self.inner.world.since(lead.progress.last.get());
        // A member that was given up now and then has a percentile of a second: no reason to leave others out for so long.
        let limit = self.move_after(&lead.member);
        let limit = if self.ticket.is_wanted() { usual(&lead.member).min(limit) } else { limit };
        limit.checked_sub(waited).filter(|left| !left.is_zero()).unwrap_or(LOOK_AGAIN)
    }

    /// When an item moves on from this member. If somebody waits, each member is tried once in less time than usual, a far one as long as an answer on
    /// a new connection takes; if none of them was quick, all are slow, and need their time.
    fn move_after(&self, lead: &Member) -> Duration {
        if !self.ticket.is_wanted() {
            return MOVE_UNWANTED_AFTER;
        }
        if self.moves == 0 || self.moves as usize + 1 >= self.inner.fleet.members().len() {
            return MOVE_AFTER;
        }
        let usual = lead.pace().expected_lately(self.inner.world.now());
        let on_a_new_connection = usual.map_or(MOVE_AFTER / 2, |usual| usual * NEW_CONNECTION);
        (MOVE_AFTER / (1 << self.moves.min(8))).max(MOVE_ON_AFTER).max(on_a_new_connection).min(MOVE_AFTER)
    }

    /// An item that somebody waited for was with a member in vain for so long.
    fn moved(&mut self, waited: Duration) {
        self.moves += u32::from(waited >= MOVE_ON_AFTER && self.ticket.is_wanted());
    }

    /// The lead takes longer than usual: somebody else may do it better.
    fn overdue(&mut self, need: &Need) {
        let is_wanted = self.ticket.is_wanted();
        let Some(limit) = self.lead.as_ref().map(|lead| self.move_after(&lead.member)) else { return };
        let Some(lead) = &mut self.lead else { return };
        let now = self.inner.world.now();
        let waited = now.saturating_sub(lead.progress.last.get());
        let is_late = is_wanted && waited >= usual(&lead.member);
        if is_late && lead.late.is_none() {
            lead.late = Some(lead.member.late());
        }
        if let Some(second) = &mut self.second {
            // It is judged as the lead was: if both keep waiting, no third is asked.
            if now.saturating_sub(second.progress.last.get()) >= usual(&second.member) && second.late.is_none() {
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
        let quicker = if anyway || self.moves > 0 { QUICKER_ANYWAY } else { QUICKER };
        let is_resting = lead.member.standing() != Standing::Good;
        let expected = other.pace().expected_lately(now).unwrap_or_default();
        let (member, is_asked) = (lead.member.clone(), lead.progress.is_asked());
        // Who waits its turn there tries each member once: whoever leaves one line after the other gets nowhere.
        let may_move = is_asked || (is_wanted && (self.moves as usize) < fleet.members().len());
        if is_resting || (may_move && waited >= limit && waited > expected * quicker) {
            // It is none of the member's doing before it is asked.
            if is_asked {
                member.pace().gave_up(waited, now);
            }
            self.lead = match self.second.take() {
                Some(second) => Some(second),
                None => Some(self.begin(other, need)),
            };
            if !is_resting {
                self.moved(waited);
                if is_asked {
                    self.inner.failed(&member, &Fault::Slow(waited));
                }
            }
        } else if is_late && self.second.is_none() && !anyway && expected <= waited && self.inner.hedges.spend() {
            self.inner.counts.hedges.fetch_add(1, Ordering::Relaxed);
            self.second = Some(self.start(other, need));
        }
    }
}

/// The time after which a member is overdue.
fn usual(member: &Member) -> Duration {
    member.pace().percentile().map_or(HEDGE_UNKNOWN_AFTER, |time| time.max(HEDGE_AFTER))
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
