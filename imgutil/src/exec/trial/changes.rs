//! What differs between a tree and the same tree with a layer over it.

use super::files::{
    is_copied_up, is_opaque, is_whiteout, kind, link_target, modified, names, open_directory, same_content, stat,
    xattrs,
};
use rustix::fs::{FileType, Stat};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

/// Something that the command has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// From the tree's root, with a `/` before it. Bytes that are not UTF-8 are shown as U+FFFD.
    pub path: String,
    /// What was done.
    pub change: Kind,
    /// As it was; `None` if it was added.
    pub before: Option<State>,
    /// As it is; `None` if it was removed.
    pub after: Option<State>,
    /// For something changed: `content`, `type`, `mode`, `owner`, `attributes`, `time`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub what: Vec<String>,
}

/// What was done to something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It is new.
    Added,
    /// It is different.
    Changed,
    /// It is gone. Of a directory only itself is told, with what it held.
    Removed,
}

/// What there is to know of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// `file`, `directory`, `symlink`, `fifo`, `socket`, `block` or `character`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Permission bits, as `0644`.
    pub mode: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// In bytes; of a removed directory, of all files in it.
    pub size: u64,
    /// Of a removed directory: how many things were in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entries: Option<u64>,
}

/// A name in the tree that must become a link to another one, since both were names of one file that was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Link {
    /// From the tree's root.
    pub(super) name: PathBuf,
    /// The changed file, from the tree's root.
    pub(super) file: PathBuf,
}

impl State {
    fn of(stat: &Stat) -> Self {
        let kind = match kind(stat) {
            FileType::RegularFile => "file",
            FileType::Directory => "directory",
            FileType::Symlink => "symlink",
            FileType::Fifo => "fifo",
            FileType::Socket => "socket",
            FileType::BlockDevice => "block",
            FileType::CharacterDevice => "character",
            FileType::Unknown => "unknown",
        };
        let size = if kind == "file" { u64::try_from(stat.st_size).unwrap_or(0) } else { 0 };
        let mode = format!("{:04o}", stat.st_mode & 0o7777);
        Self { kind: kind.to_owned(), mode, uid: stat.st_uid, gid: stat.st_gid, size, entries: None }
    }
}

