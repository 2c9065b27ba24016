//! What disk and clock do to a member: a small library ([shim.c](shim.c), and [go.c](go.c) for etcd) that is preloaded into it, and the file that tells
//! the library what to do.

use anyhow::{Context as _, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// No lie at all.
pub(crate) const HONEST: Duration = Duration::from_millis(1);

/// Compiles the library into `dir`.
pub(crate) fn compile(dir: &Path) -> anyhow::Result<PathBuf> {
    let library = dir.join("shim.so");
    let mut command = Command::new("cc");
    // Go calls functions of it where there is no thread of the C library's, and so nothing that a protected stack is compared with.
    command.args(["-shared", "-fPIC", "-pthread", "-O1", "-fno-stack-protector", "-Wall", "-Wextra", "-Werror", "-o"]);
    command.arg(&library).args(["shim.c", "go.c"]);
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults"));
    let output = command.output().context("starting cc (build-essential)")?;
    ensure!(output.status.success(), "the library for faults: {}", String::from_utf8_lossy(&output.stderr));
    Ok(library)
}

/// What one member's library is told; its fields are those of `struct orders` in orders.h, 8 bytes each.
pub(crate) struct Orders {
    file: File,
    pub(crate) path: PathBuf,
}

impl Orders {
    /// All is as it should be.
    pub(crate) fn new(path: PathBuf) -> std::io::Result<Self> {
        let file = File::create(&path)?;
        file.set_len(4096)?;
        Ok(Self { file, path })
    }

    /// Every sync takes longer by this from now on.
    pub(crate) fn slow(&self, by: Duration) -> std::io::Result<()> {
        self.put(0, i64::try_from(by.as_millis()).unwrap_or(i64::MAX))
    }

    /// The clock is wrong by so many seconds from now on.
    pub(crate) fn clock(&self, by: i64) -> std::io::Result<()> {
        self.put(1, by)
    }

    /// From the next start of a `moord` on databases are in memory, and a sync writes them to their place at most once in this time; with
    /// [`HONEST`] each does.
    pub(crate) fn lie(&self, at_most_once_in: Duration) -> std::io::Result<()> {
        self.put(2, i64::try_from(at_most_once_in.as_millis()).unwrap_or(i64::MAX))
    }

    fn put(&self, field: u64, value: i64) -> std::io::Result<()> {
        self.file.write_all_at(&value.to_ne_bytes(), field * 8)
    }
}
