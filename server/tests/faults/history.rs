//! What clients asked and were told, and whether one register could have told it: linearizability by the method of Wing and Gong with
//! Lowe's cache, as porcupine has it. Each node's value is a register of its own, so each is judged by itself.

use std::collections::{BTreeMap, HashSet};

/// What a client did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Act {
    /// Set the value; no value is written twice.
    Write(u64),
    /// Read it; 0 is what a register begins with.
    Read(u64),
}

/// One call that was answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    /// Which register.
    pub(crate) key: usize,
    pub(crate) act: Act,
    /// When it was sent and when it was answered, on one clock; `u64::MAX`: never, and it may have taken effect.
    pub(crate) sent: u64,
    pub(crate) answered: u64,
}

/// Says what is wrong, if no order of the calls explains the answers.
pub(crate) fn check(calls: &[Call]) -> Result<(), String> {
    let mut registers: BTreeMap<usize, Vec<Call>> = BTreeMap::new();
    for call in calls {
        registers.entry(call.key).or_default().push(*call);
    }
    for (key, calls) in registers {
        let calls = settle(calls);
        if let Some(at) = stuck(&calls) {
            return Err(format!("register {key}: no order of its {} calls explains {at:?}", calls.len()));
        }
    }
    Ok(())
}

/// A write that nobody knows the outcome of: when its value was read, it took effect before that was answered; when it was not, leaving
/// it out changes nothing that anybody was told.
fn settle(calls: Vec<Call>) -> Vec<Call> {
    let mut read: BTreeMap<u64, u64> = BTreeMap::new();
    for call in &calls {
        if let Act::Read(value) = call.act {
            let first = read.entry(value).or_insert(call.answered);
            *first = call.answered.min(*first);
        }
    }
    let settled = calls.into_iter().filter_map(|mut call| {
        if let (Act::Write(value), u64::MAX) = (call.act, call.answered) {
            call.answered = *read.get(&value)?;
            // A read that was answered before the write was sent stays unexplained.
            call.answered = call.answered.max(call.sent);
        }
        Some(call)
    });
    settled.collect()
}

/// The calls as marks in time: `(call, is its end)`, with the links that remove and restore an entry.
struct Marks {
    entries: Vec<(usize, bool)>,
    next: Vec<usize>,
    before: Vec<usize>,
    /// Where each call's marks are.
    at: Vec<[usize; 2]>,
}

impl Marks {
    /// Entry 0 is the head.
    fn new(calls: &[Call]) -> Self {
        let mut times: Vec<(u64, bool, usize)> = Vec::new();
        for (index, call) in calls.iter().enumerate() {
            // At the same moment begins come before ends: such calls may be in any order.
            times.push((call.sent, false, index));
            times.push((call.answered, true, index));
        }
        times.sort_unstable();
        let count = times.len() + 1;
        let mut at = vec![[0; 2]; calls.len()];
        let mut entries = vec![(usize::MAX, true)];
        for (place, (_, is_end, call)) in times.into_iter().enumerate() {
            at[call][usize::from(is_end)] = place + 1;
            entries.push((call, is_end));
        }
        Self { entries, next: (1..=count).collect(), before: (0..count).map(|at| at.saturating_sub(1)).collect(), at }
    }

    fn lift(&mut self, call: usize) {
        for mark in self.at[call] {
            let (before, next) = (self.before[mark], self.next[mark]);
            self.next[before] = next;
            if next < self.entries.len() {
                self.before[next] = before;
            }
        }
    }

    fn restore(&mut self, call: usize) {
        for mark in self.at[call].into_iter().rev() {
            let (before, next) = (self.before[mark], self.next[mark]);
            self.next[before] = mark;
            if next < self.entries.len() {
                self.before[next] = mark;
            }
        }
    }
}

