//! All members together: which one is asked next, who rests, and what is said when none answers.

use super::fault::Fault;
use super::member::{Member, Standing};
use super::pace::STALE;
use super::slots::CONNECTIONS;
use super::world::{World, within};
use crate::kmsg::ASIDE;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Notify;

/// An outage that is over by then is not named: a server that is started again is away for a second, for each of its nodes.
const SAY_AFTER: Duration = Duration::from_secs(2);
/// One that goes on is named on the console again each time that this is over, and then its end is as well. One of a minute, until the last server is
/// tried again after it, is named there once.
const SAY_EVERY: Duration = Duration::from_secs(90);
/// How long an outage is waited out while the machine shuts down.
const GIVES_UP: Duration = Duration::from_secs(30);
/// Another member has to be so many times better before requests go there: connections are warm where they are.
const CLEARLY: u32 = 3;
const CLEARLY_OF: u32 = 2;
/// Requests of one member that run side by side before one more costs a multiple of the time.
const SIDE_BY_SIDE: u32 = 4;
/// One request in so many goes to another member, if nothing is known against it: else a better one would never be found.
const EXPLORE: u64 = 32;

pub(super) struct Fleet {
    members: RwLock<Arc<[Arc<Member>]>>,
    /// What members sent that are none any more.
    earlier_bytes: AtomicU64,
    world: Arc<dyn World>,
    /// The member that is asked until another is clearly better. Each node begins with its own, so that nodes spread.
    current: AtomicUsize,
    /// How many members can be asked.
    usable: AtomicUsize,
    /// Since when the machine shuts down and no member can be asked. Held while members are counted: an older count must not take the place of a newer
    /// one.
    hopeless: Mutex<Option<Duration>>,
    changed: Notify,
    /// Whether the machine shuts down.
    is_ending: AtomicBool,
}

impl Fleet {
    pub(super) fn new(members: Vec<Arc<Member>>, world: Arc<dyn World>) -> Self {
        let first = index(world.random(), members.len());
        let usable = AtomicUsize::new(members.len());
        Self {
            members: RwLock::new(members.into()),
            earlier_bytes: AtomicU64::new(0),
            world,
            current: AtomicUsize::new(first),
            usable,
            hopeless: Mutex::default(),
            changed: Notify::new(),
            is_ending: AtomicBool::new(false),
        }
    }

    /// The members as they are now; the list may be replaced at any time.
    pub(super) fn members(&self) -> Arc<[Arc<Member>]> {
        self.members.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on these are the members. Requests to others move to one of them.
    pub(super) fn replace(&self, members: Vec<Arc<Member>>) {
        let is_kept = |member: &Arc<Member>| members.iter().any(|kept| Arc::ptr_eq(kept, member));
        let before = self.members();
        let gone: Vec<_> = before.iter().filter(|member| !is_kept(member)).cloned().collect();
        *self.members.write().unwrap_or_else(PoisonError::into_inner) = members.into();
        for member in gone {
            self.earlier_bytes.fetch_add(member.retire(), Ordering::Relaxed);
        }
        self.recount();
    }

    /// What members sent that are none any more.
    pub(super) fn earlier_bytes(&self) -> u64 {
        self.earlier_bytes.load(Ordering::Relaxed)
    }

    /// How many requests the busiest member is asked side by side just now.
    pub(super) fn side_by_side(&self) -> u32 {
        self.members().iter().map(|member| member.side_by_side()).min().unwrap_or(CONNECTIONS)
    }

    /// Whether no member can be asked.
    pub(super) fn is_down(&self) -> bool {
        self.usable.load(Ordering::Relaxed) == 0
    }

    /// Counts the usable members again, after one of them changed, and tells those who wait for one.
    pub(super) fn recount(&self) {
        let is_usable = |member: &&Arc<Member>| matches!(member.standing(), Standing::Good | Standing::Slow);
        {
            let mut hopeless = self.hopeless();
            self.usable.store(self.members().iter().filter(is_usable).count(), Ordering::Relaxed);
            self.look_for_hope(&mut hopeless);
        }
        self.changed.notify_waiters();
    }

    fn hopeless(&self) -> MutexGuard<'_, Option<Duration>> {
        self.hopeless.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is hopeless now. Since when stays as it is for as long as it is so, whoever reads meanwhile.
    fn look_for_hope(&self, hopeless: &mut Option<Duration>) {
        *hopeless = if self.is_ending.load(Ordering::Relaxed) && self.is_down() {
            hopeless.or_else(|| Some(self.world.now()))
        } else {
            None
        };
    }

    /// The member to ask for so many chunks. Waits for one as long as it takes.
    pub(super) async fn pick(&self, chunks: u64) -> Arc<Member> {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            if let Some(member) = self.choose(chunks) {
                return member;
            }
            changed.await;
        }
    }

