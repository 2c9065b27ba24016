//! Room for connections over TLS: so many for all clients together, a share of them for each ([`addresses`](crate::addresses)), and some that only
//! other members get, so that no crowd keeps a collective from agreeing. Who finds the house full is not kept waiting: there are other members.

use crate::addresses::{Addresses, Place, client};
use crate::http::Peer;
use crate::state::Member;
use moor_api::client::node::parse_https;
use nix::sys::resource::{Resource, getrlimit};
use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections of all clients at a time, where the limit of open files has room for them and the configuration says nothing else.
const MOST: u32 = 65_536;
/// Connections beside those, for other members: each has a dozen.
const FOR_MEMBERS: u32 = 256;
/// The records are looked at for the addresses of members this often, while the house is full.
const LOOK: Duration = Duration::from_secs(1);
/// Addresses that are remembered because members came from there.
const MAX_CAME: usize = 256;
/// That the house is full is said this often.
const SAY: Duration = Duration::from_mins(1);

/// Connections of all clients that there is room for with so many open files, at most `wanted`. A quarter of the files is left to what is being
/// sent, and to the member itself.
fn capacity(wanted: u32, files: u64) -> u32 {
    let room = (files / 4 * 3).saturating_sub(u64::from(FOR_MEMBERS)).max(1);
    wanted.min(u32::try_from(room).unwrap_or(u32::MAX))
}

/// From where other members come.
#[derive(Debug, Default)]
struct Origins {
    looked: Option<Instant>,
    /// The addresses in their URLs, as of then.
    urls: BTreeSet<IpAddr>,
    /// Where their connections came from, the oldest first: a URL may have a name, and a machine several addresses.
    came: VecDeque<IpAddr>,
}

/// The room that there is.
#[derive(Debug)]
pub(crate) struct House {
    all: Arc<Semaphore>,
    most: u32,
    members: Arc<Semaphore>,
    addresses: Arc<Addresses>,
    origins: Mutex<Origins>,
    said: Mutex<Option<Instant>>,
}

/// The room that a connection takes as long as this lives.
#[derive(Debug)]
pub(crate) struct Room {
    _place: OwnedSemaphorePermit,
    _address: Option<Place>,
    /// It is some that is kept for other members.
    pub(crate) is_for_members: bool,
}

impl Room {
    /// Room among connections that are not counted by address.
    pub(crate) fn local(place: OwnedSemaphorePermit) -> Self {
        Self { _place: place, _address: None, is_for_members: false }
    }
}

/// Why there is no room for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// All have taken all of it.
    Full,
    /// The client, or its network, has its share.
    Share,
}

impl House {
    /// Room for `wanted` connections, as far as this process may have files open; `each` of them for one client.
    ///
    /// # Errors
    /// The limit of open files is not to be had.
    pub(crate) fn new(wanted: Option<u32>, each: u32) -> nix::Result<Self> {
        let (files, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let most = capacity(wanted.unwrap_or(MOST), files);
        if most < wanted.unwrap_or(MOST) {
            tracing::warn!("there is room for {most} connections at a time: no more than {files} files may be open");
        }
        Ok(Self::of(most, each))
    }

    fn of(most: u32, each: u32) -> Self {
        let semaphore = |most| Arc::new(Semaphore::new(usize::try_from(most).unwrap_or(usize::MAX)));
        Self {
            all: semaphore(most),
            most,
            members: semaphore(FOR_MEMBERS),
            // A cluster may be one network of IPv6, and a machine has any number of its addresses: a quarter is left to others.
            addresses: Addresses::new(each, most - most / 4),
            origins: Mutex::default(),
            said: Mutex::default(),
        }
    }

    /// Room for a connection from this address. Once the house is full there is some only where `is_members` finds the address of another member.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn enter(&self, address: IpAddr, is_members: impl FnOnce() -> bool) -> Result<Room, NoRoom> {
        let (place, is_for_members) = match self.all.clone().try_acquire_owned() {
            Ok(place) => (place, false),
            Err(_) if is_members() => (self.members.clone().try_acquire_owned().map_err(|_| NoRoom::Full)?, true),
            Err(_) => return Err(NoRoom::Full),
        };
        let address = self.addresses.place(address).ok_or(NoRoom::Share)?;
        Ok(Room { _place: place, _address: Some(address), is_for_members })
    }

    /// Whether other members come from this address.
    pub(crate) fn is_of_members(&self, member: &Member, address: IpAddr) -> bool {
        let address = client(address);
        let mut origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        if origins.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            let urls = member.others().into_iter().flat_map(|peer| peer.urls);
            origins.urls = urls.filter_map(|url| parse_https(&url).ok()?.0.parse().ok().map(client)).collect();
            origins.looked = Some(Instant::now());
        }
        origins.urls.contains(&address) || origins.came.contains(&address)
    }

    /// Whether the peer is another member, by its certificate and the records; where it comes from is remembered.
    pub(crate) fn meet(&self, member: &Member, peer: &Peer) -> bool {
        let Peer::Tls { address, client_key: Some(key), member: Some(Ok(named)), .. } = peer else { return false };
        if !member.others().iter().any(|other| other.id == named.member && other.key.0 == *key) {
            return false;
        }
        let address = client(address.ip());
        let mut origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        if !origins.came.contains(&address) {
            if origins.came.len() >= MAX_CAME {
                origins.came.pop_front();
            }
            origins.came.push_back(address);
        }
        true
    }

    /// Says that somebody found it full, now and then.
    pub(crate) fn say_full(&self) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_none_or(|said| said.elapsed() >= SAY) {
            tracing::warn!(
                "all {} connections are taken: more are closed at once, but for those of members",
                self.most
            );
            *said = Some(Instant::now());
        }
    }

    /// Waits until everybody has left.
    pub(crate) async fn emptied(&self) {
        for (places, most) in [(&self.all, self.most), (&self.members, FOR_MEMBERS)] {
            let _ = places.acquire_many(most).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_more_room_than_files_may_be_open() {
        for (wanted, files, most) in [
            (MOST, 524_288, MOST),
            (MOST, 20_000, 14_744),
            (MOST, 1024, 512),
            (MOST, 4, 1),
            (8, 524_288, 8),
            (MOST, u64::MAX, MOST),
        ] {
            assert_eq!(capacity(wanted, files), most, "{wanted} with {files} files");
        }
    }

    #[test]
    fn a_crowd_takes_no_room_of_members() {
        let house = House::of(3, 2);
        let enter = |address: &str, is_members| house.enter(address.parse().unwrap(), || is_members);
        let crowd = ["10.0.0.1", "10.0.0.1", "10.0.0.2"].map(|address| enter(address, false).unwrap());
        assert!(crowd.iter().all(|room| !room.is_for_members));
        assert_eq!(enter("10.0.0.3", false).unwrap_err(), NoRoom::Full);
        assert!(enter("10.0.0.9", true).unwrap().is_for_members);
        assert_eq!(enter("10.0.0.1", true).unwrap_err(), NoRoom::Share, "it is not above its share either");
        drop(crowd);
        let again = [(); 2].map(|()| enter("10.0.0.1", true).unwrap());
        assert!(again.iter().all(|room| !room.is_for_members), "there is room for all");
        assert_eq!(enter("10.0.0.1", false).unwrap_err(), NoRoom::Share);
        drop(again);
        assert_eq!(house.all.available_permits(), 3);
        assert_eq!(house.members.available_permits(), usize::try_from(FOR_MEMBERS).unwrap());
    }
}
