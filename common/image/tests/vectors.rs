//! The committed test vectors: a second implementation (`oracle`) makes the same bytes, the crate reads them, and docs/formats.md
//! prints them. That the crate itself *writes* these bytes is tested in `src/vectors.rs`, because only there can the salt be fixed.
#![allow(missing_docs, clippy::unwrap_used)]

mod oracle;

use moor_image::{Dek, HEADER_LENGTH, Header, Image, Metadata, OpenOptions, Payload, SealOptions, Sealer, verify_file};
use oracle::{Keys, Recipe, leaf, sha256};
use serde_json::Value;
use std::io::{Cursor, Write as _};

const IMAGES: [(&str, &[u8]); 3] = [
    ("sealed", include_bytes!("vectors/sealed.moor")),
    ("plain", include_bytes!("vectors/plain.moor")),
    ("empty", include_bytes!("vectors/empty.moor")),
];

fn vectors() -> Vec<Value> {
    serde_json::from_str(include_str!("vectors/vectors.json")).unwrap()
}

fn text<'a>(vector: &'a Value, field: &str) -> &'a str {
    vector[field].as_str().unwrap_or_else(|| panic!("{field} in {vector}"))
}

fn bytes<const N: usize>(vector: &Value, field: &str) -> [u8; N] {
    hex::decode(text(vector, field)).unwrap().try_into().unwrap()
}

fn number(vector: &Value, field: &str) -> u64 {
    vector[field].as_u64().unwrap()
}

fn recipe(vector: &Value) -> Recipe {
    Recipe {
        dek: vector["dek"].is_string().then(|| bytes(vector, "dek")),
        salt: bytes(vector, "salt"),
        chunk_log2: u8::try_from(number(vector, "chunk_log2")).unwrap(),
        payload: u8::try_from(number(vector, "payload")).unwrap(),
        lineage: bytes(vector, "lineage"),
        serial: number(vector, "serial"),
        created: number(vector, "created"),
        plaintext: (0..number(vector, "plaintext_length")).map(|i| u8::try_from(i % 251).unwrap()).collect(),
        metadata: text(vector, "metadata").into(),
        hints: hex::decode(text(vector, "hints")).unwrap(),
    }
}

#[test]
fn an_independent_implementation_makes_the_same_bytes() {
    for vector in vectors() {
        let name = text(&vector, "name");
        let recipe = recipe(&vector);
        let file = recipe.build();
        assert_eq!(file.len() as u64, number(&vector, "file_length"), "{name}");
        for (field, value) in [
            ("key_id", &file[192..208]),
            ("root", &file[224..256]),
            ("header_mac", &file[320..352]),
            ("digest", &file[4064..4096]),
            ("file_sha256", &sha256(&[&file])),
        ] {
            assert_eq!(text(&vector, field), hex::encode(value), "{name}: {field}");
        }
        let chunks = recipe.chunks();
        if let Some(first) = chunks.first() {
            assert_eq!(text(&vector, "first_leaf"), hex::encode(leaf(0, first)), "{name}");
        }
        if let Some(keys) = recipe.keys() {
            assert_eq!(text(&vector, "prk"), hex::encode(keys.prk), "{name}");
            assert_eq!(text(&vector, "context"), hex::encode(keys.context), "{name}");
            assert_eq!(text(&vector, "chunk_key"), hex::encode(keys.chunk_key), "{name}");
            assert_eq!(text(&vector, "base_nonce"), hex::encode(keys.base_nonce), "{name}");
            if let Some(last) = chunks.last() {
                assert_eq!(text(&vector, "last_nonce"), hex::encode(keys.nonce(chunks.len() as u64 - 1)), "{name}");
                assert_eq!(text(&vector, "last_tag"), hex::encode(&last[last.len() - 16..]), "{name}");
            }
        }
        if let Some((_, committed)) = IMAGES.iter().find(|(image, _)| *image == name) {
            assert!(file == *committed, "{name}.moor");
        }
    }
}

