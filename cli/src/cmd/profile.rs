//! `moor profile …`

use crate::args::Profile;
use crate::output;
use anyhow::{Context as _, bail};
use moor_api::admin::BOOT_LOADERS;
use moor_api::client::admin::AdminClient;
use moor_api::ids::ProfileName;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

/// Largest boot file that is taken, in bytes.
const MAX_BOOT_FILE: usize = 1 << 30;

pub(crate) async fn run(client: &mut AdminClient, command: Profile, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Profile::List => {
            let profiles = client.profiles().await?;
            if json {
                output::json(&profiles)?;
                return Ok(ExitCode::SUCCESS);
            }
            for profile in profiles {
                let modified = if profile.modified { ", working directory changed since" } else { "" };
                match profile.generation {
                    Some(generation) => output::line(format_args!(
                        "{}: @{} {generation} published {}{modified}",
                        profile.name,
                        profile.serial,
                        output::time_ms(profile.published.saturating_mul(1000))
                    ))?,
                    None => {
                        output::line(format_args!("{}: never published: `moor profile publish {0}`", profile.name))?;
                    }
                }
            }
        }
        Profile::Create { name, image, template } => {
            let view = client.create_profile(&moor_api::admin::CreateProfile { name, image, template }).await?;
            if json {
                output::json(&view)?;
            } else {
                output::line(format_args!("{}: created", view.name))?;
            }
        }
        Profile::Publish { name } => {
            let view = client.publish(&name).await?;
            if json {
                output::json(&view)?;
            } else {
                let generation = view.generation.map(|digest| digest.to_string()).unwrap_or_default();
                output::line(format_args!("{}: @{} {generation}", view.name, view.serial))?;
            }
        }
        Profile::BootFiles { name, out } => boot_files(client, &name, &out).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn boot_files(client: &mut AdminClient, name: &ProfileName, out: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("making '{}'", out.display()))?;
    let files = client.boot_files(name).await?;
    let kernel = client.boot_file(name, "kernel", MAX_BOOT_FILE).await?;
    write(&out.join("vmlinuz"), &[&kernel])?;
    let initramfs = client.boot_file(name, "initramfs", MAX_BOOT_FILE).await?;
    let site = client.boot_file(name, "site.cpio", MAX_BOOT_FILE).await?;
    // A cpio behind a compressed one begins at a multiple of four bytes (kernel, Documentation/driver-api/early-userspace/buffer-format.rst).
    let padding = [0; 4];
    write(&out.join("initrd.img"), &[&initramfs, &padding[..(4 - initramfs.len() % 4) % 4], &site])?;
    write(&out.join("cmdline"), &[files.command_line.as_bytes(), b"\n"])?;
    for loader in files.boot_loaders.keys() {
        if !BOOT_LOADERS.as_flattened().contains(&loader.as_str()) {
            bail!("the member names a boot loader '{loader}', which is none");
        }
        write(&out.join(loader), &[&client.boot_file(name, loader, MAX_BOOT_FILE).await?])?;
    }
    let mut written = vec!["vmlinuz", "initrd.img"];
    written.extend(files.boot_loaders.keys().map(String::as_str));
    output::line(format_args!("{name}: {} and cmdline are in '{}'", written.join(", "), out.display()))?;
    Ok(())
}

/// Writes beside, syncs, renames.
fn write(path: &Path, parts: &[&[u8]]) -> anyhow::Result<()> {
    let beside = path.with_extension("part");
    let put = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&beside)?;
        for part in parts {
            file.write_all(part)?;
        }
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    put().with_context(|| format!("writing '{}'", path.display()))
}
