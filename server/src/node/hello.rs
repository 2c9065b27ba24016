//! `hello`: which node is this machine, and what may it do next?

use super::refusals::Subject;
use super::{recorded, refusals};
use crate::http::{Connection, Failure, Peer, clean, parse};
use crate::state::{Member, now};
use crate::store::records::{Armed, Identity, NodeRecord};
use crate::store::{Snapshot, index, not_armed};
use axum::Json;
use axum::extract::{Extension, State};
use bytes::Bytes;
use moor_api::ids::NodeId;
use moor_api::node::{Hello, HelloReply, KnownNode, MAX_MACS, NextStep, PcrRequest};
use moor_api::problem::{Code, Problem};
use std::collections::BTreeSet;
use std::sync::Arc;
use uuid::Uuid;

/// What a quote selects: firmware and boot loader (0 to 9), shim's keys (14), the stage (15).
pub(crate) const QUOTED_PCRS: [u8; 12] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 15];

/// UUIDs that vendors leave in whole series of boards.
const DUMMY_UUIDS: [&str; 7] = [
    "03000200-0400-0500-0006-000700080009",
    "00020003-0004-0005-0006-000700080009",
    "03020100-0504-0706-0809-0a0b0c0d0e0f",
    "12345678-1234-5678-90ab-cddeefaabbcc",
    "01234567-8910-1112-1314-151617181920",
    "fefefefe-fefe-fefe-fefe-fefefefefefe",
    "4c4c4544-0000-2010-8020-80c04f202020",
];

/// Serial numbers of the same kind, in lower case.
const DUMMY_SERIALS: [&str; 12] = [
    "to be filled by o.e.m.",
    "default string",
    "system serial number",
    "not specified",
    "not applicable",
    "none",
    "n/a",
    "unknown",
    "0123456789",
    "123456789",
    "1234567890",
    "empty",
];

fn is_dummy_uuid(uuid: Uuid) -> bool {
    uuid.is_nil() || uuid.is_max() || DUMMY_UUIDS.contains(&uuid.to_string().as_str())
}

fn is_dummy_serial(serial: &str) -> bool {
    let serial = serial.trim().to_ascii_lowercase();
    serial.chars().all(|c| matches!(c, '0' | '.' | '-' | 'x' | ' ')) || DUMMY_SERIALS.contains(&serial.as_str())
}

/// Which nodes a machine may be, by what it says of itself. The serial number decides only where nothing else does: blades of one
/// enclosure may share it.
fn candidates(view: &Snapshot, hello: &Hello) -> Result<BTreeSet<NodeId>, Failure> {
    let mut found = BTreeSet::new();
    if let Some(uuid) = hello.uuid.filter(|uuid| !is_dummy_uuid(*uuid)) {
        found.extend(view.indexed(&index::uuid(&uuid.to_string()))?);
    }
    for mac in &hello.macs {
        found.extend(view.indexed(&index::hwaddr(mac.as_str()))?);
    }
    if found.is_empty()
        && let Some(serial) = hello.serial.as_deref().filter(|serial| !is_dummy_serial(serial))
    {
        found.extend(view.indexed(&index::serial(serial))?);
    }
    Ok(found)
}

/// The one node that a machine is, or why it is none.
fn identify(view: &Snapshot, hello: &Hello) -> Result<Result<NodeRecord, (Vec<NodeId>, Problem)>, Failure> {
    let mut nodes = Vec::new();
    for id in candidates(view, hello)? {
        nodes.extend(view.node(id)?);
    }
    let ids: Vec<NodeId> = nodes.iter().map(|node| node.id).collect();
    if nodes.len() > 1 {
        let names: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
        let detail = format!(
            "this machine is more than one node by its UUID and MACs: {}. Correct id.uuid or net.*.hwaddr of all but one",
            names.join(", ")
        );
        return Ok(Err((ids, Problem::new(Code::Ambiguous, detail))));
    }
    let Some(node) = nodes.pop() else {
        let mut known: Vec<String> = hello.uuid.iter().map(|uuid| format!("UUID {uuid}")).collect();
        if let Some(uuid) = hello.uuid.filter(|uuid| is_dummy_uuid(*uuid)) {
            known = vec![format!("UUID {uuid}, which many machines have")];
        }
        known.extend(hello.macs.iter().take(8).map(|mac| format!("MAC {mac}")));
        known.extend(hello.serial.iter().take(1).map(|serial| format!("serial number '{}'", clean(serial, 64))));
        let detail = format!(
            "no node is this machine ({}): define one with `moor node define NAME id.uuid=… net.hwaddr=…`",
            known.join(", ")
        );
        return Ok(Err((ids, Problem::new(Code::UnknownNode, detail))));
    };
    let wanted = node.attributes.get("id.uuid").and_then(|uuid| Uuid::parse_str(uuid).ok());
    if let (Some(wanted), Some(said)) = (wanted, hello.uuid.filter(|uuid| !is_dummy_uuid(*uuid)))
        && wanted != said
        && !is_dummy_uuid(wanted)
    {
        let detail = format!(
            "this machine has a MAC of node {0}, but UUID {said} where {0} has {wanted}: if the board was replaced, `moor node set {0} id.uuid={said}`",
            node.name
        );
        return Ok(Err((ids, Problem::new(Code::IdentityMismatch, detail))));
    }
    Ok(Ok(node))
}

