//! Names, paths and numbers of a recipe, each checked while it is parsed: what stands in one of these types can become an
//! argument of a command or a path in a tree.

use serde::{Deserialize, Deserializer};
use std::path::{Component, Path, PathBuf};

/// A text that one check lets through.
macro_rules! checked {
    ($(#[$doc:meta])* $name:ident($inner:ty), $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
        pub struct $name(pub $inner);

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let check: fn(&str) -> Result<$inner, String> = $check;
                check(text).map(Self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

checked!(
    /// A name of a user, group, unit or locale, and no option.
    Name(String),
    |text| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.@:\\".contains(c);
        if text.is_empty() || text.starts_with('-') || !text.chars().all(allowed) {
            return Err(format!("'{text}' is no name of a user, group, unit or locale"));
        }
        Ok(text.to_owned())
    }
);

checked!(
    /// A package to install, or with a hyphen before it one to leave out.
    PackageWord(String),
    |text| {
        if !is_package_name(text.strip_prefix('-').unwrap_or(text)) {
            return Err(format!("'{text}' is no package name"));
        }
        Ok(text.to_owned())
    }
);

checked!(
    /// A shell command.
    Command(String),
    |text| {
        if text.trim().is_empty() || text.contains('\0') {
            return Err(format!("'{text}' is no command"));
        }
        Ok(text.to_owned())
    }
);

checked!(
    /// An absolute path in the image, without `..`.
    TreePath(PathBuf),
    |text| {
        let path = Path::new(text);
        let clean = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !path.is_absolute() || !clean || path.file_name().is_none() || text.contains(char::is_control) {
            return Err(format!("'{text}': the path must be absolute and without '..'"));
        }
        Ok(path.to_path_buf())
    }
);

checked!(
    /// An address that can stand in a list of repositories; may be empty.
    Uri(String),
    |text| check_uri(text).map(|()| text.to_owned())
);

checked!(
    /// A word without blanks.
    Plain(String),
    |text| {
        if text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(format!("'{text}' is no suite or component"));
        }
        Ok(text.to_owned())
    }
);

checked!(
    /// One line of text.
    Line(String),
    |text| {
        if text.trim().is_empty() || text.contains(char::is_control) {
            return Err(format!("'{text}' is not one line"));
        }
        Ok(text.to_owned())
    }
);

checked!(
    /// A name in the data base of time zones.
    TimeZone(String),
    |text| {
        let part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "+-_".contains(c))
        };
        if !text.split('/').all(part) {
            return Err(format!("'{text}' is no time zone; write it as Europe/Berlin"));
        }
        Ok(text.to_owned())
    }
);

checked!(
    /// Permission bits.
    Mode(u32),
    |text| match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err(format!("'{text}' is no file mode; write it in octal, as \"0644\"")),
    }
);

/// Owner and group of a file, by name or number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub user: String,
    /// The group; the user's own if left out.
    pub group: Option<String>,
}

impl std::str::FromStr for Owner {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let name = |name: &str| name.parse::<Name>().is_ok_and(|name| !name.0.contains(':'));
        if !name(user) || !group.is_none_or(name) {
            return Err(format!("'{text}' is no owner; write it as \"user\", \"user:group\" or with numbers"));
        }
        Ok(Self { user: user.to_owned(), group: group.map(str::to_owned) })
    }
}

impl<'de> Deserialize<'de> for Owner {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// An address that can stand in a list of repositories.
fn check_uri(uri: &str) -> Result<(), String> {
    if uri.contains(|c: char| c.is_whitespace() || c.is_control() || c == '[' || c == ']') {
        return Err(format!("'{uri}' is no address of a repository"));
    }
    Ok(())
}

/// A package's word taken apart: its name and, where it has one, its architecture (`vim:amd64`). A version or release (`=`, `/`) is none of
/// either.
#[must_use]
pub fn name_and_arch(word: &str) -> (&str, Option<&str>) {
    let word = word.split(['=', '/']).next().unwrap_or_default();
    word.split_once(':').map_or((word, None), |(name, arch)| (name, Some(arch)))
}

/// Whether two words can mean one package: a word without an architecture means it in any.
#[must_use]
pub fn is_same_package(one: &str, other: &str) -> bool {
    let ((name, arch), (other_name, other_arch)) = (name_and_arch(one), name_and_arch(other));
    name == other_name && (arch.is_none() || other_arch.is_none() || arch == other_arch)
}

/// Whether `name` can be a package of any family: name, optional architecture, optional version or release; or `@` and a group
/// of packages. A pattern, a removal of apt ("name-") or an option is none.
#[must_use]
pub fn is_package_name(name: &str) -> bool {
    let (name, rest) = name.split_at(name.find([':', '=', '/']).unwrap_or(name.len()));
    let plain = name.strip_prefix('@').unwrap_or(name);
    let name_ok = name.len() > 1
        && plain.starts_with(|c: char| c.is_ascii_alphanumeric())
        && plain.chars().all(|c| c.is_ascii_alphanumeric() || "+-._~^".contains(c))
        && !name.ends_with('-');
    name_ok && rest.chars().all(|c| c.is_ascii_alphanumeric() || ":=/+-.~^_".contains(c))
}
