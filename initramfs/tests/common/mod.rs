//! What the tests share: an authority, HTTPS servers that can be made to misbehave, and sealed images.
#![allow(dead_code, reason = "each test program uses its own part")]

pub(crate) mod authority;
pub(crate) mod namespace;
pub(crate) mod nginx;
pub(crate) mod place;
pub(crate) mod server;

use moor_image::{Dek, Metadata, Payload, SealOptions, Sealed, Sealer};
use std::io::{Cursor, Write as _};
use std::sync::Arc;

/// Lineage of all test images.
pub(crate) const LINEAGE: [u8; 16] = [7; 16];

/// A sealed image with all that is known about it.
pub(crate) struct Sample {
    pub file: Arc<Vec<u8>>,
    pub plaintext: Vec<u8>,
    pub key: Dek,
    pub sealed: Sealed,
}

/// Bytes that do not repeat within a chunk, and differ by `seed`.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(length);
    out
}

/// Seals `plaintext` with a new key.
pub(crate) fn seal(plaintext: Vec<u8>, chunk_log2: u8) -> Sample {
    let key = Dek::generate().unwrap();
    let options = SealOptions {
        lineage: LINEAGE,
        serial: 3,
        created: 1_700_000_000,
        chunk_log2,
        payload: Payload::Squashfs,
        key: Some(key.clone()),
    };
    let mut sealer = Sealer::new(Cursor::new(Vec::new()), options).unwrap();
    sealer.write_all(&plaintext).unwrap();
    let (out, sealed) = sealer
        .finish(
            |summary| Metadata {
                name: "test".into(),
                payload_sha256: hex::encode(summary.sha256),
                ..Metadata::default()
            },
            None,
        )
        .unwrap();
    Sample { file: Arc::new(out.into_inner()), plaintext, key, sealed }
}
