//! `moord restore`: a new collective of one member, with the id, the keys and the records of the one that a backup was made of. Nodes know
//! it by its authorities and members by its records, so it is theirs; the members of before are none any more.

use super::lock::Opener;
use super::sealed::{Decrypting, Sealed};
use super::{Head, Stale};
use crate::authority::{self, SshAuthorities};
use crate::collective::identity::{Identity, check_name};
use crate::config::Config;
use crate::content::{Incoming, path_of};
use crate::secrets::{Ring, UnwrapKey};
use crate::state;
use crate::store::raft::Survivor;
use crate::store::records::MemberRecord;
use anyhow::{Context as _, bail, ensure};
use moor_api::ids::Sha256Digest;
use serde::Serialize;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Restored {
    /// Name of the collective.
    pub collective: String,
    /// When the backup was made, Unix seconds.
    pub created: u64,
    /// Why the backup may not have been the newest; none: a majority answered when it was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stale: Option<Stale>,
    /// Name of the only member.
    pub member: String,
    /// Its number.
    pub number: u64,
    /// Nodes that it knows.
    pub nodes: usize,
    /// Blobs that were taken from the given directory.
    pub taken: usize,
    /// Blobs that are not here, and what each is.
    pub missing: Vec<Missing>,
}

/// Content that is not here.
#[derive(Debug, Serialize)]
pub struct Missing {
    /// Its SHA-256.
    pub blob: Sha256Digest,
    /// What names it.
    pub of: String,
}

/// Restores a backup; the member's state directory must be without one, unless that is to be set aside. Content is taken from the directory
/// `blobs`, where there is one.
///
/// # Errors
/// The directory holds a member; the backup is damaged, not opened by `opener` or of a newer release. Then nothing is there that was not before.
pub async fn restore(
    config: &Config,
    sealed: Sealed<File>,
    opener: Opener,
    addresses: Vec<String>,
    blobs: Option<PathBuf>,
    set_aside: bool,
) -> anyhow::Result<Restored> {
    let name = config.member_name.clone().unwrap_or_else(state::host_name);
    check_name(&name)?;
    // What is wrong with the passphrase or the key shows before anything is made.
    let opened = tokio::task::spawn_blocking(move || super::open(sealed, &opener));
    let (head, tables) = opened.await??;
    config.make_member(set_aside, async |keys| make(config, keys, (head, tables), name, addresses, blobs).await).await
}

async fn make(
    config: &Config,
    keys: &Path,
    (head, tables): (Head, Decrypting<File>),
    name: String,
    addresses: Vec<String>,
    blobs: Option<PathBuf>,
) -> anyhow::Result<Restored> {
    let (key, unwrap) = (authority::create_member_key(keys)?, UnwrapKey::create(keys)?);
    let member = MemberRecord::only(key.into(), unwrap, name.clone(), config.urls.clone());
    let ring = Ring::carried(&head.versions, head.site.collective)?;
    let id = member.id;
    config.make_store().context("making the store")?;
    let mut survivor = Survivor::open(&config.store()).context("making the store")?;
    let only = member.clone();
    // Who was a member then may have the keys of then.
    let keyed = head.keys.keyed()?;
    let number = survivor.restore(tables, member, keyed, move |before| ring.begin_anew(&only, before)).await?;
    let view = survivor.view()?;
    let site = view.site()?.context("the backup has no collective in it")?;
    ensure!(site.collective == head.site.collective, "its keys are of another collective than its records");
    authority::import(keys, &head.keys)?;
    SshAuthorities::open(keys)?;
    let nodes = view.names()?.len();
    let dir = config.blobs();
    let taken = match blobs {
        Some(from) => take(&from, &dir, state::missing(&view, &dir)?)?,
        None => 0,
    };
    let missing = state::missing(&view, &dir)?;
    let mut described = state::described(&view)?;
    let missing =
        missing.into_iter().map(|blob| Missing { blob, of: described.remove(&blob).unwrap_or_default() }).collect();
    let restored = Restored {
        collective: site.name.clone(),
        created: head.created,
        stale: head.stale,
        member: name.clone(),
        number,
        nodes,
        taken,
        missing,
    };
    // It comes last: where it exists, everything else does.
    let (met, removed, introduction) = (Vec::new(), Vec::new(), Vec::new());
    let identity = Identity { number, id, name, addresses, site, met, removed, introduction };
    identity.write(&config.identity())?;
    Ok(restored)
}

/// Copies blobs from a directory of them: another member's `blobs`, or files named by their digests. Each is checked.
fn take(from: &Path, dir: &Path, wanted: Vec<Sha256Digest>) -> anyhow::Result<usize> {
    if !from.is_dir() {
        bail!("'{}' is no directory of blobs that user {} can read", from.display(), nix::unistd::geteuid());
    }
    let mut count = 0;
    for blob in wanted {
        let places = [path_of(from, blob), from.join(blob.to_string())];
        let Some((path, mut file)) =
            places.into_iter().find_map(|path| File::open(&path).ok().map(|file| (path, file)))
        else {
            continue;
        };
        let mut incoming = Incoming::new(dir)?;
        let mut piece = vec![0; 256 << 10];
        loop {
            match file.read(&mut piece).with_context(|| format!("reading '{}'", path.display()))? {
                0 => break,
                length => incoming.write(&piece[..length]).with_context(|| format!("copying '{}'", path.display()))?,
            }
        }
        match incoming.finish_as(blob) {
            Ok(()) => count += 1,
            Err(error) => tracing::warn!("'{}' is left out: {error}", path.display()),
        }
    }
    Ok(count)
}
