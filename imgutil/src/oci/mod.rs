//! Makes a root tree of a container image: an OCI layout (`oci:DIR[:TAG]`), or an archive of `podman save` or `docker save`.
//!
//! `blobs` finds the parts and checks their digests, `format` parses the documents, `apply` puts one layer after the other into the
//! tree. An image comes from anywhere: nothing of it is followed out of the tree, everything is bounded, and a tree
//! that failed is the caller's to remove.

mod apply;
mod blobs;
mod format;

pub use crate::tar::TarError;
pub use blobs::Digest;

use crate::tar::{LAYER, Reader};
use apply::{Applier, ApplyError};
use blobs::{Blobs, Part};
use format::{Configuration, Descriptor, FULL_NAME, Index, Manifest, NAME, Platform, Saved};
use std::fmt;
use std::io::{self, BufReader, Read};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Largest document that is read.
const DOCUMENT_LIMIT: u64 = 8 << 20;
/// Layers of an image, at most (docker allows 127).
const LAYERS_LIMIT: usize = 1000;
/// Indexes that lead to indexes, at most.
const DEPTH_LIMIT: usize = 4;
/// Indexes that are read in the search of an image, at most: an index may name others many times over.
const INDEXES_LIMIT: usize = 100;

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    path: PathBuf,
    tag: Option<String>,
}

impl FromStr for Source {
    type Err = OciError;

    /// `oci:DIR`, `oci:DIR:TAG`, or the name of an archive.
    fn from_str(text: &str) -> Result<Self, OciError> {
        let Some(rest) = text.strip_prefix("oci:") else {
            if text.is_empty() {
                return Err(OciError::Source(text.to_owned()));
            }
            return Ok(Self { path: PathBuf::from(text), tag: None });
        };
        // A directory whose name has a colon is taken as it is.
        match rest.rsplit_once(':') {
            Some((path, tag))
                if !Path::new(rest).exists() && !path.is_empty() && !tag.is_empty() && !tag.contains('/') =>
            {
                Ok(Self { path: PathBuf::from(path), tag: Some(tag.to_owned()) })
            }
            _ if rest.is_empty() => Err(OciError::Source(text.to_owned())),
            _ => Ok(Self { path: PathBuf::from(rest), tag: None }),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        self.tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

/// What an image may come to, so that a small file cannot fill a disk.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of all layers, unpacked.
    pub bytes: u64,
    /// Entries of all layers.
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 256 << 30, entries: 5_000_000 }
    }
}

/// An image that was found, and what it is made of.
pub struct Image {
    blobs: Blobs,
    /// Digest of the manifest, or of the configuration where there is no manifest: what the image is.
    pub digest: Digest,
    /// The layers, lowest first.
    layers: Vec<Layer>,
}

/// A layer: where its bytes are, and the digest of the archive in them.
struct Layer {
    part: Where,
    archive: Digest,
}

enum Where {
    Blob(Digest, u64),
    Name(String),
}

