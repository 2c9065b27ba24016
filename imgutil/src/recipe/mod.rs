//! The recipe file of `imgutil build`: what an image is made of, in TOML. Parsing and checking only, nothing is fetched here.
//!
//! `item` holds entries with conditions, `words` the names and paths that are checked while they are parsed (so that an
//! error has its line), `include` the reading of a recipe with the files it includes.

mod include;
mod item;
mod words;

pub use item::{Item, Target, When};
pub use words::{
    Command, Line, Mode, Name, Owner, PackageWord, Plain, TimeZone, TreePath, Uri, is_package_name, is_same_package,
    name_and_arch,
};

use item::{items, strings};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// What an image is made of.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Recipe {
    /// More recipes that this one builds upon: lists begin with theirs, single values of this one win.
    #[serde(default, deserialize_with = "strings")]
    pub include: Vec<String>,
    /// Operating system, as `debian-12`.
    pub os: Option<String>,
    /// Architecture, as `amd64` or `x86_64`; the host's if left out.
    pub arch: Option<String>,
    /// How much is installed before `packages`.
    pub base: Option<Base>,
    /// Main archive instead of the distribution's own.
    pub mirror: Option<Uri>,
    /// Archive of security updates instead of the distribution's own; empty for none.
    pub security_mirror: Option<Uri>,
    /// More repositories.
    #[serde(default, rename = "repository")]
    pub repositories: Vec<Repository>,
    /// More packages; `-name` takes one away.
    #[serde(default, deserialize_with = "items")]
    pub packages: Vec<Item<PackageWord>>,
    /// Packages that are not to be installed, whoever asks for them.
    #[serde(default, deserialize_with = "items")]
    pub remove: Vec<Item<PackageWord>>,
    /// Groups to make.
    #[serde(default, rename = "group")]
    pub groups: Vec<Group>,
    /// Users to make.
    #[serde(default, rename = "user")]
    pub users: Vec<User>,
    /// Files, directories and links to lay in after the packages are installed and the users made.
    #[serde(default, rename = "file")]
    pub files: Vec<File>,
    /// Units to enable.
    #[serde(default, deserialize_with = "items")]
    pub services: Vec<Item<Name>>,
    /// Units to disable.
    #[serde(default, deserialize_with = "items")]
    pub disable: Vec<Item<Name>>,
    /// System locale, as `C.UTF-8`.
    pub locale: Option<Name>,
    /// Time zone, as `Europe/Berlin`.
    pub timezone: Option<TimeZone>,
    /// Shell commands to run in the image, in order, each by `sh -e`.
    #[serde(default, deserialize_with = "items")]
    pub run: Vec<Item<Command>>,
    /// The recipe files that this came from, as they were named.
    #[serde(skip)]
    pub read_from: Vec<PathBuf>,
}

/// How much is installed before the recipe's own packages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// Everything a node needs to boot: kernel, systemd, ssh, agent, initramfs module.
    #[default]
    Node,
    /// Essential packages and the package manager: for containers and tests.
    Minimal,
}

/// A repository beside the distribution's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "RawRepository")]
pub struct Repository {
    /// Its address.
    pub uri: String,
    /// Its suites, where the distribution's archives have such.
    pub suites: Vec<String>,
    /// Their components; empty for a flat archive.
    pub components: Vec<String>,
    /// How its signatures are checked.
    pub key: Key,
    /// Whether its index is signed. An archive of apt always has to; an RPM repository that does not sign its index still has
    /// to sign its packages.
    pub signed_metadata: bool,
    /// When it counts.
    pub when: When,
}

/// How a repository's signatures are checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// By the public keys in this file, armoured (`.asc`) or binary (`.gpg`).
    File(PathBuf),
    /// By this public key, armoured.
    Text(String),
    /// Not at all: the recipe says so of this repository.
    Unsigned,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawRepository {
    uri: Uri,
    #[serde(default)]
    suites: Vec<Plain>,
    #[serde(default)]
    components: Vec<Plain>,
    key: Option<String>,
    #[serde(default)]
    unsigned: bool,
    signed_metadata: Option<bool>,
    #[serde(default, deserialize_with = "strings")]
    arch: Vec<String>,
    #[serde(default, deserialize_with = "strings")]
    os: Vec<String>,
    version: Option<String>,
}

impl TryFrom<RawRepository> for Repository {
    type Error = String;

