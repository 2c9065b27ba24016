//! How busy members are with nodes. Each measures itself, decides whether it is busier than the others, and says so with its word of nodes that
//! are alive ([`super::alive`]); all order members for nodes by what was said, so they agree. It is in memory, and lost without harm.
//!
//! What is measured is how many answers to nodes were under way at once, on an average over the last half minute: requests, each until its
//! answer begins, and blocks of images and boot files, each until the connection has taken it. So it grows when many ask, and likewise when the
//! processors, the disk or the line make each wait; no line's speed has to be known.
//!
//! A member that is busy gets fewer new nodes and so becomes less busy. Three things keep that from going back and forth: the average, a
//! threshold for the way back that is lower, and a time for which either state is kept.

use moor_api::ids::MemberId;
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Hundredths of an answer. Much more than a member has; what others say is not taken for more.
type Load = u32;

/// From here on a member may be called busy: as many answers as two clients take that are sent as much as they can.
const MANY: Load = 400;
/// Below this none is.
const FEW: Load = 200;
/// More is not told.
const MOST: Load = 10_000_000;
/// Either state is kept for so long.
const KEEP: Duration = Duration::from_secs(30);
/// What was said longer ago says nothing: several times were missed.
const STALE: Duration = Duration::from_secs(30);
/// Members that are remembered: far more than a collective has.
const MAX_MEMBERS: usize = 256;

/// What a member says of itself. An earlier release says nothing, and passes over what it is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Word {
    /// Answers to nodes at once, in hundredths.
    #[serde(default)]
    pub(crate) load: Option<Load>,
    /// Whether it is busier than the others.
    #[serde(default)]
    pub(crate) busy: bool,
}

struct State {
    /// Time that all answers took up to now, when that was looked at, and what came of it.
    spent: Duration,
    at: Instant,
    load: Load,
    is_busy: bool,
    /// Since when.
    since: Option<Instant>,
    others: HashMap<MemberId, (Word, Instant)>,
}

/// How busy this member is, and what others said.
pub struct Busy(Mutex<State>);

impl Default for Busy {
    fn default() -> Self {
        let (spent, at, others) = (Duration::ZERO, Instant::now(), HashMap::new());
        Self(Mutex::new(State { spent, at, load: 0, is_busy: false, since: None, others }))
    }
}

/// The next average: half of it is of the last few seconds.
fn smoothed(load: Load, spent: Duration, elapsed: Duration) -> Load {
    let now = (spent.as_micros() * 100).checked_div(elapsed.as_micros()).unwrap_or(0);
    let now = Load::try_from(now).unwrap_or(MOST).min(MOST);
    Load::midpoint(load, now)
}

/// The load in the middle of all; of two, the lower one.
fn middle(own: Load, others: &[Load]) -> Load {
    let mut all: Vec<Load> = others.iter().copied().chain([own]).collect();
    all.sort_unstable();
    all[(all.len() - 1) / 2]
}

/// Whether a member with this load is busier than the others: than their mean, and than the middle of all, which at most half of them can be.
/// By the mean alone one that is idle would make all others busy, and nodes would go there from everywhere.
fn is_busier(was: bool, own: Load, others: &[Load]) -> bool {
    let Ok(count @ 1..) = u64::try_from(others.len()) else { return false };
    let (middle, mean) = (u64::from(middle(own, others)), others.iter().copied().map(u64::from).sum::<u64>() / count);
    let own = u64::from(own);
    let is_above = own * 4 >= middle * 5;
    is_above && if was { own >= FEW.into() && own * 4 >= mean * 5 } else { own >= MANY.into() && own >= mean * 2 }
}