/// How far it is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// The layer that is being unpacked, counted from 1.
    pub layer: usize,
    /// How many there are.
    pub layers: usize,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// Not a source at all.
    #[error("'{0}' is no image: give oci:DIR, oci:DIR:TAG, or an archive of podman save or docker save")]
    Source(String),
    /// It cannot be opened.
    #[error("cannot open '{0}': {1}")]
    Open(PathBuf, io::Error),
    /// There is no image in it.
    #[error(
        "'{0}' holds no image: it has neither index.json (an OCI layout) nor manifest.json (podman save, docker save)"
    )]
    NoImage(PathBuf),
    /// The archive of the image itself is damaged.
    #[error("cannot read the archive '{path}': {source}; if it is compressed, decompress it first")]
    Archive {
        /// Which.
        path: PathBuf,
        /// Why.
        source: TarError,
    },
    /// A part cannot be read.
    #[error("cannot read '{name}' in '{place}': {source}")]
    Part {
        /// Its name.
        name: String,
        /// Where it is.
        place: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a digest.
    #[error("'{0}' is no digest that is known (sha256, sha512)")]
    Digest(String),
    /// A part is not there.
    #[error("{} is missing in '{place}': the image is not complete; save or copy it again", digest.as_str())]
    Missing {
        /// Which.
        digest: Digest,
        /// Where it should be.
        place: PathBuf,
    },
    /// A part is not what its digest says.
    #[error("the bytes of {} are not those of that digest: the image is damaged or was changed; save or copy it again", .0.as_str())]
    Mismatch(Digest),
    /// A document is not one.
    #[error("cannot understand {what}: {source}")]
    Document {
        /// Which.
        what: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A document says something impossible.
    #[error("{0}")]
    Nonsense(String),
    /// More than is taken.
    #[error("{what} is larger than {limit}, which no honest image needs")]
    TooLarge {
        /// What.
        what: String,
        /// The bound.
        limit: u64,
    },
    /// No such tag, or it must be chosen.
    #[error("{}", choose(tag.as_deref(), found))]
    Tag {
        /// As given.
        tag: Option<String>,
        /// What could have been given.
        found: Vec<String>,
    },
    /// It is for other machines.
    #[error("the image is for {}, not for {wanted}", found.join(", "))]
    Platform {
        /// What was wanted.
        wanted: String,
        /// What there is.
        found: Vec<String>,
    },
    /// A layer cannot be unpacked.
    #[error("cannot unpack layer {number} of the image: {reason}")]
    Layer {
        /// Counted from 1.
        number: usize,
        /// Why.
        reason: String,
    },
    /// There is no room for its files.
    #[error("the file system is full")]
    Full,
    /// The caller ended it.
    #[error("interrupted")]
    Interrupted,
}

fn choose(tag: Option<&str>, found: &[String]) -> String {
    let known = found.join(", ");
    match tag {
        Some(tag) => format!("there is no image '{tag}': there are {known}"),
        None => format!("there are several images: choose one with oci:DIR:TAG ({known})"),
    }
}

impl Image {
    /// Finds the image for `architecture` (in Debian's words).
    pub fn open(source: &Source, architecture: &str) -> Result<Self, OciError> {
        let wanted = Platform::for_debian(architecture);
        let blobs = Blobs::open(&source.path)?;
        if let Some(text) = blobs.text("index.json", DOCUMENT_LIMIT)? {
            let index: Index = document("index.json", &text)?;
            return Self::from_index(blobs, &index, source.tag.as_deref(), &wanted);
        }
        match blobs.text("manifest.json", DOCUMENT_LIMIT)? {
            Some(text) => Self::from_saved(blobs, document("manifest.json", &text)?, source.tag.as_deref(), &wanted),
            None => Err(OciError::NoImage(source.path.clone())),
        }
    }

    fn from_index(blobs: Blobs, index: &Index, tag: Option<&str>, wanted: &Platform) -> Result<Self, OciError> {
        let named: Vec<Descriptor> =
            index.manifests.iter().filter(|entry| tag.is_none_or(|tag| is_called(entry, tag))).cloned().collect();
        let names = || index.manifests.iter().filter_map(name_of).map(str::to_owned).collect();
        // Several entries without a tag may be one image for several machines.
        let several = tag.is_none() && named.len() > 1 && named.iter().any(|entry| entry.platform.is_none());
        if named.is_empty() || several {
            return Err(OciError::Tag { tag: tag.map(str::to_owned), found: names() });
        }
        let (mut seen, mut left) = (Vec::new(), INDEXES_LIMIT);
        let Some(chosen) = descend(&blobs, &named, wanted, &mut left, DEPTH_LIMIT, &mut seen)? else {
            return Err(OciError::Platform { wanted: wanted.shown(), found: seen });
        };
        let digest = Digest::parse(&chosen.digest)?;
        let manifest: Manifest = document("the manifest", &blobs.text_blob(&digest, DOCUMENT_LIMIT)?)?;
        let config = blobs.text_blob(&Digest::parse(&manifest.config.digest)?, DOCUMENT_LIMIT)?;
        let archives = archives(&config, wanted, manifest.layers.len())?;
        let layers = manifest.layers.iter().zip(archives).map(|(layer, archive)| {
            if !is_layer(&layer.media_type) {
                return Err(OciError::Nonsense(format!(
                    "a layer of the type '{}' cannot be unpacked",
                    layer.media_type
                )));
            }
            Ok(Layer { part: Where::Blob(Digest::parse(&layer.digest)?, layer.size), archive })
        });
        let layers = layers.collect::<Result<_, _>>()?;
        Ok(Self { blobs, digest, layers })
    }

    fn from_saved(blobs: Blobs, saved: Vec<Saved>, tag: Option<&str>, wanted: &Platform) -> Result<Self, OciError> {
        let names: Vec<String> = saved.iter().flat_map(|image| image.repo_tags.iter().flatten().cloned()).collect();
        let mut chosen = saved
            .into_iter()
            .filter(|image| tag.is_none_or(|tag| image.repo_tags.iter().flatten().any(|name| is_name(name, tag))));
        let (Some(image), None) = (chosen.next(), chosen.next()) else {
            return Err(OciError::Tag { tag: tag.map(str::to_owned), found: names });
        };
        let config = blobs
            .text(&image.config, DOCUMENT_LIMIT)?
            .ok_or_else(|| OciError::Nonsense(format!("the configuration '{}' is missing", image.config)))?;
        // Its name is its digest, with or without `.json`.
        let digits = image.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
        let digest = Digest::parse(&format!("sha256:{digits}"))?;
        let mut hasher = digest.hasher();
        hasher.update(&config);
        if !digest.is(hasher) {
            return Err(OciError::Mismatch(digest));
        }
        let archives = archives(&config, wanted, image.layers.len())?;
        let layers = image.layers.into_iter().zip(archives);
        let layers = layers.map(|(name, archive)| Layer { part: Where::Name(name), archive }).collect();
        Ok(Self { blobs, digest, layers })
    }

    /// Unpacks all layers into the empty directory behind `root`. `observe` is told how far it is, often, and ends it with `false`.
    pub fn unpack(
        &self,
        root: BorrowedFd<'_>,
        limits: Limits,
        observe: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<(), OciError> {
        let mut applier = Applier::new(root, limits.entries);
        let mut left = limits.bytes;
        for (index, layer) in self.layers.iter().enumerate() {
            let number = index + 1;
            let progress = Progress { layer: number, layers: self.layers.len() };
            if !observe(progress) {
                return Err(OciError::Interrupted);
            }
            let failed = |reason: String| OciError::Layer { number, reason };
            let mut part = self.layer(layer, number)?;
            let mut hasher = layer.archive.hasher();
            let input = part.read().and_then(decompressed).map_err(|error| failed(error.to_string()))?;
            let mut archive = Reader::new(Measured { input, hasher: &mut hasher, left: &mut left }, LAYER);
            let mut stopped = false;
            applier
                .layer(&mut archive, &mut || {
                    stopped = !observe(progress);
                    !stopped
                })
                .map_err(|error| match error {
                    _ if stopped => OciError::Interrupted,
                    ApplyError::Call { source, .. } if source.kind() == io::ErrorKind::StorageFull => OciError::Full,
                    error => failed(error.to_string()),
                })?;
            archive.finish().map_err(|error| failed(error.to_string()))?;
            if !layer.archive.is(hasher) {
                return Err(OciError::Mismatch(layer.archive.clone()));
            }
        }
        Ok(())
    }

    /// The bytes of a layer, checked where they have a digest of their own.
    fn layer(&self, layer: &Layer, number: usize) -> Result<Part, OciError> {
        match &layer.part {
            Where::Blob(digest, size) => self.blobs.blob(digest, Some(*size)),
            Where::Name(name) => self.blobs.part(name)?.ok_or_else(|| OciError::Layer {
                number,
                reason: format!("'{name}' is missing: the image is not complete; save it again"),
            }),
        }
    }
}

/// Finds the manifest for a platform among descriptors of manifests and of further indexes, of which at most `left` are read.
fn descend(
    blobs: &Blobs,
    entries: &[Descriptor],
    wanted: &Platform,
    left: &mut usize,
    depth: usize,
    seen: &mut Vec<String>,
) -> Result<Option<Descriptor>, OciError> {
    for entry in entries {
        let inner =
            entry.media_type.ends_with("image.index.v1+json") || entry.media_type.ends_with("manifest.list.v2+json");
        match &entry.platform {
            Some(platform) if !platform.serves(wanted) => {
                // Attestations are listed as images for no machine.
                if platform.os != "unknown" {
                    seen.push(platform.shown());
                }
            }
            _ if inner && depth == 0 => {
                return Err(OciError::Nonsense("the indexes of the image are nested too deep".to_owned()));
            }
            _ if inner => {
                *left = left.checked_sub(1).ok_or_else(|| OciError::TooLarge {
                    what: "the number of indexes of the image".to_owned(),
                    limit: INDEXES_LIMIT as u64,
                })?;
                let text = blobs.text_blob(&Digest::parse(&entry.digest)?, DOCUMENT_LIMIT)?;
                let index: Index = document("an index", &text)?;
                if let Some(found) = descend(blobs, &index.manifests, wanted, left, depth - 1, seen)? {
                    return Ok(Some(found));
                }
            }
            _ => return Ok(Some(entry.clone())),
        }
    }
    Ok(None)
}

/// The digests of the unpacked layers, from a configuration for the right machine.
fn archives(config: &[u8], wanted: &Platform, layers: usize) -> Result<Vec<Digest>, OciError> {
    let config: Configuration = document("the configuration", config)?;
    let platform = Platform { architecture: config.architecture, os: config.os, variant: config.variant };
    if !platform.serves(wanted) {
        return Err(OciError::Platform { wanted: wanted.shown(), found: vec![platform.shown()] });
    }
    if layers > LAYERS_LIMIT {
        return Err(OciError::TooLarge { what: "the list of layers".to_owned(), limit: LAYERS_LIMIT as u64 });
    }
    if config.rootfs.diff_ids.len() != layers {
        return Err(OciError::Nonsense(format!(
            "the image has {layers} layers, but its configuration names {}",
            config.rootfs.diff_ids.len()
        )));
    }
    config.rootfs.diff_ids.iter().map(|text| Digest::parse(text)).collect()
}

fn document<T: serde::de::DeserializeOwned>(what: &str, text: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(text).map_err(|source| OciError::Document { what: what.to_owned(), source })
}

fn is_layer(media_type: &str) -> bool {
    ["tar", "tar+gzip", "tar+zstd", "tar.gzip", "tar.zstd"].iter().any(|end| {
        media_type
            .strip_suffix(end)
            .is_some_and(|head| head.ends_with('.') && head.contains("layer") || head.ends_with("diff."))
    })
}

fn name_of(entry: &Descriptor) -> Option<&str> {
    entry.annotations.get(NAME).or_else(|| entry.annotations.get(FULL_NAME)).map(String::as_str)
}

fn is_called(entry: &Descriptor, tag: &str) -> bool {
    [NAME, FULL_NAME].iter().filter_map(|key| entry.annotations.get(*key)).any(|name| is_name(name, tag))
}

/// `debian:12` and `registry/debian:12` are called `12` too.
fn is_name(name: &str, tag: &str) -> bool {
    name == tag || name.rsplit_once(':').is_some_and(|(_, last)| last == tag)
}

/// Undoes the compression that the first bytes tell of.
fn decompressed<'a>(input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    use std::io::BufRead as _;
    let mut input = BufReader::with_capacity(1 << 17, input);
    let start = input.fill_buf()?;
    Ok(if start.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::bufread::MultiGzDecoder::new(input))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        // Its window, and so its memory, is bounded by the library at 128 MiB.
        Box::new(zstd::Decoder::with_buffer(input)?)
    } else {
        Box::new(input)
    })
}

