//! The files, directories and links that a recipe brings.

use super::BuildError;
use super::accounts::Accounts;
use super::tree::Tree;
use crate::recipe::{File, What};
use std::fs::{Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// Lays them in, in order: a later one replaces an earlier one of the same path.
pub(super) fn files(tree: &Tree, files: &[File]) -> Result<(), BuildError> {
    let accounts = Accounts::read(tree)?;
    for file in files {
        let path = &file.path.0;
        let owner = match &file.owner {
            Some(owner) => accounts.owner(owner).map_err(|name| {
                BuildError::Setting(format!("file '{}': the image has no user or group '{name}'", path.display()))
            })?,
            None => (0, 0),
        };
        let mode = file.mode.as_ref().map(|mode| mode.0);
        match &file.what {
            What::Text(text) => tree.write(path, mode.unwrap_or(0o644), owner, &mut text.as_bytes())?,
            What::Link(target) => tree.symlink(path, target, owner)?,
            What::Directory => tree.make_directory(path, mode.unwrap_or(0o755), owner)?,
            What::Copy(source) => copy(tree, path, source, mode, owner)?,
        }
    }
    Ok(())
}

/// Copies a file of the host, or a directory with everything in it. `mode` is that of the file or of the topmost directory.
fn copy(tree: &Tree, place: &Path, source: &Path, mode: Option<u32>, owner: (u32, u32)) -> Result<(), BuildError> {
    let failed = |error| BuildError::io("read", source, error);
    let metadata = source.metadata().map_err(failed)?;
    if !metadata.is_dir() {
        return copy_file(tree, place, source, mode.unwrap_or(0o644), owner);
    }
    tree.make_directory(place, mode.unwrap_or(0o755), owner)?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(source).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name());
    }
    names.sort();
    for name in names {
        let (from, to) = (source.join(&name), place.join(&name));
        let metadata = from.symlink_metadata().map_err(|error| BuildError::io("read", &from, error))?;
        if metadata.is_dir() {
            copy(tree, &to, &from, None, owner)?;
        } else if metadata.is_symlink() {
            let target = from.read_link().map_err(|error| BuildError::io("read", &from, error))?;
            tree.symlink(&to, target, owner)?;
        } else {
            copy_file(tree, &to, &from, mode_in_image(&metadata) & 0o7777, owner)?;
        }
    }
    Ok(())
}

/// What something in a directory that is laid in becomes in the image, kind and mode: not what the builder's umask made of it, but
/// readable by all, writable by the owner, executable where it was.
pub(super) fn mode_in_image(metadata: &Metadata) -> u32 {
    const KIND: u32 = 0o170_000;
    let mode = metadata.permissions().mode();
    let permissions = match (metadata.is_symlink(), metadata.is_dir() || mode & 0o100 != 0) {
        (true, _) => 0o777,
        (false, true) => 0o755,
        (false, false) => 0o644,
    };
    (mode & KIND) | permissions
}

/// Lays the node's files in `stage` over a tree: after the packages, whose links of a merged `/usr` have to be there, and before the
/// initramfs is made. Directories that are there stay as they are.
pub(super) fn plant(tree: &Tree, stage: &Path) -> Result<(), BuildError> {
    plant_directory(tree, Path::new("/"), stage)
}

fn plant_directory(tree: &Tree, place: &Path, source: &Path) -> Result<(), BuildError> {
    let failed = |error| BuildError::io("read", source, error);
    for entry in std::fs::read_dir(source).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (from, to) = (entry.path(), place.join(entry.file_name()));
        let metadata = from.symlink_metadata().map_err(|error| BuildError::io("read", &from, error))?;
        let mode = metadata.permissions().mode() & 0o7777;
        if metadata.is_dir() {
            if !tree.exists(&to) {
                tree.make_directory(&to, mode, (0, 0))?;
            }
            plant_directory(tree, &to, &from)?;
        } else if metadata.is_symlink() {
            let target = from.read_link().map_err(|error| BuildError::io("read", &from, error))?;
            tree.symlink(&to, target, (0, 0))?;
        } else {
            copy_file(tree, &to, &from, mode, (0, 0))?;
        }
    }
    Ok(())
}

/// Copies one file of the host.
pub(super) fn copy_file(
    tree: &Tree,
    place: &Path,
    source: &Path,
    mode: u32,
    owner: (u32, u32),
) -> Result<(), BuildError> {
    let mut file = open_file(source).map_err(|error| BuildError::io("read", source, error))?;
    tree.write(place, mode, owner, &mut file)
}

/// Opens a regular file of the host, and nothing that could keep the caller waiting: a pipe has no end of its own.
pub(super) fn open_file(path: &Path) -> io::Result<std::fs::File> {
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is neither a file, a directory nor a link"));
    }
    Ok(file)
}
