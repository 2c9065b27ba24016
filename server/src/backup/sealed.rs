//! A stream under a passphrase (docs/formats.md, "Backup"): Argon2id makes a key of the passphrase, AES-256-GCM encrypts the stream in
//! pieces that are numbered, and of which the last one says that it is the last. It is read back in order, unchanged and to its end, or
//! the reader fails.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::{hkdf, hmac, rand};
use std::io::{self, BufRead as _, BufReader, Read, Write};
use zeroize::Zeroizing;

/// What an encrypted backup begins with.
const MAGIC: [u8; 8] = *b"\x89MOORBK\n";
/// Version of the format.
const VERSION: u16 = 1;
/// The only way from a passphrase to a key so far.
const ARGON2ID: u8 = 1;
/// Bytes of the header, without its MAC.
const HEADER: usize = 64;
/// Bytes of the header's MAC.
const MAC: usize = 32;
/// Plaintext of a piece.
const PIECE: usize = 64 << 10;
/// What encryption adds to it.
const TAG: usize = 16;

/// A file is no backup that this release and this passphrase open.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    /// It begins otherwise.
    #[error("it is no encrypted backup of Mooring")]
    NotOne,
    /// A later release's.
    #[error("it has format {0}, and this release knows format {VERSION}: a newer release wrote it, take that one")]
    Newer(u16),
    /// The header asks for what nobody writes.
    #[error("its header is damaged: {0}")]
    Header(String),
    /// The header does not go with the passphrase.
    #[error("the passphrase is another one (or the first {} bytes of the file were altered)", HEADER + MAC)]
    Passphrase,
    /// A piece does not open.
    #[error("it is damaged at byte {0}: something was altered there, or the end is missing")]
    Damaged(u64),
    /// The header is not whole.
    #[error("it ends within its first {} bytes", HEADER + MAC)]
    Short,
}

fn wrong(error: SealedError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// What deriving a key costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cost {
    /// KiB of memory.
    memory: u32,
    /// Passes over it.
    passes: u32,
    /// Lanes.
    lanes: u32,
}

/// The second choice of RFC 9106 (§4): 64 MiB and three passes; one lane, because they are computed one after the other here.
const COST: Cost = Cost { memory: 64 << 10, passes: 3, lanes: 1 };
/// More than this is never asked for: a forged header must not take the machine's memory.
const MOST: Cost = Cost { memory: 1 << 20, passes: 16, lanes: 16 };

/// Everything that stands before the first piece.
fn header(cost: Cost, salt: &[u8; 32]) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes[10] = ARGON2ID;
    bytes[12..16].copy_from_slice(&cost.memory.to_le_bytes());
    bytes[16..20].copy_from_slice(&cost.passes.to_le_bytes());
    bytes[20..24].copy_from_slice(&cost.lanes.to_le_bytes());
    bytes[32..].copy_from_slice(salt);
    bytes
}

fn read_header(bytes: &[u8; HEADER]) -> Result<(Cost, [u8; 32]), SealedError> {
    if bytes[..8] != MAGIC {
        return Err(SealedError::NotOne);
    }
    let version = u16::from_le_bytes([bytes[8], bytes[9]]);
    if version != VERSION {
        return Err(SealedError::Newer(version));
    }
    let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let cost = Cost { memory: number(12), passes: number(16), lanes: number(20) };
    let is_known = bytes[10] == ARGON2ID && bytes[11] == 0 && bytes[24..32] == [0; 8];
    let is_sane = cost.memory <= MOST.memory && cost.passes <= MOST.passes && cost.lanes <= MOST.lanes;
    if !is_known || !is_sane {
        return Err(SealedError::Header(format!("{cost:?} is not what any release writes")));
    }
    let mut salt = [0; 32];
    salt.copy_from_slice(&bytes[32..]);
    Ok((cost, salt))
}

struct Keys {
    header: hmac::Key,
    pieces: LessSafeKey,
}

/// 64 bytes of HKDF.
struct Okm;

impl hkdf::KeyType for Okm {
    fn len(&self) -> usize {
        64
    }
}

/// The costly step: from a passphrase to a key.
fn stretch(passphrase: &[u8], cost: Cost, salt: &[u8; 32]) -> io::Result<Zeroizing<[u8; 32]>> {
    let params = Params::new(cost.memory, cost.passes, cost.lanes, Some(32))
        .map_err(|error| wrong(SealedError::Header(error.to_string())))?;
    let mut memory = Zeroizing::new(vec![Block::new(); params.block_count()]);
    let mut key = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into_with_memory(passphrase, salt, &mut *key, &mut memory[..])
        .map_err(|error| io::Error::other(format!("deriving a key: {error}")))?;
    Ok(key)
}

