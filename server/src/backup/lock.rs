//! Who opens a backup: the header of the file (docs/formats.md, "Backup"), and the way to the key that its pieces are under. That is either
//! derived from a passphrase by Argon2id, or drawn, and encrypted by HPKE (RFC 9180) to each recipient; who makes such a one keeps nothing
//! that opens it.

use crate::secrets::SUITE;
use argon2::{Algorithm, Argon2, Block, Params, Version};
use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use aws_lc_rs::{hkdf, hmac, rand};
use moor_api::admin::BACKUP_MAGIC as MAGIC;
use moor_api::backup_key::{BackupIdentity, KEY, MAX_RECIPIENTS, Recipient};
use rustls::crypto::hpke::{EncapsulatedSecret, Hpke as _, HpkePrivateKey, HpkePublicKey};
use std::io::{self, Read};
use zeroize::Zeroizing;

/// The format whose key comes of a passphrase.
const BY_PASSPHRASE: u16 = 1;
/// The format whose key is encrypted to recipients. Releases that know only the other one say that a newer wrote it.
const TO_RECIPIENTS: u16 = 2;
/// The only way from a passphrase to a key so far.
const ARGON2ID: u8 = 1;
/// The only way from a recipient's key to the backup's so far.
const HPKE: u8 = 2;
/// Bytes of the header, without recipients and MAC.
pub(super) const HEADER: usize = 64;
/// What encryption adds to the key.
const TAG: usize = 16;
/// Bytes for each recipient: what HPKE agrees by, and the encrypted key.
const SLOT: usize = KEY + KEY + TAG;
/// Bytes of the header's MAC.
pub(super) const MAC: usize = 32;
/// What HPKE encrypts: this is never taken for something else.
const INFO: &[u8] = b"moor/v1 backup";

/// A file is no backup that this release, and what it was given, opens.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    /// It begins otherwise.
    #[error("it is no encrypted backup of Mooring")]
    NotOne,
    /// A later release's.
    #[error(
        "it has format {0}, and this release knows formats up to {TO_RECIPIENTS}: a newer release wrote it, take that one"
    )]
    Newer(u16),
    /// The header asks for what nobody writes.
    #[error("its header is damaged: {0}")]
    Header(String),
    /// The header does not go with the passphrase.
    #[error("the passphrase is another one (or the first {} bytes of the file were altered)", HEADER + MAC)]
    Passphrase,
    /// None of it is for this key.
    #[error(
        "none of the {recipients} keys that it is encrypted to is this one (or the first {bytes} bytes of the file were altered)"
    )]
    Identity {
        /// How many there are.
        recipients: usize,
        /// Length of the header.
        bytes: usize,
    },
    /// A passphrase opens nothing in it.
    #[error(
        "it is encrypted to keys, and no passphrase opens it: `--identity FILE` names the file that has a private one ('-': standard input)"
    )]
    WantsIdentity,
    /// There is no key that it could be encrypted to.
    #[error("it is under a passphrase, and encrypted to no key: leave `--identity` away")]
    WantsPassphrase,
    /// A recipient that nothing can be encrypted to.
    #[error("nothing can be encrypted to {0}: it is no usable key")]
    Recipient(Recipient),
    /// None, or too many.
    #[error("a backup is encrypted to one key at least, and {MAX_RECIPIENTS} at most; these are {0}")]
    Recipients(usize),
    /// A piece does not open.
    #[error("it is damaged at byte {0}: something was altered there, or the end is missing")]
    Damaged(u64),
    /// The header is not whole.
    #[error("it ends within its first {0} bytes")]
    Short(usize),
}

pub(super) fn wrong(error: SealedError) -> io::Error {
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

/// What the first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Passphrase(Cost),
    Recipients(usize),
}

impl Way {
    /// Bytes of the recipients.
    fn slots(self) -> usize {
        match self {
            Self::Passphrase(_) => 0,
            Self::Recipients(count) => count * SLOT,
        }
    }

    /// Bytes before the first piece.
    fn length(self) -> usize {
        HEADER + self.slots() + MAC
    }
}

