//! The whole of packing: a tree becomes a sealed image under its name, with its key, signature and boot files beside it.

use super::describe::{self, BootFiles, Description};
use super::flushing::Flushing;
use super::scan::{self, Warnings};
use super::selinux::Labels;
use super::squash::{SquashOptions, Squashed, squash};
use crate::files::{Existing, NewFile, write_whole};
use crate::key_file::NewKeyFile;
use crate::progress::Progress;
use crate::scrub::LeftOut;
use crate::squashfs::Compression;
use crate::unpack::parent_of;
use anyhow::{Context as _, Result, bail};
use moor_image::{Dek, Filesystem, Metadata, Payload, SealOptions, Sealed, Sealer, SignatureFile, SigningKey};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// How to pack.
pub struct PackOptions {
    /// Name of the image in its metadata.
    pub name: String,
    /// Kept by all generations of one name.
    pub lineage: Uuid,
    /// Grows in a lineage.
    pub serial: u64,
    /// How the tree becomes a squashfs.
    pub squash: SquashOptions,
}

/// Where the results go.
pub struct Destination<'a> {
    /// The image; an old one of this name is replaced.
    pub image: &'a Path,
    /// The new key's file, which must not exist; none for a plain image.
    pub key_file: Option<&'a Path>,
    /// An OpenSSH private key that signs the image.
    pub sign_key: Option<&'a Path>,
    /// Gets `vmlinuz` and `initrd.img`.
    pub boot_dir: Option<&'a Path>,
}

/// What was made.
pub struct Packed {
    /// The container.
    pub sealed: Sealed,
    /// What could not be kept.
    pub warnings: Warnings,
    /// What was left out on purpose.
    pub left_out: LeftOut,
    /// `SELinux` labels that were set.
    pub labels: Option<Labels>,
    /// Inodes in the image.
    pub inodes: u64,
    /// Bytes of regular files before compression.
    pub file_bytes: u64,
    /// Whether signed boot loaders were copied beside the kernel, if that was asked for.
    pub boot_loaders: Option<bool>,
    /// Why no node can boot the image.
    pub cannot_boot: Option<String>,
}

/// Packs `tree` into files. On failure none of them is there, unless it is that a boot file cannot be given its name: they come last.
pub fn pack_to_files(
    tree: &Path,
    destination: &Destination<'_>,
    options: &PackOptions,
    progress: &Progress,
) -> Result<Packed> {
    let root = scan::open_root(tree)?;
    // Everything that can be wrong without packing is looked at first.
    if let Some(key_file) = destination.key_file {
        check_names(destination.image, key_file)?;
    }
    check_places(root.as_fd(), tree, destination)?;
    let sign_key = destination.sign_key.map(read_sign_key).transpose()?;
    let (boot_files, cannot_boot) = match (describe::boot_files(root.as_fd()), destination.boot_dir) {
        (Ok(files), Some(_)) => (Some(files), None),
        (Err(error), Some(_)) => return Err(error),
        // An image need not be one that boots; whoever made it may think that it does.
        (files, None) => (None, files.err().map(|error| format!("{error:#}"))),
    };
    let boot_loaders = destination.boot_dir.map(|_| describe::boot_loaders(root.as_fd())).transpose()?;
    let key = destination.key_file.map(|_| Dek::generate()).transpose()?;
    let key_file = match (destination.key_file, &key) {
        (Some(path), Some(key)) => Some(NewKeyFile::create(path, key)?),
        _ => None,
    };
    // A plain image holds what the tree keeps from others, /etc/shadow for one.
    let image = NewFile::create(destination.image, if key.is_some() { 0o644 } else { 0o600 })?;
    let out = image.file().try_clone().context("cannot use the image file twice")?;
    let out = Flushing::new(out).context("cannot start the thread that writes out")?;
    let (_, mut packed) = seal(tree, out, key, options, progress)
        .with_context(|| format!("cannot pack '{}' into '{}'", tree.display(), destination.image.display()))?;
    packed.cannot_boot = cannot_boot;

    let signature = sign_key.map(|key| signature(&packed.sealed.digest, &key)).transpose()?;
    let mut ready = Vec::new();
    if let (Some(directory), Some(files)) = (destination.boot_dir, boot_files) {
        ready = copied_boot_files(directory, files)?;
        packed.boot_loaders = Some(matches!(boot_loaders, Some(Some(_))));
        for (name, file) in boot_loaders.flatten().into_iter().flatten() {
            ready.push(copied(directory, &name, file)?);
        }
    }
    let key_file = key_file.map(NewKeyFile::appear).transpose()?;
    appear(image, destination.image, signature)?;
    if let Some(key_file) = key_file {
        key_file.keep();
    }
    // Last: a kernel must not be newer than the image that has its modules. That there is room for them is known by now.
    for file in ready {
        file.appear(Existing::Replace)?;
    }
    Ok(packed)
}

