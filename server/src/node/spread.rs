//! Which member a node is to talk to first, so that nodes spread over the members and each member that is added takes its share of the boots.
//!
//! Every member gives a node the same order, without asking anybody: members that are near to the node first, of those the ones that are not
//! busier than others ([`crate::collective::busy`]), and among equals by rendezvous hashing (Thaler and Ravishankar, 1998), so that nearly all
//! nodes stay where they are when a member comes or goes.

use crate::state::Member;
use crate::store::StoreError;
use crate::store::records::MemberRecord;
use aws_lc_rs::digest::{Context, SHA256};
use moor_api::deploy::Cidr;
use moor_api::ids::{MemberId, NodeId};
use moor_api::node::MemberEndpoint;
use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

/// How much a node is for a member.
fn weight(node: NodeId, member: MemberId) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(b"moor/v1 spread");
    context.update(node.as_bytes());
    context.update(member.as_bytes());
    let mut weight = [0; 32];
    weight.copy_from_slice(context.finish().as_ref());
    weight
}

/// Whether `address` is in `network`, whatever bits of the host are set in that.
fn is_in(address: IpAddr, network: &Cidr) -> bool {
    let same = |a: u128, b: u128, bits: u32| {
        let shift = bits.saturating_sub(u32::from(network.prefix));
        a.checked_shr(shift) == b.checked_shr(shift)
    };
    match (address, network.address) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(u128::from(a.to_bits()), u128::from(b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
        _ => false,
    }
}

/// Members in the order in which the node `node`, which calls from `address`, is to try them: those that are not reached at the end.
fn order(
    mut members: Vec<Arc<MemberRecord>>,
    node: NodeId,
    address: Option<IpAddr>,
    is_lost: impl Fn(MemberId) -> bool,
    is_busy: impl Fn(MemberId) -> bool,
) -> Vec<MemberEndpoint> {
    members.sort_by_cached_key(|member| {
        let is_near = address.is_some_and(|address| member.near.iter().any(|network| is_in(address, network)));
        (is_lost(member.id), !is_near, is_busy(member.id), Reverse(weight(node, member.id)))
    });
    members.iter().map(|member| MemberEndpoint { id: member.id, urls: member.urls.clone() }).collect()
}

impl Member {
    /// Members for a node that calls from `address`, in the order in which it is to try them.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn endpoints_for(&self, node: NodeId, address: Option<IpAddr>) -> Result<Vec<MemberEndpoint>, StoreError> {
        let mut members = self.view()?.kept_members()?;
        members.retain(|member| !member.removed);
        if members.is_empty() {
            // It has not heard of the collective yet.
            return self.endpoints();
        }
        let lost = self.calls.lost();
        let busy = self.busy.members(self.identity.id, Instant::now());
        Ok(order(members, node, address, |member| lost.contains(&member), |member| busy.contains(&member)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const NODES: u32 = 1000;

    fn member(number: u8, near: &[&str]) -> Arc<MemberRecord> {
        Arc::new(MemberRecord {
            id: MemberId::from_bytes([number; 16]),
            near: near.iter().map(|network| network.parse().unwrap()).collect(),
            ..MemberRecord::only(
                Vec::new().into(),
                Vec::new().into(),
                format!("m{number}"),
                vec![format!("https://10.0.0.{number}")],
            )
        })
    }

    fn members(count: u8) -> Vec<Arc<MemberRecord>> {
        (1..=count).map(|number| member(number, &[])).collect()
    }

    fn node(number: u32) -> NodeId {
        let mut bytes = [0; 16];
        bytes[12..].copy_from_slice(&number.to_be_bytes());
        NodeId::from_bytes(bytes)
    }

    /// Numbers of the members, in the order for this node.
    fn ordered(members: &[Arc<MemberRecord>], number: u32, from: Option<&str>, lost: &[u8]) -> Vec<u8> {
        with_busy(members, number, from, lost, &[])
    }

    fn with_busy(members: &[Arc<MemberRecord>], number: u32, from: Option<&str>, lost: &[u8], busy: &[u8]) -> Vec<u8> {
        let from = from.map(|address| address.parse().unwrap());
        let is_in = |list: &[u8], id: MemberId| list.contains(&id.as_bytes()[0]);
        let order = order(members.to_vec(), node(number), from, |id| is_in(lost, id), |id| is_in(busy, id));
        order.into_iter().map(|endpoint| endpoint.id.as_bytes()[0]).collect()
    }

    /// How many nodes each member has.
    fn shares(members: &[Arc<MemberRecord>], lost: &[u8]) -> BTreeMap<u8, u32> {
        let mut shares = BTreeMap::new();
        for number in 0..NODES {
            *shares.entry(ordered(members, number, None, lost)[0]).or_default() += 1;
        }
        shares
    }

    #[test]
    fn nodes_are_spread_evenly() {
        for count in 1..=7 {
            let shares = shares(&members(count), &[]);
            let even = NODES / u32::from(count);
            assert_eq!(shares.len(), usize::from(count));
            let is_even = |share: &u32| (even * 3 / 4..=even * 5 / 4).contains(share);
            assert!(shares.values().all(is_even), "{shares:?}, and {even} is even");
        }
    }

    #[test]
    fn a_member_that_comes_takes_its_share_and_nobody_else_moves() {
        for count in 1..=6 {
            let (before, after) = (members(count), members(count + 1));
            let mut moved = 0;
            for number in 0..NODES {
                let (old, new) = (ordered(&before, number, None, &[]), ordered(&after, number, None, &[]));
                if old[0] != new[0] {
                    assert_eq!(new[0], count + 1, "node {number} went from {} to {}", old[0], new[0]);
                    moved += 1;
                }
            }
            let share = NODES / u32::from(count + 1);
            assert!((share * 3 / 4..=share * 5 / 4).contains(&moved), "{moved} moved, and {share} are its share");
        }
    }

    #[test]
    fn the_nodes_of_a_member_that_is_lost_are_spread_over_the_others() {
        let (members, before) = (members(4), shares(&members(4), &[]));
        let after = shares(&members, &[2]);
        assert!(!after.contains_key(&2));
        for number in [1, 3, 4] {
            let more = after[&number] - before[&number];
            assert!((50..=120).contains(&more), "member {number} has {more} more: {before:?}, {after:?}");
        }
        assert_eq!(ordered(&members, 7, None, &[2]).len(), 4, "it is still told of: it may be reached from there");
        assert_eq!(ordered(&members, 7, None, &[2])[3], 2);
    }

    #[test]
    fn a_busy_member_comes_behind_those_that_are_as_near_and_before_the_lost() {
        let members = members(4);
        let even = shares(&members, &[]);
        let mut more = BTreeMap::<u8, u32>::new();
        for number in 0..NODES {
            let (before, after) = (ordered(&members, number, None, &[]), with_busy(&members, number, None, &[], &[2]));
            assert_eq!(after[3], 2);
            // The others stay as they were.
            let others: Vec<u8> = before.iter().copied().filter(|member| *member != 2).collect();
            assert_eq!(after[..3], others);
            *more.entry(after[0]).or_default() += 1;
            // All alike: as if none were.
            assert_eq!(with_busy(&members, number, None, &[], &[1, 2, 3, 4]), before);
            let lost = with_busy(&members, number, None, &[3], &[2]);
            assert_eq!(lost[2..], [2, 3]);
        }
        for number in [1, 3, 4] {
            let more = more[&number] - even[&number];
            assert!((50..=120).contains(&more), "member {number} has {more} more");
        }
        // Near and busy is better than far.
        let members = [member(1, &["10.1.0.0/16"]), member(2, &["10.1.0.0/16"]), member(3, &[])];
        for number in 0..100 {
            assert_eq!(with_busy(&members, number, Some("10.1.0.9"), &[], &[2]), [1, 2, 3]);
        }
    }

    #[test]
    fn near_members_come_first_and_share_what_is_near() {
        let mut members = vec![member(1, &["10.1.0.0/16", "fd00:1::/64"]), member(2, &["10.1.7.9/16"]), member(3, &[])];
        members.push(member(4, &["10.2.0.0/16"]));
        for number in 0..100 {
            let order = ordered(&members, number, Some("10.1.200.3"), &[]);
            assert!(order[..2].contains(&1) && order[..2].contains(&2), "{order:?}");
            assert_eq!(ordered(&members, number, Some("fd00:1::77"), &[])[0], 1);
            assert_eq!(ordered(&members, number, Some("10.2.0.1"), &[])[0], 4);
            // Far, and there, is better than near and gone.
            assert_ne!(ordered(&members, number, Some("10.2.0.1"), &[4])[0], 4);
        }
        let first = |from| (0..NODES).map(|number| ordered(&members, number, from, &[])[0]).collect::<Vec<_>>();
        assert_eq!(first(Some("10.3.0.1")), first(None), "near to nobody");
        let ones = first(Some("10.1.0.1")).into_iter().map(|number| u32::from(number == 1)).sum::<u32>();
        assert!((400..=600).contains(&ones), "{ones}");
    }

    #[test]
    fn networks_are_compared_by_their_prefix() {
        for (address, network, expected) in [
            ("10.0.0.1", "10.0.0.0/8", true),
            ("11.0.0.1", "10.0.0.0/8", false),
            ("10.0.0.1", "10.0.0.1/32", true),
            ("10.0.0.2", "10.0.0.1/32", false),
            ("192.0.2.1", "0.0.0.0/0", true),
            ("192.0.2.1", "::/0", false),
            ("fd00::1", "::/0", true),
            ("fd00::1", "fd00::/64", true),
            ("fd00:0:0:1::1", "fd00::/64", false),
        ] {
            assert_eq!(is_in(address.parse().unwrap(), &network.parse().unwrap()), expected, "{address} in {network}");
        }
    }
}
