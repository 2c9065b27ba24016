//! Who may ask how often, before anybody has proven who he is: a bucket of tokens per address (IPv6: per /64), and one for all.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Calls an address may make at once.
const BURST: f64 = 60.0;
/// Calls an address may make per second on average.
const RATE: f64 = 5.0;
/// The same for all addresses together: ten thousand nodes that are switched on at once are through in ten seconds.
const BURST_ALL: f64 = 4000.0;
const RATE_ALL: f64 = 1000.0;
/// Addresses that are remembered.
const MAX_ADDRESSES: usize = 65_536;

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    filled: f64,
}

impl Bucket {
    fn take(&mut self, now: f64, rate: f64, burst: f64) -> bool {
        self.tokens = (self.tokens + (now - self.filled).max(0.0) * rate).min(burst);
        self.filled = now;
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}

struct Buckets {
    all: Bucket,
    each: HashMap<IpAddr, Bucket>,
}

/// The buckets.
pub struct RateLimit {
    start: Instant,
    buckets: Mutex<Buckets>,
}

impl Default for RateLimit {
    fn default() -> Self {
        let all = Bucket { tokens: BURST_ALL, filled: 0.0 };
        Self { start: Instant::now(), buckets: Mutex::new(Buckets { all, each: HashMap::new() }) }
    }
}

/// A customer's IPv6 network is one asker: he has 2^64 addresses.
fn group(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl RateLimit {
    /// Whether this address may ask now; counts it.
    pub fn allow(&self, address: IpAddr) -> bool {
        self.allow_at(address, self.start.elapsed().as_secs_f64())
    }

    fn allow_at(&self, address: IpAddr, now: f64) -> bool {
        // A thread that panicked here left at worst one count too many.
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.each.len() >= MAX_ADDRESSES {
            // Whose bucket is full again is as good as unknown.
            buckets.each.retain(|_, bucket| bucket.tokens + (now - bucket.filled) * RATE < BURST);
            if buckets.each.len() >= MAX_ADDRESSES {
                return false;
            }
        }
        // The address first: one that asks too often must not use up what is there for all.
        let fresh = Bucket { tokens: BURST, filled: now };
        buckets.each.entry(group(address)).or_insert(fresh).take(now, RATE, BURST)
            && buckets.all.take(now, RATE_ALL, BURST_ALL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(limit: &RateLimit, address: &str, now: f64, asks: usize) -> usize {
        let address = address.parse().unwrap();
        (0..asks).filter(|_| limit.allow_at(address, now)).count()
    }

    #[test]
    fn one_address_is_limited_and_others_are_not() {
        let limit = RateLimit::default();
        assert_eq!(allowed(&limit, "10.0.0.1", 0.0, 100), 60);
        assert_eq!(allowed(&limit, "10.0.0.2", 0.0, 1), 1);
        assert_eq!(allowed(&limit, "::ffff:10.0.0.1", 0.0, 1), 0, "the same address in IPv6 clothes");
        assert_eq!(allowed(&limit, "10.0.0.1", 2.0, 100), 10, "five a second come back");
        assert_eq!(allowed(&limit, "2001:db8::1", 2.0, 100), 60);
        assert_eq!(allowed(&limit, "2001:db8::2", 2.0, 1), 0, "the same network");
    }

    #[test]
    fn all_together_are_limited_and_memory_is_bounded() {
        let limit = RateLimit::default();
        let total: usize =
            (0..10_000_u32).map(|n| allowed(&limit, &std::net::Ipv4Addr::from(n).to_string(), 0.0, 1)).sum();
        assert_eq!(total, 4000);
        for n in 0..100_000_u32 {
            allowed(&limit, &std::net::Ipv4Addr::from(n).to_string(), f64::from(n), 1);
        }
        assert!(limit.buckets.lock().unwrap().each.len() <= MAX_ADDRESSES);
    }
}
