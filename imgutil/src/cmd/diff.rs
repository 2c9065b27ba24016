//! `imgutil diff`.

use crate::cmd::error_line;
use crate::diff::{Difference, Side};
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// Shows what differs between two images, or an image and a tree. Exit status: 0 nothing, 1 something, 2 could not look.
///
/// Packages that were added, removed or changed in version; files that were added, removed or changed, with sizes, modes and owners;
/// and the totals. A is what was, B what is.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: imgutil diff old.moor new.moor --key-file old.key --key-file new.key")]
pub struct Args {
    /// An image, or the directory of a tree.
    a: PathBuf,
    /// An image, or the directory of a tree.
    b: PathBuf,
    /// The images' keys, in any order; each image finds its own.
    #[arg(long, value_name = "KEY")]
    key_file: Vec<PathBuf>,
    /// See trees as `imgutil pack` does: without host keys, logs, caches and what else it leaves out.
    #[arg(long)]
    scrub: bool,
    /// Times of files count too.
    #[arg(long)]
    times: bool,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

/// Runs it.
#[must_use]
pub fn run(args: &Args) -> ExitCode {
    match compare(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("imgutil: error: {}", error_line(&error));
            ExitCode::from(2)
        }
    }
}

fn compare(args: &Args) -> Result<bool> {
    let mut a = Side::open(&args.a, &args.key_file, args.scrub)?;
    let mut b = Side::open(&args.b, &args.key_file, args.scrub)?;
    let difference = Difference::between(&mut a, &mut b, args.times)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&difference)?);
    } else {
        print!("{}", difference.text());
    }
    Ok(difference.is_empty())
}
