//! The header: 4096 bytes whose last 32 are the digest of the image. Parsing checks every rule that needs no key.

use crate::error::FormatError;
use crate::hash::sha256;

/// Length of the header in bytes.
pub const HEADER_LENGTH: usize = 4096;
/// Length of an AES-GCM tag in bytes.
pub const TAG_LENGTH: u64 = 16;
/// Leaf hashes on a page of the table.
pub const LEAVES_PER_PAGE: u64 = 2048;
/// Longest plaintext: 1 TiB.
pub const MAX_PLAINTEXT: u64 = 1 << 40;
/// Longest metadata section in bytes.
pub(crate) const MAX_METADATA: u64 = 64 << 20;
/// Longest hints section in bytes.
pub(crate) const MAX_HINTS: u64 = 64 << 20;

pub(crate) const MAGIC: [u8; 8] = [0x89, 0x4D, 0x4F, 0x4F, 0x52, 0x0D, 0x0A, 0x1A];
const MAJOR: u16 = 1;
const HEADER_HASH_AT: usize = 4064;

/// What the plaintext is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// One squashfs.
    Squashfs,
    /// Several filesystems, listed in the metadata.
    Set,
    /// Anything else.
    Opaque,
}

/// A header that obeys the format. Offsets and lengths are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Whether chunks are encrypted.
    pub encrypted: bool,
    /// log2 of the chunk size, 14 to 20.
    pub chunk_log2: u8,
    /// What the plaintext is.
    pub payload: Payload,
    /// Kept by all generations of one image name.
    pub lineage: [u8; 16],
    /// Grows in a lineage.
    pub serial: u64,
    /// Unix seconds.
    pub created: u64,
    /// Length of the plaintext.
    pub plaintext_length: u64,
    /// Number of chunks.
    pub chunks: u64,
    /// Where the hash table begins.
    pub table_offset: u64,
    /// Its length.
    pub table_length: u64,
    /// Where the metadata begins.
    pub metadata_offset: u64,
    /// Its length.
    pub metadata_length: u64,
    /// Where the hints begin; 0: there are none.
    pub hints_offset: u64,
    /// Their length.
    pub hints_length: u64,
    /// Salt of the key derivation.
    pub salt: [u8; 32],
    /// First 16 bytes of SHA-256("moor/v1 key-id" ‖ DEK); zero for a plain image.
    pub key_id: [u8; 16],
    /// Root of the hash table.
    pub root: [u8; 32],
    /// SHA-256 of the metadata section as it stands in the file.
    pub metadata_hash: [u8; 32],
    /// SHA-256 of the hints section; zero: none.
    pub hints_hash: [u8; 32],
    /// Commits to key and header; zero for a plain image.
    pub mac: [u8; 32],
    /// Digest of the image.
    pub digest: [u8; 32],
    /// The bytes as they were read: a later minor version may have set fields that this one does not know.
    bytes: Box<[u8; HEADER_LENGTH]>,
}

