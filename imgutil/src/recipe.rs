//! The recipe file of `imgutil build`: what an image is made of, in TOML. Parsing and checking only, nothing is fetched here.

use serde::{Deserialize, Deserializer};
use std::path::{Component, Path, PathBuf};

/// Largest recipe that is read, in bytes.
const SIZE_LIMIT: u64 = 1 << 20;

/// What an image is made of.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Recipe {
    /// Operating system, as `debian-12`.
    pub os: Option<String>,
    /// Architecture in Debian's words, as `amd64`; the host's if left out.
    pub arch: Option<String>,
    /// How much is installed before `packages`.
    #[serde(default)]
    pub base: Base,
    /// Main archive instead of the distribution's own.
    pub mirror: Option<String>,
    /// Archive of security updates instead of the distribution's own; empty for none.
    pub security_mirror: Option<String>,
    /// More archives.
    #[serde(default, rename = "repository")]
    pub repositories: Vec<Repository>,
    /// More packages.
    #[serde(default, deserialize_with = "package_names")]
    pub packages: Vec<String>,
    /// Files to lay in after the packages are installed.
    #[serde(default, rename = "file")]
    pub files: Vec<File>,
    /// Users to make.
    #[serde(default, rename = "user")]
    pub users: Vec<User>,
    /// Units to enable.
    #[serde(default)]
    pub services: Vec<String>,
    /// System locale, as `C.UTF-8`; written to `/etc/default/locale`.
    pub locale: Option<String>,
    /// Shell commands to run in the image, in order, each by `sh -e`.
    #[serde(default)]
    pub run: Vec<String>,
    /// Directory that relative paths of this recipe start from.
    #[serde(skip)]
    pub directory: PathBuf,
}

/// How much is installed before the recipe's own packages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// Everything a node needs to boot: kernel, systemd, ssh, agent, initramfs module.
    #[default]
    Node,
    /// Essential packages and apt: for containers and tests.
    Minimal,
}

/// An archive beside the distribution's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repository {
    /// Its address.
    pub uri: String,
    /// Its suites, for apt.
    #[serde(default)]
    pub suites: Vec<String>,
    /// Their components; empty for a flat archive.
    #[serde(default)]
    pub components: Vec<String>,
    /// Whether its index is signed. An archive of apt always has to; an RPM repository that does not sign its index still has
    /// to sign its packages.
    #[serde(default = "yes", rename = "signed-metadata")]
    pub signed_metadata: bool,
    /// File with the archive's public key, armoured (`.asc`) or binary (`.gpg`). There is no way round it: signatures are always checked.
    pub key: PathBuf,
}

/// A file or link of the image.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Absolute path in the image.
    pub path: PathBuf,
    /// A file of the host to copy.
    pub source: Option<PathBuf>,
    /// The text itself.
    pub content: Option<String>,
    /// Permission bits in octal; 0644 if left out.
    #[serde(default, deserialize_with = "octal")]
    pub mode: Option<u32>,
}

/// A user of the image, without a password.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Login name.
    pub name: String,
    /// Number; chosen by the image if left out.
    pub uid: Option<u32>,
    /// Groups beside the user's own.
    #[serde(default)]
    pub groups: Vec<String>,
    /// Login shell.
    pub shell: Option<String>,
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
    /// A value makes no sense.
    #[error("recipe '{path}': {message}")]
    Value {
        /// The file.
        path: PathBuf,
        /// What is wrong, in one line.
        message: String,
    },
}

impl Recipe {
    /// Reads and checks a recipe file.
    pub fn read(path: &Path) -> Result<Self, RecipeError> {
        let read = || -> std::io::Result<String> {
            use std::io::Read as _;
            let mut text = String::new();
            let length = std::fs::File::open(path)?.take(SIZE_LIMIT + 1).read_to_string(&mut text)?;
            if length as u64 > SIZE_LIMIT {
                return Err(std::io::Error::other("it is larger than 1 MiB"));
            }
            Ok(text)
        };
        let text = read().map_err(|error| RecipeError::Read(path.to_path_buf(), error))?;
        let absolute = std::path::absolute(path).map_err(|error| RecipeError::Read(path.to_path_buf(), error))?;
        let mut recipe = Self::parse(&text, path)?;
        recipe.directory = absolute.parent().unwrap_or(Path::new("/")).to_path_buf();
        Ok(recipe)
    }

    /// Parses the text of a recipe; `path` is for errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, RecipeError> {
        let recipe: Self = toml::from_str(text).map_err(|error| RecipeError::Parse {
            path: path.to_path_buf(),
            line: error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1),
            message: error.message().lines().collect::<Vec<_>>().join(" "),
        })?;
        recipe.check().map_err(|message| RecipeError::Value { path: path.to_path_buf(), message })?;
        Ok(recipe)
    }

    fn check(&self) -> Result<(), String> {
        for file in &self.files {
            let shown = file.path.display();
            let clean = file.path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
            if !file.path.is_absolute() || !clean || file.path.file_name().is_none() {
                return Err(format!("file '{shown}': the path must be absolute and without '..'"));
            }
            if file.source.is_some() == file.content.is_some() {
                return Err(format!("file '{shown}': give either 'source' or 'content'"));
            }
        }
        for user in &self.users {
            check_word("user", &user.name)?;
            for group in &user.groups {
                check_word("group", group)?;
            }
        }
        for service in &self.services {
            check_word("service", service)?;
        }
        for uri in [&self.mirror].into_iter().chain([&self.security_mirror]).flatten() {
            check_uri(uri)?;
        }
        for repository in &self.repositories {
            check_uri(&repository.uri)?;
            for word in repository.suites.iter().chain(&repository.components) {
                if word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control()) {
                    return Err(format!("repository '{}': '{word}' is no suite or component", repository.uri));
                }
            }
        }
        Ok(())
    }
}

