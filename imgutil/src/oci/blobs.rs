//! Where the parts of an image come from: an OCI layout as a directory, or an archive of `podman save`, `docker save` or such a
//! directory. Parts are found by digest, and nothing is read whose digest was not checked.

use super::OciError;
use crate::tar::{Kind, LAYER, Reader};
use aws_lc_rs::digest::{Context, SHA256, SHA512};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Names in an archive, at most: a layout has a few for each layer.
const NAMES_LIMIT: usize = 20_000;

/// The name of a part: the digest of its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Digest {
    text: String,
    long: bool,
}

impl Digest {
    /// Reads `sha256:…` or `sha512:…`.
    pub(super) fn parse(text: &str) -> Result<Self, OciError> {
        let bad = || OciError::Digest(text.to_owned());
        let (algorithm, digits) = text.split_once(':').ok_or_else(bad)?;
        let long = match (algorithm, digits.len()) {
            ("sha256", 64) => false,
            ("sha512", 128) => true,
            _ => return Err(bad()),
        };
        let lower = digits.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if lower { Ok(Self { text: text.to_owned(), long }) } else { Err(bad()) }
    }

    /// As `sha256:…`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.text.replacen(':', "/", 1))
    }

    pub(super) fn hasher(&self) -> Context {
        Context::new(if self.long { &SHA512 } else { &SHA256 })
    }

    /// Whether this is the digest of what was hashed.
    pub(super) fn is(&self, hashed: Context) -> bool {
        self.text.ends_with(&hex::encode(hashed.finish()))
    }
}

/// A directory or an archive with an image.
pub(super) struct Blobs {
    path: PathBuf,
    place: Place,
}

enum Place {
    Directory(OwnedFd),
    /// The file, and where the content of each name begins and how long it is.
    Archive(File, HashMap<Vec<u8>, (u64, u64)>),
}

impl Blobs {
    /// Opens it, and lists an archive.
    pub(super) fn open(path: &Path) -> Result<Self, OciError> {
        let failed = |error: io::Error| OciError::Open(path.to_path_buf(), error);
        let file = File::open(path).map_err(failed)?;
        let place = if file.metadata().map_err(failed)?.is_dir() {
            Place::Directory(file.into())
        } else {
            let names = list(&file, path)?;
            Place::Archive(file, names)
        };
        Ok(Self { path: path.to_path_buf(), place })
    }

    /// Opens the part called `name`; `None` if there is none.
    pub(super) fn part(&self, name: &str) -> Result<Option<Part>, OciError> {
        let failed =
            |error: io::Error| OciError::Part { name: name.to_owned(), place: self.path.clone(), source: error };
        match &self.place {
            Place::Directory(directory) => {
                // A layout is read as it is: no link leads to other files of the host.
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                match crate::in_root::openat2(directory, name, flags, Mode::empty(), resolve) {
                    Ok(file) => {
                        let file = File::from(file);
                        let data = file.metadata().map_err(failed)?;
                        if !data.is_file() {
                            return Err(failed(io::Error::other("it is no file")));
                        }
                        Ok(Some(Part { file, start: 0, length: data.len() }))
                    }
                    Err(rustix::io::Errno::NOENT) => Ok(None),
                    Err(error) => Err(failed(error.into())),
                }
            }
            Place::Archive(file, names) => match names.get(name.as_bytes()) {
                None => Ok(None),
                Some((start, length)) => {
                    let file = file.try_clone().map_err(failed)?;
                    Ok(Some(Part { file, start: *start, length: *length }))
                }
            },
        }
    }

    /// Reads a small part whole.
    pub(super) fn text(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, OciError> {
        let Some(mut part) = self.part(name)? else { return Ok(None) };
        if part.length > limit {
            return Err(OciError::TooLarge { what: format!("'{name}'"), limit });
        }
        let failed = |source| OciError::Part { name: name.to_owned(), place: self.path.clone(), source };
        let mut bytes = Vec::new();
        part.read().and_then(|mut input| input.read_to_end(&mut bytes)).map_err(failed)?;
        Ok(Some(bytes))
    }

    /// The part with a digest, after all of it was read once and found to have it.
    pub(super) fn blob(&self, digest: &Digest, size: Option<u64>) -> Result<Part, OciError> {
        let name = digest.path();
        let mut part =
            self.part(&name)?.ok_or_else(|| OciError::Missing { digest: digest.clone(), place: self.path.clone() })?;
        let failed = |source| OciError::Part { name: name.clone(), place: self.path.clone(), source };
        let mut hasher = digest.hasher();
        part.read().and_then(|input| feed(input, &mut hasher)).map_err(failed)?;
        if size.is_some_and(|size| size != part.length) || !digest.is(hasher) {
            return Err(OciError::Mismatch(digest.clone()));
        }
        Ok(part)
    }

    /// A small part with a digest.
    pub(super) fn text_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, OciError> {
        let bytes = self
            .text(&digest.path(), limit)?
            .ok_or_else(|| OciError::Missing { digest: digest.clone(), place: self.path.clone() })?;
        let mut hasher = digest.hasher();
        hasher.update(&bytes);
        if digest.is(hasher) { Ok(bytes) } else { Err(OciError::Mismatch(digest.clone())) }
    }
}

/// A range of a file.
pub(super) struct Part {
    file: File,
    start: u64,
    length: u64,
}

impl Part {
    /// From its beginning.
    pub(super) fn read(&mut self) -> io::Result<impl Read + '_> {
        self.file.seek(SeekFrom::Start(self.start))?;
        Ok(BufReader::with_capacity(1 << 17, (&self.file).take(self.length)))
    }
}

fn feed(mut input: impl Read, hasher: &mut Context) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 17];
    loop {
        match input.read(&mut buffer)? {
            0 => return Ok(()),
            count => hasher.update(&buffer[..count]),
        }
    }
}

/// Where the files of an archive are in it.
fn list(file: &File, path: &Path) -> Result<HashMap<Vec<u8>, (u64, u64)>, OciError> {
    let mut names = HashMap::new();
    let mut links = Vec::new();
    let mut reader = Reader::new(BufReader::with_capacity(1 << 17, file), LAYER);
    let failed = |source| OciError::Archive { path: path.to_path_buf(), source };
    while let Some(entry) = reader.next().map_err(failed)? {
        let name = entry.path.strip_prefix(b"./").unwrap_or(&entry.path).to_vec();
        match entry.kind {
            Kind::File => drop(names.insert(name, (reader.offset(), entry.size))),
            // Older dockers store a layer that is there twice as a link from one directory to the other.
            Kind::Symlink | Kind::HardLink => links.push((name, entry.target)),
            _ => {}
        }
        if names.len() + links.len() > NAMES_LIMIT {
            return Err(OciError::TooLarge { what: "the list of files".to_owned(), limit: NAMES_LIMIT as u64 });
        }
    }
    for (name, target) in links {
        let target = target.strip_prefix(b"../").unwrap_or(&target);
        if let Some(place) = names.get(target).copied() {
            names.insert(name, place);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_specification() {
        let digits = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let digest = Digest::parse(&format!("sha256:{digits}")).unwrap();
        assert!(digest.is(digest.hasher()));
        assert_eq!(digest.path(), format!("blobs/sha256/{digits}"));
        for text in [
            digits.to_owned(),
            format!("sha256:{}", digits.to_uppercase()),
            format!("md5:{digits}"),
            format!("sha512:{digits}"),
            "sha256:../../../../../../../etc/passwd".to_owned(),
        ] {
            assert!(Digest::parse(&text).is_err(), "{text}");
        }
    }
}
