//! The deploy document: what a node is made from. One schema for every operating system; renderers on the node turn it into
//! that system's own configuration. `GET /node/v1/config` returns it.

use crate::ids::{DeploymentId, HwAddr, NodeId, NodeName, ProfileName, Sha256Digest};
use crate::node::MemberEndpoint;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// The version of this schema. It grows by optional fields; a change of meaning would raise it.
pub const SCHEMA: u32 = 1;

/// Everything a node's configuration is rendered from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeployDocument {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The order this boot carries out; the same until the next `moor deploy`.
    pub deployment: Option<DeploymentId>,
    /// The node's identity in words.
    pub node: NodeSection,
    /// What it boots.
    pub profile: ProfileSection,
    /// Its interfaces, in order; the first is the one it deploys over, unless `boot` says another.
    pub interfaces: Vec<Interface>,
    /// Name resolution.
    pub dns: DnsSection,
    /// NTP servers, by name or address.
    #[serde(default)]
    pub ntp: Vec<String>,
    /// IANA name, such as `Europe/Berlin`; absent: UTC.
    #[serde(default)]
    pub time_zone: Option<String>,
    /// Language and keyboard.
    #[serde(default)]
    pub locale: LocaleSection,
    /// Members the node may talk to, nearest first.
    pub members: Vec<MemberEndpoint>,
    /// The admin's scripts by phase, in order.
    #[serde(default)]
    pub phases: Vec<Phase>,
    /// Version of the trust bundle that the node should hold.
    pub trust_version: u64,
    /// Only in boot stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets: Option<DeploySecrets>,
}

/// Who the node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSection {
    /// Immutable id.
    pub id: NodeId,
    /// Name, also the host name.
    pub name: NodeName,
    /// `machine-id`(5): 32 hexadecimal digits, derived from the node id, so the same at every boot and unlike any other's.
    pub machine_id: String,
}

/// What the node boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileSection {
    /// Its name.
    pub name: ProfileName,
    /// Digest of its generation.
    pub generation: Sha256Digest,
    /// How the root comes to the node.
    pub root: RootMode,
    /// The writable layer.
    #[serde(default)]
    pub overlay: Overlay,
    /// What the node does when its boot has failed.
    #[serde(default)]
    pub on_failure: OnFailure,
}

/// What a node does when its boot has failed for a reason that trying again does not mend. The boot stage is closed first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// Gives control back to the initramfs: a shell, or what `panic=` says.
    #[default]
    Hold,
    /// Restarts the machine.
    Reboot,
}

/// How the root comes to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootMode {
    /// Blocks on demand over HTTPS.
    Tethered,
    /// The whole compressed image in RAM.
    Untethered,
    /// Unpacked in RAM.
    Ram,
    /// As tethered, and chunks stay on a partition of the node's over boots.
    Disk,
}

impl RootMode {
    /// The word in profiles and on the kernel command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tethered => "tethered",
            Self::Untethered => "untethered",
            Self::Ram => "ram",
            Self::Disk => "disk",
        }
    }
}

impl std::str::FromStr for RootMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Tethered, Self::Untethered, Self::Ram, Self::Disk];
        let words = || all.map(Self::as_str).join(", ");
        let known = all.into_iter().find(|mode| mode.as_str() == text);
        known.ok_or_else(|| format!("a root is one of {}", words()))
    }
}

/// The writable overlay in compressed RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// Size of the zram disk as a share of the node's memory, in per cent (1 to 400: it holds compressed data).
    pub size_percent: u16,
    /// Compression, a name from `/sys/block/zram0/comp_algorithm`; absent: the kernel's default.
    #[serde(default)]
    pub algorithm: Option<String>,
    /// How much memory the disk may take at most, in per cent (1 to 100); absent: as much as it needs. Beyond it, writes fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_percent: Option<u16>,
}

impl Default for Overlay {
    fn default() -> Self {
        Self { size_percent: 25, algorithm: None, limit_percent: None }
    }
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The label in `net.LABEL.*`; empty for plain `net.*`.
    #[serde(default)]
    pub label: String,
    /// How to find it: by hardware address, else by name. Both empty: the interface the node booted over.
    #[serde(default)]
    pub hwaddr: Option<HwAddr>,
    /// Names to try, in order.
    #[serde(default)]
    pub names: Vec<String>,
    /// IPv4 by DHCP, static or not at all.
    pub ipv4: IpMethod,
    /// IPv6 by router advertisement or `DHCPv6`, static or not at all.
    pub ipv6: IpMethod,
    /// Static addresses of both families.
    #[serde(default)]
    pub addresses: Vec<Cidr>,
    /// Default gateways, at most one of each family.
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
    /// MTU in bytes, 576 to 65,520.
    #[serde(default)]
    pub mtu: Option<u32>,
}

/// Where addresses of a family come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpMethod {
    /// DHCP (IPv6: router advertisement, then `DHCPv6` when it says so).
    #[default]
    Dhcp,
    /// As listed in `addresses`.
    Static,
    /// Not configured.
    None,
}

/// An address with its prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    /// The address of the host (not of the network).
    pub address: IpAddr,
    /// Prefix length, 0 to 32 or 128.
    pub prefix: u8,
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// A text is not `ADDRESS/PREFIX`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an address with a prefix length, such as 10.1.2.3/24")]
pub struct InvalidCidr(String);

impl std::str::FromStr for Cidr {
    type Err = InvalidCidr;
    fn from_str(text: &str) -> Result<Self, InvalidCidr> {
        let error = || InvalidCidr(text.chars().take(80).collect());
        let (address, prefix) = text.split_once('/').ok_or_else(error)?;
        let address: IpAddr = address.parse().map_err(|_| error())?;
        let prefix: u8 = prefix.parse().map_err(|_| error())?;
        if prefix > if address.is_ipv4() { 32 } else { 128 } {
            return Err(error());
        }
        Ok(Self { address, prefix })
    }
}

impl Serialize for Cidr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Name resolution.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsSection {
    /// Resolvers.
    #[serde(default)]
    pub servers: Vec<IpAddr>,
    /// The node's domain, also the search domain.
    #[serde(default)]
    pub domain: Option<String>,
}

/// Language and keyboard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocaleSection {
    /// `LANG`, such as `C.UTF-8`.
    #[serde(default)]
    pub lang: Option<String>,
    /// Console keymap.
    #[serde(default)]
    pub keymap: Option<String>,
}

/// Longest script in bytes: the agent takes no longer one, so none is published.
pub const MAX_SCRIPT: usize = 4 << 20;

/// Scripts of one phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Which.
    pub phase: PhaseName,
    /// Paths under the profile's `scripts/PHASE/`, in the order they run.
    pub scripts: Vec<String>,
}

/// When a script runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PhaseName {
    /// Boot stage, before the root is there.
    Pre,
    /// Boot stage, on the new root before it starts.
    Post,
    /// Run stage, once after an installation.
    Firstboot,
    /// Run stage, at every boot.
    Onboot,
}

impl PhaseName {
    /// The word in URLs and directories.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pre => "pre",
            Self::Post => "post",
            Self::Firstboot => "firstboot",
            Self::Onboot => "onboot",
        }
    }
}

/// Secret fields. `Debug` shows none of them.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct DeploySecrets {
    /// `crypt`(5) hash of root's password; absent: the password is locked.
    #[serde(default)]
    pub root_password_hash: Option<String>,
}

impl std::fmt::Debug for DeploySecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DeploySecrets(..)")
    }
}
