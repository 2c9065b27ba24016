//! A sealed image as the source of a squashfs: every byte is verified before it is parsed.

use crate::key_file;
use crate::squashfs::Source;
use anyhow::{Context as _, Result, bail};
use moor_image::{Dek, HEADER_LENGTH, Header, Image, OpenOptions, Payload};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

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
    let mut bytes = [0; HEADER_LENGTH];
    file.read_exact_at(&mut bytes, 0)
        .with_context(|| format!("'{}' is shorter than an image's header", path.display()))?;
    let header = Header::parse(&bytes).with_context(context)?;
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
            bail!(
                "cannot open image '{}': it is encrypted with the key {}: give its key with --key-file",
                path.display(),
                hex::encode(header.key_id)
            );
        }
    }
    Image::open(file, &OpenOptions { key, ..OpenOptions::default() }).with_context(context)
}

/// The squashfs in an image.
pub(crate) struct SquashfsIn(Image<File>);

impl SquashfsIn {
    /// Refuses images of other payloads.
    pub(crate) fn new(image: Image<File>, path: &Path) -> Result<Self> {
        if image.header().payload != Payload::Squashfs {
            bail!("'{}' holds no squashfs, so there is no tree to unpack", path.display());
        }
        Ok(Self(image))
    }
}

impl Source for SquashfsIn {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let length = self.0.read_at(offset + done as u64, &mut buffer[done..]).map_err(io::Error::other)?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += length;
        }
        Ok(())
    }

    fn size(&self) -> u64 {
        self.0.plaintext_len()
    }
}
