//! Links, addresses and routes by netlink: what `ip` would do, which the initramfs does not have.

use super::links::Link;
use moor_api::deploy::Cidr;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::{AddressMessageBuilder, Handle, LinkUnspec, RouteMessageBuilder};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The kernel did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {cause}")]
pub struct NetworkError {
    /// "bring up link 'eth0'".
    pub what: String,
    /// Why.
    pub cause: String,
}

fn failed(what: String, cause: &impl ToString) -> NetworkError {
    NetworkError { what, cause: cause.to_string() }
}

/// A route over a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Route {
    /// The destination network; prefix 0: the default route.
    pub destination: Cidr,
    /// The next hop; absent: on the link itself.
    pub gateway: Option<IpAddr>,
}

impl Route {
    /// The default route by a gateway.
    #[must_use]
    pub fn default_by(gateway: IpAddr) -> Self {
        let address = match gateway {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self { destination: Cidr { address, prefix: 0 }, gateway: Some(gateway) }
    }

    fn message(&self, link: u32, on_link: bool) -> Option<RouteMessage> {
        match (self.destination.address, self.gateway) {
            (IpAddr::V4(destination), None | Some(IpAddr::V4(_))) => {
                let mut route = RouteMessageBuilder::<Ipv4Addr>::new()
                    .destination_prefix(destination, self.destination.prefix)
                    .output_interface(link);
                if let Some(IpAddr::V4(gateway)) = self.gateway {
                    route = route.gateway(gateway);
                }
                Some(if on_link { route.onlink() } else { route }.build())
            }
            (IpAddr::V6(destination), None | Some(IpAddr::V6(_))) => {
                let mut route = RouteMessageBuilder::<Ipv6Addr>::new()
                    .destination_prefix(destination, self.destination.prefix)
                    .output_interface(link);
                if let Some(IpAddr::V6(gateway)) = self.gateway {
                    route = route.gateway(gateway);
                }
                Some(if on_link { route.onlink() } else { route }.build())
            }
            _ => None,
        }
    }
}

/// Whether `address` lies in the network of `cidr`.
#[must_use]
pub fn in_network(cidr: Cidr, address: IpAddr) -> bool {
    let same = |a: u128, b: u128, width: u32| {
        let host = width - u32::from(cidr.prefix).min(width);
        a.checked_shr(host).unwrap_or(0) == b.checked_shr(host).unwrap_or(0)
    };
    match (cidr.address, address) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(u128::from(a.to_bits()), u128::from(b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
        _ => false,
    }
}

/// A netlink socket.
#[derive(Clone)]
pub struct Netlink(Handle);

impl Netlink {
    /// Opens it; its task runs on the current runtime.
    ///
    /// # Errors
    /// The kernel has no netlink.
    pub fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|error| failed("open a netlink socket".into(), &error))?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// Brings a link up.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn up(&self, link: &Link) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(link.index).up().build();
        let result = self.0.link().set(message).execute().await;
        result.map_err(|error| failed(format!("bring up link '{}'", link.name), &error))
    }

    /// Gives a link an address; it may have it already.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn add_address(&self, link: &Link, cidr: Cidr) -> Result<(), NetworkError> {
        let request = self.0.address().add(link.index, cidr.address, cidr.prefix).replace();
        request.execute().await.map_err(|error| failed(format!("give '{}' the address {cidr}", link.name), &error))
    }

    /// Takes an address from a link.
    ///
    /// # Errors
    /// The kernel refuses; it has no such address.
    pub async fn remove_address(&self, link: &Link, cidr: Cidr) -> Result<(), NetworkError> {
        let message = match cidr.address {
            IpAddr::V4(address) => {
                AddressMessageBuilder::<Ipv4Addr>::new().index(link.index).address(address, cidr.prefix).build()
            }
            IpAddr::V6(address) => {
                AddressMessageBuilder::<Ipv6Addr>::new().index(link.index).address(address, cidr.prefix).build()
            }
        };
        let result = self.0.address().del(message).execute().await;
        result.map_err(|error| failed(format!("take the address {cidr} from '{}'", link.name), &error))
    }

    /// Sets a route over a link, in place of one to the same destination. `address` is the link's: a gateway outside of its network
    /// is reached on the link.
    ///
    /// # Errors
    /// The kernel refuses; families are mixed.
    pub async fn set_route(&self, link: &Link, address: Cidr, route: Route) -> Result<(), NetworkError> {
        let what = || match route.gateway {
            Some(gateway) => format!("set the route to {} by {gateway} on '{}'", route.destination, link.name),
            None => format!("set the route to {} on '{}'", route.destination, link.name),
        };
        let link_local = matches!(route.gateway, Some(IpAddr::V6(gateway)) if gateway.is_unicast_link_local());
        let on_link = route.gateway.is_some_and(|gateway| !link_local && !in_network(address, gateway));
        let message = route
            .message(link.index, on_link)
            .ok_or_else(|| failed(what(), &"destination and gateway are of different families"))?;
        let result = self.0.route().add(message).replace().execute().await;
        result.map_err(|error| failed(what(), &error))
    }

    /// Removes the routes of a link that were set here.
    ///
    /// # Errors
    /// The kernel refuses; there is no such route.
    pub async fn remove_route(&self, link: &Link, route: Route) -> Result<(), NetworkError> {
        let what = || format!("remove the route to {} from '{}'", route.destination, link.name);
        let message = route
            .message(link.index, false)
            .ok_or_else(|| failed(what(), &"destination and gateway are of different families"))?;
        let result = self.0.route().del(message).execute().await;
        result.map_err(|error| failed(what(), &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let cases = [
            ("10.1.2.3/24", "10.1.2.254", true),
            ("10.1.2.3/24", "10.1.3.1", false),
            ("10.1.2.3/32", "10.1.2.1", false),
            ("0.0.0.0/0", "9.9.9.9", true),
            ("2001:db8::2/64", "2001:db8::ffff", true),
            ("2001:db8::2/64", "2001:db8:1::1", false),
            ("::/0", "2001::1", true),
            ("10.1.2.3/24", "2001::1", false),
        ];
        for (cidr, address, expected) in cases {
            assert_eq!(in_network(cidr.parse().unwrap(), address.parse().unwrap()), expected, "{cidr} {address}");
        }
    }
}
