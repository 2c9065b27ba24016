//! A tree from a container image instead of packages: its layers, and then everything out that must differ from node to node.

use super::tree::Tree;
use super::workdir::WorkDir;
use super::{BuildError, Event, finish};
use crate::exec::{Machine, SignalWatch};
use crate::oci::{Digest, Image, Limits, OciError, Source};
use nix::sys::signal::Signal;
use rustix::fs::{Mode, OFlags};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Largest os-release that is read.
const OS_RELEASE_LIMIT: u64 = 1 << 16;

/// A finished tree.
#[derive(Debug)]
pub struct Imported {
    /// Where it is.
    pub tree: PathBuf,
    /// Its operating system, as `debian-12`; `unknown` if it does not say.
    pub os: String,
    /// Its architecture, in Debian's words.
    pub arch: &'static str,
    /// What was imported.
    pub digest: Digest,
    /// How long it took.
    pub took: Duration,
}

/// Makes a tree of a container image. It appears under its name when it is complete; whatever fails or ends the import before,
/// nothing is left of it.
pub fn import(
    tree: &Path,
    source: &Source,
    arch: Option<&str>,
    progress: &mut (dyn FnMut(Event<'_>) + Send),
    signals: Option<&SignalWatch>,
) -> Result<Imported, BuildError> {
    let started = Instant::now();
    // Owners, devices and attributes of root's own can only be set by root.
    if !rustix::process::geteuid().is_root() {
        return Err(BuildError::NotRoot);
    }
    let machine = arch.map_or_else(|| Ok(Machine::of_the_host()), Machine::named)?;
    let image = Image::open(source, machine.name)?;
    let work = WorkDir::create(tree)?;
    let path = work.root();
    let root = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| BuildError::io("open the tree", &path, error.into()))?;
    progress(Event::Stage("unpacking the image"));
    let mut ended = None;
    let mut shown = 0;
    let unpacked = image.unpack(root.as_fd(), Limits::default(), &mut |at| {
        if at.layer != shown {
            shown = at.layer;
            progress(Event::Item { what: "unpacking", name: "layer", done: at.layer, total: at.layers });
        }
        let ends =
            |signal: &Signal| matches!(signal, Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT);
        ended = ended.or_else(|| signals.and_then(|signals| signals.take().into_iter().find(ends)));
        ended.is_none()
    });
    match (unpacked, ended) {
        (Ok(()), _) => {}
        (Err(OciError::Interrupted), Some(signal)) => return Err(BuildError::Interrupted(signal)),
        (Err(error), _) => return Err(error.into()),
    }
    progress(Event::Stage("taking out what must differ from node to node"));
    finish::make_impersonal(&Tree::open(&path)?)?;
    let os = crate::in_root::read(root.as_fd(), "etc/os-release", OS_RELEASE_LIMIT)
        .ok()
        .flatten()
        .map_or_else(|| "unknown".to_owned(), |text| os_name(&text));
    let tree = work.publish()?;
    Ok(Imported { tree, os, arch: machine.name, digest: image.digest, took: started.elapsed() })
}

/// `ID-VERSION_ID` of os-release(5).
fn os_name(text: &str) -> String {
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim_matches(['"', '\'']).to_owned())
    };
    match (value("ID"), value("VERSION_ID")) {
        (Some(id), Some(version)) => format!("{id}-{version}"),
        (Some(id), None) => id,
        (None, _) => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_image_says_its_name() {
        assert_eq!(super::os_name("NAME=\"Debian\"\nVERSION_ID=\"12\"\nID=debian\n"), "debian-12");
        assert_eq!(super::os_name("ID=\"arch\"\n"), "arch");
        assert_eq!(super::os_name(""), "unknown");
    }
}
