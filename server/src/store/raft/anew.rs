//! A collective that begins anew, of one member: out of a backup, or out of what a survivor of a lost majority has.
//!
//! The one gets a number and an id that nobody had. So no member of before can vote with it, be taken for it, or reach it as the one that
//! it was; the records say that all of them were removed. And the collective is of the next incarnation, which certificates and tokens name: whoever
//! has heard of it believes no member of before.

use super::log::Log;
use super::machine::{Machine, State};
use super::{Entry, LogId, Peer, Places, Replicated, Vote, consensus, snapshot};
use crate::store::authorities::{self, Keyed, ssh};
use crate::store::records::{KeysRecord, MemberRecord, SiteRecord};
use crate::store::tables::{self, Snapshot};
use crate::store::{Level, StoreError};
use openraft::EntryPayload;
use openraft::storage::{RaftLogReader as _, RaftLogStorage as _};
use std::collections::BTreeMap;
use std::io::{Read, Write};

fn broken(error: impl std::fmt::Display) -> StoreError {
    StoreError::Message(error.to_string())
}

/// Term and place of an entry.
fn place(id: Option<LogId>) -> (u64, u64) {
    id.map_or((0, 0), |id| (**id.committed_leader_id(), id.index()))
}

/// The collective, and its members by number, as the tables of a member that does not run have them: also those that were removed.
///
/// # Errors
/// The tables cannot be opened (the member runs), are not there, or are damaged; the collective is of a newer release.
pub fn members_in(places: &Places) -> Result<(Option<SiteRecord>, BTreeMap<u64, MemberRecord>), StoreError> {
    let machine = Machine::open(&places.state, places.snapshots.clone(), Level::NEWEST);
    // It has to stay open as long as it is read.
    let machine = machine.map_err(|error| error.within(&places.state))?;
    let view = machine.view()?;
    Ok((view.site()?, view.members()?))
}

/// Log and tables of a member that does not run.
pub struct Survivor {
    log: Log,
    machine: Machine,
}

impl Survivor {
    /// Opens them.
    ///
    /// # Errors
    /// A database cannot be opened (the member runs), is not there, or is damaged; the collective is of a newer release.
    pub fn open(places: &Places) -> Result<Self, StoreError> {
        let known = Level::NEWEST;
        let log = Log::open(&places.log, known).map_err(|error| error.within(&places.log))?;
        let machine = Machine::open(&places.state, places.snapshots.clone(), known)
            .map_err(|error| error.within(&places.state))?;
        Ok(Self { log, machine })
    }

