//! Sealing and reading back: any length, any chunk size, with and without a key; random reads against the plaintext.

#![allow(missing_docs, clippy::unwrap_used)]

use moor_image::{
    Dek, HEADER_LENGTH, Header, Image, ImageError, Metadata, OpenOptions, Payload, SealOptions, Sealed, Sealer,
    SignatureFile, SigningKey, Verifier,
};
use proptest::prelude::*;
use std::io::{Cursor, Write as _};

fn options(key: Option<Dek>, chunk_log2: u8) -> SealOptions {
    SealOptions { lineage: [7; 16], serial: 3, created: 1_700_000_000, chunk_log2, payload: Payload::Opaque, key }
}

fn seal(plaintext: &[u8], key: Option<Dek>, chunk_log2: u8, hints: Option<Vec<u8>>) -> (Vec<u8>, Sealed) {
    let mut sealer = Sealer::new(Cursor::new(Vec::new()), options(key, chunk_log2)).unwrap();
    sealer.write_all(plaintext).unwrap();
    let (out, sealed) = sealer
        .finish(
            |summary| Metadata {
                name: "test".into(),
                payload_sha256: hex::encode(summary.sha256),
                ..Metadata::default()
            },
            hints,
        )
        .unwrap();
    (out.into_inner(), sealed)
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from((i * 31 + (i >> 8) * 7 + (i >> 16)) % 256).unwrap()).collect()
}

fn read_all(image: &Image<Vec<u8>>) -> Result<Vec<u8>, ImageError> {
    let mut out = vec![0; usize::try_from(image.plaintext_len()).unwrap()];
    let count = image.read_at(0, &mut out)?;
    assert_eq!(count, out.len());
    Ok(out)
}

#[test]
fn every_length_around_a_chunk_reads_back() {
    let chunk = 1 << 14;
    for sealed in [false, true] {
        for length in [0, 1, chunk - 1, chunk, chunk + 1, 3 * chunk, 3 * chunk + 5] {
            let key = sealed.then(|| Dek::generate().unwrap());
            let plaintext = bytes(length);
            let (file, info) = seal(&plaintext, key.clone(), 14, Some(b"hints".to_vec()));
            assert_eq!(file.len() as u64, info.size);
            let image =
                Image::open(file, &OpenOptions { key, pinned: Some(info.digest), ..Default::default() }).unwrap();
            assert_eq!(read_all(&image).unwrap(), plaintext, "length {length}");
            assert_eq!(image.metadata().unwrap().payload_sha256, hex::encode(info.payload_sha256));
            assert_eq!(image.hints().unwrap().unwrap(), b"hints");
            assert_eq!(image.read_at(length as u64, &mut [0; 8]).unwrap(), 0);
        }
    }
}

#[test]
fn the_table_has_more_than_one_page_when_it_needs_to() {
    let plaintext = bytes((1 << 14) * 2049 + 77);
    let key = Dek::generate().unwrap();
    let (file, info) = seal(&plaintext, Some(key.clone()), 14, None);
    assert_eq!(info.chunks, 2050);
    let image = Image::open(file, &OpenOptions { key: Some(key), ..Default::default() }).unwrap();
    assert_eq!(image.header().pages(), 2);
    let mut part = vec![0; 30_000];
    let at = (1 << 14) * 2047;
    assert_eq!(image.read_at(at as u64, &mut part).unwrap(), 30_000);
    assert_eq!(part, plaintext[at..at + 30_000]);
}

#[test]
fn the_start_may_be_changed_until_the_end_and_nothing_else() {
    let mut sealer = Sealer::new(Cursor::new(Vec::new()), options(None, 14)).unwrap();
    sealer.write_all(&bytes(50_000)).unwrap();
    sealer.patch_start(8, b"late").unwrap();
    assert!(sealer.patch_start((1 << 14) - 2, b"late").is_err());
    let (out, _) = sealer.finish(|_| Metadata::default(), None).unwrap();
    let image = Image::open(out.into_inner(), &OpenOptions::default()).unwrap();
    let mut expected = bytes(50_000);
    expected[8..12].copy_from_slice(b"late");
    assert_eq!(read_all(&image).unwrap(), expected);
}

