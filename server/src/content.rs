//! Blobs: bytes by their SHA-256, in files whose name is the digest. Written beside while they arrive, renamed when whole.

use crate::files;
use aws_lc_rs::digest;
use moor_api::ids::Sha256Digest;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// A blob that is arriving. Dropped before [`Self::finish`], it leaves nothing; one that was [resumed](Self::resume) leaves what came, and is
/// written past the page cache.
pub struct Incoming {
    file: File,
    /// What was not written yet; none where the page cache is used.
    direct: Option<Direct>,
    path: PathBuf,
    dir: PathBuf,
    hash: digest::Context,
    size: u64,
    looked: u64,
    kept: bool,
    /// What came is worth something although it is not whole.
    stays: bool,
}

/// What the file of a blob that came in part is called, before its digest.
const PARTIAL: &str = ".partial-";

/// Bytes that uploads leave free on the disk: the store has to go on.
const RESERVE: u64 = 32 << 20;
/// After this many bytes free space is looked at, and what came is brought to the disk: what is written all at once in the end keeps the
/// store's own syncs waiting (256 MB for 135 ms, where they take 1).
const LOOK: u64 = 4 << 20;

/// Bytes of one direct write.
const PIECE: usize = 1 << 20;
/// Where it begins in memory, and in the file, is a multiple of this: no disk has larger blocks.
const ALIGNED: usize = 4 << 10;
/// After every [`LOOK`] that was written directly the disk is left to others for as long as it was kept busy, and for no longer than this.
const PAUSE: Duration = Duration::from_millis(250);

/// Bytes on their way to the disk past the page cache. What piles up there is waited for by whoever syncs another file, as soon as the file system
/// has to write its journal for that. A direct write is waited for alone, and there is one at a time. Nor does what nobody here reads yet drive
/// out what nodes do read.
struct Direct {
    /// A piece, and room to begin it at a multiple of [`ALIGNED`].
    memory: Vec<u8>,
    begin: usize,
    length: usize,
    /// For so long the disk was kept busy since the last pause.
    busy: Duration,
}

impl Direct {
    fn new() -> Self {
        let memory = vec![0; PIECE + ALIGNED];
        let address = memory.as_ptr().addr();
        Self { begin: address.next_multiple_of(ALIGNED) - address, memory, length: 0, busy: Duration::ZERO }
    }

    /// What waits to be written.
    fn bytes(&self) -> &[u8] {
        &self.memory[self.begin..self.begin + self.length]
    }

    fn is_full(&self) -> bool {
        self.length == PIECE
    }

    /// The next bytes of the piece, for the caller to fill.
    fn room(&mut self, most: usize) -> &mut [u8] {
        let (from, count) = (self.begin + self.length, most.min(PIECE - self.length));
        self.length += count;
        &mut self.memory[from..from + count]
    }
}

/// Switches direct I/O on or off.
fn set_direct(file: &File, is_direct: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, is_direct);
    Ok(fcntl_setfl(file, flags)?)
}

/// Where a blob is.
#[must_use]
pub fn path_of(dir: &Path, blob: Sha256Digest) -> PathBuf {
    let name = blob.to_string();
    dir.join(&name[..2]).join(name)
}