    /// The tables, as they are now: entries that were not applied before the member ended are not in them.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn view(&self) -> Result<Snapshot, StoreError> {
        self.machine.view()
    }

    /// The newest entry, in the log or behind it.
    fn last(&self, mut log: Log) -> impl Future<Output = Result<(Option<LogId>, Option<LogId>), StoreError>> {
        let applied = self.view().and_then(|view| State::applied(&view));
        async move {
            let (applied, _) = applied?;
            let last = log.get_log_state().await.map_err(broken)?.last_log_id;
            Ok((applied, last.max(applied)))
        }
    }

    /// Term and place of the newest entry.
    ///
    /// # Errors
    /// The database is damaged.
    pub async fn newest(&self) -> Result<(u64, u64), StoreError> {
        let (_, last) = self.last(self.log.clone()).await?;
        Ok(place(last))
    }

    /// All members of the newest membership that this member has heard of, whether it was agreed or not.
    ///
    /// # Errors
    /// The database or the log is damaged.
    pub async fn peers(&self) -> Result<BTreeMap<u64, Peer>, StoreError> {
        let (_, stored) = State::applied(&self.view()?)?;
        let mut peers: BTreeMap<u64, Peer> =
            stored.membership().nodes().map(|(number, peer)| (*number, peer.clone())).collect();
        for entry in self.behind().await? {
            if let EntryPayload::Membership(membership) = &entry.payload {
                peers.extend(membership.nodes().map(|(number, peer)| (*number, peer.clone())));
            }
        }
        Ok(peers)
    }

    /// The entries that were not applied, in order: little more than what is applied between two syncs of the tables.
    async fn behind(&self) -> Result<Vec<Entry>, StoreError> {
        let mut log = self.log.clone();
        let (applied, last) = self.last(log.clone()).await?;
        let (next, end) = (applied.map_or(0, |id| id.index() + 1), last.map_or(0, |id| id.index() + 1));
        let entries = log.try_get_log_entries(next..end).await.map_err(broken)?;
        if entries.len() as u64 != end.saturating_sub(next)
            || entries.first().is_some_and(|first| first.log_id.index() != next)
        {
            return Err(broken(format!("the log is damaged: entries are missing from {next} on")));
        }
        Ok(entries)
    }

    /// Applies all that the log has, and makes `member` the only one, with the keys that `keys` makes of those that there are; returns its number.
    /// `before` is the number that it has now, `hosts` are the SSH host authorities whose keys it has. What the log has may have been acknowledged,
    /// so none of it is dropped.
    ///
    /// Whoever is interrupted finds a member that is as it was, or the new one: never entries applied of which nobody knows whether they were
    /// agreed, in a member that may go on with those of before.
    ///
    /// # Errors
    /// The store is damaged, or failed; `keys` makes none. Then it is as it was.
    pub async fn begin_anew(
        &mut self,
        before: u64,
        member: MemberRecord,
        hosts: Vec<u32>,
        keys: impl FnOnce(&KeysRecord) -> anyhow::Result<KeysRecord> + Send + 'static,
    ) -> Result<u64, StoreError> {
        let entries = self.behind().await?;
        let (_, last) = self.last(self.log.clone()).await?;
        let voted = self.log.read_vote().await.map_err(broken)?.map_or(0, |vote| vote.leader_id.term);
        let term = last.map_or(0, |id| **id.committed_leader_id()).max(voted) + 1;
        // Before the tables: they must not be of a term that no vote stands behind. To those of before it is one in an election that nobody wins.
        self.log.save_vote(&Vote::new(term, before)).await.map_err(broken)?;
        let machine = self.machine.clone();
        let begin = move || {
            let fill = |write: &tables::Write<'_>| {
                for entry in entries {
                    machine.take(write, entry)?;
                }
                ssh::leave_retired(write, &hosts)?;
                Ok(last)
            };
            machine.begin_anew(fill, term, member, keys)
        };
        let (number, _) = tokio::task::spawn_blocking(begin).await.map_err(consensus)??;
        Ok(number)
    }

    /// The same with the tables of a backup, over a store that was made for it, and the keys of the authorities `keyed`.
    ///
    /// # Errors
    /// The backup is damaged, or of a newer level; its tables name no authority that there are keys of; `keys` makes none: then nothing was changed.
    /// The store failed.
    pub async fn restore(
        &mut self,
        tables: impl Read + Send + 'static,
        member: MemberRecord,
        keyed: Keyed,
        keys: impl FnOnce(&KeysRecord) -> anyhow::Result<KeysRecord> + Send + 'static,
    ) -> Result<u64, StoreError> {
        let machine = self.machine.clone();
        let begin = move || {
            let fill = |write: &tables::Write<'_>| {
                let read = snapshot::read(tables, write, machine.known()).map_err(snapshot::unread)?;
                authorities::leave_keyed(write, &keyed)?;
                Ok(read.last_log_id)
            };
            machine.begin_anew(fill, 1, member, keys)
        };
        let (number, term) = tokio::task::spawn_blocking(begin).await.map_err(consensus)??;
        self.log.save_vote(&Vote::new(term, number)).await.map_err(broken)?;
        Ok(number)
    }
}

impl Replicated {
    /// Term and place of the newest entry that is in `view`.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn newest_in(view: &Snapshot) -> Result<(u64, u64), StoreError> {
        Ok(place(State::applied(view)?.0))
    }

    /// Writes all tables as they are in `view` to `out`, as a snapshot.
    ///
    /// # Errors
    /// The database is damaged; `out` failed.
    pub fn export<W: Write>(view: &Snapshot, out: W) -> Result<W, StoreError> {
        State::export(view, out)
    }
}
