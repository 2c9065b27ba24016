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

/// Leaf hashes of sealed chunks from `first` on: side by side, as many as the processor can do at once.
pub(crate) fn leaves(first: u64, chunks: &[&[u8]]) -> Vec<[u8; 32]> {
    let mut leaves = Vec::with_capacity(chunks.len());
    let mut left: Vec<_> = (first..).zip(chunks).map(|(index, sealed)| (leaf_head(index), *sealed)).collect();
    while !left.is_empty() {
        let done = side_by_side(&left);
        left.drain(..done.len());
        leaves.extend(done);
    }
    leaves
}

/// The hashes of the first ones of `messages`: of one at least.
fn side_by_side(messages: &[([u8; 18], &[u8])]) -> Vec<[u8; 32]> {
    #[cfg(target_arch = "x86_64")]
    {
        // The last chunk of an image is shorter, and hashed alone.
        let length = messages[0].1.len();
        let alike =
            messages.iter().take(crate::sixteen::LANES).take_while(|(_, sealed)| sealed.len() == length).count();
        if let Some(many) = crate::sixteen::sha256(&messages[..alike]) {
            return many;
        }
        if let [first, second, ..] = *messages
            && let Some(both) = crate::two::sha256([first, second])
        {
            return both.to_vec();
        }
    }
    messages.iter().take(1).map(|(head, sealed)| sha256(&[head, sealed])).collect()
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
