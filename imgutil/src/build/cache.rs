//! Base trees that were built before: packages installed, nothing of the recipe done yet. Whoever builds the same packages again
//! gets a copy of his own, unpacked from here; nothing is shared with it.
//!
//! An entry is `base/KEY.tar.zst` beside `base/KEY.toml`, which holds its digest and is written last. An entry is checked before
//! it is used; one that is damaged is removed. Whoever writes an entry holds a shared lock on `base`; whoever has the exclusive one
//! knows that what is not finished never will be.

use super::BuildError;
use super::backend::Context;
use super::output::NoMeaning;
use super::sources::of_reader;
use crate::exec::{Options, Outcome};
use crate::files::{Existing, NewFile, write_whole};
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Seek as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Where base trees are kept when nothing is said.
pub const DEFAULT_CACHE: &str = "/var/cache/mooring/imgutil";
/// So many bytes are kept; the entries used longest ago make room.
const KEPT: u64 = 8 << 30;
const TAR: &str = "/usr/bin/tar";
const ZSTD: &str = "/usr/bin/zstd";

/// A base tree in the cache.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its file.
    pub path: PathBuf,
    /// What it holds, for people: system, architecture, number of packages.
    pub what: String,
    /// Size in the cache.
    pub bytes: u64,
    /// When a build last made or used it.
    pub last_used: SystemTime,
}

#[derive(Serialize, Deserialize)]
struct Note {
    what: String,
    sha256: String,
}

/// The entries of the cache in `directory`, the one used last first.
pub fn entries(directory: &Path) -> io::Result<Vec<Entry>> {
    let base = directory.join("base");
    let names = match std::fs::read_dir(&base) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut all = Vec::new();
    for name in names {
        let note_path = name?.path();
        if note_path.extension().is_none_or(|end| end != "toml") {
            continue;
        }
        let path = note_path.with_extension("tar.zst");
        // Another process may have removed it meanwhile.
        let (Ok(note), Ok(metadata)) = (read_note(&note_path), path.metadata()) else { continue };
        let last_used = note_path.metadata()?.modified()?;
        all.push(Entry { path, what: note.what, bytes: metadata.len(), last_used });
    }
    all.sort_by_key(|entry| std::cmp::Reverse(entry.last_used));
    Ok(all)
}

/// What builds that were killed have left in a cache: trees without a note and notes without a tree, which nothing uses, and files that
/// never got their name.
/// Nobody begins to write another while this is held.
#[derive(Debug, Default)]
pub struct Unfinished {
    /// The files.
    pub entries: Vec<Entry>,
    /// The exclusive lock; none where a build is writing, or where there is no cache.
    lock: Option<OwnedFd>,
}

/// Finds them in the cache in `directory`; none while a build is writing into it, because they may be that one's.
pub fn unfinished(directory: &Path) -> io::Result<Unfinished> {
    let base = directory.join("base");
    let lock = match lock(&base, FlockOperation::NonBlockingLockExclusive) {
        Ok(lock) => lock,
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::WouldBlock].contains(&error.kind()) => {
            return Ok(Unfinished::default());
        }
        Err(error) => return Err(error),
    };
    let mut entries = Vec::new();
    for name in std::fs::read_dir(&base)? {
        let name = name?;
        let (path, text) = (name.path(), name.file_name().to_string_lossy().into_owned());
        let is_nameless = text.starts_with('.') && (text.contains(".tar.zst.") || text.contains(".toml."));
        let is_tree = text.ends_with(".tar.zst") && read_note(&note_of(&path)).is_err();
        let is_note = path.extension().is_some_and(|end| end == "toml") && !path.with_extension("tar.zst").exists();
        if is_nameless || is_tree || is_note {
            let metadata = name.metadata()?;
            let what = "not finished, by a build that was killed".to_owned();
            entries.push(Entry { path, what, bytes: metadata.len(), last_used: metadata.modified()? });
        }
    }
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.last_used));
    Ok(Unfinished { entries, lock: Some(lock) })
}

fn lock(base: &Path, operation: FlockOperation) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let lock = rustix::fs::open(base, flags, Mode::empty())?;
    rustix::fs::flock(&lock, operation)?;
    Ok(lock)
}