impl Incoming {
    /// Begins one.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!(".incoming-{}", uuid::Uuid::new_v4()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&path)?;
        Ok(Self {
            file,
            direct: None,
            path,
            dir: dir.to_owned(),
            hash: digest::Context::new(&digest::SHA256),
            size: 0,
            looked: 0,
            kept: false,
            stays: false,
        })
    }

    /// Begins the blob `wanted`, or goes on where an earlier try was broken off. There is one at a time of each.
    ///
    /// # Errors
    /// The directory is not writable, or the disk failed.
    pub fn resume(dir: &Path, wanted: Sha256Digest) -> io::Result<Self> {
        let path = dir.join(format!("{PARTIAL}{wanted}"));
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o640).open(&path)?;
        // One that came whole and was not named has its last byte fetched again, so that there is always something to ask for.
        let come = file.metadata()?.len().saturating_sub(1);
        file.set_len(come)?;
        let mut hash = digest::Context::new(&digest::SHA256);
        let mut piece = vec![0; 256 << 10];
        let mut size = 0;
        // A power cut may have left anything in it: the digest of the whole decides in the end.
        while size < come {
            let count = file.read(&mut piece)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            hash.update(&piece[..count]);
            size += count as u64;
        }
        // Blocks are written whole: the last one with what it has already.
        let mut direct = Direct::new();
        let rest = usize::try_from(size % ALIGNED as u64).map_err(io::Error::other)?;
        file.read_exact_at(direct.room(rest), size - rest as u64)?;
        let direct = Some(direct);
        Ok(Self { file, direct, path, dir: dir.to_owned(), hash, size, looked: 0, kept: false, stays: true })
    }

    /// How much of it is here.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Throws away what is here.
    ///
    /// # Errors
    /// The disk failed.
    pub fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        if let Some(direct) = &mut self.direct {
            direct.length = 0;
        }
        self.hash = digest::Context::new(&digest::SHA256);
        (self.size, self.looked) = (0, 0);
        Ok(())
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// The disk is full, or failed.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size >= self.looked {
            if files::free_space(&self.dir)? < RESERVE + LOOK {
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    format!("less than {} MiB would be left on its disk", RESERVE >> 20),
                ));
            }
            if self.looked > 0 {
                self.sync()?;
            }
            self.looked = self.size + LOOK;
        }
        self.hash.update(bytes);
        let mut left = bytes;
        while !left.is_empty() {
            let count = if let Some(direct) = &mut self.direct {
                let room = direct.room(left.len());
                room.copy_from_slice(&left[..room.len()]);
                room.len()
            } else {
                self.file.write_all_at(left, self.size)?;
                left.len()
            };
            self.size += count as u64;
            left = &left[count..];
            if self.direct.as_ref().is_some_and(Direct::is_full) {
                self.write_piece()?;
            }
        }
        Ok(())
    }

    /// Brings to the disk what was written, and leaves it to others for a while then: where the disk is slow or others use it this takes
    /// longer, and so does the pause.
    fn sync(&mut self) -> io::Result<()> {
        let began = Instant::now();
        self.file.sync_data()?;
        if let Some(direct) = &mut self.direct {
            let busy = std::mem::take(&mut direct.busy) + began.elapsed();
            std::thread::sleep(busy.min(PAUSE));
        }
        Ok(())
    }

    fn write_piece(&mut self) -> io::Result<()> {
        let Some(direct) = &mut self.direct else { return Ok(()) };
        let (began, at) = (Instant::now(), self.size - direct.length as u64);
        match set_direct(&self.file, true).and_then(|()| self.file.write_all_at(direct.bytes(), at)) {
            Ok(()) => {
                direct.length = 0;
                direct.busy += began.elapsed();
                Ok(())
            }
            // A file system that cannot do it.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => self.write_rest(),
            Err(error) => Err(error),
        }
    }

    /// Writes what waits, and uses the page cache from now on: an end is no whole block.
    fn write_rest(&mut self) -> io::Result<()> {
        let Some(direct) = self.direct.take() else { return Ok(()) };
        set_direct(&self.file, false)?;
        self.file.write_all_at(direct.bytes(), self.size - direct.length as u64)
    }

    /// Makes it durable under its name.
    ///
    /// # Errors
    /// Syncing or renaming failed; then nothing stands under the name.
    pub fn finish(self) -> io::Result<(Sha256Digest, u64)> {
        let blob = self.digest();
        self.keep(blob)
    }

    /// As [`Self::finish`], if it is the blob that was asked for.
    ///
    /// # Errors
    /// It is another one; syncing or renaming failed.
    pub fn finish_as(mut self, wanted: Sha256Digest) -> io::Result<()> {
        let blob = self.digest();
        if blob != wanted {
            self.stays = false;
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("its SHA-256 is {blob}")));
        }
        self.keep(blob).map(drop)
    }

    fn digest(&self) -> Sha256Digest {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.hash.clone().finish().as_ref());
        Sha256Digest(bytes)
    }

    fn keep(mut self, blob: Sha256Digest) -> io::Result<(Sha256Digest, u64)> {
        self.write_rest()?;
        self.file.sync_all()?;
        let path = path_of(&self.dir, blob);
        if let Some(parent) = path.parent()
            && !parent.exists()
        {
            std::fs::create_dir_all(parent)?;
            files::sync_parent(parent)?;
        }
        std::fs::rename(&self.path, &path)?;
        self.kept = true;
        files::sync_parent(&path)?;
        Ok((blob, self.size))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // What cannot be written here comes once more; and what is left of an upload that broke is of no use.
        let _ = if self.stays { self.write_rest() } else { std::fs::remove_file(&self.path) };
    }
}

