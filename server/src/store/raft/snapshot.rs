//! A snapshot of the state as a file: one zstd stream of a line of JSON (what it is of), all records, and the SHA-256 of what came
//! before. It is written and read as a stream, whatever its size.
//!
//! A record is the length of the table's name (1 byte), the name, the length of the key (4 bytes, little-endian), the key, the
//! length of the value (4 bytes), the value. A name of length 0 ends the records; the digest's 32 bytes follow.

use super::SnapshotMeta;
use super::wire::{WireError, WireSnapshotHead};
use crate::store::tables::{self, Snapshot, Write};
use crate::store::{Level, StoreError};
use aws_lc_rs::digest::{Context, SHA256};
use std::fs::File;
use std::io::{self, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};

/// Longest line, key and value that are read.
const MAX_HEAD: usize = 1 << 20;
const MAX_KEY: usize = 1 << 16;
const MAX_VALUE: usize = 64 << 20;
/// What our files end with.
const SUFFIX: &str = "snapshot";

/// A snapshot that is complete, open for reading.
#[derive(Debug)]
pub struct SnapshotFile {
    file: File,
    path: PathBuf,
}

impl SnapshotFile {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path)?, path: path.to_owned() })
    }

    /// A file that was received and whose content is on the disk.
    #[must_use]
    pub fn received(file: File, path: PathBuf) -> Self {
        Self { file, path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn into_file(self) -> File {
        self.file
    }
}

/// Makes the directory, and removes snapshots that an earlier run left there.
pub(super) fn clear(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == SUFFIX) {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// A new file in the directory, under a name that nobody has.
pub(super) fn create(directory: &Path) -> io::Result<(File, PathBuf)> {
    let (file, path) = tempfile::Builder::new()
        .prefix("state-")
        .suffix(&format!(".{SUFFIX}"))
        .tempfile_in(directory)?
        .keep()
        .map_err(|error| error.error)?;
    Ok((file, path))
}

struct Hashing<T> {
    inner: T,
    digest: Context,
}

impl<T: io::Write> Hashing<T> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.digest.update(bytes);
        self.inner.write_all(bytes)
    }

    fn put_long(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(|_| io::Error::other("a record is longer than 4 GiB"))?;
        self.put(&length.to_le_bytes())?;
        self.put(bytes)
    }
}

impl<T: io::Read> Hashing<T> {
    fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.inner.read_exact(&mut bytes)?;
        self.digest.update(&bytes);
        Ok(bytes)
    }

    fn take_long(&mut self, maximum: usize) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        length.copy_from_slice(&self.take(4)?);
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > maximum {
            return Err(wrong(format!("a part of {length} bytes, and {maximum} are allowed")));
        }
        self.take(length)
    }
}

fn wrong(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Why a snapshot was not read.
pub(super) fn unread(error: io::Error) -> StoreError {
    match error.downcast::<WireError>() {
        Ok(WireError::TooOld(error)) => *error,
        Ok(error) => StoreError::Snapshot(error.to_string()),
        Err(error) => StoreError::Snapshot(error.to_string()),
    }
}

/// Writes a snapshot of `view` and gives its path; the file is durable.
pub(super) fn write(directory: &Path, view: &Snapshot, meta: &SnapshotMeta) -> io::Result<PathBuf> {
    let (file, path) = create(directory)?;
    match write_to(&file, view, meta).and_then(File::sync_all) {
        Ok(()) => Ok(path),
        Err(error) => {
            // The first failure is the one to report.
            let _ = std::fs::remove_file(&path);
            Err(error)
        }
    }
}

/// Writes a snapshot of `view` as a stream, and gives `out` back.
pub(super) fn write_to<W: io::Write>(out: W, view: &Snapshot, meta: &SnapshotMeta) -> io::Result<W> {
    let mut out = Hashing { inner: zstd::Encoder::new(out, 1)?, digest: Context::new(&SHA256) };
    let level = view.level().map_err(io::Error::other)?;
    let head = WireSnapshotHead::new(level, meta.last_log_id, &meta.last_membership);
    let mut line = serde_json::to_vec(&head)?;
    line.push(b'\n');
    out.put(&line)?;
    for table in tables::REPLICATED {
        let name = tables::name_of(table);
        let length = u8::try_from(name.len()).map_err(|_| wrong("a table with a long name"))?;
        view.each(table, |key, value| {
            out.put(&[length])?;
            out.put(name.as_bytes())?;
            out.put_long(key.as_bytes())?;
            out.put_long(value)
        })
        .map_err(io::Error::other)??;
    }
    out.put(&[0])?;
    let Hashing { mut inner, digest } = out;
    inner.write_all(digest.finish().as_ref())?;
    inner.finish()
}

/// Reads what a snapshot is of, and no more; in a release that knows levels up to `known`.
pub(super) fn meta(file: &File, known: Level) -> io::Result<SnapshotMeta> {
    let mut input = Hashing { inner: zstd::Decoder::new(file)?, digest: Context::new(&SHA256) };
    head(&mut input, known)
}

fn head(input: &mut Hashing<impl Read>, known: Level) -> io::Result<SnapshotMeta> {
    let mut line = Vec::new();
    loop {
        let byte = input.take(1)?[0];
        if byte == b'\n' {
            break;
        }
        line.push(byte);
        if line.len() > MAX_HEAD {
            return Err(wrong("its first line does not end"));
        }
    }
    let head: WireSnapshotHead = serde_json::from_slice(&line)?;
    head.into_meta(known).map_err(io::Error::other)
}

/// Replaces all replicated tables by what the snapshot holds. The digest is checked, and the input read to its end, before this returns;
/// the caller commits only then.
pub(super) fn read(input: impl Read, write: &Write<'_>, known: Level) -> io::Result<SnapshotMeta> {
    let decoder = zstd::Decoder::new(input)?;
    let mut input = Hashing { inner: BufReader::with_capacity(1 << 16, decoder), digest: Context::new(&SHA256) };
    let meta = head(&mut input, known)?;
    for table in tables::REPLICATED {
        write.clear(table).map_err(io::Error::other)?;
    }
    loop {
        let length = usize::from(input.take(1)?[0]);
        if length == 0 {
            break;
        }
        let name = input.take(length)?;
        let table = tables::REPLICATED
            .into_iter()
            .find(|table| redb::TableHandle::name(table).as_bytes() == name)
            .ok_or_else(|| wrong(format!("a table '{}' that this release does not know", name.escape_ascii())))?;
        let key = String::from_utf8(input.take_long(MAX_KEY)?).map_err(|_| wrong("a key that is no text"))?;
        let value = input.take_long(MAX_VALUE)?;
        write.put_raw(table, &key, &value).map_err(io::Error::other)?;
    }
    let mut digest = [0; 32];
    input.inner.read_exact(&mut digest)?;
    if input.digest.finish().as_ref() != digest {
        return Err(wrong("its digest is not that of its content"));
    }
    if input.inner.read(&mut [0])? != 0 {
        return Err(wrong("it goes on after its end"));
    }
    Ok(meta)
}