impl Busy {
    fn state(&self) -> MutexGuard<'_, State> {
        // A thread that panicked here left it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at this member anew: since it was started, answers to nodes have taken `spent`. Returns what there is to tell the others.
    pub(super) fn measure(&self, spent: Duration, now: Instant) -> Word {
        let mut state = self.state();
        let elapsed = now.saturating_duration_since(state.at);
        state.load = smoothed(state.load, spent.saturating_sub(state.spent), elapsed);
        (state.spent, state.at) = (spent, now);
        state.others.retain(|_, (_, at)| now.saturating_duration_since(*at) < STALE);
        let others: Vec<Load> = state.others.values().filter_map(|(word, _)| word.load).collect();
        let may_change = state.since.is_none_or(|since| now.saturating_duration_since(since) >= KEEP);
        let is_busy = is_busier(state.is_busy, state.load, &others);
        if may_change && is_busy != state.is_busy {
            (state.is_busy, state.since) = (is_busy, Some(now));
            let than =
                if is_busy { "busier than the others: nodes are told to try them first" } else { "as busy as others" };
            tracing::info!("this member is {than}");
        }
        Word { load: Some(state.load), busy: state.is_busy }
    }

    /// Takes what another member says of itself.
    pub(super) fn told(&self, from: MemberId, word: Word, now: Instant) {
        let mut state = self.state();
        if word == Word::default() {
            // An earlier release: its load is not known.
            state.others.remove(&from);
        } else if state.others.len() < MAX_MEMBERS || state.others.contains_key(&from) {
            let load = word.load.map(|load| load.min(MOST));
            state.others.insert(from, (Word { load, ..word }, now));
        }
    }

    /// Members that said that they are busier than the others, this one (`own`) among them. What they said stays for a while, and of several moments:
    /// if more than half of those that are heard say so, it is those of the highest load.
    pub(crate) fn members(&self, own: MemberId, now: Instant) -> HashSet<MemberId> {
        let state = self.state();
        let is_heard = |(_, (_, at)): &(&MemberId, &(Word, Instant))| now.saturating_duration_since(*at) < STALE;
        let others = state.others.iter().filter(is_heard).map(|(member, (word, _))| (*member, *word));
        let this = (own, Word { load: Some(state.load), busy: state.is_busy });
        let mut all: Vec<(MemberId, Word)> = others.chain([this]).collect();
        let most = all.len() / 2;
        all.retain(|(_, word)| word.busy);
        all.sort_unstable_by_key(|(member, word)| (Reverse(word.load), *member));
        all.into_iter().take(most).map(|(member, _)| member).collect()
    }

