//! `ssh/host-certificates` and `ssh/trust`: host keys are made on the node and certified here; who may come is the profile's and the
//! node's business.

use super::Caller;
use crate::admin::nodes::select;
use crate::http::{Failure, parse};
use crate::state::{Member, now};
use crate::store::records::NodeRecord;
use anyhow::Context as _;
use axum::Json;
use axum::extract::{Extension, State};
use bytes::Bytes;
use moor_api::deploy::Cidr;
use moor_api::node::{HostCertificateRequest, HostCertificates, SshTrust};
use moor_api::problem::{Code, Problem};
use ssh_key::certificate::{Builder, CertType};
use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, PrivateKey, PublicKey};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Most keys of one request.
const MAX_KEYS: usize = 8;
/// Seconds that a host certificate is good: long enough for a member that is away over a long weekend.
const LIFETIME: u64 = 7 * 86_400;
/// Seconds after which the node comes again.
const RENEW: u64 = 86_400;
/// Clocks of those who check differ.
const GRACE: u64 = 3600;

fn value<'a>(node: &'a NodeRecord, name: &str) -> Option<&'a str> {
    node.attributes.get(name).map(String::as_str).filter(|value| !value.is_empty())
}

/// What the node is called: its name, its names on each interface, all with the domain, and the addresses that were given to it.
/// Never the address it comes from: behind NAT that is somebody else's.
fn principals(node: &NodeRecord) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = BTreeSet::from([node.name.to_string()]);
    let mut addresses = BTreeSet::new();
    for (attribute, value) in
        node.attributes.iter().filter(|(name, value)| name.starts_with("net.") && !value.is_empty())
    {
        if attribute.ends_with(".hostname") {
            names.insert(value.clone());
        } else if attribute.ends_with(".ipv4_address") || attribute.ends_with(".ipv6_address") {
            addresses.extend(value.parse::<Cidr>().ok().map(|cidr| cidr.address.to_string()));
        }
    }
    if let Some(domain) = value(node, "dns.domain") {
        let full: Vec<String> =
            names.iter().filter(|name| !name.contains('.')).map(|name| format!("{name}.{domain}")).collect();
        names.extend(full);
    }
    names.extend(addresses);
    names
}

fn certify(authority: &PrivateKey, key: PublicKey, node: &NodeRecord, serial: u64, now: u64) -> anyhow::Result<String> {
    let mut builder = Builder::new_with_random_nonce(&mut OsRng, key, now.saturating_sub(GRACE), now + LIFETIME)?;
    builder.serial(serial)?.cert_type(CertType::Host)?.key_id(format!("{} {}", node.name, node.id))?;
    for principal in principals(node) {
        builder.valid_principal(principal)?;
    }
    Ok(builder.sign(authority)?.to_openssh()?)
}

