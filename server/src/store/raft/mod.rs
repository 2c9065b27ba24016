//! The replicated store: openraft over a [`log`] and a [`machine`] of ours. Nothing outside of this folder knows openraft.
//!
//! A change is acknowledged once a majority has it on disk and this member has applied it. Members that are no leader pass changes on to
//! the leader, and then wait until they have applied them too: who proposes, reads his own writes.

mod anew;
mod answer;
#[cfg(test)]
mod cuts;
mod follow;
mod journal;
mod log;
mod machine;
mod membership;
mod network;
mod own;
mod pool;
mod propose;
mod ready;
mod rounds;
mod snapshot;
mod standing;
mod stream;
#[cfg(test)]
mod tests;
mod wire;

pub use anew::{Survivor, members_in};
use answer::Answered;
pub use answer::Leading;
pub(crate) use answer::proposed;
pub(crate) use follow::follow;
pub(crate) use network::INTRODUCE;
pub use network::{Call, Calls};
pub(crate) use propose::in_term;
pub use snapshot::SnapshotFile;
pub use standing::Standing;
pub(crate) use stream::{PATH as STREAM, PROTOCOL};

use super::records::MemberRecord;
use super::syncs::{self, Figures, Syncs};
use super::{Command, Level, Outcome, StoreError, database};
use crate::aside::Aside;
use log::Log;
use machine::Machine;
use membership::{Change, next_change};
use moor_api::client::ClientError;
use moor_api::ids::MemberId;
use moor_api::node::Base64;
use moor_api::problem::Code;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ForwardToLeader, LinearizableReadError, RaftError};
use openraft::impls::leader_id_std;
use openraft::{ChangeMembers, Config, ReadPolicy};
use rounds::Rounds;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A member, as the membership names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its id, as its certificate says.
    pub id: MemberId,
    /// Its public key, DER `SubjectPublicKeyInfo`.
    #[serde(default)]
    pub key: Base64,
    /// Its name.
    pub name: String,
    /// Where it is reached: `https://ADDRESS:PORT`.
    pub urls: Vec<String>,
}

openraft::declare_raft_types!(
    /// What the collective agrees about.
    pub Raft:
        D = Command,
        R = Outcome,
        Node = Peer,
        LeaderId = leader_id_std::LeaderId<Self::Term, Self::NodeId>,
);

type LogId = openraft::type_config::alias::LogIdOf<Raft>;
type Vote = openraft::type_config::alias::VoteOf<Raft>;
type Entry = openraft::type_config::alias::EntryOf<Raft>;
type StoredMembership = openraft::type_config::alias::StoredMembershipOf<Raft>;
type Membership = openraft::Membership<u64, Peer>;
type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<Raft>;
type RaftSnapshot = openraft::type_config::alias::SnapshotOf<Raft, SnapshotFile>;

/// The first member of a collective.
pub const FOUNDER: u64 = 1;
/// A leader says that it is there this often.
const HEARTBEAT: Duration = Duration::from_millis(200);
/// Without a sign of it for so long an election begins; drawn anew each time.
const ELECTION: (Duration, Duration) = (Duration::from_millis(700), Duration::from_secs(1));
/// A leader that has heard of no majority for so long refuses changes at once.
const UNHEARD: Duration = Duration::from_millis(2500);
/// A change waits this long for a leader before it is refused.
const PATIENCE: Duration = Duration::from_secs(8);
/// Entries after which the log is cut behind a snapshot.
const SNAPSHOT_EVERY: u64 = 20_000;
/// Entries that stay in front of a snapshot, for followers that are a little behind.
const KEPT: u64 = 5_000;

/// Where the parts of a store lie.
#[derive(Debug, Clone)]
pub struct Places {
    /// The tables.
    pub state: PathBuf,
    /// The log.
    pub log: PathBuf,
    /// Snapshots.
    pub snapshots: PathBuf,
}

impl Places {
    /// In one directory.
    #[must_use]
    pub fn in_dir(dir: &Path) -> Self {
        Self { state: dir.join("member.redb"), log: dir.join("log.redb"), snapshots: dir.join("snapshots") }
    }

    /// Makes the files of a new store, with nothing in them.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn make(&self) -> Result<(), StoreError> {
        database::make(&self.log)?;
        database::make(&self.state)
    }
}

