//! A server's URL, taken apart and resolved at the start: later there may be no resolver, because its files are on the root.

use rustls_pki_types::ServerName;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, ToSocketAddrs as _};

/// The port of a URL that names none.
const DEFAULT_PORT: u16 = 443;

/// A URL cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Not of our form.
    #[error("'{0}' is not a URL of the form https://HOST[:PORT]/PATH")]
    Form(String),
    /// The host is neither an address nor a name that resolves.
    #[error("'{url}': the host '{host}' has no address: {why}; name it by its IP address")]
    Resolve {
        /// The URL.
        url: String,
        /// Its host.
        host: String,
        /// What the resolver said.
        why: String,
    },
}

/// Where an image is served.
#[derive(Debug, Clone)]
pub struct Address {
    url: String,
    authority: String,
    path: String,
    name: ServerName<'static>,
    sockets: Vec<SocketAddr>,
}

impl Address {
    /// Parses and resolves `https://HOST[:PORT]/PATH`; the host may be an IPv6 address with a zone, `[fe80::1%eth0]`.
    ///
    /// # Errors
    /// Another form; a host without an address.
    pub fn resolve(url: &str) -> Result<Self, AddressError> {
        Self::parse(url, |host, port| Ok((host, port).to_socket_addrs()?.collect()))
    }

    /// All of these that can be reached: one name that does not resolve is no reason to do without the others. Beside them, what is wrong with
    /// the rest.
    ///
    /// # Errors
    /// Another form of any; no host has an address.
    pub fn resolve_all(urls: &[String]) -> Result<(Vec<Self>, Vec<AddressError>), AddressError> {
        let (mut found, mut unknown) = (Vec::new(), Vec::new());
        // Side by side: each name without an answer takes as long as the resolver has patience.
        let resolved: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = urls.iter().map(|url| (url, scope.spawn(|| Self::resolve(url)))).collect();
            let lost = |url: &String| Err(AddressError::Form(url.clone()));
            threads.into_iter().map(|(url, thread)| thread.join().unwrap_or_else(|_| lost(url))).collect()
        });
        for result in resolved {
            match result {
                Ok(address) => found.push(address),
                Err(error @ AddressError::Resolve { .. }) => unknown.push(error),
                Err(error) => return Err(error),
            }
        }
        match unknown.pop() {
            Some(error) if found.is_empty() => Err(error),
            last => {
                unknown.extend(last);
                Ok((found, unknown))
            }
        }
    }

    /// The same where somebody else has resolved the host. Without `sockets` the host has to be an address.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub fn resolved(url: &str, sockets: Vec<SocketAddr>) -> Result<Self, AddressError> {
        let is_given = !sockets.is_empty();
        let mut address = Self::parse(url, |_, _| Ok(sockets.clone()))?;
        if is_given {
            address.sockets = sockets;
        }
        Ok(address)
    }

    fn parse(
        url: &str,
        resolve: impl FnOnce(&str, u16) -> std::io::Result<Vec<SocketAddr>>,
    ) -> Result<Self, AddressError> {
        let form = || AddressError::Form(url.to_owned());
        let rest = url.strip_prefix("https://").ok_or_else(form)?;
        let slash = rest.find('/').ok_or_else(form)?;
        let (authority, path) = rest.split_at(slash);
        let clean = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if authority.is_empty() || authority.contains('@') || path.len() < 2 || !clean(authority) || !clean(path) {
            return Err(form());
        }
        let (host, port) = split_port(authority).ok_or_else(form)?;
        let (bare, zone) = host.split_once('%').map_or((host, None), |(bare, zone)| (bare, Some(zone)));
        let unresolved = |why: String| AddressError::Resolve { url: url.to_owned(), host: host.to_owned(), why };
        let (name, sockets) = if let Ok(address) = bare.parse::<IpAddr>() {
            let socket = match (address, zone) {
                (IpAddr::V6(address), Some(zone)) => {
                    SocketAddrV6::new(address, port, 0, scope(zone).map_err(unresolved)?).into()
                }
                (_, Some(_)) => return Err(form()),
                (address, None) => SocketAddr::new(address, port),
            };
            (ServerName::IpAddress(address.into()), vec![socket])
        } else {
            let name = ServerName::try_from(host.to_owned()).map_err(|_| form())?;
            (name, resolve(host, port).map_err(|error| unresolved(error.to_string()))?)
        };
        if sockets.is_empty() {
            return Err(unresolved("none is known".into()));
        }
        // The Host header carries no zone (RFC 6874 §4): it means nothing to the server.
        let authority = match zone {
            Some(_) => format!("[{bare}]:{port}"),
            None => authority.to_owned(),
        };
        Ok(Self { url: url.to_owned(), authority, path: path.to_owned(), name, sockets })
    }

    /// The URL as it was given.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn authority(&self) -> &str {
        &self.authority
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }

    pub(super) fn name(&self) -> &ServerName<'static> {
        &self.name
    }

    /// Whether it is the same server where it was. Resolvers give addresses in any order.
    #[must_use]
    pub fn is_where(&self, before: &Self) -> bool {
        let places = |address: &Self| address.sockets.iter().copied().collect::<BTreeSet<_>>();
        self.url == before.url && places(self) == places(before)
    }

    /// What its host resolved to.
    #[must_use]
    pub fn sockets(&self) -> &[SocketAddr] {
        &self.sockets
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

/// Host without brackets, and port.
fn split_port(authority: &str) -> Option<(&str, u16)> {
    let (host, rest) = match authority.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => authority.find(':').map_or((authority, ""), |colon| authority.split_at(colon)),
    };
    let port = match rest.strip_prefix(':') {
        Some(digits) => digits.parse().ok().filter(|port| *port != 0)?,
        None if rest.is_empty() => DEFAULT_PORT,
        None => return None,
    };
    (!host.is_empty()).then_some((host, port))
}

