//! Addresses for links, found by one task per link and told to whoever boots the node.

use super::configure::{Netlink, NetworkError, Route};
use super::links::{Link, Links, global_ipv6};
use moor_api::deploy::Cidr;
use mozim::{DhcpV4Client, DhcpV4Config, DhcpV4Lease, DhcpV4State};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A DHCP discovery begins anew after this. The retransmission delay of RFC 2131 doubles up to a minute; a port that spanning
/// tree opens after 30 s would be found half a minute late.
const DISCOVERY_SECONDS: u32 = 20;

/// A DHCP client that cannot be made (a card that is just being reset) is made again after this.
const AFTER_FAILURE: Duration = Duration::from_secs(5);

/// How often carrier and router advertisements are looked at.
const POLL: Duration = Duration::from_millis(200);

/// An address from the kernel command line: `moor.ip=ADDRESS/PREFIX[,GATEWAY[,INTERFACE]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticAddress {
    /// Address and prefix length.
    pub address: Cidr,
    /// Default gateway.
    pub gateway: Option<IpAddr>,
    /// The link it is for; absent: each is tried.
    pub interface: Option<String>,
}

/// Where an address comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// `DHCPv4`.
    Dhcp,
    /// The kernel made it from a router advertisement.
    RouterAdvertisement,
    /// The kernel command line.
    Argument,
    /// The deploy document.
    Document,
}

/// A link with an address: a way on which members may be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The link.
    pub link: Link,
    /// Its address.
    pub address: Cidr,
    /// Where it comes from.
    pub origin: Origin,
    /// Routes that belong to it.
    pub routes: Vec<Route>,
    /// Resolvers the network names.
    pub dns: Vec<IpAddr>,
    /// The domain the network names.
    pub domain: Option<String>,
}

impl Candidate {
    fn from_lease(link: &Link, lease: &DhcpV4Lease) -> Self {
        let prefix = u8::try_from(lease.subnet_mask.to_bits().leading_ones()).unwrap_or(32);
        let routes = match &lease.classless_routes {
            // RFC 3442: with option 121 the router option is ignored.
            Some(routes) => routes
                .iter()
                .map(|route| Route {
                    destination: Cidr { address: route.destination.into(), prefix: route.prefix_length },
                    gateway: (route.router != Ipv4Addr::UNSPECIFIED).then_some(route.router.into()),
                })
                .collect(),
            None => lease.gateways.iter().flatten().take(1).map(|&gateway| Route::default_by(gateway.into())).collect(),
        };
        Self {
            link: link.clone(),
            address: Cidr { address: lease.yiaddr.into(), prefix },
            origin: Origin::Dhcp,
            routes,
            dns: lease.dns_srvs.iter().flatten().map(|&address| address.into()).collect(),
            domain: lease.domain_name.clone().filter(|domain| !domain.is_empty()),
        }
    }

    /// Static addresses of the document.
    #[must_use]
    pub fn from_document(link: &Link, address: Cidr, gateway: Option<IpAddr>) -> Self {
        Self::bare(link, address, Origin::Document, gateway)
    }

    fn bare(link: &Link, address: Cidr, origin: Origin, gateway: Option<IpAddr>) -> Self {
        let routes = gateway.into_iter().map(Route::default_by).collect();
        Self { link: link.clone(), address, origin, routes, dns: Vec::new(), domain: None }
    }

    /// Puts address and routes on the link. An address from a router advertisement is there already.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn apply(&self, netlink: &Netlink) -> Result<(), NetworkError> {
        if self.origin == Origin::RouterAdvertisement {
            return Ok(());
        }
        netlink.add_address(&self.link, self.address).await?;
        // Routes on the link first: gateways are reached over them.
        let (on_link, by_gateway): (Vec<&Route>, Vec<&Route>) = self.routes.iter().partition(|r| r.gateway.is_none());
        for route in on_link.into_iter().chain(by_gateway) {
            netlink.set_route(&self.link, self.address, *route).await?;
        }
        Ok(())
    }

    /// Takes them off again, as far as they are there.
    pub async fn withdraw(&self, netlink: &Netlink) {
        if self.origin == Origin::RouterAdvertisement {
            return;
        }
        for route in &self.routes {
            let _ = netlink.remove_route(&self.link, *route).await;
        }
        let _ = netlink.remove_address(&self.link, self.address).await;
    }
}

/// The search on all links. Dropping it ends it.
pub struct Search {
    netlink: Netlink,
    links: Links,
    arguments: Vec<StaticAddress>,
    tasks: BTreeMap<String, JoinHandle<()>>,
    found: mpsc::UnboundedReceiver<Candidate>,
    report: mpsc::UnboundedSender<Candidate>,
}

impl Drop for Search {
    fn drop(&mut self) {
        for task in self.tasks.values() {
            task.abort();
        }
    }
}

impl Search {
    /// Begins with no link. With `arguments` addresses come from them alone.
    #[must_use]
    pub fn new(netlink: Netlink, links: Links, arguments: Vec<StaticAddress>) -> Self {
        let (report, found) = mpsc::unbounded_channel();
        Self { netlink, links, arguments, tasks: BTreeMap::new(), found, report }
    }