/// The store of a member.
pub struct Replicated {
    raft: openraft::Raft<Raft, Machine>,
    machine: Machine,
    calls: Arc<Calls>,
    number: u64,
    /// When a majority was heard of last, by way of the leader.
    heard: Mutex<Option<Instant>>,
    rounds: Rounds,
    /// How long the journal, the log and the tables take to become durable.
    syncs: [Arc<Syncs>; 3],
    /// Where Raft's tasks are.
    thread: Aside,
}

fn config() -> Config {
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Config {
        cluster_name: "mooring".into(),
        heartbeat_interval: milliseconds(HEARTBEAT),
        election_timeout_min: milliseconds(ELECTION.0),
        election_timeout_max: milliseconds(ELECTION.1),
        max_payload_entries: 512,
        snapshot_policy: openraft::SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: KEPT,
        // A snapshot of the largest collective over a slow link.
        install_snapshot_timeout: 600_000,
        enable_pre_vote: Some(true),
        // A leader sends entries on before they are on its own disk. If it came back as the leader of the same term, it would give the
        // places of those that were lost to others, and who has the old ones would never know.
        enable_leader_restore: Some(false),
        ..Config::default()
    }
}

fn consensus(error: impl std::fmt::Display) -> StoreError {
    StoreError::Consensus(error.to_string())
}

impl Replicated {
    /// Opens the store of member `number`, which was [made](Places::make) once; other members are called by `calls`.
    ///
    /// # Errors
    /// A database cannot be opened, is not there, or is damaged; the collective is of a newer release.
    pub async fn open(places: &Places, number: u64, calls: Arc<Calls>) -> Result<Self, StoreError> {
        Self::open_up_to(Level::NEWEST, places, number, calls).await
    }

