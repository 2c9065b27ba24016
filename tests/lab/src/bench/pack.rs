//! Table *pack*: `imgutil pack` beside `mksquashfs`, the same tree, level, block size and processors. Ours also encrypts, hashes,
//! syncs, and reads back what it wrote.

use super::{Bar, Lab, PAIRS, Paired, Row, Table, Usage, measure, pairs};
use crate::process::{run, text, tied};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// zstd levels that are compared: the default, and that of releases.
const LEVELS: [u32; 2] = [9, 15];
/// The level that takes the most memory; measured once, and ours alone: the bar is of memory.
const HIGHEST: u32 = 22;
/// Bytes of files the tree has at least.
const TREE: u64 = 1 << 30;
/// Where the tree's files come from, in this order, until there are enough.
const SOURCES: [&str; 4] = ["/usr/lib", "/usr/bin", "/usr/share", "/usr/include"];

const MIB: f64 = 1_048_576.0;

pub(super) fn table(lab: &Lab<'_>) -> anyhow::Result<Table> {
    let (tree, size, entries) = tree(lab)?;
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut table = Table::new("pack");
    let version = text(tied("mksquashfs").arg("-version")).unwrap_or_default();
    table.facts.push(format!("tree: {:.2} GiB of files, {entries} entries", size / MIB / 1024.0));
    table.facts.push(format!("peer: {}", version.lines().next().unwrap_or("mksquashfs of an unknown version")));
    table.facts.push(format!("zstd, blocks of 128 KiB, {processors} processors; ours is sealed, synced and read back"));

    for level in LEVELS {
        lab.say(&format!("pack: level {level}, {PAIRS} pairs"));
        let both = pairs(PAIRS, || ours(lab, &tree, level), || peer(lab, &tree, level, processors))?;
        let name = |what: &str| format!("level {level}: {what}");
        let figures = |figure: fn(&Usage) -> f64| Paired::of(&both, figure);
        table.rows.push(Row::paired(&name("wall"), "s", "mksquashfs", &figures(|u| u.wall), Bar::AtMost(1.05)));
        table.rows.push(Row::paired(&name("CPU"), "s", "mksquashfs", &figures(|u| u.cpu), Bar::None));
        table.rows.push(Row::paired(&name("peak memory"), "MB", "mksquashfs", &figures(megabytes), Bar::None));
        let peak = both.0.iter().map(megabytes).fold(0.0, f64::max);
        table.rows.push(Row::alone(&name("peak memory, largest"), "MB", peak, Bar::AtMost(150.0)));
    }
    lab.say(&format!("pack: level {HIGHEST} once, for its memory"));
    let peak = megabytes(&ours(lab, &tree, HIGHEST)?);
    table.rows.push(Row::alone(&format!("level {HIGHEST}: peak memory"), "MB", peak, Bar::AtMost(150.0)));
    Ok(table)
}

#[allow(clippy::cast_precision_loss)] // far below 2^52 bytes
fn megabytes(usage: &Usage) -> f64 {
    usage.peak as f64 / 1e6
}

fn ours(lab: &Lab<'_>, tree: &Path, level: u32) -> anyhow::Result<Usage> {
    let (image, key) = (lab.dir.join("ours.moor"), lab.dir.join("ours.key"));
    let mut command = Command::new(lab.bins.path("imgutil"));
    command.arg("pack").arg(tree).arg("-o").arg(&image).arg("--key-file").arg(&key);
    // The files come from this machine without the lists of its packages, so that a test's key in them counts as a private one.
    // It is still looked for, and that is in the time.
    command.args(["--level", &level.to_string(), "--allow-key", "**"]);
    let usage = measure(&command)?;
    std::fs::remove_file(&image).and_then(|()| std::fs::remove_file(&key)).context("removing the image")?;
    Ok(usage)
}

fn peer(lab: &Lab<'_>, tree: &Path, level: u32, processors: usize) -> anyhow::Result<Usage> {
    let image = lab.dir.join("peer.squashfs");
    let mut command = Command::new("mksquashfs");
    command.arg(tree).arg(&image).args(["-no-progress", "-noappend", "-comp", "zstd", "-b", "128K"]);
    command.args(["-Xcompression-level", &level.to_string(), "-processors", &processors.to_string()]);
    let usage = measure(&command)?;
    std::fs::remove_file(&image).context("removing the peer's image")?;
    Ok(usage)
}

/// A tree of real programs, libraries and texts, copied once from this machine.
fn tree(lab: &Lab<'_>) -> anyhow::Result<(PathBuf, f64, usize)> {
    let tree = lab.cache.join("pack-tree");
    if !tree.exists() {
        lab.say("pack: copying files of this machine for the tree");
        let new = lab.cache.join("pack-tree.new");
        if new.exists() {
            std::fs::remove_dir_all(&new).context("removing a half-made tree")?;
        }
        std::fs::create_dir_all(&new).with_context(|| format!("making '{}'", new.display()))?;
        for source in SOURCES {
            if size_of(&new)?.0 >= TREE {
                break;
            }
            run(tied("cp").args(["-a", "--parents", source]).arg(&new)).context("copying the tree's files")?;
        }
        std::fs::rename(&new, &tree).context("naming the tree")?;
    }
    let (bytes, entries) = size_of(&tree)?;
    anyhow::ensure!(bytes >= TREE, "this machine's {} hold less than 1 GiB of files", SOURCES.join(", "));
    #[allow(clippy::cast_precision_loss)] // far below 2^52 bytes
    Ok((tree, bytes as f64, entries))
}

/// Bytes of regular files, and entries.
fn size_of(dir: &Path) -> anyhow::Result<(u64, usize)> {
    let (mut bytes, mut entries) = (0, 0);
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("reading '{}'", dir.display()))? {
            let entry = entry?;
            let meta = entry.metadata()?;
            entries += 1;
            if meta.is_dir() {
                open.push(entry.path());
            } else if meta.is_file() {
                bytes += meta.len();
            }
        }
    }
    Ok((bytes, entries))
}
