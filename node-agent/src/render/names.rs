//! Who the node is and how it finds others: hostname, hosts, machine-id, resolver.

use super::{BootInterface, Facts, RenderError, RenderedFile, word};
use moor_api::deploy::{DeployDocument, IpMethod};
use std::fmt::Write as _;
use std::net::IpAddr;

pub(super) fn files(document: &DeployDocument, facts: &Facts<'_>) -> Result<Vec<RenderedFile>, RenderError> {
    let name = document.node.name.as_str();
    let domain = document.dns.domain.as_deref().map(|domain| word("dns.domain", domain, ".-_")).transpose()?;
    let machine_id = word("machine id", &document.node.machine_id, "")?;
    Ok(vec![
        RenderedFile::new("/etc/hostname", 0o644, format!("{name}\n")),
        RenderedFile::new("/etc/hosts", 0o644, hosts(document, name, domain)),
        RenderedFile::new("/etc/machine-id", 0o444, format!("{machine_id}\n")),
        RenderedFile::new("/etc/resolv.conf", 0o644, resolver(document, domain, facts.interface)?),
    ])
}

fn hosts(document: &DeployDocument, name: &str, domain: Option<&str>) -> String {
    // The full name first: `hostname --fqdn` takes the first name of the line.
    let names = domain.map_or_else(|| name.to_owned(), |domain| format!("{name}.{domain} {name}"));
    let mut text = String::from("127.0.0.1 localhost\n");
    let mut own: Vec<IpAddr> = document
        .interfaces
        .iter()
        .flat_map(|interface| {
            interface.addresses.iter().map(|cidr| cidr.address).filter(|address| {
                let method = if address.is_ipv4() { interface.ipv4 } else { interface.ipv6 };
                method == IpMethod::Static
            })
        })
        .collect();
    own.dedup();
    // One address of each family: the first interface's.
    let v4 = own.iter().find(|address| address.is_ipv4());
    let v6 = own.iter().find(|address| address.is_ipv6());
    if v4.is_none() && v6.is_none() {
        // Debian's address for a name without a fixed one.
        let _ = writeln!(text, "127.0.1.1 {names}");
    }
    for address in v4.into_iter().chain(v6) {
        let _ = writeln!(text, "{address} {names}");
    }
    text.push_str("\n::1 localhost ip6-localhost ip6-loopback\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n");
    text
}

fn resolver(document: &DeployDocument, domain: Option<&str>, boot: &BootInterface) -> Result<String, RenderError> {
    let mut text = String::from("# Written by moor-agent at boot.\n");
    // Attributes win; a node without any takes what its network says.
    let own = domain.is_some() || !document.dns.servers.is_empty();
    let servers = if document.dns.servers.is_empty() { &boot.dns } else { &document.dns.servers };
    let domain = match (own, boot.domain.as_deref()) {
        (false, Some(domain)) => Some(word("the DHCP server's domain", domain, ".-_")?),
        _ => domain,
    };
    if let Some(domain) = domain {
        let _ = writeln!(text, "search {domain}");
    }
    for server in servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    Ok(text)
}
