//! The authorities of the collective: the X.509 root with its three intermediates, and the two SSH authorities. Made by
//! `moord init`, each private key in a 0600 file of its own. Beside them lies the member's own key, which no other member ever has.
//!
//! An X.509 authority has a number. While one takes the place of another, both are here: which there are, and which of them this member's
//! certificate is from, is in a file of its own ([`Held`]). The same is so of SSH's ([`SshHeld`]).

mod held;
mod ssh;
mod x509;

pub use held::Held;
pub use ssh::{SshAuthorities, SshHeld, has_ssh, is_pair, make_ssh, put_ssh, remove_ssh_before};
pub use x509::{describe, has, make, put, remove_others, root};

use crate::files;
use crate::store::authorities::Keyed;
use anyhow::Context as _;
use moor_api::admin::SshRole;
use moor_api::ids::{CollectiveId, MemberId};
use moor_api::trust::{Incarnation, incarnation_uri, member_uri};
use rcgen::{
    ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType,
    SigningKey as _,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use x509::{name_of, params, uri};
use zeroize::{Zeroize, Zeroizing};

/// The file of the member's own key.
const MEMBER_KEY: &str = "member.key";
/// Days that a member's certificate is valid; it is renewed at each start and each day.
const MEMBER_DAYS: i64 = 90;

/// Where a member is reached, for the SANs that firmware and browsers want.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// IP addresses.
    pub ips: Vec<IpAddr>,
    /// Host names.
    pub names: Vec<String>,
}

/// Issues this member's certificate: at each start, and long before it ends.
#[derive(Debug, Clone)]
pub struct MemberIssuer {
    /// Where the authorities are.
    pub keys: PathBuf,
    /// The collective.
    pub collective: CollectiveId,
    /// How often it began anew.
    pub incarnation: Incarnation,
    /// The member.
    pub member: MemberId,
    /// Where it is reached.
    pub addresses: Addresses,
    /// When the collective was made, Unix seconds. Certificates are good from then on: a node whose clock stands still knows no later
    /// time than the build of its boot payload.
    pub created: u64,
}

impl MemberIssuer {
    /// A new certificate of the member's key, from the authority that [`Held`] says.
    ///
    /// # Errors
    /// The key or the member authority is missing or damaged; no randomness.
    pub fn issue(&self) -> anyhow::Result<CertifiedKey> {
        let files = Files(self.keys.clone());
        let authority = Held::read(&self.keys)?.issuing;
        let key = files.key(MEMBER_KEY)?;
        let mut leaf = params(&format!("member {}", self.member), MEMBER_DAYS, self.created)?;
        leaf.subject_alt_names.push(uri(member_uri(self.collective, self.member))?);
        if !self.incarnation.is_first() {
            leaf.subject_alt_names.push(uri(incarnation_uri(self.collective, self.incarnation))?);
        }
        leaf.subject_alt_names.extend(self.addresses.ips.iter().copied().map(SanType::IpAddress));
        for name in &self.addresses.names {
            let dns = name.clone().try_into().with_context(|| format!("'{name}' is not a DNS name"))?;
            leaf.subject_alt_names.push(SanType::DnsName(dns));
        }
        // Drawn: rcgen takes the key's hash, and some clients refuse two certificates of one issuer with the same number.
        let mut serial = [0; 16];
        aws_lc_rs::rand::fill(&mut serial).context("making a serial number")?;
        // Positive, and of one length.
        serial[0] = (serial[0] & 0x3f) | 0x40;
        leaf.serial_number = Some(serial.to_vec().into());
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = leaf.signed_by(&key, &files.member_issuer(authority)?)?;
        let intermediate = files.certificate(&name_of(authority, "member-ca.pem"))?;
        let private = PrivateKeyDer::try_from(key.serialize_der())
            .map_err(|error| anyhow::anyhow!("the member's key is not usable: {error}"))?;
        let chain = vec![certificate.der().clone(), intermediate];
        CertifiedKey::from_der(chain, private, &rustls::crypto::aws_lc_rs::default_provider())
            .context("the member's certificate is not usable")
    }
}

struct Files(PathBuf);

