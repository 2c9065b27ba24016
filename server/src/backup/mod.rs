//! Backups of the store: [`sealed`] encrypts a stream under a passphrase or to recipients ([`lock`]), [`plain`] writes what is no secret for people and programs to
//! read, [`restore`] makes a new collective of an encrypted one.
//!
//! What an encrypted one holds is a line of JSON ([`Head`]: the collective, and its keys), and behind it a snapshot of the store as members
//! send it to each other. Content is not in it.

pub mod lock;
pub mod plain;
pub mod restore;
pub mod sealed;

use crate::authority::KeyFiles;
use crate::secrets::Carried;
use crate::state::{Member, now};
use crate::store::records::SiteRecord;
use crate::store::{Replicated, Snapshot, StoreError};
use anyhow::{Context as _, ensure};
use lock::{Lock, Opener};
use sealed::{Decrypting, Encrypting, Sealed};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use zeroize::Zeroizing;

/// Version of what is inside.
const VERSION: u32 = 1;
/// Longest first line.
const MAX_HEAD: usize = 1 << 20;

/// The first line. No `Debug`: it holds all keys of the collective.
#[derive(Serialize, Deserialize)]
pub struct Head {
    version: u32,
    /// The release that wrote it.
    pub release: String,
    /// When, Unix seconds.
    pub created: u64,
    /// The collective.
    pub site: SiteRecord,
    /// Its authorities.
    pub keys: KeyFiles,
    /// All versions of its keys that something in the snapshot is under.
    pub versions: Carried,
    /// Why it may not be the newest; none: a majority answered when it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale: Option<Stale>,
}

/// A backup was made without a majority: others may have agreed about more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stale {
    /// Term of the newest entry that is in it.
    pub term: u64,
    /// Its place in the log.
    pub index: u64,
    /// When the member last knew of a majority, Unix seconds; none: nobody knows.
    pub confirmed: Option<u64>,
}

impl Stale {
    /// What is known of `view`, if no majority answers.
    fn of(member: &Member, view: &Snapshot, is_stale: bool) -> Result<Option<Self>, StoreError> {
        if !is_stale {
            return Ok(None);
        }
        let (term, index) = Replicated::newest_in(view)?;
        Ok(Some(Self { term, index, confirmed: member.waiting.confirmed() }))
    }
}

/// Writes an encrypted backup of the store as it is now; `is_stale`: no majority answers.
///
/// # Errors
/// A key file or the database is damaged; `out` failed.
pub fn write<W: Write>(member: &Member, lock: Lock, is_stale: bool, out: W) -> anyhow::Result<W> {
    // Keys and secrets of one moment.
    let (keys, _, view) = member.export_keys()?;
    let ring = member.secrets.refresh(&view.key_versions()?)?;
    ring.token().context("the keys of the collective")?;
    let head = Head {
        version: VERSION,
        release: env!("CARGO_PKG_VERSION").into(),
        created: now(),
        site: member.site.clone(),
        keys,
        versions: ring.carry(),
        stale: Stale::of(member, &view, is_stale)?,
    };
    let mut out = Encrypting::begin(out, lock).context("beginning a backup")?;
    let mut line = Zeroizing::new(serde_json::to_vec(&head)?);
    line.push(b'\n');
    out.write_all(&line).context("writing a backup")?;
    let out = Replicated::export(&view, out).context("writing a backup")?;
    out.finish().context("writing a backup")
}

/// Whether a backup of this member, which has no majority, could be restored. One that was killed has tables of an earlier moment until a majority
/// says what of its log was agreed, and may have removed keys since.
///
/// # Errors
/// It could not; a key file or the database is damaged.
pub fn check(member: &Member) -> anyhow::Result<()> {
    let (keys, _, view) = member.export_keys()?;
    Ok(view.check_keyed(&keys.keyed()?)?)
}

/// Opens an encrypted backup: what it is of, and the snapshot that follows.
///
/// # Errors
/// `opener` does not open it; it is damaged, or of a newer release.
pub fn open<R: Read>(sealed: Sealed<R>, opener: &Opener) -> anyhow::Result<(Head, Decrypting<R>)> {
    let mut input = sealed.open(opener)?;
    // Long enough for what is written, so that growing leaves no copy behind.
    let mut line = Zeroizing::new(Vec::with_capacity(64 << 10));
    let mut byte = [0];
    loop {
        input.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            break;
        }
        line.push(byte[0]);
        ensure!(line.len() <= MAX_HEAD, "its first line does not end");
    }
    let version = serde_json::from_slice::<Version>(&line).context("its first line is not understood")?.version;
    ensure!(
        version == VERSION,
        "its content has version {version}, and this release knows {VERSION}: a newer release wrote it, take that one"
    );
    let head = serde_json::from_slice(&line).map_err(|_| anyhow::anyhow!("its first line is not understood"))?;
    Ok((head, input))
}

/// Of the first line, whatever else a later release writes into it.
#[derive(Deserialize)]
struct Version {
    version: u32,
}
