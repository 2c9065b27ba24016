//! The reader's checks without any input or output: header bytes, table pages and sealed chunks go in, verified plaintext comes
//! out. Files ([`crate::Image`]) and the network root both stand on it.

use crate::error::ImageError;
use crate::hash;
use crate::header::{Header, LEAVES_PER_PAGE};
use crate::keys::{Dek, Keys, Section};
use crate::sign::{PublicKey, SignatureFile};
use aws_lc_rs::constant_time::verify_slices_are_equal;

/// What a reader demands of an image before it believes a byte of it.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// The key; none: a plain image, or a look at what needs no key. With a key a plain image is refused.
    pub key: Option<Dek>,
    /// The digest it must have.
    pub pinned: Option<[u8; 32]>,
    /// Keys of which one must have signed it; empty: no signature is asked for.
    pub trusted: Vec<PublicKey>,
    /// The content of `FILE.moor.sig`.
    pub signatures: Option<Vec<u8>>,
    /// The lineage it must be of.
    pub lineage: Option<[u8; 16]>,
    /// The smallest serial that is accepted.
    pub minimum_serial: Option<u64>,
    /// Refuse a plain image.
    pub require_encrypted: bool,
}

/// One verified page of leaf hashes.
#[derive(Debug, Clone)]
pub struct LeafPage {
    index: u64,
    leaves: Vec<u8>,
}

impl LeafPage {
    /// Its number.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    fn leaf(&self, chunk: u64) -> Option<&[u8]> {
        let at = usize::try_from(chunk.checked_sub(self.index * LEAVES_PER_PAGE)?).ok()?.checked_mul(32)?;
        self.leaves.get(at..at.checked_add(32)?)
    }
}

/// Checks what comes from outside against one header.
pub struct Verifier {
    header: Header,
    keys: Option<Keys>,
    page_hashes: Option<Vec<u8>>,
}