/// Names that become arguments of a command: what useradd and systemd allow, and no option.
fn check_word(what: &str, word: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.@:\\".contains(c);
    if word.is_empty() || word.starts_with('-') || !word.chars().all(allowed) {
        return Err(format!("'{word}' is no name of a {what}"));
    }
    Ok(())
}

/// An address that can stand in a line of apt's sources.
pub fn check_uri(uri: &str) -> Result<(), String> {
    if uri.contains(|c: char| c.is_whitespace() || c.is_control() || c == '[' || c == ']') {
        return Err(format!("'{uri}' is no address of an archive"));
    }
    Ok(())
}

/// Whether a package manager would take `name` as a package: name, optional architecture, optional version or release. A
/// pattern, a removal ("name-"), a group ("@name") or an option is none.
#[must_use]
pub fn is_package_name(name: &str) -> bool {
    let (name, rest) = name.split_at(name.find([':', '=', '/']).unwrap_or(name.len()));
    // RPM knows capitals and underscores; where apt is given one, it knows no such package.
    let name_ok = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "+-._".contains(c))
        && !name.ends_with('-');
    name_ok && rest.chars().all(|c| c.is_ascii_alphanumeric() || ":=/+-.~^_".contains(c))
}

fn package_names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    match names.iter().find(|name| !is_package_name(name)) {
        Some(name) => Err(serde::de::Error::custom(format!("'{name}' is no package name"))),
        None => Ok(names),
    }
}

fn yes() -> bool {
    true
}

fn octal<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(deserializer)?;
    match u32::from_str_radix(&text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(Some(mode)),
        _ => Err(serde::de::Error::custom(format!("'{text}' is no file mode; write it in octal, as \"0644\""))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Recipe::parse(text, Path::new("r.toml")).unwrap_err().to_string()
    }

    #[test]
    fn a_recipe_says_everything_an_image_is_made_of() {
        let recipe = Recipe::parse(
            r#"
            os = "debian-12"
            arch = "amd64"
            packages = ["vim", "g++", "linux-image-6.1.0-50-amd64=6.1.1-1"]
            services = ["chrony.service"]
            run = ["echo hello > /etc/motd"]
            [[repository]]
            uri = "https://example.org/apt"
            suites = ["stable"]
            components = ["main"]
            key = "example.asc"
            [[file]]
            path = "/etc/motd.tail"
            content = "x"
            mode = "0600"
            [[user]]
            name = "op"
            groups = ["sudo"]
            "#,
            Path::new("r.toml"),
        )
        .unwrap();
        assert_eq!(recipe.os.as_deref(), Some("debian-12"));
        assert_eq!(recipe.base, Base::Node);
        assert_eq!(recipe.packages.len(), 3);
        assert_eq!(recipe.files[0].mode, Some(0o600));
        assert_eq!(recipe.users[0].groups, ["sudo"]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, expected) in [
            ("os = \"debian-12\"\npackage = []\n", "recipe 'r.toml', line 2: unknown field `package`"),
            ("os = \"debian-12\"\n\npackages = [\"v im\"]", "recipe 'r.toml', line 3: 'v im' is no package name"),
            ("packages = [\"vim-\"]", "recipe 'r.toml', line 1: 'vim-' is no package name"),
            ("packages = [\"-o\"]", "recipe 'r.toml', line 1: '-o' is no package name"),
            ("os = [", "recipe 'r.toml', line 1: "),
            ("base = \"huge\"", "recipe 'r.toml', line 1: unknown variant `huge`"),
            ("[[file]]\npath = \"/a\"", "recipe 'r.toml': file '/a': give either 'source' or 'content'"),
            ("[[file]]\npath = \"a\"\ncontent = \"\"", "recipe 'r.toml': file 'a': the path must be absolute"),
            (
                "[[file]]\npath = \"/a/../b\"\ncontent = \"\"",
                "recipe 'r.toml': file '/a/../b': the path must be absolute",
            ),
            ("[[file]]\npath = \"/a\"\ncontent = \"\"\nmode = \"9\"", "recipe 'r.toml', line 4: '9' is no file mode"),
            ("[[repository]]\nuri = \"x\"\nsuites = [\"a\"]", "recipe 'r.toml', line 1: missing field `key`"),
            ("[[user]]\nname = \"-rf\"", "recipe 'r.toml': '-rf' is no name of a user"),
            ("mirror = \"http://a b\"", "recipe 'r.toml': 'http://a b' is no address"),
        ] {
            let error = error(text);
            assert!(error.starts_with(expected), "{text:?}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
