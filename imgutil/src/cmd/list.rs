//! `imgutil list`.

use crate::generations::{self, Generation};
use crate::progress::bytes_text;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// Lists the images in a directory: generations of one image together, the newest last.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: imgutil list /srv/images")]
pub struct Args {
    /// Where the images are.
    #[arg(default_value = ".")]
    directory: PathBuf,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let found = generations::find(&args.directory)?;
    generations::warn(&found.unreadable);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found.generations)?);
        return Ok(ExitCode::SUCCESS);
    }
    print!("{}", table(&found.generations));
    Ok(ExitCode::SUCCESS)
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
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}
