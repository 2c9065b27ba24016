//! Makes the changes in a layer the tree's own. Each step is a rename, or can be done again: after a crash in the middle the same
//! call with what is left of the layer comes to the same end.

use super::changes::Link;
use super::files::{copy_attributes, is_opaque, is_whiteout, kind, names, open_directory, remove, stat, strip};
use rustix::fs::{AtFlags, FileType, linkat, renameat, unlinkat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

/// A step that failed, with the path in the tree.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep the change of '/{path}': {source}")]
pub(super) struct KeepError {
    path: String,
    source: io::Error,
}

trait At<T> {
    fn at(self, path: &Path) -> Result<T, KeepError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, path: &Path) -> Result<T, KeepError> {
        self.map_err(|error| KeepError { path: path.display().to_string(), source: error.into() })
    }
}

/// Moves everything in `layer` into `tree`. `trash` is an empty directory on the same file system.
pub(super) fn keep(
    tree: BorrowedFd<'_>,
    layer: BorrowedFd<'_>,
    trash: BorrowedFd<'_>,
    links: &[Link],
) -> Result<(), KeepError> {
    merge(tree, layer, trash, Path::new(""))?;
    for link in links {
        relink(tree, trash, link).at(&link.name)?;
    }
    Ok(())
}

/// Merges a directory of the layer into the tree's of the same name, and leaves it empty of files.
fn merge(tree: BorrowedFd<'_>, layer: BorrowedFd<'_>, trash: BorrowedFd<'_>, path: &Path) -> Result<(), KeepError> {
    // Before anything is moved out of it.
    let attributes = rustix::fs::fstat(layer).at(path)?;
    for name in names(layer).at(path)? {
        let path = path.join(&name);
        let Some(new) = stat(layer, &name).at(&path)? else { continue };
        let old = stat(tree, &name).at(&path)?;
        let both_directories =
            kind(&new) == FileType::Directory && old.as_ref().is_some_and(|old| kind(old) == FileType::Directory);
        if is_whiteout(&new) {
            remove(tree, &name).at(&path)?;
            unlinkat(layer, &name, AtFlags::empty()).at(&path)?;
        } else if both_directories && !is_opaque(layer, &name).at(&path)? {
            let below = open_directory(tree, &name).at(&path)?;
            let above = open_directory(layer, &name).at(&path)?;
            merge(below.as_fd(), above.as_fd(), trash, &path)?;
        } else {
            replace((tree, &name), (layer, &name), old.map(|old| kind(&old)), trash).at(&path)?;
        }
    }
    // Last, since everything above has changed the time of the tree's directory.
    copy_attributes(layer, &attributes, tree).at(path)
}

/// Puts an object of the layer, whole, where the tree has another one or none.
fn replace(
    (tree, name): (BorrowedFd<'_>, &OsStr),
    (layer, _): (BorrowedFd<'_>, &OsStr),
    old: Option<FileType>,
    trash: BorrowedFd<'_>,
) -> io::Result<()> {
    let new = stat(layer, name)?.ok_or(io::ErrorKind::NotFound)?;
    let new_is_directory = kind(&new) == FileType::Directory;
    match old {
        // A rename over it would be refused; over all else, a file replaces a file in one step.
        Some(FileType::Directory) => renameat(tree, name, trash, free_name(trash)?)?,
        Some(_) if new_is_directory => remove(tree, name)?,
        _ => {}
    }
    // Only now: while the tree still had a directory here, the mark "opaque" said what is to become of it.
    strip_all(layer, name, new_is_directory)?;
    Ok(renameat(layer, name, tree, name)?)
}

/// Takes overlayfs' marks off an object and all that is in it, which is new as a whole.
fn strip_all(at: BorrowedFd<'_>, name: &OsStr, directory: bool) -> io::Result<()> {
    if directory {
        let inner = open_directory(at, name)?;
        for name in names(inner.as_fd())? {
            let Some(found) = stat(inner.as_fd(), &name)? else { continue };
            if is_whiteout(&found) {
                // It hides nothing here.
                unlinkat(&inner, &name, AtFlags::empty())?;
            } else {
                strip_all(inner.as_fd(), &name, kind(&found) == FileType::Directory)?;
            }
        }
    }
    strip(at, name)
}

/// Makes a name a link to the changed file, in one step.
fn relink(tree: BorrowedFd<'_>, trash: BorrowedFd<'_>, link: &Link) -> io::Result<()> {
    let (from, from_name) = parent(tree, &link.file)?;
    let (to, to_name) = parent(tree, &link.name)?;
    let temporary = free_name(trash)?;
    linkat(&from, from_name, trash, &temporary, AtFlags::empty())?;
    renameat(trash, &temporary, &to, to_name)?;
    // Renaming a link over another name of the same file does nothing, and leaves it.
    match unlinkat(trash, &temporary, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn parent<'a>(tree: BorrowedFd<'_>, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut directory = tree.try_clone_to_owned()?;
    for step in path.parent().into_iter().flat_map(Path::components) {
        directory = open_directory(directory.as_fd(), step.as_os_str())?;
    }
    Ok((directory, name))
}

/// A name that `trash` does not have.
fn free_name(trash: BorrowedFd<'_>) -> io::Result<OsString> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let name = OsString::from(hex::encode(random));
    match stat(trash, &name)? {
        None => Ok(name),
        Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
    }
}
