//! Changes, on their way to the leader and to a majority; and what a change says of the reads before it.

use super::{PATIENCE, Peer, Raft, Replicated, consensus};
use crate::store::tables::Snapshot;
use crate::store::{Command, Event, Outcome, Store, StoreError, level};
use openraft::errors::{ClientWriteError, Fatal, ForwardReason, RaftError};
use openraft::impls::ProgressResponder;
use std::cell::Cell;
use std::time::Instant;
use tokio::sync::broadcast;

type Written = openraft::raft::ClientWriteResponse<Raft>;
type CommittedLeaderId = openraft::type_config::alias::CommittedLeaderIdOf<Raft>;

tokio::task_local! {
    /// The term that the first change of this task is bound to, until it is made.
    static TERM: Cell<Option<u64>>;
}

/// Does what reads here and then changes, on a member that [leads](Replicated::leads_in) in `term`. Its first change is made in that term or refused:
/// once it is made, this member led when it was read, and what was read was the newest. That takes one round among the members instead of two.
pub(crate) async fn in_term<T>(term: u64, work: impl Future<Output = T>) -> T {
    TERM.scope(Cell::new(Some(term)), work).await
}

/// The term that this task's changes are bound to.
pub(super) fn bound() -> Option<u64> {
    TERM.try_with(Cell::get).ok().flatten()
}

impl Replicated {
    /// Proposes here, if this member leads: the outcome and the entry's index. `None`: it does not lead.
    ///
    /// # Errors
    /// The store failed, or lost the lead on the way.
    pub async fn propose_here(&self, command: Command) -> Result<Option<(Outcome, u64)>, StoreError> {
        let (command, refused) = match level::within(command, || self.machine.view()?.level())? {
            Ok(within) => within,
            Err(problem) => return Ok(Some((Outcome::Refused(problem), 0))),
        };
        if self.is_cut_off() {
            return Err(StoreError::NoLeader(self.standing().no_majority("changes wait until it does")));
        }
        let bound = bound();
        let Ok(written) = tokio::time::timeout(PATIENCE, self.write(command, bound)).await else {
            let then = "this change is made when it does, unless another leader is elected before";
            return Err(StoreError::NoLeader(self.standing().no_majority(then)));
        };
        match written {
            Ok(written) => {
                // What was read before it is proven with it. Nothing is bound outside of such a task.
                let _ = TERM.try_with(|term| term.set(None));
                Ok(Some((refused.map_or(written.data, Outcome::Refused), written.log_id.index())))
            }
            // Another one leads, who may know of newer things than were read here; or it leads on once it is heard again.
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to)))
                if bound.is_some() && to.reason != ForwardReason::LeaseExpired =>
            {
                Err(StoreError::NoLeader(
                    "another member has come to lead meanwhile: this was not changed; try again".into(),
                ))
            }
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Ok(None),
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Err(StoreError::Unknown),
            Err(error) => Err(consensus(error)),
        }
    }

    async fn write(
        &self,
        command: Command,
        term: Option<u64>,
    ) -> Result<Written, RaftError<Raft, ClientWriteError<Raft>>> {
        let Some(term) = term else { return self.raft.client_write(command).await };
        let (responder, answered) = ProgressResponder::complete_only();
        self.raft.write(command).responder(responder).with_leader(CommittedLeaderId::from(term)).await?;
        // Nobody answers any more once Raft has ended.
        answered.await.map_err(|_| RaftError::Fatal(Fatal::Stopped))?.map_err(RaftError::APIError)
    }

    fn leader(&self) -> Option<Peer> {
        let standing = self.standing();
        let leader = standing.leader.filter(|leader| *leader != self.number)?;
        standing.members.get(&leader).map(|(peer, _)| peer.clone())
    }
}

impl Store for Replicated {
    async fn propose(&self, command: Command) -> Result<Outcome, StoreError> {
        let until = Instant::now() + PATIENCE;
        // What is above the level is not even passed on: a leader of an older release would read it without what is new in it.
        let (command, refused) = match level::within(command, || self.machine.view()?.level())? {
            Ok(within) => within,
            Err(problem) => return Ok(Outcome::Refused(problem)),
        };
        let told = |outcome| refused.clone().map_or(outcome, Outcome::Refused);
        loop {
            if let Some((outcome, _)) = self.propose_here(command.clone()).await? {
                return Ok(told(outcome));
            }
            // What is bound is for this member alone.
            if let Some(leader) = self.leader().filter(|_| bound().is_none()) {
                match self.calls.propose(&leader, &command).await {
                    Ok(Some((outcome, index))) => {
                        // Best effort: the change is made; who reads at once should see it.
                        let _ = self.applied(index).await;
                        return Ok(told(outcome));
                    }
                    // It leads no more, or was not reached at all: nothing was proposed.
                    Ok(None) => {}
                    Err(error) => return Err(error),
                }
            }
            self.again(until).await?;
        }
    }

    fn snapshot(&self) -> Result<Snapshot, StoreError> {
        self.machine.view()
    }

    fn watch(&self) -> broadcast::Receiver<Event> {
        self.machine.watch()
    }
}
