//! `imgutil capture`.

use crate::capture::{Captured, Options, capture_to_files, capture_to_server};
use crate::cmd::{printable, warn_of_unmatched};
use crate::files::clean_up_when_asked_to_end;
use crate::progress::bytes_text;
use crate::scrub;
use crate::upload::{ProfileOptions, Server};
use anyhow::{Context as _, Result};
use moor_api::ids::ImageName;
use std::path::PathBuf;
use std::process::ExitCode;

/// Makes a sealed image of a node's own disks, over ssh: each file system a part, with the layout of its disks in the metadata.
///
/// Nothing is installed or written on the node; it needs ssh as root, sh, lsblk, findmnt and GNU tar. What arrives is compressed and
/// sealed at once, without a plaintext file, and the key stays here. Secrets, logs, caches and what belongs to one machine are left out,
/// on whatever file system they lie; a private key in any other place is an error that names it. Files that change meanwhile are captured as they were read: stop what writes much.
///
/// With -o the image and its key become files. With PROFILE they go to the server as the next generation of the image of that name,
/// together with the kernel and the initramfs that the node has in /boot, and its distribution's signed shim and GRUB.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgutil capture n17.cluster -o n17.moor --key-file n17.key\n  imgutil capture n17.cluster --root /mnt -o n17.moor --key-file n17.key --exclude not-in-image.txt\n  imgutil capture n17.cluster compute -b debian-diskless"
)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["output", "profile"]))]
pub struct Args {
    /// The node, as ssh knows it.
    node: String,
    /// Name of the image on the server, instead of -o.
    profile: Option<ImageName>,
    /// Also make the profile PROFILE for this image and publish it, with the settings and scripts of BASE: a shipped profile, or
    /// another one that is there.
    #[arg(short, long, value_name = "BASE", requires = "profile")]
    base: Option<String>,
    /// Also publish the profile PROFILE, so that nodes get this image at their next boot.
    #[arg(long, requires = "profile")]
    publish: bool,
    /// Where the image goes; an old one of this name is replaced.
    #[arg(short, long, value_name = "FILE.moor", requires = "key_file")]
    output: Option<PathBuf>,
    /// Where the image's new key goes (mode 0600); it must not exist yet.
    #[arg(long, value_name = "KEY", conflicts_with = "profile")]
    key_file: Option<PathBuf>,
    /// The system to capture, where it is mounted on the node: another than / on a rescue system.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: String,
    /// Name in the metadata; by default the node's.
    #[arg(long, conflicts_with = "profile")]
    name: Option<ImageName>,
    /// zstd level: 9 is the measured knee.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=22))]
    level: u32,
    /// Leave out what matches a pattern of this file, besides what is always left out.
    #[arg(long, value_name = "FILE")]
    exclude: Vec<PathBuf>,
    /// Capture this file although it holds a private key; a pattern as in --exclude.
    #[arg(long, value_name = "PATH")]
    allow_key: Vec<String>,
    /// In the place of ~/.ssh/config.
    #[arg(long, value_name = "FILE")]
    ssh_config: Option<PathBuf>,
    #[command(flatten)]
    server: Server,
}

/// Runs it.
pub fn run(args: Args) -> Result<ExitCode> {
    clean_up_when_asked_to_end()?;
    let mut exclude = Vec::new();
    for file in &args.exclude {
        exclude.extend(scrub::read_patterns(file)?);
    }
    let options = Options {
        node: args.node,
        ssh_config: args.ssh_config,
        root: args.root,
        level: args.level,
        exclude,
        allow_keys: args.allow_key.iter().map(|pattern| pattern.as_bytes().to_vec()).collect(),
    };
    if let Some(profile) = &args.profile {
        let of_profile = ProfileOptions { base: args.base, publish: args.publish };
        let (captured, view, published) = capture_to_server(&options, profile, &args.server, &of_profile)?;
        say(&captured);
        println!(
            "{}: serial {}, digest {}, {}: {}",
            view.name,
            view.serial,
            view.digest,
            bytes_text(view.size),
            filesystems(&captured)
        );
        match published {
            Some(profile) => println!("profile {}: @{} published", profile.name, profile.serial),
            None => println!("nodes get it with `moor profile publish {profile}` (or --publish)"),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let image = args.output.as_deref().context("name the image's file with -o, or a profile")?;
    let key_file = args.key_file.as_deref().context("name the key's file with --key-file")?;
    let name = args.name.map_or_else(|| name_of(&options.node), |name| name.to_string());
    let captured = capture_to_files(&options, name, image, key_file)?;
    say(&captured);
    println!(
        "{}: digest {}, {}: {}",
        image.display(),
        hex::encode(captured.sealed.digest),
        bytes_text(captured.sealed.size),
        filesystems(&captured)
    );
    Ok(ExitCode::SUCCESS)
}

/// The node's name without the user's, if that is one for an image.
fn name_of(node: &str) -> String {
    let name = node.rsplit('@').next().unwrap_or_default().parse::<ImageName>();
    name.map_or_else(|_| "captured".to_owned(), |name| name.to_string())
}

/// Says on standard error what was left out, and what else a reader of the image should know.
fn say(captured: &Captured) {
    for note in &captured.notes {
        eprintln!("imgutil: warning: {}", printable(note));
    }
    let left_out = captured.left_out.summary();
    if !left_out.is_empty() {
        eprintln!("imgutil: left out: {left_out}");
    }
    warn_of_unmatched(&captured.left_out);
}

fn filesystems(captured: &Captured) -> String {
    let each = captured.filesystems.iter().map(|(place, inodes)| format!("{} ({inodes} inodes)", printable(place)));
    each.collect::<Vec<_>>().join(", ")
}