/// The number of a zone: that of the interface, or the number itself.
fn scope(zone: &str) -> Result<u32, String> {
    match zone.parse() {
        Ok(number) => Ok(number),
        Err(_) => nix::net::if_::if_nametoindex(zone).map_err(|error| format!("the zone '{zone}': {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        for (url, authority, path, socket) in [
            ("https://127.0.0.1:8443/a/b.moor", "127.0.0.1:8443", "/a/b.moor", "127.0.0.1:8443"),
            ("https://127.0.0.1/x", "127.0.0.1", "/x", "127.0.0.1:443"),
            ("https://[::1]:9/x?y", "[::1]:9", "/x?y", "[::1]:9"),
            ("https://[fe80::1%1]:9/x", "[fe80::1]:9", "/x", "[fe80::1%1]:9"),
            ("https://[fe80::1%lo]/x", "[fe80::1]:443", "/x", "[fe80::1%1]:443"),
        ] {
            let address = Address::resolve(url).unwrap();
            assert_eq!((address.authority(), address.path()), (authority, path), "{url}");
            assert_eq!(address.sockets()[0].to_string(), socket, "{url}");
        }
    }

    #[test]
    fn a_server_has_moved_when_its_addresses_are_others_and_not_when_they_come_in_another_order() {
        let at = |url: &str, sockets: &[&str]| {
            let sockets = sockets.iter().map(|socket| socket.parse().unwrap()).collect();
            Address::resolved(url, sockets).unwrap()
        };
        let before = at("https://h:9/x", &["10.0.0.1:9", "10.0.0.2:9"]);
        assert!(at("https://h:9/x", &["10.0.0.2:9", "10.0.0.1:9"]).is_where(&before));
        for other in [
            at("https://h:9/x", &["10.0.0.1:9"]),
            at("https://h:9/x", &["10.0.0.1:9", "10.0.0.3:9"]),
            at("https://i:9/x", &["10.0.0.1:9", "10.0.0.2:9"]),
        ] {
            assert!(!other.is_where(&before), "{other:?}");
        }
    }

    #[test]
    fn a_name_without_an_address_does_not_take_the_others_away() {
        let urls = |some: &[&str]| some.iter().map(|url| (*url).to_owned()).collect::<Vec<_>>();
        let all = |some: &[&str]| Address::resolve_all(&urls(some));
        let (good, bad) = ("https://127.0.0.1:1/x", "https://[fe80::1%nosuch0]/x");
        let (found, unknown) = all(&[bad, good, bad]).unwrap();
        assert_eq!(found.iter().map(Address::url).collect::<Vec<_>>(), [good]);
        assert!(unknown.len() == 2 && unknown[0].to_string().contains("nosuch0"), "{unknown:?}");
        assert!(matches!(all(&[bad, bad]), Err(AddressError::Resolve { .. })));
        assert!(matches!(all(&[good, "http://127.0.0.1/x"]), Err(AddressError::Form(_))));
        assert!(all(&[]).unwrap().0.is_empty());
    }

    #[test]
    fn other_forms_are_refused() {
        for url in [
            "http://127.0.0.1/x",
            "https://127.0.0.1",
            "https://127.0.0.1/",
            "https:///x",
            "https://user@127.0.0.1/x",
            "https://127.0.0.1:0/x",
            "https://127.0.0.1:70000/x",
            "https://[::1/x",
            "https://[::1]9/x",
            "https://127.0.0.1%lo/x",
            "https://127.0.0.1/a b",
            "https://127.0.0.1/a\r\nb",
        ] {
            assert!(matches!(Address::resolve(url), Err(AddressError::Form(_))), "{url}");
        }
        assert!(matches!(Address::resolve("https://[fe80::1%nosuch0]/x"), Err(AddressError::Resolve { .. })));
    }
}