/// Which of these blobs are not in `dir`.
#[must_use]
pub fn lacking(dir: &Path, mut blobs: Vec<Sha256Digest>) -> Vec<Sha256Digest> {
    blobs.retain(|blob| !path_of(dir, *blob).exists());
    blobs
}

/// Keeps bytes that are in memory.
///
/// # Errors
/// As [`Incoming`].
pub fn add(dir: &Path, bytes: &[u8]) -> io::Result<Sha256Digest> {
    let mut incoming = Incoming::new(dir)?;
    incoming.write(bytes)?;
    Ok(incoming.finish()?.0)
}

/// Makes a blob young again, so that it is not collected before the record that is to name it is there.
///
/// # Errors
/// It is not there.
pub fn touch(dir: &Path, blob: Sha256Digest) -> io::Result<()> {
    File::open(path_of(dir, blob))?.set_modified(SystemTime::now())
}

/// Removes blobs that are not `named` and older than `age`; returns how many.
///
/// # Errors
/// The directory cannot be read.
pub fn collect(dir: &Path, named: &BTreeSet<Sha256Digest>, age: Duration) -> anyhow::Result<usize> {
    let mut count = 0;
    for folder in std::fs::read_dir(dir)?.flatten() {
        if !folder.path().is_dir() {
            let name = folder.file_name();
            let partial = name.to_str().and_then(|name| name.strip_prefix(PARTIAL)?.parse::<Sha256Digest>().ok());
            // A member that has just joined does not know yet what is named.
            let old = folder.metadata()?.modified()?.elapsed().is_ok_and(|passed| passed > age);
            if partial.is_some_and(|blob| !named.contains(&blob)) && old && std::fs::remove_file(folder.path()).is_ok()
            {
                count += 1;
            }
            continue;
        }
        for entry in std::fs::read_dir(folder.path())?.flatten() {
            let blob = entry.file_name().to_str().and_then(|name| name.parse::<Sha256Digest>().ok());
            if blob.is_none_or(|blob| named.contains(&blob)) {
                continue;
            }
            let old = entry.metadata()?.modified()?.elapsed().is_ok_and(|passed| passed > age);
            if old && std::fs::remove_file(entry.path()).is_ok() {
                count += 1;
            }
        }
    }
    Ok(count)
}

