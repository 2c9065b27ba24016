//! As much of `SQLite`'s file format (sqlite.org/fileformat2.html) as it takes to read one table of blobs: b-trees of tables, overflow
//! pages, and a write-ahead log that was not merged.

use anyhow::{Context as _, Result, bail};
use std::collections::HashMap;

/// Pages above each other in a tree, at most: a fan-out of two would fill any disk before.
const DEPTH: usize = 40;

/// The second column of all rows of `table`, where it is a blob.
pub(super) fn blobs(file: &[u8], log: &[u8], table: &str) -> Result<Vec<Vec<u8>>> {
    let database = Database::new(file, log)?;
    let mut root = None;
    database.rows(1, &mut |payload| {
        // sqlite_schema: type, name, tbl_name, rootpage, sql.
        let columns = columns(payload).context("a row of the schema is damaged")?;
        if let [Value::Bytes(kind), Value::Bytes(name), _, Value::Number(page), ..] = columns[..]
            && kind == b"table"
            && name == table.as_bytes()
        {
            root = u32::try_from(page).ok();
        }
        Ok(())
    })?;
    let root = root.with_context(|| format!("it has no table '{table}'"))?;
    let (mut blobs, mut total) = (Vec::new(), 0);
    database.rows(root, &mut |payload| {
        let columns = columns(payload).context("a row is damaged")?;
        if let Some(Value::Bytes(blob)) = columns.get(1) {
            total += blob.len();
            // Rows that share pages would let a small file become a large list.
            if total > file.len() + log.len() {
                bail!("its rows overlap: it is damaged");
            }
            blobs.push(blob.to_vec());
        }
        Ok(())
    })?;
    Ok(blobs)
}

struct Database<'a> {
    file: &'a [u8],
    page_size: usize,
    /// Bytes of a page that trees use.
    usable: usize,
    /// Pages that are newer in the log.
    newer: HashMap<u32, &'a [u8]>,
}

impl<'a> Database<'a> {
    fn new(file: &'a [u8], log: &'a [u8]) -> Result<Self> {
        if !file.starts_with(b"SQLite format 3\0") || file.len() < 100 {
            bail!("it is no SQLite database");
        }
        let page_size = match u16::from_be_bytes([file[16], file[17]]) {
            1 => 65_536,
            size => usize::from(size),
        };
        if !page_size.is_power_of_two() || page_size < 512 {
            bail!("its page size is impossible");
        }
        let usable = page_size - usize::from(file[20]);
        if usable < 480 {
            bail!("its pages have no room");
        }
        Ok(Self { file, page_size, usable, newer: newer(log, page_size) })
    }

    fn page(&self, number: u32) -> Result<&'a [u8]> {
        if let Some(page) = self.newer.get(&number) {
            return Ok(page);
        }
        let index = usize::try_from(number)?.checked_sub(1).context("a page has the number 0")?;
        let start = index.checked_mul(self.page_size).context("a page is outside of the file")?;
        self.file.get(start..start.saturating_add(self.page_size)).context("a page is outside of the file")
    }

    /// Calls with the payload of every row of the table whose tree begins at `root`.
    fn rows(&self, root: u32, take: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        // No tree has more pages than the file: one that does has a circle.
        let mut budget = self.file.len() / self.page_size + self.newer.len() + 1;
        self.walk(root, 0, &mut budget, take)
    }

    fn walk(
        &self,
        number: u32,
        depth: usize,
        budget: &mut usize,
        take: &mut impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        if depth > DEPTH || *budget == 0 {
            bail!("its tree has a circle: it is damaged");
        }
        *budget -= 1;
        let page = self.page(number)?;
        let header = page.get(if number == 1 { 100 } else { 0 }..).context("a page is damaged")?;
        let cells = usize::from(u16::from_be_bytes([header[3], header[4]]));
        let (is_leaf, pointers) = match header[0] {
            0x0d => (true, &header[8..]),
            0x05 => (false, &header[12..]),
            _ => bail!("a page is of another kind than a table's"),
        };
        for pointer in pointers.chunks_exact(2).take(cells) {
            let cell = page.get(usize::from(u16::from_be_bytes([pointer[0], pointer[1]]))..);
            let cell = cell.context("a cell is outside of its page")?;
            if is_leaf {
                take(&self.payload(cell).context("a row is damaged")??)?;
            } else {
                let child = cell.first_chunk::<4>().context("a cell is damaged")?;
                self.walk(u32::from_be_bytes(*child), depth + 1, budget, take)?;
            }
        }
        if !is_leaf {
            let last = header[8..].first_chunk::<4>().context("a page is damaged")?;
            self.walk(u32::from_be_bytes(*last), depth + 1, budget, take)?;
        }
        Ok(())
    }

    /// The whole payload of a leaf's cell; its rest may be on overflow pages (section 1.6).
    fn payload(&self, cell: &[u8]) -> Option<Result<Vec<u8>>> {
        let (length, rest) = varint(cell)?;
        let (_, rest) = varint(rest)?;
        let length = usize::try_from(length).ok().filter(|length| *length <= self.file.len() + self.usable)?;
        let most = self.usable - 35;
        if length <= most {
            return rest.get(..length).map(|bytes| Ok(bytes.to_vec()));
        }
        let least = (self.usable - 12) * 32 / 255 - 23;
        let here = least + (length - least) % (self.usable - 4);
        let here = if here <= most { here } else { least };
        let mut payload = rest.get(..here)?.to_vec();
        let mut next = u32::from_be_bytes(*rest.get(here..)?.first_chunk()?);
        while payload.len() < length {
            let page = match self.page(next) {
                Ok(page) => page,
                Err(error) => return Some(Err(error)),
            };
            next = u32::from_be_bytes(*page.first_chunk()?);
            let take = (length - payload.len()).min(self.usable - 4);
            payload.extend_from_slice(page.get(4..4 + take)?);
        }
        Some(Ok(payload))
    }
}

