//! Verifying a whole file: every damaged region is named by what it is and by its byte range, not only the first.

use crate::error::ImageError;
use crate::header::{HEADER_LENGTH, Header};
use crate::image::{ReadAt, read_range};
use crate::keys::Section;
use crate::metadata::Metadata;
use crate::verify::{LeafPage, OpenOptions, Verifier};
use aws_lc_rs::digest;
use std::fmt;

/// A part of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// The first 4096 bytes.
    Header,
    /// A sealed chunk.
    Chunk {
        /// Its number.
        index: u64,
    },
    /// The list of page hashes.
    PageHashes,
    /// A page of leaf hashes.
    TablePage {
        /// Its number.
        page: u64,
    },
    /// The metadata.
    Metadata,
    /// The hints.
    Hints,
    /// Signature or trust.
    Signature,
    /// The length of the file.
    Length,
    /// The key that was given, not the file.
    Key,
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::Chunk { index } => write!(f, "chunk {index}"),
            Self::PageHashes => f.write_str("page hashes"),
            Self::TablePage { page } => write!(f, "table page {page}"),
            Self::Metadata => f.write_str("metadata"),
            Self::Hints => f.write_str("hints"),
            Self::Signature => f.write_str("signature"),
            Self::Length => f.write_str("length"),
            Self::Key => f.write_str("key"),
        }
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Which part.
    pub region: Region,
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.end > self.start {
            write!(f, "{}, bytes {} to {}: {}", self.region, self.start, self.end - 1, self.what)
        } else {
            write!(f, "{}: {}", self.region, self.what)
        }
    }
}

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Digest of the image, where the header is readable.
    pub digest: Option<[u8; 32]>,
    /// Whether plaintext was checked too (the key was there, or the image is plain).
    pub with_key: bool,
    /// Chunks that were checked.
    pub chunks: u64,
    /// Findings, in the order of the file; the first [`MAX_PROBLEMS`] that were found.
    pub problems: Vec<Problem>,
    /// How many more there were.
    pub more: u64,
}

/// So many findings are kept: an image of zeros has one for each of its 16 million chunks.
pub const MAX_PROBLEMS: usize = 1000;

impl Report {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.problems.is_empty()
    }

    fn add(&mut self, region: Region, (start, length): (u64, u64), what: impl fmt::Display) {
        if self.problems.len() == MAX_PROBLEMS {
            self.more += 1;
            return;
        }
        self.problems.push(Problem { region, start, end: start.saturating_add(length), what: what.to_string() });
    }
}

/// Verifies a whole file. Without a key (`options.key` is none) hashes, table and signatures are checked, with it also tags and the
/// header MAC. `progress` is told chunks done and in all.
///
/// # Errors
/// Only where the file could not be looked at (an I/O error other than its end); what is wrong with it is in the report.
pub fn verify_file<R: ReadAt>(
    source: &R,
    options: &OpenOptions,
    mut progress: impl FnMut(u64, u64),
) -> Result<Report, ImageError> {
    let mut report = Report::default();
    let actual = source.size().map_err(ImageError::io("reading the image's size"))?;
    if actual < HEADER_LENGTH as u64 {
        report.add(
            Region::Length,
            (0, actual),
            format_args!("the file has {actual} bytes: it is shorter than a header"),
        );
        return Ok(report);
    }
    let mut bytes = [0; HEADER_LENGTH];
    source.read_exact_at(&mut bytes, 0).map_err(ImageError::io("reading the header"))?;
    let header = match Header::parse(&bytes) {
        Ok(header) => header,
        Err(error) => {
            report.add(Region::Header, (0, HEADER_LENGTH as u64), error);
            return Ok(report);
        }
    };
    report.digest = Some(header.digest);
    let expected = header.file_length();
    if actual != expected {
        report.add(
            Region::Length,
            (actual.min(expected), actual.abs_diff(expected)),
            ImageError::Length { expected, actual },
        );
    }
    let mut verifier = match Verifier::new(header.clone(), options) {
        Ok(verifier) => verifier,
        Err(error) => {
            let (region, range) = match error {
                ImageError::Untrusted { .. } | ImageError::SignatureFile(_) => (Region::Signature, (0, 0)),
                ImageError::WrongKey { .. } | ImageError::NotEncrypted => (Region::Key, (0, 0)),
                _ => (Region::Header, (0, HEADER_LENGTH as u64)),
            };
            report.add(region, range, error);
            // What needs neither trust nor key can still be checked, and says where else the damage is.
            Verifier::new(header.clone(), &OpenOptions::default())?
        }
    };
    report.with_key = verifier.can_read();
    let payload = check_data(source, &mut verifier, actual, &mut report, &mut progress)?;
    if let Some(metadata) = check_section(source, &verifier, Section::Metadata, actual, &mut report)? {
        check_metadata(&header, &metadata, payload, &mut report);
    }
    if header.hints_length > 0 {
        check_section(source, &verifier, Section::Hints, actual, &mut report)?;
    }
    report.problems.sort_by_key(|problem| problem.start);
    Ok(report)
}

