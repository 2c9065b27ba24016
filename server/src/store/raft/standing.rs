//! How a member stands in the collective, as far as it can tell.

use super::{LogId, Peer, Raft, Replicated, UNHEARD};
use openraft::Instant as _;
use openraft::async_runtime::WatchReceiver as _;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::Duration;

/// A leader that has heard of a majority within this time takes it that it still leads.
const HEARD: Duration = Duration::from_millis(500);

/// How a member stands in the collective.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// This member's number.
    pub number: u64,
    /// The leader's, if one is known.
    pub leader: Option<u64>,
    /// Term of the last vote.
    pub term: u64,
    /// Members by number, and whether they vote.
    pub members: BTreeMap<u64, (Peer, bool)>,
    /// Newest entry of this member's log.
    pub last: u64,
    /// Newest entry it has applied.
    pub applied: u64,
    /// For a leader: how far each other member's log is.
    pub followers: BTreeMap<u64, u64>,
    /// For how long this member has not heard of a majority, by itself if it leads, or by way of the leader; none: since it was started.
    pub unheard: Option<Duration>,
    /// Whether a change of who votes is half done: until it is through, a majority of the old and one of the new voters are needed.
    pub is_changing: bool,
}

impl Standing {
    pub(super) fn voters(&self) -> usize {
        self.members.values().filter(|(_, votes)| *votes).count()
    }

    /// Whether this leader has reason to believe that it is none any more. Who is the only voter is his own majority.
    #[must_use]
    pub fn is_cut_off(&self) -> bool {
        self.leads() && self.voters() > 1 && self.unheard.is_some_and(|time| time > UNHEARD)
    }

    pub(super) fn leads(&self) -> bool {
        self.leader == Some(self.number)
    }

    /// Whether a majority answers, as far as this member can tell.
    #[must_use]
    pub fn has_majority(&self) -> bool {
        // Who follows goes on believing in a leader that is gone, until another one is elected.
        let hears = || self.leader.is_some() && self.unheard.is_some_and(|time| time <= UNHEARD);
        if self.leads() { !self.is_cut_off() } else { hears() }
    }

    pub(super) fn no_majority(&self, then: &str) -> String {
        format!("no majority of the {} voting members answers: {then} (`moor collective show`)", self.voters())
    }
}

/// For how long a leader has not heard of a majority. Who is the only voter is his own.
pub(super) fn unheard(metrics: &openraft::RaftMetrics<Raft>) -> Option<Duration> {
    let is_alone = metrics.membership_config.membership().voter_ids().take(2).count() <= 1;
    if is_alone { Some(Duration::ZERO) } else { metrics.last_quorum_acked.map(|at| at.elapsed()) }
}

impl Replicated {
    /// [`Standing::is_cut_off`], without all the rest: every change asks.
    pub(super) fn is_cut_off(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.current_leader == Some(self.number)
            && metrics.last_quorum_acked.is_some_and(|at| at.elapsed() > UNHEARD)
            && metrics.membership_config.membership().voter_ids().take(2).count() > 1
    }

    /// The term in which this member leads and has applied all that was acknowledged before, as far as it can tell: a change that is
    /// [bound](super::in_term) to the term shows whether it could. None also where a majority was not heard of just now.
    #[must_use]
    pub fn leads_in(&self) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        // With an entry of its term it has applied all of earlier ones; what it acknowledges in its own, it has applied before.
        let knows_all = metrics.last_applied.is_some_and(|id| **id.committed_leader_id() == metrics.current_term);
        let hears = metrics.last_quorum_acked.is_some_and(|at| at.elapsed() <= HEARD);
        (metrics.current_leader == Some(self.number) && knows_all && hears).then_some(metrics.current_term)
    }

    /// How this member stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched().clone();
        let membership = metrics.membership_config.membership().clone();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let members =
            membership.nodes().map(|(number, peer)| (*number, (peer.clone(), voters.contains(number)))).collect();
        let followers = metrics.replication.unwrap_or_default();
        let index = |id: Option<LogId>| id.map_or(0, |id| id.index());
        let leads = metrics.current_leader == Some(self.number);
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner).map(|at| at.elapsed());
        Standing {
            number: self.number,
            leader: metrics.current_leader,
            term: metrics.current_term,
            members,
            last: metrics.last_log_index.unwrap_or(0),
            applied: index(metrics.last_applied),
            followers: followers.into_iter().map(|(number, id)| (number, index(id))).collect(),
            unheard: if leads { metrics.last_quorum_acked.map(|at| at.elapsed()) } else { heard },
            is_changing: membership.get_joint_config().len() > 1,
        }
    }
}