fn u16_at(bytes: &[u8; HEADER_LENGTH], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8; HEADER_LENGTH], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8; HEADER_LENGTH], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn array<const N: usize>(bytes: &[u8; HEADER_LENGTH], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn layout(field: &'static str, offset: usize, value: u64, expected: u64) -> Result<(), FormatError> {
    if value == expected { Ok(()) } else { Err(FormatError::Layout { field, offset, value, expected }) }
}

fn bounded(field: &'static str, offset: usize, value: u64, maximum: u64) -> Result<(), FormatError> {
    if value <= maximum { Ok(()) } else { Err(FormatError::TooLarge { field, offset, value, maximum }) }
}

impl Header {
    /// Parses and checks a header: magic and version, lengths and reserved bytes, then the header hash.
    ///
    /// # Errors
    /// The first rule it breaks.
    pub fn parse(bytes: &[u8; HEADER_LENGTH]) -> Result<Self, FormatError> {
        if bytes[..8] != MAGIC {
            return Err(FormatError::Magic);
        }
        if u16_at(bytes, 8) != MAJOR {
            return Err(FormatError::Major(u16_at(bytes, 8)));
        }
        let header = Self::fields(bytes)?;
        header.check_layout()?;
        // A later minor version, or a compatible flag, may give the reserved bytes a meaning; the digest covers them.
        if u16_at(bytes, 10) == 0 && u32_at(bytes, 20) == 0 {
            for range in [29..32, 144..160, 208..224, 352..HEADER_HASH_AT] {
                if let Some(at) = range.clone().find(|&at| bytes[at] != 0) {
                    return Err(FormatError::Reserved(at));
                }
            }
        }
        if header_hash(bytes) != header.digest {
            return Err(FormatError::HeaderHash);
        }
        Ok(header)
    }

    fn fields(bytes: &[u8; HEADER_LENGTH]) -> Result<Self, FormatError> {
        let field = |field, offset, value| FormatError::Field { field, offset, value };
        if u32_at(bytes, 12) as usize != HEADER_LENGTH {
            return Err(field("header length", 12, u64::from(u32_at(bytes, 12))));
        }
        let flags = u32_at(bytes, 16);
        // Bit 1 (hash table) is always set in version 1.
        if flags & !1 != 2 {
            return Err(field("incompatible flags", 16, u64::from(flags)));
        }
        let encrypted = flags & 1 == 1;
        if bytes[24] != u8::from(encrypted) {
            return Err(field("cipher", 24, u64::from(bytes[24])));
        }
        if bytes[25] != 1 {
            return Err(field("key derivation", 25, u64::from(bytes[25])));
        }
        if bytes[26] != 1 {
            return Err(field("hash", 26, u64::from(bytes[26])));
        }
        let chunk_log2 = bytes[27];
        if !(14..=20).contains(&chunk_log2) {
            return Err(field("chunk size", 27, u64::from(chunk_log2)));
        }
        let payload = match bytes[28] {
            1 => Payload::Squashfs,
            2 => Payload::Set,
            3 => Payload::Opaque,
            other => return Err(field("payload", 28, u64::from(other))),
        };
        let header = Self {
            encrypted,
            chunk_log2,
            payload,
            lineage: array(bytes, 32),
            serial: u64_at(bytes, 48),
            created: u64_at(bytes, 56),
            plaintext_length: u64_at(bytes, 64),
            chunks: u64_at(bytes, 72),
            table_offset: u64_at(bytes, 96),
            table_length: u64_at(bytes, 104),
            metadata_offset: u64_at(bytes, 112),
            metadata_length: u64_at(bytes, 120),
            hints_offset: u64_at(bytes, 128),
            hints_length: u64_at(bytes, 136),
            salt: array(bytes, 160),
            key_id: array(bytes, 192),
            root: array(bytes, 224),
            metadata_hash: array(bytes, 256),
            hints_hash: array(bytes, 288),
            mac: array(bytes, 320),
            digest: array(bytes, HEADER_HASH_AT),
            bytes: Box::new(*bytes),
        };
        if !encrypted {
            if header.key_id != [0; 16] {
                return Err(field("key id of a plain image", 192, u64::from(header.key_id[0])));
            }
            if header.mac != [0; 32] {
                return Err(field("MAC of a plain image", 320, u64::from(header.mac[0])));
            }
        }
        Ok(header)
    }

    fn check_layout(&self) -> Result<(), FormatError> {
        let bytes = &self.bytes;
        // Bounds first: with them no sum below can overflow.
        bounded("plaintext length", 64, self.plaintext_length, MAX_PLAINTEXT)?;
        bounded("metadata length", 120, self.metadata_length, MAX_METADATA)?;
        bounded("hints length", 136, self.hints_length, MAX_HINTS)?;
        layout("chunk count", 72, self.chunks, self.plaintext_length.div_ceil(self.chunk_size()))?;
        layout("data offset", 80, u64_at(bytes, 80), HEADER_LENGTH as u64)?;
        layout("data length", 88, u64_at(bytes, 88), self.plaintext_length + self.tag_length() * self.chunks)?;
        layout("table offset", 96, self.table_offset, HEADER_LENGTH as u64 + u64_at(bytes, 88))?;
        layout("table length", 104, self.table_length, 32 * (self.pages() + self.chunks))?;
        layout("metadata offset", 112, self.metadata_offset, self.table_offset + self.table_length)?;
        if self.hints_length == 0 {
            layout("hints offset", 128, self.hints_offset, 0)?;
            if self.hints_hash != [0; 32] {
                return Err(FormatError::Field {
                    field: "hash of absent hints",
                    offset: 288,
                    value: u64::from(self.hints_hash[0]),
                });
            }
        } else {
            layout("hints offset", 128, self.hints_offset, self.metadata_offset + self.metadata_length)?;
        }
        Ok(())
    }

    /// Digest of the image: what nodes pin.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Plaintext bytes of a full chunk.
    #[must_use]
    pub fn chunk_size(&self) -> u64 {
        1 << self.chunk_log2
    }

    /// Bytes that sealing adds to a chunk.
    #[must_use]
    pub fn tag_length(&self) -> u64 {
        if self.encrypted { TAG_LENGTH } else { 0 }
    }

    /// Number of pages of the table.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.chunks.div_ceil(LEAVES_PER_PAGE)
    }

    /// Plaintext length of chunk `index`; 0 past the end.
    #[must_use]
    pub fn chunk_plaintext(&self, index: u64) -> u64 {
        if index >= self.chunks {
            return 0;
        }
        (self.plaintext_length - index * self.chunk_size()).min(self.chunk_size())
    }

    /// Where sealed chunk `index` is in the file: offset and length. `None` past the end.
    #[must_use]
    pub fn chunk_range(&self, index: u64) -> Option<(u64, u64)> {
        (index < self.chunks).then(|| {
            let offset = HEADER_LENGTH as u64 + index * (self.chunk_size() + self.tag_length());
            (offset, self.chunk_plaintext(index) + self.tag_length())
        })
    }

    /// Where the page hashes are: offset and length.
    #[must_use]
    pub fn page_hashes_range(&self) -> (u64, u64) {
        (self.table_offset, 32 * self.pages())
    }

    /// Where page `page` of leaf hashes is: offset and length. `None` past the end.
    #[must_use]
    pub fn page_range(&self, page: u64) -> Option<(u64, u64)> {
        (page < self.pages()).then(|| {
            let first = page * LEAVES_PER_PAGE;
            (self.table_offset + 32 * (self.pages() + first), 32 * (self.chunks - first).min(LEAVES_PER_PAGE))
        })
    }

    /// Length of the whole file.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        self.metadata_offset + self.metadata_length + self.hints_length
    }

    /// The 4096 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; HEADER_LENGTH] {
        &self.bytes
    }

    /// Bytes 0..319, which the header MAC covers.
    pub(crate) fn mac_input(&self) -> &[u8] {
        &self.bytes[..320]
    }

    /// Bytes 0..63, which the key derivation binds.
    pub(crate) fn context_input(&self) -> &[u8] {
        &self.bytes[..64]
    }
}

