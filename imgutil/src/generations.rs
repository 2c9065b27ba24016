//! Generations of images in a directory: which file is of which lineage, and which are old.

use crate::cmd::printable;
use crate::pack::signature_path;
use crate::unpack::parent_of;
use anyhow::{Context as _, Result};
use moor_image::read_header;
use serde::Serialize;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// An image file.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Generation {
    /// Its name in the directory.
    #[serde(serialize_with = "crate::lossy::path")]
    pub(crate) file: PathBuf,
    /// Lineage.
    pub(crate) lineage: Uuid,
    /// Serial in the lineage.
    pub(crate) serial: u64,
    /// When it was sealed, RFC 3339.
    pub(crate) created: String,
    #[serde(skip)]
    created_seconds: u64,
    /// Bytes of the file and its signatures.
    pub(crate) size: u64,
    /// Whether it is encrypted.
    pub(crate) encrypted: bool,
    /// Whether there is a signature file.
    pub(crate) signed: bool,
    /// Digest.
    pub(crate) digest: String,
}

/// What a directory holds.
pub(crate) struct Found {
    /// Images: of one lineage together, the newest last.
    pub(crate) generations: Vec<Generation>,
    /// Files named as images that are none, and why.
    pub(crate) unreadable: Vec<(PathBuf, String)>,
}

/// Lineage and serial of an image that goes to `path`: those that follow the image that is there, or the first of a new lineage. The serial
/// is greater than that of every other generation in the same directory too: it may be an old one that is replaced.
pub(crate) fn next_at(path: &Path) -> (Uuid, u64) {
    let next = || {
        let old = read_header(&File::open(path).ok()?).ok()?;
        let lineage = Uuid::from_bytes(old.lineage);
        // Without the others it is still the next one of that image.
        let others = find(parent_of(path)).map(|found| found.generations).unwrap_or_default();
        let serials = others.iter().filter(|other| other.lineage == lineage).map(|other| other.serial);
        Some((lineage, serials.fold(old.serial, u64::max).checked_add(1)?))
    };
    next().unwrap_or_else(|| (Uuid::new_v4(), 1))
}

/// Looks at all `*.moor` files of a directory.
pub(crate) fn find(directory: &Path) -> Result<Found> {
    let context = || format!("cannot list '{}'", directory.display());
    let mut found = Found { generations: Vec::new(), unreadable: Vec::new() };
    for entry in std::fs::read_dir(directory).with_context(context)? {
        let entry = entry.with_context(context)?;
        let path = entry.path();
        if path.extension().is_some_and(|end| end == "moor") && entry.file_type().with_context(context)?.is_file() {
            match look(&path) {
                Ok(generation) => found.generations.push(generation),
                Err(error) => found.unreadable.push((path, format!("{error:#}"))),
            }
        }
    }
    // Lineages by their newest file's name would move about; the first name is as good.
    let mut first: HashMap<Uuid, PathBuf> = HashMap::new();
    for generation in &found.generations {
        let name = first.entry(generation.lineage).or_insert_with(|| generation.file.clone());
        if generation.file < *name {
            name.clone_from(&generation.file);
        }
    }
    found.generations.sort_by(|a, b| {
        let key = |of: &Generation| (first.get(&of.lineage).cloned(), of.serial, of.created_seconds, of.file.clone());
        key(a).cmp(&key(b))
    });
    Ok(found)
}

fn look(path: &Path) -> Result<Generation> {
    let file = File::open(path)?;
    let header = read_header(&file)?;
    let signatures = signature_path(path).metadata().ok();
    let created = i64::try_from(header.created).ok().and_then(|time| OffsetDateTime::from_unix_timestamp(time).ok());
    Ok(Generation {
        file: path.file_name().context("it has no name")?.into(),
        lineage: Uuid::from_bytes(header.lineage),
        serial: header.serial,
        created: created.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_else(|| header.created.to_string()),
        created_seconds: header.created,
        size: file.metadata()?.len() + signatures.as_ref().map_or(0, std::fs::Metadata::len),
        encrypted: header.encrypted,
        signed: signatures.is_some(),
        digest: hex::encode(header.digest),
    })
}

/// All but the `keep` newest of each lineage, in their order.
#[must_use]
pub(crate) fn older_than(generations: &[Generation], keep: usize) -> Vec<Generation> {
    let mut newer: HashMap<Uuid, usize> = HashMap::new();
    let mut old: Vec<Generation> = generations
        .iter()
        .rev()
        .filter(|generation| {
            let count = newer.entry(generation.lineage).or_default();
            *count += 1;
            *count > keep
        })
        .cloned()
        .collect();
    old.reverse();
    old
}

/// Removes an image, then its signatures: what is left of an interruption is a signature of nothing.
pub(crate) fn remove(directory: &Path, generation: &Generation) -> Result<()> {
    let image = directory.join(&generation.file);
    std::fs::remove_file(&image).with_context(|| format!("cannot remove '{}'", image.display()))?;
    let signatures = signature_path(&image);
    match std::fs::remove_file(&signatures) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove '{}'", signatures.display()))
        }
        _ => Ok(()),
    }
}

/// Says which files are no images.
pub(crate) fn warn(unreadable: &[(PathBuf, String)]) {
    for (path, why) in unreadable {
        let (path, why) = (printable(&path.display().to_string()), printable(why));
        eprintln!("imgutil: warning: '{path}' is left alone: {why}");
    }
}