    /// Brings up the links that are not up yet and begins to search on them; returns the names of all.
    ///
    /// # Errors
    /// No link comes up, and one of them says why. A card that does not work (no firmware) keeps no other from being used.
    pub async fn take_links(&mut self) -> Result<Vec<String>, NetworkError> {
        let mut reason = None;
        for link in self.links.physical() {
            if self.tasks.contains_key(&link.name) {
                continue;
            }
            if let Err(error) = self.netlink.up(&link).await {
                crate::console::say("links", &error.to_string());
                reason = Some(error);
                continue;
            }
            let (links, report) = (self.links.clone(), self.report.clone());
            let arguments: Vec<StaticAddress> = self
                .arguments
                .iter()
                .filter(|argument| argument.interface.as_ref().is_none_or(|name| *name == link.name))
                .cloned()
                .collect();
            let by_argument = !self.arguments.is_empty();
            let name = link.name.clone();
            let task = tokio::spawn(async move {
                wait_carrier(&links, &link).await;
                if by_argument {
                    for argument in arguments {
                        let found = Candidate::bare(&link, argument.address, Origin::Argument, argument.gateway);
                        let _ = report.send(found);
                    }
                } else {
                    tokio::join!(lease(&link, &report), advertised(&link, &report));
                }
            });
            self.tasks.insert(name, task);
        }
        match reason {
            Some(error) if self.tasks.is_empty() => Err(error),
            _ => Ok(self.tasks.keys().cloned().collect()),
        }
    }

    /// The next address that is found, or that changed.
    pub async fn next(&mut self) -> Candidate {
        match self.found.recv().await {
            Some(candidate) => candidate,
            // This struct holds a sender, so the channel does not close.
            None => std::future::pending().await,
        }
    }

    /// An address that was found meanwhile.
    pub fn try_next(&mut self) -> Option<Candidate> {
        self.found.try_recv().ok()
    }

    /// Ends the search on all links but one: it is kept for its lease, which has to be renewed while the node waits. Should that link
    /// fail, [`Self::take_links`] begins on the others again.
    pub fn keep_only(&mut self, name: &str) {
        self.tasks.retain(|link, task| {
            if link != name {
                task.abort();
            }
            link == name
        });
    }

    /// Begins anew on all links.
    pub fn restart(&mut self) {
        for task in std::mem::take(&mut self.tasks).values() {
            task.abort();
        }
    }
}

async fn wait_carrier(links: &Links, link: &Link) {
    let mut waited = Duration::ZERO;
    while !links.has_carrier(&link.name) {
        tokio::time::sleep(POLL).await;
        waited += POLL;
        if waited.as_millis() % 30_000 == 10_000 {
            let said = format!("'{}' ({}) has no carrier yet: cable, switch port?", link.name, link.hwaddr);
            crate::console::say("address", &said);
        }
    }
}

/// Takes a lease and keeps it, for ever.
async fn lease(link: &Link, report: &mpsc::UnboundedSender<Candidate>) {
    let (mut last, mut failure): (Option<Candidate>, Option<String>) = (None, None);
    loop {
        let mut client = match client(link).await {
            Ok(client) => client,
            Err(error) => {
                let reason = error.to_string();
                if failure.as_ref() != Some(&reason) {
                    crate::console::say("address", &format!("no DHCP on '{}' yet: {reason}", link.name));
                    failure = Some(reason);
                }
                tokio::time::sleep(AFTER_FAILURE).await;
                continue;
            }
        };
        loop {
            match client.run().await {
                Ok(DhcpV4State::Done(lease)) => {
                    let found = Candidate::from_lease(link, &lease);
                    if last.as_ref() != Some(&found) {
                        last = Some(found.clone());
                        if report.send(found).is_err() {
                            return;
                        }
                    }
                }
                Ok(_) => (),
                // No answer, a refusal, a link that went away: begin anew.
                Err(_) => break,
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn client(link: &Link) -> Result<DhcpV4Client, mozim::DhcpError> {
    let mut config = DhcpV4Config::new(&link.name);
    config.set_iface_index(link.index).set_iface_mac(link.hwaddr.as_str())?;
    // The running system's network service identifies itself in the same way (render::network), so it keeps the address.
    config.use_mac_as_client_id().set_timeout_sec(DISCOVERY_SECONDS);
    DhcpV4Client::init(config, None).await
}

/// Waits for an address from a router advertisement.
async fn advertised(link: &Link, report: &mpsc::UnboundedSender<Candidate>) {
    loop {
        let table = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
        if let Some((address, prefix)) = global_ipv6(&table, &link.name).first() {
            let address = Cidr { address: (*address).into(), prefix: *prefix };
            let _ = report.send(Candidate::bare(link, address, Origin::RouterAdvertisement, None));
            return;
        }
        tokio::time::sleep(POLL).await;
    }
}
