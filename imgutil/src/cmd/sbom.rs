//! `imgutil sbom`.

use super::printable;
use crate::files::write_whole;
use crate::sbom;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;

/// Lists the packages of an image or a tree as SPDX 2.3 in JSON, for scanners of vulnerabilities and licences.
///
/// Of each package: version, supplier, package URL, source, and its licence where the package says it in words that are known
/// (otherwise NOASSERTION).
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: imgutil sbom node.moor --key-file node.key -o node.spdx.json")]
pub struct Args {
    /// An image, or the directory of a tree.
    what: PathBuf,
    /// The image's key.
    #[arg(long, value_name = "KEY")]
    key_file: Option<PathBuf>,
    /// Where the list goes; standard output by default.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let document = if args.what.is_dir() {
        sbom::of_tree(&args.what)?
    } else {
        sbom::of_image(&args.what, args.key_file.as_slice())?
    };
    // The first is the image itself.
    if document["packages"].as_array().is_none_or(|packages| packages.len() < 2) {
        eprintln!(
            "imgutil: warning: '{}' has no packages that dpkg or rpm knows of: what is in it is not in the list",
            printable(&args.what.display().to_string())
        );
    }
    let text = serde_json::to_string_pretty(&document)? + "\n";
    match &args.output {
        Some(path) => write_whole(path, 0o644, text.as_bytes())?,
        None => print!("{text}"),
    }
    Ok(ExitCode::SUCCESS)
}