    /// The current member, unless one of the others, drawn at random, is clearly better. Where none is good, the least slow.
    fn choose(&self, chunks: u64) -> Option<Arc<Member>> {
        let members = self.members();
        let standing = |wanted: Standing| -> Vec<usize> {
            (0..members.len()).filter(|index| members[*index].standing() == wanted).collect()
        };
        let mut candidates = standing(Standing::Good);
        if candidates.is_empty() {
            let least = standing(Standing::Slow).into_iter().min_by_key(|index| members[*index].pace().expected())?;
            return Some(members[least].clone());
        }
        let random = self.world.random();
        let current = self.current.load(Ordering::Relaxed);
        let current = if let Some(at) = candidates.iter().position(|index| *index == current) {
            candidates.swap_remove(at)
        } else {
            let next = candidates.swap_remove(index(random >> 32, candidates.len()));
            self.current.store(next, Ordering::Relaxed);
            next
        };
        let mut chosen = current;
        if !candidates.is_empty() {
            let other = candidates[index(random >> 16, candidates.len())];
            let (time, other_time) = (
                self.time(&members[current], &members[current], chunks),
                self.time(&members[other], &members[current], chunks),
            );
            let is_clear =
                |other: Duration, this: Duration| other.saturating_mul(CLEARLY) < this.saturating_mul(CLEARLY_OF);
            let is_tried = random.is_multiple_of(EXPLORE) && other_time <= time.saturating_mul(CLEARLY);
            if is_clear(other_time, time) {
                self.current.store(other, Ordering::Relaxed);
                chosen = other;
            } else if is_tried || is_clear(loaded(&members[other], other_time), loaded(&members[current], time)) {
                // Not for good: the two share a load, or the other is looked at once.
                chosen = other;
            }
        }
        Some(members[chosen].clone())
    }

    /// The time that an answer of so many chunks takes. What is not known lately is thought to be as the current member's.
    fn time(&self, member: &Arc<Member>, current: &Arc<Member>, chunks: u64) -> Duration {
        let known = |member: &Arc<Member>| {
            let pace = member.pace();
            pace.whole(chunks).filter(|_| Arc::ptr_eq(member, current) || self.world.since(pace.measured()) < STALE)
        };
        known(member).or_else(|| known(current)).unwrap_or(Duration::from_millis(1))
    }

    /// The best good member but `not`, if there is one that keeps nobody waiting: where all do, asking more only makes it worse.
    pub(super) fn other(&self, not: &Arc<Member>) -> Option<Arc<Member>> {
        let members = self.members();
        let others = members.iter().filter(|member| !Arc::ptr_eq(member, not));
        let ready = others.filter(|member| member.standing() == Standing::Good && !member.is_late());
        ready.min_by_key(|member| member.pace().expected().unwrap_or_default()).cloned()
    }

    /// The best member but `not` that answers at all: also one that keeps others waiting, or else one that is slow.
    pub(super) fn any_other(&self, not: &Arc<Member>) -> Option<Arc<Member>> {
        let members = self.members();
        let others = members.iter().filter(|member| !Arc::ptr_eq(member, not));
        let answer = others.filter(|member| matches!(member.standing(), Standing::Good | Standing::Slow));
        answer
            .min_by_key(|member| (member.standing() == Standing::Slow, member.pace().expected().unwrap_or_default()))
            .cloned()
    }

    /// The time in which the quickest other good member answers.
    pub(super) fn others_expected(&self, not: &Arc<Member>) -> Option<Duration> {
        let members = self.members();
        let others = members.iter().filter(|member| !Arc::ptr_eq(member, not));
        others.filter(|member| member.standing() == Standing::Good).filter_map(|member| member.pace().expected()).min()
    }

    /// Says on the console that no member answers: after 2 s, because somebody sits before a machine that stands still, and every 90 s. The end of a
    /// long one is said as loudly, that of a short one in the log. Runs as long as the reader.
    pub(super) async fn watch_outages(self: Arc<Self>) {
        loop {
            self.until(Self::is_down).await;
            let since = self.world.now();
            let lasts = |fleet: &Self| fleet.world.since(since).as_secs();
            if within(&*self.world, SAY_AFTER, self.until(|fleet| !fleet.is_down())).await.is_some() {
                continue;
            }
            let mut reasons = self.reasons();
            tracing::error!("no server of the image answers; programs wait until one does: {reasons}");
            let mut is_long = false;
            while within(&*self.world, SAY_EVERY, self.until(|fleet| !fleet.is_down())).await.is_none() {
                reasons = self.reasons();
                is_long = true;
                let seconds = lasts(&self);
                tracing::error!(
                    "no server of the image answers since {seconds} s; programs wait until one does: {reasons}"
                );
            }
            let seconds = lasts(&self);
            if is_long {
                tracing::error!("a server of the image answers again; none did for {seconds} s: {reasons}");
            } else {
                tracing::warn!(target: ASIDE, "a server of the image answers again; none did for {seconds} s: {reasons}");
            }
        }
    }

