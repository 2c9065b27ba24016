//! Packing to a server.

use super::describe;
use super::image::{PackOptions, Packed, seal};
use super::scan;
use super::squash::SquashOptions;
use crate::progress::Progress;
use crate::upload::{Parcel, ProfileOptions, Server, Upload};
use anyhow::{Context as _, Result};
use moor_api::admin::{ImageView, ProfileView};
use moor_api::ids::ImageName;
use moor_image::Dek;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;

/// Packs `tree` and imports it as the next generation of the image `name`.
pub fn pack_to_server(
    tree: &Path,
    name: &ImageName,
    encrypted: bool,
    squash: SquashOptions,
    server: &Server,
    profile: &ProfileOptions,
) -> Result<(Packed, ImageView, Option<ProfileView>)> {
    let root = scan::open_root(tree)?;
    let boot_files = describe::boot_files(root.as_fd())?;
    let boot_loaders: Vec<_> = describe::boot_loaders(root.as_fd())?.into_iter().flatten().collect();
    let upload = Upload::begin(server, name, profile)?;
    let options = PackOptions { name: name.to_string(), lineage: upload.lineage, serial: upload.serial, squash };
    let key = if encrypted { Some(Dek::generate()?) } else { None };
    let progress = Progress::new("packing");
    let (sealed, mut packed) = seal(tree, Upload::staging()?, key.clone(), &options, &progress)
        .with_context(|| format!("cannot pack '{}' (set TMPDIR to a directory with room)", tree.display()))?;
    progress.finish("packed; sending it to the server");
    let measured = |what: &str, file: File| -> Result<(File, u64)> {
        let length = file.metadata().with_context(|| format!("cannot send {what}"))?.len();
        Ok((file, length))
    };
    let (kernel, initramfs) =
        (measured("the kernel", boot_files.kernel)?, measured("the initramfs", boot_files.initramfs)?);
    packed.boot_loaders = Some(!boot_loaders.is_empty());
    let boot_loaders: Vec<_> = boot_loaders
        .into_iter()
        .map(|(name, file)| measured(&name, file).map(|file| (name, file)))
        .collect::<Result<_>>()?;
    let (view, published) = upload.send(Parcel { sealed, key, kernel, initramfs, boot_loaders })?;
    Ok((packed, view, published))
}
