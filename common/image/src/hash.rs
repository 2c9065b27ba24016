//! SHA-256 and the hash table's three levels, each with its own first byte and name, so that none can stand for another.

use aws_lc_rs::digest;

/// SHA-256 of parts in a row.
#[must_use]
pub(crate) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(part);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

/// Leaf hash of sealed chunk `index` (ciphertext and tag as in the file).
pub(crate) fn leaf(index: u64, sealed: &[u8]) -> [u8; 32] {
    sha256(&[&leaf_head(index), sealed])
}

/// Leaf hashes of two sealed chunks: side by side where the processor can do that.
pub(crate) fn leaves(chunks: [(u64, &[u8]); 2]) -> [[u8; 32]; 2] {
    #[cfg(target_arch = "x86_64")]
    if let Some(both) = crate::two::sha256(chunks.map(|(index, sealed)| (leaf_head(index), sealed))) {
        return both;
    }
    chunks.map(|(index, sealed)| leaf(index, sealed))
}

/// What a leaf hash has before the chunk.
fn leaf_head(index: u64) -> [u8; 18] {
    let mut head = *b"\0moor-leaf\0\0\0\0\0\0\0\0";
    head[10..].copy_from_slice(&index.to_le_bytes());
    head
}

/// Hash of page `index` of leaf hashes.
pub(crate) fn page(index: u64, leaves: &[u8]) -> [u8; 32] {
    sha256(&[&[2], b"moor-page", &index.to_le_bytes(), leaves])
}

/// Root over all page hashes.
pub(crate) fn root(chunks: u64, page_hashes: &[u8]) -> [u8; 32] {
    sha256(&[&[1], b"moor-root", &chunks.to_le_bytes(), page_hashes])
}
