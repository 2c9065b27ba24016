//! Reads of 4 KiB at random places, from several threads: how many in a time, how many failed, and how long the longest took. Runs as a
//! process of its own ([`READS`]), so that a read that hangs takes no table with it.

use crate::process::{text, tied};
use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// First argument of this program when it is only to read.
pub const READS: &str = "--reads";
/// Bytes of one read.
const SIZE: u64 = 4096;

/// What came of it.
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

/// Reads from the files under `path` (or from it, if it is a file) for `seconds`; `seed` gives the places.
pub(super) fn random(path: &Path, readers: usize, seconds: u64, seed: u64) -> anyhow::Result<Reads> {
    let mut command = tied(std::env::current_exe().context("finding this program")?);
    command.arg(READS).arg(path).args([readers.to_string(), seconds.to_string(), seed.to_string()]);
    serde_json::from_str(&text(&mut command)?).context("reading what the readers measured")
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