/// What is wrong with a part, where the report already says which part and which bytes.
fn reason(error: &ImageError) -> String {
    match error {
        ImageError::Damaged { .. } => "its hash does not match: it is damaged or was changed; fetch it again".into(),
        ImageError::Forged { .. } => {
            "it does not decrypt, though its hash matches: it was forged, or made with another key".into()
        }
        other => other.to_string(),
    }
}

/// Reads a range that is all in the file; `None` where the file ends before (already reported as its length).
fn read<R: ReadAt>(source: &R, range: (u64, u64), actual: u64) -> Result<Option<Vec<u8>>, ImageError> {
    if range.0 + range.1 > actual { Ok(None) } else { read_range(source, range, "reading the image").map(Some) }
}

/// Checks table and chunks. Gives the SHA-256 of the plaintext, if all of it could be read.
fn check_data<R: ReadAt>(
    source: &R,
    verifier: &mut Verifier,
    actual: u64,
    report: &mut Report,
    progress: &mut impl FnMut(u64, u64),
) -> Result<Option<[u8; 32]>, ImageError> {
    let header = verifier.header().clone();
    let mut plaintext = digest::Context::new(&digest::SHA256);
    let mut read_whole = verifier.can_read();
    let hashes = read(source, header.page_hashes_range(), actual)?;
    let hashes_good = match &hashes {
        None => false,
        Some(bytes) => match verifier.set_page_hashes(bytes) {
            Ok(()) => true,
            Err(error) => {
                report.add(Region::PageHashes, header.page_hashes_range(), reason(&error));
                false
            }
        },
    };
    for page in 0..header.pages() {
        let range = header.page_range(page).ok_or(ImageError::Argument("the image has no such table page"))?;
        let leaves: Option<LeafPage> = match read(source, range, actual)? {
            Some(bytes) if hashes_good => match verifier.verify_page(page, &bytes) {
                Ok(leaves) => Some(leaves),
                Err(error) => {
                    report.add(Region::TablePage { page }, range, reason(&error));
                    None
                }
            },
            _ => None,
        };
        let first = page * crate::header::LEAVES_PER_PAGE;
        for index in first..(first + crate::header::LEAVES_PER_PAGE).min(header.chunks) {
            let chunk = match &leaves {
                Some(leaves) => check_chunk(source, verifier, index, leaves, actual, report)?,
                None => None,
            };
            match chunk {
                Some(chunk) => plaintext.update(&chunk),
                None => read_whole = false,
            }
            progress(index + 1, header.chunks);
        }
    }
    let mut sha256 = [0; 32];
    sha256.copy_from_slice(plaintext.finish().as_ref());
    Ok(read_whole.then_some(sha256))
}

/// The chunk, good by all that can be checked of it: plaintext with the key, sealed bytes without.
fn check_chunk<R: ReadAt>(
    source: &R,
    verifier: &Verifier,
    index: u64,
    leaves: &LeafPage,
    actual: u64,
    report: &mut Report,
) -> Result<Option<Vec<u8>>, ImageError> {
    let range = verifier.chunk_range(index).ok_or(ImageError::Argument("the image has no such chunk"))?;
    let Some(mut bytes) = read(source, range, actual)? else { return Ok(None) };
    let checked = if verifier.can_read() {
        verifier.open_chunk(index, leaves, &mut bytes)
    } else {
        verifier.check_chunk(index, leaves, &bytes)
    };
    report.chunks += 1;
    match checked {
        Ok(()) => Ok(Some(bytes)),
        Err(error) => {
            report.add(Region::Chunk { index }, range, reason(&error));
            Ok(None)
        }
    }
}

/// The section's plaintext, if it is good and can be read.
fn check_section<R: ReadAt>(
    source: &R,
    verifier: &Verifier,
    section: Section,
    actual: u64,
    report: &mut Report,
) -> Result<Option<Vec<u8>>, ImageError> {
    let (offset, length, _) = verifier.section_range(section);
    let Some(bytes) = read(source, (offset, length), actual)? else { return Ok(None) };
    let checked = if verifier.can_read() {
        verifier.open_section(section, bytes).map(Some)
    } else {
        verifier.check_section(section, &bytes).map(|()| None)
    };
    checked.or_else(|error| {
        let region = if section == Section::Metadata { Region::Metadata } else { Region::Hints };
        report.add(region, (offset, length), reason(&error));
        Ok(None)
    })
}

/// Whether the metadata can be read, and is about this plaintext.
fn check_metadata(header: &Header, bytes: &[u8], payload: Option<[u8; 32]>, report: &mut Report) {
    let range = (header.metadata_offset, header.metadata_length);
    match (Metadata::from_bytes(bytes), payload) {
        (Err(error), _) => report.add(Region::Metadata, range, error),
        (Ok(metadata), Some(payload)) if metadata.payload_sha256 != hex::encode(payload) => {
            let what =
                "payload_sha256 is not that of the plaintext: whoever sealed the image put another payload into it";
            report.add(Region::Metadata, range, what);
        }
        (Ok(_), _) => {}
    }
}