/// The pages of a write-ahead log (section 4): those up to the last commit count, the later one of a page wins.
fn newer(log: &[u8], page_size: usize) -> HashMap<u32, &[u8]> {
    let (mut pages, mut uncommitted) = (HashMap::new(), Vec::new());
    let Some((header, frames)) = log.split_at_checked(32) else { return pages };
    for frame in frames.chunks_exact(24 + page_size) {
        let (head, page) = frame.split_at(24);
        // Frames of an earlier log, which was begun anew, have other salts.
        if head[8..16] != header[16..24] {
            break;
        }
        uncommitted.push((u32::from_be_bytes([head[0], head[1], head[2], head[3]]), page));
        if head[4..8] != [0; 4] {
            pages.extend(uncommitted.drain(..));
        }
    }
    pages
}

enum Value<'a> {
    Number(i64),
    Bytes(&'a [u8]),
    Other,
}

/// The columns of a record (section 2.1).
fn columns(payload: &[u8]) -> Option<Vec<Value<'_>>> {
    let (length, _) = varint(payload)?;
    let length = usize::try_from(length).ok()?;
    let (header, mut body) = payload.split_at_checked(length)?;
    let (_, mut kinds) = varint(header)?;
    let mut values = Vec::new();
    while !kinds.is_empty() {
        let (kind, rest) = varint(kinds)?;
        kinds = rest;
        let size = match kind {
            0 | 8 | 9 => 0,
            1..=4 => usize::try_from(kind).ok()?,
            5 => 6,
            6 | 7 => 8,
            10 | 11 => return None,
            kind => usize::try_from((kind - 12) / 2).ok()?,
        };
        let (bytes, rest) = body.split_at_checked(size)?;
        body = rest;
        values.push(match kind {
            1..=6 => {
                let negative = bytes[0] & 0x80 != 0;
                let start = if negative { -1_i64 } else { 0 };
                Value::Number(bytes.iter().fold(start, |number, byte| (number << 8) | i64::from(*byte)))
            }
            8 => Value::Number(0),
            9 => Value::Number(1),
            12.. => Value::Bytes(bytes),
            _ => Value::Other,
        });
    }
    Some(values)
}

/// A number of one to nine bytes, seven bits in each, eight in the ninth.
fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut number = 0;
    for (index, byte) in bytes.iter().enumerate().take(9) {
        if index == 8 {
            return Some(((number << 8) | u64::from(*byte), &bytes[9..]));
        }
        number = (number << 7) | u64::from(*byte & 0x7F);
        if byte & 0x80 == 0 {
            return Some((number, &bytes[index + 1..]));
        }
    }
    None
}
