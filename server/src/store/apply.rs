//! The state machine: applies a command inside one write transaction. Deterministic: no clock, no randomness, no order of a hash map.
//! A command that is refused has changed nothing, because every check comes before the first write (that it was asked for may be in the audit log).

use super::command::{Command, Outcome};
use super::records::{
    Armed, BOOTED, BootRecord, Evidence, Identity, ImageRecord, MAX_EVENTS, MAX_LOG_BYTES, MAX_LOGS, MAX_REFUSALS,
    MAX_STRANGERS, NodeRecord, Order, Plan, ProfileRecord, Refusals,
};
use super::tables::{self, Write};
use super::{Event, StoreError, audit, authorities, index, keys, late, level, members};
use moor_api::admin::{LogEvent, Refusal, StatusEvent};
use moor_api::ids::{BootId, ImageDigest, NodeId, NodeName};
use moor_api::problem::{Code, Problem};
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn refused(code: Code, detail: impl Into<String>) -> Outcome {
    Outcome::Refused(Problem::new(code, detail))
}

fn no_such_node() -> Outcome {
    refused(Code::NotFound, "the node was removed meanwhile")
}

/// Applies one command. One that is above the collective's level is refused, whoever proposed it: every member finds the same.
pub(super) fn apply(write: &Write<'_>, command: Command) -> Result<Outcome, StoreError> {
    match level::within(command, || level::of(write))? {
        Ok((command, refused)) => {
            let outcome = done(write, command)?;
            Ok(refused.map_or(outcome, Outcome::Refused))
        }
        Err(problem) => Ok(Outcome::Refused(problem)),
    }
}

fn done(write: &Write<'_>, command: Command) -> Result<Outcome, StoreError> {
    match command {
        Command::Found { site, founder, keys } => {
            if write.get::<serde_json::Value>(tables::SITE, "site")?.is_some() {
                return Ok(refused(Code::Conflict, "the collective exists already"));
            }
            write.put(tables::SITE, "site", &site)?;
            keys::put(write, &keys)?;
            members::found(write, &founder)
        }
        Command::Anew { number, member, keys } => members::anew(write, number, &member, &keys),
        Command::Invite { id, invite, now } => {
            if let Some(refusal) = keys::outdated(write, [&invite.secret].into_iter())? {
                return Ok(refusal);
            }
            members::invite(write, id, &invite, now)
        }
        Command::Join { invite, member, key, unwrap, keys, urls, now, level, trust, ssh } => {
            let guest = members::Guest { id: member, key, unwrap, keys, urls, level, trust, ssh };
            members::join(write, invite, guest, now)
        }
        Command::MoveMember { number, urls, near } => members::change(write, number, |member| {
            member.urls = urls;
            member.near = near;
        }),
        Command::TellLevel { number, level } => members::tell_level(write, number, level),
        Command::RaiseLevel { level } => level::raise(write, level),
        Command::SetVoter { number, voter } => members::set_voter(write, number, voter),
        Command::RemoveMember { number } => members::remove(write, number),
        Command::RotateKeys { new } => keys::rotate(write, new),
        Command::Reseal { secrets } => keys::reseal(write, secrets),
        Command::DropKeys { version } => keys::drop_version(write, version),
        Command::Authorities { change } => authorities::apply(write, change),
        Command::DefineNode { id, name, attributes } => define(write, id, name, attributes),
        Command::RemoveNode { id } => remove_node(write, id),
        Command::SetAttributes { id, set, secrets, clear } => {
            if let Some(refusal) = keys::outdated(write, secrets.values())? {
                return Ok(refusal);
            }
            let Some(before) = node(write, id)? else { return Ok(no_such_node()) };
            let mut node = before.clone();
            for name in &clear {
                node.attributes.remove(name);
                node.secrets.remove(name);
            }
            node.attributes.extend(set);
            node.secrets.extend(secrets);
            index::update(write, Some(&before), Some(&node))?;
            put_node(write, &node)?;
            Ok(Outcome::Done)
        }
        Command::Arm { id, armed } => change(write, id, |node| node.armed = armed),
        Command::Rearm { id } => {
            let Some(before) = node(write, id)? else { return Ok(no_such_node()) };
            let forgotten = NodeRecord { identity: None, boots: Vec::new(), trust: None, ..before.clone() };
            let mut node = NodeRecord { armed: Armed::Once, ..forgotten };
            node.epoch = next(write, "epoch")?;
            index::update(write, Some(&before), Some(&node))?;
            put_node(write, &node)?;
            Ok(Outcome::Number(node.epoch))
        }
        Command::Deploy { id, deployment, profile, time_ms } => {
            deploy(write, id, Order { id: deployment, profile }, time_ms)
        }
        Command::Bind { id, identity, boot, now } => bind(write, id, identity, boot, now),
        Command::Boot { id, boot, evidence } => begin_boot(write, id, boot, evidence),
        Command::CloseStage { id, boot } => change(write, id, |node| boot_record(node, boot, true).closed = true),
        Command::Pin { id, digest } => {
            if write.get::<ImageRecord>(tables::IMAGES, &digest.to_string())?.is_none() {
                return Ok(refused(Code::NotFound, format!("image {digest} is not in the catalogue")));
            }
            change(write, id, |node| node.pin = Some(digest))
        }
        Command::Status { id, sequence, event } => status(write, id, sequence, event),
        Command::Log { id, event } => log(write, id, event),
        Command::Refuse { nodes, strangers, refusal } => refuse(write, &nodes, &strangers, &refusal),
        Command::PutImage { image } => put_image(write, &image),
        Command::OfferImage { digest } => offer_image(write, digest),
        Command::PutProfile { profile } => put_profile(write, profile),
        Command::PutToken { hash, token } => {
            write.put(tables::TOKENS, &hash, &token)?;
            Ok(Outcome::Done)
        }
        Command::Late { member, number, what } => late::apply(write, member, number, what),
        Command::NextCertificate => Ok(Outcome::Number(next(write, "ssh-certificate")?)),
        Command::Audit { entry } => audit::append(write, &entry),
        Command::Audited { entry, change } => {
            audit::append(write, &entry)?;
            done(write, *change)
        }
    }
}

