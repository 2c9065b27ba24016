//! `imgutil pack`.

use crate::cmd::{printable, warn_of_unmatched};
use crate::files::clean_up_when_asked_to_end;
use crate::generations;
use crate::pack::{Destination, Labels, PackOptions, Packed, SquashOptions, Warnings, pack_to_files, pack_to_server};
use crate::progress::{Progress, bytes_text};
use crate::scrub::{self, LeftOut, ViewOptions};
use crate::squashfs::{Compression, MEMORY};
use crate::upload::{ProfileOptions, Server};
use anyhow::{Context as _, Result, bail};
use moor_api::ids::ImageName;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use uuid::Uuid;

/// Packs a root tree into a sealed image: compressed, encrypted with a new key, authenticated.
///
/// With -o the image and its key become files. With PROFILE they go to the server as the next generation of the image of that
/// name. What other file systems are mounted in the tree hold (/proc, /sys, /dev, /run, /tmp of a running system) is left out.
///
/// The tree is not changed, but what does not belong into an image is left out of it: host keys, machine-id, tokens, logs, package
/// caches, histories. A private key in any other place is an error that names it.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgutil pack ./tree -o node.moor --key-file node.key --level 15 --exclude not-in-image.txt\n  imgutil pack ./tree compute -b debian-diskless"
)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["output", "profile"]))]
pub struct Args {
    /// The root tree.
    tree: PathBuf,
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
    #[arg(short, long, value_name = "FILE.moor")]
    output: Option<PathBuf>,
    /// Where the image's new key goes (mode 0600); it must not exist yet.
    #[arg(long, value_name = "KEY", required_unless_present_any = ["plain", "profile"], conflicts_with_all = ["plain", "profile"])]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    squash: Squash,
    /// Do not encrypt: hashes still protect it, a server gives it to enrolled nodes only.
    #[arg(long)]
    plain: bool,
    /// Sign with this OpenSSH Ed25519 private key; the signature goes to FILE.moor.sig.
    #[arg(long, value_name = "FILE", conflicts_with = "profile")]
    sign_key: Option<PathBuf>,
    /// Also copy the newest kernel and its initramfs to DIR/vmlinuz and DIR/initrd.img, and the distribution's signed shim and GRUB
    /// where the tree has them.
    #[arg(long, value_name = "DIR", conflicts_with = "profile")]
    boot_dir: Option<PathBuf>,
    /// Lineage of the image, as `imgutil inspect` shows it. By default that of the image that is replaced, with the next serial; a new one
    /// where there is none.
    #[arg(long, requires = "serial", conflicts_with = "profile")]
    lineage: Option<Uuid>,
    /// Serial in the lineage: greater than that of every earlier generation.
    #[arg(long, requires = "lineage")]
    serial: Option<u64>,
    /// Name in the metadata; by default that of the file.
    #[arg(long, conflicts_with = "profile")]
    name: Option<ImageName>,
    /// Print what was made and every path that was left out as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: Server,
}

/// How the tree becomes a squashfs, and what of it.
#[derive(Debug, clap::Args)]
struct Squash {
    /// zstd level: 9 is the measured knee, 15 is for releases.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=22))]
    level: u32,
    /// Compression; xz is smaller, but nodes read it four times slower.
    #[arg(long, value_enum, default_value_t = Method::Zstd, conflicts_with = "level")]
    compression: Method,
    /// The same as --compression xz.
    #[arg(long, conflicts_with_all = ["compression", "level"])]
    xz: bool,
    /// Bytes in a block, a power of two from 4K to 1M: larger blocks compress better, smaller ones are read faster at random.
    #[arg(long, value_name = "SIZE", default_value = "128K", value_parser = block_size)]
    block_size: u32,
    /// Threads that compress; all processors by default, but no more than --memory is enough for.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    processors: Option<u32>,
    /// Memory that compressing may take, in MiB. At high levels and with large blocks each thread takes up to 20: more memory lets more
    /// of many processors compress.
    #[arg(long, value_name = "MIB", default_value_t = MEMORY >> 20, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    memory: u64,
    /// Leave out what the patterns in FILE match, one a line: `*`, `?` and `[...]` stay within a name, `**` crosses directories, a
    /// leading `/` is the tree's root, a trailing `/` means directories only, `#` begins a comment.
    #[arg(long, value_name = "FILE")]
    exclude: Vec<PathBuf>,
    /// Keep everything: host keys, machine-id, tokens, logs, caches, histories, and private keys.
    #[arg(long)]
    no_scrub: bool,
    /// Pack this file although it holds a private key; a pattern as in --exclude.
    #[arg(long, value_name = "PATH", conflicts_with = "no_scrub")]
    allow_key: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Method {
    Zstd,
    Xz,
}

impl Squash {
    fn options(&self) -> Result<SquashOptions> {
        let default = SquashOptions::default();
        let mut exclude = Vec::new();
        for file in &self.exclude {
            exclude.extend(scrub::read_patterns(file)?);
        }
        let xz = self.xz || self.compression == Method::Xz;
        Ok(SquashOptions {
            compression: if xz { Compression::Xz } else { Compression::Zstd(self.level) },
            block_size: self.block_size,
            processors: self.processors.unwrap_or(default.processors),
            memory: self.memory << 20,
            view: ViewOptions {
                scrub: !self.no_scrub,
                exclude,
                allow_keys: self.allow_key.iter().map(|pattern| pattern.as_bytes().to_vec()).collect(),
            },
        })
    }
}

/// `4096`, `64K`, `1M`.
fn block_size(text: &str) -> Result<u32, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1 << 10),
        None => text.strip_suffix(['m', 'M']).map_or((text, 1), |digits| (digits, 1 << 20)),
    };
    let size = digits.parse::<u32>().ok().and_then(|size| size.checked_mul(unit));
    size.filter(|size| size.is_power_of_two() && (4096..=1 << 20).contains(size))
        .ok_or_else(|| "a power of two from 4K to 1M".to_owned())
}

