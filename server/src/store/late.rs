//! What a member does for a node that it knows while no majority answers. It counts on this member at once, and is agreed later: taken once,
//! and in a way that takes nothing back of what others agreed meanwhile.

use super::StoreError;
use super::apply::{boot_record, log, node, put_node, refused, tell};
use super::audit;
use super::command::{Command, Outcome};
use super::records::{BOOTED, BootRecord, Evidence, ImageRecord, NodeRecord, Plan};
use super::tables::{self, Snapshot, Write};
use moor_api::admin::{LogEvent, StatusEvent};
use moor_api::ids::{BootId, ImageDigest, NodeId};
use moor_api::problem::Code;
use serde::{Deserialize, Serialize};

/// Such a change. Variants and fields are only ever added.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "late")]
pub enum Late {
    /// As [`Command::Boot`].
    Boot {
        /// Which node.
        id: NodeId,
        /// Which boot.
        boot: BootId,
        /// What it was told to boot.
        plan: Option<Plan>,
        /// What its TPM said.
        evidence: Option<Evidence>,
        /// The newest boot that the member knew of. Where another one is the newest by now, this one was before it, and is over.
        after: Option<BootId>,
    },
    /// As [`Command::CloseStage`].
    CloseStage {
        /// Which node.
        id: NodeId,
        /// Which boot.
        boot: BootId,
    },
    /// As [`Command::Pin`].
    Pin {
        /// Which node.
        id: NodeId,
        /// Which image.
        digest: ImageDigest,
    },
    /// As [`Command::Status`].
    Status {
        /// Which node.
        id: NodeId,
        /// Sequence in its boot.
        sequence: Option<u64>,
        /// The event.
        event: StatusEvent,
    },
    /// As [`Command::Log`].
    Log {
        /// Which node.
        id: NodeId,
        /// The event.
        event: LogEvent,
    },
    /// As [`Command::Audit`].
    Audit {
        /// What happened.
        entry: serde_json::Value,
    },
}

impl Late {
    /// The same change as `command`, as it can be made later; `None`: nobody may make it alone. `of` is a node as this member knows it.
    ///
    /// # Errors
    /// The database is damaged; there is no such node.
    pub fn of(
        command: Command,
        view: &Snapshot,
        of: impl FnOnce(NodeId) -> Result<Option<NodeRecord>, StoreError>,
    ) -> Result<Option<Self>, StoreError> {
        Ok(Some(match command {
            Command::Boot { id, boot, evidence } => {
                let Some(node) = of(id)? else { return Ok(None) };
                let plan = plan(&node, view)?;
                let after = node.boots.last().map(|record| record.boot).filter(|last| *last != boot);
                Self::Boot { id, boot, plan, evidence, after }
            }
            Command::CloseStage { id, boot } => Self::CloseStage { id, boot },
            Command::Pin { id, digest } => Self::Pin { id, digest },
            Command::Status { id, sequence, event } => Self::Status { id, sequence, event },
            Command::Log { id, event } => Self::Log { id, event },
            Command::Audit { entry } => Self::Audit { entry },
            _ => return Ok(None),
        }))
    }

    /// The node whose record `command` changes, which may be made late.
    #[must_use]
    pub fn node_of(command: &Command) -> Option<NodeId> {
        match command {
            Command::Boot { id, .. }
            | Command::CloseStage { id, .. }
            | Command::Pin { id, .. }
            | Command::Status { id, .. } => Some(*id),
            _ => None,
        }
    }

    /// The node whose record it changes.
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        match self {
            Self::Boot { id, .. } | Self::CloseStage { id, .. } | Self::Pin { id, .. } | Self::Status { id, .. } => {
                Some(*id)
            }
            Self::Log { .. } | Self::Audit { .. } => None,
        }
    }

    /// Makes it in the record of its node.
    pub fn edit(&self, node: &mut NodeRecord) {
        match self {
            Self::Boot { boot, plan, evidence, .. } => {
                for other in node.boots.iter_mut().filter(|record| record.boot != *boot) {
                    other.closed = true;
                }
                node.forget_trust(*boot);
                let record = boot_record(node, *boot, false);
                record.plan.clone_from(plan);
                if evidence.is_some() {
                    record.evidence.clone_from(evidence);
                }
            }
            Self::CloseStage { boot, .. } => boot_record(node, *boot, true).closed = true,
            Self::Pin { digest, .. } => node.pin = Some(*digest),
            Self::Status { sequence: Some(sequence), event, .. } => {
                if let Some(boot) = event.boot {
                    let record = boot_record(node, boot, true);
                    record.sequence = record.sequence.max(Some(*sequence));
                    record.booted |= event.state == BOOTED;
                }
            }
            Self::Status { .. } | Self::Log { .. } | Self::Audit { .. } => {}
        }
    }
}

