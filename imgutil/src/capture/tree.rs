//! The tree of one file system as it arrives: entries in the order of the stream, kept small, until all contents are written and the
//! inodes can follow.

use crate::inodes::{self, Inode, InodeIndex, Kind, MAX_DEPTH, XattrSet, XattrSets};
use crate::squashfs::ContentId;
use crate::tar;
use anyhow::{Result, bail};
use rustix::fs::FileType;
use std::collections::HashMap;
use std::ffi::CString;

/// The names in a path; none for the root. Never `.` or `..`, never empty.
pub(super) type Names = Vec<Vec<u8>>;

/// The tree; inode 0 is its root.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) inodes: Vec<Inode>,
    /// Of each inode: what a regular file holds.
    pub(super) contents: Vec<Option<ContentId>>,
    xattrs: XattrSets,
    by_path: HashMap<Names, InodeIndex>,
    /// What could not be kept.
    pub(super) acls: Vec<Names>,
}

/// The names in a path of the stream. `./a/b` and `a/b/` are the same.
pub(super) fn names(path: &[u8]) -> Result<Names> {
    let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    let names: Names = names.map(<[u8]>::to_vec).collect();
    if names.iter().any(|name| name == b".." || name.len() > 255 || name.contains(&0)) {
        bail!("a path in the stream of files leaves its tree or has an impossible name");
    }
    if names.len() > MAX_DEPTH {
        bail!("directories are nested deeper than {MAX_DEPTH}; flatten them");
    }
    Ok(names)
}

impl Tree {
    /// Adds an entry of that path; `content` is that of a regular file. A hard link to something that is not there (it was left out) is
    /// left out too: then `false`.
    pub(super) fn add(&mut self, path: Names, entry: tar::Entry, content: Option<ContentId>) -> Result<bool> {
        let kind = match entry.kind {
            tar::Kind::HardLink => {
                let Some(index) = self.by_path.get(&names(&entry.target)?).copied() else { return Ok(false) };
                let inode = &mut self.inodes[index.0 as usize];
                if let Kind::Directory(_) = inode.kind {
                    bail!("a hard link leads to a directory");
                }
                inode.links += 1;
                return self.place(path, index).map(|()| true);
            }
            tar::Kind::File if content.is_none() => bail!("a file came without contents"),
            tar::Kind::File => Kind::File(entry.size),
            tar::Kind::Symlink => Kind::Symlink(entry.target),
            tar::Kind::Character => Kind::CharDevice(entry.device.0, entry.device.1),
            tar::Kind::Block => Kind::BlockDevice(entry.device.0, entry.device.1),
            tar::Kind::Directory => Kind::Directory(Vec::new()),
            tar::Kind::Fifo => Kind::Fifo,
        };
        if entry.has_acl {
            self.acls.push(path.clone());
        }
        let kept: XattrSet = entry.xattrs.into_iter().filter(|(name, _)| XattrSets::hold(name.to_bytes())).collect();
        let index = inodes::next_index(&self.inodes)?;
        let is_directory = matches!(kind, Kind::Directory(_));
        self.inodes.push(Inode {
            mode: file_type(&kind).as_raw_mode() | entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            // What a squashfs can hold: 1970 to 2106.
            mtime: u32::try_from(entry.modified.0.max(0)).unwrap_or(u32::MAX),
            links: if is_directory { 2 } else { 1 },
            xattrs: self.xattrs.add(kept)?,
            kind,
        });
        self.contents.push(content);
        if index == InodeIndex(0) {
            if !path.is_empty() || !is_directory {
                bail!("the stream of files does not begin with its root");
            }
            self.by_path.insert(path, index);
            return Ok(true);
        }
        if is_directory && let Some(parent) = path.split_last().and_then(|(_, parent)| self.by_path.get(parent)) {
            self.inodes[parent.0 as usize].links += 1;
        }
        self.place(path, index).map(|()| true)
    }

