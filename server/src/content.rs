//! Blobs: bytes by their SHA-256, in files whose name is the digest. Written beside while they arrive, renamed when whole.

use crate::files;
use aws_lc_rs::digest;
use moor_api::ids::Sha256Digest;
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A blob that is arriving. Dropped before [`Self::finish`], it leaves nothing; one that was [resumed](Self::resume) leaves what came.
pub struct Incoming {
    file: File,
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
        Ok(Self { file, path, dir: dir.to_owned(), hash, size, looked: 0, kept: false, stays: true })
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
        self.file.rewind()?;
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
                self.file.sync_data()?;
            }
            self.looked = self.size + LOOK;
        }
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
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
        if !self.kept && !self.stays {
            // What is left of an upload that broke is of no use.
            let _ = std::fs::remove_file(&self.path);
        }
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