    /// Whether the machine shuts down.
    pub(super) fn end(&self, ends: bool) {
        {
            let mut hopeless = self.hopeless();
            self.is_ending.store(ends, Ordering::Relaxed);
            self.look_for_hope(&mut hopeless);
        }
        self.changed.notify_waiters();
    }

    /// Returns when the machine shuts down and no member has answered for so long that none will: that is waited for once, and not by each of the reads
    /// that a shutdown makes one after the other.
    pub(super) async fn given_up(&self) {
        loop {
            self.until(|fleet| fleet.hopeless().is_some()).await;
            let Some(since) = *self.hopeless() else { continue };
            let left = GIVES_UP.saturating_sub(self.world.since(since));
            if within(&*self.world, left, self.until(|fleet| *fleet.hopeless() != Some(since))).await.is_none() {
                return;
            }
        }
    }

    async fn until(&self, ready: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if ready(self) {
                return;
            }
            changed.await;
        }
    }

    fn reasons(&self) -> String {
        let reasons: Vec<_> = self
            .members()
            .iter()
            .map(|member| format!("{}: {}", member.url(), member.last_fault().unwrap_or_else(|| "resting".into())))
            .collect();
        reasons.join("; ")
    }

    /// Notes a fault; returns whether the member was good until now, and somebody has to bring it back.
    pub(super) fn failed(&self, member: &Member, fault: &Fault, is_trial: bool) -> bool {
        // Both at once: where it came back in between, nobody would bring it back any more.
        let (before, now) = member.failed(fault, is_trial);
        if member.is_retired() {
            return false;
        }
        self.recount();
        match now {
            Standing::Excluded if before != Standing::Excluded => {
                tracing::error!("{} is excluded, it served wrong bytes twice: {fault}", member.url());
            }
            // Where it was the last one, the outage is told.
            _ if before == Standing::Good => {
                tracing::warn!(target: ASIDE, "{} fails and rests: {fault}", member.url());
            }
            _ => tracing::debug!("{} still fails: {fault}", member.url()),
        }
        before == Standing::Good
    }

    /// A verified read has shown that a member is good again.
    pub(super) fn passed(&self, member: &Member) {
        if member.passed() {
            tracing::info!(target: ASIDE, "{} is back, a verified read succeeded", member.url());
            self.recount();
        }
    }
}

/// The time that an answer takes, with what the member has to do already.
fn loaded(member: &Member, time: Duration) -> Duration {
    let side_by_side = SIDE_BY_SIDE.min(member.side_by_side());
    time.saturating_mul(side_by_side + member.in_flight()) / side_by_side
}

fn index(random: u64, length: usize) -> usize {
    usize::try_from(random % (length.max(1) as u64)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::member::tests::{Chance, member};
    use super::*;
    use std::sync::Barrier;

    fn fleet(count: usize) -> (Fleet, Vec<Arc<Member>>) {
        let members: Vec<_> = (0..count).map(|_| Arc::new(member())).collect();
        (Fleet::new(members.clone(), Arc::new(Chance)), members)
    }

    fn fault() -> Fault {
        Fault::Connect("refused".into())
    }

    /// A request that was running fails while the member comes back: somebody has to bring it back once more.
    #[test]
    fn each_rest_of_a_member_is_told_to_one_who_ends_it() {
        const TIMES: usize = 300_000;
        let (fleet, members) = fleet(1);
        let (told, ended) = std::thread::scope(|scope| {
            let failing = scope.spawn(|| (0..TIMES).filter(|_| fleet.failed(&members[0], &fault(), false)).count());
            let passing = scope.spawn(|| (0..TIMES).filter(|_| members[0].passed()).count());
            (failing.join().unwrap(), passing.join().unwrap())
        });
        let rests = usize::from(members[0].standing() != Standing::Good);
        assert_eq!(told, ended + rests, "of {told} rests");
        assert!(ended > 0);
    }

    #[test]
    fn members_are_counted_right_whoever_counts_beside() {
        const ROUNDS: usize = 50_000;
        let (fleet, members) = fleet(2);
        let (turn, wrong) = (Barrier::new(2), AtomicUsize::new(0));
        let flap = |own: usize| {
            for round in 0..ROUNDS {
                turn.wait();
                if round % 2 == own {
                    fleet.failed(&members[own], &fault(), true);
                } else {
                    fleet.passed(&members[own]);
                }
                turn.wait();
                // One of them fails in each round, and the other comes back.
                wrong.fetch_add(usize::from(fleet.usable.load(Ordering::Relaxed) != 1), Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| flap(0));
            scope.spawn(|| flap(1));
        });
        assert_eq!(wrong.into_inner(), 0);
    }
}