/// All changes, sorted by path. `linked`: the overlay kept names of one file together.
pub(super) fn compare(tree: BorrowedFd<'_>, layer: BorrowedFd<'_>, linked: bool) -> io::Result<Vec<Change>> {
    let mut found = Vec::new();
    let root = OsStr::new(".");
    if let (Some(before), Some(after)) = (stat(tree, root)?, stat(layer, root)?) {
        found.extend(difference("/", (tree, root, &before), (layer, root, &after))?);
    }
    directory(Some(tree), layer, Path::new("/"), &mut found)?;
    for link in links(tree, layer, linked)? {
        let shown = Path::new("/").join(&link.file).to_string_lossy().into_owned();
        if let Some(change) = found.iter().find(|change| change.path == shown).cloned() {
            found.push(Change { path: Path::new("/").join(&link.name).to_string_lossy().into_owned(), ..change });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Compares what is in a directory of the layer with the tree's, if that shows through.
fn directory(
    tree: Option<BorrowedFd<'_>>,
    layer: BorrowedFd<'_>,
    path: &Path,
    found: &mut Vec<Change>,
) -> io::Result<()> {
    for name in names(layer)? {
        let Some(after) = stat(layer, &name)? else { continue };
        let before = match tree {
            Some(tree) => stat(tree, &name)?.map(|stat| (tree, stat)),
            None => None,
        };
        let path = path.join(&name);
        let shown = path.to_string_lossy().into_owned();
        if is_whiteout(&after) {
            if let Some((tree, before)) = before {
                found.push(removed(tree, &name, &before, shown)?);
            }
            continue;
        }
        match &before {
            None => found.push(Change {
                path: shown,
                change: Kind::Added,
                before: None,
                after: Some(State::of(&after)),
                what: Vec::new(),
            }),
            Some((tree, before)) => {
                found.extend(difference(&shown, (*tree, &name, before), (layer, &name, &after))?);
            }
        }
        if kind(&after) != FileType::Directory {
            continue;
        }
        let inner = open_directory(layer, &name)?;
        let below = match &before {
            Some((tree, before)) if kind(before) == FileType::Directory => Some(open_directory(*tree, &name)?),
            _ => None,
        };
        if let Some(below) = &below
            && is_opaque(layer, &name)?
        {
            for name in names(below.as_fd())? {
                if let (Some(before), None) = (stat(below.as_fd(), &name)?, stat(inner.as_fd(), &name)?) {
                    let shown = path.join(&name).to_string_lossy().into_owned();
                    found.push(removed(below.as_fd(), &name, &before, shown)?);
                }
            }
        }
        directory(below.as_ref().map(|fd| fd.as_fd()), inner.as_fd(), &path, found)?;
    }
    Ok(())
}

fn removed(tree: BorrowedFd<'_>, name: &OsStr, stat: &Stat, path: String) -> io::Result<Change> {
    let mut before = State::of(stat);
    if kind(stat) == FileType::Directory {
        let (mut entries, mut size) = (0, 0);
        weigh(open_directory(tree, name)?.as_fd(), &mut entries, &mut size)?;
        before.entries = Some(entries);
        before.size = size;
    }
    Ok(Change { path, change: Kind::Removed, before: Some(before), after: None, what: Vec::new() })
}

fn weigh(directory: BorrowedFd<'_>, entries: &mut u64, size: &mut u64) -> io::Result<()> {
    for name in names(directory)? {
        let Some(stat) = stat(directory, &name)? else { continue };
        *entries += 1;
        *size += State::of(&stat).size;
        if kind(&stat) == FileType::Directory {
            weigh(open_directory(directory, &name)?.as_fd(), entries, size)?;
        }
    }
    Ok(())
}

type Found<'a> = (BorrowedFd<'a>, &'a OsStr, &'a Stat);

/// What differs between two objects of one path; the time of a directory, which changes with what is in it, does not count.
fn difference(path: &str, old: Found<'_>, new: Found<'_>) -> io::Result<Option<Change>> {
    let ((tree, old_name, before), (layer, new_name, after)) = (old, new);
    let (was, is) = (State::of(before), State::of(after));
    let mut what = Vec::new();
    if was.kind == is.kind {
        let content = match kind(after) {
            FileType::RegularFile => was.size != is.size || !same_content((tree, old_name), (layer, new_name))?,
            FileType::Symlink => link_target(tree, old_name)? != link_target(layer, new_name)?,
            _ => before.st_rdev != after.st_rdev,
        };
        let time = kind(after) != FileType::Directory && modified(before) != modified(after);
        for (differs, word) in [
            (content, "content"),
            (was.mode != is.mode, "mode"),
            ((was.uid, was.gid) != (is.uid, is.gid), "owner"),
            (xattrs(tree, old_name)? != xattrs(layer, new_name)?, "attributes"),
            (time, "time"),
        ] {
            if differs {
                what.push(word.to_owned());
            }
        }
    } else {
        what.push("type".to_owned());
    }
    let change = Change { path: path.to_owned(), change: Kind::Changed, before: Some(was), after: Some(is), what };
    Ok((!change.what.is_empty()).then_some(change))
}

/// The other names of files that have several in the tree and were changed under one.
pub(super) fn links(tree: BorrowedFd<'_>, layer: BorrowedFd<'_>, linked: bool) -> io::Result<Vec<Link>> {
    let mut changed = HashMap::new();
    if linked {
        with_links(tree, layer, Path::new(""), &mut changed)?;
    }
    let mut found = Vec::new();
    if !changed.is_empty() {
        other_names(tree, Some(layer), Path::new(""), &changed, &mut found)?;
    }
    Ok(found)
}

/// Files of the layer that are copies of files with several names, by the inode of the tree's.
fn with_links(
    tree: BorrowedFd<'_>,
    layer: BorrowedFd<'_>,
    path: &Path,
    changed: &mut HashMap<u64, PathBuf>,
) -> io::Result<()> {
    for name in names(layer)? {
        let (Some(after), Some(before)) = (stat(layer, &name)?, stat(tree, &name)?) else { continue };
        match (kind(&before), kind(&after)) {
            (FileType::Directory, FileType::Directory) if !is_opaque(layer, &name)? => {
                let (tree, layer) = (open_directory(tree, &name)?, open_directory(layer, &name)?);
                with_links(tree.as_fd(), layer.as_fd(), &path.join(&name), changed)?;
            }
            (before_kind, after_kind)
                if before_kind == after_kind
                    && before_kind != FileType::Directory
                    && before.st_nlink > 1
                    && is_copied_up(layer, &name)? =>
            {
                changed.insert(before.st_ino, path.join(&name));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Names in the tree of inodes in `changed` that the layer neither has nor hides.
fn other_names(
    tree: BorrowedFd<'_>,
    layer: Option<BorrowedFd<'_>>,
    path: &Path,
    changed: &HashMap<u64, PathBuf>,
    found: &mut Vec<Link>,
) -> io::Result<()> {
    for name in names(tree)? {
        let Some(before) = stat(tree, &name)? else { continue };
        let after = match layer {
            Some(layer) => stat(layer, &name)?,
            None => None,
        };
        if kind(&before) == FileType::Directory {
            let inner = match (layer, &after) {
                (Some(layer), Some(after)) => {
                    if kind(after) != FileType::Directory || is_opaque(layer, &name)? {
                        continue;
                    }
                    Some(open_directory(layer, &name)?)
                }
                _ => None,
            };
            let below = open_directory(tree, &name)?;
            other_names(below.as_fd(), inner.as_ref().map(|fd| fd.as_fd()), &path.join(&name), changed, found)?;
        } else if let (None, Some(file)) = (after, changed.get(&before.st_ino)) {
            found.push(Link { name: path.join(OsString::from(&name)), file: file.clone() });
        }
    }
    Ok(())
}
