//! `capture`: makes an image of a node's own disks, over ssh.
//!
//! [`node`] is the way to the node and runs nothing there but sh, lsblk, findmnt and tar; [`survey`] parses what it says of itself,
//! [`layout`] puts that into the image's metadata; [`stream`] makes a squashfs of a file system's files as they arrive and leaves out what
//! is secret or one machine's, [`guard`] looks for private keys in the rest, [`tree`] holds their names meanwhile. Each file system becomes a part of one sealed image.
//! Nothing is staged: what arrives is compressed and sealed at once, and the key stays here.

mod guard;
mod layout;
mod node;
mod stream;
mod survey;
mod tree;

use crate::boot_files::{self, BootFiles, BootLoaders};
use crate::cmd::is_full_disk;
use crate::files::NewFile;
use crate::generations;
use crate::key_file::NewKeyFile;
use crate::pack;
use crate::progress::Progress;
use crate::scrub::{LeftOut, View, ViewOptions};
use crate::system::System;
use crate::unpack::SquashfsIn;
use crate::upload::{Parcel, ProfileOptions, Server, Upload};
use anyhow::{Context as _, Result, bail};
use guard::Guard;
use layout::Layout;
use moor_api::admin::{ImageView, ProfileView};
use moor_api::ids::ImageName;
use moor_image::{Dek, Filesystem, Image, Metadata, OpenOptions, Payload, SealOptions, Sealed, Sealer};
use node::Node;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Cursor, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use stream::Place;
use survey::Survey;
use uuid::Uuid;

/// Parts begin at a multiple of this.
const ALIGNMENT: u64 = 1 << 20;

/// What to capture, and how.
#[derive(Debug)]
pub struct Options {
    /// The node as ssh knows it.
    pub node: String,
    /// In the place of the user's `ssh_config`.
    pub ssh_config: Option<PathBuf>,
    /// Root of the system on the node; another than `/` where a rescue system has it mounted.
    pub root: String,
    /// zstd level, 1 to 22.
    pub level: u32,
    /// Patterns of what is left out besides.
    pub exclude: Vec<Vec<u8>>,
    /// Patterns of files that may hold a private key.
    pub allow_keys: Vec<Vec<u8>>,
}

/// What the image is to be.
struct Wanted {
    name: String,
    lineage: Uuid,
    serial: u64,
    /// Whether nodes are to boot it: it needs a kernel and an initramfs.
    boots: bool,
}

/// What was captured.
#[derive(Debug)]
pub struct Captured {
    /// The container.
    pub sealed: Sealed,
    /// Each file system and its inodes.
    pub filesystems: Vec<(String, u64)>,
    /// What was left out by the rules and the user's patterns.
    pub left_out: LeftOut,
    /// What a reader of the image should know besides, in sentences.
    pub notes: Vec<String>,
}

/// Captures a node into the file `path`; an old image of this name is replaced by its next generation. Its key goes to `key_file`, which
/// must not exist. On failure neither is there.
pub fn capture_to_files(options: &Options, name: String, path: &Path, key_file: &Path) -> Result<Captured> {
    pack::check_names(path, key_file)?;
    let key = Dek::generate()?;
    let key_file = NewKeyFile::create(key_file, &key)?;
    let image = NewFile::create(path, 0o644)?;
    let out = image.file().try_clone().context("cannot use the image file twice")?;
    let (lineage, serial) = generations::next_at(path);
    let wanted = Wanted { name, lineage, serial, boots: false };
    let (_, captured) = capture(options, wanted, out, key, &format!("'{}'", path.display()))?;
    let key_file = key_file.appear()?;
    // Nothing is signed here: signatures of the image before would only be wrong.
    pack::appear(image, path, None)?;
    key_file.keep();
    Ok(captured)
}