fn remove_node(write: &Write<'_>, id: NodeId) -> Result<Outcome, StoreError> {
    let Some(node) = node(write, id)? else { return Ok(no_such_node()) };
    index::update(write, Some(&node), None)?;
    write.remove(tables::NAMES, node.name.as_str())?;
    for table in [tables::NODES, tables::EVENTS, tables::LOGS, tables::REFUSALS] {
        write.remove(table, &id.to_string())?;
    }
    Ok(Outcome::Done)
}

fn offer_image(write: &Write<'_>, digest: ImageDigest) -> Result<Outcome, StoreError> {
    let key = digest.to_string();
    let Some(image) = write.get::<ImageRecord>(tables::IMAGES, &key)? else {
        return Ok(refused(Code::NotFound, format!("image {digest} is not in the catalogue")));
    };
    write.put(tables::IMAGES, &key, &ImageRecord { offered: true, ..image })?;
    Ok(Outcome::Done)
}

fn define(
    write: &Write<'_>,
    id: NodeId,
    name: NodeName,
    attributes: BTreeMap<String, String>,
) -> Result<Outcome, StoreError> {
    if write.get::<NodeId>(tables::NAMES, name.as_str())?.is_some() {
        return Ok(refused(Code::Conflict, format!("a node '{name}' exists already: `moor node set` changes it")));
    }
    write.put(tables::NAMES, name.as_str(), &id)?;
    let record = NodeRecord {
        id,
        name,
        attributes,
        secrets: BTreeMap::default(),
        identity: None,
        epoch: next(write, "epoch")?,
        armed: Armed::No,
        deployment: None,
        pin: None,
        boots: Vec::new(),
        trust: None,
    };
    index::update(write, None, Some(&record))?;
    put_node(write, &record)?;
    Ok(Outcome::Done)
}

