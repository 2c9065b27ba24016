//! What was refused, kept for `moor why`: every refusal is found under its node, or under the UUID, the hardware addresses or the IP
//! address of a machine that nobody knows.

use crate::http::{Peer, clean};
use crate::state::{Member, now_ms};
use crate::store::Command;
use moor_api::admin::Refusal;
use moor_api::ids::{HwAddr, NodeId};
use moor_api::problem::{Code, Problem};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The same refusal of the same subject is written this often at most; those in between are counted.
const EVERY: Duration = Duration::from_secs(2);
/// Kinds of refusals that are counted at a time.
const MAX_KINDS: usize = 10_000;

/// Whose refusal it is.
#[derive(Debug, Clone, Default)]
pub struct Subject {
    /// The nodes it belongs to.
    pub nodes: Vec<NodeId>,
    /// What the machine said of itself.
    pub uuid: Option<Uuid>,
    /// Its hardware addresses.
    pub macs: Vec<HwAddr>,
}

impl Subject {
    /// A node.
    #[must_use]
    pub fn node(id: NodeId) -> Self {
        Self { nodes: vec![id], ..Self::default() }
    }

    /// Under which names it is found when it belongs to no node.
    fn strangers(&self, peer: &Peer) -> Vec<String> {
        if !self.nodes.is_empty() {
            return Vec::new();
        }
        let mut out: Vec<String> = self.uuid.iter().map(Uuid::to_string).collect();
        // A machine has few interfaces; a hello that names many is not worth that many records.
        out.extend(self.macs.iter().take(8).map(HwAddr::to_string));
        if out.is_empty() {
            out.extend(peer.ip().map(|ip| ip.to_string()));
        }
        out
    }
}

/// Keeps a storm of equal refusals from becoming a storm of writes.
#[derive(Default)]
pub struct Throttle(Mutex<HashMap<Kind, Seen>>);

#[derive(PartialEq, Eq, Hash)]
struct Kind {
    subject: String,
    call: String,
    code: Code,
}

struct Seen {
    written: Instant,
    waiting: u64,
}

impl Throttle {
    /// How many refusals are to be written now; 0: none, this one was counted, or there are too many kinds at a time.
    fn count(&self, kind: Kind, now: Instant) -> u64 {
        // A thread that panicked here left at worst a count.
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= MAX_KINDS {
            seen.retain(|_, seen| now.duration_since(seen.written) < EVERY);
        }
        if let Some(seen) = seen.get_mut(&kind) {
            if now.duration_since(seen.written) < EVERY {
                seen.waiting += 1;
                return 0;
            }
            seen.written = now;
            return 1 + std::mem::take(&mut seen.waiting);
        }
        // So many kinds within so short a time are a flood: what is one kind too many is not written.
        if seen.len() >= MAX_KINDS {
            return 0;
        }
        seen.insert(kind, Seen { written: now, waiting: 0 });
        1
    }
}

/// The subject without nodes that there are not: an id is any number that a stranger likes, and each would be counted and kept apart.
fn known(member: &Member, subject: &Subject) -> Subject {
    let view = member.view();
    let exists = |id: &NodeId| view.as_ref().is_ok_and(|view| view.node(*id).is_ok_and(|node| node.is_some()));
    Subject { nodes: subject.nodes.iter().copied().filter(exists).collect(), ..subject.clone() }
}

/// Records a refusal. A fault of the member is none, and a failure to record is in the log: the answer goes out all the same.
pub async fn record(member: &Member, peer: &Peer, call: &str, subject: &Subject, problem: &Problem) {
    // Nor is that there is no majority, without which nothing could be written down.
    if matches!(problem.code, Code::Internal | Code::Other | Code::NoMajority) {
        return;
    }
    let subject = &known(member, subject);
    let strangers = subject.strangers(peer);
    let first = subject.nodes.first().map(NodeId::to_string).or_else(|| strangers.first().cloned()).unwrap_or_default();
    let kind = Kind { subject: first, call: call.to_owned(), code: problem.code };
    let count = member.refusals.count(kind, Instant::now());
    if count == 0 {
        return;
    }
    // A sentence may quote what the machine sent.
    let problem = Problem { detail: clean(&problem.detail, 1000), ..problem.clone() };
    tracing::info!("{peer}: {call} refused: {problem}");
    if !member.store.standing().has_majority() {
        // Nobody waits for a majority with an answer that is made.
        return;
    }
    let refusal = Refusal {
        time_ms: now_ms(),
        peer: peer.to_string(),
        call: call.to_owned(),
        uuid: subject.uuid,
        macs: subject.macs.iter().take(8).cloned().collect(),
        problem,
        count,
    };
    let command = Command::Refuse { nodes: subject.nodes.clone(), strangers, refusal };
    if let Err(error) = member.propose(command).await {
        tracing::warn!("a refusal could not be recorded: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_of_equal_refusals_is_counted_and_written_once_in_a_while() {
        let throttle = Throttle::default();
        let kind = |call: &str| Kind { subject: "x".into(), call: call.into(), code: Code::NotArmed };
        let start = Instant::now();
        assert_eq!(throttle.count(kind("hello"), start), 1);
        assert_eq!(throttle.count(kind("hello"), start), 0);
        assert_eq!(throttle.count(kind("hello"), start), 0);
        assert_eq!(throttle.count(kind("session"), start), 1, "another kind");
        assert_eq!(throttle.count(kind("hello"), start + EVERY), 3, "those that were counted, and this one");
        assert_eq!(throttle.count(kind("hello"), start + EVERY), 0);
    }

    #[test]
    fn a_flood_of_different_refusals_is_no_flood_of_writes() {
        let throttle = Throttle::default();
        let kind = |number: usize| Kind { subject: number.to_string(), call: "hello".into(), code: Code::NotArmed };
        let start = Instant::now();
        let written =
            |from: usize, to: usize, at| (from..to).map(|number| throttle.count(kind(number), at)).sum::<u64>();
        assert_eq!(written(0, MAX_KINDS, start), MAX_KINDS as u64);
        assert_eq!(written(MAX_KINDS, MAX_KINDS + 100, start), 0);
        assert_eq!(written(MAX_KINDS, MAX_KINDS + 100, start + EVERY), 100, "the flood is over");
    }
}