/// Captures a node and imports that as the next generation of the image `name`, with the kernel, the initramfs and the signed boot loaders
/// that are in it. Only a nameless sealed file is made here.
pub fn capture_to_server(
    options: &Options,
    name: &ImageName,
    server: &Server,
    profile: &ProfileOptions,
) -> Result<(Captured, ImageView, Option<ProfileView>)> {
    let upload = Upload::begin(server, name, profile)?;
    let wanted = Wanted { name: name.to_string(), lineage: upload.lineage, serial: upload.serial, boots: true };
    let key = Dek::generate()?;
    let place = "a temporary file (TMPDIR says where)";
    let (sealed, mut captured) = capture(options, wanted, Upload::staging()?, key.clone(), place)?;
    let (boot_files, boot_loaders) =
        what_boots(&sealed, &key).context("cannot take kernel and initramfs out of what was captured")?;
    if boot_loaders.is_none() {
        captured.notes.push("the node has no signed shim and GRUB: only kernel and initramfs go with the image".into());
    }
    let measured = |bytes: Vec<u8>| {
        let length = bytes.len() as u64;
        (Cursor::new(bytes), length)
    };
    let (view, published) = upload.send(Parcel {
        sealed,
        key: Some(key),
        kernel: measured(boot_files.kernel),
        initramfs: measured(boot_files.initramfs),
        boot_loaders: boot_loaders.into_iter().flatten().map(|(name, bytes)| (name, measured(bytes))).collect(),
    })?;
    Ok((captured, view, published))
}

/// Takes kernel, initramfs and boot loaders out of an image that was captured.
fn what_boots(sealed: &File, key: &Dek) -> Result<(BootFiles, Option<BootLoaders>)> {
    let options = OpenOptions { key: Some(key.clone()), ..OpenOptions::default() };
    let image = Image::open(sealed.try_clone()?, &options)?;
    let mut system = System::open(SquashfsIn::all(image, Path::new("the captured image"))?)?;
    Ok((system.boot_files()?, system.boot_loaders()?))
}

/// `place` is what `out` is, for people.
fn capture<W: Read + Write + Seek>(
    options: &Options,
    wanted: Wanted,
    out: W,
    key: Dek,
    place: &str,
) -> Result<(W, Captured)> {
    let told = |error: anyhow::Error| {
        // Nothing is written but the image.
        if error.chain().any(is_full_disk) { error.context(format!("cannot write {place}")) } else { error }
    };
    run(options, wanted, out, key).map_err(told).with_context(|| format!("cannot capture '{}'", options.node))
}

