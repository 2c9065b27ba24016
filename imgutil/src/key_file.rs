//! Key files: 64 hexadecimal digits and a newline, mode 0600. Keys never pass through arguments or the environment.

use crate::files::{Existing, NewFile, must_be_free};
use anyhow::{Context as _, Result, bail};
use moor_image::Dek;
use std::fs::File;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Longest text that is read as a key: more than a key, so that a wrong file gets the right message.
const LIMIT: u64 = 128;

/// Reads a key; `-` is standard input.
pub(crate) fn read(path: &Path) -> Result<Dek> {
    // Large enough for all that is read: growing would leave copies of the key behind.
    let mut text = Zeroizing::new(Vec::with_capacity(256));
    if path == Path::new("-") {
        std::io::stdin()
            .lock()
            .take(LIMIT)
            .read_to_end(&mut text)
            .context("cannot read the key from standard input")?;
        return Dek::from_hex(&text).context("standard input holds no key");
    }
    let file = File::open(path).with_context(|| format!("cannot open the key file '{}'", path.display()))?;
    file.take(LIMIT)
        .read_to_end(&mut text)
        .with_context(|| format!("cannot read the key file '{}'", path.display()))?;
    Dek::from_hex(&text).with_context(|| format!("'{}' holds no key", path.display()))
}

/// A key file that will appear just before its image.
pub(crate) struct NewKeyFile {
    file: NewFile,
    path: PathBuf,
}

impl NewKeyFile {
    /// Writes the key where it will be, without its name yet: that there is room for it, and that the name is free, is
    /// known before the long work.
    pub(crate) fn create(path: &Path, key: &Dek) -> Result<Self> {
        if path == Path::new("-") {
            bail!("a new key is not written to standard output: name a file for --key-file");
        }
        must_be_free(path, "a key belongs to one image, so its file is never overwritten; name another file")?;
        let file = NewFile::create(path, 0o600)?;
        let context = || format!("cannot write the key file '{}'", path.display());
        file.file().write_all(key.to_hex().as_bytes()).with_context(context)?;
        file.file().sync_all().with_context(context)?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Gives it its name, which must still be free.
    pub(crate) fn appear(self) -> Result<PlacedKeyFile> {
        self.file.appear(Existing::Refuse)?;
        Ok(PlacedKeyFile { path: Some(self.path) })
    }
}

/// A key file that is in its place, and removed again unless its image follows.
pub(crate) struct PlacedKeyFile {
    path: Option<PathBuf>,
}

impl PlacedKeyFile {
    /// The image is there: the key stays.
    pub(crate) fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for PlacedKeyFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
        {
            eprintln!("imgutil: warning: cannot remove '{}', the key of no image: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_key_is_named() {
        let work = tempfile::tempdir().expect("directory");
        let path = work.path().join("key");
        for (text, message) in [
            (String::new(), "holds no key"),
            ("ab".repeat(31), "holds no key"),
            ("ab".repeat(33), "holds no key"),
            ("zz".repeat(32), "holds no key"),
            ("a".repeat(100_000), "holds no key"),
        ] {
            std::fs::write(&path, text).expect("writes");
            let error = read(&path).err().expect("is refused");
            assert!(format!("{error:#}").contains(message), "{error:#}");
        }
        let error = read(&work.path().join("none")).err().expect("is refused");
        assert!(format!("{error:#}").contains("cannot open the key file"), "{error:#}");
    }

    #[test]
    fn a_key_file_appears_once_and_stays_only_with_its_image() {
        let work = tempfile::tempdir().expect("directory");
        let path = work.path().join("key");
        let key = Dek::generate().expect("key");
        drop(NewKeyFile::create(&path, &key).expect("creates"));
        assert!(!path.exists());
        drop(NewKeyFile::create(&path, &key).expect("creates").appear().expect("appears"));
        assert!(!path.exists());
        NewKeyFile::create(&path, &key).expect("creates").appear().expect("appears").keep();
        assert!(read(&path).expect("reads").as_bytes() == key.as_bytes());
        assert!(NewKeyFile::create(&path, &key).is_err());
    }
}
