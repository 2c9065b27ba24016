//! Who may ask how often, before anybody has proven who he is: a bucket of tokens per address, one per network of IPv6, and one for all.

use crate::addresses::{client, network};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Calls that may be made at once, and per second on average.
#[derive(Debug, Clone, Copy)]
struct Limit {
    burst: f64,
    rate: f64,
}

/// Of an address.
const EACH: Limit = Limit { burst: 60.0, rate: 5.0 };
/// Of a network of IPv6, which has any number of addresses: three quarters of what there is for all. The nodes of a cluster may all be in one.
const NETWORK: Limit = Limit { burst: 3000.0, rate: 750.0 };
/// Of all together: ten thousand nodes that are switched on at once are through in ten seconds.
const ALL: Limit = Limit { burst: 4000.0, rate: 1000.0 };
/// Addresses that are remembered, and networks.
const MAX_ADDRESSES: usize = 65_536;

#[derive(Debug, Clone, Copy)]
struct Bucket {
    limit: Limit,
    tokens: f64,
    filled: f64,
}

impl Bucket {
    /// A full one.
    fn new(limit: Limit, now: f64) -> Self {
        Self { limit, tokens: limit.burst, filled: now }
    }

    /// What is in it now.
    fn tokens_at(&self, now: f64) -> f64 {
        (self.tokens + (now - self.filled).max(0.0) * self.limit.rate).min(self.limit.burst)
    }

    fn has_one(&self, now: f64) -> bool {
        self.tokens_at(now) >= 1.0
    }

    fn take(&mut self, now: f64) {
        self.tokens = self.tokens_at(now) - 1.0;
        self.filled = now;
    }
}

/// Buckets by address, of those that are not full.
struct Buckets {
    limit: Limit,
    of: HashMap<IpAddr, Bucket>,
}

impl Buckets {
    fn new(limit: Limit) -> Self {
        Self { limit, of: HashMap::new() }
    }

    /// Whether this one may ask, if there is room to remember that.
    fn may(&mut self, whose: IpAddr, now: f64) -> bool {
        if let Some(bucket) = self.of.get(&whose) {
            return bucket.has_one(now);
        }
        if self.of.len() >= MAX_ADDRESSES {
            // Whose bucket is full again is as good as unknown.
            self.of.retain(|_, bucket| bucket.tokens_at(now) < bucket.limit.burst);
        }
        self.of.len() < MAX_ADDRESSES
    }

    fn take(&mut self, whose: IpAddr, now: f64) {
        self.of.entry(whose).or_insert(Bucket::new(self.limit, now)).take(now);
    }
}

struct State {
    all: Bucket,
    networks: Buckets,
    each: Buckets,
}

/// The buckets.
pub struct RateLimit {
    start: Instant,
    state: Mutex<State>,
}

impl Default for RateLimit {
    fn default() -> Self {
        let state = State { all: Bucket::new(ALL, 0.0), networks: Buckets::new(NETWORK), each: Buckets::new(EACH) };
        Self { start: Instant::now(), state: Mutex::new(state) }
    }
}

impl RateLimit {
    /// Whether this address may ask now; counts it.
    pub fn allow(&self, address: IpAddr) -> bool {
        self.allow_at(address, self.start.elapsed().as_secs_f64())
    }

    fn allow_at(&self, address: IpAddr, now: f64) -> bool {
        let client = client(address);
        let network = network(client);
        // A thread that panicked here left at worst one count too many.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { all, networks, each } = &mut *state;
        // Who may not ask uses up nothing of what is there for others, and is not remembered: so a network with any number of addresses does not
        // fill the memory.
        let may = all.has_one(now) && network.is_none_or(|network| networks.may(network, now)) && each.may(client, now);
        if may {
            all.take(now);
            each.take(client, now);
            if let Some(network) = network {
                networks.take(network, now);
            }
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn allowed(limit: &RateLimit, address: &str, now: f64, asks: usize) -> usize {
        let address = address.parse().unwrap();
        (0..asks).filter(|_| limit.allow_at(address, now)).count()
    }

    /// Of so many addresses of a network that ask once.
    fn allowed_of_network(limit: &RateLimit, network: &str, now: f64, addresses: u32) -> usize {
        let network = network.parse::<Ipv6Addr>().unwrap().to_bits();
        let address = |number| IpAddr::from(Ipv6Addr::from_bits(network + u128::from(number)));
        (0..addresses).filter(|number| limit.allow_at(address(*number), now)).count()
    }

    #[test]
    fn one_address_is_limited_and_others_are_not() {
        let limit = RateLimit::default();
        assert_eq!(allowed(&limit, "10.0.0.1", 0.0, 100), 60);
        assert_eq!(allowed(&limit, "10.0.0.2", 0.0, 1), 1);
        assert_eq!(allowed(&limit, "::ffff:10.0.0.1", 0.0, 1), 0, "the same address in IPv6 clothes");
        assert_eq!(allowed(&limit, "10.0.0.1", 2.0, 100), 10, "five a second come back");
        assert_eq!(allowed(&limit, "2001:db8::1", 2.0, 100), 60);
        assert_eq!(allowed(&limit, "2001:db8::2", 2.0, 100), 60, "a node beside it");
    }

    #[test]
    fn nodes_of_one_network_are_through_and_it_leaves_some_to_others() {
        let limit = RateLimit::default();
        assert_eq!(allowed_of_network(&limit, "fe80::", 0.0, 2000), 2000, "a cluster that is switched on");
        assert_eq!(allowed_of_network(&limit, "fe80::1:0:0:0", 0.0, 100_000), 1000, "a machine with many addresses");
        assert_eq!(allowed(&limit, "10.0.0.1", 0.0, 100), 60);
        assert_eq!(allowed_of_network(&limit, "2001:db8::", 0.0, 2000), 940);
        assert_eq!(allowed_of_network(&limit, "fe80::2:0:0:0", 2.0, 100_000), 1500);
        let remembered = limit.state.lock().unwrap().each.of.len();
        assert!(remembered < 6000, "{remembered} addresses are remembered, of those that were refused too");
    }

    #[test]
    fn all_together_are_limited_and_memory_is_bounded() {
        let limit = RateLimit::default();
        let total: usize = (0..10_000_u32).map(|n| allowed(&limit, &Ipv4Addr::from(n).to_string(), 0.0, 1)).sum();
        assert_eq!(total, 4000);
        for n in 0..100_000_u32 {
            allowed(&limit, &Ipv4Addr::from(n).to_string(), f64::from(n), 1);
        }
        assert!(limit.state.lock().unwrap().each.of.len() <= MAX_ADDRESSES);
    }
}