fn deploy(write: &Write<'_>, id: NodeId, order: Order, time_ms: u64) -> Result<Outcome, StoreError> {
    let Some(mut node) = node(write, id)? else { return Ok(no_such_node()) };
    let event = StatusEvent {
        node: node.name.clone(),
        boot: None,
        state: "pending".into(),
        detail: order.profile.to_string(),
        time_ms,
        uptime_ms: 0,
        figures: BTreeMap::default(),
    };
    node.deployment = Some(order);
    put_node(write, &node)?;
    tell(write, id, event)?;
    Ok(Outcome::Done)
}

pub(super) fn node(write: &Write<'_>, id: NodeId) -> Result<Option<NodeRecord>, StoreError> {
    write.get(tables::NODES, &id.to_string())
}

pub(super) fn put_node(write: &Write<'_>, node: &NodeRecord) -> Result<(), StoreError> {
    write.put(tables::NODES, &node.id.to_string(), node)
}

fn change(write: &Write<'_>, id: NodeId, edit: impl FnOnce(&mut NodeRecord)) -> Result<Outcome, StoreError> {
    let Some(mut node) = node(write, id)? else { return Ok(no_such_node()) };
    edit(&mut node);
    put_node(write, &node)?;
    Ok(Outcome::Done)
}

/// The next number of a counter of the collective; never given twice.
pub(super) fn next(write: &Write<'_>, counter: &str) -> Result<u64, StoreError> {
    let value = write.get::<u64>(tables::COUNTERS, counter)?.unwrap_or(0) + 1;
    write.put(tables::COUNTERS, counter, &value)?;
    Ok(value)
}

/// The record of a boot. One that is made anew (it was never there, or so many boots ago that it was dropped) is `closed` from the
/// beginning, unless a boot stage begins with it.
pub(super) fn boot_record(node: &mut NodeRecord, boot: BootId, closed: bool) -> &mut BootRecord {
    let at = if let Some(at) = node.boots.iter().position(|record| record.boot == boot) {
        at
    } else {
        node.forget_oldest_boot();
        node.boots.push(BootRecord::new(boot, closed));
        node.boots.len() - 1
    };
    &mut node.boots[at]
}

fn begin_boot(write: &Write<'_>, id: NodeId, boot: BootId, evidence: Option<Evidence>) -> Result<Outcome, StoreError> {
    let Some(mut node) = node(write, id)? else { return Ok(no_such_node()) };
    let plan = match &node.deployment {
        None => None,
        Some(order) => write.get::<ProfileRecord>(tables::PROFILES, order.profile.as_str())?.map(|profile| Plan {
            deployment: order.id,
            profile: profile.name,
            generation: profile.generation,
        }),
    };
    if node.boots.iter().any(|record| record.boot == boot && record.closed) {
        return Ok(refused(Code::StageClosed, super::closed(&node.name)));
    }
    for other in node.boots.iter_mut().filter(|record| record.boot != boot) {
        other.closed = true;
    }
    node.forget_trust(boot);
    let record = boot_record(&mut node, boot, false);
    record.plan = plan;
    if evidence.is_some() {
        record.evidence = evidence;
    }
    put_node(write, &node)?;
    Ok(Outcome::Done)
}

fn bind(write: &Write<'_>, id: NodeId, mut identity: Identity, boot: BootId, now: u64) -> Result<Outcome, StoreError> {
    let Some(before) = node(write, id)? else { return Ok(no_such_node()) };
    let mut node = before.clone();
    if let Some(bound) = &node.identity {
        if bound.same_holder(&identity) {
            // The same machine once more, because the answer was lost: the window may be closed by now.
            return Ok(Outcome::Number(node.epoch));
        }
        if !bound.gives_way(&identity, node.armed) {
            return Ok(refused(Code::IdentityMismatch, super::mismatch(&node.name, bound, &identity)));
        }
    }
    if !node.armed.is_open(now) {
        return Ok(refused(Code::NotArmed, super::not_armed(&node.name)));
    }
    if let Some(other) = index::holder_of_key(write, &identity, id)? {
        let name = self::node(write, other)?.map_or_else(|| other.to_string(), |other| other.name.to_string());
        return Ok(refused(
            Code::IdentityMismatch,
            format!(
                "the identity of this machine is that of node {name}: a machine is one node (`moor node trust rearm {name}` drops it there)"
            ),
        ));
    }
    if let Identity::Soft { unproven, .. } = &mut identity {
        *unproven = node.armed == Armed::Continuous;
    }
    node.epoch = next(write, "epoch")?;
    node.identity = Some(identity);
    if node.armed == Armed::Once {
        node.armed = Armed::No;
    }
    boot_record(&mut node, boot, false);
    index::update(write, Some(&before), Some(&node))?;
    put_node(write, &node)?;
    Ok(Outcome::Number(node.epoch))
}