    /// Gives an inode a name in the directory that it is in.
    fn place(&mut self, path: Names, index: InodeIndex) -> Result<()> {
        let Some((name, parent)) = path.split_last() else { bail!("the root comes twice in the stream of files") };
        let Some(parent) = self.by_path.get(parent).copied() else { bail!("a file comes before its directory") };
        let Kind::Directory(entries) = &mut self.inodes[parent.0 as usize].kind else { bail!("a file lies in a file") };
        entries.push((CString::new(name.as_slice())?, index));
        if self.by_path.insert(path, index).is_some() {
            bail!("a name comes twice in the stream of files");
        }
        Ok(())
    }

    /// Everything that came: entries of directories in order, and the sets of xattrs.
    pub(super) fn finish(self) -> (Vec<Inode>, Vec<XattrSet>, Vec<Option<ContentId>>) {
        let Self { mut inodes, contents, xattrs, .. } = self;
        for inode in &mut inodes {
            if let Kind::Directory(entries) = &mut inode.kind {
                entries.sort_unstable();
            }
        }
        (inodes, xattrs.into_sets(), contents)
    }
}

/// The type in `st_mode`.
fn file_type(kind: &Kind) -> FileType {
    match kind {
        Kind::Directory(_) => FileType::Directory,
        Kind::File(_) => FileType::RegularFile,
        Kind::Symlink(_) => FileType::Symlink,
        Kind::BlockDevice(..) => FileType::BlockDevice,
        Kind::CharDevice(..) => FileType::CharacterDevice,
        Kind::Fifo => FileType::Fifo,
        Kind::Socket => FileType::Socket,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: tar::Kind, target: &str) -> tar::Entry {
        tar::Entry {
            path: Vec::new(),
            target: target.into(),
            kind,
            mode: 0o755,
            uid: 0,
            gid: 0,
            modified: (0, 0),
            size: 0,
            device: (0, 0),
            xattrs: Vec::new(),
            has_acl: false,
        }
    }

    /// Adds (path, kind, target) in order; the first refusal.
    fn tree(entries: &[(&str, tar::Kind, &str)]) -> Result<Tree> {
        let mut tree = Tree::default();
        for (path, kind, target) in entries {
            tree.add(names(path.as_bytes())?, entry(*kind, target), None)?;
        }
        Ok(tree)
    }

    #[test]
    fn streams_that_are_no_tree_are_refused() {
        use tar::Kind::{Directory, Fifo, HardLink};
        let root = (".", Directory, "");
        let deep = "d/".repeat(MAX_DEPTH + 1);
        for (entries, reason) in [
            (&[("a", Fifo, "")][..], "does not begin with its root"),
            (&[(".", Fifo, "")], "does not begin with its root"),
            (&[root, root], "the root comes twice"),
            (&[root, ("d/f", Fifo, "")], "before its directory"),
            (&[root, ("f", Fifo, ""), ("f/g", Fifo, "")], "lies in a file"),
            (&[root, ("f", Fifo, ""), ("f", Fifo, "")], "comes twice"),
            (&[root, ("f", Fifo, ""), ("g", HardLink, "f"), ("g", Fifo, "")], "comes twice"),
            // It would be in itself, for ever.
            (&[root, ("d", Directory, ""), ("d/d", HardLink, "d")], "leads to a directory"),
            (&[root, ("d", HardLink, ".")], "leads to a directory"),
            (&[root, ("../a", Fifo, "")], "leaves its tree"),
            (&[root, ("f", HardLink, "a/../../b")], "leaves its tree"),
            (&[root, (&deep, Directory, "")], "nested deeper"),
        ] {
            let error = tree(entries).map(drop).expect_err(reason).to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn links_are_counted_and_names_sorted() {
        use tar::Kind::{Directory, Fifo, HardLink};
        let entries = [
            (".", Directory, ""),
            ("./f", Fifo, ""),
            ("./d/", Directory, ""),
            ("./d/g", HardLink, "./f"),
            ("./d/a", HardLink, "d/g"),
            ("./none", HardLink, "gone"),
        ];
        let (inodes, _, _) = tree(&entries).unwrap().finish();
        assert_eq!(inodes.iter().map(|inode| inode.links).collect::<Vec<_>>(), [3, 3, 2]);
        let Kind::Directory(entries) = &inodes[2].kind else { panic!("no directory") };
        assert_eq!(entries, &[(c"a".to_owned(), InodeIndex(1)), (c"g".to_owned(), InodeIndex(1))]);
    }
}
