//! Attributes: one table with name, kind and a line of description; validation follows from the kind.

use moor_api::deploy::Cidr;
use moor_api::ids::{HwAddr, ProfileName};
use moor_api::problem::{Code, Problem};
use std::net::IpAddr;

/// What a value has to look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Anything in one line.
    Text,
    /// Comma-separated names of groups.
    Groups,
    /// A UUID.
    Uuid,
    /// A hardware address.
    HwAddr,
    /// ADDRESS/PREFIX.
    Cidr,
    /// An address.
    Address,
    /// Comma-separated addresses.
    Addresses,
    /// Comma-separated names or addresses.
    Hosts,
    /// One word of letters, digits and these signs. Nodes write it into configuration files, and take no other: what they would refuse
    /// in the middle of a boot is refused here.
    Word(&'static str),
    /// Comma-separated words of that kind.
    Words(&'static str),
    /// A number between two bounds.
    Number(u64, u64),
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A name of the time zone database.
    TimeZone,
    /// A profile name.
    Profile,
    /// An ssh public key, or several lines of them.
    SshKeys,
    /// A crypt(5) hash.
    PasswordHash,
}

/// One attribute. A `*` in the name stands for a label, or for nothing.
#[derive(Debug, Clone, Copy)]
pub struct Attribute {
    /// `category.attribute`, `category.*.attribute` or `category.*`.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// What it is for.
    pub description: &'static str,
}

const fn attribute(name: &'static str, kind: Kind, description: &'static str) -> Attribute {
    Attribute { name, kind, description }
}

/// Every attribute there is.
pub const TABLE: &[Attribute] = &[
    attribute("groups", Kind::Groups, "groups of the node, first one first"),
    attribute("type", Kind::Text, "what kind of machine it is"),
    attribute("crypted.rootpassword", Kind::PasswordHash, "crypt(5) hash of root's password"),
    attribute("id.uuid", Kind::Uuid, "SMBIOS system UUID"),
    attribute("id.serial", Kind::Text, "SMBIOS serial number"),
    attribute("id.model", Kind::Text, "model"),
    attribute("id.index", Kind::Number(0, u64::MAX), "a number of the site's own"),
    attribute("info.note", Kind::Text, "a note"),
    attribute("location.room", Kind::Text, "room"),
    attribute("location.row", Kind::Text, "row"),
    attribute("location.rack", Kind::Text, "rack"),
    attribute("location.u", Kind::Number(1, 100), "lowest unit in the rack"),
    attribute("location.height", Kind::Number(1, 100), "height in units"),
    attribute("deployment.profile", Kind::Profile, "profile it booted last"),
    attribute("net.*.hwaddr", Kind::HwAddr, "hardware address of the interface"),
    attribute("net.*.hostname", Kind::Text, "name on this interface"),
    attribute("net.*.interface_names", Kind::Words("._-@:"), "names of the interface to try, comma-separated"),
    attribute("net.*.mtu", Kind::Number(576, 65_520), "MTU in bytes"),
    attribute(
        "net.*.ipv4_method",
        Kind::OneOf(&["static", "dhcp", "firmwaredhcp", "none"]),
        "where the IPv4 address comes from",
    ),
    attribute("net.*.ipv4_address", Kind::Cidr, "IPv4 address with prefix length"),
    attribute("net.*.ipv4_gateway", Kind::Address, "IPv4 gateway"),
    attribute(
        "net.*.ipv6_method",
        Kind::OneOf(&["static", "dhcp", "firmwaredhcp", "none"]),
        "where the IPv6 address comes from",
    ),
    attribute("net.*.ipv6_address", Kind::Cidr, "IPv6 address with prefix length"),
    attribute("net.*.ipv6_gateway", Kind::Address, "IPv6 gateway"),
    attribute("ntp.servers", Kind::Hosts, "NTP servers"),
    attribute("dns.servers", Kind::Addresses, "resolvers"),
    attribute("dns.domain", Kind::Word(".-_"), "domain of the node"),
    attribute("time.zone", Kind::TimeZone, "IANA time zone"),
    attribute("locale.lang", Kind::Word("._-@"), "LANG"),
    attribute("locale.keymap", Kind::Word("._-"), "console keymap"),
    attribute("ssh.trustnodes", Kind::Text, "noderange whose users may log in here by host; default: all nodes"),
    attribute("pubkeys.ssh", Kind::SshKeys, "public keys for root's authorized_keys"),
    attribute("secret.snmpcommunity", Kind::Text, "SNMP community"),
    attribute("secret.hardwaremanagementuser", Kind::Text, "user of the BMC"),
    attribute("secret.hardwaremanagementpassword", Kind::Text, "password of the BMC"),
    attribute("hardwaremanagement.manager", Kind::Text, "address of the BMC"),
    attribute("custom.nodesecret.*", Kind::Text, "a secret of the site's own for this node alone"),
    attribute("custom.*", Kind::Text, "anything of the site's own"),
];

/// Whether values of this attribute are never returned.
#[must_use]
pub fn is_secret(name: &str) -> bool {
    ["secret.", "crypted.", "custom.nodesecret."].iter().any(|prefix| name.starts_with(prefix))
}

fn matches(pattern: &str, name: &str) -> bool {
    if pattern == name {
        return true;
    }
    let Some((head, tail)) = pattern.split_once('*') else { return false };
    // `net.*.mtu` is also `net.mtu`: the interface without a label.
    if let Some(tail) = tail.strip_prefix('.')
        && name.strip_prefix(head).is_some_and(|rest| rest == tail)
    {
        return true;
    }
    let label = name.strip_prefix(head).and_then(|rest| rest.strip_suffix(tail));
    label.is_some_and(|label| {
        !label.is_empty()
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-') || (tail.is_empty() && b == b'.'))
    })
}

/// The attribute of this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Attribute> {
    TABLE.iter().find(|attribute| matches(attribute.name, name))
}

