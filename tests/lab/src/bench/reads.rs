//! What programs read: 4 KiB at random places from several threads, or all files in turn. Runs as a process of its own ([`READS`],
//! [`ALL`]), so that a read that hangs takes no table with it.

use super::mounts::Remote;
use crate::process::tied;
use anyhow::Context as _;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// First argument of this program when it is only to read.
pub const READS: &str = "--reads";
/// First argument of this program when it is to read all files.
pub const ALL: &str = "--read-all";
/// Bytes of one read at random.
const SIZE: u64 = 4096;
/// Bytes of one read of a whole file, as cat(1) has them.
const WHOLE: usize = 128 << 10;
/// What reads longer than it should by so much hangs: finding the files may take its time.
const HANGS: Duration = Duration::from_secs(20);

/// What came of reads at random.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Reads {
    /// Reads that gave what they should.
    pub(super) good: u32,
    /// Reads in error.
    pub(super) errors: u32,
    /// Seconds that the longest took.
    pub(super) longest: f64,
    /// Seconds in all.
    pub(super) seconds: f64,
}

impl Reads {
    pub(super) fn per_second(&self) -> f64 {
        f64::from(self.good) / self.seconds
    }
}

/// What came of reading all files in turn.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct All {
    /// Files that were read to their end.
    pub(super) files: u32,
    /// Files in error.
    pub(super) errors: u32,
    /// Seconds in all.
    pub(super) seconds: f64,
}

/// Reads from the files under `path` (or from it, if it is a file) for `seconds`; `seed` gives the places.
pub(super) fn random(
    (path, server): (&Path, Option<&Remote>),
    readers: usize,
    seconds: u64,
    seed: u64,
) -> anyhow::Result<Reads> {
    let arguments = [readers.to_string(), seconds.to_string(), seed.to_string()];
    apart(READS, (path, server), &arguments, Duration::from_secs(seconds))
}

/// Reads all files under `path` in turn, for `seconds` at most.
pub(super) fn all((path, server): (&Path, Option<&Remote>), seconds: u64) -> anyhow::Result<All> {
    apart(ALL, (path, server), &[seconds.to_string()], Duration::from_secs(seconds))
}

/// Reads in a process of its own. One that hangs is ended together with who serves it: no signal ends a read that waits for a server.
fn apart<T: DeserializeOwned>(
    what: &str,
    (path, server): (&Path, Option<&Remote>),
    arguments: &[String],
    takes: Duration,
) -> anyhow::Result<T> {
    let mut command = tied(std::env::current_exe().context("finding this program")?);
    command.arg(what).arg(path).args(arguments).stdout(Stdio::piped());
    let mut child = command.spawn().context("starting the readers")?;
    let end = Instant::now() + takes + HANGS;
    while child.try_wait().context("waiting for the readers")?.is_none() {
        if Instant::now() > end {
            if let Some(server) = server {
                server.kill();
            }
            // Dead servers answer with errors, so it ends.
            let _ = child.kill();
            let _ = child.wait();
            anyhow::bail!("a read of '{}' hangs", path.display());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut text = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut text).context("asking the readers")?;
    }
    serde_json::from_str(&text).with_context(|| format!("nothing could be read of '{}'", path.display()))
}

/// The readers' side: PATH READERS SECONDS SEED; prints what came of it as JSON.
///
/// # Errors
/// Nothing to read.
pub fn read(arguments: &[OsString]) -> anyhow::Result<()> {
    let [path, readers, seconds, seed] = arguments else { anyhow::bail!("{READS} PATH READERS SECONDS SEED") };
    let number = |text: &OsString| text.to_str().and_then(|text| text.parse::<u64>().ok()).context("a number");
    let (readers, seconds, seed) = (number(readers)?, number(seconds)?, number(seed)?);
    let files = files(Path::new(path))?;
    anyhow::ensure!(!files.is_empty(), "there is nothing to read");
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let all: Vec<Reads> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..readers)
            .map(|reader| {
                let files = &files;
                scope.spawn(move || one(files, end, seed.wrapping_mul(1000).wrapping_add(reader)))
            })
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let sum = Reads {
        good: all.iter().map(|reads| reads.good).sum(),
        errors: all.iter().map(|reads| reads.errors).sum(),
        longest: all.iter().map(|reads| reads.longest).fold(0.0, f64::max),
        seconds: begun.elapsed().as_secs_f64(),
    };
    println!("{}", serde_json::to_string(&sum)?);
    Ok(())
}

