//! A second implementation of the sealed image, written from docs/formats.md alone and on other libraries (`RustCrypto` instead of
//! aws-lc): the oracle of the test vectors, and the workshop of whoever forges an image.
#![allow(dead_code, unreachable_pub)] // each test program uses a part
#![allow(clippy::unwrap_used)]

use aes_gcm::aead::{Aead as _, KeyInit as _};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use hmac::{Hmac, Mac as _};
use sha2::{Digest as _, Sha256, Sha512};

/// What an image is made of.
#[derive(Clone)]
pub struct Recipe {
    pub dek: Option<[u8; 32]>,
    pub salt: [u8; 32],
    pub chunk_log2: u8,
    pub payload: u8,
    pub lineage: [u8; 16],
    pub serial: u64,
    pub created: u64,
    pub plaintext: Vec<u8>,
    pub metadata: Vec<u8>,
    pub hints: Vec<u8>,
}

impl Recipe {
    /// Bytes 0 to 63.
    pub fn start(&self) -> [u8; 64] {
        let mut start = [0; 64];
        start[..8].copy_from_slice(&[0x89, 0x4D, 0x4F, 0x4F, 0x52, 0x0D, 0x0A, 0x1A]);
        start[8] = 1;
        start[12..16].copy_from_slice(&4096_u32.to_le_bytes());
        start[16] = if self.dek.is_some() { 3 } else { 2 };
        start[24] = u8::from(self.dek.is_some());
        start[25] = 1;
        start[26] = 1;
        start[27] = self.chunk_log2;
        start[28] = self.payload;
        start[32..48].copy_from_slice(&self.lineage);
        start[48..56].copy_from_slice(&self.serial.to_le_bytes());
        start[56..64].copy_from_slice(&self.created.to_le_bytes());
        start
    }

    pub fn keys(&self) -> Option<Keys> {
        self.dek.map(|dek| Keys::derive(&dek, &self.salt, &self.start()))
    }

    pub fn chunk_size(&self) -> usize {
        1 << self.chunk_log2
    }

    /// The sealed chunks, in order.
    pub fn chunks(&self) -> Vec<Vec<u8>> {
        let keys = self.keys();
        let pieces = self.plaintext.chunks(self.chunk_size()).zip(0..);
        pieces
            .map(|(plain, index)| keys.as_ref().map_or_else(|| plain.to_vec(), |keys| keys.seal_chunk(index, plain)))
            .collect()
    }

    /// The whole file, as it should be.
    pub fn build(&self) -> Vec<u8> {
        self.build_around(&self.chunks())
    }

    /// The whole file around chunks that somebody gives: table and header are made for them, and signed with the key if there is
    /// one. This is what a holder of the key can do.
    pub fn build_around(&self, chunks: &[Vec<u8>]) -> Vec<u8> {
        let keys = self.keys();
        let leaves: Vec<[u8; 32]> = chunks.iter().zip(0..).map(|(chunk, index)| leaf(index, chunk)).collect();
        let pages: Vec<[u8; 32]> =
            leaves.chunks(2048).zip(0..).map(|(leaves, index)| page(index, &leaves.concat())).collect();
        let section = |label: &str, plain: &[u8]| match &keys {
            Some(keys) if !plain.is_empty() => keys.section(label, plain),
            _ => plain.to_vec(),
        };
        let metadata = section("moor/v1 metadata\0", &self.metadata);
        let hints = section("moor/v1 hints\0", &self.hints);

        let data: u64 = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let table = 4096 + data;
        let table_length = 32 * (pages.len() + leaves.len()) as u64;
        let mut header = vec![0; 4096];
        header[..64].copy_from_slice(&self.start());
        let mut number = |at: usize, value: u64| header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        number(64, self.plaintext.len() as u64);
        number(72, chunks.len() as u64);
        number(80, 4096);
        number(88, data);
        number(96, table);
        number(104, table_length);
        number(112, table + table_length);
        number(120, metadata.len() as u64);
        if !hints.is_empty() {
            number(128, table + table_length + metadata.len() as u64);
            number(136, hints.len() as u64);
            header[288..320].copy_from_slice(&sha256(&[&hints]));
        }
        header[160..192].copy_from_slice(&self.salt);
        header[224..256].copy_from_slice(&root(chunks.len() as u64, &pages.concat()));
        header[256..288].copy_from_slice(&sha256(&[&metadata]));
        if let Some(dek) = &self.dek {
            header[192..208].copy_from_slice(&key_id(dek));
        }
        seal_header(&mut header, keys.as_ref());
        [header, chunks.concat(), pages.concat(), leaves.concat(), metadata, hints].concat()
    }
}

/// Puts MAC (with keys) and header hash into a header that was changed.
pub fn seal_header(file: &mut [u8], keys: Option<&Keys>) {
    if let Some(keys) = keys {
        let mac = keys.header_mac(&file[..320]);
        file[320..352].copy_from_slice(&mac);
    }
    let hash = sha256(&[b"moor/v1 header", &file[..4064]]);
    file[4064..4096].copy_from_slice(&hash);
}

pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    hash.finalize().into()
}

pub fn leaf(index: u64, sealed: &[u8]) -> [u8; 32] {
    sha256(&[&[0], b"moor-leaf", &index.to_le_bytes(), sealed])
}