#[test]
fn keys_that_do_not_fit_are_an_error_of_their_own() {
    let (file, _) = seal(&bytes(100), Some(Dek::generate().unwrap()), 14, None);
    let wrong = OpenOptions { key: Some(Dek::generate().unwrap()), ..Default::default() };
    assert!(matches!(Image::open(file.clone(), &wrong), Err(ImageError::WrongKey { .. })));
    let image = Image::open(file, &OpenOptions::default()).unwrap();
    assert!(matches!(image.read_at(0, &mut [0; 4]), Err(ImageError::KeyNeeded(_))));
    for text in ["", "00", &"g".repeat(64), &"00".repeat(33), &format!("{}\n\n", "0".repeat(64))] {
        assert!(Dek::from_hex(text.as_bytes()).is_err(), "{text}");
    }
    let key = Dek::generate().unwrap();
    assert_eq!(Dek::from_hex(key.to_hex().as_bytes()).unwrap().key_id(), key.key_id());
}

#[test]
fn each_demand_of_the_reader_is_checked() {
    let (file, info) = seal(&bytes(100), None, 14, None);
    let open = |options: OpenOptions| Image::open(file.clone(), &options).map(|_| ());
    assert!(
        open(OpenOptions {
            pinned: Some(info.digest),
            lineage: Some([7; 16]),
            minimum_serial: Some(3),
            ..Default::default()
        })
        .is_ok()
    );
    assert!(matches!(
        open(OpenOptions { pinned: Some([0; 32]), ..Default::default() }),
        Err(ImageError::Digest { .. })
    ));
    assert!(matches!(
        open(OpenOptions { lineage: Some([8; 16]), ..Default::default() }),
        Err(ImageError::Lineage { .. })
    ));
    assert!(matches!(
        open(OpenOptions { minimum_serial: Some(4), ..Default::default() }),
        Err(ImageError::Serial { .. })
    ));
    assert!(matches!(
        open(OpenOptions { require_encrypted: true, ..Default::default() }),
        Err(ImageError::NotEncrypted)
    ));
}

#[test]
fn a_signature_is_by_a_trusted_key_over_this_digest() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let path = dir.path().join(name);
        let made = std::process::Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
            .arg(&path)
            .status();
        assert!(made.unwrap().success());
        SigningKey::from_openssh(&std::fs::read(path).unwrap()).unwrap()
    };
    let (good, other) = (make("good"), make("other"));
    let (file, info) = seal(&bytes(100), None, 14, None);
    let mut signatures = SignatureFile::default();
    signatures.sign(&info.digest, &good).unwrap();
    let text = signatures.to_bytes().unwrap();
    let open = |trusted, signatures| {
        Image::open(file.clone(), &OpenOptions { trusted: vec![trusted], signatures, ..Default::default() }).map(|_| ())
    };
    assert!(open(good.public(), Some(text.clone())).is_ok());
    assert!(matches!(open(other.public(), Some(text.clone())), Err(ImageError::Untrusted { .. })));
    assert!(matches!(open(good.public(), None), Err(ImageError::Untrusted { .. })));
    let mut elsewhere = SignatureFile::default();
    elsewhere.sign(&[1; 32], &good).unwrap();
    assert!(matches!(open(good.public(), Some(elsewhere.to_bytes().unwrap())), Err(ImageError::Untrusted { .. })));

    // The tool of the field agrees.
    let public = std::fs::read_to_string(dir.path().join("good.pub")).unwrap();
    std::fs::write(dir.path().join("allowed"), format!("builder {public}")).unwrap();
    std::fs::write(dir.path().join("sig"), signatures.sshsigs().next().unwrap()).unwrap();
    std::fs::write(dir.path().join("message"), moor_image::sshsig_message(&info.digest)).unwrap();
    let verified = std::process::Command::new("ssh-keygen")
        .current_dir(dir.path())
        .args(["-Y", "verify", "-f", "allowed", "-I", "builder", "-n", moor_image::SSHSIG_NAMESPACE, "-s", "sig"])
        .stdin(std::fs::File::open(dir.path().join("message")).unwrap())
        .output()
        .unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn random_reads_give_the_plaintext(length in 0usize..200_000, log2 in 14u8..=16, sealed: bool, reads in prop::collection::vec((0u64..210_000, 0usize..70_000), 1..12)) {
        let key = sealed.then(|| Dek::generate().unwrap());
        let plaintext = bytes(length);
        let (file, _) = seal(&plaintext, key.clone(), log2, None);
        let image = Image::open(file, &OpenOptions { key, ..Default::default() }).unwrap();
        for (offset, count) in reads {
            let mut buf = vec![0; count];
            let got = image.read_at(offset, &mut buf).unwrap();
            let start = usize::try_from(offset).unwrap().min(length);
            let expected = &plaintext[start..(start + count).min(length)];
            prop_assert_eq!(&buf[..got], expected);
        }
    }
}