/// Removes an entry. A build that reads it meanwhile goes on with what it has opened.
pub fn remove(entry: &Entry) -> io::Result<()> {
    remove_files(&entry.path)
}

fn remove_files(path: &Path) -> io::Result<()> {
    // The note first: without it the rest is not used.
    for path in [note_of(path), path.to_path_buf()] {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn note_of(path: &Path) -> PathBuf {
    path.with_extension("").with_extension("toml")
}

fn read_note(path: &Path) -> io::Result<Note> {
    toml::from_str(&std::fs::read_to_string(path)?).map_err(io::Error::other)
}

/// The cache of one build.
pub(super) struct Cache {
    base: PathBuf,
}

impl Cache {
    /// Opens the cache in `directory`, made if need be. `None`, with a warning, if it cannot be used: a build goes on without.
    pub(super) fn open(directory: &Path) -> Option<Self> {
        if let Some(tool) = [TAR, ZSTD].into_iter().find(|tool| !Path::new(tool).exists()) {
            tracing::warn!("base trees are not kept: '{tool}' is not installed");
            return None;
        }
        let base = directory.join("base");
        let usable = || -> io::Result<()> {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&base)?;
            for path in [directory, &base] {
                // What somebody else can write would become root's files in an image.
                let metadata = path.symlink_metadata()?;
                if !metadata.is_dir() || metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
                    let path = path.display();
                    return Err(io::Error::other(format!("'{path}' must be a directory that only root can write to")));
                }
            }
            Ok(())
        };
        match usable() {
            Ok(()) => Some(Self { base }),
            Err(error) => {
                tracing::warn!("base trees are not kept: {error}");
                None
            }
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.base.join(format!("{key}.tar.zst"))
    }

    /// Fills the empty `work.root()` with the base tree of that key. `false` if there is none.
    pub(super) fn restore(&self, context: &mut Context<'_, '_>, key: &str) -> Result<bool, BuildError> {
        if !self.path(key).exists() {
            return Ok(false);
        }
        context.tools.stage("unpacking the base tree from the cache")?;
        let Some(file) = self.open_entry(key).map_err(|error| BuildError::io("read", self.path(key), error))? else {
            return Ok(false);
        };
        let root = context.work.root();
        let more = ["--extract", "--preserve-permissions", "--same-owner", "--file=-"];
        let command = tar(&root, "/usr/bin/zstd -d", &more);
        run(context, "unpacking the base tree", command, |[_, output, errors]| [file.into(), output, errors])?;
        // When it was used last; a cache that cannot be written to is still one that can be read.
        if let Ok(note) = File::options().append(true).open(note_of(&self.path(key))) {
            let _ = note.set_modified(SystemTime::now());
        }
        Ok(true)
    }

    /// Opens the tree of that key, whose bytes have been checked; `None` if there is none. One that is damaged is removed, unless somebody
    /// writes to the cache at this moment: it may be this one, and then the next build finds it good.
    fn open_entry(&self, key: &str) -> io::Result<Option<File>> {
        let Some((file, is_good)) = self.look(key)? else { return Ok(None) };
        if is_good {
            return Ok(Some(file));
        }
        let Ok(_lock) = lock(&self.base, FlockOperation::NonBlockingLockExclusive) else { return Ok(None) };
        // It may have been replaced since.
        match self.look(key)? {
            Some((file, true)) => Ok(Some(file)),
            Some((_, false)) => {
                let path = self.path(key);
                tracing::warn!("the base tree in '{}' is damaged: it is removed and built again", path.display());
                remove_files(&path)?;
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// A tree with its note, and whether they belong to each other. What is checked is what was opened, whatever has its name later.
    fn look(&self, key: &str) -> io::Result<Option<(File, bool)>> {
        let path = self.path(key);
        let (Ok(note), Ok(mut file)) = (read_note(&note_of(&path)), File::open(path)) else { return Ok(None) };
        let is_good = of_reader(&mut file)? == note.sha256;
        file.rewind()?;
        Ok(Some((file, is_good)))
    }

    /// Keeps `work.root()` under that key. `what` is for people. A cache that cannot be written is no failure of a build: `false`.
    pub(super) fn store(&self, context: &mut Context<'_, '_>, key: &str, what: &str) -> Result<bool, BuildError> {
        context.tools.stage("keeping the base tree in the cache")?;
        let path = self.path(key);
        let begun = || anyhow::Ok((lock(&self.base, FlockOperation::LockShared)?, NewFile::create(&path, 0o600)?));
        let (lock, new) = match begun() {
            Ok(begun) => begun,
            Err(error) => {
                tracing::warn!("the base tree is not kept: {error:#}");
                return Ok(false);
            }
        };
        let clone = || -> io::Result<OwnedFd> { Ok(rustix::io::fcntl_dupfd_cloexec(new.file(), 3)?) };
        let output = clone().map_err(|error| BuildError::io("write", &path, error))?;
        let more = ["--create", "--format=posix", "--sort=name", "--file=-", "."];
        let command = tar(&context.work.root(), "/usr/bin/zstd -q -1 -T0", &more);
        match run(context, "keeping the base tree", command, |[input, _, errors]| [input, output, errors]) {
            Ok(()) => {}
            Err(error @ (BuildError::Interrupted { .. } | BuildError::Exec(_))) => return Err(error),
            Err(error) => {
                tracing::warn!("the base tree is not kept: {error}");
                return Ok(false);
            }
        }
        let kept = || -> anyhow::Result<()> {
            let mut written = new.file().try_clone()?;
            written.rewind()?;
            let note = Note { what: what.to_owned(), sha256: of_reader(&mut written)? };
            new.appear(Existing::Replace)?;
            write_whole(&note_of(&path), 0o600, toml::to_string(&note)?.as_bytes())?;
            drop(lock);
            self.make_room(&path)?;
            Ok(())
        };
        let kept = kept();
        if let Err(error) = &kept {
            tracing::warn!("the base tree is not kept: {error:#}");
        }
        Ok(kept.is_ok())
    }

    /// Removes what is not finished, and entries used longest ago until what is left is not too much; never `but`. While another build
    /// keeps a tree this is left to that one.
    fn make_room(&self, but: &Path) -> io::Result<()> {
        let directory = self.base.parent().unwrap_or(&self.base);
        let unfinished = unfinished(directory)?;
        if unfinished.lock.is_none() {
            return Ok(());
        }
        for entry in &unfinished.entries {
            remove(entry)?;
        }
        let mut total = 0;
        for entry in entries(directory)? {
            total += entry.bytes;
            if total > KEPT && entry.path != but {
                remove(&entry)?;
            }
        }
        Ok(())
    }
}

fn tar(root: &Path, compressor: &str, more: &[&str]) -> Vec<OsString> {
    let mut command: Vec<OsString> = vec![TAR.into(), "--directory".into(), root.into()];
    command.push(format!("--use-compress-program={compressor}").into());
    command.extend(["--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*"].map(OsString::from));
    command.extend(more.iter().map(OsString::from));
    command
}

fn run(
    context: &mut Context<'_, '_>,
    doing: &str,
    command: Vec<OsString>,
    streams: impl FnOnce([OwnedFd; 3]) -> [OwnedFd; 3],
) -> Result<(), BuildError> {
    let (finished, tail) = context.tools.run(&mut NoMeaning, |usual| Ok(Options::on_host(command, streams(usual))))?;
    if finished?.outcome == Outcome::Exited(0) {
        return Ok(());
    }
    let reason = tail.reason();
    Err(BuildError::tool(doing, &reason, tail, &context.work.root()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_listed_by_last_use_and_the_oldest_make_room() {
        let scratch = tempfile::tempdir().unwrap();
        let cache = Cache::open(scratch.path()).unwrap();
        let keep = |name: &str, bytes: u64, used: u64| {
            let file = File::create(cache.path(name)).unwrap();
            file.set_len(bytes).unwrap();
            let note = Note { what: name.to_owned(), sha256: String::new() };
            std::fs::write(note_of(&cache.path(name)), toml::to_string(&note).unwrap()).unwrap();
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(used);
            File::options().append(true).open(note_of(&cache.path(name))).unwrap().set_modified(time).unwrap();
        };
        keep("old", 5 << 30, 1000);
        keep("new", 4 << 30, 3000);
        keep("middle", 3 << 30, 2000);
        let whats = || entries(scratch.path()).unwrap().into_iter().map(|entry| entry.what).collect::<Vec<_>>();
        assert_eq!(whats(), ["new", "middle", "old"]);
        cache.make_room(&cache.path("new")).unwrap();
        assert_eq!(whats(), ["new", "middle"]);
        assert!(!cache.path("old").exists());
        for entry in entries(scratch.path()).unwrap() {
            remove(&entry).unwrap();
            remove(&entry).unwrap();
        }
        assert!(whats().is_empty());
        assert!(entries(Path::new("/no/such")).unwrap().is_empty());
    }

    #[test]
    fn what_a_killed_build_left_is_removed_and_not_what_is_being_written() {
        let scratch = tempfile::tempdir().unwrap();
        let cache = Cache::open(scratch.path()).unwrap();
        let finished = Note { what: "finished".to_owned(), sha256: String::new() };
        for (name, bytes) in [
            ("finished.tar.zst", "x".to_owned()),
            ("finished.toml", toml::to_string(&finished).unwrap()),
            ("begun.tar.zst", "x".to_owned()),
            ("half.tar.zst", "x".to_owned()),
            ("half.toml", "what = ".to_owned()),
            ("orphan.toml", toml::to_string(&finished).unwrap()),
            (".other.tar.zst.0123456789abcdef", "x".to_owned()),
            ("somebody's file", "x".to_owned()),
        ] {
            std::fs::write(cache.base.join(name), bytes).unwrap();
        }
        let names = || -> Vec<String> {
            let mut names: Vec<String> = std::fs::read_dir(&cache.base)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
                .collect();
            names.sort();
            names
        };
        let all = names();
        let writing = lock(&cache.base, FlockOperation::LockShared).unwrap();
        assert!(unfinished(scratch.path()).unwrap().entries.is_empty());
        cache.make_room(&cache.path("finished")).unwrap();
        assert_eq!(names(), all);
        drop(writing);
        assert_eq!(unfinished(scratch.path()).unwrap().entries.len(), 4);
        cache.make_room(&cache.path("finished")).unwrap();
        assert_eq!(names(), ["finished.tar.zst", "finished.toml", "somebody's file"]);
        assert!(unfinished(Path::new("/no/such")).unwrap().entries.is_empty());
    }

    #[test]
    fn what_is_checked_is_what_is_used_and_only_damage_that_stays_is_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let cache = Cache::open(scratch.path()).unwrap();
        let keep = |bytes: &str, of: &str| {
            std::fs::write(cache.path("k"), bytes).unwrap();
            let note = Note { what: "k".to_owned(), sha256: of_reader(&mut of.as_bytes()).unwrap() };
            std::fs::write(note_of(&cache.path("k")), toml::to_string(&note).unwrap()).unwrap();
        };
        assert!(cache.open_entry("k").unwrap().is_none());
        keep("good", "good");
        let file = cache.open_entry("k").unwrap().unwrap();
        // Somebody makes room meanwhile.
        remove_files(&cache.path("k")).unwrap();
        assert_eq!(std::io::read_to_string(file).unwrap(), "good");
        assert!(cache.open_entry("k").unwrap().is_none());

        keep("bad", "good");
        let writing = lock(&cache.base, FlockOperation::LockShared).unwrap();
        assert!(cache.open_entry("k").unwrap().is_none() && cache.path("k").exists(), "it may be half replaced");
        drop(writing);
        assert!(cache.open_entry("k").unwrap().is_none() && !cache.path("k").exists());
        assert!(!note_of(&cache.path("k")).exists());
    }

    #[test]
    fn a_cache_that_others_can_write_to_is_not_used() {
        use std::os::unix::fs::PermissionsExt as _;
        let scratch = tempfile::tempdir().unwrap();
        std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Cache::open(scratch.path()).is_none());
    }
}
