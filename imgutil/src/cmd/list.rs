//! `imgutil list`.

use crate::build::cache::{self, DEFAULT_CACHE, Entry};
use crate::generations::{self, Generation};
use crate::progress::bytes_text;
use anyhow::{Context as _, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Lists the images in a directory: generations of one image together, the newest last.
///
/// With --cache it lists the base trees that `imgutil build` keeps instead, the one used last first.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  imgutil list /srv/images\n  imgutil list --cache")]
pub struct Args {
    /// Where the images are.
    #[arg(default_value = ".")]
    directory: PathBuf,
    /// List the base trees in this cache of builds.
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = DEFAULT_CACHE, conflicts_with = "directory")]
    cache: Option<PathBuf>,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(cache) = &args.cache {
        let entries = cached(cache)?;
        if args.json {
            println!("{}", serde_json::to_string_pretty(&entries_json(&entries))?);
        } else {
            print!("{}", cache_table(&entries));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let found = generations::find(&args.directory)?;
    generations::warn(&found.unreadable);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found.generations)?);
        return Ok(ExitCode::SUCCESS);
    }
    print!("{}", table(&found.generations));
    Ok(ExitCode::SUCCESS)
}

/// The entries of a cache; a directory that is none has none.
pub(super) fn cached(directory: &Path) -> Result<Vec<Entry>> {
    cache::entries(directory).with_context(|| format!("cannot list the cache '{}'", directory.display()))
}

/// Entries of a cache for programs.
pub(super) fn entries_json(entries: &[Entry]) -> Vec<serde_json::Value> {
    let json = |entry: &Entry| {
        serde_json::json!({
            "file": entry.path.to_string_lossy(),
            "what": entry.what,
            "bytes": entry.bytes,
            "last_used": time_text(entry.last_used),
        })
    };
    entries.iter().map(json).collect()
}

/// Entries of a cache, one line for each.
pub(super) fn cache_table(entries: &[Entry]) -> String {
    let mut rows = vec![["LAST USED", "SIZE", "WHAT", "FILE"].map(str::to_owned)];
    for entry in entries {
        // The whole digest tells no person more than its beginning.
        let file = entry.path.file_name().unwrap_or_default().to_string_lossy();
        let file = file.chars().take(12).collect::<String>();
        let what = super::printable(&entry.what);
        rows.push([time_text(entry.last_used), bytes_text(entry.bytes), what, file]);
    }
    columns(&rows)
}

/// RFC 3339, in whole seconds.
fn time_text(time: SystemTime) -> String {
    OffsetDateTime::from(time)
        .replace_nanosecond(0)
        .ok()
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_default()
}

/// One line for each, in columns.
pub(super) fn table(generations: &[Generation]) -> String {
    let mut rows = vec![["FILE", "SERIAL", "CREATED", "SIZE", "SEALED", "SIGNED", "LINEAGE"].map(str::to_owned)];
    for generation in generations {
        rows.push([
            super::printable(&generation.file.display().to_string()),
            generation.serial.to_string(),
            generation.created.clone(),
            bytes_text(generation.size),
            if generation.encrypted { "yes" } else { "no" }.to_owned(),
            if generation.signed { "yes" } else { "no" }.to_owned(),
            generation.lineage.to_string(),
        ]);
    }
    columns(&rows)
}

/// Rows as lines whose cells stand below each other.
fn columns<const COUNT: usize>(rows: &[[String; COUNT]]) -> String {
    let mut widths = [0; COUNT];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}