/// Removes what uploads left that a kill cut off.
pub fn sweep(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(".incoming-") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_or_young_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let [named, old, young] = ["named", "old", "young"].map(|text| add(dir.path(), text.as_bytes()).unwrap());
        let yesterday = SystemTime::now() - Duration::from_hours(25);
        for blob in [named, old] {
            File::open(path_of(dir.path(), blob)).unwrap().set_modified(yesterday).unwrap();
        }
        let collected = || collect(dir.path(), &BTreeSet::from([named]), Duration::from_hours(24)).unwrap();
        assert_eq!(collected(), 1);
        assert!(path_of(dir.path(), named).exists() && path_of(dir.path(), young).exists());
        assert!(!path_of(dir.path(), old).exists());
        File::open(path_of(dir.path(), young)).unwrap().set_modified(yesterday).unwrap();
        touch(dir.path(), young).unwrap();
        assert_eq!(collected(), 0);
        assert!(touch(dir.path(), old).is_err());
    }

    #[test]
    fn what_came_is_gone_on_with_and_the_whole_is_judged() {
        let dir = tempfile::tempdir().unwrap();
        let text = b"a blob that comes in two parts";
        let wanted = add(dir.path(), text).unwrap();
        std::fs::remove_file(path_of(dir.path(), wanted)).unwrap();
        let mut incoming = Incoming::resume(dir.path(), wanted).unwrap();
        assert_eq!(incoming.size(), 0);
        incoming.write(&text[..10]).unwrap();
        drop(incoming);
        // The last byte is fetched again.
        let mut incoming = Incoming::resume(dir.path(), wanted).unwrap();
        assert_eq!(incoming.size(), 9);
        incoming.write(&text[9..]).unwrap();
        incoming.finish_as(wanted).unwrap();
        assert_eq!(std::fs::read(path_of(dir.path(), wanted)).unwrap(), text);
        // Of one that was spoilt nothing is kept, and the next try is from the beginning.
        std::fs::remove_file(path_of(dir.path(), wanted)).unwrap();
        let mut incoming = Incoming::resume(dir.path(), wanted).unwrap();
        incoming.write(b"something else").unwrap();
        drop(incoming);
        let mut incoming = Incoming::resume(dir.path(), wanted).unwrap();
        incoming.write(&text[13..]).unwrap();
        assert!(incoming.finish_as(wanted).is_err());
        let mut incoming = Incoming::resume(dir.path(), wanted).unwrap();
        assert_eq!(incoming.size(), 0);
        incoming.write(b"the whole comes where the rest was asked for").unwrap();
        incoming.restart().unwrap();
        incoming.write(text).unwrap();
        drop(incoming);
        // What nothing names any more goes.
        assert_eq!(collect(dir.path(), &BTreeSet::from([wanted]), Duration::ZERO).unwrap(), 0);
        assert_eq!(collect(dir.path(), &BTreeSet::new(), Duration::ZERO).unwrap(), 1);
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_file()).count(),
            0
        );
    }

    /// In direct I/O everything is whole blocks; what comes, where it breaks off, and what it ends with are not.
    #[test]
    fn what_comes_past_the_page_cache_is_what_was_sent() {
        let dir = tempfile::tempdir().unwrap();
        let mut random = fastrand::Rng::with_seed(1);
        for size in [1, ALIGNED, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 4711, 6 * PIECE] {
            let mut bytes = vec![0; size];
            random.fill(&mut bytes);
            let wanted = add(dir.path(), &bytes).unwrap();
            std::fs::remove_file(path_of(dir.path(), wanted)).unwrap();
            let mut breaks = 0;
            loop {
                let mut incoming = Incoming::resume(dir.path(), wanted).unwrap();
                let end = if breaks < 5 { random.usize(0..=size) } else { size };
                breaks += 1;
                let mut at = usize::try_from(incoming.size()).unwrap();
                while at < end {
                    let next = end.min(at + random.usize(1..=PIECE));
                    incoming.write(&bytes[at..next]).unwrap();
                    at = next;
                }
                if at == size {
                    incoming.finish_as(wanted).unwrap();
                    break;
                }
                assert_eq!(incoming.size(), at as u64);
            }
            assert!(std::fs::read(path_of(dir.path(), wanted)).unwrap() == bytes, "{size} bytes are others");
        }
    }

    #[test]
    fn an_upload_is_whole_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut incoming = Incoming::new(dir.path()).unwrap();
        incoming.write(b"half").unwrap();
        drop(incoming);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut incoming = Incoming::new(dir.path()).unwrap();
        incoming.write(b"abc").unwrap();
        let (blob, size) = incoming.finish().unwrap();
        assert_eq!(blob.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!((size, std::fs::read(path_of(dir.path(), blob)).unwrap().as_slice()), (3, b"abc".as_slice()));
    }
}