    /// Answers to nodes at once, in hundredths, and whether that is more than others have.
    pub(crate) fn own(&self) -> (u32, bool) {
        let state = self.state();
        (state.load, state.is_busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a member looks.
    const STEP: Duration = Duration::from_secs(5);

    fn member(number: u8) -> MemberId {
        MemberId::from_bytes([number; 16])
    }

    #[test]
    fn a_member_is_busier_when_it_has_much_and_others_have_half_and_until_they_have_nearly_as_much() {
        for (was, own, others, expected) in [
            // Nobody to compare with.
            (false, 5000, &[][..], false),
            (true, 5000, &[], false),
            // It has little, whatever others have.
            (false, MANY - 1, &[0, 0], false),
            (false, MANY, &[0, 0], true),
            (true, FEW, &[0, 0], true),
            (true, FEW - 1, &[0, 0], false),
            // All have much.
            (false, 1000, &[1000, 1000], false),
            (false, 1000, &[501], false),
            (false, 1000, &[500], true),
            // One that is idle makes no others busy, but the one that has more than both.
            (false, 1000, &[0, 1000], false),
            (false, 1000, &[0, 801], false),
            (false, 1000, &[0, 800], true),
            (true, 1000, &[0, 801], false),
            (false, 1000, &[0, 0, 900], true),
            (false, 1000, &[0, 900, 900], false),
            (true, 1000, &[801], false),
            (true, 1000, &[800], true),
            (false, MOST, &[MOST, MOST], false),
        ] {
            assert_eq!(is_busier(was, own, others), expected, "{was} {own} {others:?}");
        }
    }

    #[test]
    fn at_most_half_are_busier_than_the_others_at_once() {
        let mut random = fastrand::Rng::with_seed(11);
        for _ in 0..10_000 {
            let loads: Vec<Load> = (0..random.usize(2..6)).map(|_| random.u32(0..2000)).collect();
            for was in [false, true] {
                let busy = (0..loads.len()).filter(|at| {
                    let mut others = loads.clone();
                    let own = others.remove(*at);
                    is_busier(was, own, &others)
                });
                assert!(busy.count() <= loads.len() / 2, "{loads:?}");
            }
        }
    }

    #[test]
    fn the_load_is_an_average_that_follows_within_half_a_minute() {
        let (mut load, mut loads) = (0, Vec::new());
        for step in 0..12 {
            load = smoothed(load, if step < 6 { STEP * 8 } else { Duration::ZERO }, STEP);
            loads.push(load);
        }
        assert_eq!(loads, [400, 600, 700, 750, 775, 787, 393, 196, 98, 49, 24, 12]);
        assert_eq!(smoothed(10, Duration::from_secs(1), Duration::ZERO), 5, "no time has passed");
        assert_eq!(smoothed(MOST, Duration::MAX, Duration::from_micros(1)), MOST);
    }

    /// A load that comes and goes all the time: a moment of it changes nothing, and what changes stays for a while.
    #[test]
    fn a_load_that_comes_and_goes_does_not_make_the_state_do_so() {
        for period in 1..20_u32 {
            let (busy, begin) = (Busy::default(), Instant::now());
            let (mut spent, mut changes, mut last) = (Duration::ZERO, Vec::new(), false);
            for step in 1..=240 {
                let now = begin + STEP * step;
                if step / period % 2 == 0 {
                    spent += STEP * 20;
                }
                busy.told(member(2), Word { load: Some(50), busy: false }, now);
                let word = busy.measure(spent, now);
                if word.busy != last {
                    changes.push(now);
                    last = word.busy;
                }
            }
            let apart = changes.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap_or(KEEP);
            assert!(apart >= KEEP, "every {period} steps: {apart:?}");
        }
        // One burst, and nothing.
        let (busy, begin) = (Busy::default(), Instant::now());
        busy.told(member(2), Word { load: Some(0), busy: false }, begin);
        assert!(!busy.measure(STEP * 7, begin + STEP).busy);
    }

    #[test]
    fn what_others_say_counts_for_a_while_and_is_bounded() {
        let (busy, now) = (Busy::default(), Instant::now());
        busy.told(member(2), Word { load: Some(900), busy: true }, now);
        busy.told(member(3), Word { load: Some(Load::MAX), busy: false }, now);
        assert_eq!(busy.members(member(1), now), [member(2)].into());
        assert_eq!(busy.state().others[&member(3)].0.load, Some(MOST));
        assert!(busy.members(member(1), now + STALE).is_empty());
        // More than half of four say so, each of another moment: the busiest two are.
        for (number, load) in [(3, 800), (4, 700)] {
            busy.told(member(number), Word { load: Some(load), busy: true }, now);
        }
        assert_eq!(busy.members(member(1), now), [member(2), member(3)].into());
        busy.told(member(4), Word { load: Some(800), busy: true }, now);
        busy.told(member(3), Word { load: Some(700), busy: true }, now);
        assert_eq!(busy.members(member(1), now), [member(2), member(4)].into());
        for number in [3, 4] {
            busy.told(member(number), Word::default(), now);
        }
        // It came back with an earlier release.
        busy.told(member(2), Word::default(), now);
        assert!(busy.members(member(1), now).is_empty());
        for number in 0..=u16::MAX {
            let mut bytes = [9; 16];
            bytes[..2].copy_from_slice(&number.to_be_bytes());
            busy.told(MemberId::from_bytes(bytes), Word { load: Some(1), busy: true }, now);
        }
        assert_eq!(busy.state().others.len(), MAX_MEMBERS);
        // Without word of others nobody is busier, and what was decided before is kept for its time only.
        let word = busy.measure(STEP * 1000, now + STALE);
        assert!(!word.busy && busy.state().others.is_empty());
    }
}
