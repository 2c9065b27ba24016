//! What stands in a tar archive's headers and extension records, as values.

use super::BLOCK;
use std::ffi::CString;

/// What extension records say of the next entry.
#[derive(Default)]
pub(super) struct Extended {
    pub(super) path: Option<Vec<u8>>,
    pub(super) target: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) modified: Option<(i64, i64)>,
    pub(super) xattrs: Vec<(CString, Vec<u8>)>,
    pub(super) has_acl: bool,
    pub(super) sparse_name: Option<Vec<u8>>,
    pub(super) sparse_size: Option<u64>,
    /// (offset, length) of what is stored, as it stands there.
    pub(super) sparse_map: Option<Vec<(u64, u64)>>,
}

impl Extended {
    /// Reads pax records: `LENGTH KEY=VALUE\n`, one after the other (pax(1)).
    pub(super) fn read(&mut self, mut records: &[u8], sparse: bool) -> Option<()> {
        while !records.is_empty() {
            let blank = records.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&records[..blank]).ok()?.parse().ok()?;
            let record = records.get(blank + 1..length)?.strip_suffix(b"\n")?;
            records = &records[length..];
            let equals = record.iter().position(|byte| *byte == b'=')?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            let text = std::str::from_utf8(value);
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.target = Some(value.to_vec()),
                b"size" => self.size = Some(text.ok()?.parse().ok()?),
                b"uid" => self.uid = Some(text.ok()?.parse().ok()?),
                b"gid" => self.gid = Some(text.ok()?.parse().ok()?),
                b"mtime" => self.modified = Some(seconds(text.ok()?)?),
                b"GNU.sparse.name" if sparse => self.sparse_name = Some(value.to_vec()),
                b"GNU.sparse.size" if sparse => self.sparse_size = Some(text.ok()?.parse().ok()?),
                b"GNU.sparse.map" if sparse => self.sparse_map = Some(sparse_map(text.ok()?)?),
                b"GNU.sparse.numblocks" if sparse => {}
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        self.xattrs.push((CString::new(name).ok()?, value.to_vec()));
                    } else if key.starts_with(b"SCHILY.acl.") {
                        self.has_acl = true;
                    } else if key.starts_with(b"GNU.sparse.") {
                        // Of another format, or where none is expected: the content would be a map and data, not the file.
                        return None;
                    }
                }
            }
        }
        Some(())
    }
}

/// `OFFSET,LENGTH,OFFSET,LENGTH…`.
fn sparse_map(text: &str) -> Option<Vec<(u64, u64)>> {
    let numbers: Vec<u64> = text.split(',').map(|number| number.parse().ok()).collect::<Option<_>>()?;
    let pairs = numbers.chunks_exact(2);
    pairs.remainder().is_empty().then(|| pairs.map(|pair| (pair[0], pair[1])).collect())
}

/// Whether a map is in order, inside of a file of `size` bytes, and as long as the stored content.
pub(super) fn is_map(map: &[(u64, u64)], size: u64, stored: u64) -> bool {
    let mut end = 0;
    let mut total: u64 = 0;
    for (offset, length) in map {
        let Some(next) = offset.checked_add(*length).filter(|next| *offset >= end && *next <= size) else {
            return false;
        };
        end = next;
        // What lies apart and inside of the file adds up to at most its size.
        total += length;
    }
    total == stored
}

/// `SECONDS[.FRACTION]`, also negative.
fn seconds(text: &str) -> Option<(i64, i64)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let negative = whole.starts_with('-');
    let whole: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanoseconds: i64 = digits.parse().ok()?;
    // -1.25 is 0.75 after -2.
    Some(if negative && nanoseconds > 0 {
        (whole.checked_sub(1)?, 1_000_000_000 - nanoseconds)
    } else {
        (whole, nanoseconds)
    })
}

/// Octal digits, or GNU's binary form: the first bit set, the rest big-endian.
pub(super) fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if *first == 0x80 {
        let (high, low) = rest.split_at(rest.len().saturating_sub(8));
        return high
            .iter()
            .all(|byte| *byte == 0)
            .then(|| low.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)));
    }
    let text = std::str::from_utf8(until_nul(field)).ok()?.trim_matches(' ');
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

pub(super) fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// ustar's name with its prefix.
pub(super) fn full_name(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&header[..100]);
    // GNU's own format ("ustar  ") has other things where the prefix is.
    let prefix = if &header[257..263] == b"ustar\0" { until_nul(&header[345..500]) } else { &[] };
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        for (field, expected) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"    644 ", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"\x80\0\0\0\0\0\0\0\0\x01\0\0", Some(65536)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"0000889\0", None),
            (b"-000644\0", None),
        ] {
            assert_eq!(number(field), expected, "{field:?}");
        }
        assert_eq!(seconds("12.5"), Some((12, 500_000_000)));
        assert_eq!(seconds("-1.25"), Some((-2, 750_000_000)));
        assert_eq!((seconds("7"), seconds("1.x"), seconds("")), (Some((7, 0)), None, None));
    }

    #[test]
    fn records_that_lie_about_their_length_are_refused() {
        let read = |records: &[u8]| {
            let mut extended = Extended::default();
            extended.read(records, false).map(|()| extended)
        };
        let found = read(b"12 path=a/b\n28 SCHILY.xattr.user.x=\0\n\xff=\n5 z=\n").unwrap();
        assert_eq!(found.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(found.xattrs, [(c"user.x".to_owned(), b"\0\n\xff=".to_vec())]);
        for records in [
            &b"99 path=a\n"[..],
            b"3 path=a\n",
            b"path=a\n",
            b"11 path=a/bX",
            b"0 \n",
            b"22 GNU.sparse.major=1\n",
            b"9 size=x\n",
        ] {
            assert!(read(records).is_none(), "{records:?}");
        }
    }

    #[test]
    fn maps_of_holes_fit_their_file() {
        let map = |text| sparse_map(text).expect("a map");
        assert!(is_map(&map("0,10,15,5,20,0"), 20, 15));
        for (text, size, stored) in
            [("0,10,5,10", 20, 20), ("0,30", 20, 30), ("0,10", 20, 11), ("18446744073709551615,2", 20, 2)]
        {
            assert!(!is_map(&map(text), size, stored), "{text}");
        }
        assert_eq!((sparse_map("0,1,2"), sparse_map(""), sparse_map("0,x")), (None, None, None));
    }
}