impl Files {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> anyhow::Result<()> {
        let path = self.path(name);
        files::write(&path, text.as_bytes(), mode).with_context(|| format!("writing '{}'", path.display()))
    }

    fn read(&self, name: &str) -> anyhow::Result<Zeroizing<String>> {
        let path = self.path(name);
        Ok(Zeroizing::new(std::fs::read_to_string(&path).with_context(|| format!("reading '{}'", path.display()))?))
    }

    fn key(&self, name: &str) -> anyhow::Result<KeyPair> {
        KeyPair::from_pem(&self.read(name)?)
            .with_context(|| format!("'{}' is not a private key", self.path(name).display()))
    }

    fn certificate(&self, name: &str) -> anyhow::Result<CertificateDer<'static>> {
        CertificateDer::from_pem_slice(self.read(name)?.as_bytes())
            .with_context(|| format!("'{}' is not a certificate", self.path(name).display()))
    }

    fn member_issuer(&self, number: u32) -> anyhow::Result<Issuer<'static, KeyPair>> {
        let key = self.key(&name_of(number, "member-ca.key"))?;
        Issuer::from_ca_cert_pem(&self.read(&name_of(number, "member-ca.pem"))?, key)
            .context("the member authority is not usable")
    }
}

/// Makes the key of a new member in `dir`; returns its public half, DER `SubjectPublicKeyInfo`. Other members know it by that: a
/// certificate of the member authority alone makes nobody a member, because whoever was one once can issue it.
///
/// # Errors
/// The directory is not writable; no randomness.
pub fn create_member_key(dir: &Path) -> anyhow::Result<Vec<u8>> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let pem = Zeroizing::new(key.serialize_pem());
    Files(dir.to_owned()).write(MEMBER_KEY, &pem, 0o600)?;
    Ok(key.subject_public_key_info())
}

/// The public half of the member's own key, DER `SubjectPublicKeyInfo`.
///
/// # Errors
/// The key is missing or damaged.
pub fn member_public(dir: &Path) -> anyhow::Result<Vec<u8>> {
    Ok(Files(dir.to_owned()).key(MEMBER_KEY)?.subject_public_key_info())
}

/// Signs by the member's own key: ECDSA on P-256 with SHA-256, in DER.
///
/// # Errors
/// The key is missing or damaged; no randomness.
pub fn sign_as_member(dir: &Path, message: &[u8]) -> anyhow::Result<Vec<u8>> {
    Files(dir.to_owned()).key(MEMBER_KEY)?.sign(message).context("signing by the member's key")
}

/// Files of the key directory by name. No `Debug`; what it held is wiped.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyFiles(BTreeMap<String, String>);

impl KeyFiles {
    /// Root certificate of what [`make`] gave, PEM.
    #[must_use]
    pub fn root(&self) -> Option<&str> {
        self.0.get("root.pem").map(String::as_str)
    }

    /// Which authorities these are the keys of.
    ///
    /// # Errors
    /// A file that says so is damaged.
    pub fn keyed(&self) -> anyhow::Result<Keyed> {
        let held = self.0.get(held::FILE).map(|text| Held::from_text(text)).transpose()?.unwrap_or_default();
        let ssh = self.0.get(ssh::FILE).map(|text| SshHeld::from_text(text)).transpose()?.unwrap_or_default();
        Ok(Keyed { x509: held.trusted, host: ssh.host, user: ssh.user })
    }
}

impl Drop for KeyFiles {
    fn drop(&mut self) {
        self.0.values_mut().for_each(Zeroize::zeroize);
    }
}

/// All keys that members share, for one that joins: equal members hold the same.
///
/// # Errors
/// A file is missing.
pub fn export(dir: &Path) -> anyhow::Result<KeyFiles> {
    let files = Files(dir.to_owned());
    let (held, ssh) = (Held::read(dir)?, SshHeld::read(dir)?);
    let mut keys = KeyFiles(BTreeMap::new());
    for name in held.files().into_iter().chain(ssh.files()) {
        keys.0.insert(name.clone(), files.read(&name)?.to_string());
    }
    if held != Held::default() {
        keys.0.insert(held::FILE.to_owned(), held.to_text()?);
    }
    if ssh != SshHeld::default() {
        keys.0.insert(ssh::FILE.to_owned(), ssh.to_text()?);
    }
    Ok(keys)
}

