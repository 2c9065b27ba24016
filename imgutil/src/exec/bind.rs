//! `-v SRC[:DST[:rw]]`: which part of the host a command in an image sees, and whether it may write there.

use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

/// One file or directory of the host shown inside the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute path inside the image, without `..`.
    pub target: PathBuf,
    /// Whether the command may write to it.
    pub writable: bool,
}

/// Why a bind was not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BindError {
    /// More than two colons, or an empty part.
    #[error("'{0}' is not SRC[:DST[:rw]]")]
    Form(String),
    /// Neither `rw` nor `ro` after the second colon.
    #[error("'{mode}' in '{text}' is neither 'rw' nor 'ro'")]
    Mode {
        /// The word that stands there.
        mode: String,
        /// The whole argument.
        text: String,
    },
    /// The path in the image cannot be mounted over.
    #[error("'{0}' cannot be a place in the image: give an absolute path below '/' without '..'")]
    Target(String),
    /// The working directory is unknown, so that a relative SRC means nothing.
    #[error("cannot make '{0}' absolute: {1}")]
    Relative(String, String),
}

impl FromStr for Bind {
    type Err = BindError;

    fn from_str(text: &str) -> Result<Self, BindError> {
        let mut parts = text.split(':');
        let source = parts.next().unwrap_or_default();
        let target = parts.next();
        let mode = parts.next();
        if parts.next().is_some() || source.is_empty() || target.is_some_and(str::is_empty) {
            return Err(BindError::Form(text.to_owned()));
        }
        let writable = match mode {
            None | Some("ro") => false,
            Some("rw") => true,
            Some(mode) => return Err(BindError::Mode { mode: mode.to_owned(), text: text.to_owned() }),
        };
        let source =
            std::path::absolute(source).map_err(|error| BindError::Relative(source.to_owned(), error.to_string()))?;
        let target = target.map_or_else(|| source.clone(), PathBuf::from);
        if !usable_target(&target) {
            return Err(BindError::Target(target.display().to_string()));
        }
        Ok(Self { source, target, writable })
    }
}

fn usable_target(path: &Path) -> bool {
    path.is_absolute()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        && path.components().count() > 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binds_are_read_only_unless_they_say_rw() {
        let bind = |source: &str, target: &str, writable| {
            Ok(Bind { source: PathBuf::from(source), target: PathBuf::from(target), writable })
        };
        let cases: [(&str, Result<Bind, BindError>); 10] = [
            ("/a", bind("/a", "/a", false)),
            ("/a:/b", bind("/a", "/b", false)),
            ("/a:/b:ro", bind("/a", "/b", false)),
            ("/a:/b:rw", bind("/a", "/b", true)),
            ("/a:/b:w", Err(BindError::Mode { mode: "w".to_owned(), text: "/a:/b:w".to_owned() })),
            ("/a:/b:rw:x", Err(BindError::Form("/a:/b:rw:x".to_owned()))),
            ("", Err(BindError::Form(String::new()))),
            ("/a:", Err(BindError::Form("/a:".to_owned()))),
            ("/a:b", Err(BindError::Target("b".to_owned()))),
            ("/a:/b/../c", Err(BindError::Target("/b/../c".to_owned()))),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<Bind>(), expected, "{text}");
        }
        assert!("/a:/".parse::<Bind>().is_err(), "the root itself is the image's");
    }
}