/// Gives the image its name, and its signature file the contents that belong to it. There is no moment at which the image that is
/// there, the old one or the new one, lacks a signature that it has: until both are in place the file vouches for both.
pub(crate) fn appear(image: NewFile, path: &Path, signature: Option<SignatureFile>) -> Result<()> {
    let path = signature_path(path);
    let old = match std::fs::read(&path) {
        Ok(bytes) => Some(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("cannot read the old '{}'", path.display())),
    };
    let Some(signature) = signature else {
        image.appear(Existing::Replace)?;
        // The old image's would only be wrong from here on; a crash before this leaves one that is not over the new image.
        return remove_if_there(&path);
    };
    let mut both = signature.clone();
    // An old file that cannot be read vouches for nothing.
    if let Some(old) = old.as_deref().and_then(|bytes| SignatureFile::parse(bytes).ok()) {
        both.add_all(old);
    }
    write_whole(&path, 0o644, &both.to_bytes()?)?;
    if let Err(error) = image.appear(Existing::Replace) {
        match old {
            Some(bytes) => write_whole(&path, 0o644, &bytes)?,
            None => remove_if_there(&path)?,
        }
        return Err(error);
    }
    if both == signature { Ok(()) } else { write_whole(&path, 0o644, &signature.to_bytes()?) }
}

/// Refuses a key file that the image, or its signatures, would take the place of: the key would be lost.
pub(crate) fn check_names(image: &Path, key_file: &Path) -> Result<()> {
    let place = |path: &Path| Some((parent_of(path).canonicalize().ok()?, path.file_name()?.to_owned()));
    for other in [image, &signature_path(image)] {
        if place(key_file).is_some_and(|key_file| Some(key_file) == place(other)) {
            bail!(
                "'{}' cannot be the key file, because '{}' goes there: name another file",
                key_file.display(),
                other.display()
            );
        }
    }
    Ok(())
}

/// Refuses places that cannot be written to, or that are in the tree: the next image of it would hold this one, or its key.
fn check_places(root: BorrowedFd<'_>, tree: &Path, destination: &Destination<'_>) -> Result<()> {
    let whole = tree.canonicalize().with_context(|| format!("cannot open the tree '{}'", tree.display()))?;
    let is_in_tree = |directory: &Path| {
        Ok::<_, anyhow::Error>(directory.starts_with(&whole) && scan::is_on_mount_of(root, directory)?)
    };
    let refuse = |path: &Path| -> Result<()> {
        bail!(
            "'{}' is in the tree that is packed, so the next image of it would hold it: name a place outside",
            path.display()
        )
    };
    for path in [Some(destination.image), destination.key_file].into_iter().flatten() {
        if path.is_dir() {
            bail!("'{}' is a directory: name a file", path.display());
        }
        // What is not there is found when the file is made.
        let Ok(directory) = parent_of(path).canonicalize() else { continue };
        if is_in_tree(&directory)? {
            refuse(path)?;
        }
    }
    if let Some(path) = destination.boot_dir {
        // It is made if need be: what counts is where what is there of it leads.
        let absolute = std::path::absolute(path).with_context(|| format!("cannot use '{}'", path.display()))?;
        if let Some(there) = absolute.ancestors().find_map(|above| above.canonicalize().ok())
            && is_in_tree(&there)?
        {
            refuse(path)?;
        }
    }
    Ok(())
}

