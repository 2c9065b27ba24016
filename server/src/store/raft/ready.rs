//! A vote counts when it is answered within less than a second. So who votes keeps a connection to each other one that does: one that is made only then
//! stands in line with those of all nodes that look for another member at this moment.

use super::network::Network;
use super::{Machine, Peer, Raft, Vote};
use futures_util::future::join_all;
use openraft::async_runtime::WatchReceiver as _;
use openraft::network::{RPCOption, RaftNetworkV2 as _};
use openraft::raft::VoteRequest;
use std::time::Duration;

/// Often enough that the other side does not give a connection up that waits.
const EVERY: Duration = Duration::from_secs(20);
/// Making one may take so long.
const LIMIT: Duration = Duration::from_secs(5);

impl Network {
    /// Leaves a connection to this member that waits for a vote, if it is reached.
    pub(super) async fn ready(&self, number: u64, peer: Peer) {
        // A call that changes nothing: whether he would vote for one who knows nothing.
        let asked = VoteRequest::new(Vote::new(0, number), None);
        // Who is not reached is asked again.
        let _ = self.link(peer, false).pre_vote(asked, RPCOption::new(LIMIT)).await;
    }
}

/// Keeps them for member `number`. Goes on for ever.
pub(super) async fn keep(raft: openraft::Raft<Raft, Machine>, network: Network, number: u64) {
    loop {
        let voters: Vec<(u64, Peer)> = {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            let membership = metrics.membership_config.membership();
            let voters = membership.voter_ids();
            voters.filter_map(|voter| Some((voter, membership.get_node(&voter)?.clone()))).collect()
        };
        if voters.iter().any(|(voter, _)| *voter == number) {
            let others = voters.into_iter().filter(|(voter, _)| *voter != number);
            join_all(others.map(|(_, peer)| network.ready(number, peer))).await;
        }
        tokio::time::sleep(EVERY).await;
    }
}
