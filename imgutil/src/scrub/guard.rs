//! Refuses private keys: an image goes to every node, so no key may be in it that nobody has thought of.

use super::ViewOptions;
use super::keys;
use super::owned::Owned;
use super::pattern::Patterns;
use super::rules::{KEY_NAMES, KEY_PATHS};
use anyhow::{Result, bail};
use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What is a key, which ones are allowed, and which ones were found.
pub(crate) struct KeyRules {
    allowed: Patterns,
    names: Patterns,
    paths: Patterns,
    left: Vec<(PathBuf, &'static str)>,
}

impl KeyRules {
    /// With what the options allow.
    pub(crate) fn new(options: &ViewOptions) -> Result<Self> {
        let (mut allowed, mut names, mut paths) = (Patterns::default(), Patterns::default(), Patterns::default());
        for pattern in &options.allow_keys {
            allowed.add(pattern)?;
        }
        for pattern in KEY_NAMES {
            names.add(pattern.as_bytes())?;
        }
        for (_, pattern) in KEY_PATHS {
            paths.add(pattern.as_bytes())?;
        }
        Ok(Self { allowed, names, paths, left: Vec::new() })
    }

    /// What a file is, in words, if it is a key that is not allowed; by its first bytes, at most [`keys::BOUND`] of them.
    pub(crate) fn suspect(&self, path: &Path, bytes: &[u8]) -> Option<&'static str> {
        let name = path.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
        let by_name = || self.names.matches_path(Path::new(OsStr::from_bytes(name)));
        // An empty file has its place ready for a key.
        let by_path = || self.paths.match_of(path).filter(|_| !bytes.is_empty()).map(|index| KEY_PATHS[index].0);
        let of_image = || (name.ends_with(b".key") && keys::is_of_image(bytes)).then_some("the key of an image");
        let what = keys::find(bytes)
            .or_else(by_path)
            .or_else(of_image)
            .or_else(|| by_name().then_some("a key store, by its name"))?;
        (!self.allowed.matches_path(path)).then_some(what)
    }

    /// Takes down that a file is a key, and not what a package ships.
    pub(crate) fn refuse(&mut self, path: &Path, what: &'static str) {
        self.left.push((path.to_owned(), what));
    }

    /// Whether a key was found, so that nothing need be packed any more.
    pub(crate) fn refuses(&self) -> bool {
        !self.left.is_empty()
    }

    /// An error that names every key; `holder` is what the keys are in.
    pub(crate) fn finish(self, holder: &str) -> Result<()> {
        if self.left.is_empty() {
            return Ok(());
        }
        let names: Vec<String> =
            self.left.iter().map(|(path, what)| format!("'{}' ({what})", path.display())).collect();
        bail!(
            "{holder} holds {}: {}; an image goes to every node: remove {}, leave it out with --exclude, or allow it with --allow-key PATH",
            if names.len() == 1 { "a private key".to_owned() } else { format!("{} private keys", names.len()) },
            names.join(", "),
            if names.len() == 1 { "it" } else { "each" },
        )
    }
}

/// Looks for private keys in a tree that is packed.
pub(crate) struct KeyGuard<'a> {
    root: BorrowedFd<'a>,
    rules: KeyRules,
    /// Read when the first key is found: most trees have none.
    owned: Option<Owned>,
}

impl<'a> KeyGuard<'a> {
    /// Guards the tree behind `root`; `None` if nobody asked for it.
    pub(crate) fn new(root: BorrowedFd<'a>, options: &ViewOptions) -> Result<Option<Self>> {
        if !options.scrub {
            return Ok(None);
        }
        Ok(Some(Self { root, rules: KeyRules::new(options)?, owned: None }))
    }

    /// Looks at the first bytes of a file.
    pub(crate) fn look(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let Some(what) = self.rules.suspect(path, bytes) else { return Ok(()) };
        let owned = match self.owned.take() {
            Some(owned) => owned,
            None => Owned::read(self.root)?,
        };
        // What a package ships is public: a test's key, an example.
        if !owned.is_unchanged(self.root, path)? {
            self.rules.refuse(path, what);
        }
        self.owned = Some(owned);
        Ok(())
    }

    /// See [`KeyRules::refuses`].
    pub(crate) fn refuses(&self) -> bool {
        self.rules.refuses()
    }

    /// See [`KeyRules::finish`].
    pub(crate) fn finish(self) -> Result<()> {
        self.rules.finish("the tree")
    }
}
