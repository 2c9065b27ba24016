//! `imgutil capture`.

use crate::capture::{self, Captured, Options};
use crate::cmd::printable;
use crate::progress::bytes_text;
use crate::scrub;
use anyhow::Result;
use moor_api::ids::ImageName;
use std::path::PathBuf;
use std::process::ExitCode;

/// Makes a sealed image of a node's own disks, over ssh: each file system a part, with the layout of its disks in the metadata.
///
/// Nothing is installed or written on the node; it needs ssh as root, sh, lsblk, findmnt and GNU tar. What arrives is compressed and
/// sealed at once, without a plaintext file, and the key stays here. Secrets, logs, caches and what belongs to one machine are left out,
/// on whatever file system they lie. Files that change meanwhile are captured as they were read: stop what writes much.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: imgutil capture n17.cluster -o n17.moor --key-file n17.key")]
pub struct Args {
    /// The node, as ssh knows it.
    node: String,
    /// Where the image goes; an old one of this name is replaced.
    #[arg(short, long, value_name = "FILE.moor")]
    output: PathBuf,
    /// Where the image's new key goes (mode 0600); it must not exist yet.
    #[arg(long, value_name = "KEY")]
    key_file: PathBuf,
    /// The system to capture, where it is mounted on the node: another than / on a rescue system.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: String,
    /// Name in the metadata; by default the node's.
    #[arg(long)]
    name: Option<ImageName>,
    /// zstd level: 9 is the measured knee.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=22))]
    level: u32,
    /// Leave out what matches a pattern of this file, besides what is always left out.
    #[arg(long, value_name = "FILE")]
    exclude: Vec<PathBuf>,
    /// In the place of ~/.ssh/config.
    #[arg(long, value_name = "FILE")]
    ssh_config: Option<PathBuf>,
}

/// Runs it.
pub fn run(args: Args) -> Result<ExitCode> {
    let mut exclude = Vec::new();
    for file in &args.exclude {
        exclude.extend(scrub::read_patterns(file)?);
    }
    let name = match args.name {
        Some(name) => name.to_string(),
        None => args
            .node
            .rsplit('@')
            .next()
            .unwrap_or_default()
            .parse::<ImageName>()
            .map_or("captured".into(), |name| name.to_string()),
    };
    let options = Options {
        node: args.node,
        ssh_config: args.ssh_config,
        root: args.root,
        name,
        image: args.output,
        key_file: args.key_file,
        level: args.level,
        exclude,
    };
    summary(&options, &capture::capture(&options)?);
    Ok(ExitCode::SUCCESS)
}

fn summary(options: &Options, captured: &Captured) {
    for note in &captured.notes {
        eprintln!("imgutil: warning: {}", printable(note));
    }
    let left_out = captured.left_out.summary();
    if !left_out.is_empty() {
        eprintln!("imgutil: left out: {left_out}");
    }
    let filesystems: Vec<String> =
        captured.filesystems.iter().map(|(place, inodes)| format!("{} ({inodes} inodes)", printable(place))).collect();
    println!(
        "{}: digest {}, {}: {}",
        options.image.display(),
        hex::encode(captured.sealed.digest),
        bytes_text(captured.sealed.size),
        filesystems.join(", ")
    );
}
