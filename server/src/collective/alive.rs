//! Which nodes are alive. A node speaks to one member, and each member tells the others of whom it has heard, in batches, and with them how busy
//! it is itself ([`super::busy`]). It is in memory and never in the log: it is worth no write. What is lost on its way comes again with the node's
//! next heartbeat.

use crate::state::Member;
use futures_util::future::join_all;
use moor_api::ids::NodeId;
use moor_api::problem::{Code, Problem};
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The path of the call.
pub(super) const PATH: &str = "/member/v1/alive";
/// Others are told this often.
const TELL: Duration = Duration::from_secs(5);
/// A batch is taken within this time.
const ANSWER: Duration = Duration::from_secs(5);
/// Nodes of one batch.
const MAX_BATCH: usize = 8192;
/// Nodes that are remembered: far more than there are in any collective.
const MAX_NODES: usize = 1 << 18;

/// A node, and how many seconds ago it was heard of. No time of a clock: members' clocks differ.
type Heard = (NodeId, u64);

#[derive(Default)]
struct Known {
    last: HashMap<NodeId, Instant>,
    /// Those that this member has heard of itself since it told the others.
    news: HashSet<NodeId>,
}

/// When nodes were last heard of, by whichever member.
#[derive(Default)]
pub struct Heartbeats(Mutex<Known>);

impl Heartbeats {
    fn known(&self) -> MutexGuard<'_, Known> {
        // A thread that panicked here left it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This member has heard of a node.
    pub(crate) fn note(&self, node: NodeId) {
        let mut known = self.known();
        if hear(&mut known.last, node, Instant::now()) {
            known.news.insert(node);
        }
    }

    /// Seconds since any member has heard of it; `None` when none has since this member was started.
    #[must_use]
    pub fn age(&self, node: NodeId) -> Option<u64> {
        self.known().last.get(&node).map(|last| last.elapsed().as_secs())
    }

    /// What there is to tell the others; it is news once.
    fn news(&self) -> Vec<Heard> {
        let mut known = self.known();
        let news = std::mem::take(&mut known.news);
        news.into_iter().filter_map(|node| Some((node, known.last.get(&node)?.elapsed().as_secs()))).collect()
    }

    /// Takes what another member tells.
    ///
    /// # Errors
    /// They are more than one batch has.
    pub(super) fn told(&self, batch: Vec<Heard>) -> Result<(), Problem> {
        if batch.len() > MAX_BATCH {
            return Err(Problem::new(Code::BadRequest, format!("more than {MAX_BATCH} nodes at a time")));
        }
        let (mut known, now) = (self.known(), Instant::now());
        for (node, age) in batch {
            // Longer ago than this machine runs is no news.
            if let Some(at) = now.checked_sub(Duration::from_secs(age)) {
                hear(&mut known.last, node, at);
            }
        }
        Ok(())
    }
}

/// What is known already may be later. Returns whether there is room for it.
fn hear(last: &mut HashMap<NodeId, Instant>, node: NodeId, at: Instant) -> bool {
    if last.len() >= MAX_NODES && !last.contains_key(&node) {
        return false;
    }
    last.entry(node).and_modify(|known| *known = at.max(*known)).or_insert(at);
    true
}

/// Tells the other members now and then. Goes on for ever.
pub(super) async fn tell(member: &Member) {
    loop {
        tokio::time::sleep(TELL).await;
        let word = member.busy.measure(member.requests.spent_on_nodes() + member.shares.spent(), Instant::now());
        // In the query, which an earlier release does not look at.
        let path = format!("{PATH}?load={}&busy={}", word.load.unwrap_or(0), word.busy);
        let (news, others) = (member.heartbeats.news(), member.others());
        let batches = news.chunks(MAX_BATCH).chain(news.is_empty().then_some(&[][..]));
        for batch in batches {
            let Ok(body) = serde_json::to_vec(batch) else { continue };
            // One that is not reached, or does not know the call yet, hears of them later.
            join_all(others.iter().map(|peer| member.calls.post::<()>(peer, &path, body.clone(), ANSWER))).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_member_heard_is_told_once_and_what_it_was_told_not_at_all() {
        let (own, other, never) = (NodeId::random(), NodeId::random(), NodeId::random());
        let heartbeats = Heartbeats::default();
        assert_eq!(heartbeats.news(), []);
        heartbeats.note(own);
        heartbeats.told(vec![(other, 3)]).unwrap();
        assert_eq!(heartbeats.news(), [(own, 0)]);
        assert_eq!(heartbeats.news(), []);
        assert_eq!((heartbeats.age(own), heartbeats.age(other), heartbeats.age(never)), (Some(0), Some(3), None));
    }

    #[test]
    fn the_latest_counts_whoever_heard_it() {
        let node = NodeId::random();
        let heartbeats = Heartbeats::default();
        for (told, age) in [(9, 9), (4, 4), (7, 4)] {
            heartbeats.told(vec![(node, told)]).unwrap();
            assert_eq!(heartbeats.age(node), Some(age), "{told} s ago");
        }
        heartbeats.note(node);
        heartbeats.told(vec![(node, 2), (node, u64::MAX)]).unwrap();
        assert_eq!(heartbeats.age(node), Some(0));
    }

    #[test]
    fn a_batch_and_what_is_remembered_are_bounded() {
        let heartbeats = Heartbeats::default();
        let batch = |count: usize| (0..count).map(|_| (NodeId::random(), 0)).collect::<Vec<_>>();
        let refused = heartbeats.told(batch(MAX_BATCH + 1)).unwrap_err();
        assert!(refused.detail.contains("more than 8192 nodes"), "{refused}");
        let known = NodeId::random();
        heartbeats.note(known);
        for _ in 0..=MAX_NODES / MAX_BATCH {
            heartbeats.told(batch(MAX_BATCH)).unwrap();
        }
        assert_eq!(heartbeats.known().last.len(), MAX_NODES);
        let late = NodeId::random();
        heartbeats.note(late);
        heartbeats.note(known);
        assert_eq!((heartbeats.age(late), heartbeats.age(known)), (None, Some(0)));
    }
}
