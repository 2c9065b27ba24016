//! sshd with the host keys of this boot and their certificates, and trust between the site's hosts.

use super::{Facts, RenderError, RenderedFile, line, word};
use moor_api::deploy::DeployDocument;
use moor_api::node::SshTrust;
use std::fmt::Write as _;

/// Where the user authorities' keys lie.
const USER_AUTHORITIES: &str = "/etc/ssh/moor_user_authorities";
/// By which hosts are known.
const KNOWN_HOSTS: &str = "/etc/ssh/ssh_known_hosts";

pub(super) fn files(_: &DeployDocument, facts: &Facts<'_>) -> Result<Vec<RenderedFile>, RenderError> {
    let mut files = Vec::new();
    let mut sshd = String::from("# Written by moor-agent at boot. The first value of a keyword counts.\n");
    for (key, certificate) in facts.host_keys.iter().zip(&facts.certificates.certificates) {
        let path = format!("/etc/ssh/ssh_host_{}_key", key.word);
        let _ = writeln!(sshd, "HostKey {path}\nHostCertificate {path}-cert.pub");
        files.push(RenderedFile::new(&path, 0o600, key.private.as_str()));
        files.push(RenderedFile::new(format!("{path}.pub"), 0o644, format!("{}\n", line("a host key", &key.public)?)));
        let certificate = line("a host certificate", certificate.trim())?;
        files.push(RenderedFile::new(format!("{path}-cert.pub"), 0o644, format!("{certificate}\n")));
    }
    // The name in the packet is proved by the host certificate; a reverse lookup would only add a way to fail.
    sshd.push_str("HostbasedAuthentication yes\nHostbasedUsesNameFromPacketOnly yes\nIgnoreUserKnownHosts yes\n");
    if !facts.trust.user_authorities.is_empty() {
        let _ = writeln!(sshd, "TrustedUserCAKeys {USER_AUTHORITIES}");
        files.push(user_authorities(facts.trust)?);
    }
    files.push(RenderedFile::new("/etc/ssh/sshd_config.d/10-moor.conf", 0o644, sshd));
    files.push(RenderedFile::new(
        "/etc/ssh/ssh_config.d/10-moor.conf",
        0o644,
        "# Written by moor-agent at boot.\nHost *\n    HostbasedAuthentication yes\n    EnableSSHKeysign yes\n",
    ));
    files.push(known_hosts(facts.trust)?);
    let mut shosts = String::new();
    for host in &facts.trust.shosts {
        let _ = writeln!(shosts, "{}", word("a trusted host", host, ".-_:")?);
    }
    files.push(RenderedFile::new("/etc/ssh/shosts.equiv", 0o644, shosts));
    Ok(files)
}

/// The files that say which SSH authorities there are. They change while the node runs, too: OpenSSH reads them anew for each connection.
pub(crate) fn authorities(trust: &SshTrust) -> Result<Vec<RenderedFile>, RenderError> {
    Ok(vec![known_hosts(trust)?, user_authorities(trust)?])
}

fn known_hosts(trust: &SshTrust) -> Result<RenderedFile, RenderError> {
    Ok(RenderedFile::new(KNOWN_HOSTS, 0o644, lines("a known host", &trust.known_hosts)?))
}

fn user_authorities(trust: &SshTrust) -> Result<RenderedFile, RenderError> {
    Ok(RenderedFile::new(USER_AUTHORITIES, 0o644, lines("a user authority", &trust.user_authorities)?))
}

fn lines(field: &'static str, values: &[String]) -> Result<String, RenderError> {
    let mut text = String::new();
    for value in values {
        text.push_str(line(field, value.trim())?);
        text.push('\n');
    }
    Ok(text)
}
