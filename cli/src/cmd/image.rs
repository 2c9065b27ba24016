//! `moor image …`

use crate::args::Image;
use crate::connect::read_secret;
use crate::output;
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use moor_api::admin::{BOOT_LOADERS, ImportImage};
use moor_api::client::admin::AdminClient;
use moor_api::ids::Sha256Digest;
use moor_api::node::Base64;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use zeroize::Zeroize as _;

pub(crate) async fn run(client: &mut AdminClient, command: Image, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Image::List => {
            let images = client.images().await?;
            if json {
                output::json(&images)?;
                return Ok(ExitCode::SUCCESS);
            }
            for image in images {
                let kind = if image.encrypted { "sealed" } else { "plain" };
                let (os, kernel) = (image.os.unwrap_or_default(), image.kernel_version.unwrap_or_default());
                output::line(format_args!(
                    "{}: @{} {} {} {kind} {os} kernel {kernel}, {} nodes pinned",
                    image.name,
                    image.serial,
                    image.digest,
                    output::bytes(image.size),
                    image.pins
                ))?;
            }
        }
        Image::Import { name, file, key_file, boot_dir } => {
            let key = key_file.as_deref().map(read_secret).transpose()?.map(|key| key.trim().to_owned());
            let signature_file = PathBuf::from(format!("{}.sig", file.display()));
            let signatures = match std::fs::read(&signature_file) {
                Ok(bytes) => Some(Base64(bytes)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => return Err(error).with_context(|| format!("reading '{}'", signature_file.display())),
            };
            let kernel = upload(client, &boot_dir.join("vmlinuz")).await?;
            let initramfs = upload(client, &boot_dir.join("initrd.img")).await?;
            let mut boot_loaders = BTreeMap::new();
            for loader in loaders_in(&boot_dir) {
                boot_loaders.insert(loader.to_owned(), upload(client, &boot_dir.join(loader)).await?);
            }
            let image = upload(client, &file).await?;
            let mut request = ImportImage { name, image, key, signatures, kernel, initramfs, boot_loaders };
            let view = client.import_image(&request).await;
            request.key.zeroize();
            let view = view.with_context(|| format!("importing '{}'", file.display()))?;
            if json {
                output::json(&view)?;
            } else {
                output::line(format_args!(
                    "{}: @{} {} {}",
                    view.name,
                    view.serial,
                    view.digest,
                    output::bytes(view.size)
                ))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Shim and GRUB, where a folder has both.
fn loaders_in(dir: &Path) -> impl Iterator<Item = &'static str> {
    let pair = BOOT_LOADERS.into_iter().find(|names| names.iter().all(|name| dir.join(name).is_file()));
    pair.into_iter().flatten()
}

async fn upload(client: &mut AdminClient, path: &Path) -> anyhow::Result<Sha256Digest> {
    let file = File::open(path).with_context(|| format!("opening '{}'", path.display()))?;
    let length = file.metadata().with_context(|| format!("reading '{}'", path.display()))?.len();
    let bar = ProgressBar::new(length);
    bar.set_style(ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}")?);
    bar.set_message(path.display().to_string());
    let shown = bar.clone();
    let added = client
        .add_blob(file, move |sent| shown.set_position(sent))
        .await
        .with_context(|| format!("sending '{}'", path.display()))?;
    bar.finish_and_clear();
    anyhow::ensure!(added.size == length, "'{}' changed while it was sent: try again", path.display());
    Ok(added.blob)
}
