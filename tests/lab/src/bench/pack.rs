//! Tables *pack* and *pack-15*: `imgutil pack` beside `mksquashfs`, the same tree, level, block size and processors. Ours also encrypts,
//! hashes, syncs, and reads back what it wrote. Table *memory*: what `imgutil pack` takes at the levels, block sizes and numbers of
//! processors that take the most.

use super::{Bar, Lab, PAIRS, Paired, Row, Table, Usage, measure, pairs};
use crate::process::{run, text, tied};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Most memory, in MB.
const MEMORY: f64 = 150.0;
/// How often a slow level is compared.
const SLOW_PAIRS: usize = 3;
/// Bytes of files the tree has at least.
const TREE: u64 = 1 << 30;
/// The same of a tree for what is slow: enough to fill every queue.
const PART: u64 = 128 << 20;
/// Where the tree's files come from, in this order, until there are enough.
const SOURCES: [&str; 5] = ["/usr/share", "/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/include", "/usr/lib"];

const MIB: f64 = 1_048_576.0;

/// The default level.
pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    compared(lab, "pack", 9, PAIRS)
}

/// The level of releases.
pub(super) fn releases(lab: &Lab<'_>) -> anyhow::Result<Table> {
    compared(lab, "pack-15", 15, SLOW_PAIRS)
}

fn compared(lab: &Lab<'_>, name: &str, level: u32, count: usize) -> anyhow::Result<Table> {
    let tree = Tree::made(lab, "pack-tree", TREE)?;
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut table = Table::new(name);
    let version = text(tied("mksquashfs").arg("-version")).unwrap_or_default();
    table.facts.push(tree.fact());
    table.facts.push(format!("peer: {}", version.lines().next().unwrap_or("mksquashfs of an unknown version")));
    table.facts.push(format!(
        "zstd level {level}, blocks of 128 KiB, {processors} processors, {count} pairs; ours is sealed, synced and read back"
    ));
    lab.say(&format!("{name}: level {level}, {count} pairs"));
    let options = ["--level".to_owned(), level.to_string()];
    let both = pairs(count, || ours(lab, &tree.path, &options), || peer(lab, &tree.path, level, processors))?;
    let figures = |figure: fn(&Run) -> f64| Paired::of(&both, figure);
    let on_disk = |run: &Run| run.usage.wall + run.sync;
    table.rows.push(Row::paired(
        "wall, image on disk",
        "s",
        "mksquashfs and a sync",
        &figures(on_disk),
        Bar::AtMost(1.05),
    ));
    table.rows.push(Row::paired(
        "wall",
        "s",
        "mksquashfs, not synced",
        &figures(|run| run.usage.wall),
        Bar::AtMost(1.05),
    ));
    table.rows.push(Row::paired("CPU", "s", "mksquashfs", &figures(|run| run.usage.cpu), Bar::None));
    table.rows.push(Row::paired("peak memory", "MB", "mksquashfs", &figures(|run| megabytes(&run.usage)), Bar::None));
    let peak = both.0.iter().map(|run| megabytes(&run.usage)).fold(0.0, f64::max);
    table.rows.push(Row::alone("peak memory, largest", "MB", peak, Bar::AtMost(MEMORY)));
    Ok(table)
}

/// What takes the most memory, ours alone: the bar is of memory, not of time.
pub(super) fn memory(lab: &Lab<'_>) -> anyhow::Result<Table> {
    let mut table = Table::new("memory");
    let (whole, part) = (Tree::made(lab, "pack-tree", TREE)?, Tree::made(lab, "memory-tree", PART)?);
    table.facts.push(format!("whole {}; part: {}", whole.fact(), part.fact()));
    // As many threads as `imgutil pack` takes at most, and more than any machine's memory bandwidth is good for.
    for (tree, name, words) in [
        (&whole, "whole", "--level 1"),
        (&whole, "whole", "--level 9 --processors 256"),
        (&part, "part", "--level 1 --processors 256 --block-size 1M"),
        (&part, "part", "--level 9 --processors 256 --block-size 1M"),
        (&part, "part", "--level 9 --processors 256 --block-size 4K"),
        (&part, "part", "--level 22"),
        (&part, "part", "--level 22 --processors 1"),
        (&part, "part", "--level 22 --processors 64"),
        (&part, "part", "--level 22 --processors 256 --block-size 1M"),
        (&part, "part", "--xz --processors 64"),
        (&part, "part", "--xz --processors 256 --block-size 1M"),
    ] {
        lab.say(&format!("memory: {name}, {words}"));
        let options: Vec<String> = words.split(' ').map(str::to_owned).collect();
        let peak = megabytes(&ours(lab, &tree.path, &options)?.usage);
        table.rows.push(Row::alone(&format!("{name}: {words}"), "MB", peak, Bar::AtMost(MEMORY)));
    }
    Ok(table)
}

