//! `--repo`: a repository beside the image's own, for the time of one command. The image's package manager finds it without any
//! set-up; nothing of it stays in the tree.
//!
//! A directory of packages on this host is taken as it is, since who names it vouches for it: it is shown read-only. A file with
//! a source (`.sources`, `.list`, `.repo`) is laid in as it is, with the keys that it names on this host; one that names none
//! must say itself that it is trusted.

use super::trial::Trial;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// Below `/run` of the image: directories of packages, their indexes, keys.
pub(super) const PLACE: &str = "imgutil";

/// Largest source file that is read.
const FILE_LIMIT: u64 = 1 << 20;

/// A repository that the user adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// A directory of .deb files.
    Debs,
    /// A directory with `repodata`.
    Rpms,
    /// A source for apt, in either of its forms.
    AptSource(&'static str),
    /// A source for dnf or zypper.
    RpmSource,
}

/// Why a repository cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// Neither.
    #[error(
        "'{0}' is no repository: give a directory with .deb files or with repodata (createrepo_c makes it), or a file \
         NAME.sources, NAME.list or NAME.repo"
    )]
    None(PathBuf),
    /// It cannot be read.
    #[error("cannot read the repository '{0}': {1}")]
    Read(PathBuf, std::io::Error),
    /// It cannot be checked.
    #[error("'{path}' names no key for a repository: {advice}")]
    NoKey {
        /// The file.
        path: PathBuf,
        /// What to write.
        advice: &'static str,
    },
    /// The key is not there.
    #[error("the key '{key}' that '{path}' names cannot be read: {source}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The image has another package manager.
    #[error("'{path}' is for {wanted}, which this image does not have ('{directory}' is missing in it)")]
    Manager {
        /// The repository.
        path: PathBuf,
        /// apt, or dnf and zypper.
        wanted: &'static str,
        /// Where its sources would be.
        directory: &'static str,
    },
    /// The image could not list the packages.
    #[error("cannot list the packages in '{path}': {reason}")]
    Index {
        /// The directory.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Something that the image is to see for the time of a command.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// Files of `/run`: path from there, content.
    pub(super) in_run: Vec<(String, Vec<u8>)>,
    /// Files over others: path from the root, content.
    pub(super) over: Vec<(PathBuf, Vec<u8>)>,
    /// Directories of the host, with their place in the image.
    pub(super) binds: Vec<super::Bind>,
}

impl FromStr for Repository {
    type Err = RepositoryError;

    fn from_str(text: &str) -> Result<Self, RepositoryError> {
        let path = Path::new(text);
        let read = |error| RepositoryError::Read(path.to_path_buf(), error);
        let path = path.canonicalize().map_err(read)?;
        let extension = path.extension().and_then(|end| end.to_str());
        let kind = if path.is_dir() {
            if path.join("repodata/repomd.xml").is_file() {
                Kind::Rpms
            } else if has_debs(&path).map_err(read)? {
                Kind::Debs
            } else {
                return Err(RepositoryError::None(path));
            }
        } else {
            match extension {
                Some("sources") => Kind::AptSource("sources"),
                Some("list") => Kind::AptSource("list"),
                Some("repo") => Kind::RpmSource,
                _ => return Err(RepositoryError::None(path)),
            }
        };
        Ok(Self { path, kind })
    }
}