/// The part that all have.
fn header(way: Way, salt: &[u8; 32]) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(&MAGIC);
    match way {
        Way::Passphrase(cost) => {
            bytes[8..10].copy_from_slice(&BY_PASSPHRASE.to_le_bytes());
            bytes[10] = ARGON2ID;
            bytes[12..16].copy_from_slice(&cost.memory.to_le_bytes());
            bytes[16..20].copy_from_slice(&cost.passes.to_le_bytes());
            bytes[20..24].copy_from_slice(&cost.lanes.to_le_bytes());
        }
        Way::Recipients(count) => {
            bytes[8..10].copy_from_slice(&TO_RECIPIENTS.to_le_bytes());
            bytes[10] = HPKE;
            // Never more than `MAX_RECIPIENTS`.
            bytes[12..16].copy_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
        }
    }
    bytes[32..].copy_from_slice(salt);
    bytes
}

fn read_header(bytes: &[u8; HEADER]) -> Result<(Way, [u8; 32]), SealedError> {
    if bytes[..8] != MAGIC {
        return Err(SealedError::NotOne);
    }
    let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let damaged = |what: String| Err(SealedError::Header(format!("{what} is not what any release writes")));
    let way = match u16::from_le_bytes([bytes[8], bytes[9]]) {
        BY_PASSPHRASE => {
            let cost = Cost { memory: number(12), passes: number(16), lanes: number(20) };
            let is_known = bytes[10] == ARGON2ID && bytes[11] == 0 && bytes[24..32] == [0; 8];
            let is_sane = cost.memory <= MOST.memory && cost.passes <= MOST.passes && cost.lanes <= MOST.lanes;
            if !is_known || !is_sane {
                return damaged(format!("{cost:?}"));
            }
            Way::Passphrase(cost)
        }
        TO_RECIPIENTS => {
            let count = usize::try_from(number(12)).unwrap_or(usize::MAX);
            let is_known = bytes[10] == HPKE && bytes[11] == 0 && bytes[16..32] == [0; 16];
            if !is_known || !(1..=MAX_RECIPIENTS).contains(&count) {
                return damaged(format!("way {} to {count} keys", bytes[10]));
            }
            Way::Recipients(count)
        }
        version => return Err(SealedError::Newer(version)),
    };
    let mut salt = [0; 32];
    salt.copy_from_slice(&bytes[32..]);
    Ok((way, salt))
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
fn stretch(passphrase: &[u8], cost: Cost, salt: &[u8; 32]) -> io::Result<Zeroizing<[u8; KEY]>> {
    let params = Params::new(cost.memory, cost.passes, cost.lanes, Some(KEY))
        .map_err(|error| wrong(SealedError::Header(error.to_string())))?;
    let mut memory = Zeroizing::new(vec![Block::new(); params.block_count()]);
    let mut key = Zeroizing::new([0; KEY]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into_with_memory(passphrase, salt, &mut *key, &mut memory[..])
        .map_err(|error| io::Error::other(format!("deriving a key: {error}")))?;
    Ok(key)
}

fn keys(secret: &[u8; KEY], salt: &[u8; 32]) -> io::Result<Keys> {
    let mut okm = Zeroizing::new([0; 64]);
    let failed = |_| io::Error::other("deriving a key failed");
    let extracted = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    extracted.expand(&[b"moor/v1 backup\0"], Okm).and_then(|expanded| expanded.fill(&mut *okm)).map_err(failed)?;
    let pieces = UnboundKey::new(&AES_256_GCM, &okm[32..]).map_err(failed)?;
    Ok(Keys { header: hmac::Key::new(hmac::HMAC_SHA256, &okm[..32]), pieces: LessSafeKey::new(pieces) })
}

fn random(bytes: &mut [u8]) -> io::Result<()> {
    rand::fill(bytes).map_err(|_| io::Error::other("no randomness"))
}

/// What a new backup begins with, and the key of its pieces.
pub struct Lock {
    pub(super) header: Vec<u8>,
    pub(super) pieces: LessSafeKey,
}

impl Lock {
    /// Opened by a passphrase. Takes a tenth of a second and 64 MiB.
    ///
    /// # Errors
    /// No randomness.
    pub fn by_passphrase(passphrase: &[u8]) -> io::Result<Self> {
        let mut salt = [0; 32];
        random(&mut salt)?;
        Self::of(&header(Way::Passphrase(COST), &salt), &*stretch(passphrase, COST, &salt)?, &salt, &[])
    }

    /// Opened by each of these recipients' private halves.
    ///
    /// # Errors
    /// They are none or too many; one is no usable key; no randomness.
    pub fn to_recipients(recipients: &[Recipient]) -> io::Result<Self> {
        if !(1..=MAX_RECIPIENTS).contains(&recipients.len()) {
            return Err(wrong(SealedError::Recipients(recipients.len())));
        }
        let (mut salt, mut secret) = ([0; 32], Zeroizing::new([0; KEY]));
        random(&mut salt)?;
        random(&mut *secret)?;
        let first = header(Way::Recipients(recipients.len()), &salt);
        let mut slots = Vec::with_capacity(recipients.len() * SLOT);
        for recipient in recipients {
            let to = HpkePublicKey(recipient.as_bytes().to_vec());
            let sealed = SUITE.seal(INFO, &first, &*secret, &to);
            // What refuses it are keys that agree on the same with everybody (RFC 7748, 6.1).
            let (EncapsulatedSecret(encapsulated), ciphertext) =
                sealed.map_err(|_| wrong(SealedError::Recipient(*recipient)))?;
            slots.extend_from_slice(&encapsulated);
            slots.extend_from_slice(&ciphertext);
        }
        Self::of(&first, &secret, &salt, &slots)
    }

    fn of(first: &[u8; HEADER], secret: &[u8; KEY], salt: &[u8; 32], slots: &[u8]) -> io::Result<Self> {
        let keys = keys(secret, salt)?;
        let mut header = [&first[..], slots].concat();
        header.extend_from_slice(hmac::sign(&keys.header, &header).as_ref());
        Ok(Self { header, pieces: keys.pieces })
    }
}

/// What may open a backup. No `Debug`; it is wiped.
pub enum Opener {
    /// A passphrase.
    Passphrase(Zeroizing<String>),
    /// A recipient's private half.
    Identity(BackupIdentity),
}

/// The header of a backup that is there.
pub(super) struct Locked {
    way: Way,
    salt: [u8; 32],
    /// All of it, with its MAC.
    bytes: Vec<u8>,
}

impl Locked {
    /// Reads it, and not more.
    pub(super) fn read(mut input: impl Read) -> io::Result<Self> {
        let mut bytes = Vec::with_capacity(HEADER + SLOT + MAC);
        (&mut input).take(HEADER as u64).read_to_end(&mut bytes)?;
        let Some(first) = bytes.first_chunk::<HEADER>() else {
            let is_ours = bytes.starts_with(&MAGIC);
            return Err(wrong(if is_ours { SealedError::Short(HEADER + MAC) } else { SealedError::NotOne }));
        };
        let (way, salt) = read_header(first).map_err(wrong)?;
        input.take((way.length() - HEADER) as u64).read_to_end(&mut bytes)?;
        if bytes.len() != way.length() {
            return Err(wrong(SealedError::Short(way.length())));
        }
        Ok(Self { way, salt, bytes })
    }

    /// Bytes of it: where the pieces begin.
    pub(super) fn length(&self) -> usize {
        self.bytes.len()
    }

    /// Whether a passphrase opens it; otherwise a recipient's key does.
    pub(super) fn wants_passphrase(&self) -> bool {
        matches!(self.way, Way::Passphrase(_))
    }

    /// The key of the pieces.
    pub(super) fn open(&self, opener: &Opener) -> io::Result<LessSafeKey> {
        let (secret, mistaken) = match (self.way, opener) {
            (Way::Passphrase(cost), Opener::Passphrase(passphrase)) => {
                (stretch(passphrase.as_bytes(), cost, &self.salt)?, SealedError::Passphrase)
            }
            (Way::Recipients(recipients), Opener::Identity(identity)) => {
                let bytes = self.bytes.len();
                let secret = self.unwrap(identity).ok_or_else(|| wrong(SealedError::Identity { recipients, bytes }))?;
                (secret, SealedError::Header("something in it was altered".into()))
            }
            (Way::Passphrase(_), Opener::Identity(_)) => return Err(wrong(SealedError::WantsPassphrase)),
            (Way::Recipients(_), Opener::Passphrase(_)) => return Err(wrong(SealedError::WantsIdentity)),
        };
        let keys = keys(&secret, &self.salt)?;
        let (header, mac) = self.bytes.split_at(self.bytes.len() - MAC);
        hmac::verify(&keys.header, header, mac).map_err(|_| wrong(mistaken))?;
        Ok(keys.pieces)
    }

    /// What is encrypted to this key. No place says whose it is, so that a backup does not tell who opens it: all are tried.
    fn unwrap(&self, identity: &BackupIdentity) -> Option<Zeroizing<[u8; KEY]>> {
        let key = HpkePrivateKey::from(identity.secret_bytes().to_vec());
        let (first, rest) = self.bytes.split_at(HEADER);
        rest[..self.way.slots()].chunks_exact(SLOT).find_map(|slot| {
            let (encapsulated, ciphertext) = slot.split_at(KEY);
            let from = EncapsulatedSecret(encapsulated.to_vec());
            let plain = Zeroizing::new(SUITE.open(&from, INFO, first, ciphertext, &key).ok()?);
            let mut secret = Zeroizing::new([0; KEY]);
            (plain.len() == KEY).then(|| secret.copy_from_slice(&plain))?;
            Some(secret)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSPHRASE: &str = "correct horse battery staple";

    fn passphrase(text: &str) -> Opener {
        Opener::Passphrase(Zeroizing::new(text.into()))
    }

    fn says(file: &[u8], opener: &Opener) -> String {
        Locked::read(file).and_then(|locked| locked.open(opener)).map(drop).unwrap_err().to_string()
    }

    fn pairs(count: usize) -> (Vec<Opener>, Vec<Recipient>) {
        let pairs = (0..count).map(|_| BackupIdentity::generate().unwrap());
        let with = pairs.map(|identity| (identity.recipient().unwrap(), Opener::Identity(identity)));
        let (recipients, openers) = with.unzip();
        (openers, recipients)
    }

    #[test]
    fn a_backup_opens_by_its_own_passphrase_only_and_never_twice_the_same() {
        let [one, other] = [(); 2].map(|()| Lock::by_passphrase(PASSPHRASE.as_bytes()).unwrap().header);
        assert_eq!((one.len(), &one[8..11]), (HEADER + MAC, &[1, 0, ARGON2ID][..]), "a format that releases know");
        assert_ne!(one[32..], other[32..], "salt and all that follows from it are new each time");
        assert!(Locked::read(&*one).unwrap().open(&passphrase(PASSPHRASE)).is_ok());
        assert!(says(&one, &passphrase("correct horse battery stapl")).contains("the passphrase is another one"));
        assert!(says(b"", &passphrase(PASSPHRASE)).contains("no encrypted backup"));
        assert!(says(&one[..63], &passphrase(PASSPHRASE)).contains("ends within its first 96"));
        assert!(says(&one[..95], &passphrase(PASSPHRASE)).contains("ends within its first 96"));
        let mut newer = one.clone();
        newer[8] = 3;
        assert!(says(&newer, &passphrase(PASSPHRASE)).contains("a newer release wrote it"));
        // A header that asks for all memory is refused before any is taken.
        let mut greedy = one.clone();
        greedy[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(says(&greedy, &passphrase(PASSPHRASE)).contains("is not what any release writes"));
    }

    #[test]
    fn each_byte_of_a_passphrases_header_counts() {
        let file = Lock::by_passphrase(PASSPHRASE.as_bytes()).unwrap().header;
        let Locked { way: Way::Passphrase(cost), salt, .. } = Locked::read(&*file).unwrap() else {
            panic!("another way")
        };
        let ours = keys(&stretch(PASSPHRASE.as_bytes(), cost, &salt).unwrap(), &salt).unwrap();
        for at in 0..file.len() {
            let mut altered = file.clone();
            altered[at] ^= 1;
            // What is refused without the passphrase, or derives another key: its MAC is of other bytes in any case.
            let (head, mac) = altered.split_at(HEADER);
            assert!(hmac::verify(&ours.header, head, mac).is_err(), "byte {at}");
        }
    }

    #[test]
    fn each_recipient_opens_it_and_nobody_else() {
        for count in [1, 2, MAX_RECIPIENTS] {
            let (openers, recipients) = pairs(count);
            let lock = Lock::to_recipients(&recipients).unwrap();
            assert_eq!(lock.header.len(), HEADER + count * SLOT + MAC);
            for opener in &openers {
                assert!(Locked::read(&*lock.header).unwrap().open(opener).is_ok());
            }
            let stranger = pairs(1).0.remove(0);
            assert!(says(&lock.header, &stranger).contains(&format!("none of the {count} keys")));
            assert!(says(&lock.header, &passphrase(PASSPHRASE)).contains("--identity FILE"));
            for recipient in &recipients {
                let is_in = lock.header.windows(KEY).any(|bytes| bytes == recipient.as_bytes());
                assert!(!is_in, "the file says who opens it");
            }
        }
        let (identity, recipient) = pairs(1);
        let by_passphrase = Lock::by_passphrase(PASSPHRASE.as_bytes()).unwrap().header;
        assert!(says(&by_passphrase, &identity[0]).contains("under a passphrase"));
        assert!(Lock::to_recipients(&[]).is_err());
        assert!(Lock::to_recipients(&vec![recipient[0]; MAX_RECIPIENTS + 1]).is_err());
    }

    /// Of both recipients' views: who is the second one does not open what was altered for the first.
    #[test]
    fn each_byte_of_a_recipients_header_counts() {
        let (openers, recipients) = pairs(2);
        let file = Lock::to_recipients(&recipients).unwrap().header;
        for at in 0..file.len() {
            for bit in [0, 7] {
                let mut altered = file.clone();
                altered[at] ^= 1 << bit;
                for opener in &openers {
                    let opened = Locked::read(&*altered).and_then(|locked| locked.open(opener));
                    assert!(opened.is_err(), "byte {at}, bit {bit}");
                }
            }
        }
        for length in 0..file.len() {
            assert!(Locked::read(&file[..length]).is_err(), "cut to {length}");
        }
        let exchanged = [
            &file[..HEADER],
            &file[HEADER + SLOT..HEADER + 2 * SLOT],
            &file[HEADER..HEADER + SLOT],
            &file[HEADER + 2 * SLOT..],
        ];
        assert!(says(&exchanged.concat(), &openers[0]).contains("altered"));
    }

    /// Whatever stands there, no more is read than a header has, and nothing panics.
    #[test]
    fn random_headers_are_refused_and_read_no_further() {
        let mut random = fastrand::Rng::with_seed(5);
        let (opener, recipients) = pairs(1);
        let good = Lock::to_recipients(&recipients).unwrap().header;
        let longest = HEADER + MAX_RECIPIENTS * SLOT + MAC;
        for _ in 0..5000 {
            let mut bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(2 * longest).collect();
            let same = random.usize(..=32);
            bytes[..same].copy_from_slice(&good[..same]);
            let mut rest = &*bytes;
            if let Ok(locked) = Locked::read(&mut rest) {
                assert!(locked.length() <= longest && bytes.len() - rest.len() == locked.length());
                // A forged cost is not what this is about.
                assert!(locked.wants_passphrase() || locked.open(&opener[0]).is_err());
            } else {
                assert!(bytes.len() - rest.len() <= longest);
            }
        }
    }
}
