//! Reads a tar stream in the format of POSIX.1-2001 (pax), as GNU tar writes it with `--format=posix --xattrs --sparse
//! --sparse-version=0.1`: one entry at a time, its contents as pieces. Nothing is believed before it is checked.
//!
//! Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Storing Sparse Files"; star(5) for
//! SCHILY.xattr.

use std::io::{self, Read};

const BLOCK: usize = 512;
/// Most bytes of an extended header: xattrs have 64 KiB each, and a map of holes 40 bytes a piece.
const MAX_EXTENDED: u64 = 16 << 20;

/// The stream is no tar, or is damaged.
#[derive(Debug, thiserror::Error)]
pub(super) enum TarError {
    /// It cannot be read.
    #[error("cannot read the stream: {0}")]
    Read(#[from] io::Error),
    /// It is not what it should be.
    #[error("the stream of files is damaged: {0}")]
    Corrupt(&'static str),
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file of so many bytes, holes included.
    File(u64),
    /// Another name of an entry that came before: its path.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Directory,
    Fifo,
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Parts of its path; none for the root. Never `.` or `..`, never empty.
    pub(super) path: Vec<Vec<u8>>,
    pub(super) kind: Kind,
    /// Permission bits.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Unix seconds.
    pub(super) mtime: i64,
    /// Full names and values.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether it has an access control list.
    pub(super) has_acl: bool,
}

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// So many zero bytes.
    Hole(u64),
    Data(&'a [u8]),
}

/// Reads entries.
pub(super) struct Reader<R> {
    input: R,
    /// Bytes of the present entry that were not read, and the padding behind them.
    rest: u64,
    padding: u64,
    /// Where the present file's data lie: (offset, length), in order.
    map: Vec<(u64, u64)>,
    size: u64,
}

/// Records of an extended header.
#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    has_acl: bool,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_map: Option<Vec<(u64, u64)>>,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, rest: 0, padding: 0, map: Vec::new(), size: 0 }
    }

    /// What comes behind the archive.
    pub(super) fn into_inner(self) -> R {
        self.input
    }

    /// The next entry, `None` at the end of the archive. What was not read of the one before is passed over.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip()?;
        let mut extended = Extended::default();
        loop {
            let mut header = [0; BLOCK];
            self.input.read_exact(&mut header).map_err(cut_off)?;
            if header.iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            check_sum(&header)?;
            let size = number(&header[124..136])?;
            match header[156] {
                b'x' => extended = Extended::parse(&self.extended(size)?)?,
                // Of the whole archive: GNU tar writes none, and what is in one is for people.
                b'g' => drop(self.extended(size)?),
                _ => return self.entry(&header, size, extended).map(Some),
            }
        }
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENDED {
            return Err(TarError::Corrupt("an extended header is too long"));
        }
        let mut bytes = Vec::new();
        (&mut self.input).take(size).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return Err(cut_off(io::ErrorKind::UnexpectedEof.into()));
        }
        (self.rest, self.padding) = (0, padding(size));
        self.skip()?;
        Ok(bytes)
    }

    fn entry(&mut self, header: &[u8; BLOCK], size: u64, extended: Extended) -> Result<Entry, TarError> {
        let stored = extended.size.unwrap_or(size);
        if i64::try_from(stored).is_err() {
            return Err(TarError::Corrupt("a file is larger than any file system can hold"));
        }
        let path = extended.sparse_name.or(extended.path).unwrap_or_else(|| ustar_path(header));
        let link = || extended.link.clone().unwrap_or_else(|| text(&header[157..257]).to_vec());
        let device = || -> Result<(u32, u32), TarError> {
            Ok((small(number(&header[329..337])?)?, small(number(&header[337..345])?)?))
        };
        let mut data = 0;
        let kind = match header[156] {
            b'0' | 0 | b'7' => {
                data = stored;
                let size = extended.sparse_size.unwrap_or(stored);
                self.map = extended.sparse_map.unwrap_or_else(|| vec![(0, stored)]);
                check_map(&self.map, size, stored)?;
                self.size = size;
                Kind::File(size)
            }
            b'1' => Kind::HardLink(link()),
            b'2' => Kind::Symlink(link()),
            b'3' => device().map(|(major, minor)| Kind::CharDevice(major, minor))?,
            b'4' => device().map(|(major, minor)| Kind::BlockDevice(major, minor))?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            _ => return Err(TarError::Corrupt("an entry is of an unknown kind")),
        };
        // Data behind other kinds, which pax allows for hard links, are passed over.
        (self.rest, self.padding) = (if data > 0 { data } else { stored_behind(&kind, stored) }, padding(stored));
        Ok(Entry {
            path: parts(&path)?,
            kind,
            mode: u16::try_from(number(&header[100..108])? & 0o7777).unwrap_or_default(),
            uid: extended.uid.map_or_else(|| small(number(&header[108..116])?), Ok)?,
            gid: extended.gid.map_or_else(|| small(number(&header[116..124])?), Ok)?,
            mtime: match extended.mtime {
                Some(mtime) => mtime,
                None => i64::try_from(number(&header[136..148])?).unwrap_or(i64::MAX),
            },
            xattrs: extended.xattrs,
            has_acl: extended.has_acl,
        })
    }

    /// Calls with the contents of the entry that [`Self::next`] gave last, in order. `buffer` is used to read.
    pub(super) fn contents<E: From<TarError>>(
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
                self.input.read_exact(&mut buffer[..step]).map_err(cut_off)?;
                take(Piece::Data(&buffer[..step]))?;
                left -= step as u64;
                self.rest -= step as u64;
            }
            position = offset + length;
        }
        if self.size > position {
            take(Piece::Hole(self.size - position))?;
        }
        self.size = 0;
        Ok(())
    }

    fn skip(&mut self) -> Result<(), TarError> {
        let count = self.rest + self.padding;
        let skipped = io::copy(&mut (&mut self.input).take(count), &mut io::sink())?;
        if skipped != count {
            return Err(cut_off(io::ErrorKind::UnexpectedEof.into()));
        }
        (self.rest, self.padding, self.size) = (0, 0, 0);
        self.map.clear();
        Ok(())
    }
}