pub(super) async fn host_certificates(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<HostCertificates>, Failure> {
    let request: HostCertificateRequest = parse(&body)?;
    // A certificate says "this is the node": that has to be proven.
    let profile = caller.generation(&member.view()?)?;
    caller.proven(&profile, "host certificate")?;
    let bad = |detail: String| Failure(Problem::new(Code::BadRequest, detail));
    if request.public_keys.is_empty() || request.public_keys.len() > MAX_KEYS {
        return Err(bad(format!("a request has 1 to {MAX_KEYS} public keys")));
    }
    let mut keys = Vec::new();
    for line in &request.public_keys {
        let mut key = PublicKey::from_openssh(line.trim())
            .map_err(|error| bad(format!("a public key is not an OpenSSH one: {error}")))?;
        if !matches!(key.algorithm(), Algorithm::Ed25519 | Algorithm::Ecdsa { .. } | Algorithm::Rsa { .. }) {
            return Err(bad(format!("host keys are ed25519, ecdsa or rsa, not {}", key.algorithm())));
        }
        key.set_comment("");
        keys.push(key);
    }
    // All of one version.
    let authorities = member.trust.ssh();
    let now = now();
    let mut certificates = Vec::new();
    let mut serials = Vec::new();
    for key in keys {
        let serial = member.certificate_serial().await?;
        serials.push(serial);
        certificates
            .push(certify(&authorities.signing, key, &caller.node, serial, now).context("certifying a host key")?);
    }
    let fields = serde_json::json!({ "node": caller.node.id, "name": caller.node.name, "boot": caller.claims.boot, "serials": serials });
    member.audit_for_node("host-certificates", fields).await?;
    Ok(Json(HostCertificates { certificates, renew_after: now + RENEW, version: authorities.held.version }))
}

pub(super) async fn trust(
    State(member): State<Arc<Member>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<SshTrust>, Failure> {
    let view = member.view()?;
    let node = &caller.node;
    let profile = caller.generation(&view)?;
    let names: Vec<String> = match value(node, "ssh.trustnodes") {
        None => view.names()?,
        Some(range) => select(&view, Some(range))?.iter().map(|node| node.name.to_string()).collect(),
    };
    let domain = value(node, "dns.domain");
    let mut shosts = Vec::new();
    for name in names {
        shosts.extend(domain.map(|domain| format!("{name}.{domain}")));
        shosts.push(name);
    }
    let mut authorized_keys = profile.manifest.authorized_keys.clone();
    authorized_keys.extend(
        value(node, "pubkeys.ssh").into_iter().flat_map(str::lines).filter(|line| !line.is_empty()).map(str::to_owned),
    );
    let authorities = member.trust.ssh();
    Ok(Json(SshTrust {
        known_hosts: authorities.hosts.iter().map(|line| format!("@cert-authority * {line}")).collect(),
        shosts,
        authorized_keys,
        user_authorities: authorities.users.clone(),
        version: authorities.held.version,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::records::Armed;
    use moor_api::ids::NodeId;
    use std::process::Command as Process;

    fn node(attributes: &[(&str, &str)]) -> NodeRecord {
        NodeRecord {
            id: NodeId::from_bytes([7; 16]),
            name: "n1".parse().unwrap(),
            attributes: attributes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            secrets: std::collections::BTreeMap::new(),
            identity: None,
            epoch: 0,
            armed: Armed::No,
            deployment: None,
            pin: None,
            boots: Vec::new(),
            trust: None,
        }
    }

    #[test]
    fn principals_are_names_and_own_addresses() {
        let node = node(&[
            ("dns.domain", "hpc.example"),
            ("net.hostname", "n1-mgmt"),
            ("net.ipv4_address", "10.0.0.5/24"),
            ("net.ib0.ipv6_address", "2001:db8::5/64"),
            ("net.ipv4_gateway", "10.0.0.1"),
        ]);
        let expected = ["10.0.0.5", "2001:db8::5", "n1", "n1-mgmt", "n1-mgmt.hpc.example", "n1.hpc.example"];
        assert_eq!(principals(&node).into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn ssh_keygen_reads_the_certificate() {
        let authority = PrivateKey::random(&mut OsRng, Algorithm::Ed25519).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for kind in ["ed25519", "ecdsa", "rsa"] {
            let file = dir.path().join(kind);
            let made = Process::new("ssh-keygen").args(["-q", "-N", "", "-t", kind, "-f"]).arg(&file).status().unwrap();
            assert!(made.success());
            let line = std::fs::read_to_string(file.with_extension("pub")).unwrap();
            let key = PublicKey::from_openssh(&line).unwrap();
            let certificate = certify(&authority, key, &node(&[("dns.domain", "x.example")]), 42, now()).unwrap();
            let path = dir.path().join(format!("{kind}-cert.pub"));
            std::fs::write(&path, certificate).unwrap();
            let shown = Process::new("ssh-keygen").arg("-L").arg("-f").arg(&path).output().unwrap();
            let text = String::from_utf8_lossy(&shown.stdout).into_owned();
            for part in ["host certificate", "Serial: 42", "n1.x.example", "Key ID: \"n1 07070707"] {
                assert!(
                    text.contains(part),
                    "{kind}: {part} is missing in\n{text}{}",
                    String::from_utf8_lossy(&shown.stderr)
                );
            }
        }
    }
}
