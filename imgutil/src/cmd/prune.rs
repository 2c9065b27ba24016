//! `imgutil prune`.

use super::list::{cache_table, cached, entries_json, table};
use crate::build::cache::{self, DEFAULT_CACHE, Entry};
use crate::exec::{ASK_FOR_THE_END, SignalWatch};
use crate::files::LeftOver;
use crate::generations::{self, Generation};
use crate::progress::bytes_text;
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Generations of an image that are kept when nothing is said.
const KEPT: u32 = 3;

/// Removes old generations from a directory of images, and their signatures. Keys are never removed.
///
/// Of each image (each lineage) the generations with the highest serials are kept. What cannot be read as an image is left alone; what
/// runs that were killed have begun under a hidden name goes.
/// With --cache it removes base trees that `imgutil build` keeps instead: those that were used longest ago, and what builds that were
/// killed have left.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  imgutil prune /srv/images --keep 3 --dry-run\n  imgutil prune --cache --keep 0")]
pub struct Args {
    /// Where the images are.
    #[arg(required_unless_present = "cache")]
    directory: Option<PathBuf>,
    /// Generations of each image that are kept, at least one [default: 3]; base trees in the cache, 0 for none [default: 3].
    #[arg(long)]
    keep: Option<u32>,
    /// Remove base trees from this cache of builds.
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = DEFAULT_CACHE, conflicts_with = "directory")]
    cache: Option<PathBuf>,
    /// Say what would be removed, and remove nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let keep = args.keep.unwrap_or(KEPT) as usize;
    match (&args.cache, &args.directory) {
        (Some(cache), _) => prune_cache(args, cache, keep),
        (None, Some(directory)) => prune_images(args, directory, keep),
        (None, None) => bail!("give the directory of the images"),
    }
}

fn prune_images(args: &Args, directory: &Path, keep: usize) -> Result<ExitCode> {
    if keep == 0 {
        bail!("--keep 0 would remove every generation of every image: keep at least 1, or remove the files themselves");
    }
    let found = generations::find(directory)?;
    generations::warn(&found.unreadable);
    let old = generations::older_than(&found.generations, keep);
    let left = LeftOver::find(directory, |name| name.ends_with(b".moor") || name.ends_with(b".moor.sig"))?;
    if !args.dry_run {
        remove_images(directory, &old)?;
        left.iter().try_for_each(LeftOver::remove)?;
    }
    let bytes: u64 = old.iter().map(|generation| generation.size).sum();
    let left_bytes: u64 = left.iter().map(|left| left.bytes).sum();
    if args.json {
        let mut removed = json(args, &serde_json::to_value(&old)?, bytes + left_bytes);
        removed["left_over"] = left.iter().map(|left| left.path.to_string_lossy()).collect();
        println!("{}", serde_json::to_string_pretty(&removed)?);
        return Ok(ExitCode::SUCCESS);
    }
    if !old.is_empty() {
        print!("{}", table(&old));
    }
    println!("{} {} of {} images, {}", verb(args), old.len(), found.generations.len(), bytes_text(bytes));
    if !left.is_empty() {
        let files = if left.len() == 1 { "file" } else { "files" };
        println!("{} {} {files} that killed runs have left, {}", verb(args), left.len(), bytes_text(left_bytes));
    }
    Ok(ExitCode::SUCCESS)
}

/// A signal waits until an image and its signatures are gone: a signature that is left alone is not seen by anybody.
fn remove_images(directory: &Path, old: &[Generation]) -> Result<()> {
    let signals = SignalWatch::start(&ASK_FOR_THE_END)?;
    for (count, generation) in old.iter().enumerate() {
        if let Some(signal) = signals.take().first() {
            bail!("interrupted by {signal}: {count} of {} images were removed, each with its signatures", old.len());
        }
        generations::remove(directory, generation)?;
    }
    Ok(())
}

fn prune_cache(args: &Args, directory: &Path, keep: usize) -> Result<ExitCode> {
    let entries = cached(directory)?;
    // Held to the end: nobody begins to write what counts as not finished here.
    let unfinished = cache::unfinished(directory)
        .with_context(|| format!("cannot look for unfinished base trees in '{}'", directory.display()))?;
    let old: Vec<Entry> = entries.iter().skip(keep).chain(&unfinished.entries).cloned().collect();
    let bytes: u64 = old.iter().map(|entry| entry.bytes).sum();
    if !args.dry_run {
        for entry in &old {
            cache::remove(entry).with_context(|| format!("cannot remove '{}'", entry.path.display()))?;
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&json(args, &entries_json(&old).into(), bytes))?);
        return Ok(ExitCode::SUCCESS);
    }
    if !old.is_empty() {
        print!("{}", cache_table(&old));
    }
    let count = entries.len() + unfinished.entries.len();
    println!("{} {} of {count} base trees, {}", verb(args), old.len(), bytes_text(bytes));
    Ok(ExitCode::SUCCESS)
}

fn json(args: &Args, removed: &serde_json::Value, bytes: u64) -> serde_json::Value {
    serde_json::json!({ "removed": removed, "bytes": bytes, "dry_run": args.dry_run })
}

fn verb(args: &Args) -> &'static str {
    if args.dry_run { "would remove" } else { "removed" }
}