pub(super) fn status(
    write: &Write<'_>,
    id: NodeId,
    sequence: Option<u64>,
    event: StatusEvent,
) -> Result<Outcome, StoreError> {
    let Some(mut node) = node(write, id)? else { return Ok(no_such_node()) };
    if let (Some(sequence), Some(boot)) = (sequence, event.boot) {
        let record = boot_record(&mut node, boot, true);
        if record.sequence.is_some_and(|last| sequence <= last) {
            return Ok(Outcome::Done);
        }
        record.sequence = Some(sequence);
        record.booted |= event.state == BOOTED;
        let booted = record.plan.as_ref().filter(|_| event.state == BOOTED).map(|plan| plan.profile.to_string());
        if let Some(profile) = booted {
            node.attributes.insert("deployment.profile".into(), profile);
        }
        put_node(write, &node)?;
    }
    tell(write, id, event)?;
    Ok(Outcome::Done)
}

pub(super) fn log(write: &Write<'_>, id: NodeId, event: LogEvent) -> Result<Outcome, StoreError> {
    if node(write, id)?.is_none() {
        return Ok(no_such_node());
    }
    let key = id.to_string();
    let mut list: Vec<LogEvent> = write.get(tables::LOGS, &key)?.unwrap_or_default();
    list.push(event);
    let mut bytes: usize = list.iter().map(|event| event.text.len()).sum();
    let mut drop = list.len().saturating_sub(MAX_LOGS);
    bytes -= list[..drop].iter().map(|event| event.text.len()).sum::<usize>();
    // The newest stays, however long it is.
    while bytes > MAX_LOG_BYTES && drop + 1 < list.len() {
        bytes -= list[drop].text.len();
        drop += 1;
    }
    list.drain(..drop);
    write.put(tables::LOGS, &key, &list)?;
    Ok(Outcome::Done)
}

/// Keeps an event and tells the watchers.
pub(super) fn tell(write: &Write<'_>, id: NodeId, event: StatusEvent) -> Result<(), StoreError> {
    let key = id.to_string();
    let mut list: Vec<StatusEvent> = write.get(tables::EVENTS, &key)?.unwrap_or_default();
    if list.len() >= MAX_EVENTS {
        list.drain(..=list.len() - MAX_EVENTS);
    }
    list.push(event.clone());
    write.tell(Event::Status { node: id, status: event });
    write.put(tables::EVENTS, &key, &list)
}

fn refuse(write: &Write<'_>, nodes: &[NodeId], strangers: &[String], refusal: &Refusal) -> Result<Outcome, StoreError> {
    for id in nodes {
        // A node that was removed meanwhile leaves nothing that nobody would ever remove.
        if node(write, *id)?.is_some() {
            add_refusal(write, &id.to_string(), refusal)?;
        }
    }
    for subject in strangers {
        if write.get::<Refusals>(tables::REFUSALS, subject)?.is_none() {
            let number = next(write, "stranger")?;
            write.put(tables::STRANGERS, &ordered_key(number), subject)?;
            if write.count(tables::STRANGERS)? > MAX_STRANGERS as u64
                && let Some(oldest) = write.pop_first::<String>(tables::STRANGERS)?
            {
                write.remove(tables::REFUSALS, &oldest)?;
            }
        }
        add_refusal(write, subject, refusal)?;
    }
    Ok(Outcome::Done)
}

