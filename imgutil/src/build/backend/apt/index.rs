//! The package lists of archives (deb-control(5), as apt keeps them): which versions there are, and their digests.

use crate::build::BuildError;
use crate::build::backend::Installed;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

/// All packages of the lists in one directory.
pub(super) struct Index {
    lists: Vec<PathBuf>,
    versions: HashMap<String, Vec<Version>>,
}

/// One version of a package.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) number: String,
    pub(super) arch: String,
    pub(super) sha256: String,
}

impl Index {
    /// Reads the lists that apt has put into `directory`.
    pub(super) fn read(directory: &Path) -> Result<Self, BuildError> {
        let failed = |error| BuildError::io("read the package lists in", directory, error);
        let mut lists = Vec::new();
        for entry in std::fs::read_dir(directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.as_os_str().as_encoded_bytes().ends_with(b"_Packages") {
                lists.push(path);
            }
        }
        lists.sort();
        let mut versions: HashMap<String, Vec<Version>> = HashMap::new();
        for list in &lists {
            paragraphs(list, |text| {
                let (name, version) = parse(text);
                let known = versions.entry(name.to_owned()).or_default();
                if !known.contains(&version) {
                    known.push(version);
                }
                Ok(())
            })?;
        }
        Ok(Self { lists, versions })
    }

    /// All names.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.versions.keys().map(String::as_str)
    }

    /// The versions of a package.
    pub(super) fn versions(&self, name: &str) -> &[Version] {
        self.versions.get(name).map_or(&[], Vec::as_slice)
    }

    /// Writes the lists again into `directory`, with only the packages that `keep` wants.
    pub(super) fn write_narrowed(
        &self,
        directory: &Path,
        keep: impl Fn(&str, &Version) -> bool,
    ) -> Result<(), BuildError> {
        for list in &self.lists {
            let path = directory.join(list.file_name().unwrap_or_default());
            let failed = |error| BuildError::io("write", &path, error);
            let mut file = BufWriter::new(File::create(&path).map_err(failed)?);
            paragraphs(list, |text| {
                let (name, version) = parse(text);
                if keep(name, &version) {
                    file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n")).map_err(failed)?;
                }
                Ok(())
            })?;
            file.flush().map_err(failed)?;
        }
        Ok(())
    }
}

/// The packages that a status file of dpkg calls installed, sorted.
pub(super) fn installed(status: &Path) -> Result<Vec<Installed>, BuildError> {
    let mut all = Vec::new();
    paragraphs(status, |text| {
        if text.lines().any(|line| line.starts_with("Status: ") && line.ends_with(" installed")) {
            let (name, Version { number, arch, .. }) = parse(text);
            all.push(Installed { name: name.to_owned(), version: number, arch });
        }
        Ok(())
    })?;
    all.sort_unstable();
    Ok(all)
}

/// Calls with every paragraph of a list, its last line's end included.
fn paragraphs(list: &Path, mut each: impl FnMut(&str) -> Result<(), BuildError>) -> Result<(), BuildError> {
    let failed = |error| BuildError::io("read", list, error);
    let mut file = BufReader::with_capacity(1 << 18, File::open(list).map_err(failed)?);
    let mut text = String::new();
    loop {
        let start = text.len();
        let end = file.read_line(&mut text).map_err(failed)? == 0;
        if end || text[start..].trim_end().is_empty() {
            text.truncate(start);
            if !text.is_empty() {
                each(&text)?;
                text.clear();
            }
        }
        if end {
            return Ok(());
        }
    }
}

fn parse(text: &str) -> (&str, Version) {
    let (mut name, mut version) = ("", Version::default());
    for line in text.lines() {
        match line.split_once(": ") {
            Some(("Package", value)) => name = value,
            Some(("Version", value)) => value.clone_into(&mut version.number),
            Some(("Architecture", value)) => value.clone_into(&mut version.arch),
            Some(("SHA256", value)) => value.clone_into(&mut version.sha256),
            _ => {}
        }
    }
    (name, version)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "Package: vim\nVersion: 2:9\nArchitecture: amd64\nDescription: x\n Package: no\nSHA256: aa\n\n\
        Package: zsh\nVersion: 5\nArchitecture: all\nSHA256: bb\n";

    #[test]
    fn only_installed_packages_are_listed() {
        let status = tempfile::NamedTempFile::new().unwrap();
        let text = "Package: dpkg\nStatus: install ok installed\nVersion: 1.21.22\nArchitecture: amd64\n\n\
            Package: gone\nStatus: deinstall ok config-files\nVersion: 1\nArchitecture: all\n\n\
            Package: base-files\nStatus: install ok installed\nVersion: 12\nArchitecture: amd64\n";
        std::fs::write(status.path(), text).unwrap();
        let names: Vec<String> = installed(status.path()).unwrap().into_iter().map(|package| package.name).collect();
        assert_eq!(names, ["base-files", "dpkg"]);
    }

    #[test]
    fn lists_are_read_and_narrowed() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("host_dists_x_main_binary-amd64_Packages");
        std::fs::write(&list, LIST).unwrap();
        std::fs::write(directory.path().join("host_dists_x_InRelease"), "x").unwrap();
        let index = Index::read(directory.path()).unwrap();
        let vim = Version { number: "2:9".to_owned(), arch: "amd64".to_owned(), sha256: "aa".to_owned() };
        assert_eq!(index.versions("vim"), [vim]);
        assert_eq!(index.versions("no"), []);
        assert_eq!(index.names().count(), 2);

        let narrowed = directory.path().join("narrowed");
        std::fs::create_dir(&narrowed).unwrap();
        index.write_narrowed(&narrowed, |name, version| name == "zsh" && version.number == "5").unwrap();
        let text = std::fs::read_to_string(narrowed.join(list.file_name().unwrap())).unwrap();
        assert_eq!(text, "Package: zsh\nVersion: 5\nArchitecture: all\nSHA256: bb\n\n");
        assert_eq!(Index::read(&narrowed).unwrap().versions("vim"), []);
    }
}