/// Checks name and value.
///
/// # Errors
/// No such attribute (with those of its category), or a value that is not of its kind.
pub fn validate(name: &str, value: &str) -> Result<(), Problem> {
    let bad = |detail: String| Problem::new(Code::BadRequest, detail);
    let Some(attribute) = find(name) else {
        let category = name.split('.').next().unwrap_or_default();
        let near: Vec<&str> =
            TABLE.iter().map(|a| a.name).filter(|known| known.split('.').next() == Some(category)).collect();
        let hint = if near.is_empty() { String::new() } else { format!("; there are {}", near.join(", ")) };
        return Err(bad(format!("no attribute '{name}'{hint}")));
    };
    if value.is_empty() {
        // Blank masks an inherited value.
        return Ok(());
    }
    if value.len() > 16_384 {
        return Err(bad(format!("{name}: a value has at most 16384 bytes")));
    }
    check(attribute.kind, value).map_err(|why| {
        if is_secret(name) { bad(format!("{name}: {why}")) } else { bad(format!("{name}: '{value}' {why}")) }
    })
}

fn is_word(text: &str, signs: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || signs.contains(c))
}

fn check(kind: Kind, value: &str) -> Result<(), String> {
    let one_line = !value.chars().any(char::is_control);
    let list = || value.split(',').map(str::trim);
    let good = match kind {
        Kind::SshKeys => value.lines().all(|line| line.is_empty() || ssh_key::PublicKey::from_openssh(line).is_ok()),
        _ if !one_line => return Err("is not one line of text".into()),
        Kind::Text => true,
        Kind::Groups => list().all(|name| name.parse::<ProfileName>().is_ok()),
        Kind::Uuid => uuid::Uuid::parse_str(value).is_ok(),
        Kind::HwAddr => value.parse::<HwAddr>().is_ok(),
        Kind::Cidr => value.parse::<Cidr>().is_ok(),
        Kind::Address => value.parse::<IpAddr>().is_ok(),
        Kind::Addresses => list().all(|part| part.parse::<IpAddr>().is_ok()),
        Kind::Hosts => list().all(|part| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':'))
        }),
        Kind::Word(signs) => is_word(value, signs),
        Kind::Words(signs) => list().all(|part| is_word(part, signs)),
        Kind::TimeZone => value.split('/').all(|part| is_word(part, "_+-")),
        Kind::Number(low, high) => value.parse::<u64>().is_ok_and(|number| (low..=high).contains(&number)),
        Kind::OneOf(words) => words.contains(&value),
        Kind::Profile => value.parse::<ProfileName>().is_ok(),
        Kind::PasswordHash => value.starts_with('$') && value.len() >= 20 && is_word(value, "./$=,"),
    };
    if good { Ok(()) } else { Err(describe(kind)) }
}