/// The call that could not be placed when the search was deepest; none: all have a place.
fn stuck(calls: &[Call]) -> Option<Call> {
    let mut marks = Marks::new(calls);
    let (mut state, mut placed) = (0_u64, vec![0_u64; calls.len().div_ceil(64)]);
    let mut order: Vec<(usize, u64)> = Vec::new();
    let mut seen: HashSet<(Vec<u64>, u64)> = HashSet::new();
    let mut deepest = (0, None);
    let mut at = marks.next[0];
    while marks.next[0] < marks.entries.len() {
        let (call, is_end) = marks.entries[at];
        if is_end {
            // Nothing that may come first explains the rest: take the last choice back.
            if order.len() >= deepest.0 {
                deepest = (order.len(), Some(calls[call]));
            }
            let Some((last, old)) = order.pop() else { return deepest.1 };
            state = old;
            placed[last / 64] &= !(1 << (last % 64));
            marks.restore(last);
            at = marks.next[marks.at[last][0]];
            continue;
        }
        let after = match calls[call].act {
            Act::Write(value) => Some(value),
            Act::Read(value) => (value == state).then_some(state),
        };
        if let Some(after) = after {
            placed[call / 64] |= 1 << (call % 64);
            if seen.insert((placed.clone(), after)) {
                order.push((call, state));
                state = after;
                marks.lift(call);
                at = marks.next[0];
                continue;
            }
            placed[call / 64] &= !(1 << (call % 64));
        }
        at = marks.next[at];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::Act::{Read, Write};
    use super::*;

    fn history(list: &[(Act, u64, u64)]) -> Vec<Call> {
        list.iter().map(|(act, sent, answered)| Call { key: 0, act: *act, sent: *sent, answered: *answered }).collect()
    }

    const NEVER: u64 = u64::MAX;

    #[test]
    fn what_one_register_can_say_is_right() {
        for good in [
            vec![],
            vec![(Read(0), 0, 1), (Write(1), 2, 3), (Read(1), 4, 5)],
            // Side by side: either order.
            vec![(Write(1), 0, 10), (Read(0), 1, 2), (Read(1), 3, 4)],
            vec![(Write(1), 0, 10), (Write(2), 0, 10), (Read(2), 11, 12)],
            vec![(Write(1), 0, 10), (Write(2), 0, 10), (Read(2), 1, 9), (Read(1), 11, 12)],
            // It took effect late, or never.
            vec![(Write(1), 0, NEVER), (Read(0), 5, 6), (Read(1), 7, 8)],
            vec![(Write(1), 0, NEVER), (Write(2), 1, 2), (Read(2), 5, 6)],
            vec![(Write(1), 0, NEVER), (Write(2), 1, 2), (Read(2), 5, 6), (Read(1), 7, 8)],
        ] {
            assert_eq!(check(&history(&good)), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn what_it_cannot_say_is_found() {
        for bad in [
            // A write that is lost.
            vec![(Write(1), 0, 1), (Read(0), 2, 3)],
            // A stale read.
            vec![(Write(1), 0, 1), (Write(2), 2, 3), (Read(1), 4, 5)],
            // A value from nowhere, and one before it was written.
            vec![(Read(7), 0, 1)],
            vec![(Read(1), 0, 1), (Write(1), 2, 3)],
            vec![(Read(1), 0, 1), (Write(1), 2, NEVER)],
            // Back and forth.
            vec![(Write(1), 0, 10), (Read(1), 1, 2), (Read(0), 3, 4)],
            vec![(Write(1), 0, NEVER), (Write(2), 1, 2), (Read(1), 5, 6), (Read(2), 7, 8)],
            vec![(Write(1), 0, 10), (Write(2), 0, 10), (Read(1), 11, 12), (Read(2), 13, 14)],
        ] {
            assert!(check(&history(&bad)).is_err(), "{bad:?}");
        }
    }

    /// Histories of a real register pass, also long ones with many clients; with one answer changed they do not.
    #[test]
    fn long_histories_are_judged() {
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..8 {
            let (mut value, mut written, mut calls) = (0, 0, Vec::new());
            for step in 0..2000_u64 {
                // Each takes effect at `at`, and is under way for a while around that.
                let at = step * 10;
                let (sent, answered) = (at.saturating_sub(random.u64(0..80)), at + random.u64(0..80));
                let act = if random.bool() {
                    written += 1;
                    value = written;
                    Write(value)
                } else {
                    Read(value)
                };
                let unknown = matches!(act, Write(value) if value > 1) && random.u8(0..20) == 0;
                calls.push(Call { key: 0, act, sent, answered: if unknown { NEVER } else { answered } });
            }
            assert_eq!(check(&calls), Ok(()), "round {round}");
            let late = calls.iter().rposition(|call| matches!(call.act, Read(value) if value > 1)).unwrap();
            calls[late].act = Read(1);
            assert!(check(&calls).is_err(), "round {round}");
        }
    }
}