/// Hashes what passes through, and ends a stream that is longer than the bound.
struct Measured<'a, R> {
    input: R,
    hasher: &'a mut aws_lc_rs::digest::Context,
    left: &'a mut u64,
}

impl<R: Read> Read for Measured<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        *self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| io::Error::other("the image unpacks to more than is allowed, as no honest image does"))?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_name_a_layout_or_an_archive() {
        let scratch = tempfile::tempdir().unwrap();
        let odd = scratch.path().join("a:b");
        std::fs::create_dir(&odd).unwrap();
        let odd = odd.to_str().unwrap();
        let source = |path: &str, tag: Option<&str>| Source { path: PathBuf::from(path), tag: tag.map(str::to_owned) };
        for (text, expected) in [
            ("oci:/x/y", source("/x/y", None)),
            ("oci:y:latest", source("y", Some("latest"))),
            ("oci:/x:1/y", source("/x:1/y", None)),
            ("file.tar", source("file.tar", None)),
            (&format!("oci:{odd}"), source(odd, None)),
            (&format!("oci:{odd}:c"), source(odd, Some("c"))),
        ] {
            assert_eq!(text.parse::<Source>().unwrap(), expected, "{text}");
        }
        assert!("oci:".parse::<Source>().is_err() && "".parse::<Source>().is_err());
    }

    #[test]
    fn types_of_layers_are_told_from_others() {
        for (media_type, known) in [
            ("application/vnd.oci.image.layer.v1.tar", true),
            ("application/vnd.oci.image.layer.v1.tar+gzip", true),
            ("application/vnd.oci.image.layer.v1.tar+zstd", true),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", true),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", false),
            ("application/vnd.in-toto+json", false),
        ] {
            assert_eq!(is_layer(media_type), known, "{media_type}");
        }
    }
}