fn header_hash(bytes: &[u8; HEADER_LENGTH]) -> [u8; 32] {
    sha256(&[b"moor/v1 header", &bytes[..HEADER_HASH_AT]])
}

/// What is known before the first byte of plaintext; makes bytes 0..63.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) encrypted: bool,
    pub(crate) chunk_log2: u8,
    pub(crate) payload: Payload,
    pub(crate) lineage: [u8; 16],
    pub(crate) serial: u64,
    pub(crate) created: u64,
}

/// A header in the making.
pub(crate) struct Builder {
    bytes: Box<[u8; HEADER_LENGTH]>,
    start: Start,
}

impl Builder {
    pub(crate) fn new(start: Start) -> Self {
        let mut bytes = Box::new([0; HEADER_LENGTH]);
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
        bytes[13] = 0x10;
        bytes[16] = 2 | u8::from(start.encrypted);
        bytes[24] = u8::from(start.encrypted);
        bytes[25] = 1;
        bytes[26] = 1;
        bytes[27] = start.chunk_log2;
        bytes[28] = match start.payload {
            Payload::Squashfs => 1,
            Payload::Set => 2,
            Payload::Opaque => 3,
        };
        bytes[32..48].copy_from_slice(&start.lineage);
        bytes[48..56].copy_from_slice(&start.serial.to_le_bytes());
        bytes[56..64].copy_from_slice(&start.created.to_le_bytes());
        Self { bytes, start }
    }

    pub(crate) fn context_input(&self) -> &[u8] {
        &self.bytes[..64]
    }

    pub(crate) fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn number(&mut self, at: usize, value: u64) {
        self.set(at, &value.to_le_bytes());
    }

    /// Fills in every offset and length from the plaintext's length and the sections behind the table.
    pub(crate) fn lay_out(&mut self, plaintext: u64, metadata: u64, hints: u64) {
        let tag = if self.start.encrypted { TAG_LENGTH } else { 0 };
        let chunks = plaintext.div_ceil(1 << self.start.chunk_log2);
        let data = plaintext + tag * chunks;
        let table = HEADER_LENGTH as u64 + data;
        let table_length = 32 * (chunks.div_ceil(LEAVES_PER_PAGE) + chunks);
        self.number(64, plaintext);
        self.number(72, chunks);
        self.number(80, HEADER_LENGTH as u64);
        self.number(88, data);
        self.number(96, table);
        self.number(104, table_length);
        self.number(112, table + table_length);
        self.number(120, metadata);
        if hints > 0 {
            self.number(128, table + table_length + metadata);
            self.number(136, hints);
        }
    }

    pub(crate) fn mac_input(&self) -> &[u8] {
        &self.bytes[..320]
    }

    /// Adds the header hash and parses the result, so that nothing is written that could not be read.
    pub(crate) fn finish(mut self) -> Result<Header, FormatError> {
        let hash = header_hash(&self.bytes);
        self.set(HEADER_HASH_AT, &hash);
        Header::parse(&self.bytes)
    }
}