/// Runs it.
pub fn run(args: Args) -> Result<ExitCode> {
    clean_up_when_asked_to_end()?;
    let squash = args.squash.options()?;
    if !squash.view.scrub {
        eprintln!(
            "imgutil: warning: --no-scrub: host keys, machine-id, tokens, private keys and logs of the tree go into the image, and to every node"
        );
    }
    if let Some(profile) = &args.profile {
        let options = ProfileOptions { base: args.base, publish: args.publish };
        let (packed, view, published) =
            pack_to_server(&args.tree, profile, !args.plain, squash, &args.server, &options)?;
        warn(&packed.warnings);
        if args.json {
            println!("{}", serde_json::to_string_pretty(&Output::of(&packed))?);
            return Ok(ExitCode::SUCCESS);
        }
        left_out(&packed);
        println!("{}: serial {}, digest {}, {}", view.name, view.serial, view.digest, bytes_text(view.size));
        match published {
            Some(profile) => println!("profile {}: @{} published", profile.name, profile.serial),
            None => println!("nodes get it with `moor profile publish {profile}` (or --publish)"),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let image = args.output.as_deref().context("name the image's file with -o, or a profile")?;
    let (lineage, serial) = match (args.lineage, args.serial) {
        (Some(lineage), Some(serial)) => (lineage, serial),
        _ => generations::next_at(image),
    };
    let options = PackOptions {
        name: match args.name {
            Some(name) => name.to_string(),
            None => name_of(image)?,
        },
        lineage,
        serial,
        squash,
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
    if args.json {
        println!("{}", serde_json::to_string_pretty(&Output::of(&packed))?);
    } else {
        left_out(&packed);
        summary(image, &packed, &options);
    }
    Ok(ExitCode::SUCCESS)
}

/// What `--json` prints.
#[derive(serde::Serialize)]
struct Output<'a> {
    digest: String,
    payload_sha256: String,
    size: u64,
    inodes: u64,
    file_bytes: u64,
    labels: Option<&'a Labels>,
    cannot_boot: Option<&'a str>,
    #[serde(flatten)]
    left_out: &'a LeftOut,
}

impl<'a> Output<'a> {
    fn of(packed: &'a Packed) -> Self {
        Self {
            digest: hex::encode(packed.sealed.digest),
            payload_sha256: hex::encode(packed.sealed.payload_sha256),
            size: packed.sealed.size,
            inodes: packed.inodes,
            file_bytes: packed.file_bytes,
            labels: packed.labels.as_ref(),
            cannot_boot: packed.cannot_boot.as_deref(),
            left_out: &packed.left_out,
        }
    }
}

/// Says on standard error what was left out and set on purpose.
fn left_out(packed: &Packed) {
    if let Some(why) = &packed.cannot_boot {
        eprintln!("imgutil: no node can boot this image: {}", printable(why));
    }
    if packed.boot_loaders == Some(false) {
        eprintln!(
            "imgutil: the tree has no signed shim and GRUB (Debian: shim-signed, grub-efi-amd64-signed): only kernel and initramfs go with the image"
        );
    }
    if let Some(labels) = &packed.labels {
        eprintln!(
            "imgutil: SELinux labels of the tree's policy '{}': {} inodes ({} of which it says nothing)",
            printable(&labels.policy),
            labels.labelled,
            labels.others
        );
    }
    let left_out = &packed.left_out;
    let summary = left_out.summary();
    if !summary.is_empty() {
        eprintln!("imgutil: scrubbed: {summary} (each path: --json; keep all: --no-scrub)");
    }
    warn_of_unmatched(left_out);
    if !left_out.excluded.is_empty() {
        eprintln!("imgutil: excluded {} files and directories", left_out.excluded.len());
    }
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
