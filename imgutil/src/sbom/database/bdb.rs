//! Berkeley DB's hash format, which RPM of EL 8 and older uses (`dbinc/db_page.h` of Berkeley DB 5.3): pages of pairs of key and value;
//! a value that is larger than a quarter of a page, as all headers are in practice, is in a chain of pages of its own. Only databases
//! in little-endian order, without encryption and checksums, as RPM makes them on the machines that it serves.

use anyhow::{Context as _, Result, bail};

/// `DB_HASHMAGIC`.
const MAGIC: u32 = 0x0006_1561;
/// Bytes before what a page holds.
const HEAD: usize = 26;
/// Types of pages: pairs (of older databases, and of newer ones), and what was too large for them.
const UNSORTED: u8 = 2;
const PAIRS: u8 = 13;
const OVERFLOW: u8 = 7;

/// The values of all pairs.
pub(super) fn blobs(file: &[u8]) -> Result<Vec<Vec<u8>>> {
    match long(file, 12) {
        Some(MAGIC) => {}
        Some(swapped) if swapped == MAGIC.swap_bytes() => bail!("it was made on a machine of another byte order"),
        _ => bail!("it is no hash of Berkeley DB"),
    }
    let size = long(file, 20).and_then(|size| usize::try_from(size).ok()).unwrap_or_default();
    if !(512..=65536).contains(&size) || !size.is_power_of_two() || file.len() < size {
        bail!("it has no page of the size that it names: it is damaged");
    }
    if file[24] != 0 || file[26] & 1 != 0 {
        bail!("it is encrypted or has checksums, which RPM never writes");
    }
    let pages = Pages { file, size };
    let (mut blobs, mut total) = (Vec::new(), 0);
    for page in file.chunks_exact(size).skip(1).filter(|page| matches!(page[25], UNSORTED | PAIRS)) {
        let count = short(page, 20).unwrap_or_default();
        for value in (1..count).step_by(2) {
            let blob = pages.item(page, value)?;
            // Two pairs must not share their bytes, so that a small file cannot become a large list.
            total += blob.len();
            if total > file.len() {
                bail!("its values overlap: it is damaged");
            }
            blobs.push(blob);
        }
    }
    Ok(blobs)
}

struct Pages<'a> {
    file: &'a [u8],
    size: usize,
}

impl<'a> Pages<'a> {
    /// The item of this index on a page of pairs.
    fn item(&self, page: &[u8], index: usize) -> Result<Vec<u8>> {
        let place = |index: usize| short(page, HEAD + 2 * index);
        // They are laid from the end of the page on.
        let end = if index == 0 { Some(self.size) } else { place(index - 1) };
        let item = place(index).zip(end).and_then(|(start, end)| page.get(start..end));
        match item.and_then(|item| item.split_first()) {
            Some((1, value)) => Ok(value.to_vec()),
            Some((3, reference)) => {
                let (first, length) = (long(reference, 3), long(reference, 7).and_then(|n| usize::try_from(n).ok()));
                let (Some(first), Some(length)) = (first, length) else { bail!("a reference is damaged") };
                self.chain(first, length)
            }
            _ => bail!("a page has an entry that RPM does not write: it is damaged"),
        }
    }

    /// What lies in the chain of pages that begins with `number`.
    fn chain(&self, mut number: u32, length: usize) -> Result<Vec<u8>> {
        if length > self.file.len() {
            bail!("a value is larger than the database: it is damaged");
        }
        let mut value = Vec::with_capacity(length);
        while value.len() < length {
            let piece = self.page(number).filter(|page| page[25] == OVERFLOW).and_then(|page| {
                // Of a page of this type the field has how much is on it. Each adds something, so a chain in a circle ends as well.
                let piece = page.get(HEAD..HEAD + short(page, 22)?)?;
                (!piece.is_empty() && piece.len() <= length - value.len()).then_some((piece, long(page, 16)?))
            });
            let (piece, next) = piece.context("a chain of pages is broken: it is damaged")?;
            value.extend_from_slice(piece);
            number = next;
        }
        Ok(value)
    }

    fn page(&self, number: u32) -> Option<&'a [u8]> {
        let start = usize::try_from(number).ok()?.checked_mul(self.size)?;
        self.file.get(start..start.checked_add(self.size)?)
    }
}

fn long(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn short(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    /// A database that Berkeley DB itself makes (by Perl, which Debian has it in): values of these lengths, of bytes that tell them apart.
    fn database(lengths: &[usize]) -> Vec<u8> {
        const SCRIPT: &str = r#"use DB_File; my %h;
            tie %h, "DB_File", $ARGV[0], O_RDWR|O_CREAT, 0600, $DB_HASH or die "$!";
            while (<STDIN>) { chomp; $h{pack("V", $.)} = chr(65 + $. % 26) x $_; }
            untie %h;"#;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Packages");
        let mut perl = Command::new("perl").args(["-e", SCRIPT]).arg(&path).stdin(Stdio::piped()).spawn().unwrap();
        let text: String = lengths.iter().flat_map(|length| [length.to_string(), "\n".to_owned()]).collect();
        perl.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(perl.wait().unwrap().success());
        std::fs::read(path).unwrap()
    }

    #[test]
    fn what_berkeley_db_has_written_is_read() {
        let lengths: Vec<usize> = (0..400).map(|index| [4, 30, 900, 5000, 40_000][index % 5] + index).collect();
        let letters = (b'A'..=b'Z').cycle().skip(1);
        let mut expected: Vec<Vec<u8>> =
            lengths.iter().zip(letters).map(|(length, letter)| vec![letter; *length]).collect();
        let mut found = blobs(&database(&lengths)).unwrap();
        expected.sort();
        found.sort();
        assert!(found == expected, "{} of {}", found.len(), expected.len());
    }

    #[test]
    fn damage_is_an_answer() {
        let good = database(&[4, 5000, 40_000]);
        for at in (0..good.len()).step_by(7) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x55;
            if let Ok(blobs) = blobs(&bytes) {
                assert!(blobs.iter().map(Vec::len).sum::<usize>() <= good.len());
            }
        }
        for end in (0..good.len()).step_by(101) {
            let _ = blobs(&good[..end]);
        }
        assert!(blobs(b"").is_err() && blobs(&[0; 4096]).is_err());
    }
}