fn has_debs(directory: &Path) -> std::io::Result<bool> {
    for entry in std::fs::read_dir(directory)? {
        if entry?.path().extension().is_some_and(|end| end == "deb") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Prints an index of the packages in `$1`, whose place for apt is `$2`: what `dpkg-deb` says of each, and where its file is.
const INDEX: &str = "for deb in \"$1\"/*.deb; do \
    dpkg-deb -f \"$deb\" || exit 1; sum=$(sha256sum <\"$deb\") || exit 1; \
    printf 'Filename: %s/%s\\nSize: %s\\nSHA256: %s\\n\\n' \"$2\" \"${deb##*/}\" \"$(stat -c %s \"$deb\")\" \"${sum%% *}\"; \
    done";

impl Repository {
    /// What the image at `tree` is to see of it; `number` tells it from others.
    pub(super) fn shown(
        &self,
        number: usize,
        tree: &Path,
        trial: Option<&Arc<Trial>>,
    ) -> Result<Shown, RepositoryError> {
        let mut shown = Shown::default();
        let bound = format!("{PLACE}/repository-{number}");
        match &self.kind {
            Kind::Debs => {
                self.wants(tree, "apt", "etc/apt/sources.list.d")?;
                self.bind(&bound, &mut shown);
                let index = self.index(tree, &format!("repository-{number}"), trial)?;
                shown.in_run.push((format!("{PLACE}/index-{number}/Packages"), index));
                let source = format!(
                    "# Shown by imgutil exec: {}\nTypes: deb\nURIs: file:/run/{PLACE}\nSuites: index-{number}/\nTrusted: yes\n",
                    self.path.display().to_string().replace('\n', "?")
                );
                shown
                    .over
                    .push((format!("etc/apt/sources.list.d/imgutil-{number}.sources").into(), source.into_bytes()));
            }
            Kind::Rpms => {
                self.bind(&bound, &mut shown);
                let source = format!(
                    "[imgutil-{number}]\nname=imgutil exec --repo\nbaseurl=file:///run/{bound}\nenabled=1\nautorefresh=1\n\
                     gpgcheck=0\nrepo_gpgcheck=0\npkg_gpgcheck=0\n"
                );
                shown.over.push((self.rpm_source(number, tree)?, source.into_bytes()));
            }
            Kind::AptSource(form) => {
                self.wants(tree, "apt", "etc/apt/sources.list.d")?;
                let text = self.with_keys(number, &mut shown)?;
                shown.over.push((format!("etc/apt/sources.list.d/imgutil-{number}.{form}").into(), text.into_bytes()));
            }
            Kind::RpmSource => {
                let place = self.rpm_source(number, tree)?;
                let text = self.with_keys(number, &mut shown)?;
                shown.over.push((place, text.into_bytes()));
            }
        }
        Ok(shown)
    }

    fn bind(&self, place: &str, shown: &mut Shown) {
        let target = Path::new("/run").join(place);
        shown.binds.push(super::Bind { source: self.path.clone(), target, writable: false });
    }

    fn wants(&self, tree: &Path, wanted: &'static str, directory: &'static str) -> Result<(), RepositoryError> {
        if tree.join(directory).is_dir() {
            return Ok(());
        }
        Err(RepositoryError::Manager { path: self.path.clone(), wanted, directory })
    }

    /// Where dnf or zypper looks for sources, whichever the image has.
    fn rpm_source(&self, number: usize, tree: &Path) -> Result<PathBuf, RepositoryError> {
        let zypper = "etc/zypp/repos.d";
        let directory = if tree.join(zypper).is_dir() { zypper } else { "etc/yum.repos.d" };
        self.wants(tree, "dnf or zypper", directory)?;
        Ok(Path::new(directory).join(format!("imgutil-{number}.repo")))
    }

    /// The index of a directory of .deb files, by the image's own dpkg: any host can do that.
    fn index(&self, tree: &Path, place: &str, trial: Option<&Arc<Trial>>) -> Result<Vec<u8>, RepositoryError> {
        let failed = |reason: String| RepositoryError::Index { path: self.path.clone(), reason };
        let directory = "/run/imgutil-packages";
        let command = ["sh", "-c", INDEX, "sh", directory, place].map(Into::into).to_vec();
        let mut options = super::Options::in_tree(tree, command).map_err(|error| failed(error.to_string()))?;
        options.network = super::Network::None;
        // The tree is held by it.
        options.trial = trial.cloned();
        options.binds.push(super::Bind { source: self.path.clone(), target: directory.into(), writable: false });
        let mut run = || -> Result<(Vec<u8>, super::Outcome), String> {
            let above = |fd: &dyn std::os::fd::AsFd| rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 3);
            let text = |error: rustix::io::Errno| error.to_string();
            let null = std::fs::File::open("/dev/null").map_err(|error| error.to_string())?;
            // A file, not a pipe: nobody has to read while it is written.
            let mut output = tempfile::tempfile().map_err(|error| error.to_string())?;
            options.stdio = Some([
                above(&null).map_err(text)?,
                above(&output).map_err(text)?,
                above(&std::io::stderr()).map_err(text)?,
            ]);
            let finished = super::run(&options, None).map_err(|error| error.to_string())?;
            let mut index = Vec::new();
            std::io::Seek::rewind(&mut output)
                .and_then(|()| std::io::Read::read_to_end(&mut output, &mut index))
                .map_err(|error| error.to_string())?;
            Ok((index, finished.outcome))
        };
        match run() {
            Ok((index, super::Outcome::Exited(0))) => Ok(index),
            Ok((_, outcome)) => Err(failed(format!("dpkg-deb in the image ended with status {}", outcome.code()))),
            Err(reason) => Err(failed(reason)),
        }
    }

    /// The text of a source file, with the keys that it names taken along.
    fn with_keys(&self, number: usize, shown: &mut Shown) -> Result<String, RepositoryError> {
        use std::io::Read as _;
        let read = |error| RepositoryError::Read(self.path.clone(), error);
        let mut text = String::new();
        std::fs::File::open(&self.path).map_err(read)?.take(FILE_LIMIT).read_to_string(&mut text).map_err(read)?;
        for section in sections(&text, &self.kind) {
            if !section.is_checked {
                let advice = match self.kind {
                    Kind::RpmSource => "add 'gpgkey=' and 'gpgcheck=1', or say 'gpgcheck=0' if you trust it as it is",
                    _ => {
                        "add 'Signed-By:' (in a list: [signed-by=KEY]), or say 'Trusted: yes' ([trusted=yes]) if you trust it as it is"
                    }
                };
                return Err(RepositoryError::NoKey { path: self.path.clone(), advice });
            }
            for key in section.keys {
                let content = std::fs::read(key.trim_start_matches("file://"))
                    .map_err(|source| RepositoryError::Key { path: self.path.clone(), key: key.clone(), source })?;
                let binary = Path::new(&key).extension().is_some_and(|end| end == "gpg");
                let extension = if binary { "gpg" } else { "asc" };
                let place = format!("{PLACE}/key-{number}-{}.{extension}", shown.in_run.len());
                let scheme = if key.starts_with("file://") { "file://" } else { "" };
                text = text.replace(&key, &format!("{scheme}/run/{place}"));
                shown.in_run.push((place, content));
            }
        }
        Ok(text)
    }
}

/// What one repository of a source file says of its keys.
#[derive(Debug, Default, PartialEq, Eq)]
struct Section {
    /// It names a key, or says that it is trusted without.
    is_checked: bool,
    /// Files of this host.
    keys: Vec<String>,
}

fn sections(text: &str, kind: &Kind) -> Vec<Section> {
    let lines = || text.lines().map(str::trim_end).filter(|line| !line.trim_start().starts_with('#'));
    match kind {
        // One line is one repository: deb [option=value …] uri suite component…
        Kind::AptSource("list") => lines()
            .filter(|line| !line.trim().is_empty())
            .map(|line| {
                let options =
                    line.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("", |(inside, _)| inside);
                let value = |name: &str| options.split_whitespace().find_map(|option| option.strip_prefix(name));
                section(value("signed-by="), value("trusted=") == Some("yes"), ',')
            })
            .collect(),
        Kind::RpmSource => grouped(lines(), |line| line.starts_with('['))
            .into_iter()
            .map(|lines| {
                let value = |name: &str| {
                    lines.iter().find_map(|line| {
                        line.split_once('=').filter(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
                    })
                };
                let checks = value("gpgcheck").is_some_and(|value| matches!(value, "1" | "yes" | "true"));
                let section = section(value("gpgkey").filter(|_| checks), value("gpgcheck") == Some("0"), ' ');
                // Keys of the network are fetched, and asked about, by the package manager itself.
                Section { keys: section.keys.into_iter().filter(|key| key.starts_with("file://")).collect(), ..section }
            })
            .collect(),
        _ => grouped(lines(), |line| line.trim().is_empty())
            .into_iter()
            .map(|lines| {
                let value = |name: &str| {
                    lines.iter().find_map(|line| {
                        line.split_once(':')
                            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
                            .map(|(_, value)| value.trim())
                    })
                };
                let inline = value("Signed-By") == Some("");
                let section = section(value("Signed-By").filter(|_| !inline), value("Trusted") == Some("yes"), ' ');
                Section { is_checked: section.is_checked || inline, ..section }
            })
            .collect(),
    }
}

fn section(keys: Option<&str>, trusted: bool, between: char) -> Section {
    let keys: Vec<String> = keys
        .into_iter()
        .flat_map(|keys| keys.split(between))
        .map(str::trim)
        // A fingerprint stands for a key that the image has.
        .filter(|key| !key.is_empty())
        .map(str::to_owned)
        .collect();
    let is_checked = trusted || !keys.is_empty();
    let files = |key: &String| key.starts_with('/') || key.starts_with("file://");
    Section { is_checked, keys: keys.into_iter().filter(files).collect() }
}

/// Lines in groups; a line of which `starts` is true begins one. Groups without a line that says something are left out.
fn grouped<'a>(lines: impl Iterator<Item = &'a str>, starts: impl Fn(&str) -> bool) -> Vec<Vec<&'a str>> {
    let mut groups: Vec<Vec<&str>> = vec![Vec::new()];
    for line in lines {
        if starts(line) {
            groups.push(Vec::new());
        }
        if let Some(group) = groups.last_mut()
            && !line.trim().is_empty()
        {
            group.push(line);
        }
    }
    groups.retain(|group| !group.is_empty());
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_repository_of_a_file_must_say_how_it_is_checked() {
        let found = |kind, text: &str| -> Vec<(bool, Vec<String>)> {
            sections(text, &kind).into_iter().map(|section| (section.is_checked, section.keys)).collect()
        };
        let keys = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            found(
                Kind::AptSource("list"),
                "# deb http://x a\n\ndeb [arch=amd64 signed-by=/k.asc,/l.gpg] http://x a b\ndeb http://y a\ndeb [trusted=yes] http://z ./\n"
            ),
            [(true, keys(&["/k.asc", "/l.gpg"])), (false, keys(&[])), (true, keys(&[]))]
        );
        assert_eq!(
            found(
                Kind::AptSource("sources"),
                "Types: deb\nURIs: http://x\nSigned-By: /k.asc\n\n\nTypes: deb\nURIs: http://y\n\nTypes: deb\nSigned-By:\n -----BEGIN\n .\n"
            ),
            [(true, keys(&["/k.asc"])), (false, keys(&[])), (true, keys(&[]))]
        );
        assert_eq!(
            found(
                Kind::RpmSource,
                "[a]\nbaseurl=http://x\ngpgcheck=1\ngpgkey=file:///k https://y/k\n[b]\nbaseurl=http://y\n[c]\ngpgcheck=0\n[d]\ngpgcheck = 1\n"
            ),
            [(true, keys(&["file:///k"])), (false, keys(&[])), (true, keys(&[])), (false, keys(&[]))]
        );
    }

    #[test]
    fn what_is_no_repository_is_said_to_be_none() {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name).display().to_string();
        std::fs::create_dir_all(scratch.path().join("rpms/repodata")).unwrap();
        std::fs::create_dir(scratch.path().join("empty")).unwrap();
        for name in ["rpms/repodata/repomd.xml", "a.repo", "b.sources", "c.list", "d.txt", "x.deb"] {
            std::fs::write(scratch.path().join(name), "").unwrap();
        }
        for (name, kind) in [
            ("rpms", Some(Kind::Rpms)),
            ("", Some(Kind::Debs)),
            ("a.repo", Some(Kind::RpmSource)),
            ("b.sources", Some(Kind::AptSource("sources"))),
            ("c.list", Some(Kind::AptSource("list"))),
            ("d.txt", None),
            ("empty", None),
            ("missing", None),
        ] {
            assert_eq!(path(name).parse::<Repository>().ok().map(|repository| repository.kind), kind, "{name}");
        }
    }
}
