//! Which nodes a machine may be: node ids by UUID, hardware address and serial number, and by the keys that are bound. Kept beside the
//! records in the same transaction, so that a hello costs a few look-ups however many nodes there are.

use super::StoreError;
use super::records::{Identity, NodeRecord};
use super::tables::{self, Write};
use aws_lc_rs::digest;
use moor_api::ids::NodeId;
use std::collections::BTreeSet;

/// The key of a system UUID.
#[must_use]
pub fn uuid(text: &str) -> String {
    format!("uuid:{text}")
}

/// The key of a hardware address.
#[must_use]
pub fn hwaddr(text: &str) -> String {
    format!("hwaddr:{text}")
}

/// The key of a serial number.
#[must_use]
pub fn serial(text: &str) -> String {
    format!("serial:{}", text.trim())
}

/// The key of a bound identity: what cannot be the same in two machines.
fn identity(identity: &Identity) -> String {
    let bytes = match identity {
        Identity::Tpm { ek_public, .. } => &ek_public.0,
        Identity::Soft { public_key, .. } => &public_key.0,
    };
    format!("identity:{}", hex::encode(digest::digest(&digest::SHA256, bytes)))
}

fn keys_of(node: &NodeRecord) -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for (name, value) in node.attributes.iter().filter(|(_, value)| !value.is_empty()) {
        match name.as_str() {
            "id.uuid" => keys.insert(uuid(value)),
            "id.serial" => keys.insert(serial(value)),
            name if name.starts_with("net.") && name.ends_with(".hwaddr") => keys.insert(hwaddr(value)),
            _ => false,
        };
    }
    keys.extend(node.identity.as_ref().map(identity));
    keys
}

/// Brings the index from what a node was to what it is.
pub(super) fn update(
    write: &Write<'_>,
    before: Option<&NodeRecord>,
    after: Option<&NodeRecord>,
) -> Result<(), StoreError> {
    let (old, new) = (before.map(keys_of).unwrap_or_default(), after.map(keys_of).unwrap_or_default());
    let Some(id) = after.or(before).map(|node| node.id) else { return Ok(()) };
    for key in old.difference(&new) {
        let mut ids: BTreeSet<NodeId> = write.get(tables::INDEX, key)?.unwrap_or_default();
        ids.remove(&id);
        if ids.is_empty() {
            write.remove(tables::INDEX, key)?;
        } else {
            write.put(tables::INDEX, key, &ids)?;
        }
    }
    for key in new.difference(&old) {
        let mut ids: BTreeSet<NodeId> = write.get(tables::INDEX, key)?.unwrap_or_default();
        ids.insert(id);
        write.put(tables::INDEX, key, &ids)?;
    }
    Ok(())
}

/// Another node than `id` that this identity is bound to.
pub(super) fn holder_of_key(write: &Write<'_>, of: &Identity, id: NodeId) -> Result<Option<NodeId>, StoreError> {
    let ids: BTreeSet<NodeId> = write.get(tables::INDEX, &identity(of))?.unwrap_or_default();
    Ok(ids.into_iter().find(|holder| *holder != id))
}
