//! `capture`: makes an image of a node's own disks, over ssh.
//!
//! [`node`] is the way to the node and runs nothing there but sh, lsblk, findmnt and tar; [`survey`] parses what it says of itself,
//! [`layout`] puts that into the image's metadata; [`tar`] reads a file system's files as they arrive, [`stream`] makes a squashfs of them
//! and leaves out what is secret or one machine's, [`tree`] holds their names meanwhile. Each file system becomes a part of one sealed image.
//! Nothing is staged: what arrives is compressed and sealed at once, and the key stays here.

mod layout;
mod node;
mod stream;
mod survey;
mod tree;

use crate::files::{Existing, NewFile};
use crate::key_file::NewKeyFile;
use crate::progress::Progress;
use crate::scrub::{LeftOut, View, ViewOptions};
use anyhow::{Context as _, Result, bail};
use layout::Layout;
use moor_image::{Dek, Filesystem, Metadata, Payload, SealOptions, Sealed, Sealer};
use node::Node;
use std::collections::BTreeMap;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use stream::Place;
use survey::Survey;
use uuid::Uuid;

/// Parts begin at a multiple of this.
const ALIGNMENT: u64 = 1 << 20;

/// What to capture, and where to.
#[derive(Debug)]
pub struct Options {
    /// The node as ssh knows it.
    pub node: String,
    /// In the place of the user's `ssh_config`.
    pub ssh_config: Option<PathBuf>,
    /// Root of the system on the node; another than `/` where a rescue system has it mounted.
    pub root: String,
    /// Name of the image in its metadata.
    pub name: String,
    /// The image; an old one of this name is replaced.
    pub image: PathBuf,
    /// Its key's file, which must not exist.
    pub key_file: PathBuf,
    /// zstd level, 1 to 22.
    pub level: u32,
    /// Patterns of what is left out besides.
    pub exclude: Vec<Vec<u8>>,
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

/// Captures a node. On failure neither image nor key is there.
pub fn capture(options: &Options) -> Result<Captured> {
    let key = Dek::generate()?;
    let key_file = NewKeyFile::create(&options.key_file, &key)?;
    let image = NewFile::create(&options.image, 0o644)?;
    let out = image.file().try_clone().context("cannot use the image file twice")?;
    let node = Node::new(&options.node, options.ssh_config.as_deref())?;
    let captured = run(&node, options, out, key).with_context(|| format!("cannot capture '{}'", options.node))?;
    let key_file = key_file.appear()?;
    image.appear(Existing::Replace)?;
    key_file.keep();
    Ok(captured)
}

fn run<W: Read + Write + Seek>(node: &Node, options: &Options, out: W, key: Dek) -> Result<Captured> {
    if !options.root.starts_with('/') {
        bail!("'{}' is no absolute path", options.root);
    }
    let survey = Survey::parse(&node.ask(survey::SCRIPT, &[&options.root])?)?;
    let found = survey.captured(&options.root)?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
    let mut sealer = Sealer::new(
        out,
        SealOptions {
            lineage: *Uuid::new_v4().as_bytes(),
            serial: 1,
            created,
            chunk_log2: 16,
            payload: Payload::Set,
            key: Some(key),
        },
    )?;
    let view = ViewOptions { scrub: true, exclude: options.exclude.clone(), ..ViewOptions::default() };
    let mut view = View::new(&view)?;
    let mut filesystems = Vec::new();
    let mut inodes = Vec::new();
    let mut notes = Vec::new();
    for (place, mount) in &found {
        let offset = sealer.begin_part(ALIGNMENT)?;
        let progress = Progress::new("capturing");
        progress.total(mount.used.as_ref().map_or(0, survey::Number::value));
        let (input, running) = node.read_files(&mount.target)?;
        let mut to = Place { mount: place, view: &mut view, level: options.level, progress: &progress };
        let written = stream::squash(input, sealer, &mut to);
        let ended = running.wait()?;
        // What broke the connection explains what came of it better than what came.
        let (back, part) = match (written, ended.status) {
            (Ok(written), Some(0 | 1)) => written,
            (Ok(_), _) => bail!("'{place}': {}", ended.reason()),
            (Err(error), Some(0 | 1)) => return Err(error.context(format!("in the file system '{place}'"))),
            (Err(error), _) => return Err(error.context(format!("'{place}': {}", ended.reason()))),
        };
        sealer = back;
        sealer.patch(offset, &part.superblock)?;
        progress.finish(&format!("captured '{place}': {} inodes", part.inodes));
        if ended.status == Some(1) {
            notes.push(format!("files in '{place}' changed while they were read: {}", summary(&ended.said)));
        }
        note(&mut notes, "access control lists, which a squashfs cannot hold, were left out", &part.acls);
        let (kept, masked): (Vec<PathBuf>, Vec<PathBuf>) =
            part.keys.into_iter().partition(|path| path.starts_with("/usr"));
        note(&mut notes, "private keys were left out", &masked);
        note(&mut notes, "files that look like private keys were kept, because programs ship such", &kept);
        note(&mut notes, "other names of what was left out were left out too", &part.unlinked);
        filesystems.push(Filesystem {
            mount: place.clone(),
            offset,
            length: part.length,
            layout: Layout::of(&survey, mount).to_json()?,
        });
        inodes.push((place.clone(), part.inodes));
    }
    for swap in Layout::swaps(&survey) {
        // It has a place on the disk and nothing in the payload.
        let layout = swap.to_json()?;
        filesystems.push(Filesystem { mount: String::new(), offset: 0, length: 0, layout });
    }
    let (_, sealed) = sealer.finish(|payload| metadata(options, &survey, filesystems, payload.sha256), None)?;
    Ok(Captured { sealed, filesystems: inodes, left_out: view.finish(), notes })
}

fn metadata(options: &Options, survey: &Survey, filesystems: Vec<Filesystem>, sha256: [u8; 32]) -> Metadata {
    let mut packages = survey.packages.clone();
    packages.sort_unstable();
    Metadata {
        name: options.name.clone(),
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
fn summary(said: &str) -> String {
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    let shown = lines.iter().take(3).copied().collect::<Vec<_>>().join("; ");
    if lines.len() > 3 { format!("{shown}; and {} more", lines.len() - 3) } else { shown }
}

fn note(notes: &mut Vec<String>, what: &str, paths: &[PathBuf]) {
    if !paths.is_empty() {
        let paths: Vec<String> = paths.iter().map(|path: &PathBuf| Path::display(path).to_string()).collect();
        notes.push(format!("{what}: {}", paths.join(" ")));
    }
}