#[test]
fn the_crate_reads_the_vectors() {
    for vector in vectors() {
        let name = text(&vector, "name");
        let recipe = recipe(&vector);
        let file = recipe.build();
        let options = OpenOptions {
            key: recipe.dek.map(Dek::from_bytes),
            pinned: Some(bytes(&vector, "digest")),
            lineage: Some(recipe.lineage),
            minimum_serial: Some(recipe.serial),
            ..OpenOptions::default()
        };
        let report = verify_file(&file, &options, |_, _| {}).unwrap();
        assert!(report.is_good() && report.with_key, "{name}: {report:?}");
        let image = Image::open(file, &options).unwrap();
        let mut plaintext = vec![0; recipe.plaintext.len()];
        assert_eq!(image.read_at(0, &mut plaintext).unwrap(), plaintext.len());
        assert!(plaintext == recipe.plaintext, "{name}");
        assert_eq!(image.metadata().unwrap().to_bytes().unwrap(), recipe.metadata, "{name}: canonical JSON");
        assert_eq!(image.hints().unwrap().unwrap_or_default(), recipe.hints, "{name}");
    }
}

#[test]
fn the_independent_implementation_reads_what_the_crate_writes() {
    for (length, log2) in [(0, 16), (1, 14), (100_000, 14), (200_000, 16)] {
        for key in [None, Some(Dek::generate().unwrap())] {
            let plaintext: Vec<u8> = (0..length).map(|i: u32| u8::try_from((i ^ (i >> 8)) % 256).unwrap()).collect();
            let options = SealOptions {
                lineage: [9; 16],
                serial: 2,
                created: 1_800_000_000,
                chunk_log2: log2,
                payload: Payload::Opaque,
                key: key.clone(),
            };
            let mut sealer = Sealer::new(Cursor::new(Vec::new()), options).unwrap();
            sealer.write_all(&plaintext).unwrap();
            let metadata = Metadata { name: "written".into(), ..Metadata::default() };
            let (out, sealed) = sealer.finish(|_| metadata.clone(), Some(b"trace".to_vec())).unwrap();
            let file = out.into_inner();
            let dek = key.as_ref().map(Dek::as_bytes);
            let (read, section, hints) = oracle::read(&file, dek);
            assert!(read == plaintext, "{length} bytes");
            assert_eq!(section, metadata.to_bytes().unwrap());
            assert_eq!(hints, b"trace");
            // The same salt and key give the same file: not one byte is a matter of taste.
            let header = Header::parse(file[..HEADER_LENGTH].try_into().unwrap()).unwrap();
            let again = Recipe {
                dek: dek.copied(),
                salt: header.salt,
                chunk_log2: log2,
                payload: 3,
                lineage: [9; 16],
                serial: 2,
                created: 1_800_000_000,
                plaintext,
                metadata: section,
                hints,
            };
            assert!(again.build() == file, "{length} bytes");
            assert_eq!(sealed.payload_sha256, sha256(&[&again.plaintext]));
        }
    }
}

#[test]
fn chunks_of_one_key_never_share_a_nonce() {
    let keys = Keys::derive(&[1; 32], &[2; 32], &[3; 64]);
    let nonces: std::collections::BTreeSet<_> =
        [0, 1, 2, 255, 256, 65_535, 65_536, (1 << 26) - 1].map(|i| keys.nonce(i)).into();
    assert_eq!(nonces.len(), 8);
    assert_eq!(keys.nonce(0), keys.base_nonce);
}

#[test]
fn the_documents_print_the_vectors() {
    let page = include_str!("../../../docs/formats.md");
    for vector in vectors() {
        let name = text(&vector, "name");
        for field in ["digest", "root", "file_sha256"] {
            assert!(page.contains(text(&vector, field)), "docs/formats.md lacks the {field} of vector '{name}'");
        }
    }
    // The first is printed in full.
    let first = &vectors()[0];
    for (field, value) in first.as_object().unwrap() {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        assert!(page.contains(&value), "docs/formats.md lacks the {field} of vector 'sealed'");
    }
}