/// Packs `tree` into `out`, encrypted if there is a key.
pub(crate) fn seal<W: Read + Write + Seek>(
    tree: &Path,
    out: W,
    key: Option<Dek>,
    options: &PackOptions,
    progress: &Progress,
) -> Result<(W, Packed)> {
    let root = scan::open_root(tree)?;
    let description = describe::describe(root.as_fd())?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
    let seal_options = SealOptions {
        lineage: *options.lineage.as_bytes(),
        serial: options.serial,
        created,
        chunk_log2: 16,
        payload: Payload::Squashfs,
        key,
    };
    let sealer = Sealer::new(out, seal_options)?;
    let Squashed { out: mut sealer, superblock, warnings, left_out, labels, inodes, file_bytes } =
        squash(tree, sealer, &options.squash, progress)?;
    sealer.patch_start(0, &superblock)?;
    let (out, sealed) = sealer.finish(|payload| metadata(description, options, payload), None)?;
    let packed =
        Packed { sealed, warnings, left_out, labels, inodes, file_bytes, boot_loaders: None, cannot_boot: None };
    Ok((out, packed))
}

fn metadata(description: Description, options: &PackOptions, payload: moor_image::PayloadSummary) -> Metadata {
    Metadata {
        name: options.name.clone(),
        os: description.os,
        arch: description.arch,
        kernel: description.kernel,
        builder: format!("imgutil {}", env!("CARGO_PKG_VERSION")),
        inputs: BTreeMap::from([match options.squash.compression {
            Compression::Zstd(level) => ("zstd-level".to_owned(), level.to_string()),
            Compression::Xz => ("compression".to_owned(), "xz".to_owned()),
        }]),
        payload_sha256: hex::encode(payload.sha256),
        packages: description.packages,
        filesystems: vec![Filesystem { mount: "/".into(), offset: 0, length: payload.length, layout: String::new() }],
    }
}

/// Where an image's detached signatures are.
pub(crate) fn signature_path(image: &Path) -> PathBuf {
    let mut path = OsString::from(image);
    path.push(".sig");
    path.into()
}

fn read_sign_key(path: &Path) -> Result<SigningKey> {
    let context = || format!("cannot read the signing key '{}'", path.display());
    let text = zeroize::Zeroizing::new(std::fs::read(path).with_context(context)?);
    SigningKey::from_openssh(&text).with_context(context)
}

fn signature(digest: &[u8; 32], key: &SigningKey) -> Result<SignatureFile> {
    let mut file = SignatureFile::default();
    file.sign(digest, key)?;
    Ok(file)
}

fn remove_if_there(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove the old '{}'", path.display()))
        }
        _ => Ok(()),
    }
}

/// Copies kernel and initramfs out of the tree, without their names yet. They are what a boot loader reads, so they are not secret.
fn copied_boot_files(directory: &Path, files: BootFiles) -> Result<Vec<NewFile>> {
    std::fs::create_dir_all(directory).with_context(|| format!("cannot create '{}'", directory.display()))?;
    let context = || format!("cannot copy the kernel {}", files.release);
    let kernel = copied(directory, "vmlinuz", files.kernel).with_context(context)?;
    Ok(vec![kernel, copied(directory, "initrd.img", files.initramfs).with_context(context)?])
}

fn copied(directory: &Path, name: &str, mut source: File) -> Result<NewFile> {
    let path = directory.join(name);
    let new = NewFile::create(&path, 0o644)?;
    let mut target: &File = new.file();
    std::io::copy(&mut source, &mut target).with_context(|| format!("cannot write '{}'", path.display()))?;
    new.file().sync_all().with_context(|| format!("cannot write '{}'", path.display()))?;
    Ok(new)
}