/// What a node boots without a majority: what it last booted to the end. A newer order and a newer generation wait for the others, who may have
/// taken them back. A node that has never booted has nothing to go back to, and carries out the order that is known here.
fn plan(node: &NodeRecord, view: &Snapshot) -> Result<Option<Plan>, StoreError> {
    if let Some(plan) = node.last_booted() {
        return Ok(Some(plan.clone()));
    }
    let Some(order) = &node.deployment else { return Ok(None) };
    let profile = view.profile(order.profile.as_str())?;
    Ok(profile.map(|profile| Plan { deployment: order.id, profile: profile.name, generation: profile.generation }))
}

/// Takes what `member` did, unless it was taken before.
pub(super) fn apply(write: &Write<'_>, member: u64, number: u64, late: Late) -> Result<Outcome, StoreError> {
    let counter = format!("late-{member}");
    if write.get::<u64>(tables::COUNTERS, &counter)?.is_some_and(|last| number <= last) {
        return Ok(Outcome::Done);
    }
    write.put(tables::COUNTERS, &counter, &number)?;
    let gone = || refused(Code::NotFound, "the node was removed meanwhile");
    match late {
        Late::Audit { entry } => audit::append(write, &entry),
        Late::Log { id, event } => log(write, id, event),
        Late::Status { id, sequence, event } => status(write, id, sequence, event),
        Late::Pin { digest, .. } if write.get::<ImageRecord>(tables::IMAGES, &digest.to_string())?.is_none() => {
            Ok(refused(Code::NotFound, format!("image {digest} is not in the catalogue any more")))
        }
        Late::Boot { id, boot, ref plan, ref evidence, after } => {
            let Some(mut node) = node(write, id)? else { return Ok(gone()) };
            if let Some(record) = node.boots.iter_mut().find(|record| record.boot == boot) {
                // Its first proposal was made after all, or it goes on elsewhere.
                record.plan = record.plan.take().or_else(|| plan.clone());
            } else if node.boots.last().map(|record| record.boot) == after {
                late.edit(&mut node);
            } else {
                insert_closed(&mut node, boot, plan.clone(), evidence.clone());
            }
            put_node(write, &node)?;
            Ok(Outcome::Done)
        }
        Late::CloseStage { id, .. } | Late::Pin { id, .. } => {
            let Some(mut node) = node(write, id)? else { return Ok(gone()) };
            late.edit(&mut node);
            put_node(write, &node)?;
            Ok(Outcome::Done)
        }
    }
}

/// A boot that began before the newest one.
fn insert_closed(node: &mut NodeRecord, boot: BootId, plan: Option<Plan>, evidence: Option<Evidence>) {
    node.forget_oldest_boot();
    let at = node.boots.len().saturating_sub(1);
    node.boots.insert(at, BootRecord { plan, evidence, ..BootRecord::new(boot, true) });
}

