//! `imgutil unpack`.

use crate::progress::Progress;
use crate::unpack::unpack_image;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// Restores the root tree of an image: modes, owners, times, extended attributes, hard links, sparse files and devices.
///
/// The tree appears when it is complete. Restoring owners and devices takes root.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: imgutil unpack node.moor ./tree --key-file node.key")]
pub struct Args {
    /// The image.
    #[arg(value_name = "FILE.moor")]
    image: PathBuf,
    /// The directory to make; it must not exist.
    tree: PathBuf,
    /// The image's key; `-` is standard input. A plain image needs none.
    #[arg(long, value_name = "KEY")]
    key_file: Option<PathBuf>,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let progress = Progress::counting("unpacking", "inodes");
    let inodes = unpack_image(&args.image, args.key_file.as_deref(), &args.tree, &progress)?;
    progress.finish("unpacked");
    println!("{}: {inodes} inodes", args.tree.display());
    Ok(ExitCode::SUCCESS)
}