#[allow(clippy::cast_precision_loss)] // far below 2^52 bytes
fn megabytes(usage: &Usage) -> f64 {
    usage.peak as f64 / 1e6
}

/// One image made.
struct Run {
    usage: Usage,
    /// Seconds until its file was on the disk, where the program leaves that to others.
    sync: f64,
}

fn ours(lab: &Lab<'_>, tree: &Path, options: &[String]) -> anyhow::Result<Run> {
    let (image, key) = (lab.dir.join("ours.moor"), lab.dir.join("ours.key"));
    let mut command = Command::new(lab.bins.path("imgutil"));
    command.arg("pack").arg(tree).arg("-o").arg(&image).arg("--key-file").arg(&key);
    // The files come from this machine without the lists of its packages, so that a test's key in them counts as a private one.
    // It is still looked for, and that is in the time.
    command.args(options).args(["--allow-key", "**"]);
    let usage = measure(&command)?;
    std::fs::remove_file(&image).and_then(|()| std::fs::remove_file(&key)).context("removing the image")?;
    Ok(Run { usage, sync: 0.0 })
}

fn peer(lab: &Lab<'_>, tree: &Path, level: u32, processors: usize) -> anyhow::Result<Run> {
    let image = lab.dir.join("peer.squashfs");
    let mut command = Command::new("mksquashfs");
    command.arg(tree).arg(&image).args(["-no-progress", "-noappend", "-comp", "zstd", "-b", "128K"]);
    command.args(["-Xcompression-level", &level.to_string(), "-processors", &processors.to_string()]);
    let usage = measure(&command)?;
    let begin = Instant::now();
    std::fs::File::open(&image).and_then(|file| file.sync_all()).context("syncing the peer's image")?;
    let sync = begin.elapsed().as_secs_f64();
    std::fs::remove_file(&image).context("removing the peer's image")?;
    Ok(Run { usage, sync })
}

/// A tree of real programs, libraries and texts.
struct Tree {
    path: PathBuf,
    bytes: u64,
    entries: usize,
}

impl Tree {
    /// Copied once from this machine: folders of the sources, until there are `least` bytes of files.
    fn made(lab: &Lab<'_>, name: &str, least: u64) -> anyhow::Result<Self> {
        let path = lab.cache.join(name);
        if !path.exists() {
            lab.say(&format!("{name}: copying files of this machine"));
            let new = path.with_extension("new");
            if new.exists() {
                std::fs::remove_dir_all(&new).context("removing a half-made tree")?;
            }
            std::fs::create_dir_all(&new).with_context(|| format!("making '{}'", new.display()))?;
            copy(&new, least)?;
            std::fs::rename(&new, &path).context("naming the tree")?;
        }
        let (bytes, entries) = size_of(&path)?;
        anyhow::ensure!(bytes >= least, "this machine's {} hold less than {least} bytes", SOURCES.join(", "));
        Ok(Self { path, bytes, entries })
    }

    #[allow(clippy::cast_precision_loss)] // far below 2^52 bytes
    fn fact(&self) -> String {
        format!("tree: {:.2} GiB of files, {} entries", self.bytes as f64 / MIB / 1024.0, self.entries)
    }
}

fn copy(to: &Path, least: u64) -> anyhow::Result<()> {
    let mut copied = 0;
    for source in SOURCES.into_iter().filter(|source| Path::new(source).is_dir()) {
        let mut names: Vec<PathBuf> = std::fs::read_dir(source)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .with_context(|| format!("listing '{source}'"))?;
        names.sort();
        let place = to.join(source.trim_start_matches('/'));
        std::fs::create_dir_all(&place).with_context(|| format!("making '{}'", place.display()))?;
        for name in names {
            if copied >= least {
                return Ok(());
            }
            copied += size_of(&name)?.0;
            run(tied("cp").arg("-a").arg(name).arg(&place)).context("copying the tree's files")?;
        }
    }
    Ok(())
}

/// Bytes of the regular files below a path, and entries.
fn size_of(path: &Path) -> anyhow::Result<(u64, usize)> {
    let (mut bytes, mut entries) = (0, 0);
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        let context = || format!("reading '{}'", path.display());
        let meta = path.symlink_metadata().with_context(context)?;
        entries += 1;
        if meta.is_file() {
            bytes += meta.len();
        } else if meta.is_dir() {
            for entry in path.read_dir().with_context(context)? {
                open.push(entry.with_context(context)?.path());
            }
        }
    }
    Ok((bytes, entries))
}