pub fn page(index: u64, leaves: &[u8]) -> [u8; 32] {
    sha256(&[&[2], b"moor-page", &index.to_le_bytes(), leaves])
}

pub fn root(chunks: u64, pages: &[u8]) -> [u8; 32] {
    sha256(&[&[1], b"moor-root", &chunks.to_le_bytes(), pages])
}

pub fn key_id(dek: &[u8; 32]) -> [u8; 16] {
    sha256(&[b"moor/v1 key-id", dek])[..16].try_into().unwrap()
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 64] {
    let mut mac = <Hmac<Sha512> as hmac::Mac>::new_from_slice(key).unwrap();
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// RFC 5869, section 2.3, for what fits in one block of SHA-512.
fn expand(prk: &[u8; 64], info: &[&[u8]], length: usize) -> Vec<u8> {
    let mut parts = info.to_vec();
    parts.push(&[1]);
    hmac(prk, &parts)[..length].to_vec()
}

/// Everything that follows from a DEK, a salt and bytes 0 to 63.
pub struct Keys {
    pub prk: [u8; 64],
    pub context: [u8; 32],
    pub chunk_key: [u8; 32],
    pub base_nonce: [u8; 12],
}

impl Keys {
    pub fn derive(dek: &[u8; 32], salt: &[u8; 32], start: &[u8; 64]) -> Self {
        // RFC 5869, section 2.2: the salt is the key of the HMAC.
        let prk = hmac(salt, &[dek]);
        let context = sha256(&[b"moor/v1 ctx", start]);
        let material = expand(&prk, &[b"moor/v1 AEAD_AES_256_GCM\0", &context], 44);
        Self {
            prk,
            context,
            chunk_key: material[..32].try_into().unwrap(),
            base_nonce: material[32..].try_into().unwrap(),
        }
    }

    pub fn header_mac(&self, start: &[u8]) -> [u8; 32] {
        assert_eq!(start.len(), 320);
        expand(&self.prk, &[b"moor/v1 header-mac\0", &sha256(&[start])], 32).try_into().unwrap()
    }

    pub fn nonce(&self, index: u64) -> [u8; 12] {
        let counter = u128::from(index).to_be_bytes();
        let mut nonce = self.base_nonce;
        for (byte, count) in nonce.iter_mut().zip(&counter[4..]) {
            *byte ^= count;
        }
        nonce
    }

    pub fn seal_chunk(&self, index: u64, plain: &[u8]) -> Vec<u8> {
        seal(&self.chunk_key, &self.nonce(index), plain)
    }

    pub fn open_chunk(&self, index: u64, sealed: &[u8]) -> Option<Vec<u8>> {
        open(&self.chunk_key, &self.nonce(index), sealed)
    }

    fn section_key(&self, label: &str) -> ([u8; 32], [u8; 12]) {
        let material = expand(&self.prk, &[label.as_bytes(), &self.context], 44);
        (material[..32].try_into().unwrap(), material[32..].try_into().unwrap())
    }

    pub fn section(&self, label: &str, plain: &[u8]) -> Vec<u8> {
        let (key, nonce) = self.section_key(label);
        seal(&key, &nonce, plain)
    }

    pub fn open_section(&self, label: &str, sealed: &[u8]) -> Option<Vec<u8>> {
        let (key, nonce) = self.section_key(label);
        open(&key, &nonce, sealed)
    }
}

fn seal(key: &[u8; 32], nonce: &[u8; 12], plain: &[u8]) -> Vec<u8> {
    Aes256Gcm::new(Key::<Aes256Gcm>::from_slice(key)).encrypt(Nonce::from_slice(nonce), plain).unwrap()
}

fn open(key: &[u8; 32], nonce: &[u8; 12], sealed: &[u8]) -> Option<Vec<u8>> {
    Aes256Gcm::new(Key::<Aes256Gcm>::from_slice(key)).decrypt(Nonce::from_slice(nonce), sealed).ok()
}

/// Reads an image by the offsets of its header; believes everything but tags.
pub fn read(file: &[u8], dek: Option<&[u8; 32]>) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let number = |at: usize| usize::try_from(u64::from_le_bytes(file[at..at + 8].try_into().unwrap())).unwrap();
    let keys = dek.map(|dek| Keys::derive(dek, file[160..192].try_into().unwrap(), file[..64].try_into().unwrap()));
    if let Some(keys) = &keys {
        assert_eq!(keys.header_mac(&file[..320])[..], file[320..352]);
    }
    let stored = (1 << file[27]) + if keys.is_some() { 16 } else { 0 };
    let data = &file[number(80)..number(80) + number(88)];
    let plaintext = data
        .chunks(stored)
        .zip(0..)
        .flat_map(|(chunk, index)| match &keys {
            Some(keys) => keys.open_chunk(index, chunk).unwrap(),
            None => chunk.to_vec(),
        })
        .collect();
    let section = |at: usize, label: &str| {
        let bytes = &file[number(at)..number(at) + number(at + 8)];
        match &keys {
            Some(keys) if !bytes.is_empty() => keys.open_section(label, bytes).unwrap(),
            _ => bytes.to_vec(),
        }
    };
    (plaintext, section(112, "moor/v1 metadata\0"), section(128, "moor/v1 hints\0"))
}
