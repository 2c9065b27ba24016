//! Reads a tar archive as a stream of entries: POSIX ustar and pax, with GNU's long names, binary numbers and sparse files.
//!
//! Our own reader, since layers and captured nodes come from anywhere: the known crates read the extension records of an entry, of
//! any length that its header claims, into memory, and an archive of a few kilobytes can claim terabytes. Here everything is bounded.
//!
//! Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Storing Sparse Files"; star(5) for
//! SCHILY.xattr.

mod fields;

use fields::{Extended, full_name, is_map, number, until_nul};
use std::ffi::CString;
use std::io::{self, Read};

/// Archives consist of these.
const BLOCK: usize = 512;

/// What is accepted, beside what every archive may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Accept {
    /// Most bytes in all extension records of one entry, their headers included.
    pub(crate) records: u64,
    /// Longest path and link target, in bytes.
    pub(crate) path: usize,
    /// Files with holes, as GNU tar writes them with `--sparse-version=0.1`.
    pub(crate) sparse: bool,
    /// An end without the blocks of zeros that say so.
    pub(crate) open_end: bool,
}

/// A layer of a container image: records have room for an attribute of the largest size that Linux has, and some more.
pub(crate) const LAYER: Accept = Accept { records: 1 << 20, path: 4096, sparse: false, open_end: true };
/// What GNU tar sends of a running system; its maps of holes have some 40 bytes for each. Without its end it was cut off.
pub(crate) const STREAM: Accept = Accept { records: 16 << 20, path: 1 << 18, sparse: true, open_end: false };

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
}

/// One entry without its content.
#[derive(Debug)]
pub(crate) struct Entry {
    /// As it stands there.
    pub(crate) path: Vec<u8>,
    /// Of a symbolic or hard link.
    pub(crate) target: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds.
    pub(crate) modified: (i64, i64),
    /// Of a file, holes included.
    pub(crate) size: u64,
    /// Major and minor of a device.
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(CString, Vec<u8>)>,
    /// Whether it has an access control list, which is not read.
    pub(crate) has_acl: bool,
}

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// So many zero bytes.
    Hole(u64),
    Data(&'a [u8]),
}

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream failed, or ended too early.
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    /// A header whose checksum is wrong: damaged, or no archive.
    #[error("no header of a tar archive at offset {0}")]
    Header(u64),
    /// A field that makes no sense.
    #[error("the header at offset {offset} has a {what} that is no such")]
    Field {
        /// Where the header is.
        offset: u64,
        /// Which field.
        what: &'static str,
    },
    /// Something is longer than any honest archive has it.
    #[error("the {what} of the entry at offset {offset} is longer than {limit} bytes")]
    TooLong {
        /// Where.
        offset: u64,
        /// What.
        what: &'static str,
        /// How much is read.
        limit: u64,
    },
    /// A type of entry that is not known.
    #[error("the entry at offset {offset} has the type '{}', which is not known here", char::from(*kind).escape_default())]
    Kind {
        /// Where.
        offset: u64,
        /// Its letter.
        kind: u8,
    },
}

/// The archive.
pub(crate) struct Reader<R> {
    input: R,
    accept: Accept,
    offset: u64,
    /// What is left of the stored content of the current entry, and of the zeros behind it.
    content: u64,
    padding: u64,
    /// Size of the current file, and where in it the stored content lies: (offset, length), in order.
    size: u64,
    map: Vec<(u64, u64)>,
}

impl<R: Read> Reader<R> {
    pub(crate) fn new(input: R, accept: Accept) -> Self {
        Self { input, accept, offset: 0, content: 0, padding: 0, size: 0, map: Vec::new() }
    }

