//! New host certificates for the host keys of this boot.

use crate::child;
use crate::ssh;
use crate::tree::Tree;
use moor_api::node::{HostCertificateRequest, HostCertificates};
use std::path::Path;
use std::time::Duration;
use tokio::process::Command;

/// A host key's public half: the word in its file's name, and its line.
pub(super) struct Public {
    word: &'static str,
    line: String,
}

/// The public keys of this boot, as the boot stage wrote them.
pub(super) fn public_keys() -> std::io::Result<Vec<Public>> {
    public_keys_in(Path::new("/etc/ssh"))
}

fn public_keys_in(directory: &Path) -> std::io::Result<Vec<Public>> {
    let mut keys = Vec::new();
    for word in ["ed25519", "ecdsa"] {
        match std::fs::read_to_string(directory.join(format!("ssh_host_{word}_key.pub"))) {
            Ok(line) => keys.push(Public { word, line: line.trim().to_owned() }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (),
            Err(error) => return Err(error),
        }
    }
    if keys.is_empty() {
        return Err(std::io::Error::other("there is no host key in /etc/ssh"));
    }
    Ok(keys)
}

pub(super) fn request(keys: &[Public]) -> HostCertificateRequest {
    HostCertificateRequest { public_keys: keys.iter().map(|key| key.line.clone()).collect() }
}

/// Writes the certificates and has sshd read them; connections that are open stay.
pub(super) async fn install(keys: &[Public], answer: &HostCertificates) -> anyhow::Result<()> {
    write(&Tree::open(Path::new("/"))?, keys, answer)?;
    let mut reload = Command::new("systemctl");
    // Socket-activated or stopped, it reads them at its next start.
    reload.args(["try-reload-or-restart", "ssh.service"]);
    child::run(reload, b"", Duration::from_mins(1)).await?;
    Ok(())
}

fn write(tree: &Tree, keys: &[Public], answer: &HostCertificates) -> anyhow::Result<()> {
    let lines: Vec<&str> = keys.iter().map(|key| key.line.as_str()).collect();
    ssh::check_certificates(&lines, &answer.certificates)?;
    for (key, certificate) in keys.iter().zip(&answer.certificates) {
        let path = format!("/etc/ssh/ssh_host_{}_key-cert.pub", key.word);
        tree.write(&path, 0o644, format!("{}\n", certificate.trim()).as_bytes())?;
    }
    Ok(())
}