#[test]
fn parts_begin_aligned_and_each_may_be_patched_at_its_start() {
    let chunk = 1_usize << 14;
    let alignment = 4 * chunk;
    for sealed in [false, true] {
        let key = sealed.then(|| Dek::generate().unwrap());
        let mut sealer = Sealer::new(Cursor::new(Vec::new()), options(key.clone(), 14)).unwrap();
        let parts = [bytes(5 * chunk + 3), bytes(7), bytes(3 * chunk), Vec::new()];
        let mut expected: Vec<u8> = Vec::new();
        let mut offsets = Vec::new();
        for part in &parts {
            let offset = sealer.begin_part(alignment as u64).unwrap();
            expected.resize(expected.len().next_multiple_of(alignment), 0);
            assert_eq!(offset, expected.len() as u64);
            sealer.write_all(part).unwrap();
            expected.extend_from_slice(part);
            offsets.push(offset);
        }
        // All of them are patched at the end, and in whatever order.
        for (offset, part) in offsets.iter().zip(&parts).rev() {
            let patch = &b"late"[..part.len().min(4)];
            sealer.patch(*offset, patch).unwrap();
            let at = usize::try_from(*offset).unwrap();
            expected[at..at + patch.len()].copy_from_slice(patch);
        }
        // A second chunk of a part, what was not written, and over the end of a first chunk.
        assert!(sealer.patch(offsets[0] + chunk as u64, b"x").is_err());
        assert!(sealer.patch(offsets[3], b"x").is_err());
        assert!(sealer.patch(chunk as u64 - 2, b"late").is_err());
        assert!(sealer.begin_part(chunk as u64 + 1).is_err());
        let (out, info) = sealer
            .finish(|summary| Metadata { payload_sha256: hex::encode(summary.sha256), ..Metadata::default() }, None)
            .unwrap();
        let image =
            Image::open(out.into_inner(), &OpenOptions { key, pinned: Some(info.digest), ..Default::default() });
        assert_eq!(read_all(&image.unwrap()).unwrap(), expected);
    }
}

#[test]
fn plaintext_is_that_of_its_chunk_and_of_no_other() {
    let plaintext = bytes((2 << 14) + 100);
    for key in [Some(Dek::generate().unwrap()), None] {
        let (file, _) = seal(&plaintext, key.clone(), 14, None);
        let header = Header::parse(file[..HEADER_LENGTH].try_into().unwrap()).unwrap();
        let part = |(start, length): (u64, u64)| {
            file[usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap()].to_vec()
        };
        let open = |key| {
            let mut verifier = Verifier::new(header.clone(), &OpenOptions { key, ..Default::default() }).unwrap();
            verifier.set_page_hashes(&part(verifier.page_hashes_range())).unwrap();
            let page = verifier.verify_page(0, &part(verifier.page_range(0).unwrap())).unwrap();
            (verifier, page)
        };
        let (verifier, page) = open(key.clone());
        for (chunk, plain) in (0..).zip(plaintext.chunks(1 << 14)) {
            verifier.check_plaintext(chunk, &page, plain).unwrap();
            let (mut changed, zeros) = (plain.to_vec(), vec![0; plain.len()]);
            changed[plain.len() / 2] ^= 1;
            let longer = [plain, &[0]].concat();
            for other in [&changed[..], &plain[1..], &plain[..plain.len() - 1], &longer, &zeros, &[]] {
                let error = verifier.check_plaintext(chunk, &page, other).unwrap_err();
                assert!(matches!(error, ImageError::Damaged { .. }), "{chunk}: {error}");
            }
            assert!(verifier.check_plaintext((chunk + 1) % 2, &page, plain).is_err(), "{chunk} is in another's place");
        }
        assert!(matches!(verifier.check_plaintext(3, &page, &[0]), Err(ImageError::Argument(_))));
        let (verifier, page) = open(None);
        let answer = verifier.check_plaintext(0, &page, &plaintext[..1 << 14]);
        assert!(key.is_none() == answer.is_ok(), "{answer:?}");
        assert!(key.is_none() || matches!(answer, Err(ImageError::KeyNeeded(_))), "{answer:?}");
    }
}
