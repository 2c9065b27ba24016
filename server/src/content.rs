//! Blobs: bytes by their SHA-256, in files whose name is the digest. Written beside while they arrive, renamed when whole.

use crate::files;
use aws_lc_rs::digest;
use moor_api::ids::Sha256Digest;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// A blob that is arriving. Dropped before [`Self::finish`], it leaves nothing.
pub struct Incoming {
    file: File,
    path: PathBuf,
    dir: PathBuf,
    hash: digest::Context,
    size: u64,
    kept: bool,
}

/// Where a blob is.
#[must_use]
pub fn path_of(dir: &Path, blob: Sha256Digest) -> PathBuf {
    let name = blob.to_string();
    dir.join(&name[..2]).join(name)
}

impl Incoming {
    /// Begins one.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!(".incoming-{}", uuid::Uuid::new_v4()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&path)?;
        Ok(Self { file, path, dir: dir.to_owned(), hash: digest::Context::new(&digest::SHA256), size: 0, kept: false })
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// The disk is full, or failed.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// Makes it durable under its name.
    ///
    /// # Errors
    /// Syncing or renaming failed; then nothing stands under the name.
    pub fn finish(mut self) -> io::Result<(Sha256Digest, u64)> {
        self.file.sync_all()?;
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.hash.clone().finish().as_ref());
        let blob = Sha256Digest(bytes);
        let path = path_of(&self.dir, blob);
        if let Some(parent) = path.parent()
            && !parent.exists()
        {
            std::fs::create_dir_all(parent)?;
            files::sync_parent(parent)?;
        }
        std::fs::rename(&self.path, &path)?;
        self.kept = true;
        files::sync_parent(&path)?;
        Ok((blob, self.size))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.kept {
            // What is left of an upload that broke is of no use.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Keeps bytes that are in memory.
///
/// # Errors
/// As [`Incoming`].
pub fn add(dir: &Path, bytes: &[u8]) -> io::Result<Sha256Digest> {
    let mut incoming = Incoming::new(dir)?;
    incoming.write(bytes)?;
    Ok(incoming.finish()?.0)
}

/// Removes what uploads left that a kill cut off.
pub fn sweep(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(".incoming-") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