/// Writes what [`export`] gave into `dir`, where at most the member's own key is.
///
/// # Errors
/// A file is missing; the directory is not writable.
pub fn import(dir: &Path, keys: &KeyFiles) -> anyhow::Result<()> {
    let files = Files(dir.to_owned());
    let held = keys.0.get(held::FILE).map(|text| Held::from_text(text)).transpose()?;
    let ssh = keys.0.get(ssh::FILE).map(|text| SshHeld::from_text(text)).transpose()?;
    let of_ssh = ssh.clone().unwrap_or_default().files();
    for name in held.clone().unwrap_or_default().files().into_iter().chain(of_ssh) {
        let text = keys.0.get(&name).with_context(|| format!("the authorities came without '{name}'"))?;
        let is_public = Path::new(&name).extension().is_some_and(|extension| extension == "pem");
        files.write(&name, text, if is_public { 0o644 } else { 0o600 })?;
    }
    // They come last: what they name is there.
    held.map_or(Ok(()), |held| held.write(dir))?;
    ssh.map_or(Ok(()), |ssh| ssh.write(dir))
}

/// Makes all authorities of a collective that begins at `created` (Unix seconds) in `dir`, which must be without any.
///
/// # Errors
/// The directory is not writable; no randomness.
pub fn create(dir: &Path, collective: CollectiveId, name: &str, created: u64) -> anyhow::Result<()> {
    put(dir, 1, &make(collective, name, 1, created)?)?;
    for role in SshRole::ALL {
        let (private, _) = make_ssh(name, role, 1)?;
        put_ssh(dir, role, 1, &private)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use x509_parser::prelude::{FromDer as _, X509Certificate};

    fn certificate<'a>(der: &'a CertificateDer<'_>) -> X509Certificate<'a> {
        X509Certificate::from_der(der).unwrap().1
    }

    #[test]
    fn openssl_verifies_the_chain_also_by_a_clock_that_stands_at_the_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let collective = CollectiveId::random();
        let created = crate::state::now();
        create(dir.path(), collective, "site", created).unwrap();
        let public = create_member_key(dir.path()).unwrap();
        let addresses = Addresses { ips: vec!["10.0.0.1".parse().unwrap()], names: vec!["m1.example".into()] };
        let member = MemberId::random();
        let incarnation = Incarnation::FIRST.next();
        let issuer = MemberIssuer { keys: dir.path().to_owned(), collective, incarnation, member, addresses, created };
        let issued = issuer.issue().unwrap();
        for (certificate, name) in issued.cert.iter().zip(["leaf.der", "issuer.der"]) {
            std::fs::write(dir.path().join(name), certificate).unwrap();
        }
        for at in [created, created + 80 * 86_400] {
            let output = Command::new("openssl")
                .args(["verify", "-verify_ip", "10.0.0.1", "-purpose", "sslserver", "-attime", &at.to_string()])
                .args(["-CAfile", "root.pem", "-untrusted", "member-ca.pem", "leaf.der"])
                .current_dir(dir.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
        }
        let shown = Command::new("openssl")
            .args(["x509", "-in", "leaf.der", "-noout", "-ext", "subjectAltName"])
            .current_dir(dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&shown.stdout);
        let names = [member_uri(collective, member), incarnation_uri(collective, incarnation)];
        for part in names.map(|name| format!("URI:{name}")).into_iter().chain(["DNS:m1.example".to_owned()]) {
            assert!(text.contains(&part), "{part} is missing in {text}");
        }
        // Renewed, it is of the same key under another number; one of a collective that was made earlier begins earlier.
        let later = MemberIssuer { created: created - 86_400, ..issuer }.issue().unwrap();
        let (one, other) = (certificate(&issued.cert[0]), certificate(&later.cert[0]));
        assert_ne!(one.raw_serial(), other.raw_serial());
        assert_ne!(one.validity().not_before, other.validity().not_before);
        for certificate in [one, other] {
            assert_eq!(certificate.public_key().raw, public);
        }
    }

    #[test]
    fn private_keys_are_for_their_owner_and_a_second_open_is_the_same() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), CollectiveId::random(), "site", 1).unwrap();
        create_member_key(dir.path()).unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let (mode, public) =
                (entry.metadata().unwrap().mode(), entry.path().extension().is_some_and(|e| e == "pem"));
            assert_eq!(mode & 0o777, if public { 0o644 } else { 0o600 }, "{name}");
        }
        let (first, second) = (SshAuthorities::open(dir.path()).unwrap(), SshAuthorities::open(dir.path()).unwrap());
        assert_eq!((first.hosts, first.users), (second.hosts, second.users));
        std::fs::remove_file(dir.path().join("ssh-user-ca")).unwrap();
        let error = format!("{:#}", SshAuthorities::open(dir.path()).err().unwrap());
        assert!(error.contains("ssh-user-ca"), "{error}");
    }

    /// Two authorities beside each other, and a collective that is older than the second.
    #[test]
    fn a_certificate_is_from_the_authority_that_is_said_and_that_one_s_private_keys_go_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (collective, created) = (CollectiveId::random(), crate::state::now() - 90 * 86_400);
        create(dir.path(), collective, "site", created).unwrap();
        create_member_key(dir.path()).unwrap();
        let issuer = MemberIssuer {
            keys: dir.path().to_owned(),
            collective,
            incarnation: Incarnation::FIRST,
            member: MemberId::random(),
            addresses: Addresses::default(),
            created,
        };
        put(dir.path(), 2, &make(collective, "site", 2, created).unwrap()).unwrap();
        let verifies = |root: &str| {
            let issued = issuer.issue().unwrap();
            for (certificate, name) in issued.cert.iter().zip(["leaf.der", "issuer.der"]) {
                std::fs::write(dir.path().join(name), certificate).unwrap();
            }
            let output = Command::new("openssl")
                .args(["verify", "-purpose", "sslserver", "-attime", &created.to_string()])
                .args(["-CAfile", root, "-untrusted", "issuer.der", "leaf.der"])
                .current_dir(dir.path())
                .output()
                .unwrap();
            output.status.success()
        };
        assert!(verifies("root.pem") && !verifies("root-2.pem"));
        Held { version: 2, trusted: vec![1, 2], issuing: 2 }.write(dir.path()).unwrap();
        assert!(!verifies("root.pem") && verifies("root-2.pem"));
        let ((one, _), (two, until)) = (describe(dir.path(), 1).unwrap(), describe(dir.path(), 2).unwrap());
        assert_ne!(one, two);
        let days = (until - crate::state::now()) / 86_400;
        assert!((1824..=1825).contains(&days), "the member authority ends before the root: {days}");

        // Another member gets all of it; then the first goes.
        let other = tempfile::tempdir().unwrap();
        import(other.path(), &export(dir.path()).unwrap()).unwrap();
        assert_eq!(Held::read(other.path()).unwrap(), Held::read(dir.path()).unwrap());
        assert!(has(other.path(), 1) && has(other.path(), 2) && !has(other.path(), 3));
        // Also what a write that was interrupted has left of it.
        std::fs::write(other.path().join("root.part-7"), "a key").unwrap();
        let names = |dir: &Path| -> Vec<String> {
            let mut names: Vec<_> = std::fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        let second = x509::FILES.iter().map(|(name, _)| name_of(2, name));
        let mut left: Vec<String> =
            second.chain(["authorities.json", "ssh-host-ca", "ssh-user-ca"].map(str::to_owned)).collect();
        left.sort();
        for _ in 0..2 {
            remove_others(other.path(), &[2]).unwrap();
            assert_eq!(names(other.path()), left);
        }
        // So does one that comes after it, and was cancelled.
        put(other.path(), 3, &make(collective, "site", 3, created).unwrap()).unwrap();
        remove_others(other.path(), &[2]).unwrap();
        assert_eq!(names(other.path()), left);
        let error = export(other.path()).err().unwrap().to_string();
        assert!(error.contains("root.key"), "{error}");
    }
}
