//! The committed vectors are what the sealer writes: here, because nowhere else can the salt be given.

use crate::seal::{SealOptions, Sealer};
use crate::{Dek, Metadata, Payload, hash};
use serde_json::Value;
use std::io::{Cursor, Write as _};

#[test]
fn the_sealer_writes_the_vectors() {
    let vectors: Vec<Value> = serde_json::from_str(include_str!("../tests/vectors/vectors.json")).unwrap();
    for vector in vectors {
        let bytes = |field: &str| hex::decode(vector[field].as_str().unwrap()).unwrap();
        let number = |field: &str| vector[field].as_u64().unwrap();
        let options = SealOptions {
            lineage: bytes("lineage").try_into().unwrap(),
            serial: number("serial"),
            created: number("created"),
            chunk_log2: u8::try_from(number("chunk_log2")).unwrap(),
            payload: if number("payload") == 1 { Payload::Squashfs } else { Payload::Opaque },
            key: vector["dek"].is_string().then(|| Dek::from_bytes(bytes("dek").try_into().unwrap())),
        };
        let metadata = Metadata::from_bytes(vector["metadata"].as_str().unwrap().as_bytes()).unwrap();
        let mut sealer =
            Sealer::with_salt(Cursor::new(Vec::new()), options, bytes("salt").try_into().unwrap()).unwrap();
        let plaintext: Vec<u8> = (0..number("plaintext_length")).map(|i| u8::try_from(i % 251).unwrap()).collect();
        // In pieces of an odd size: what is sealed does not depend on how it comes.
        for piece in plaintext.chunks(9973) {
            sealer.write_all(piece).unwrap();
        }
        let (out, sealed) = sealer.finish(|_| metadata, Some(bytes("hints"))).unwrap();
        assert_eq!(hex::encode(sealed.digest), vector["digest"], "{}", vector["name"]);
        assert_eq!(hex::encode(hash::sha256(&[&out.into_inner()])), vector["file_sha256"], "{}", vector["name"]);
    }
}