/// The side of the one who reads all: PATH SECONDS; prints what came of it as JSON. As `find PATH -type f | xargs cat` does it: directories
/// are read as they come, files in their order, to nowhere.
///
/// # Errors
/// A directory cannot be read.
pub fn read_all(arguments: &[OsString]) -> anyhow::Result<()> {
    let [path, seconds] = arguments else { anyhow::bail!("{ALL} PATH SECONDS") };
    let seconds = seconds.to_str().and_then(|text| text.parse().ok()).context("a number of seconds")?;
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let mut all = All { files: 0, errors: 0, seconds: 0.0 };
    let mut buffer = vec![0; WHOLE];
    let mut nowhere = File::options().write(true).open("/dev/null").context("opening /dev/null")?;
    each(path, &mut |path| {
        match whole(path, &mut buffer, &mut nowhere) {
            Ok(()) => all.files += 1,
            Err(_) => all.errors += 1,
        }
        Instant::now() < end
    })?;
    all.seconds = begun.elapsed().as_secs_f64();
    println!("{}", serde_json::to_string(&all)?);
    Ok(())
}

/// Calls `file` for each file, as long as it wants more.
fn each(dir: &OsStr, file: &mut impl FnMut(&Path) -> bool) -> anyhow::Result<bool> {
    for entry in Path::new(dir).read_dir().with_context(|| format!("reading '{}'", dir.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let goes_on =
            if kind.is_dir() { each(entry.path().as_os_str(), file)? } else { !kind.is_file() || file(&entry.path()) };
        if !goes_on {
            return Ok(false);
        }
    }
    Ok(true)
}

fn whole(path: &Path, buffer: &mut [u8], nowhere: &mut File) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL)?;
    loop {
        let length = file.read(buffer)?;
        if length == 0 {
            return Ok(());
        }
        nowhere.write_all(&buffer[..length])?;
    }
}

/// Files of at least one read, with their lengths, in the order of their names.
fn files(path: &Path) -> anyhow::Result<Vec<(PathBuf, u64)>> {
    let (mut found, mut open) = (Vec::new(), vec![path.to_owned()]);
    while let Some(path) = open.pop() {
        let meta = path.symlink_metadata().with_context(|| format!("looking at '{}'", path.display()))?;
        if meta.is_dir() {
            for entry in path.read_dir().with_context(|| format!("reading '{}'", path.display()))? {
                open.push(entry?.path());
            }
        } else if meta.is_file() && meta.len() >= SIZE {
            found.push((path, meta.len()));
        }
    }
    found.sort();
    Ok(found)
}

fn one(files: &[(PathBuf, u64)], end: Instant, seed: u64) -> Reads {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut below = |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % limit
    };
    let mut reads = Reads { good: 0, errors: 0, longest: 0.0, seconds: 0.0 };
    let mut buffer = [0; 4096];
    while Instant::now() < end {
        let Ok(at) = usize::try_from(below(files.len() as u64)) else { continue };
        let (path, length) = &files[at];
        let offset = below(length / SIZE) * SIZE;
        let begun = Instant::now();
        let read = File::open(path).and_then(|file| {
            // Read-ahead would read what nobody asks for.
            nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
            file.read_exact_at(&mut buffer, offset)
        });
        reads.longest = reads.longest.max(begun.elapsed().as_secs_f64());
        match read {
            Ok(()) => reads.good += 1,
            Err(_) => reads.errors += 1,
        }
    }
    reads
}
