//! Network links as `/sys/class/net` shows them.

use moor_api::ids::HwAddr;
use std::path::{Path, PathBuf};

/// `ARPHRD_ETHER` in `/sys/class/net/*/type`.
const ETHERNET: u32 = 1;
/// `ARPHRD_INFINIBAND`.
const INFINIBAND: u32 = 32;

/// A physical link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's name.
    pub name: String,
    /// The kernel's number.
    pub index: u32,
    /// Its hardware address.
    pub hwaddr: HwAddr,
}

/// Where the kernel shows links.
#[derive(Debug, Clone)]
pub struct Links(PathBuf);

impl Default for Links {
    fn default() -> Self {
        Self("/sys/class/net".into())
    }
}

impl Links {
    /// Under another root, for tests.
    #[must_use]
    pub fn under(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// The physical Ethernet and `InfiniBand` links, by name. Bridges, bonds, tunnels and the loopback have no device behind them.
    #[must_use]
    pub fn physical(&self) -> Vec<Link> {
        let Ok(entries) = std::fs::read_dir(&self.0) else { return Vec::new() };
        let mut links: Vec<Link> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| self.0.join(name).join("device").exists())
            .filter_map(|name| self.read(&name))
            .collect();
        links.sort_by(|a, b| a.name.cmp(&b.name));
        links
    }

    /// One link by name, physical or not.
    #[must_use]
    pub fn read(&self, name: &str) -> Option<Link> {
        let kind: u32 = self.attribute(name, "type")?.parse().ok()?;
        if !matches!(kind, ETHERNET | INFINIBAND) {
            return None;
        }
        let index = self.attribute(name, "ifindex")?.parse().ok()?;
        let hwaddr = self.attribute(name, "address")?.parse().ok()?;
        Some(Link { name: name.to_owned(), index, hwaddr })
    }

    /// Whether the link has a carrier. A link that is down has no answer to that: no.
    #[must_use]
    pub fn has_carrier(&self, name: &str) -> bool {
        self.attribute(name, "carrier").is_some_and(|value| value == "1")
    }

    fn attribute(&self, link: &str, name: &str) -> Option<String> {
        Some(std::fs::read_to_string(self.0.join(link).join(name)).ok()?.trim().to_owned())
    }
}

/// The global IPv6 addresses of a link that are ready for use, from `/proc/net/if_inet6`: the kernel makes them from router
/// advertisements without anybody's help.
#[must_use]
pub fn global_ipv6(table: &str, link: &str) -> Vec<(std::net::Ipv6Addr, u8)> {
    // Columns: address, index, prefix length, scope (00 global), flags (40 tentative, 08 duplicate), name.
    table
        .lines()
        .filter_map(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            let [address, _, prefix, scope, flags, name] = columns[..] else { return None };
            let flags = u32::from_str_radix(flags, 16).ok()?;
            if name != link || scope != "00" || flags & 0x48 != 0 {
                return None;
            }
            let address = u128::from_str_radix(address, 16).ok()?;
            Some((address.into(), u8::from_str_radix(prefix, 16).ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(root: &Path, name: &str, kind: &str, index: &str, physical: bool) {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        if physical {
            std::fs::create_dir(dir.join("device")).unwrap();
        }
        for (file, text) in [("type", kind), ("ifindex", index), ("address", "52:54:00:00:00:01"), ("carrier", "1")] {
            std::fs::write(dir.join(file), format!("{text}\n")).unwrap();
        }
    }

    #[test]
    fn only_physical_links_are_used() {
        let root = tempfile::tempdir().unwrap();
        link(root.path(), "lo", "772", "1", false);
        link(root.path(), "enp2", "1", "3", true);
        link(root.path(), "enp1", "1", "2", true);
        link(root.path(), "br0", "1", "4", false);
        link(root.path(), "wwan0", "519", "5", true);
        let links = Links::under(root.path());
        let names: Vec<String> = links.physical().into_iter().map(|link| link.name).collect();
        assert_eq!(names, ["enp1", "enp2"]);
        assert!(links.has_carrier("enp1"));
        assert!(!links.has_carrier("gone"));
    }

    #[test]
    fn global_addresses_are_told_from_tentative_and_link_local_ones() {
        let table = "\
20010db8000000000000000000000005 02 40 00 00     eth0
20010db8000000000000000000000006 02 40 00 40     eth0
fe80000000000000505400fffe000001 02 40 20 80     eth0
20010db8000000000000000000000007 03 40 00 00     eth1
00000000000000000000000000000001 01 80 10 80       lo
nonsense
";
        assert_eq!(global_ipv6(table, "eth0"), [("2001:db8::5".parse().unwrap(), 64)]);
    }
}