impl Extended {
    /// Records `LENGTH KEY=VALUE\n`.
    fn parse(mut bytes: &[u8]) -> Result<Self, TarError> {
        const CORRUPT: TarError = TarError::Corrupt("an extended header makes no sense");
        let mut all = Self::default();
        while !bytes.is_empty() {
            let space = bytes.iter().position(|byte| *byte == b' ').ok_or(CORRUPT)?;
            let length = usize::try_from(decimal(&bytes[..space])?).map_err(|_| CORRUPT)?;
            let record = bytes.get(space + 1..length).ok_or(CORRUPT)?.strip_suffix(b"\n").ok_or(CORRUPT)?;
            bytes = &bytes[length..];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(CORRUPT)?;
            all.set(&record[..equals], &record[equals + 1..])?;
        }
        Ok(all)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(small(decimal(value)?)?),
            b"gid" => self.gid = Some(small(decimal(value)?)?),
            b"mtime" => self.mtime = Some(seconds(value)?),
            b"GNU.sparse.name" => self.sparse_name = Some(value.to_vec()),
            b"GNU.sparse.size" => self.sparse_size = Some(decimal(value)?),
            b"GNU.sparse.map" => self.sparse_map = Some(sparse_map(value)?),
            _ if key.starts_with(b"SCHILY.acl.") => self.has_acl = true,
            // atime, ctime, comments: of no use here.
            _ => {}
        }
        Ok(())
    }
}

/// `OFFSET,LENGTH,OFFSET,LENGTH…`.
fn sparse_map(value: &[u8]) -> Result<Vec<(u64, u64)>, TarError> {
    let numbers: Vec<u64> = value.split(|byte| *byte == b',').map(decimal).collect::<Result<_, _>>()?;
    if !numbers.len().is_multiple_of(2) {
        return Err(TarError::Corrupt("a map of holes has an odd count of numbers"));
    }
    Ok(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

/// That a map is in order, inside of the file, and as long as the stored data.
fn check_map(map: &[(u64, u64)], size: u64, stored: u64) -> Result<(), TarError> {
    let mut end = 0;
    let mut total: u64 = 0;
    for (offset, length) in map {
        let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= size);
        end = next.ok_or(TarError::Corrupt("a map of holes is out of order or leaves its file"))?;
        total += length;
    }
    if total != stored {
        return Err(TarError::Corrupt("a map of holes and the stored data are of different lengths"));
    }
    Ok(())
}

/// Only a hard link has data behind it that are not its own contents.
fn stored_behind(kind: &Kind, stored: u64) -> u64 {
    if matches!(kind, Kind::HardLink(_)) { stored } else { 0 }
}

fn padding(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64) - size
}

