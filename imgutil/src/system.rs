//! The file systems of an image as the one tree that they are where they are mounted: what is at a path, by the links and mounts that the
//! system itself would follow. Nothing is unpacked for it.

use crate::squashfs::{FileData, Inode, InodeKind, Piece, Reader, Source};
use anyhow::{Context as _, Result};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// As many symbolic links Linux follows in one path (`path_resolution(7)`).
const MAX_LINKS: usize = 40;

/// An image's file systems.
pub(crate) struct System<S> {
    /// By mount point.
    parts: Vec<(PathBuf, Reader<S>)>,
}

/// Something in it.
#[derive(Clone)]
struct Place {
    path: PathBuf,
    part: usize,
    inode: Inode,
}

impl<S: Source> System<S> {
    /// File systems with their mount points.
    pub(crate) fn open(parts: Vec<(PathBuf, S)>) -> Result<Self> {
        let open = |(mount, source)| Ok((mount, Reader::open(source)?));
        Ok(Self { parts: parts.into_iter().map(open).collect::<Result<_>>()? })
    }

    /// What is at a path, which begins at the root; symbolic links are followed as the system itself would.
    fn find(&mut self, path: &str) -> Result<Option<Place>> {
        let root = self.mounted(Path::new("/"))?.context("the image has no root file system")?;
        let (mut here, mut above) = (root.clone(), Vec::new());
        let mut ahead = backwards(path.as_bytes());
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    here = above.pop().unwrap_or_else(|| root.clone());
                    continue;
                }
                _ => {}
            }
            let path = here.path.join(OsStr::from_bytes(&name));
            let next = match self.mounted(&path)? {
                Some(place) => place,
                None => match child(&mut self.parts[here.part].1, &here.inode, &name)? {
                    Some(inode) => Place { path, part: here.part, inode },
                    None => return Ok(None),
                },
            };
            let InodeKind::Symlink(target) = &next.inode.kind else {
                above.push(std::mem::replace(&mut here, next));
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return Ok(None);
            }
            if target.starts_with(b"/") {
                above.clear();
                here = root.clone();
            }
            ahead.extend(backwards(target));
        }
        Ok(Some(here))
    }

    /// The root of the file system that is mounted there.
    fn mounted(&mut self, path: &Path) -> Result<Option<Place>> {
        let Some(part) = self.parts.iter().position(|(mount, _)| mount == path) else { return Ok(None) };
        let reader = &mut self.parts[part].1;
        let top = reader.root();
        Ok(Some(Place { path: path.to_owned(), part, inode: reader.inode(top)? }))
    }

    /// The names in a directory, sorted; `None` if there is no such directory.
    pub(crate) fn list(&mut self, path: &str) -> Result<Option<Vec<String>>> {
        let Some(Place { part, inode: Inode { kind: InodeKind::Directory(listing), .. }, .. }) = self.find(path)?
        else {
            return Ok(None);
        };
        let reader = &mut self.parts[part].1;
        let (mut entries, mut names) = (reader.entries(&listing), Vec::new());
        while let Some(entry) = entries.next(reader)? {
            names.extend(entry.name.to_str().ok().map(str::to_owned));
        }
        names.sort_unstable();
        Ok(Some(names))
    }

    /// How large a regular file is; `None` if there is no such file.
    pub(crate) fn size(&mut self, path: &str) -> Result<Option<u64>> {
        Ok(self.file(path)?.map(|(_, file)| file.size))
    }

    /// A regular file's bytes, at most `limit`; `None` if there is no such file.
    pub(crate) fn read(&mut self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some((part, file)) = self.file(path)? else { return Ok(None) };
        let limit = usize::try_from(limit)?;
        let mut bytes = Vec::new();
        self.parts[part]
            .1
            .contents::<anyhow::Error>(&file, |piece| {
                let room = limit - bytes.len();
                match piece {
                    Piece::Hole(length) => bytes.resize(bytes.len() + usize::try_from(length)?.min(room), 0),
                    Piece::Data(data) => bytes.extend_from_slice(&data[..data.len().min(room)]),
                }
                Ok(())
            })
            .with_context(|| format!("cannot read '{path}' in the image"))?;
        Ok(Some(bytes))
    }

    /// The regular file at a path, and which part it is in.
    fn file(&mut self, path: &str) -> Result<Option<(usize, FileData)>> {
        Ok(self.find(path)?.and_then(|place| match place.inode.kind {
            InodeKind::File(file) => Some((place.part, file)),
            _ => None,
        }))
    }
}

/// The names in a path, the last one first.
fn backwards(path: &[u8]) -> Vec<Vec<u8>> {
    path.rsplit(|byte| *byte == b'/').map(<[u8]>::to_vec).collect()
}

fn child<S: Source>(reader: &mut Reader<S>, directory: &Inode, name: &[u8]) -> Result<Option<Inode>> {
    let InodeKind::Directory(listing) = &directory.kind else { return Ok(None) };
    let mut entries = reader.entries(listing);
    while let Some(entry) = entries.next(reader)? {
        if entry.name.to_bytes() == name {
            return Ok(Some(reader.inode(entry.inode)?));
        }
    }
    Ok(None)
}