fn keys(stretched: &[u8; 32], salt: &[u8; 32]) -> io::Result<Keys> {
    let mut okm = Zeroizing::new([0; 64]);
    let failed = |_| io::Error::other("deriving a key failed");
    let extracted = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(stretched);
    extracted.expand(&[b"moor/v1 backup\0"], Okm).and_then(|expanded| expanded.fill(&mut *okm)).map_err(failed)?;
    let pieces = UnboundKey::new(&AES_256_GCM, &okm[32..]).map_err(failed)?;
    Ok(Keys { header: hmac::Key::new(hmac::HMAC_SHA256, &okm[..32]), pieces: LessSafeKey::new(pieces) })
}

/// A key is for one stream, and a number for one piece: no nonce comes twice.
fn nonce(number: u64, is_last: bool) -> Nonce {
    let mut bytes = [0; 12];
    bytes[3..11].copy_from_slice(&number.to_be_bytes());
    bytes[11] = u8::from(is_last);
    Nonce::assume_unique_for_key(bytes)
}

/// Encrypts what is written. Only [`Self::finish`] makes it whole.
pub struct Encrypting<W: Write> {
    out: W,
    key: LessSafeKey,
    /// Never longer than a piece with its tag, and allocated for that: no plaintext is left behind by one that grows.
    piece: Zeroizing<Vec<u8>>,
    number: u64,
}

impl<W: Write> Encrypting<W> {
    /// Begins with the header.
    ///
    /// # Errors
    /// No randomness; `out` failed.
    pub fn begin(mut out: W, passphrase: &[u8]) -> io::Result<Self> {
        let mut salt = [0; 32];
        rand::fill(&mut salt).map_err(|_| io::Error::other("no randomness"))?;
        let keys = keys(&*stretch(passphrase, COST, &salt)?, &salt)?;
        let header = header(COST, &salt);
        out.write_all(&header)?;
        out.write_all(hmac::sign(&keys.header, &header).as_ref())?;
        Ok(Self { out, key: keys.pieces, piece: Zeroizing::new(Vec::with_capacity(PIECE + TAG)), number: 0 })
    }

    fn seal(&mut self, is_last: bool) -> io::Result<()> {
        self.key
            .seal_in_place_append_tag(nonce(self.number, is_last), Aad::empty(), &mut *self.piece)
            .map_err(|_| io::Error::other("encrypting failed"))?;
        self.out.write_all(&self.piece)?;
        self.piece.clear();
        self.number += 1;
        Ok(())
    }

    /// Writes the last piece.
    ///
    /// # Errors
    /// `out` failed.
    pub fn finish(mut self) -> io::Result<W> {
        self.seal(true)?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Encrypting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() == PIECE {
            self.seal(false)?;
        }
        let count = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    /// Pieces are whole: only the end makes what was written readable.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Decrypts what is read; its end is reported only once the last piece was seen.
pub struct Decrypting<R: Read> {
    input: BufReader<R>,
    key: LessSafeKey,
    piece: Zeroizing<Vec<u8>>,
    /// How much of the piece was given out.
    given: usize,
    number: u64,
    is_last: bool,
}

impl<R: Read> Decrypting<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// It is no backup, of a newer format, or of another passphrase.
    pub fn begin(input: R, passphrase: &[u8]) -> io::Result<Self> {
        let mut input = BufReader::with_capacity(PIECE, input);
        let mut bytes = Vec::with_capacity(HEADER + MAC);
        (&mut input).take((HEADER + MAC) as u64).read_to_end(&mut bytes)?;
        let Some((header, mac)) = bytes.split_first_chunk::<HEADER>().filter(|(_, mac)| mac.len() == MAC) else {
            let is_ours = bytes.starts_with(&MAGIC);
            return Err(wrong(if is_ours { SealedError::Short } else { SealedError::NotOne }));
        };
        let (cost, salt) = read_header(header).map_err(wrong)?;
        let keys = keys(&*stretch(passphrase, cost, &salt)?, &salt)?;
        hmac::verify(&keys.header, header, mac).map_err(|_| wrong(SealedError::Passphrase))?;
        Ok(Self::over(input, keys.pieces))
    }

    fn over(input: BufReader<R>, key: LessSafeKey) -> Self {
        let piece = Zeroizing::new(Vec::with_capacity(PIECE + TAG));
        Self { input, key, piece, given: 0, number: 0, is_last: false }
    }

    fn open(&mut self) -> io::Result<()> {
        self.piece.clear();
        self.given = 0;
        (&mut self.input).take((PIECE + TAG) as u64).read_to_end(&mut self.piece)?;
        let is_last = self.input.fill_buf()?.is_empty();
        let at = (HEADER + MAC) as u64 + self.number * (PIECE + TAG) as u64;
        let opened = self.key.open_in_place(nonce(self.number, is_last), Aad::empty(), &mut self.piece);
        let length = opened.map(|plain| plain.len());
        // Of one that does not open nothing is given out, and no end, also to who reads on after the error.
        self.piece.truncate(*length.as_ref().unwrap_or(&0));
        length.map_err(|_| wrong(SealedError::Damaged(at)))?;
        self.is_last = is_last;
        self.number += 1;
        Ok(())
    }
}

impl<R: Read> Read for Decrypting<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.given == self.piece.len() {
            if self.is_last {
                return Ok(0);
            }
            self.open()?;
        }
        let count = out.len().min(self.piece.len() - self.given);
        out[..count].copy_from_slice(&self.piece[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSPHRASE: &[u8] = b"correct horse battery staple";

    fn sealed(plain: &[u8]) -> Vec<u8> {
        let mut out = Encrypting::begin(Vec::new(), PASSPHRASE).unwrap();
        out.write_all(plain).unwrap();
        out.finish().unwrap()
    }

    /// As [`Decrypting`], by a key that was stretched once: the cost of a passphrase is not what these tests are about.
    fn opened(file: &[u8], keys: Keys) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        let input = BufReader::new(&file[HEADER + MAC..]);
        Decrypting::over(input, keys.pieces).read_to_end(&mut plain).map(|_| plain)
    }

    #[test]
    fn what_was_written_is_read_and_the_size_says_how_much() {
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE] {
            let plain: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let file = sealed(&plain);
            assert_eq!(file.len(), HEADER + MAC + length + TAG * length.div_ceil(PIECE).max(1), "{length}");
            let mut back = Vec::new();
            Decrypting::begin(&*file, PASSPHRASE).unwrap().read_to_end(&mut back).unwrap();
            assert_eq!(back, plain, "{length}");
        }
    }

