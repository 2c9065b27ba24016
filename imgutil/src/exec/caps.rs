//! Capabilities: what root inside an image may still do.
//!
//! A list of what stays, not of what goes: a capability that a later kernel adds is not handed out by oversight.
//! `SYS_ADMIN` must go or a read-only bind could be remounted writable; `DAC_READ_SEARCH` must go because it opens any
//! file of the host's filesystems by handle; `NET_ADMIN` and `NET_RAW` because the network is the host's.

use rustix::thread::{CapabilitySet, CapabilitySets};
use std::io;

/// What package managers and their scripts need.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::AUDIT_WRITE);

/// Why capabilities could not be dropped.
#[derive(Debug, thiserror::Error)]
#[error("cannot drop capabilities: {0}")]
pub(super) struct CapsError(#[from] io::Error);

/// Leaves this process, and all it will start, with [`KEPT`] at most.
pub(super) fn drop_all_but_kept() -> Result<(), CapsError> {
    use rustix::thread;
    // The bounding set first: changing it needs SETPCAP in the effective set, which the call after this may take away.
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        // EINVAL marks the end of what this kernel knows.
        let Ok(present) = thread::capability_is_in_bounding_set(one) else { break };
        if present && !KEPT.contains(one) {
            thread::remove_capability_from_bounding_set(one).map_err(io::Error::from)?;
        }
    }
    thread::clear_ambient_capability_set().map_err(io::Error::from)?;
    let kept = thread::capabilities(None).map_err(io::Error::from)?.permitted.intersection(KEPT);
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    thread::set_capabilities(None, sets).map_err(io::Error::from)?;
    Ok(())
}
