//! An encrypted stream (docs/formats.md, "Backup"): behind the header, which says who opens it ([`super::lock`]), AES-256-GCM encrypts it in
//! pieces that are numbered, and of which the last one says that it is the last. It is read back in order, unchanged and to its end, or
//! the reader fails.

use super::lock::{Lock, Locked, Opener, SealedError, wrong};
use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce};
use std::io::{self, BufRead as _, BufReader, Read, Write};
use zeroize::Zeroizing;

/// Plaintext of a piece.
const PIECE: usize = 64 << 10;
/// What encryption adds to it.
const TAG: usize = 16;

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
    /// `out` failed.
    pub fn begin(mut out: W, lock: Lock) -> io::Result<Self> {
        out.write_all(&lock.header)?;
        Ok(Self { out, key: lock.pieces, piece: Zeroizing::new(Vec::with_capacity(PIECE + TAG)), number: 0 })
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

/// A backup whose header was read.
pub struct Sealed<R: Read> {
    input: BufReader<R>,
    locked: Locked,
}

impl<R: Read> Sealed<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// It is no backup, of a newer format, or its header is damaged.
    pub fn begin(input: R) -> io::Result<Self> {
        let mut input = BufReader::with_capacity(PIECE, input);
        let locked = Locked::read(&mut input)?;
        Ok(Self { input, locked })
    }

    /// Whether a passphrase opens it; otherwise a recipient's key does.
    pub fn wants_passphrase(&self) -> bool {
        self.locked.wants_passphrase()
    }

    /// Opens it.
    ///
    /// # Errors
    /// It is of another passphrase or for other keys, or its header was altered.
    pub fn open(self, opener: &Opener) -> io::Result<Decrypting<R>> {
        let key = self.locked.open(opener)?;
        Ok(Decrypting::over(self.input, key, self.locked.length()))
    }
}

/// Decrypts what is read; its end is reported only once the last piece was seen.
pub struct Decrypting<R: Read> {
    input: BufReader<R>,
    key: LessSafeKey,
    begin: u64,
    piece: Zeroizing<Vec<u8>>,
    /// How much of the piece was given out.
    given: usize,
    number: u64,
    is_last: bool,
}

impl<R: Read> Decrypting<R> {
    /// The pieces, which begin at this byte of the file.
    fn over(input: BufReader<R>, key: LessSafeKey, begin: usize) -> Self {
        let piece = Zeroizing::new(Vec::with_capacity(PIECE + TAG));
        Self { input, key, begin: begin as u64, piece, given: 0, number: 0, is_last: false }
    }

    fn open(&mut self) -> io::Result<()> {
        self.piece.clear();
        self.given = 0;
        (&mut self.input).take((PIECE + TAG) as u64).read_to_end(&mut self.piece)?;
        let is_last = self.input.fill_buf()?.is_empty();
        let at = self.begin + self.number * (PIECE + TAG) as u64;
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
    use moor_api::backup_key::BackupIdentity;

    /// To one recipient: opening costs nothing. What a header is followed by does not depend on who opens it.
    fn sealed(plain: &[u8]) -> (BackupIdentity, Vec<u8>) {
        let identity = BackupIdentity::generate().unwrap();
        let lock = Lock::to_recipients(&[identity.recipient().unwrap()]).unwrap();
        let mut out = Encrypting::begin(Vec::new(), lock).unwrap();
        out.write_all(plain).unwrap();
        (identity, out.finish().unwrap())
    }

    #[test]
    fn what_was_written_is_read_and_the_size_says_how_much() {
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE] {
            let plain: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let (identity, file) = sealed(&plain);
            let reader = Sealed::begin(&*file).unwrap();
            let begin = reader.locked.length();
            assert_eq!(file.len(), begin + length + TAG * length.div_ceil(PIECE).max(1), "{length}");
            let mut back = Vec::new();
            reader.open(&Opener::Identity(identity)).unwrap().read_to_end(&mut back).unwrap();
            assert_eq!(back, plain, "{length}");
        }
    }

    /// Of the pieces each bit at some places, cuts and exchanges.
    #[test]
    fn an_altered_or_cut_backup_is_refused_wherever_it_is() {
        let plain = vec![7; 2 * PIECE + 100];
        let (identity, file) = sealed(&plain);
        let opener = Opener::Identity(identity);
        let reader = |file: &[u8]| Sealed::begin(io::Cursor::new(file.to_vec())).unwrap().open(&opener).unwrap();
        let opened = |file: &[u8]| {
            let mut plain = Vec::new();
            reader(file).read_to_end(&mut plain).map(|_| plain)
        };
        assert_eq!(opened(&file).unwrap(), plain);
        let (first, piece) = (Sealed::begin(&*file).unwrap().locked.length(), PIECE + TAG);
        for at in [first, first + PIECE, first + piece - 1, first + piece, first + 2 * piece, file.len() - 1] {
            for bit in 0..8 {
                let mut altered = file.clone();
                altered[at] ^= 1 << bit;
                let error = opened(&altered).unwrap_err().to_string();
                let says = format!("damaged at byte {}", first + (at - first) / piece * piece);
                assert!(error.contains(&says), "byte {at}: {error}");
            }
        }
        for length in [first, first + 1, first + piece - 1, first + piece, first + 2 * piece, file.len() - 1] {
            assert!(opened(&file[..length]).is_err(), "cut to {length}");
        }
        // Who goes on after the error gets nothing either.
        for at in [first, file.len() - 1] {
            let mut altered = file.clone();
            altered[at] ^= 1;
            let mut reader = reader(&altered);
            while let Ok(count) = reader.read(&mut [0; 1000]) {
                assert!(count > 0, "byte {at}: an end");
            }
            for _ in 0..4 {
                assert!(reader.read(&mut [0; 1000]).is_err(), "byte {at}");
            }
        }
        let exchanged = [&file[..first], &file[first + piece..first + 2 * piece], &file[first..first + piece]].concat();
        assert!(opened(&exchanged).is_err());
        assert!(opened(&[&file[..], b"x"].concat()).is_err(), "it goes on");
        // Pieces of another backup to the same key.
        let lock = match &opener {
            Opener::Identity(identity) => Lock::to_recipients(&[identity.recipient().unwrap()]).unwrap(),
            Opener::Passphrase(_) => unreachable!(),
        };
        assert!(opened(&[&lock.header, &file[first..]].concat()).is_err());
    }
}
