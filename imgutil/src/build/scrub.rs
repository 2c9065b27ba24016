//! Takes out of a tree what the rules name that pack and capture go by ([`crate::scrub`]): what belongs to one machine or one person,
//! and what package managers and tools leave behind. What a recipe lays in by name is meant to be there, and stays.

use super::BuildError;
use crate::recipe::{File, What};
use crate::scrub::{Candidate, LeftOut, Verdict, View, ViewOptions, ViewPlace};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// So much of a file is searched, where a rule asks what it holds.
const HEAD: u64 = 256 << 10;

/// Scrubs the tree at `root`, on which nobody else works. Gives what went.
pub(super) fn apply(root: &Path, laid: &[File]) -> Result<LeftOut, BuildError> {
    let options = ViewOptions { scrub: true, ..ViewOptions::default() };
    let view = View::new(&options).map_err(|error| other("scrub", root, &error))?;
    let mut scrubber = Scrubber { root, laid, view };
    let place = scrubber.view.root();
    scrubber.directory(root, &place)?;
    Ok(scrubber.view.finish())
}

struct Scrubber<'a> {
    root: &'a Path,
    laid: &'a [File],
    view: View,
}

impl Scrubber<'_> {
    fn directory(&mut self, directory: &Path, place: &ViewPlace) -> Result<(), BuildError> {
        let failed = |error| BuildError::io("list", directory, error);
        for entry in fs::read_dir(directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            self.entry(&path, place)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, place: &ViewPlace) -> Result<(), BuildError> {
        let name = path.file_name().unwrap_or_default();
        let in_image = Path::new("/").join(path.strip_prefix(self.root).unwrap_or(path));
        let metadata = path.symlink_metadata().map_err(|error| BuildError::io("look at", path, error))?;
        let is_directory = metadata.is_dir();
        if self.is_laid(&in_image) {
            let below = self.view.step(place, name.as_bytes());
            return if is_directory { self.directory(path, &below) } else { Ok(()) };
        }
        let candidate = Candidate {
            path: &in_image,
            name: name.as_bytes(),
            is_directory,
            is_regular: metadata.is_file(),
            bytes: metadata.len(),
        };
        let (verdict, below) =
            self.view.judge(place, &candidate, || Ok(head(path)?)).map_err(|error| other("look into", path, &error))?;
        match verdict {
            Verdict::Keep if is_directory => self.directory(path, &below),
            Verdict::Keep => Ok(()),
            Verdict::LeaveOut if is_directory => {
                fs::remove_dir_all(path).map_err(|error| BuildError::io("remove", path, error))
            }
            Verdict::LeaveOut => fs::remove_file(path).map_err(|error| BuildError::io("remove", path, error)),
            Verdict::Empty => {
                fs::OpenOptions::new()
                    .write(true)
                    .truncate(true)
                    .custom_flags(nix::libc::O_NOFOLLOW)
                    .open(path)
                    .map_err(|error| BuildError::io("empty", path, error))?;
                Ok(())
            }
        }
    }

    /// Whether the recipe lays it in: itself, a directory with all in it, or the way to one of these.
    fn is_laid(&self, path: &Path) -> bool {
        self.laid.iter().any(|file| {
            let laid: &PathBuf = &file.path.0;
            laid.starts_with(path) || (path.starts_with(laid) && matches!(file.what, What::Copy(_)))
        })
    }
}

fn head(path: &Path) -> io::Result<Vec<u8>> {
    let file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path)?;
    let mut bytes = Vec::new();
    file.take(HEAD).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn other(doing: &'static str, path: &Path, error: &anyhow::Error) -> BuildError {
    BuildError::io(doing, path, io::Error::other(format!("{error:#}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    #[test]
    fn what_the_rules_name_goes_and_what_the_recipe_lays_in_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let (root, outside) = (scratch.path().join("root"), scratch.path().join("outside"));
        fs::write(&outside, "mine").unwrap();
        for (path, content) in [
            ("etc/machine-id", "0123"),
            ("etc/ssh/ssh_host_rsa_key", "key"),
            ("etc/ssh/sshd_config", "#"),
            ("var/log/apt/history.log", "x"),
            ("var/cache/dnf/repo/file", "x"),
            ("tmp/left/over", "x"),
            ("root/.netrc", "password"),
            ("home/op/.netrc", "password"),
            ("home/op/.npmrc", "registry=x"),
            ("etc/npm/.npmrc", "_authToken=x"),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        // Neither followed nor looked into.
        std::os::unix::fs::symlink(&outside, root.join("etc/.npmrc")).unwrap();
        std::os::unix::fs::symlink(scratch.path(), root.join("var/log/link")).unwrap();
        let recipe = "[[file]]\npath = \"/root/.netrc\"\ncontent = \"password\"\n";
        let recipe = Recipe::parse(recipe, Path::new("r.toml")).unwrap();

        let gone = apply(&root, &recipe.files).unwrap();
        assert!(gone.summary().contains("host keys 1"), "{}", gone.summary());
        for (path, there) in [
            ("etc/machine-id", true),
            ("etc/ssh/ssh_host_rsa_key", false),
            ("etc/ssh/sshd_config", true),
            ("var/log/apt", true),
            ("var/log/apt/history.log", false),
            ("var/log/link", false),
            ("var/cache/dnf/repo", false),
            ("tmp", true),
            ("tmp/left", false),
            ("root/.netrc", true),
            ("home/op/.netrc", false),
            ("home/op/.npmrc", true),
            ("etc/npm/.npmrc", false),
            ("etc/.npmrc", true),
        ] {
            assert_eq!(root.join(path).symlink_metadata().is_ok(), there, "{path}");
        }
        assert_eq!(fs::read(root.join("etc/machine-id")).unwrap(), b"");
        assert_eq!(fs::read_to_string(outside).unwrap(), "mine");
    }
}