fn cut_off(error: io::Error) -> TarError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        TarError::Corrupt("it ends in the middle: the connection broke, or tar failed on the node")
    } else {
        TarError::Read(error)
    }
}

/// The sum of all bytes, with blanks for the field itself.
fn check_sum(header: &[u8; BLOCK]) -> Result<(), TarError> {
    let sum: u64 =
        header.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u64::from(*byte) }).sum();
    if number(&header[148..156])? == sum { Ok(()) } else { Err(TarError::Corrupt("a header's sum is wrong")) }
}

/// An octal number, or GNU's binary one.
fn number(field: &[u8]) -> Result<u64, TarError> {
    const CORRUPT: TarError = TarError::Corrupt("a header holds no number where one belongs");
    if field[0] == 0x80 {
        let (high, low) = field.split_at(field.len() - 8.min(field.len() - 1));
        if high[1..].iter().any(|byte| *byte != 0) {
            return Err(CORRUPT);
        }
        return Ok(low.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte)));
    }
    let digits = text(field);
    let digits = std::str::from_utf8(digits).map_err(|_| CORRUPT)?.trim_matches([' ', '\0']);
    if digits.is_empty() { Ok(0) } else { u64::from_str_radix(digits, 8).map_err(|_| CORRUPT) }
}

fn decimal(text: &[u8]) -> Result<u64, TarError> {
    let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    number.ok_or(TarError::Corrupt("an extended header holds no number where one belongs"))
}

/// Whole seconds of a time with a fraction; earlier, not nearer to zero.
fn seconds(text: &[u8]) -> Result<i64, TarError> {
    const CORRUPT: TarError = TarError::Corrupt("a time makes no sense");
    let text = std::str::from_utf8(text).map_err(|_| CORRUPT)?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().map_err(|_| CORRUPT)?;
    Ok(if whole.starts_with('-') && fraction.bytes().any(|digit| digit != b'0') { seconds - 1 } else { seconds })
}

fn small(value: u64) -> Result<u32, TarError> {
    u32::try_from(value).map_err(|_| TarError::Corrupt("an owner or device number is too large"))
}

/// Up to the first zero byte.
fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
}