/// A report that was taken while newer ones came in elsewhere is kept all the same, once.
fn status(write: &Write<'_>, id: NodeId, sequence: Option<u64>, event: StatusEvent) -> Result<Outcome, StoreError> {
    let Some(mut record) = node(write, id)? else {
        return Ok(refused(Code::NotFound, "the node was removed meanwhile"));
    };
    let boot = record.boots.iter_mut().find(|record| Some(record.boot) == event.boot);
    let Some(boot) = boot.filter(|boot| sequence.is_some() && boot.sequence >= sequence) else {
        return super::apply::status(write, id, sequence, event);
    };
    boot.booted |= event.state == BOOTED;
    put_node(write, &record)?;
    let kept: Vec<StatusEvent> = write.get(tables::EVENTS, &id.to_string())?.unwrap_or_default();
    let same = |other: &StatusEvent| {
        (other.boot, &other.state, other.uptime_ms) == (event.boot, &event.state, event.uptime_ms)
    };
    if !kept.iter().any(same) {
        tell(write, id, event)?;
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::records::{Armed, MAX_BOOTS};
    use moor_api::ids::{DeploymentId, Sha256Digest};
    use std::collections::BTreeMap;

    fn record(boots: &[(u8, bool)]) -> NodeRecord {
        let boots = boots.iter().map(|(boot, closed)| BootRecord::new(BootId::from_bytes([*boot; 16]), *closed));
        NodeRecord {
            id: NodeId::from_bytes([1; 16]),
            name: "n1".parse().unwrap(),
            attributes: BTreeMap::new(),
            secrets: BTreeMap::new(),
            identity: None,
            epoch: 1,
            armed: Armed::No,
            deployment: None,
            pin: None,
            boots: boots.collect(),
            trust: None,
        }
    }

    /// Tables with one node, in memory.
    fn applied(before: &NodeRecord, lates: &[(u64, Late)]) -> NodeRecord {
        let database = redb::Database::builder().create_with_backend(redb::backends::InMemoryBackend::new()).unwrap();
        let transaction = database.begin_write().unwrap();
        tables::create(&transaction).unwrap();
        let write = Write::new(&transaction);
        put_node(&write, before).unwrap();
        for (number, late) in lates {
            apply(&write, 2, *number, late.clone()).unwrap();
        }
        node(&write, before.id).unwrap().unwrap()
    }

    fn boot(boot: u8, after: Option<u8>) -> Late {
        let id = |byte| BootId::from_bytes([byte; 16]);
        Late::Boot { id: NodeId::from_bytes([1; 16]), boot: id(boot), plan: None, evidence: None, after: after.map(id) }
    }

    fn stages(node: &NodeRecord) -> Vec<(u8, bool)> {
        node.boots.iter().map(|record| (record.boot.as_bytes()[0], record.closed)).collect()
    }

    #[test]
    fn a_late_boot_takes_its_place_and_closes_no_newer_one() {
        for (name, before, late, after) in [
            ("the first", vec![], boot(1, None), vec![(1, false)]),
            ("the newest", vec![(1, false)], boot(2, Some(1)), vec![(1, true), (2, false)]),
            (
                "a newer one began elsewhere",
                vec![(1, true), (3, false)],
                boot(2, Some(1)),
                vec![(1, true), (2, true), (3, false)],
            ),
            (
                "it was agreed after all, and is over",
                vec![(1, true), (2, true)],
                boot(2, Some(1)),
                vec![(1, true), (2, true)],
            ),
        ] {
            assert_eq!(stages(&applied(&record(&before), &[(1, late)])), after, "{name}");
        }
    }

    #[test]
    fn the_newest_boot_that_came_to_its_end_is_not_forgotten() {
        let plan = |number: u8| Plan {
            deployment: DeploymentId::random(),
            profile: format!("p{number}").parse().unwrap(),
            generation: Sha256Digest([number; 32]),
        };
        let mut node = record(&[(1, true), (2, true), (3, true)]);
        for (number, record) in (1..).zip(&mut node.boots) {
            record.plan = Some(plan(number));
            record.booted = number < 3;
        }
        let last = node.boots[1].plan.clone();
        for number in 4..60 {
            boot_record(&mut node, BootId::from_bytes([number; 16]), false).plan = Some(plan(number));
        }
        assert_eq!(node.boots.len(), MAX_BOOTS);
        assert_eq!(node.boots.last().map(|record| record.boot), Some(BootId::from_bytes([59; 16])));
        assert!(last.is_some() && node.last_booted() == last.as_ref());
    }

    #[test]
    fn what_is_delivered_twice_is_taken_once() {
        let close = Late::CloseStage { id: NodeId::from_bytes([1; 16]), boot: BootId::from_bytes([1; 16]) };
        let node = applied(&record(&[]), &[(1, boot(1, None)), (2, close), (1, boot(1, None)), (2, boot(9, Some(1)))]);
        assert_eq!(stages(&node), [(1, true)]);
    }
}
