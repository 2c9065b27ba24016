//! A squashfs from anybody: every inode, directory, file and attribute that can be reached, within a budget (a directory may hold
//! itself, a file of a few bytes may be a hole of exabytes).

use imgutil::squashfs::{InodeKind, InodePlace, Piece, Reader, Source, SquashfsError};
use std::io;

struct Bytes<'a>(&'a [u8]);

impl Source for Bytes<'_> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = io::ErrorKind::UnexpectedEof;
        let start = usize::try_from(offset).map_err(|_| end)?;
        let part = start.checked_add(buffer.len()).and_then(|stop| self.0.get(start..stop)).ok_or(end)?;
        buffer.copy_from_slice(part);
        Ok(())
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }
}

pub fn run(data: &[u8]) {
    let Ok(mut reader) = Reader::open(Bytes(data)) else { return };
    let mut waiting = vec![reader.root()];
    let mut budget = 500;
    while let Some(place) = waiting.pop()
        && budget > 0
    {
        budget -= 1;
        if let Ok(inside) = visit(&mut reader, place) {
            waiting.extend(inside.into_iter().take(100));
        }
    }
}

fn visit(reader: &mut Reader<Bytes<'_>>, place: InodePlace) -> Result<Vec<InodePlace>, SquashfsError> {
    let inode = reader.inode(place)?;
    for (name, value) in reader.xattrs(&inode)? {
        assert!(!name.is_empty() && value.len() <= 65_536);
    }
    match &inode.kind {
        InodeKind::Directory(listing) => {
            let (mut entries, mut inside) = (reader.entries(listing), Vec::new());
            while let Some(entry) = entries.next(reader)? {
                let name = entry.name.to_bytes();
                assert!(
                    !name.is_empty() && name.len() <= 255 && name != b"." && name != b".." && !name.contains(&b'/')
                );
                inside.push(entry.inode);
            }
            Ok(inside)
        }
        InodeKind::File(file) => {
            let mut length = 0_u64;
            reader.contents::<SquashfsError>(file, |piece| {
                length += match piece {
                    Piece::Hole(size) => size,
                    Piece::Data(bytes) => bytes.len() as u64,
                };
                Ok(())
            })?;
            assert_eq!(length, file.size, "a file is as long as it says, or an error");
            Ok(Vec::new())
        }
        _ => Ok(Vec::new()),
    }
}
