//! Who a client is, before anybody has proven who he is: an address, and with IPv6 a network around it. And how many connections each may hold, so
//! that none takes the places of all others.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The client that an address belongs to. It is the address: a flat network of a cluster is one prefix of 64 bits, and `fe80::/64` is one as well.
pub(crate) fn client(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// The network of a client: of IPv6 the prefix of 64 bits, because who has one address of it can have all (RFC 4291 §2.5.4). Together its clients
/// are kept to much more than one is, and to less than there is for all.
pub(crate) fn network(client: IpAddr) -> Option<IpAddr> {
    match client {
        IpAddr::V6(address) => Some(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()),
        IpAddr::V4(_) => None,
    }
}

/// The connections of each client, and of each network.
#[derive(Debug)]
pub(crate) struct Addresses {
    most: u32,
    most_of_network: u32,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    clients: HashMap<IpAddr, u32>,
    networks: HashMap<IpAddr, u32>,
}

/// A connection that is counted as long as this lives.
#[derive(Debug)]
pub(crate) struct Place {
    addresses: Arc<Addresses>,
    client: IpAddr,
}

fn of(counts: &HashMap<IpAddr, u32>, whose: IpAddr) -> u32 {
    counts.get(&whose).copied().unwrap_or_default()
}

fn one_less(counts: &mut HashMap<IpAddr, u32>, whose: IpAddr) {
    if let Entry::Occupied(mut count) = counts.entry(whose) {
        *count.get_mut() -= 1;
        if *count.get() == 0 {
            count.remove();
        }
    }
}

impl Addresses {
    /// At most so many for each client, and so many for all of a network.
    pub(crate) fn new(most: u32, most_of_network: u32) -> Arc<Self> {
        Arc::new(Self { most, most_of_network, held: Mutex::default() })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more; `None`: it has all that it may have.
    pub(crate) fn place(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let client = client(address);
        let network = network(client);
        let mut held = self.held();
        if of(&held.clients, client) >= self.most
            || network.is_some_and(|network| of(&held.networks, network) >= self.most_of_network)
        {
            return None;
        }
        *held.clients.entry(client).or_default() += 1;
        if let Some(network) = network {
            *held.networks.entry(network).or_default() += 1;
        }
        Some(Place { addresses: self.clone(), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.addresses.held();
        one_less(&mut held.clients, self.client);
        if let Some(network) = network(self.client) {
            one_less(&mut held.networks, network);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_its_own_places_and_leaves_nothing() {
        let addresses = Addresses::new(2, 5);
        let place = |address: &str| addresses.place(address.parse().unwrap());
        let held: Vec<_> = [place("10.0.0.1"), place("::ffff:10.0.0.1")].into_iter().flatten().collect();
        assert_eq!(held.len(), 2);
        assert!(place("10.0.0.1").is_none(), "mapped or not, it is the same");
        let other = place("10.0.0.2");
        assert!(other.is_some());
        drop(held);
        assert!(place("10.0.0.1").is_some());
        drop(other);
        let left = addresses.held();
        assert!(left.clients.is_empty() && left.networks.is_empty(), "{left:?}");
    }

    #[test]
    fn nodes_of_one_network_are_clients_of_their_own_and_it_does_not_take_all() {
        let addresses = Addresses::new(2, 5);
        let place = |address: &str| addresses.place(address.parse().unwrap());
        let clients = ["fe80::1", "fe80::2", "fe80::3"];
        let mut held: Vec<_> = clients[..2].iter().flat_map(|client| [place(client), place(client)]).collect();
        assert!(place("fe80::1").is_none(), "it has two");
        held.push(place(clients[2]));
        assert!(held.iter().all(Option::is_some));
        assert!(place("fe80::3").is_none() && place("fe80::4").is_none(), "the network has five");
        let other = place("2001:db8:0:2::3");
        assert!(other.is_some(), "another network");
        held.pop();
        let again = place("fe80::4");
        assert!(again.is_some());
        drop((held, other, again));
        let left = addresses.held();
        assert!(left.clients.is_empty() && left.networks.is_empty(), "{left:?}");
    }
}
