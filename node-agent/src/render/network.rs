//! systemd-networkd: one file for each interface of the document.

use super::{BootInterface, RenderError, RenderedFile, word};
use moor_api::deploy::{DeployDocument, Interface, IpMethod};
use moor_api::ids::HwAddr;
use std::fmt::Write as _;

pub(super) fn files(document: &DeployDocument, boot: &BootInterface) -> Result<Vec<RenderedFile>, RenderError> {
    let mut files = Vec::new();
    let mut covers_boot = false;
    for (index, interface) in document.interfaces.iter().enumerate() {
        let is_boot = is_boot(interface, &boot.hwaddr, &boot.name);
        covers_boot |= is_boot;
        let label = if interface.label.is_empty() {
            format!("{index}")
        } else {
            format!("{index}-{}", word("net label", &interface.label, "._-")?)
        };
        let path = format!("/etc/systemd/network/10-moor-{label}.network");
        files.push(RenderedFile::new(path, 0o644, unit(interface, document, boot, is_boot)?));
    }
    if !covers_boot {
        // The root comes over this interface: networkd has to leave it as it is, whatever else matches.
        files.push(RenderedFile::new("/etc/systemd/network/05-moor-boot.network", 0o644, boot_unit(boot)));
    }
    Ok(files)
}

/// Whether the node booted over this interface.
pub(crate) fn is_boot(interface: &Interface, hwaddr: &HwAddr, name: &str) -> bool {
    match (&interface.hwaddr, &interface.names[..]) {
        (Some(own), _) => own == hwaddr,
        (None, []) => true,
        (None, names) => names.iter().any(|own| own == name),
    }
}

fn unit(
    interface: &Interface,
    document: &DeployDocument,
    boot: &BootInterface,
    is_boot: bool,
) -> Result<String, RenderError> {
    let mut text = String::from("# Written by moor-agent at boot.\n[Match]\n");
    match (&interface.hwaddr, &interface.names[..]) {
        (Some(hwaddr), _) => {
            by_hwaddr(&mut text, hwaddr);
        }
        (None, []) => {
            by_hwaddr(&mut text, &boot.hwaddr);
        }
        (None, names) => {
            text.push_str("Name=");
            for (index, name) in names.iter().enumerate() {
                text.push_str(if index == 0 { "" } else { " " });
                text.push_str(word("net.interface_names", name, "._-@:")?);
            }
            text.push('\n');
        }
    }
    text.push_str("\n[Link]\n");
    if let Some(mtu) = interface.mtu {
        let _ = writeln!(text, "MTUBytes={mtu}");
    }
    // A second port may have no cable: it must not keep the system from being up.
    let _ = writeln!(text, "RequiredForOnline={}", if is_boot { "yes" } else { "no" });

    text.push_str("\n[Network]\n");
    let dhcp = match (interface.ipv4, interface.ipv6) {
        (IpMethod::Dhcp, IpMethod::Dhcp) => "yes",
        (IpMethod::Dhcp, _) => "ipv4",
        // DHCPv6 is asked when router advertisements say so, without this switch.
        _ => "no",
    };
    let _ = writeln!(text, "DHCP={dhcp}");
    let router = if interface.ipv6 == IpMethod::Dhcp { "yes" } else { "no" };
    let _ = writeln!(text, "IPv6AcceptRA={router}");
    if interface.ipv6 == IpMethod::None {
        text.push_str("LinkLocalAddressing=no\n");
    }
    if is_boot {
        keep(&mut text);
    }
    for cidr in static_addresses(interface) {
        let _ = writeln!(text, "Address={cidr}");
    }
    for gateway in &interface.gateways {
        if method(interface, gateway.is_ipv4()) == IpMethod::Static {
            let _ = writeln!(text, "Gateway={gateway}");
        }
    }
    for server in &document.dns.servers {
        let _ = writeln!(text, "DNS={server}");
    }
    if let Some(domain) = &document.dns.domain {
        let _ = writeln!(text, "Domains={}", word("dns.domain", domain, ".-_")?);
    }
    if interface.ipv4 == IpMethod::Dhcp {
        dhcpv4(&mut text);
    }
    Ok(text)
}

/// The card itself, not what is stacked on it and shows the same address. (`PermanentMACAddress` would not match cards that have none.)
fn by_hwaddr(text: &mut String, hwaddr: &HwAddr) {
    let _ = writeln!(text, "MACAddress={hwaddr}\nType=!vlan bridge bond macvlan");
}

/// The root comes over this link: addresses and routes stay when networkd starts, stops, or loses its lease.
fn keep(text: &mut String) {
    text.push_str("KeepConfiguration=yes\n");
}

/// The client id of the boot stage, so that the server gives the same address again.
fn dhcpv4(text: &mut String) {
    text.push_str("\n[DHCPv4]\nClientIdentifier=mac\n");
}

/// For an interface that the document does not know.
fn boot_unit(boot: &BootInterface) -> String {
    let mut text = String::from("# Written by moor-agent at boot: the node booted over this interface.\n[Match]\n");
    by_hwaddr(&mut text, &boot.hwaddr);
    text.push_str("\n[Link]\nRequiredForOnline=yes\n\n[Network]\n");
    if boot.is_static {
        text.push_str("DHCP=no\n");
        keep(&mut text);
        let _ = writeln!(text, "Address={}", boot.address);
        for gateway in &boot.gateways {
            let _ = writeln!(text, "Gateway={gateway}");
        }
    } else {
        text.push_str("DHCP=yes\nIPv6AcceptRA=yes\n");
        keep(&mut text);
        dhcpv4(&mut text);
    }
    text
}

fn method(interface: &Interface, ipv4: bool) -> IpMethod {
    if ipv4 { interface.ipv4 } else { interface.ipv6 }
}

fn static_addresses(interface: &Interface) -> impl Iterator<Item = &moor_api::deploy::Cidr> {
    interface.addresses.iter().filter(|cidr| method(interface, cidr.address.is_ipv4()) == IpMethod::Static)
}
