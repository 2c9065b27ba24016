//! `imgutil inspect`.

use crate::inspect::Inspection;
use crate::key_file;
use crate::pack::signature_path;
use anyhow::{Context as _, Result};
use moor_image::{Image, OpenOptions, SignatureFile, read_header};
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;

/// Shows what an image is. Without its key: the header; with it: also name, system and packages.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: imgutil inspect node.moor --key-file node.key --json")]
pub struct Args {
    /// The image.
    #[arg(value_name = "FILE.moor")]
    image: PathBuf,
    /// The image's key; `-` is standard input.
    #[arg(long, value_name = "KEY")]
    key_file: Option<PathBuf>,
    /// Print JSON for programs, with the list of packages.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let context = || format!("cannot read image '{}'", args.image.display());
    let key = args.key_file.as_deref().map(key_file::read).transpose()?;
    let file = File::open(&args.image).with_context(context)?;
    let header = read_header(&file).with_context(context)?;
    let metadata = if key.is_some() || !header.encrypted {
        let image = Image::open(file, &OpenOptions { key, ..OpenOptions::default() }).with_context(context)?;
        Some(image.metadata().with_context(context)?)
    } else {
        None
    };
    let signed_by = match std::fs::read(signature_path(&args.image)) {
        Ok(bytes) => {
            let file = SignatureFile::parse(&bytes)
                .with_context(|| format!("in '{}'", signature_path(&args.image).display()))?;
            file.key_ids().map(str::to_owned).collect()
        }
        Err(_) => Vec::new(),
    };
    let inspection = Inspection::new(&header, signed_by, metadata);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&inspection)?);
    } else {
        print!("{}", inspection.text());
    }
    Ok(ExitCode::SUCCESS)
}