    #[test]
    fn a_backup_opens_by_its_own_passphrase_only_and_never_twice_the_same() {
        let (one, other) = (sealed(b"text"), sealed(b"text"));
        assert_ne!(one[32..], other[32..], "salt and all that follows from it are new each time");
        let says = |file: &[u8], passphrase: &[u8]| Decrypting::begin(file, passphrase).err().unwrap().to_string();
        assert!(says(&one, b"correct horse battery stapl").contains("the passphrase is another one"));
        assert!(says(b"", PASSPHRASE).contains("no encrypted backup"));
        assert!(says(&one[..95], PASSPHRASE).contains("ends within"));
        let mut newer = one.clone();
        newer[8] = 2;
        assert!(says(&newer, PASSPHRASE).contains("a newer release wrote it"));
        // A header that asks for all memory is refused before any is taken.
        let mut greedy = one.clone();
        greedy[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(says(&greedy, PASSPHRASE).contains("is not what any release writes"));
    }

    /// Of the header each byte, of the pieces each bit at some places, cuts and exchanges.
    #[test]
    fn an_altered_or_cut_backup_is_refused_wherever_it_is() {
        let plain = vec![7; 2 * PIECE + 100];
        let file = sealed(&plain);
        let mut bytes = [0; HEADER];
        bytes.copy_from_slice(&file[..HEADER]);
        let (cost, salt) = read_header(&bytes).unwrap();
        let stretched = stretch(PASSPHRASE, cost, &salt).unwrap();
        let ours = || keys(&stretched, &salt).unwrap();
        for at in 0..HEADER + MAC {
            let mut altered = file.clone();
            altered[at] ^= 1;
            // What is refused without the passphrase, or derives another key: its MAC is of other bytes in any case.
            let (head, mac) = altered[..HEADER + MAC].split_at(HEADER);
            assert!(hmac::verify(&ours().header, head, mac).is_err(), "byte {at}");
        }
        assert_eq!(opened(&file, ours()).unwrap(), plain);
        let piece = PIECE + TAG;
        let first = HEADER + MAC;
        for at in [first, first + PIECE, first + piece - 1, first + piece, first + 2 * piece, file.len() - 1] {
            for bit in 0..8 {
                let mut altered = file.clone();
                altered[at] ^= 1 << bit;
                let error = opened(&altered, ours()).unwrap_err().to_string();
                assert!(error.contains("damaged at byte"), "byte {at}: {error}");
            }
        }
        for length in [first, first + 1, first + piece - 1, first + piece, first + 2 * piece, file.len() - 1] {
            assert!(opened(&file[..length], ours()).is_err(), "cut to {length}");
        }
        // Who goes on after the error gets nothing either.
        for at in [first, file.len() - 1] {
            let mut altered = file.clone();
            altered[at] ^= 1;
            let mut reader = Decrypting::over(BufReader::new(&altered[first..]), ours().pieces);
            while let Ok(count) = reader.read(&mut [0; 1000]) {
                assert!(count > 0, "byte {at}: an end");
            }
            for _ in 0..4 {
                assert!(reader.read(&mut [0; 1000]).is_err(), "byte {at}");
            }
        }
        let exchanged = [&file[..first], &file[first + piece..first + 2 * piece], &file[first..first + piece]].concat();
        assert!(opened(&exchanged, ours()).is_err());
        assert!(opened(&[&file[..], b"x"].concat(), ours()).is_err(), "it goes on");
    }
}