/// Adds one to a subject's list; one equal to the last is counted there.
fn add_refusal(write: &Write<'_>, subject: &str, refusal: &Refusal) -> Result<(), StoreError> {
    let mut refusals: Refusals = write.get(tables::REFUSALS, subject)?.unwrap_or_default();
    match refusals.list.last_mut() {
        Some(last) if last.problem == refusal.problem && last.call == refusal.call => {
            last.count = last.count.saturating_add(refusal.count);
            last.time_ms = refusal.time_ms;
            last.peer.clone_from(&refusal.peer);
        }
        _ => {
            if refusals.list.len() >= MAX_REFUSALS {
                refusals.list.remove(0);
            }
            refusals.list.push(refusal.clone());
        }
    }
    write.put(tables::REFUSALS, subject, &refusals)
}

/// A profile's newest generation. Older ones stay as long as a boot that is remembered began with them.
fn put_profile(write: &Write<'_>, mut profile: ProfileRecord) -> Result<Outcome, StoreError> {
    if let Some(refusal) = keys::outdated(write, profile.manifest.private.values())? {
        return Ok(refusal);
    }
    let before: Option<ProfileRecord> = write.get(tables::PROFILES, profile.name.as_str())?;
    profile.serial = before.map_or(0, |before| before.serial) + 1;
    let nodes: Vec<NodeRecord> = write.all(tables::NODES)?;
    let in_use: BTreeSet<_> = nodes
        .iter()
        .flat_map(|node| &node.boots)
        .filter_map(|boot| boot.plan.as_ref())
        .map(|plan| plan.generation)
        .collect();
    for old in write.all::<ProfileRecord>(tables::GENERATIONS)? {
        if old.name == profile.name && !in_use.contains(&old.generation) {
            write.remove(tables::GENERATIONS, &old.generation.to_string())?;
        }
    }
    write.put(tables::PROFILES, profile.name.as_str(), &profile)?;
    write.put(tables::GENERATIONS, &profile.generation.to_string(), &profile)?;
    Ok(Outcome::Number(profile.serial))
}

fn put_image(write: &Write<'_>, image: &ImageRecord) -> Result<Outcome, StoreError> {
    if let Some(same) = write.get::<ImageRecord>(tables::IMAGES, &image.digest.to_string())? {
        if (&same.name, same.blob) == (&image.name, image.blob) {
            // Its content may have been lost, and was sent anew; or its key does not open any more, and this one opens the image.
            if image.key.is_some() {
                if let Some(refusal) = keys::outdated(write, image.key.iter())? {
                    return Ok(refusal);
                }
                write.put(
                    tables::IMAGES,
                    &image.digest.to_string(),
                    &ImageRecord { key: image.key.clone(), ..same },
                )?;
            }
            return Ok(Outcome::Done);
        }
        return Ok(refused(
            Code::Conflict,
            format!("image {} is in the catalogue already, as {} @{}", image.digest, same.name, same.serial),
        ));
    }
    if let Some(refusal) = keys::outdated(write, image.key.iter())? {
        return Ok(refusal);
    }
    let others: Vec<ImageRecord> = write.all(tables::IMAGES)?;
    for other in others.iter().filter(|other| other.name == image.name) {
        if other.lineage != image.lineage {
            return Ok(refused(
                Code::Conflict,
                format!(
                    "'{}' has lineage {}, this image has {}: pack it with `--lineage {0} --serial N`, or import it under another name",
                    image.name, other.lineage, image.lineage
                ),
            ));
        }
        if other.serial >= image.serial {
            return Ok(refused(
                Code::Conflict,
                format!(
                    "'{}' has generation @{} already, this one is @{}: pack it with a larger `--serial`",
                    image.name, other.serial, image.serial
                ),
            ));
        }
    }
    write.put(tables::IMAGES, &image.digest.to_string(), image)?;
    Ok(Outcome::Done)
}

/// Zero-padded, so that the order of keys is the order of lines.
pub(super) fn ordered_key(number: u64) -> String {
    format!("{number:020}")
}
