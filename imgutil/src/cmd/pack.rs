//! `imgutil pack`.

use crate::cmd::printable;
use crate::pack::{Destination, PackOptions, Packed, Server, Warnings, pack_to_files, pack_to_server};
use crate::progress::{Progress, bytes_text};
use anyhow::{Context as _, Result, bail};
use moor_api::ids::ImageName;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use uuid::Uuid;

/// Packs a root tree into a sealed image: compressed, encrypted with a new key, authenticated.
///
/// With -o the image and its key become files. With PROFILE they go to the server as the next generation of the image of that
/// name. What other file systems are mounted in the tree hold (/proc, /sys, /dev, /run, /tmp of a running system) is left out.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["output", "profile"]))]
pub struct Args {
    /// The root tree.
    tree: PathBuf,
    /// Name of the image on the server, instead of -o.
    profile: Option<ImageName>,
    /// Where the image goes; an old one of this name is replaced.
    #[arg(short, long, value_name = "FILE.moor")]
    output: Option<PathBuf>,
    /// Where the image's new key goes (mode 0600); it must not exist yet.
    #[arg(long, value_name = "KEY", required_unless_present_any = ["plain", "profile"], conflicts_with_all = ["plain", "profile"])]
    key_file: Option<PathBuf>,
    /// zstd level: 9 is the measured knee, 15 is for releases.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=22))]
    level: u32,
    /// Do not encrypt: hashes still protect it, a server gives it to enrolled nodes only.
    #[arg(long)]
    plain: bool,
    /// Sign with this OpenSSH Ed25519 private key; the signature goes to FILE.moor.sig.
    #[arg(long, value_name = "FILE", conflicts_with = "profile")]
    sign_key: Option<PathBuf>,
    /// Also copy the newest kernel and its initramfs to DIR/vmlinuz and DIR/initrd.img.
    #[arg(long, value_name = "DIR", conflicts_with = "profile")]
    boot_dir: Option<PathBuf>,
    /// Lineage of the image, as `imgutil inspect` shows it; a new one by default.
    #[arg(long, requires = "serial", conflicts_with = "profile")]
    lineage: Option<Uuid>,
    /// Serial in the lineage: greater than that of every earlier generation.
    #[arg(long, requires = "lineage")]
    serial: Option<u64>,
    /// Name in the metadata; by default that of the file.
    #[arg(long, conflicts_with = "profile")]
    name: Option<ImageName>,
    #[command(flatten)]
    server: Server,
}

/// Runs it.
pub fn run(args: Args) -> Result<ExitCode> {
    if let Some(profile) = &args.profile {
        let (packed, view) = pack_to_server(&args.tree, profile, !args.plain, args.level, &args.server)?;
        warn(&packed.warnings);
        println!("{}: serial {}, digest {}, {}", view.name, view.serial, view.digest, bytes_text(view.size));
        return Ok(ExitCode::SUCCESS);
    }
    let image = args.output.as_deref().context("name the image's file with -o, or a profile")?;
    let options = PackOptions {
        name: match args.name {
            Some(name) => name.to_string(),
            None => name_of(image)?,
        },
        lineage: args.lineage.unwrap_or_else(Uuid::new_v4),
        serial: args.serial.unwrap_or(1),
        level: args.level,
    };
    let destination = Destination {
        image,
        key_file: args.key_file.as_deref(),
        sign_key: args.sign_key.as_deref(),
        boot_dir: args.boot_dir.as_deref(),
    };
    let progress = Progress::new("packing");
    let packed = pack_to_files(&args.tree, &destination, &options, &progress)?;
    progress.finish("packed");
    warn(&packed.warnings);
    summary(image, &packed, &options);
    Ok(ExitCode::SUCCESS)
}

fn summary(image: &Path, packed: &Packed, options: &PackOptions) {
    println!(
        "{}: digest {}, {} ({} in {} inodes), lineage {}, serial {}",
        image.display(),
        hex::encode(packed.sealed.digest),
        bytes_text(packed.sealed.size),
        bytes_text(packed.file_bytes),
        packed.inodes,
        options.lineage,
        options.serial
    );
}

/// The file's name without its ending, if that is a name.
fn name_of(image: &Path) -> Result<String> {
    let stem = image.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    match stem.parse::<ImageName>() {
        Ok(name) => Ok(name.to_string()),
        Err(error) => bail!("{error}: give the image a name with --name"),
    }
}

/// Says on standard error what the image lacks.
fn warn(warnings: &Warnings) {
    let list = |what: &str, paths: &[PathBuf]| {
        if !paths.is_empty() {
            let paths: Vec<String> = paths.iter().map(|path| printable(&path.display().to_string())).collect();
            eprintln!("imgutil: warning: {what}: {}", paths.join(" "));
        }
    };
    list("left out POSIX ACLs, which a squashfs cannot hold", &warnings.acls);
    list("left out what other file systems hold (the mount points are kept, empty)", &warnings.mounts);
    list("moved times before 1970 or after 2106 to the nearest time a squashfs can hold", &warnings.times);
    for (path, name) in &warnings.xattrs {
        let (name, path) = (printable(name), printable(&path.display().to_string()));
        eprintln!("imgutil: warning: left out the attribute {name}, which a squashfs cannot hold: {path}");
    }
}