fn ustar_path(header: &[u8; BLOCK]) -> Vec<u8> {
    let (name, prefix) = (text(&header[..100]), text(&header[345..500]));
    if prefix.is_empty() || &header[257..262] != b"ustar" { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// The names in a path. `./a/b` and `a/b/` are the same.
pub(super) fn parts(path: &[u8]) -> Result<Vec<Vec<u8>>, TarError> {
    let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    let names: Vec<Vec<u8>> = names.map(<[u8]>::to_vec).collect();
    if names.iter().any(|name| name == b".." || name.len() > 255 || name.contains(&0)) {
        return Err(TarError::Corrupt("a path leaves its tree or has an impossible name"));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
    use std::path::Path;
    use std::process::Command;

    /// What real tar says of a tree.
    fn tar(tree: &Path) -> Vec<u8> {
        let output =
            Command::new("tar").args(super::super::node::TAR).arg("-C").arg(tree).args(["-cf", "-", "."]).output();
        let output = output.expect("tar runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn read(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
        let mut reader = Reader::new(bytes);
        let mut entries = Vec::new();
        let mut buffer = vec![0; 4096];
        while let Some(entry) = reader.next()? {
            let mut data = Vec::new();
            reader.contents(&mut buffer, |piece| {
                match piece {
                    Piece::Hole(length) => data.resize(data.len() + usize::try_from(length).expect("fits"), 0),
                    Piece::Data(bytes) => data.extend_from_slice(bytes),
                }
                Ok::<(), TarError>(())
            })?;
            entries.push((entry, data));
        }
        Ok(entries)
    }

    #[test]
    fn what_tar_writes_is_read_back() {
        let work = tempfile::tempdir().expect("directory");
        let tree = work.path();
        let long = "n".repeat(200);
        std::fs::create_dir(tree.join("d")).expect("makes");
        std::fs::write(tree.join("d").join(&long), "long name").expect("writes");
        std::fs::hard_link(tree.join("d").join(&long), tree.join("other")).expect("links");
        symlink("x".repeat(300), tree.join("link")).expect("links");
        let sparse = std::fs::File::create(tree.join("sparse")).expect("makes");
        sparse.write_all_at(b"in the middle", 3 << 20).expect("writes");
        sparse.set_len(8 << 20).expect("grows");
        std::fs::set_permissions(tree.join("sparse"), std::fs::Permissions::from_mode(0o4751)).expect("sets");
        rustix::fs::setxattr(tree.join("other"), "user.note", b"a=b\nc\0d", rustix::fs::XattrFlags::empty())
            .expect("sets");
        rustix::fs::mknodat(rustix::fs::CWD, tree.join("fifo"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .expect("makes");

        let bytes = tar(tree);
        assert!(bytes.len() < 1 << 20, "the holes were sent: {}", bytes.len());
        let entries = read(&bytes).expect("reads");
        let find = |name: &str| {
            let parts = parts(name.as_bytes()).expect("a path");
            entries.iter().find(|(entry, _)| entry.path == parts).unwrap_or_else(|| panic!("no '{name}'"))
        };
        assert_eq!(find(".").0.kind, Kind::Directory);
        assert_eq!(find("d").0.kind, Kind::Directory);
        assert_eq!(find("link").0.kind, Kind::Symlink("x".repeat(300).into_bytes()));
        assert_eq!(find("fifo").0.kind, Kind::Fifo);
        let (entry, data) = find("sparse");
        assert_eq!((entry.kind.clone(), entry.mode, data.len()), (Kind::File(8 << 20), 0o4751, 8 << 20));
        assert!(data.iter().enumerate().all(|(at, byte)| (3 << 20..(3 << 20) + 13).contains(&at) || *byte == 0));
        assert_eq!(&data[3 << 20..(3 << 20) + 13], b"in the middle");
        // Of two names, the one that comes second points to the first.
        let (first, second) = (find(&format!("d/{long}")), find("other"));
        let contents = if matches!(first.0.kind, Kind::File(9)) { first } else { second };
        assert_eq!(contents.1, b"long name");
        assert!(matches!(
            (&first.0.kind, &second.0.kind),
            (Kind::HardLink(_), Kind::File(9)) | (Kind::File(9), Kind::HardLink(_))
        ));
        let xattrs = &contents.0.xattrs;
        assert!(xattrs.contains(&(b"user.note".to_vec(), b"a=b\nc\0d".to_vec())), "{xattrs:?}");
    }

    #[test]
    fn a_damaged_stream_is_refused() {
        let work = tempfile::tempdir().expect("directory");
        std::fs::write(work.path().join("file"), vec![7; 3000]).expect("writes");
        let good = tar(work.path());
        assert!(read(&good).is_ok());
        // Behind the last entry there are only zeros, of which the first block is the end of the archive.
        let end = good.iter().rposition(|byte| *byte != 0).expect("an entry");
        for length in (0..end).step_by(97) {
            assert!(read(&good[..length]).is_err(), "cut at {length}");
        }
        let mut bad = good.clone();
        bad[0] ^= 1;
        assert!(matches!(read(&bad), Err(TarError::Corrupt("a header's sum is wrong"))));
        for path in ["../a", "a/../../b", "a/\0b"] {
            assert!(parts(path.as_bytes()).is_err(), "{path:?}");
        }
        for (map, size, stored) in
            [("0,10,5,10", 20, 20), ("0,30", 20, 30), ("0,10", 20, 11), ("18446744073709551615,2", 20, 2)]
        {
            let map = sparse_map(map.as_bytes()).expect("a map");
            assert!(check_map(&map, size, stored).is_err(), "{map:?}");
        }
        assert!(Extended::parse(b"8 size=1\n").is_err());
        assert!(Extended::parse(b"12 size=1\n").is_err());
        assert!(Extended::parse(b"99999999999999999999 a=b\n").is_err());
        assert_eq!((seconds(b"-1.5").ok(), seconds(b"12.9").ok()), (Some(-2), Some(12)));
    }
}