impl Verifier {
    /// Checks a header in the order of the format: pinned digest and signature, lineage and serial, key and header MAC.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn new(header: Header, options: &OpenOptions) -> Result<Self, ImageError> {
        if let Some(pinned) = options.pinned
            && pinned != header.digest
        {
            return Err(ImageError::Digest { expected: hex::encode(pinned), actual: hex::encode(header.digest) });
        }
        if !options.trusted.is_empty() {
            let untrusted =
                |why| ImageError::Untrusted { digest: hex::encode(header.digest), trusted: options.trusted.len(), why };
            let file = options.signatures.as_deref().ok_or_else(|| untrusted("it has no signature file"))?;
            if !SignatureFile::parse(file)?.is_signed_by(&header.digest, &options.trusted) {
                return Err(untrusted("no signature in its file is by one of them and over this digest"));
            }
        }
        if let Some(lineage) = options.lineage
            && lineage != header.lineage
        {
            return Err(ImageError::Lineage { expected: hex::encode(lineage), actual: hex::encode(header.lineage) });
        }
        if let Some(minimum) = options.minimum_serial
            && header.serial < minimum
        {
            return Err(ImageError::Serial { minimum, actual: header.serial });
        }
        // Whoever gives a key was promised a sealed image: a plain one in its place is an attack, or the wrong file.
        if (options.require_encrypted || options.key.is_some()) && !header.encrypted {
            return Err(ImageError::NotEncrypted);
        }
        let keys = match (&options.key, header.encrypted) {
            (Some(dek), true) => Some(Self::keys(&header, dek)?),
            _ => None,
        };
        Ok(Self { header, keys, page_hashes: None })
    }

    fn keys(header: &Header, dek: &Dek) -> Result<Keys, ImageError> {
        if verify_slices_are_equal(&dek.key_id(), &header.key_id).is_err() {
            return Err(ImageError::WrongKey { wanted: hex::encode(header.key_id), given: hex::encode(dek.key_id()) });
        }
        let keys = Keys::derive(dek, &header.salt, header.context_input())?;
        keys.check_mac(header.mac_input(), &header.mac)?;
        Ok(keys)
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Whether plaintext can be read: the image is plain, or its key is there.
    #[must_use]
    pub fn can_read(&self) -> bool {
        !self.header.encrypted || self.keys.is_some()
    }

    /// Where the page hashes are: offset and length.
    #[must_use]
    pub fn page_hashes_range(&self) -> (u64, u64) {
        self.header.page_hashes_range()
    }

    /// Checks the page hashes against the root, and keeps them.
    ///
    /// # Errors
    /// They are not the ones the root was made from.
    pub fn set_page_hashes(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let (offset, length) = self.page_hashes_range();
        if bytes.len() as u64 != length || hash::root(self.header.chunks, bytes) != self.header.root {
            return Err(ImageError::Damaged {
                what: "the list of page hashes".into(),
                start: offset,
                end: offset + length,
            });
        }
        self.page_hashes = Some(bytes.to_vec());
        Ok(())
    }

    /// The page that holds the leaf hash of a chunk.
    #[must_use]
    pub fn page_of_chunk(&self, chunk: u64) -> u64 {
        chunk / LEAVES_PER_PAGE
    }

    /// Where a page of leaf hashes is; `None` past the end.
    #[must_use]
    pub fn page_range(&self, page: u64) -> Option<(u64, u64)> {
        self.header.page_range(page)
    }

    /// Checks a page of leaf hashes against the page hashes, which have to be set before.
    ///
    /// # Errors
    /// The page is not the one its hash was made from; no such page; no page hashes yet.
    pub fn verify_page(&self, page: u64, bytes: &[u8]) -> Result<LeafPage, ImageError> {
        let hashes = self.page_hashes.as_deref().ok_or(ImageError::Argument("page hashes come before pages"))?;
        let (offset, length) = self.page_range(page).ok_or(ImageError::Argument("the image has no such table page"))?;
        let at = usize::try_from(page * 32).map_err(|_| ImageError::Argument("the image has no such table page"))?;
        if bytes.len() as u64 != length || hashes.get(at..at + 32) != Some(&hash::page(page, bytes)[..]) {
            return Err(ImageError::Damaged {
                what: format!("table page {page}"),
                start: offset,
                end: offset + length,
            });
        }
        Ok(LeafPage { index: page, leaves: bytes.to_vec() })
    }

    /// Where a sealed chunk is; `None` past the end.
    #[must_use]
    pub fn chunk_range(&self, chunk: u64) -> Option<(u64, u64)> {
        self.header.chunk_range(chunk)
    }

    /// Checks a sealed chunk against its leaf hash only: what can be done without the key.
    ///
    /// # Errors
    /// Other bytes; no such chunk; a page that does not hold its leaf.
    pub fn check_chunk(&self, chunk: u64, page: &LeafPage, sealed: &[u8]) -> Result<(), ImageError> {
        self.check_leaf(chunk, page, sealed, &hash::leaf(chunk, sealed))
    }

    /// The same where the leaf hash of `sealed` is known already.
    fn check_leaf(&self, chunk: u64, page: &LeafPage, sealed: &[u8], found: &[u8; 32]) -> Result<(), ImageError> {
        let (offset, length) = self.chunk_range(chunk).ok_or(ImageError::Argument("the image has no such chunk"))?;
        let leaf = page.leaf(chunk).ok_or(ImageError::Argument("the table page does not hold this chunk"))?;
        if sealed.len() as u64 != length || found != leaf {
            return Err(ImageError::Damaged { what: format!("chunk {chunk}"), start: offset, end: offset + length });
        }
        Ok(())
    }

    /// Checks a sealed chunk against its leaf hash, then its tag over the same bytes; leaves the plaintext in `sealed`. After an
    /// error `sealed` holds nothing that may be used.
    ///
    /// # Errors
    /// As [`Self::check_chunk`]; the tag does not match; no key.
    pub fn open_chunk(&self, chunk: u64, page: &LeafPage, sealed: &mut Vec<u8>) -> Result<(), ImageError> {
        self.check_chunk(chunk, page, sealed)?;
        self.decrypt_chunk(chunk, sealed)
    }

    /// Does the same with chunk `first` and those behind it: their hashes are made side by side, which takes far less time than one after the other.
    pub fn open_chunks(&self, first: u64, page: &LeafPage, sealed: &mut [Vec<u8>]) -> Vec<Result<(), ImageError>> {
        let leaves = hash::leaves(first, &sealed.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let open = |((chunk, sealed), leaf): ((u64, &mut Vec<u8>), [u8; 32])| {
            self.check_leaf(chunk, page, sealed, &leaf)?;
            self.decrypt_chunk(chunk, sealed)
        };
        (first..).zip(sealed).zip(leaves).map(open).collect()
    }

    /// Whether plaintext that nobody watched since it was verified still is that of a chunk: sealed again, it must have the chunk's leaf hash.
    ///
    /// # Errors
    /// As [`Self::check_chunk`]; no key.
    pub fn check_plaintext(&self, chunk: u64, page: &LeafPage, plaintext: &[u8]) -> Result<(), ImageError> {
        if !self.header.encrypted {
            return self.check_chunk(chunk, page, plaintext);
        }
        let keys = self.keys.as_ref().ok_or_else(|| ImageError::KeyNeeded(hex::encode(self.header.key_id)))?;
        let mut sealed = Vec::with_capacity(plaintext.len().saturating_add(16));
        sealed.extend_from_slice(plaintext);
        keys.seal_chunk(chunk, &mut sealed)?;
        // Of other plaintext this is a second message under the chunk's nonce: it is looked at here, and nobody gets it.
        self.check_chunk(chunk, page, &sealed)
    }

    /// After its hash.
    fn decrypt_chunk(&self, chunk: u64, sealed: &mut Vec<u8>) -> Result<(), ImageError> {
        if !self.header.encrypted {
            return Ok(());
        }
        let keys = self.keys.as_ref().ok_or_else(|| ImageError::KeyNeeded(hex::encode(self.header.key_id)))?;
        if !keys.open_chunk(chunk, sealed) {
            let (offset, length) = self.chunk_range(chunk).unwrap_or_default();
            return Err(ImageError::Forged { what: format!("chunk {chunk}"), start: offset, end: offset + length });
        }
        Ok(())
    }

    pub(crate) fn section_range(&self, section: Section) -> (u64, u64, [u8; 32]) {
        let header = &self.header;
        match section {
            Section::Metadata => (header.metadata_offset, header.metadata_length, header.metadata_hash),
            Section::Hints => (header.hints_offset, header.hints_length, header.hints_hash),
        }
    }

    /// Checks a section against its hash only.
    pub(crate) fn check_section(&self, section: Section, bytes: &[u8]) -> Result<(), ImageError> {
        let (offset, length, expected) = self.section_range(section);
        if bytes.len() as u64 != length || hash::sha256(&[bytes]) != expected {
            return Err(ImageError::Damaged { what: section.name().into(), start: offset, end: offset + length });
        }
        Ok(())
    }

    pub(crate) fn open_section(&self, section: Section, mut bytes: Vec<u8>) -> Result<Vec<u8>, ImageError> {
        self.check_section(section, &bytes)?;
        if self.header.encrypted {
            let keys = self.keys.as_ref().ok_or_else(|| ImageError::KeyNeeded(hex::encode(self.header.key_id)))?;
            if !keys.open_section(section, &mut bytes)? {
                let (offset, length, _) = self.section_range(section);
                return Err(ImageError::Forged { what: section.name().into(), start: offset, end: offset + length });
            }
        }
        Ok(bytes)
    }
}