    /// The same for a release that knows levels up to `known`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_up_to(known: Level, places: &Places, number: u64, calls: Arc<Calls>) -> Result<Self, StoreError> {
        let (log, machine) = (
            Log::open(&places.log, known).map_err(|error| error.within(&places.log))?,
            Machine::open(&places.state, places.snapshots.clone(), known)
                .map_err(|error| error.within(&places.state))?,
        );
        Self::over(log, machine, number, calls, config()).await
    }

    async fn over(
        log: Log,
        machine: Machine,
        number: u64,
        calls: Arc<Calls>,
        config: Config,
    ) -> Result<Self, StoreError> {
        let config = Arc::new(config.validate().map_err(consensus)?);
        let network = network::Network::new(calls.clone());
        let thread = own::thread()?;
        let [journaled, logged] = log.syncs();
        let syncs = [journaled, logged, machine.syncs()];
        thread.handle().spawn(syncs::watch(syncs.clone()));
        // What it begins stays where it is begun.
        let raft = openraft::Raft::new(number, config, network.clone(), log, machine.clone());
        let raft = thread.handle().spawn(raft).await.map_err(consensus)?;
        let raft = raft.map_err(|error| machine.why(consensus(error)))?;
        let metrics = raft.metrics();
        calls.tell_unheard(move || standing::unheard(&metrics.borrow_watched()));
        thread.handle().spawn(ready::keep(raft.clone(), network, number));
        let (heard, rounds) = (Mutex::default(), Rounds::default());
        let store = Self { raft, machine, calls, number, heard, rounds, syncs, thread };
        store.recover().await.map_err(|error| store.machine.why(error))?;
        Ok(store)
    }

    /// How long the files of the store took to become durable.
    pub(crate) fn syncs(&self) -> impl Iterator<Item = Figures> {
        self.syncs.iter().map(|syncs| syncs.figures())
    }

    /// Begins a task where those of Raft are. It must not keep that thread busy.
    pub(crate) fn begin_beside(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.thread.handle().spawn(task);
    }

    /// What was acknowledged before is read from now on. Who is the only voter needs nobody for that; among several, it takes a majority,
    /// and a member that is cut off has to start all the same.
    async fn recover(&self) -> Result<(), StoreError> {
        // Not from the metrics: they may not have been made yet.
        let voters =
            self.raft.with_raft_state(|state| state.membership_state.effective().voter_ids().collect::<Vec<u64>>());
        let voters = voters.await.map_err(consensus)?;
        if voters != [self.number] {
            return Ok(());
        }
        self.raft.trigger().elect(false).await.map_err(consensus)?;
        self.raft.wait_for_recovery(Some(PATIENCE)).await.map_err(consensus)?;
        Ok(())
    }

    /// Makes a new collective of this member alone, and waits until it leads.
    ///
    /// # Errors
    /// There is one already.
    pub async fn found(&self, peer: Peer) -> Result<(), StoreError> {
        self.raft.initialize(BTreeMap::from([(self.number, peer)])).await.map_err(consensus)?;
        self.raft.wait(Some(PATIENCE)).current_leader(self.number, "the founder leads").await.map_err(consensus)?;
        Ok(())
    }

    /// Ends its tasks, and makes all that was applied durable.
    pub async fn close(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::error!("ending the store: {error}");
        }
        let machine = self.machine.clone();
        let synced = tokio::task::spawn_blocking(move || machine.sync()).await;
        if let Ok(Err(error)) = synced {
            tracing::error!("syncing the store: {error}");
        }
    }

    /// Returns once it cannot go on, and why: it has failed, or the collective has outgrown this release.
    pub async fn failed(&self) -> StoreError {
        // These tell of leaders and members; those with everything would wake this task several times in each change. They end with Raft.
        let mut metrics = self.raft.server_metrics();
        let running = self.raft.metrics();
        let mut outgrown = self.machine.outgrown();
        loop {
            if let Some(level) = *outgrown.borrow_and_update() {
                return StoreError::TooOld { level, known: self.machine.known() };
            }
            if running.borrow_watched().running_state.is_err() {
                // It has ended because of what came since.
                return self.machine.why(StoreError::Failed);
            }
            tokio::select! {
                changed = metrics.changed() => if changed.is_err() { return self.machine.why(StoreError::Failed) },
                // Its sender is here.
                _ = outgrown.changed() => {}
            }
        }
    }

    /// Waits until this member knows all that was acknowledged anywhere before the call.
    ///
    /// # Errors
    /// No majority answers.
    pub async fn linearize(&self) -> Result<(), StoreError> {
        match tokio::time::timeout(PATIENCE, self.rounds.share(self.ask())).await {
            Ok(asked) => asked,
            Err(_) => Err(self.unknown()),
        }
    }

    fn unknown(&self) -> StoreError {
        StoreError::NoLeader(self.standing().no_majority("what is newest is not known"))
    }

    async fn ask(&self) -> Result<(), StoreError> {
        let until = Instant::now() + PATIENCE;
        loop {
            let asked = tokio::time::timeout(PATIENCE, self.raft.ensure_linearizable(ReadPolicy::ReadIndex)).await;
            let Ok(asked) = asked else { return Err(self.unknown()) };
            let leader = match asked {
                Ok(_) => return Ok(()),
                Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(leader))) => Some(leader),
                Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => None,
                Err(RaftError::Fatal(error)) => return Err(consensus(error)),
            };
            if let Some(ForwardToLeader { leader_id: Some(leader), leader_node: Some(peer), .. }) = leader
                && leader != self.number
            {
                match self.calls.read_index(&peer).await {
                    Ok(index) => return self.applied(index).await,
                    Err(ClientError::Problem(problem)) if matches!(problem.code, Code::Forbidden | Code::Removed) => {
                        return Err(StoreError::Leader(problem));
                    }
                    Err(_) => {}
                }
            }
            self.again(until).await?;
        }
    }

    /// Which entry a linearizable read on this leader has to see.
    ///
    /// # Errors
    /// It does not lead, or no majority answers.
    pub async fn read_index(&self) -> Result<u64, StoreError> {
        match tokio::time::timeout(PATIENCE, self.raft.ensure_linearizable(ReadPolicy::ReadIndex)).await {
            Ok(Ok(read)) => Ok(read.index()),
            Ok(Err(error)) => Err(StoreError::NoLeader(error.to_string())),
            Err(_) => Err(self.unknown()),
        }
    }

    async fn applied(&self, index: u64) -> Result<(), StoreError> {
        let waited = self
            .raft
            .wait(Some(PATIENCE))
            .applied_index_at_least(Some(index), "what the leader has acknowledged")
            .await;
        waited.map(drop).map_err(consensus)
    }

    /// A pause before the next try, or the end of all patience.
    async fn again(&self, until: Instant) -> Result<(), StoreError> {
        if Instant::now() >= until {
            return Err(StoreError::NoLeader(self.standing().no_majority("changes wait until it does")));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        Ok(())
    }

    /// Brings the membership to what the members' records say; does nothing where this member does not lead. One step at a time: it
    /// is called again and again.
    ///
    /// # Errors
    /// The store failed.
    pub async fn reconcile(&self, records: &BTreeMap<u64, MemberRecord>) -> Result<(), StoreError> {
        let standing = self.standing();
        if standing.leader != Some(self.number) {
            return Ok(());
        }
        let Some(change) = next_change(&standing, records) else { return Ok(()) };
        let said = change.to_string();
        match change {
            Change::Add(number, peer) => self.raft.add_learner(number, peer, false).await.map(drop),
            Change::Rename(number, peer) => {
                let nodes = BTreeMap::from([(number, peer)]);
                self.raft.change_membership(ChangeMembers::SetNodes(nodes), true).await.map(drop)
            }
            Change::Promote(number) => {
                let voters = BTreeSet::from([number]);
                self.raft.change_membership(ChangeMembers::AddVoterIds(voters), true).await.map(drop)
            }
            Change::Demote(voters) => {
                self.raft.change_membership(ChangeMembers::RemoveVoters(voters), true).await.map(drop)
            }
            Change::Finish(voters) => {
                self.raft.change_membership(ChangeMembers::ReplaceAllVoters(voters), true).await.map(drop)
            }
            Change::Remove(number) => {
                let nodes = BTreeSet::from([number]);
                self.raft.change_membership(ChangeMembers::RemoveNodes(nodes), false).await.map(drop)
            }
        }
        .map(|()| tracing::info!("membership: {said}"))
        .or_else(|error| match error {
            // Another change is under way, or the lead was lost: the next call sees.
            RaftError::APIError(error) => {
                tracing::debug!("membership: {error}");
                Ok(())
            }
            RaftError::Fatal(error) => Err(consensus(error)),
        })
    }

    /// Refuses the member `by`, which has proven who it is, where it gives itself the number of another one. Where this member is behind, it knows
    /// neither the caller's number nor who has that one; then it is believed.
    fn speaks(&self, number: u64, by: MemberId) -> Result<(), StoreError> {
        let view = self.machine.view()?;
        let is_its_own = if let Some(record) = view.member(number)? {
            record.id == by
        } else {
            let named = self.standing().members;
            let is_other = |(known, id): (u64, MemberId)| (known == number) != (id == by);
            number != self.number
                && !view.members()?.into_iter().map(|(known, record)| (known, record.id)).any(is_other)
                && !named.into_iter().map(|(known, (peer, _))| (known, peer.id)).any(is_other)
        };
        if is_its_own { Ok(()) } else { Err(StoreError::Speaker { number }) }
    }

    /// Answers a call of the member `by`.
    ///
    /// # Errors
    /// It does not parse, or is in another member's name; the store failed.
    pub async fn answer(&self, call: Call, body: &[u8], by: MemberId) -> Result<Vec<u8>, StoreError> {
        let speaks = |number| self.speaks(number, by);
        let answer = answer::answer(&self.raft, call, body, self.machine.known(), speaks).await;
        let Answered { answer, heard } = self.machine.note(answer).map_err(|error| self.machine.why(error))?;
        if let Some(unheard) = heard {
            self.hear(unheard);
        }
        Ok(answer)
    }

    /// The leader was there just now, who had not heard of a majority for `unheard` then. One that is left with this member alone goes on saying that it
    /// is there: it is no majority.
    fn hear(&self, unheard: Duration) {
        let at = Instant::now().checked_sub(unheard);
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        *heard = at.max(*heard);
    }

    /// Reads the vote with which the member `by` wants to send a snapshot.
    ///
    /// # Errors
    /// It does not parse, or is in another member's name.
    pub fn leading(&self, vote: &str, by: MemberId) -> Result<Leading, StoreError> {
        Leading::read(&self.raft, vote, |number| self.speaks(number, by))
    }

    /// Takes a snapshot that the leader sends: `file` lies in [`Self::receiving`].
    ///
    /// # Errors
    /// It is damaged; the store failed.
    pub async fn install(&self, leading: Leading, file: SnapshotFile) -> Result<Vec<u8>, StoreError> {
        self.machine.note(answer::install(&self.raft, leading, file, self.machine.known()).await)
    }

    /// A new file that a snapshot is received into.
    ///
    /// # Errors
    /// The disk is full or not writable.
    pub fn receiving(&self) -> std::io::Result<(std::fs::File, PathBuf)> {
        snapshot::create(self.machine.directory())
    }
}
