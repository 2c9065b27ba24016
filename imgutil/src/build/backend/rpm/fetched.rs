//! The files that a tool has fetched: found by the names that RPM gives them, and their digests.

use crate::build::BuildError;
use crate::build::backend::{Installed, Package};
use aws_lc_rs::digest::{Context, SHA256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Package files by name, and where each was fetched from: a name may be in several repositories.
#[derive(Default)]
pub(in super::super) struct Fetched {
    files: BTreeMap<String, Vec<(PathBuf, String)>>,
}

impl Fetched {
    /// Adds all packages below `directory`, which came from `uri`.
    pub(in super::super) fn add(&mut self, directory: &Path, uri: &str) -> Result<(), BuildError> {
        let entries = match std::fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(BuildError::io("read", directory, error)),
        };
        for entry in entries {
            let entry = entry.map_err(|error| BuildError::io("read", directory, error))?;
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let uri = format!("{}/{name}", uri.trim_end_matches('/'));
            let kind = entry.file_type().map_err(|error| BuildError::io("look at", &path, error))?;
            if kind.is_dir() {
                self.add(&path, &uri)?;
            } else if path.extension().is_some_and(|end| end == "rpm") {
                self.files.entry(name).or_default().push((path, uri));
            }
        }
        Ok(())
    }

    /// The package's file, its digest, and where it is from. Several repositories may have it, but not in different files: which of them the
    /// tool takes, its answer does not say.
    pub(in super::super) fn package(&self, chosen: &Installed) -> Result<Package, BuildError> {
        let answer = |answer| BuildError::Answer { tool: "the package manager", answer };
        let files = self.files.get(&file_name(chosen)).map(Vec::as_slice).unwrap_or_default();
        let Some((path, uri)) = files.first() else {
            return Err(answer(format!(
                "it has chosen {} {}, and fetched no file of that name",
                chosen.name, chosen.version
            )));
        };
        let sha256 = sha256_of(path)?;
        for (path, other) in &files[1..] {
            if sha256_of(path)? != sha256 {
                return Err(BuildError::Repository {
                    uri: other.clone(),
                    problem: format!("it is another file than '{uri}', of the same name and version: leave one out"),
                });
            }
        }
        Ok(Package {
            name: chosen.name.clone(),
            version: chosen.version.clone(),
            arch: chosen.arch.clone(),
            sha256,
            uri: uri.clone(),
        })
    }
}

/// The name of a package's file, as rpmbuild makes it: without the epoch.
fn file_name(package: &Installed) -> String {
    let version = package.version.split_once(':').map_or(package.version.as_str(), |(_, rest)| rest);
    format!("{}-{version}.{}.rpm", package.name, package.arch)
}

/// SHA-256 of a file, hexadecimal.
pub(in super::super) fn sha256_of(path: &Path) -> Result<String, BuildError> {
    let failed = |error| BuildError::io("read", path, error);
    let mut file = File::open(path).map_err(failed)?;
    let (mut digest, mut buffer) = (Context::new(&SHA256), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hex::encode(digest.finish())),
            length => digest.update(&buffer[..length]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_found_by_the_name_of_its_file() {
        let cache = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(cache.path().join("Packages/h")).unwrap();
        std::fs::write(cache.path().join("Packages/h/hello-2-1.noarch.rpm"), "x").unwrap();
        std::fs::write(cache.path().join("repomd.xml"), "x").unwrap();
        let mut fetched = Fetched::default();
        fetched.add(cache.path(), "http://m/os/").unwrap();
        fetched.add(&cache.path().join("none"), "").unwrap();
        let chosen = |version: &str| Installed {
            name: "hello".to_owned(),
            version: version.to_owned(),
            arch: "noarch".to_owned(),
        };
        let package = fetched.package(&chosen("3:2-1")).unwrap();
        assert_eq!(package.uri, "http://m/os/Packages/h/hello-2-1.noarch.rpm");
        assert_eq!(package.sha256, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881");
        assert!(fetched.package(&chosen("0:2-2")).is_err());

        // Another repository has the same file, and a third one another.
        for (name, bytes) in [("second", "x"), ("third", "y")] {
            std::fs::create_dir_all(cache.path().join(name)).unwrap();
            std::fs::write(cache.path().join(name).join("hello-2-1.noarch.rpm"), bytes).unwrap();
        }
        fetched.add(&cache.path().join("second"), "http://m/second").unwrap();
        assert_eq!(fetched.package(&chosen("3:2-1")).unwrap(), package);
        fetched.add(&cache.path().join("third"), "http://m/third").unwrap();
        let error = fetched.package(&chosen("3:2-1")).unwrap_err().to_string();
        assert!(error.contains("http://m/third/hello-2-1.noarch.rpm") && error.contains("http://m/os/"), "{error}");
    }
}
