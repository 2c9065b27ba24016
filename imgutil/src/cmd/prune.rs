//! `imgutil prune`.

use super::list::table;
use crate::generations;
use crate::progress::bytes_text;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// Removes old generations from a directory of images, and their signatures. Keys are never removed.
///
/// Of each image (each lineage) the generations with the highest serials are kept. What cannot be read as an image is left alone.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: imgutil prune /srv/images --keep 3 --dry-run")]
pub struct Args {
    /// Where the images are.
    directory: PathBuf,
    /// Generations of each image that are kept.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,
    /// Say what would be removed, and remove nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let found = generations::find(&args.directory)?;
    generations::warn(&found.unreadable);
    let old = generations::older_than(&found.generations, args.keep as usize);
    let bytes: u64 = old.iter().map(|generation| generation.size).sum();
    if !args.dry_run {
        for generation in &old {
            generations::remove(&args.directory, generation)?;
        }
    }
    if args.json {
        let removed = serde_json::json!({ "removed": old, "bytes": bytes, "dry_run": args.dry_run });
        println!("{}", serde_json::to_string_pretty(&removed)?);
        return Ok(ExitCode::SUCCESS);
    }
    if !old.is_empty() {
        print!("{}", table(&old));
    }
    let verb = if args.dry_run { "would remove" } else { "removed" };
    println!("{verb} {} of {} images, {}", old.len(), found.generations.len(), bytes_text(bytes));
    Ok(ExitCode::SUCCESS)
}
