//! `moor-tether root` and `moor-tether unmount`.

use anyhow::{Context as _, Result};
use moor_tether::mount;
use moor_tether::root::{self, DEFAULT_WORK, RootOptions};
use std::path::PathBuf;
use std::process::ExitCode;

/// Make a root file system of a mounted image: squashfs below, compressed memory above
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image file that `mount` exports
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// Size of the writable layer in per cent of the memory
    #[arg(long, value_name = "N", default_value_t = 50)]
    overlay_percent: u16,
    /// Compression of the writable layer [default: the kernel's]
    #[arg(long, value_name = "NAME")]
    overlay_algorithm: Option<String>,
    /// Memory that it may take at most, in per cent of all [default: what it needs]
    #[arg(long, value_name = "N")]
    overlay_limit_percent: Option<u16>,
    /// Unpack the image into the layer: nothing of it is needed afterwards
    #[arg(long)]
    unpack: bool,
    /// Where the layers are mounted
    #[arg(long, value_name = "DIR", default_value = DEFAULT_WORK)]
    work: PathBuf,
    /// Where the root is mounted
    #[arg(value_name = "NEWROOT")]
    new_root: PathBuf,
}

/// End a mount made by `mount`, or take down a root made by `root`
#[derive(clap::Args)]
pub(crate) struct UnmountArgs {
    /// DIR is a root, not an image
    #[arg(long)]
    root: bool,
    /// Where the layers of that root are mounted
    #[arg(long, value_name = "DIR", default_value = DEFAULT_WORK, requires = "root")]
    work: PathBuf,
    /// What to unmount
    dir: PathBuf,
}

pub(super) fn run(args: Args) -> Result<ExitCode> {
    moor_tether::kmsg::log_to_stderr();
    let place = args.new_root.clone();
    let options = RootOptions {
        image: args.image,
        overlay_percent: args.overlay_percent,
        overlay_algorithm: args.overlay_algorithm,
        overlay_limit_percent: args.overlay_limit_percent,
        unpack: args.unpack,
        work: args.work,
        new_root: args.new_root,
    };
    root::make(&options).with_context(|| format!("cannot make a root on '{}'", place.display()))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn unmount(args: &UnmountArgs) -> Result<ExitCode> {
    if args.root {
        root::take_down(&args.dir, &args.work)?;
    } else {
        mount::unmount(&args.dir)?;
    }
    Ok(ExitCode::SUCCESS)
}
