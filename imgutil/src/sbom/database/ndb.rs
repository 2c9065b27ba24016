//! RPM's own format of a database, which SUSE uses (`lib/backend/ndb/rpmpkg.c`): pages of slots that say where each package's blob
//! is, in units of 16 bytes; little-endian.

use anyhow::{Result, bail};

/// All blobs.
pub(super) fn blobs(file: &[u8]) -> Result<Vec<Vec<u8>>> {
    const PAGE: usize = 4096;
    const SLOT: usize = 16;
    if file.get(..4) != Some(b"RpmP") {
        bail!("it is no database of RPM's ndb");
    }
    let pages = number(file, 12).unwrap_or_default();
    let Some(slots) = pages.checked_mul(PAGE).and_then(|end| file.get(2 * SLOT..end)) else {
        bail!("its slots reach beyond its end: it is damaged");
    };
    let (mut blobs, mut total) = (Vec::new(), 0);
    for slot in slots.chunks_exact(SLOT).filter(|slot| slot[..4] == *b"Slot") {
        let (package, offset) = (number(slot, 4).unwrap_or_default(), number(slot, 8).unwrap_or_default());
        if offset == 0 {
            continue;
        }
        let blob = offset.checked_mul(16).and_then(|start| {
            let header = file.get(start..start.checked_add(16)?)?;
            let length = number(header, 12)?;
            let is_it = header[..4] == *b"BlbS" && number(header, 4) == Some(package);
            is_it.then_some(())?;
            file.get(start + 16..(start + 16).checked_add(length)?)
        });
        let Some(blob) = blob else { bail!("the blob of package {package} is damaged") };
        // Two slots must not share their bytes, so that a small file cannot become a large list.
        total += blob.len();
        if total > file.len() {
            bail!("its blobs overlap: it is damaged");
        }
        blobs.push(blob.to_vec());
    }
    Ok(blobs)
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)).ok()
}
