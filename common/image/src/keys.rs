//! The image key and what is derived from it (DESIGN.md §3 "Key"; C2SP chunked-encryption's HKDF, counter nonce and commitment).

use crate::error::ImageError;
use crate::hash::sha256;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::{hkdf, rand};
use zeroize::{Zeroize as _, ZeroizeOnDrop, Zeroizing};

/// The data encryption key of one seal: 32 random bytes, never reused. No `Debug`; zeroized on drop.
#[derive(Clone, ZeroizeOnDrop)]
pub struct Dek([u8; 32]);

impl Dek {
    /// A new random key.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn generate() -> Result<Self, ImageError> {
        let mut bytes = [0; 32];
        rand::fill(&mut bytes).map_err(|_| ImageError::Crypto("making a key"))?;
        Ok(Self(bytes))
    }

    /// From its bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes, for wrapping.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// From the text of a key file: 64 hexadecimal digits and at most one newline.
    ///
    /// # Errors
    /// Any other text.
    pub fn from_hex(text: &[u8]) -> Result<Self, ImageError> {
        let digits = text.strip_suffix(b"\n").unwrap_or(text);
        if digits.len() != 64 {
            return Err(ImageError::KeyText("the length is another"));
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes)
            .map_err(|_| ImageError::KeyText("a character is no hexadecimal digit"))?;
        let key = Self(bytes);
        bytes.zeroize();
        Ok(key)
    }

    /// The text of a key file, with its newline.
    #[must_use]
    pub fn to_hex(&self) -> Zeroizing<String> {
        let mut text = hex::encode(self.0);
        text.push('\n');
        Zeroizing::new(text)
    }

    /// Names the key without telling it: the first 16 bytes of SHA-256("moor/v1 key-id" ‖ key).
    #[must_use]
    pub fn key_id(&self) -> [u8; 16] {
        let mut id = [0; 16];
        id.copy_from_slice(&sha256(&[b"moor/v1 key-id", &self.0])[..16]);
        id
    }
}

/// Length of HKDF output, for aws-lc's API.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// A cipher whose nonce is fixed by the derivation.
struct Cipher {
    key: LessSafeKey,
    base: [u8; 12],
}

impl Cipher {
    fn new(material: &[u8; 44]) -> Result<Self, ImageError> {
        let key =
            UnboundKey::new(&AES_256_GCM, &material[..32]).map_err(|_| ImageError::Crypto("setting up AES-256-GCM"))?;
        let mut base = [0; 12];
        base.copy_from_slice(&material[32..]);
        Ok(Self { key: LessSafeKey::new(key), base })
    }

    /// Base nonce XOR `counter` as a 96-bit big-endian number.
    fn nonce(&self, counter: u64) -> Nonce {
        let mut nonce = self.base;
        for (byte, count) in nonce[4..].iter_mut().zip(counter.to_be_bytes()) {
            *byte ^= count;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    fn seal(&self, counter: u64, data: &mut Vec<u8>) -> Result<(), ImageError> {
        self.key
            .seal_in_place_append_tag(self.nonce(counter), Aad::empty(), data)
            .map_err(|_| ImageError::Crypto("encrypting"))
    }

    /// Decrypts in place; the tag's bytes stay behind the plaintext. `None`: the tag does not match, and `data` holds nothing of use.
    fn open_slice<'a>(&self, counter: u64, data: &'a mut [u8]) -> Option<&'a mut [u8]> {
        self.key.open_in_place(self.nonce(counter), Aad::empty(), data).ok()
    }

    /// Decrypts in place and cuts off the tag; `false`: the tag does not match, and `data` is emptied.
    fn open(&self, counter: u64, data: &mut Vec<u8>) -> bool {
        let length = self.open_slice(counter, data).map(|plain| plain.len());
        data.truncate(length.unwrap_or(0));
        length.is_some()
    }
}

/// Everything derived from a key and the first 64 bytes of a header.
pub(crate) struct Keys {
    prk: hkdf::Prk,
    context: [u8; 32],
    chunks: Cipher,
}

/// The single-message sections behind the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Section {
    Metadata,
    Hints,
}

impl Section {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Metadata => "metadata",
            Self::Hints => "hints",
        }
    }

    fn label(self) -> &'static [u8] {
        match self {
            Self::Metadata => b"moor/v1 metadata\0",
            Self::Hints => b"moor/v1 hints\0",
        }
    }
}

impl Keys {
    pub(crate) fn derive(dek: &Dek, salt: &[u8; 32], context_input: &[u8]) -> Result<Self, ImageError> {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA512, salt).extract(&dek.0);
        let context = sha256(&[b"moor/v1 ctx", context_input]);
        let material = expand::<44>(&prk, &[b"moor/v1 AEAD_AES_256_GCM\0", &context])?;
        Ok(Self { prk, context, chunks: Cipher::new(&material)? })
    }

    /// The header MAC over bytes 0..319.
    pub(crate) fn mac(&self, header: &[u8]) -> Result<[u8; 32], ImageError> {
        Ok(*expand::<32>(&self.prk, &[b"moor/v1 header-mac\0", &sha256(&[header])])?)
    }

    pub(crate) fn check_mac(&self, header: &[u8], expected: &[u8; 32]) -> Result<(), ImageError> {
        verify_slices_are_equal(&self.mac(header)?, expected).map_err(|_| ImageError::HeaderMac)
    }

    pub(crate) fn seal_chunk(&self, index: u64, data: &mut Vec<u8>) -> Result<(), ImageError> {
        self.chunks.seal(index, data)
    }

    pub(crate) fn open_chunk(&self, index: u64, data: &mut Vec<u8>) -> bool {
        self.chunks.open(index, data)
    }

    /// The same for a chunk that lies among others: its plaintext, or `None`.
    pub(crate) fn open_chunk_slice<'a>(&self, index: u64, data: &'a mut [u8]) -> Option<&'a mut [u8]> {
        self.chunks.open_slice(index, data)
    }

    fn section(&self, section: Section) -> Result<Cipher, ImageError> {
        Cipher::new(&*expand::<44>(&self.prk, &[section.label(), &self.context])?)
    }

    pub(crate) fn seal_section(&self, section: Section, data: &mut Vec<u8>) -> Result<(), ImageError> {
        self.section(section)?.seal(0, data)
    }

    pub(crate) fn open_section(&self, section: Section, data: &mut Vec<u8>) -> Result<bool, ImageError> {
        Ok(self.section(section)?.open(0, data))
    }
}

fn expand<const N: usize>(prk: &hkdf::Prk, info: &[&[u8]]) -> Result<Zeroizing<[u8; N]>, ImageError> {
    let mut out = Zeroizing::new([0; N]);
    prk.expand(info, Length(N)).and_then(|okm| okm.fill(&mut *out)).map_err(|_| ImageError::Crypto("deriving keys"))?;
    Ok(out)
}
