//! Kernel and initramfs, taken out of an image: its own files, as a server would give them to a boot loader.

use crate::pack::{initramfs_names, newest_kernel};
use crate::squashfs::{Inode, InodeKind, Piece, Reader, Source, SquashfsError};
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};

/// More than any kernel or initramfs has.
const LIMIT: u64 = 1 << 30;

/// The newest kernel of an image with its initramfs.
pub(crate) struct BootFiles {
    pub(crate) kernel: Vec<u8>,
    pub(crate) initramfs: Vec<u8>,
}

/// Reads them from an image's file systems with their mount points.
pub(crate) fn read<S: Source>(parts: Vec<(PathBuf, S)>) -> Result<BootFiles> {
    let (mut root, mut own) = (None, None);
    for (mount, source) in parts {
        if mount == Path::new("/") {
            root = Some(source);
        } else if mount == Path::new("/boot") {
            own = Some(source);
        }
    }
    let is_own = own.is_some();
    let mut reader = Reader::open(own.or(root).context("the image has no root file system")?)?;
    let top = reader.root();
    let top = reader.inode(top)?;
    let boot =
        if is_own { top } else { child(&mut reader, &top, "boot")?.context("the image has no directory /boot")? };
    let names = names(&mut reader, &boot)?;
    let (kernel, initramfs) = choose(&names)?;
    Ok(BootFiles { kernel: file(&mut reader, &boot, &kernel)?, initramfs: file(&mut reader, &boot, &initramfs)? })
}

/// The newest kernel among the names in /boot, and its initramfs.
pub(crate) fn choose(names: &[String]) -> Result<(String, String)> {
    let Some(release) = newest_kernel(names) else {
        bail!("the image has no kernel (/boot/vmlinuz-*)");
    };
    let candidates = initramfs_names(release);
    let Some(initramfs) = candidates.iter().find(|name| names.contains(name)) else {
        bail!("the image's kernel {release} has no initramfs: /boot has none of {}", candidates.join(", "));
    };
    Ok((format!("vmlinuz-{release}"), initramfs.clone()))
}

fn names<S: Source>(reader: &mut Reader<S>, directory: &Inode) -> Result<Vec<String>> {
    let InodeKind::Directory(listing) = &directory.kind else { bail!("/boot is no directory") };
    let (mut entries, mut names) = (reader.entries(listing), Vec::new());
    while let Some(entry) = entries.next(reader)? {
        names.extend(entry.name.to_str().ok().map(str::to_owned));
    }
    Ok(names)
}

fn child<S: Source>(reader: &mut Reader<S>, directory: &Inode, name: &str) -> Result<Option<Inode>> {
    let InodeKind::Directory(listing) = &directory.kind else { return Ok(None) };
    let mut entries = reader.entries(listing);
    while let Some(entry) = entries.next(reader)? {
        if entry.name.to_bytes() == name.as_bytes() {
            return Ok(Some(reader.inode(entry.inode)?));
        }
    }
    Ok(None)
}

fn file<S: Source>(reader: &mut Reader<S>, directory: &Inode, name: &str) -> Result<Vec<u8>> {
    let inode = child(reader, directory, name)?;
    let Some(Inode { kind: InodeKind::File(data), .. }) = inode else { bail!("/boot/{name} is no regular file") };
    if data.size > LIMIT {
        bail!("/boot/{name} is larger than any boot file");
    }
    let mut bytes = Vec::new();
    reader.contents(&data, |piece| {
        match piece {
            // Below LIMIT, so it fits.
            Piece::Hole(length) => bytes.resize(bytes.len() + usize::try_from(length).unwrap_or_default(), 0),
            Piece::Data(data) => bytes.extend_from_slice(data),
        }
        Ok::<(), SquashfsError>(())
    })?;
    Ok(bytes)
}
