//! The deploy document as files of an operating system: pure functions from the document, and from what was found out during the
//! boot, to a list of files. Writing them is [`crate::tree`]'s. One document gives the same files each time.
//!
//! This is Debian with systemd-networkd; another system gets functions of its own from the same model.

mod accounts;
mod names;
mod network;
mod ssh;
mod system;

pub(crate) use network::is_boot;
pub(crate) use ssh::authorities;

use crate::ssh::HostKey;
use crate::tree::{Tree, TreeError};
use moor_api::deploy::DeployDocument;
use moor_api::ids::HwAddr;
use moor_api::node::{HostCertificates, SshTrust};
use std::net::IpAddr;
use zeroize::Zeroizing;

/// The document cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} '{value}' cannot be written into a configuration file: {reason}")]
pub struct RenderError {
    /// Which attribute.
    pub field: &'static str,
    /// What it holds, cut to 80 characters.
    pub value: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// What a file holds.
#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    /// A new file of this mode, owned by root.
    New(u32, Zeroizing<String>),
    /// In place of an existing file, whose owner and mode it keeps.
    Replaced(Zeroizing<String>),
    /// A symbolic link.
    Link(String),
    /// A directory of this mode, where there is none.
    Directory(u32),
}

/// A file of the new root.
#[derive(Clone, PartialEq, Eq)]
pub struct RenderedFile {
    /// Absolute path in the root.
    pub path: String,
    /// What it holds.
    pub content: Content,
}

impl RenderedFile {
    fn new(path: impl Into<String>, mode: u32, text: impl Into<String>) -> Self {
        Self { path: path.into(), content: Content::New(mode, Zeroizing::new(text.into())) }
    }

    fn link(path: impl Into<String>, target: impl Into<String>) -> Self {
        Self { path: path.into(), content: Content::Link(target.into()) }
    }

    /// Writes it.
    ///
    /// # Errors
    /// The tree refuses.
    pub fn write(&self, tree: &Tree) -> Result<(), TreeError> {
        match &self.content {
            Content::New(mode, text) => tree.write(&self.path, *mode, text.as_bytes()),
            Content::Replaced(text) => tree.replace(&self.path, text.as_bytes()),
            Content::Link(target) => tree.link(&self.path, target),
            Content::Directory(mode) => tree.make_directory(&self.path, *mode),
        }
    }
}

/// The interface the node booted over and what its network said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootInterface {
    /// The kernel's name.
    pub name: String,
    /// Its hardware address.
    pub hwaddr: HwAddr,
    /// Its address.
    pub address: moor_api::deploy::Cidr,
    /// Default gateways.
    pub gateways: Vec<IpAddr>,
    /// Whether the address is from the kernel command line.
    pub is_static: bool,
    /// Resolvers.
    pub dns: Vec<IpAddr>,
    /// Domain.
    pub domain: Option<String>,
}

/// What was found out during the boot.
pub struct Facts<'a> {
    /// The interface it booted over.
    pub interface: &'a BootInterface,
    /// Host keys of this boot.
    pub host_keys: &'a [HostKey],
    /// Their certificates.
    pub certificates: &'a HostCertificates,
    /// Whom sshd trusts.
    pub trust: &'a SshTrust,
    /// The image's `/etc/shadow`.
    pub shadow: Option<Zeroizing<String>>,
    /// The image's `/root/.ssh/authorized_keys`.
    pub authorized_keys: Option<String>,
}

/// Paths whose present text goes into [`Facts`].
pub const SHADOW: &str = "/etc/shadow";
/// As [`SHADOW`].
pub const AUTHORIZED_KEYS: &str = "/root/.ssh/authorized_keys";

/// Renders Debian with systemd-networkd.
///
/// # Errors
/// A value of the document has no place in a configuration file.
pub fn debian(document: &DeployDocument, facts: &Facts<'_>) -> Result<Vec<RenderedFile>, RenderError> {
    let mut files = names::files(document, facts)?;
    files.extend(network::files(document, facts.interface)?);
    files.extend(system::files(document)?);
    files.extend(accounts::files(document, facts)?);
    files.extend(ssh::files(document, facts)?);
    Ok(files)
}

/// Reads what is needed of the tree, renders, and writes.
///
/// # Errors
/// The document cannot be rendered, or a file cannot be written: named.
pub fn install(
    tree: &Tree,
    document: &DeployDocument,
    mut facts: Facts<'_>,
) -> Result<usize, Box<dyn std::error::Error + Send + Sync>> {
    facts.shadow = tree.read(SHADOW)?.map(Zeroizing::new);
    facts.authorized_keys = tree.read(AUTHORIZED_KEYS)?;
    let files = debian(document, &facts)?;
    for file in &files {
        file.write(tree)?;
    }
    Ok(files.len())
}

/// Refuses what would end a line of a configuration file or begin another.
fn line<'a>(field: &'static str, value: &'a str) -> Result<&'a str, RenderError> {
    let error = |reason| RenderError { field, value: value.chars().take(80).collect(), reason };
    if value.is_empty() {
        return Err(error("it is empty"));
    }
    if value.chars().any(char::is_control) {
        return Err(error("it has a control character"));
    }
    Ok(value)
}

/// A value that is one word of letters, digits and a few signs.
fn word<'a>(field: &'static str, value: &'a str, signs: &str) -> Result<&'a str, RenderError> {
    if value.chars().all(|c| c.is_ascii_alphanumeric() || signs.contains(c)) {
        return line(field, value);
    }
    Err(RenderError {
        field,
        value: value.chars().take(80).collect(),
        reason: "it has a character that it may not have",
    })
}

#[cfg(test)]
mod tests;