    fn try_from(raw: RawRepository) -> Result<Self, String> {
        let key = match (raw.key, raw.unsigned) {
            (Some(text), false) if text.trim_start().starts_with("-----BEGIN PGP PUBLIC KEY BLOCK-----") => {
                Key::Text(text)
            }
            (Some(path), false) if !path.is_empty() && !path.contains('\n') => Key::File(PathBuf::from(path)),
            (Some(_), false) => {
                return Err(format!("repository '{}': 'key' is neither a path nor a public key", raw.uri.0));
            }
            (None, true) => Key::Unsigned,
            (Some(_), true) => return Err(format!("repository '{}' has a key: it is not 'unsigned'", raw.uri.0)),
            (None, false) => {
                return Err(format!(
                    "repository '{}' has no key: give 'key', a file or the armoured text of its public key (or, if nobody signs \
                     it and you trust the way to it, unsigned = true)",
                    raw.uri.0
                ));
            }
        };
        if raw.uri.0.is_empty() {
            return Err("a repository needs an address".to_owned());
        }
        let plain = |words: Vec<Plain>| words.into_iter().map(|word| word.0).collect();
        Ok(Self {
            uri: raw.uri.0,
            suites: plain(raw.suites),
            components: plain(raw.components),
            key,
            signed_metadata: raw.signed_metadata.unwrap_or(true),
            when: When::new(raw.arch, raw.os, raw.version.as_deref())?,
        })
    }
}

/// A file, directory or link of the image.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "RawFile")]
pub struct File {
    /// Absolute path in the image.
    pub path: TreePath,
    /// What is to be there.
    pub what: What,
    /// Permission bits; of a copied directory those of every file are the source's.
    pub mode: Option<Mode>,
    /// Whose it is; root's if left out.
    pub owner: Option<Owner>,
    /// When it counts.
    pub when: When,
}

/// What a file entry brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A copy of a file of the host, or of a directory with everything in it.
    Copy(PathBuf),
    /// A text.
    Text(String),
    /// A symbolic link to this.
    Link(String),
    /// A directory.
    Directory,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    path: TreePath,
    source: Option<PathBuf>,
    content: Option<String>,
    link: Option<String>,
    #[serde(default)]
    directory: bool,
    mode: Option<Mode>,
    owner: Option<Owner>,
    #[serde(default, deserialize_with = "strings")]
    arch: Vec<String>,
    #[serde(default, deserialize_with = "strings")]
    os: Vec<String>,
    version: Option<String>,
}

impl TryFrom<RawFile> for File {
    type Error = String;

    fn try_from(raw: RawFile) -> Result<Self, String> {
        let shown = raw.path.0.display().to_string();
        let what = match (raw.source, raw.content, raw.link, raw.directory) {
            (Some(source), None, None, false) => What::Copy(source),
            (None, Some(text), None, false) => What::Text(text),
            (None, None, Some(target), false) if !target.is_empty() => What::Link(target),
            (None, None, None, true) => What::Directory,
            _ => return Err(format!("file '{shown}': give one of 'source', 'content', 'link' and 'directory'")),
        };
        if matches!(what, What::Link(_)) && raw.mode.is_some() {
            return Err(format!("file '{shown}': a link has no mode"));
        }
        let when = When::new(raw.arch, raw.os, raw.version.as_deref())?;
        Ok(Self { path: raw.path, what, mode: raw.mode, owner: raw.owner, when })
    }
}

/// A group of the image.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its name.
    pub name: Name,
    /// Number; chosen by the image if left out.
    pub gid: Option<u32>,
    /// Whether its number comes from those of the system.
    #[serde(default)]
    pub system: bool,
}

/// A user of the image, without a password.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct User {
    /// Login name.
    pub name: Name,
    /// Number; chosen by the image if left out.
    pub uid: Option<u32>,
    /// Group, which must be there; one of the user's own name is made if left out.
    pub group: Option<Name>,
    /// Groups beside that.
    #[serde(default)]
    pub groups: Vec<Name>,
    /// Login shell.
    pub shell: Option<TreePath>,
    /// Home directory; `/home/NAME` if left out.
    pub home: Option<TreePath>,
    /// A user for a service: a number of the system's, and no home is made.
    #[serde(default)]
    pub system: bool,
    /// Lines for `authorized_keys`.
    #[serde(default)]
    pub ssh_keys: Vec<Line>,
}

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// It cannot be read.
    #[error("cannot read the recipe '{0}': {1}")]
    Read(PathBuf, std::io::Error),
    /// It is not a recipe.
    #[error("recipe '{path}', line {line}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong, in one line.
        message: String,
    },
    /// A file that it includes cannot be included.
    #[error("recipe '{path}' cannot include '{included}': {message}")]
    Include {
        /// The file that includes.
        path: PathBuf,
        /// The file that is to be included.
        included: PathBuf,
        /// Why not.
        message: String,
    },
}

impl Recipe {
    /// Reads and checks a recipe file and all that it includes. Relative paths start from the directory of the file they are in.
    pub fn read(path: &Path) -> Result<Self, RecipeError> {
        include::read(path)
    }

    /// Parses the text of a recipe without what it includes; `path` is for errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, RecipeError> {
        toml::from_str(text).map_err(|error| RecipeError::Parse {
            path: path.to_path_buf(),
            line: error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1),
            message: error.message().lines().collect::<Vec<_>>().join(" "),
        })
    }
}

#[cfg(test)]
mod tests;
