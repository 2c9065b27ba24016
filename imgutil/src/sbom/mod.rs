//! What software an image is made of: its packages, as a list that other programs read (SPDX 2.3).

pub mod database;
pub(crate) mod image_files;
mod license;
pub mod spdx;

use crate::unpack::{SquashfsIn, open_with_any};
use anyhow::{Context as _, Result};
use database::{Files, TreeFiles};
use image_files::ImageFiles;
use rustix::fs::{CWD, Mode, OFlags};
use serde_json::Value;
use spdx::Subject;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The list of a tree.
pub fn of_tree(path: &Path) -> Result<Value> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, path, flags, Mode::empty())
        .with_context(|| format!("cannot open the tree '{}'", path.display()))?;
    let files = TreeFiles::new(root.as_fd());
    let name = path.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let now = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(seconds) => OffsetDateTime::from_unix_timestamp(seconds.parse().context("SOURCE_DATE_EPOCH is no number")?)?,
        Err(_) => OffsetDateTime::now_utc(),
    };
    document(&files, name.unwrap_or_else(|| "tree".to_owned()), None, now)
        .with_context(|| format!("in the tree '{}'", path.display()))
}

/// The list of an image, made when the image was.
pub fn of_image(path: &Path, key_files: &[PathBuf]) -> Result<Value> {
    let image = open_with_any(path, key_files)?;
    let context = || format!("cannot read image '{}'", path.display());
    let metadata = image.metadata().with_context(context)?;
    let header = image.header();
    let digest = Some((hex::encode(header.digest), metadata.payload_sha256));
    let created = OffsetDateTime::from_unix_timestamp(i64::try_from(header.created)?).with_context(context)?;
    let files = ImageFiles::open(SquashfsIn::all(image, path)?).with_context(context)?;
    document(&files, metadata.name, digest, created).with_context(context)
}

fn document(
    files: &dyn Files,
    name: String,
    digest: Option<(String, String)>,
    created: OffsetDateTime,
) -> Result<Value> {
    const LIMIT: u64 = 64 << 10;
    let release = files.read("etc/os-release", LIMIT)?.unwrap_or_default();
    let release = String::from_utf8_lossy(&release);
    let field = |key: &str| {
        let value = release.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
        value.map(|value| value.trim_matches(['"', '\'']).to_owned()).unwrap_or_default()
    };
    let subject = Subject {
        name,
        distribution: field("ID"),
        os: field("PRETTY_NAME"),
        digest,
        created: created.replace_nanosecond(0)?.format(&Rfc3339)?,
    };
    Ok(spdx::document(&subject, &database::installed(files)?))
}