/// What comes next for a node.
pub(crate) fn next_step(node: &NodeRecord, now: u64) -> Result<NextStep, Problem> {
    let open = node.armed.is_open(now);
    match &node.identity {
        Some(Identity::Tpm { .. }) => Ok(NextStep::SessionTpm),
        // A machine that keeps no key makes a new one at each boot, as long as it may.
        Some(Identity::Soft { unproven: true, .. }) if node.armed == Armed::Continuous => Ok(NextStep::Enroll),
        Some(Identity::Soft { .. }) => Ok(NextStep::SessionSoft),
        None if open => Ok(NextStep::Enroll),
        None => Err(Problem::new(Code::NotArmed, not_armed(&node.name))),
    }
}

/// What a quote of this node has to select.
pub(crate) fn quote_request(node: &NodeRecord) -> PcrRequest {
    let bank = if let Some(Identity::Tpm { bank, .. }) = &node.identity { Some(*bank) } else { None };
    PcrRequest { bank, pcrs: QUOTED_PCRS.to_vec() }
}

pub(super) async fn hello(
    State(member): State<Arc<Member>>,
    Extension(connection): Extension<Connection>,
    body: Bytes,
) -> Result<Json<HelloReply>, Failure> {
    let peer = &connection.peer;
    if peer.ip().is_some_and(|ip| !member.hellos.allow(ip)) {
        let problem = Problem::new(Code::RateLimited, "too many hellos from this address: wait a few seconds");
        return recorded(&member, peer, "POST hello", &Subject::default(), Err(Failure(problem))).await;
    }
    let parsed = parse::<Hello>(&body).and_then(|hello| {
        if hello.macs.len() > MAX_MACS {
            return Err(Failure(Problem::new(
                Code::BadRequest,
                format!("a hello has at most {MAX_MACS} hardware addresses"),
            )));
        }
        Ok(hello)
    });
    let hello = recorded(&member, peer, "POST hello", &Subject::default(), parsed).await?;
    Ok(Json(answer(&member, peer, &hello).await?))
}

async fn answer(member: &Member, peer: &Peer, hello: &Hello) -> Result<HelloReply, Failure> {
    let mut reply = HelloReply {
        collective: member.site.collective,
        member: member.identity.id,
        node: None,
        refusal: None,
        members: member.endpoints()?,
        time: now(),
    };
    let outcome = match identify(&member.view()?, hello)? {
        Ok(node) => {
            reply.members = member.endpoints_for(node.id, peer.ip())?;
            next_step(&node, reply.time).map(|next| (node.clone(), next)).map_err(|problem| (vec![node.id], problem))
        }
        Err(refused) => Err(refused),
    };
    match outcome {
        Ok((node, next)) => {
            let nonce = member.nonces.issue(node.id)?;
            let quote = quote_request(&node);
            reply.node = Some(KnownNode { id: node.id, name: node.name, next, nonce, quote });
        }
        Err((nodes, problem)) => {
            let subject = Subject { nodes, uuid: hello.uuid, macs: hello.macs.clone() };
            refusals::record(member, peer, "POST hello", &subject, &problem).await;
            reply.refusal = Some(problem);
        }
    }
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_many_boards_share_is_a_dummy() {
        for uuid in [
            "00000000-0000-0000-0000-000000000000",
            "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
            "03000200-0400-0500-0006-000700080009",
        ] {
            assert!(is_dummy_uuid(Uuid::parse_str(uuid).unwrap()), "{uuid}");
        }
        assert!(!is_dummy_uuid(Uuid::parse_str("5f1e7a52-30a3-4f6c-9d3e-6c2f9a1b0c01").unwrap()));
        for serial in [
            "",
            " ",
            "0",
            "00000000",
            "To Be Filled By O.E.M.",
            "Default string",
            "None",
            "..................",
            "System Serial Number",
        ] {
            assert!(is_dummy_serial(serial), "{serial}");
        }
        for serial in ["CZ1234ABCD", "7XK9012", "VM-1"] {
            assert!(!is_dummy_serial(serial), "{serial}");
        }
    }
}
