//! An X.509 authority: a root and its three intermediates, and the files that they are in.

use super::{Files, KeyFiles};
use crate::files;
use anyhow::Context as _;
use aws_lc_rs::digest::{SHA256, digest};
use moor_api::ids::CollectiveId;
use moor_api::trust::authority_uri;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use std::collections::BTreeMap;
use std::path::Path;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Roles of the intermediates, as their URI names them.
const ROLES: [&str; 3] = ["member", "node", "token"];
/// Files of an X.509 authority, and whether they are secret. Those of the first are named so; of a later one the number is in the name.
pub(super) const FILES: [(&str, bool); 8] = [
    ("root.key", true),
    ("root.pem", false),
    ("member-ca.key", true),
    ("member-ca.pem", false),
    ("node-ca.key", true),
    ("node-ca.pem", false),
    ("token-ca.key", true),
    ("token-ca.pem", false),
];
/// Days that a root is valid.
const ROOT_DAYS: i64 = 3650;
/// Days that an intermediate is valid.
const INTERMEDIATE_DAYS: i64 = 1825;
/// Clocks of nodes differ; an hour of grace costs nothing.
const GRACE: Duration = Duration::hours(1);

/// The name of a file of an X.509 authority.
pub(super) fn name_of(number: u32, name: &str) -> String {
    match name.split_once('.') {
        Some((stem, extension)) if number > 1 => format!("{stem}-{number}.{extension}"),
        _ => name.to_owned(),
    }
}

/// Of a certificate that is good from now on, and for clocks that show no more than `created` (Unix seconds).
pub(super) fn params(name: &str, days: i64, created: u64) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    params.distinguished_name = subject;
    let now = OffsetDateTime::now_utc();
    params.not_before = now.min(OffsetDateTime::from_unix_timestamp(i64::try_from(created)?)?) - GRACE;
    params.not_after = now + Duration::days(days);
    Ok(params)
}

pub(super) fn uri(text: String) -> anyhow::Result<SanType> {
    Ok(SanType::URI(text.try_into().context("making a URI name")?))
}

fn authority_params(
    name: &str,
    days: i64,
    created: u64,
    constraint: BasicConstraints,
) -> anyhow::Result<CertificateParams> {
    let mut params = params(name, days, created)?;
    params.is_ca = IsCa::Ca(constraint);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// Makes X.509 authority `number` of a collective that was made at `created` (Unix seconds); its files have the names of the first one's.
///
/// # Errors
/// No randomness.
pub fn make(collective: CollectiveId, name: &str, number: u32, created: u64) -> anyhow::Result<KeyFiles> {
    let mut made = KeyFiles(BTreeMap::new());
    // Two authorities are told apart by their subjects, by whoever builds a chain and by people.
    let title = |what: &str| if number == 1 { format!("{name} {what}") } else { format!("{name} {what} {number}") };
    let root_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let root_params = authority_params(&title("root"), ROOT_DAYS, created, BasicConstraints::Constrained(1))?;
    let root: Certificate = root_params.self_signed(&root_key)?;
    made.0.insert("root.key".into(), root_key.serialize_pem());
    made.0.insert("root.pem".into(), root.pem());
    let root_issuer = Issuer::new(root_params, root_key);
    for role in ROLES {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let subject = title(&format!("{role} authority"));
        let mut params = authority_params(&subject, INTERMEDIATE_DAYS, created, BasicConstraints::Constrained(0))?;
        params.subject_alt_names.push(uri(authority_uri(collective, role))?);
        let certificate = params.signed_by(&key, &root_issuer)?;
        made.0.insert(format!("{role}-ca.key"), key.serialize_pem());
        made.0.insert(format!("{role}-ca.pem"), certificate.pem());
    }
    Ok(made)
}

/// Writes what [`make`] gave.
///
/// # Errors
/// A file is missing in it; the directory is not writable.
pub fn put(dir: &Path, number: u32, made: &KeyFiles) -> anyhow::Result<()> {
    let files = Files(dir.to_owned());
    for (name, secret) in FILES {
        let text = made.0.get(name).with_context(|| format!("authority {number} comes without '{name}'"))?;
        files.write(&name_of(number, name), text, if secret { 0o600 } else { 0o644 })?;
    }
    Ok(())
}

/// Whether all files of X.509 authority `number` are there. Each is written whole or not at all.
#[must_use]
pub fn has(dir: &Path, number: u32) -> bool {
    FILES.iter().all(|(name, _)| dir.join(name_of(number, name)).exists())
}

/// The number of the X.509 authority that a file is of, also one that was being written when its writer ended ([`files::write`]).
fn number_of(file: &str) -> Option<u32> {
    let (stem, extension) = file.split_once('.')?;
    if !matches!(extension, "key" | "pem") && !extension.starts_with("part-") {
        return None;
    }
    FILES.iter().find_map(|(name, _)| match stem.strip_prefix(name.split_once('.')?.0)? {
        "" => Some(1),
        rest => rest.strip_prefix('-')?.parse().ok(),
    })
}

/// Removes all that there is of X.509 authorities besides these.
///
/// # Errors
/// The directory is not writable.
pub fn remove_others(dir: &Path, kept: &[u32]) -> anyhow::Result<()> {
    let listing = || format!("looking for keys of old authorities in '{}'", dir.display());
    for entry in std::fs::read_dir(dir).with_context(listing)? {
        let entry = entry.with_context(listing)?;
        if entry.file_name().to_str().and_then(number_of).is_some_and(|number| !kept.contains(&number)) {
            let path = entry.path();
            std::fs::remove_file(&path).with_context(|| format!("removing '{}'", path.display()))?;
        }
    }
    files::sync_parent(&dir.join("x")).with_context(|| format!("syncing '{}'", dir.display()))
}

/// Root certificate of X.509 authority `number`, PEM.
///
/// # Errors
/// It is missing.
pub fn root(dir: &Path, number: u32) -> anyhow::Result<String> {
    Ok(Files(dir.to_owned()).read(&name_of(number, "root.pem"))?.to_string())
}

/// SHA-256 of the root certificate of X.509 authority `number`, hexadecimal; and until when the authority is good, Unix seconds: the root, or
/// the member authority under it, whichever ends first.
///
/// # Errors
/// A file is missing or damaged.
pub fn describe(dir: &Path, number: u32) -> anyhow::Result<(String, u64)> {
    let files = Files(dir.to_owned());
    let mut expires = u64::MAX;
    for name in ["root.pem", "member-ca.pem"] {
        let der = files.certificate(&name_of(number, name))?;
        let (_, certificate) = X509Certificate::from_der(&der)
            .map_err(|_| anyhow::anyhow!("'{}' is damaged", files.path(&name_of(number, name)).display()))?;
        expires = expires.min(u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0));
    }
    let root = files.certificate(&name_of(number, "root.pem"))?;
    Ok((hex::encode(digest(&SHA256, &root)), expires))
}