fn describe(kind: Kind) -> String {
    match kind {
        Kind::Text => "is not one line of text".into(),
        Kind::Groups => "is not a comma-separated list of group names".into(),
        Kind::Uuid => "is not a UUID".into(),
        Kind::HwAddr => "is not a hardware address such as 52:54:00:12:34:56".into(),
        Kind::Cidr => "is not an address with its prefix length, such as 10.1.2.3/24".into(),
        Kind::Address => "is not an IP address".into(),
        Kind::Addresses => "is not a comma-separated list of IP addresses".into(),
        Kind::Hosts => "is not a comma-separated list of host names or addresses".into(),
        Kind::Word(signs) => format!("is not one word of letters, digits and {}", spaced(signs)),
        Kind::Words(signs) => {
            format!("is not a comma-separated list of words of letters, digits and {}", spaced(signs))
        }
        Kind::TimeZone => "is not the name of a time zone, such as Europe/Berlin".into(),
        Kind::Number(low, high) => format!("is not a number from {low} to {high}"),
        Kind::OneOf(words) => format!("is not one of {}", words.join(", ")),
        Kind::Profile => "is not a profile name".into(),
        Kind::SshKeys => "is not an ssh public key".into(),
        Kind::PasswordHash => "the value is not a crypt(5) hash (`openssl passwd -6` makes one)".into(),
    }
}

fn spaced(signs: &str) -> String {
    signs.chars().map(String::from).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_of_their_kind() {
        let hash = format!("$6$salt${}", "a".repeat(86));
        for (name, value) in [
            ("id.uuid", "5f1e7a52-30a3-4f6c-9d3e-6c2f9a1b0c01"),
            ("net.hwaddr", "52:54:00:6d:6f:01"),
            ("net.ib1.ipv4_address", "10.1.2.3/24"),
            ("net.mtu", "9000"),
            ("dns.servers", "10.0.0.1, 2001:db8::1"),
            ("crypted.rootpassword", &hash),
            ("custom.anything.at.all", "x"),
            ("dns.domain", "hpc.example"),
            ("time.zone", "America/Argentina/Buenos_Aires"),
            ("time.zone", "Etc/GMT+5"),
            ("locale.lang", "de_DE.UTF-8"),
            ("locale.keymap", "de-latin1"),
            ("net.interface_names", "eno1, enp1s0"),
            ("custom.nodesecret.key", "x"),
            ("info.note", ""),
        ] {
            assert!(validate(name, value).is_ok(), "{name}={value}: {:?}", validate(name, value));
        }
        for (name, value, says) in [
            ("id.uuid", "x", "UUID"),
            ("net.ipv4_address", "10.1.2.3", "prefix"),
            ("net.ipv4_address", "10.1.2.3/33", "prefix"),
            ("net.mtu", "1", "576"),
            ("net.ipv4_method", "magic", "static"),
            ("net.a.b.mtu", "1500", "no attribute"),
            ("location.rck", "1", "location.rack"),
            ("info.note", "a\nb", "one line"),
            ("crypted.rootpassword", "plaintext", "hash"),
            // What a node would refuse when it writes its files.
            ("crypted.rootpassword", "$6$salt$ä23456789012345678", "hash"),
            ("dns.domain", "hpc.example other", "one word"),
            ("time.zone", "Europe//Berlin", "Europe/Berlin"),
            ("time.zone", "/etc/shadow", "Europe/Berlin"),
            ("time.zone", "../../etc/shadow", "Europe/Berlin"),
            ("locale.lang", "de_DE\"", "one word"),
            ("locale.keymap", "de;reboot", "one word"),
            ("net.interface_names", "eno1,,eno2", "list of words"),
        ] {
            let error = validate(name, value).unwrap_err().detail;
            assert!(error.contains(says), "{name}={value}: {error}");
        }
        let error = validate("crypted.rootpassword", "hunter2").unwrap_err().detail;
        assert!(!error.contains("hunter2"), "a secret in an error: {error}");
    }

    #[test]
    fn every_attribute_is_found_by_its_own_name() {
        for attribute in TABLE {
            let name = attribute.name.replace('*', "x");
            assert_eq!(find(&name).unwrap().name, attribute.name, "{name}");
        }
    }
}