fn run<W: Read + Write + Seek>(options: &Options, wanted: Wanted, out: W, key: Dek) -> Result<(W, Captured)> {
    if !options.root.starts_with('/') {
        bail!("'{}' is no absolute path", options.root);
    }
    let node = Node::connect(&options.node, options.ssh_config.as_deref())?;
    let survey = Survey::parse(&node.ask(survey::SCRIPT, &[&options.root])?)?;
    let found = survey.captured(&options.root)?;
    if wanted.boots {
        boot_files::choose(&survey.boot)?;
    }
    let created = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
    let mut sealer = Sealer::new(
        out,
        SealOptions {
            lineage: *wanted.lineage.as_bytes(),
            serial: wanted.serial,
            created,
            chunk_log2: 16,
            payload: Payload::Set,
            key: Some(key),
        },
    )?;
    let view = ViewOptions { scrub: true, exclude: options.exclude.clone(), allow_keys: options.allow_keys.clone() };
    let mut guard = Guard::new(&node, &options.root, &view)?;
    let mut view = View::new(&view)?;
    let mut filesystems = Vec::new();
    let mut inodes = Vec::new();
    let mut notes = Vec::new();
    for (place, mount) in &found {
        let offset = sealer.begin_part(ALIGNMENT)?;
        let progress = Progress::new("capturing");
        progress.total(mount.used.as_ref().map_or(0, survey::Number::value));
        let (input, running) = node.read_files(&mount.target)?;
        let mut to =
            Place { mount: place, view: &mut view, guard: &mut guard, level: options.level, progress: &progress };
        let written = stream::squash(input, sealer, &mut to);
        let ended = running.wait()?;
        let said = survey.said_by_tar(&mount.target, &ended.said);
        // What broke the connection explains what came of it better than what came.
        let (back, part) = match (written, ended.status) {
            (Ok(written), Some(0 | 1)) => written,
            // It sends them without contents, or not at all.
            (Ok(_), Some(2)) if !said.failures.is_empty() => bail!(
                "'{place}': files on it cannot be read, and an image without them is not that of the node: {}: mend the file system or \
                 remove the files",
                summary(&said.failures)
            ),
            (Ok(_), _) => bail!("'{place}': {}", node.reason(&ended)),
            // Nobody takes what it sends any more: its end comes of that.
            (Err(error), _) if error.chain().any(is_full_disk) => return Err(error),
            (Err(error), Some(0 | 1)) => return Err(error.context(format!("in the file system '{place}'"))),
            (Err(error), _) => return Err(error.context(format!("'{place}': {}", node.reason(&ended)))),
        };
        sealer = back;
        sealer.patch(offset, &part.superblock)?;
        progress.finish(&format!("captured '{place}': {} inodes", part.inodes));
        if !said.changes.is_empty() {
            notes.push(format!("files in '{place}' changed while they were read: {}", summary(&said.changes)));
        }
        if !said.failures.is_empty() {
            notes.push(format!("tar has said of '{place}': {}", summary(&said.failures)));
        }
        note(&mut notes, "access control lists, which a squashfs cannot hold, were left out", &part.acls);
        note(&mut notes, "other names of what was left out were left out too", &part.unlinked);
        filesystems.push(Filesystem {
            mount: place.clone(),
            offset,
            length: part.length,
            layout: Layout::of(&survey, mount).to_json()?,
        });
        inodes.push((place.clone(), part.inodes));
    }
    guard.finish()?;
    let unmounted: Vec<PathBuf> = survey.unmounted_subvolumes(&found).into_iter().collect();
    note(&mut notes, "btrfs subvolumes that are not mounted were left out", &unmounted);
    note(
        &mut notes,
        "file systems of a kind that is not captured were left out",
        &survey.of_other_kinds(&options.root),
    );
    for swap in Layout::swaps(&survey) {
        // It has a place on the disk and nothing in the payload.
        let layout = swap.to_json()?;
        filesystems.push(Filesystem { mount: String::new(), offset: 0, length: 0, layout });
    }
    let (out, sealed) =
        sealer.finish(|payload| metadata(options, wanted.name, &survey, filesystems, payload.sha256), None)?;
    Ok((out, Captured { sealed, filesystems: inodes, left_out: view.finish(), notes }))
}

fn metadata(
    options: &Options,
    name: String,
    survey: &Survey,
    filesystems: Vec<Filesystem>,
    sha256: [u8; 32],
) -> Metadata {
    let mut packages = survey.packages.clone();
    packages.sort_unstable();
    Metadata {
        name,
        os: crate::pack::os_name(&survey.os_release),
        arch: survey.arch.clone(),
        kernel: crate::pack::newest_version(&survey.kernels).map(str::to_owned),
        builder: format!("imgutil {}", env!("CARGO_PKG_VERSION")),
        inputs: BTreeMap::from([
            ("captured-root".to_owned(), options.root.clone()),
            ("zstd-level".to_owned(), options.level.to_string()),
        ]),
        payload_sha256: hex::encode(sha256),
        packages,
        filesystems,
    }
}

/// The first lines of what a program said, on one line.
fn summary(lines: &[&str]) -> String {
    let shown = lines.iter().take(3).copied().collect::<Vec<_>>().join("; ");
    if lines.len() > 3 { format!("{shown}; and {} more", lines.len() - 3) } else { shown }
}

fn note(notes: &mut Vec<String>, what: &str, paths: &[PathBuf]) {
    if !paths.is_empty() {
        let paths: Vec<String> = paths.iter().map(|path: &PathBuf| Path::display(path).to_string()).collect();
        notes.push(format!("{what}: {}", paths.join(" ")));
    }
}
