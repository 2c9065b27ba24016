//! Files of a packed tree, found by name: what [`super::database`] reads without unpacking the image.

use super::database::Files;
use crate::squashfs::{InodeKind, InodePlace, Piece, Reader, Source};
use anyhow::{Context as _, Result};
use std::cell::RefCell;
use std::collections::VecDeque;

/// Links that are followed in one path (as in Linux).
const LINKS: usize = 40;

/// The files of an open squashfs.
pub struct ImageFiles<S>(RefCell<Reader<S>>);

impl<S: Source> ImageFiles<S> {
    /// Of this squashfs.
    pub fn new(reader: Reader<S>) -> Self {
        Self(RefCell::new(reader))
    }

    /// The inode at a path, links followed inside of the image; `None` if there is none.
    fn find(&self, path: &str) -> Result<Option<InodePlace>> {
        let mut reader = self.0.borrow_mut();
        let names = |path: &[u8]| -> Vec<Vec<u8>> {
            path.split(|byte| *byte == b'/')
                .filter(|name| !name.is_empty() && *name != b".")
                .map(<[u8]>::to_vec)
                .collect()
        };
        let mut wanted: VecDeque<Vec<u8>> = names(path.as_bytes()).into();
        let (mut above, mut links) = (vec![reader.root()], 0);
        while let Some(name) = wanted.pop_front() {
            if name == b".." {
                // Above the root is the root.
                if above.len() > 1 {
                    above.pop();
                }
                continue;
            }
            let here = *above.last().context("a path has no root")?;
            let InodeKind::Directory(listing) = reader.inode(here)?.kind else { return Ok(None) };
            let mut entries = reader.entries(&listing);
            let mut found = None;
            while let Some(entry) = entries.next(&mut reader)? {
                if entry.name.to_bytes() == name {
                    found = Some(entry.inode);
                    break;
                }
            }
            let Some(found) = found else { return Ok(None) };
            if let InodeKind::Symlink(target) = reader.inode(found)?.kind {
                links += 1;
                if links > LINKS {
                    return Ok(None);
                }
                if target.starts_with(b"/") {
                    above.truncate(1);
                }
                for name in names(&target).into_iter().rev() {
                    wanted.push_front(name);
                }
            } else {
                above.push(found);
            }
        }
        Ok(above.pop())
    }
}

impl<S: Source> Files for ImageFiles<S> {
    fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(place) = self.find(path)? else { return Ok(None) };
        let mut reader = self.0.borrow_mut();
        let InodeKind::File(file) = reader.inode(place)?.kind else { return Ok(None) };
        let mut bytes = Vec::new();
        let limit = usize::try_from(limit)?;
        reader
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

    fn list(&self, path: &str) -> Result<Vec<String>> {
        let Some(place) = self.find(path)? else { return Ok(Vec::new()) };
        let mut reader = self.0.borrow_mut();
        let InodeKind::Directory(listing) = reader.inode(place)?.kind else { return Ok(Vec::new()) };
        let (mut entries, mut names) = (reader.entries(&listing), Vec::new());
        while let Some(entry) = entries.next(&mut reader)? {
            names.push(entry.name.to_string_lossy().into_owned());
        }
        Ok(names)
    }
}
