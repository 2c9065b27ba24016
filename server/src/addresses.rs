//! How many connections one client may hold, so that none takes the places of all others.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The connections of each client. A client is an IPv4 address, or a network of IPv6 with a prefix of 64 bits: who has one address of it has
/// all (RFC 4291 §2.5.4).
#[derive(Debug)]
pub(crate) struct Addresses {
    most: u32,
    held: Mutex<HashMap<IpAddr, u32>>,
}

/// A connection that is counted as long as this lives.
#[derive(Debug)]
pub(crate) struct Place {
    addresses: Arc<Addresses>,
    client: IpAddr,
}

/// The client that an address belongs to.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        IpAddr::V4(address) => address.into(),
    }
}

impl Addresses {
    /// At most so many for each.
    pub(crate) fn new(most: u32) -> Arc<Self> {
        Arc::new(Self { most, held: Mutex::default() })
    }

    fn held(&self) -> MutexGuard<'_, HashMap<IpAddr, u32>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more; `None`: it has all that it may have.
    pub(crate) fn place(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let client = client(address);
        let mut held = self.held();
        let count = held.entry(client).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Place { addresses: self.clone(), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.addresses.held().entry(self.client) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_its_own_places_and_leaves_nothing() {
        let addresses = Addresses::new(2);
        let place = |address: &str| addresses.place(address.parse().unwrap());
        let held: Vec<_> = [place("10.0.0.1"), place("::ffff:10.0.0.1")].into_iter().flatten().collect();
        assert_eq!(held.len(), 2);
        assert!(place("10.0.0.1").is_none(), "mapped or not, it is the same");
        let other = place("10.0.0.2");
        assert!(other.is_some());
        let network = [place("2001:db8:0:1::1"), place("2001:db8:0:1:ffff::2")];
        assert!(network.iter().all(Option::is_some));
        assert!(place("2001:db8:0:1::3").is_none(), "one network");
        assert!(place("2001:db8:0:2::3").is_some());
        drop(held);
        assert!(place("10.0.0.1").is_some());
        drop((other, network));
        assert!(addresses.held().is_empty());
    }
}
