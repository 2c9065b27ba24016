//! A collective that begins anew, of one member: out of a backup, or out of what a survivor of a lost majority has.
//!
//! The one gets a number and an id that nobody had. So no member of before can vote with it, be taken for it, or reach it as the one that
//! it was; the records say that all of them were removed.

use super::log::Log;
use super::machine::{Machine, State};
use super::{Calls, LogId, Peer, Places, Replicated, Vote, config, consensus};
use crate::store::tables::Snapshot;
use crate::store::{Level, StoreError};
use openraft::EntryPayload;
use openraft::storage::{RaftLogReader as _, RaftLogStorage as _};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::Arc;

/// Entries that are applied at a time.
const BATCH: u64 = 256;

fn broken(error: impl std::fmt::Display) -> StoreError {
    StoreError::Message(error.to_string())
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
        Ok(last.map_or((0, 0), |id| (**id.committed_leader_id(), id.index())))
    }

    /// All members of the newest membership that this member has heard of, whether it was agreed or not.
    ///
    /// # Errors
    /// The database or the log is damaged.
    pub async fn peers(&self) -> Result<BTreeMap<u64, Peer>, StoreError> {
        let (_, stored) = State::applied(&self.view()?)?;
        let mut peers: BTreeMap<u64, Peer> =
            stored.membership().nodes().map(|(number, peer)| (*number, peer.clone())).collect();
        self.behind(async |entries| {
            for (entry, _) in &entries {
                if let EntryPayload::Membership(membership) = &entry.payload {
                    peers.extend(membership.nodes().map(|(number, peer)| (*number, peer.clone())));
                }
            }
            Ok(())
        })
        .await?;
        Ok(peers)
    }

    /// Gives the entries that were not applied to `take`, in order.
    async fn behind(
        &self,
        mut take: impl AsyncFnMut(Vec<openraft::storage::EntryResponder<super::Raft>>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut log = self.log.clone();
        let (applied, last) = self.last(log.clone()).await?;
        let (mut next, end) = (applied.map_or(0, |id| id.index() + 1), last.map_or(0, |id| id.index() + 1));
        while next < end {
            let entries = log.try_get_log_entries(next..end.min(next + BATCH)).await.map_err(broken)?;
            let first = entries.first().map(|entry| entry.log_id.index());
            if first != Some(next) {
                return Err(broken(format!("the log is damaged: entry {next} is missing")));
            }
            next += entries.len() as u64;
            take(entries.into_iter().map(|entry| (entry, None)).collect()).await?;
        }
        Ok(())
    }

    /// Applies all that the log has, and goes on as the only member. What the log has may have been acknowledged, so none of it is dropped.
    ///
    /// # Errors
    /// The store is damaged, or failed.
    pub async fn begin_anew(mut self, peer: Peer, calls: Arc<Calls>) -> Result<(Replicated, u64), StoreError> {
        self.behind(async |entries| {
            let machine = self.machine.clone();
            tokio::task::spawn_blocking(move || machine.apply(entries)).await.map_err(consensus)?
        })
        .await?;
        let (_, last) = self.last(self.log.clone()).await?;
        let voted = self.log.read_vote().await.map_err(broken)?.map_or(0, |vote| vote.leader_id.term);
        let (number, term) = self.machine.begin_anew(None::<std::io::Empty>, (voted, last), peer)?;
        self.alone(number, term, calls).await
    }

    /// The same with the tables of a backup, over a store that was made for it.
    ///
    /// # Errors
    /// The backup is damaged: then nothing was changed. The store failed.
    pub async fn restore(
        self,
        tables: impl Read + Send + 'static,
        peer: Peer,
        calls: Arc<Calls>,
    ) -> Result<(Replicated, u64), StoreError> {
        let machine = self.machine.clone();
        let fill = move || machine.begin_anew(Some(tables), (0, None), peer);
        let (number, term) = tokio::task::spawn_blocking(fill).await.map_err(consensus)??;
        self.alone(number, term, calls).await
    }

    async fn alone(mut self, number: u64, term: u64, calls: Arc<Calls>) -> Result<(Replicated, u64), StoreError> {
        self.log.save_vote(&Vote::new(term, number)).await.map_err(broken)?;
        Ok((Replicated::over(self.log, self.machine, number, calls, config()).await?, number))
    }
}

impl Replicated {
    /// Writes all tables as they are in `view` to `out`, as a snapshot.
    ///
    /// # Errors
    /// The database is damaged; `out` failed.
    pub fn export<W: Write>(view: &Snapshot, out: W) -> Result<W, StoreError> {
        State::export(view, out)
    }
}