    /// The next entry; `None` at the end. What was not read of the content before it is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let (mut extended, mut records) = (Extended::default(), 0);
        loop {
            self.skip(self.content + self.padding)?;
            (self.content, self.padding) = (0, 0);
            let at = self.offset;
            let Some(header) = self.header()? else { return Ok(None) };
            let field = |range: std::ops::Range<usize>| header.get(range).unwrap_or_default();
            let number = |range, what| number(field(range)).ok_or(TarError::Field { offset: at, what });
            let size = number(124..136, "size")?;
            let kind = header[156];
            match kind {
                b'x' | b'L' | b'K' | b'g' => {
                    // However many there are of them: each adds to what is kept, and whoever reads is not asked in between.
                    records = size.saturating_add(records + BLOCK as u64);
                    if records > self.accept.records {
                        return Err(TarError::TooLong { offset: at, what: "extension", limit: self.accept.records });
                    }
                    let record = self.record(size)?;
                    match kind {
                        b'x' => extended
                            .read(&record, self.accept.sparse)
                            .ok_or(TarError::Field { offset: at, what: "record" })?,
                        b'L' => extended.path = Some(until_nul(&record).to_vec()),
                        b'K' => extended.target = Some(until_nul(&record).to_vec()),
                        // A global header: no tool that writes layers puts anything into it that counts here.
                        _ => {}
                    }
                    continue;
                }
                _ => {}
            }
            let kind = match kind {
                b'0' | 0 | b'7' => Kind::File,
                b'1' => Kind::HardLink,
                b'2' => Kind::Symlink,
                b'3' => Kind::Character,
                b'4' => Kind::Block,
                b'5' => Kind::Directory,
                b'6' => Kind::Fifo,
                kind => return Err(TarError::Kind { offset: at, kind }),
            };
            // The name of a file with holes is one that old readers can make sense of; the file's own is beside.
            let path = extended.sparse_name.take().or_else(|| extended.path.take());
            let path = path.unwrap_or_else(|| full_name(&header));
            // Before there was a letter for directories.
            let kind = if kind == Kind::File && path.ends_with(b"/") { Kind::Directory } else { kind };
            let size = extended.size.unwrap_or(size);
            if i64::try_from(size).is_err() {
                return Err(TarError::Field { offset: at, what: "size" });
            }
            self.content = if kind == Kind::File { size } else { 0 };
            self.padding = self.content.wrapping_neg() % BLOCK as u64;
            self.size = if kind == Kind::File { extended.sparse_size.unwrap_or(size) } else { 0 };
            self.map = extended.sparse_map.take().unwrap_or_else(|| vec![(0, self.content)]);
            if i64::try_from(self.size).is_err() || !is_map(&self.map, self.size, self.content) {
                return Err(TarError::Field { offset: at, what: "map of holes" });
            }
            let id = |range, what, given: Option<u32>| match given {
                Some(id) => Ok(id),
                None => number(range, what)
                    .and_then(|id| u32::try_from(id).map_err(|_| TarError::Field { offset: at, what })),
            };
            let device = |range| number(range, "device number").map(|number| u32::try_from(number).unwrap_or(u32::MAX));
            let is_device = matches!(kind, Kind::Character | Kind::Block);
            let entry = Entry {
                target: extended.target.take().unwrap_or_else(|| until_nul(field(157..257)).to_vec()),
                kind,
                mode: u32::try_from(number(100..108, "mode")? & 0o7777).unwrap_or(0),
                uid: id(108..116, "user id", extended.uid)?,
                gid: id(116..124, "group id", extended.gid)?,
                modified: match extended.modified {
                    Some(time) => time,
                    None => (i64::try_from(number(136..148, "time")?).unwrap_or(0), 0),
                },
                size: self.size,
                device: if is_device { (device(329..337)?, device(337..345)?) } else { (0, 0) },
                xattrs: std::mem::take(&mut extended.xattrs),
                has_acl: extended.has_acl,
                path,
            };
            for (what, bytes) in [("name", &entry.path), ("link target", &entry.target)] {
                if bytes.len() > self.accept.path {
                    return Err(TarError::TooLong { offset: at, what, limit: self.accept.path as u64 });
                }
            }
            return Ok(Some(entry));
        }
    }

    /// Calls with the content of the current file, in order, holes told apart. `buffer` is used to read.
    pub(crate) fn pieces<E: From<TarError>>(
        &mut self,
        buffer: &mut [u8],
        mut take: impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut position = 0;
        for (offset, length) in std::mem::take(&mut self.map) {
            if offset > position {
                take(Piece::Hole(offset - position))?;
            }
            let mut left = length;
            while left > 0 {
                let step = usize::try_from(left.min(buffer.len() as u64)).unwrap_or(buffer.len());
                self.read_exact(&mut buffer[..step]).map_err(TarError::from)?;
                take(Piece::Data(&buffer[..step]))?;
                left -= step as u64;
            }
            position = offset + length;
        }
        if self.size > position {
            take(Piece::Hole(self.size - position))?;
        }
        Ok(())
    }

    /// Where the content of the current entry begins in the archive.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Reads the rest of the stream, which is no part of the archive, but of what was hashed.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        io::copy(&mut self.input, &mut io::sink()).map(drop)
    }

    /// A header; `None` at the end of the archive: zeros, or nothing more where that is accepted.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let at = self.offset;
        let mut header = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.input.read(&mut header[filled..]) {
                Ok(0) if filled == 0 && self.accept.open_end => return Ok(None),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.offset += BLOCK as u64;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // The sum of all bytes, with blanks in the place of the sum itself.
        let sum: u64 = header
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u64::from(*byte) })
            .sum();
        if number(&header[148..156]) != Some(sum) {
            return Err(TarError::Header(at));
        }
        Ok(Some(header))
    }

    /// The content of an extension, whose size is within the bounds.
    fn record(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        let mut record = vec![0; usize::try_from(size).unwrap_or(0)];
        self.input.read_exact(&mut record)?;
        self.offset += size;
        self.skip(size.wrapping_neg() % BLOCK as u64)?;
        Ok(record)
    }

    fn skip(&mut self, count: u64) -> io::Result<()> {
        let skipped = io::copy(&mut (&mut self.input).take(count), &mut io::sink())?;
        self.offset += skipped;
        if skipped == count { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// The content of the current entry.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.content).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(0);
        }
        let count = self.input.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.content -= count as u64;
        self.offset += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u8, size: usize) -> [u8; BLOCK] {
        let mut header = [0; BLOCK];
        header[..4].copy_from_slice(b"file");
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        header[156] = kind;
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum::<u64>() + 8 * 32;
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        header
    }

    /// A header of extensions with what they say.
    fn extension(kind: u8, record: &str) -> Vec<u8> {
        let mut bytes = header(kind, record.len()).to_vec();
        bytes.extend_from_slice(record.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    #[test]
    fn records_are_bounded_together() {
        let value = "v".repeat(100_000);
        for kind in [b'x', b'g', b'L'] {
            let record = format!("100023 SCHILY.xattr.u={value}\n");
            let record = format!("{} SCHILY.xattr.u={value}\n", record.len());
            let one = extension(kind, &record);
            let archive = |count: usize| [one.repeat(count), header(b'0', 0).to_vec()].concat();
            let read = |bytes: &[u8]| Reader::new(bytes, LAYER).next();
            assert!(read(&archive(9)).is_ok() || kind == b'L', "{}: within a MiB", char::from(kind));
            let error = read(&archive(11)).expect_err("beyond a MiB");
            assert!(matches!(error, TarError::TooLong { what: "extension", .. }), "{error}");
            // Also if there is nothing in them.
            let error = read(&extension(kind, "").repeat(3000)).expect_err("empty ones");
            assert!(matches!(error, TarError::TooLong { what: "extension", .. }), "{error}");
        }
    }

    #[test]
    fn a_size_that_no_file_can_have_is_refused() {
        for record in ["29 size=18446744073709551615\n", "40 GNU.sparse.size=18446744073709551615\n"] {
            assert_eq!(record.split(' ').next().and_then(|length| length.parse().ok()), Some(record.len()), "{record}");
            let archive = [extension(b'x', record).as_slice(), &header(b'0', 0)].concat();
            let error = Reader::new(archive.as_slice(), STREAM).next().map(drop).expect_err(record);
            assert!(matches!(error, TarError::Field { offset: 1024, .. }), "{error}");
        }
    }
}
