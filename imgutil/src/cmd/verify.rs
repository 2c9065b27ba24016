//! `imgutil verify`.

use crate::cmd::error_line;
use crate::key_file;
use crate::pack::signature_path;
use crate::progress::Progress;
use anyhow::{Context as _, Result};
use moor_image::{OpenOptions, PublicKey, Report, verify_file};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Checks every byte of an image. Exit status: 0 good, 1 bad, 2 could not look.
///
/// Without the key (`--public`) the hashes of all parts and the signatures are checked; with it also that they were made by who
/// holds the key, and that everything decrypts. Each damaged part is named with its byte range.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgutil verify node.moor --key-file node.key\n  imgutil verify node.moor --public --trust builder.pub"
)]
pub struct Args {
    /// The image.
    #[arg(value_name = "FILE.moor")]
    image: PathBuf,
    /// The image's key; `-` is standard input.
    #[arg(long, value_name = "KEY", conflicts_with = "public")]
    key_file: Option<PathBuf>,
    /// Check what can be checked without the key (also what happens without --key-file).
    #[arg(long)]
    public: bool,
    /// Require a signature (FILE.moor.sig) by one of these keys: a file of ssh-ed25519 lines, or one such line.
    #[arg(long, value_name = "PUBKEY")]
    trust: Vec<String>,
}

/// Runs it.
pub fn run(args: &Args) -> Result<ExitCode> {
    match look(args) {
        Ok(report) => {
            let name = args.image.display();
            for problem in &report.problems {
                println!("{name}: bad: {problem}");
            }
            if report.more > 0 {
                println!("{name}: bad: and {} more damaged parts", report.more);
            }
            if !report.is_good() {
                return Ok(ExitCode::FAILURE);
            }
            let digest = report.digest.map(hex::encode).unwrap_or_default();
            let how = if report.with_key { "hashes, key and contents" } else { "hashes (without the key)" };
            let signed = if args.trust.is_empty() { "" } else { ", signed by a trusted key" };
            println!("{name}: good: digest {digest}, {} chunks: {how}{signed}", report.chunks);
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            eprintln!("imgutil: error: {}", error_line(&error));
            Ok(ExitCode::from(2))
        }
    }
}

fn look(args: &Args) -> Result<Report> {
    let context = || format!("cannot look at image '{}'", args.image.display());
    let mut trusted = Vec::new();
    for text in &args.trust {
        trusted.extend(trusted_keys(text)?);
    }
    let key = args.key_file.as_deref().map(key_file::read).transpose()?;
    let file = File::open(&args.image).with_context(context)?;
    let signatures = if trusted.is_empty() { None } else { read_signatures(&signature_path(&args.image))? };
    let options = OpenOptions { key, trusted, signatures, ..OpenOptions::default() };
    let progress = Progress::counting("verifying", "chunks");
    let mut before = 0;
    let report = verify_file(&file, &options, |done, total| {
        progress.total(total);
        progress.advance(done.saturating_sub(before));
        before = done;
    })
    .with_context(context)?;
    progress.finish("verified");
    Ok(report)
}

/// Keys of a file, or of a line that is given itself.
fn trusted_keys(text: &str) -> Result<Vec<PublicKey>> {
    if text.starts_with("ssh-ed25519 ") {
        return Ok(vec![PublicKey::from_openssh(text)?]);
    }
    let lines = std::fs::read_to_string(text).with_context(|| format!("cannot read the trusted keys '{text}'"))?;
    PublicKey::parse_list(&lines).with_context(|| format!("in '{text}'"))
}

/// A missing file is a finding, not an obstacle.
fn read_signatures(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read '{}'", path.display())),
    }
}
