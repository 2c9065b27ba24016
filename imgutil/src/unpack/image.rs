//! A sealed image as the source of a squashfs: every byte is verified before it is parsed.

use crate::key_file;
use crate::squashfs::Source;
use anyhow::{Context as _, Result, bail};
use moor_image::{Dek, Image, OpenOptions, Payload, read_header};
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Opens an image file; the key comes from a file, or is not needed.
pub(crate) fn open(path: &Path, key_file: Option<&Path>) -> Result<Image<File>> {
    open_with(path, key_file.map(key_file::read).transpose()?)
}

/// Opens an image file with its key, or as far as it goes without one.
pub(crate) fn open_with(path: &Path, key: Option<Dek>) -> Result<Image<File>> {
    let context = || format!("cannot open image '{}'", path.display());
    let file = File::open(path).with_context(context)?;
    Image::open(file, &OpenOptions { key, ..OpenOptions::default() }).with_context(context)
}

/// Opens an image file with that one of the keys that is its own; a plain image needs none.
pub(crate) fn open_with_any(path: &Path, key_files: &[PathBuf]) -> Result<Image<File>> {
    let context = || format!("cannot open image '{}'", path.display());
    let file = File::open(path).with_context(context)?;
    let header = read_header(&file).with_context(context)?;
    let mut key = None;
    if header.encrypted {
        for key_file in key_files {
            let candidate = key_file::read(key_file)?;
            if candidate.key_id() == header.key_id {
                key = Some(candidate);
                break;
            }
        }
        if key.is_none() {
            let (image, wanted) = (path.display(), hex::encode(header.key_id));
            if key_files.is_empty() {
                bail!(
                    "cannot open image '{image}': it is encrypted with the key {wanted}: give its key with --key-file"
                );
            }
            bail!(
                "cannot open image '{image}': wrong key: the image wants key id {wanted}, which none of the given keys has; give the \
                 key that was made with this image"
            );
        }
    }
    Image::open(file, &OpenOptions { key, ..OpenOptions::default() }).with_context(context)
}

/// A squashfs in an image: all of its plaintext, or a part of it.
pub(crate) struct SquashfsIn {
    image: Arc<Image<File>>,
    offset: u64,
    length: u64,
}

impl SquashfsIn {
    /// The one squashfs of an image. Refuses images of other payloads.
    pub(crate) fn new(image: Image<File>, path: &Path) -> Result<Self> {
        match image.header().payload {
            Payload::Squashfs => {}
            Payload::Set => bail!("'{}' holds several file systems, not one tree: unpack it", path.display()),
            Payload::Opaque => bail!("'{}' holds no squashfs, so there is no tree in it", path.display()),
        }
        let length = image.plaintext_len();
        Ok(Self { image: Arc::new(image), offset: 0, length })
    }

    /// Every file system of an image with its mount point, each before those in it.
    pub(crate) fn all(image: Image<File>, path: &Path) -> Result<Vec<(PathBuf, Self)>> {
        if image.header().payload != Payload::Set {
            return Ok(vec![(PathBuf::from("/"), Self::new(image, path)?)]);
        }
        let metadata = image.metadata().with_context(|| format!("cannot read '{}'", path.display()))?;
        let image = Arc::new(image);
        let mut all = Vec::new();
        // Swap has a place on the disks and nothing here.
        for part in metadata.filesystems.into_iter().filter(|part| part.length > 0) {
            let mount = PathBuf::from(&part.mount);
            let is_clean = mount.components().all(|name| matches!(name, Component::RootDir | Component::Normal(_)));
            let end = part.offset.checked_add(part.length).filter(|end| *end <= image.plaintext_len());
            if !mount.is_absolute() || !is_clean || end.is_none() {
                bail!("'{}' lists a file system '{}' that cannot be in it", path.display(), part.mount);
            }
            all.push((mount, Self { image: Arc::clone(&image), offset: part.offset, length: part.length }));
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        if all.first().is_none_or(|(mount, _)| mount != Path::new("/")) {
            bail!("'{}' holds no root file system", path.display());
        }
        Ok(all)
    }
}

impl Source for SquashfsIn {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < buffer.len() {
            let from = self.offset + offset + done as u64;
            let length = self.image.read_at(from, &mut buffer[done..]).map_err(io::Error::other)?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += length;
        }
        Ok(())
    }

    fn size(&self) -> u64 {
        self.length
    }
}
