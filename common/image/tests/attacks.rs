//! What an attacker, or a bad disk, may do to an image (docs/formats.md, "attacks"): each ends in an error of its own, and no byte of
//! plaintext that was not verified is ever returned.
#![allow(missing_docs, clippy::unwrap_used)]

mod oracle;

use moor_image::{
    Dek, FormatError, HEADER_LENGTH, Header, Image, ImageError, OpenOptions, ReadAt, Region, SignatureFile, SigningKey,
    Verifier, verify_file,
};
use oracle::{Recipe, seal_header};
use std::io;
use std::ops::Range;
use std::sync::Mutex;

const DEK: [u8; 32] = [0x5A; 32];

fn recipe() -> Recipe {
    about((0..3 * 16_384 + 100_u32).map(|i| u8::try_from((i * 7 + (i >> 9)) % 256).unwrap()).collect())
}

/// One chunk of a few bytes: small enough to try every bit.
fn small() -> Recipe {
    about(b"some plaintext".to_vec())
}

fn about(plaintext: Vec<u8>) -> Recipe {
    let sha256 = hex::encode(oracle::sha256(&[&plaintext]));
    Recipe {
        dek: Some(DEK),
        salt: [3; 32],
        chunk_log2: 14,
        payload: 3,
        lineage: [7; 16],
        serial: 5,
        created: 1_700_000_000,
        plaintext,
        metadata: format!(r#"{{"name":"victim","payload_sha256":"{sha256}"}}"#).into_bytes(),
        hints: b"a trace".to_vec(),
    }
}

fn with_key() -> OpenOptions {
    OpenOptions { key: Some(Dek::from_bytes(DEK)), ..OpenOptions::default() }
}

/// Reads everything there is.
fn read_all<R: ReadAt>(source: R, options: &OpenOptions) -> Result<Vec<u8>, ImageError> {
    let image = Image::open(source, options)?;
    let mut plaintext = vec![0; usize::try_from(image.plaintext_len()).unwrap()];
    let length = image.read_at(0, &mut plaintext)?;
    assert_eq!(length, plaintext.len());
    image.metadata()?;
    image.hints()?;
    Ok(plaintext)
}

fn number(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn rehashed(mut file: Vec<u8>, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    change(&mut file);
    seal_header(&mut file, None);
    file
}

/// Where a byte is, as the report should name it.
fn region_of(header: &Header, at: u64) -> Region {
    let within = |(start, length): (u64, u64)| (start..start + length).contains(&at);
    if at < HEADER_LENGTH as u64 {
        return Region::Header;
    }
    if let Some(index) = (0..header.chunks).find(|index| within(header.chunk_range(*index).unwrap())) {
        return Region::Chunk { index };
    }
    if within(header.page_hashes_range()) {
        return Region::PageHashes;
    }
    if let Some(page) = (0..header.pages()).find(|page| within(header.page_range(*page).unwrap())) {
        return Region::TablePage { page };
    }
    if within((header.metadata_offset, header.metadata_length)) { Region::Metadata } else { Region::Hints }
}

/// One flipped bit: neither readable nor good, and named by its region and bytes, with and without the key.
fn flip_is_found(good: &[u8], header: &Header, at: usize, bit: u8) {
    let mut file = good.to_vec();
    file[at] ^= 1 << bit;
    for (options, how) in [(with_key(), "with the key"), (OpenOptions::default(), "without the key")] {
        let report = verify_file(&file, &options, |_, _| {}).unwrap();
        let [problem] = &report.problems[..] else { panic!("byte {at} bit {bit} {how}: {:?}", report.problems) };
        assert_eq!(problem.region, region_of(header, at as u64), "byte {at} bit {bit} {how}");
        assert!((problem.start..problem.end).contains(&(at as u64)), "byte {at} bit {bit} {how}: {problem}");
    }
    assert!(read_all(file, &with_key()).is_err(), "byte {at} bit {bit}");
}

#[test]
fn a_flip_of_any_bit_is_found_and_named() {
    let good = small().build();
    let header = Header::parse(good[..HEADER_LENGTH].try_into().unwrap()).unwrap();
    assert_eq!(read_all(good.clone(), &with_key()).unwrap(), small().plaintext);
    for at in 0..good.len() {
        for bit in 0..8 {
            flip_is_found(&good, &header, at, bit);
        }
    }
}

#[test]
fn a_flip_of_any_byte_of_several_chunks_is_found_and_named() {
    let good = recipe().build();
    let header = Header::parse(good[..HEADER_LENGTH].try_into().unwrap()).unwrap();
    // Every byte but those of the header, which the test above has; of chunks every 7th, which leaves none of their ends out.
    let table = usize::try_from(header.table_offset).unwrap();
    let ends = (0..header.chunks).flat_map(|index| {
        let (start, length) = header.chunk_range(index).unwrap();
        [start, start + length - 17, start + length - 16, start + length - 1]
    });
    let chunks = (HEADER_LENGTH..table).step_by(7).chain(ends.map(|at| usize::try_from(at).unwrap()));
    for at in chunks.chain(table..good.len()) {
        flip_is_found(&good, &header, at, u8::try_from(at % 8).unwrap());
    }
}

#[test]
fn a_changed_header_byte_with_a_new_hash_is_refused_by_whoever_holds_the_key() {
    let good = small().build();
    for at in 0..4064 {
        let file = rehashed(good.clone(), |file| file[at] ^= 1);
        let error = read_all(file, &with_key()).expect_err(&format!("byte {at}"));
        match at {
            // What needs no key has its own words; the rest is under the MAC.
            10..12 | 20..24 | 32..64 | 160..192 | 224..256 | 288..352 => {
                assert!(matches!(error, ImageError::HeaderMac), "byte {at}: {error}");
            }
            192..208 => assert!(matches!(error, ImageError::WrongKey { .. }), "byte {at}: {error}"),
            256..288 => assert!(matches!(error, ImageError::HeaderMac), "byte {at}: {error}"),
            352.. => assert!(
                matches!(error, ImageError::Format(FormatError::Reserved(found)) if found == at),
                "byte {at}: {error}"
            ),
            // Hints are the last part: another length of theirs is a good header of a longer file.
            136..144 => {
                assert!(matches!(error, ImageError::Format(_) | ImageError::Length { .. }), "byte {at}: {error}");
            }
            _ => assert!(matches!(error, ImageError::Format(_) | ImageError::HeaderMac), "byte {at}: {error}"),
        }
    }
    // Without the key it is another image: the pin says so, and so does the signature.
    let file = rehashed(good.clone(), |file| file[56] ^= 1);
    assert!(verify_file(&file, &OpenOptions::default(), |_, _| {}).unwrap().is_good());
    let pinned = Some(good[4064..4096].try_into().unwrap());
    let error = read_all(file, &OpenOptions { pinned, ..with_key() }).unwrap_err();
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");
}

#[test]
fn later_minor_versions_and_compatible_flags_are_read() {
    for at in [10, 20] {
        let recipe = small();
        let mut file = recipe.build();
        // Made so by the builder: the key derivation covers the first 64 bytes, so all that is sealed differs.
        file[at] = 1;
        file[400] = 0xAB;
        let start: [u8; 64] = file[..64].try_into().unwrap();
        let keys = oracle::Keys::derive(&DEK, &recipe.salt, &start);
        let chunk = keys.seal_chunk(0, &recipe.plaintext);
        let table = HEADER_LENGTH + chunk.len();
        file[HEADER_LENGTH..table].copy_from_slice(&chunk);
        let leaf = oracle::leaf(0, &chunk);
        let page = oracle::page(0, &leaf);
        file[table..table + 32].copy_from_slice(&page);
        file[table + 32..table + 64].copy_from_slice(&leaf);
        file[224..256].copy_from_slice(&oracle::root(1, &page));
        let (metadata, hints) =
            (keys.section("moor/v1 metadata\0", &recipe.metadata), keys.section("moor/v1 hints\0", &recipe.hints));
        file[256..288].copy_from_slice(&oracle::sha256(&[&metadata]));
        file[288..320].copy_from_slice(&oracle::sha256(&[&hints]));
        file.truncate(table + 64);
        file.extend([metadata, hints].concat());
        seal_header(&mut file, Some(&keys));
        assert_eq!(read_all(file, &with_key()).unwrap(), recipe.plaintext, "byte {at}");
    }
}

#[test]
fn swapped_chunks_are_found() {
    let recipe = recipe();
    let mut chunks = recipe.chunks();
    chunks.swap(0, 2);
    // In the file alone.
    let mut file = recipe.build();
    let good = file.clone();
    let range = |index: usize| HEADER_LENGTH + index * (16_384 + 16)..HEADER_LENGTH + (index + 1) * (16_384 + 16);
    file[range(0)].copy_from_slice(&good[range(2)]);
    file[range(2)].copy_from_slice(&good[range(0)]);
    let report = verify_file(&file, &OpenOptions::default(), |_, _| {}).unwrap();
    let regions: Vec<Region> = report.problems.iter().map(|problem| problem.region).collect();
    assert_eq!(regions, [Region::Chunk { index: 0 }, Region::Chunk { index: 2 }]);
    // With the table made anew, by somebody without the key: the header's MAC is another.
    let file = Recipe { dek: Some([0; 32]), ..recipe.clone() }.build_around(&chunks);
    let file = rehashed(file, |file| file[192..208].copy_from_slice(&good[192..208]));
    assert!(matches!(read_all(file, &with_key()), Err(ImageError::HeaderMac)));
    // By somebody with it: the nonce is the chunk's place.
    let error = read_all(recipe.build_around(&chunks), &with_key()).unwrap_err();
    assert!(matches!(&error, ImageError::Forged { what, .. } if what == "chunk 0"), "{error}");
}

#[test]
fn of_chunks_that_are_opened_together_each_is_judged_alone() {
    // More than are hashed at once, and a shorter one at the end.
    let recipe = about((0..19 * 16_384 + 100_u32).map(|i| u8::try_from((i * 7 + (i >> 9)) % 256).unwrap()).collect());
    let file = recipe.build();
    let header = Header::parse(file[..HEADER_LENGTH].try_into().unwrap()).unwrap();
    let part = |(start, length): (u64, u64)| {
        file[usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap()].to_vec()
    };
    let mut verifier = Verifier::new(header, &with_key()).unwrap();
    verifier.set_page_hashes(&part(verifier.page_hashes_range())).unwrap();
    let page = verifier.verify_page(0, &part(verifier.page_range(0).unwrap())).unwrap();
    let plain: Vec<_> = recipe.plaintext.chunks(1 << 14).collect();
    let sealed =
        |chunks: Range<u64>| chunks.map(|chunk| part(verifier.chunk_range(chunk).unwrap())).collect::<Vec<_>>();
    for chunks in [0..2, 1..3, 17..20, 18..20, 3..12, 2..15, 0..16, 1..18, 4..20, 0..20] {
        for damaged in [None].into_iter().chain((0..chunks.clone().count()).map(Some)) {
            let mut bytes = sealed(chunks.clone());
            if let Some(damaged) = damaged {
                bytes[damaged][99] ^= 1;
            }
            let results = verifier.open_chunks(chunks.start, &page, &mut bytes);
            assert_eq!(results.len(), bytes.len());
            for (at, (result, bytes)) in results.into_iter().zip(bytes).enumerate() {
                let chunk = usize::try_from(chunks.start).unwrap() + at;
                if damaged == Some(at) {
                    assert!(matches!(result, Err(ImageError::Damaged { .. })), "{chunk} of {chunks:?}: {result:?}");
                } else {
                    assert!(result.is_ok() && bytes == plain[chunk], "{chunk} of {chunks:?}: {result:?}");
                }
            }
        }
    }
    // There is none behind the last.
    let results = verifier.open_chunks(19, &page, &mut [sealed(19..20), sealed(18..19)].concat());
    assert!(matches!(&results[..], [Ok(()), Err(ImageError::Argument(_))]), "{results:?}");
    // Any two that were exchanged fit each other's places as little as alone.
    for (one, other) in [(0, 1), (0, 15), (7, 8)] {
        let mut bytes = sealed(0..16);
        bytes.swap(one, other);
        for (at, result) in verifier.open_chunks(0, &page, &mut bytes).into_iter().enumerate() {
            assert_eq!(result.is_err(), at == one || at == other, "{at}");
        }
    }
    assert!(verifier.open_chunks(0, &page, &mut []).is_empty());
}

#[test]
fn a_chunk_of_another_image_of_the_same_key_does_not_fit() {
    let recipe = recipe();
    for other in [
        Recipe { salt: [4; 32], ..recipe.clone() },
        Recipe { serial: 6, ..recipe.clone() },
        Recipe { created: 0, ..recipe.clone() },
        Recipe { lineage: [8; 16], ..recipe.clone() },
        Recipe { payload: 1, ..recipe.clone() },
    ] {
        let mut chunks = recipe.chunks();
        chunks[1] = other.chunks().swap_remove(1);
        let error = read_all(recipe.build_around(&chunks), &with_key()).unwrap_err();
        assert!(matches!(&error, ImageError::Forged { what, .. } if what == "chunk 1"), "{error}");
        // A whole section likewise.
        let mut file = recipe.build();
        let from = other.build();
        let metadata = usize::try_from(u64::from_le_bytes(file[112..120].try_into().unwrap())).unwrap();
        file[metadata..].copy_from_slice(&from[metadata..]);
        let error = read_all(file, &with_key()).unwrap_err();
        assert!(matches!(&error, ImageError::Damaged { what, .. } if what == "metadata"), "{error}");
    }
}

#[test]
fn a_holder_of_the_key_cannot_change_a_chunk_under_the_same_header() {
    let recipe = recipe();
    let keys = recipe.keys().unwrap();
    let mut file = recipe.build();
    let forged = keys.seal_chunk(1, &vec![0; 16_384]);
    let start = HEADER_LENGTH + 16_384 + 16;
    file[start..start + forged.len()].copy_from_slice(&forged);
    let error = read_all(file, &with_key()).unwrap_err();
    assert!(matches!(&error, ImageError::Damaged { what, .. } if what == "chunk 1"), "{error}");
    assert!(error.to_string().contains("bytes 20496 to 36895"), "{error}");
}

#[test]
fn only_pin_and_signature_stop_a_holder_of_the_key_who_rebuilds_all() {
    let dir = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(dir.path().join("key"))
        .status();
    assert!(made.unwrap().success());
    let signer = SigningKey::from_openssh(&std::fs::read(dir.path().join("key")).unwrap()).unwrap();

    let good = recipe().build();
    let digest: [u8; 32] = good[4064..4096].try_into().unwrap();
    let mut signatures = SignatureFile::default();
    signatures.sign(&digest, &signer).unwrap();
    let signatures = Some(signatures.to_bytes().unwrap());
    let trusting = OpenOptions { trusted: vec![signer.public()], signatures, ..with_key() };
    assert_eq!(read_all(good, &trusting).unwrap(), recipe().plaintext);

    let evil = Recipe { plaintext: b"evil".to_vec(), ..recipe() }.build();
    assert_eq!(read_all(evil.clone(), &with_key()).unwrap(), b"evil", "nothing else can tell");
    let error = read_all(evil.clone(), &trusting).unwrap_err();
    assert!(matches!(error, ImageError::Untrusted { .. }), "{error}");
    let error = read_all(evil, &OpenOptions { pinned: Some(digest), ..with_key() }).unwrap_err();
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");
}

#[test]
fn a_shorter_or_longer_file_is_refused() {
    let good = small().build();
    for length in 0..good.len() {
        let file = good[..length].to_vec();
        let error = read_all(file.clone(), &with_key()).unwrap_err();
        assert!(matches!(error, ImageError::Length { actual, .. } if actual == length as u64), "{length}: {error}");
        let report = verify_file(&file, &with_key(), |_, _| {}).unwrap();
        assert!(report.problems.iter().any(|problem| problem.region == Region::Length), "{length}: {report:?}");
    }
    for more in [1, 16, 4096] {
        let file = [&good[..], &vec![0; more]].concat();
        let error = read_all(file.clone(), &with_key()).unwrap_err();
        assert!(matches!(error, ImageError::Length { .. }) && error.to_string().contains("extended"), "{error}");
        assert!(!verify_file(&file, &with_key(), |_, _| {}).unwrap().is_good());
    }
}

#[test]
fn the_wrong_key_is_told_from_damage() {
    let file = recipe().build();
    let wrong = OpenOptions { key: Some(Dek::from_bytes([1; 32])), ..OpenOptions::default() };
    let error = read_all(file.clone(), &wrong).unwrap_err();
    assert!(matches!(error, ImageError::WrongKey { .. }), "{error}");
    let report = verify_file(&file, &wrong, |_, _| {}).unwrap();
    assert_eq!(report.problems.len(), 1, "only the key is wrong: {report:?}");
    assert!(report.problems[0].to_string().contains("wrong key"), "{report:?}");
    // Somebody without the key who writes its id into a header of his own.
    let recipe = Recipe { dek: Some([1; 32]), ..recipe() };
    let own = rehashed(recipe.build(), |own| own[192..208].copy_from_slice(&file[192..208]));
    assert!(matches!(read_all(own, &with_key()), Err(ImageError::HeaderMac)));
}

#[test]
fn older_generations_and_other_lineages_are_refused() {
    let file = recipe().build();
    let open = |options| read_all(file.clone(), &options).unwrap_err();
    let error = open(OpenOptions { minimum_serial: Some(6), ..with_key() });
    assert!(matches!(error, ImageError::Serial { minimum: 6, actual: 5 }), "{error}");
    let error = open(OpenOptions { lineage: Some([8; 16]), ..with_key() });
    assert!(matches!(error, ImageError::Lineage { .. }), "{error}");
}

#[test]
fn encryption_cannot_be_switched_off() {
    // The flags alone: the lengths no longer fit.
    let file = rehashed(recipe().build(), |file| {
        file[16] = 2;
        file[24] = 0;
    });
    assert!(matches!(read_all(file, &with_key()), Err(ImageError::Format(_))));
    // A whole plain image in the place of the sealed one: a reader with a key was promised a sealed one.
    let plain = Recipe { dek: None, ..recipe() }.build();
    assert!(matches!(read_all(plain.clone(), &with_key()), Err(ImageError::NotEncrypted)));
    let strict = OpenOptions { require_encrypted: true, ..OpenOptions::default() };
    assert!(matches!(read_all(plain.clone(), &strict), Err(ImageError::NotEncrypted)));
    assert_eq!(read_all(plain.clone(), &OpenOptions::default()).unwrap(), recipe().plaintext);
    assert!(!verify_file(&plain, &with_key(), |_, _| {}).unwrap().is_good());
    // Key id or MAC in a plain header.
    for at in [192, 320] {
        let file = rehashed(plain.clone(), |file| file[at] = 1);
        assert!(matches!(read_all(file, &OpenOptions::default()), Err(ImageError::Format(FormatError::Field { .. }))));
    }
}

#[test]
fn offsets_and_lengths_must_be_what_they_make_each_other() {
    let good = small().build();
    let values = [0, 1, 4095, 4096, 4097, 1 << 20, 1 << 32, 1 << 40, (1 << 40) + 1, 1 << 63, u64::MAX - 4096, u64::MAX];
    for at in (64..144).step_by(8) {
        for value in values {
            let file = rehashed(good.clone(), |file| number(file, at, value));
            if file == good {
                continue;
            }
            let error = read_all(file.clone(), &with_key()).expect_err(&format!("{value} at {at}"));
            // Hints are the last part: another length of theirs is a good header of a longer file.
            assert!(matches!(error, ImageError::Format(_) | ImageError::Length { .. }), "{value} at {at}: {error}");
            assert!(!verify_file(&file, &OpenOptions::default(), |_, _| {}).unwrap().is_good());
        }
    }
    for (log2, good_one) in [(0, false), (13, false), (21, false), (64, false), (255, false), (14, true)] {
        let file = rehashed(good.clone(), |file| file[27] = log2);
        assert_eq!(Header::parse(file[..HEADER_LENGTH].try_into().unwrap()).is_ok(), good_one, "{log2}");
    }
}

#[test]
fn the_longest_image_by_its_header_costs_neither_memory_nor_patience() {
    // Consistent in itself, but for the file's length.
    let file = rehashed(Recipe { dek: None, ..small() }.build(), |file| {
        let (length, chunks) = (1 << 40, 1 << 26);
        let table = 4096 + length;
        let table_length = 32 * (chunks / 2048 + chunks);
        for (at, value) in [(64, length), (72, chunks), (88, length), (96, table), (104, table_length)] {
            number(file, at, value);
        }
        let after = table + table_length;
        for (at, value) in [(112, after), (120, 64 << 20), (128, after + (64 << 20)), (136, 64 << 20)] {
            number(file, at, value);
        }
    });
    assert!(Header::parse(file[..HEADER_LENGTH].try_into().unwrap()).is_ok());
    assert!(matches!(read_all(file.clone(), &OpenOptions::default()), Err(ImageError::Length { .. })));
    let report = verify_file(&file, &OpenOptions::default(), |_, _| {}).unwrap();
    assert!(report.problems.len() == 1 && report.problems[0].region == Region::Length, "{report:?}");
}

/// A file whose content somebody exchanges while it is open.
struct Exchanged(Mutex<Vec<u8>>);

impl ReadAt for &Exchanged {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.lock().unwrap().read_exact_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.0.lock().unwrap().size()
    }
}

#[test]
fn a_file_that_is_replaced_while_it_is_read_gives_an_error_and_no_foreign_byte() {
    let good = recipe();
    let other = Recipe { salt: [9; 32], plaintext: vec![0xEE; good.plaintext.len()], ..recipe() };
    let truncated = good.build()[..5000].to_vec();
    for (replacement, what) in
        [(other.build(), "another image of the key"), (truncated, "a shorter file"), (Vec::new(), "nothing")]
    {
        let file = Exchanged(Mutex::new(good.build()));
        let image = Image::open(&file, &with_key()).unwrap();
        let mut part = vec![0; 16_384];
        image.read_at(0, &mut part).unwrap();
        *file.0.lock().unwrap() = replacement;
        let mut later = vec![0; 16_384];
        let error = image.read_at(2 * 16_384, &mut later).expect_err(what);
        assert!(matches!(error, ImageError::Damaged { .. } | ImageError::Io { .. }), "{what}: {error}");
        assert!(later.iter().all(|byte| *byte == 0), "{what}: nothing unverified may reach the caller");
        // What comes back again is read as if nothing had been.
        *file.0.lock().unwrap() = good.build();
        image.read_at(2 * 16_384, &mut later).unwrap();
        assert_eq!(later, good.plaintext[2 * 16_384..3 * 16_384]);
    }
    // Under its name, by rename: who has opened the old one goes on with it.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, good.build()).unwrap();
    let image = Image::open(std::fs::File::open(&path).unwrap(), &with_key()).unwrap();
    std::fs::write(dir.path().join("new"), other.build()).unwrap();
    std::fs::rename(dir.path().join("new"), &path).unwrap();
    let mut whole = vec![0; good.plaintext.len()];
    image.read_at(0, &mut whole).unwrap();
    assert!(whole == good.plaintext);
}

#[test]
fn a_header_that_promises_no_metadata_is_not_good() {
    for (dek, options) in [(Some(DEK), with_key()), (None, OpenOptions::default())] {
        let recipe = Recipe { dek, metadata: Vec::new(), hints: Vec::new(), ..small() };
        let report = verify_file(&recipe.build(), &options, |_, _| {}).unwrap();
        assert!(report.problems.iter().any(|problem| problem.region == Region::Metadata), "{report:?}");
    }
}

#[test]
fn a_payload_that_is_not_what_the_metadata_says_is_found() {
    let metadata = format!(r#"{{"name":"victim","payload_sha256":"{}"}}"#, "0".repeat(64));
    let recipe = Recipe { metadata: metadata.into_bytes(), ..small() };
    let report = verify_file(&recipe.build(), &with_key(), |_, _| {}).unwrap();
    assert!(report.problems.iter().any(|problem| problem.what.contains("payload_sha256")), "{report:?}");
    assert!(
        verify_file(&recipe.build(), &OpenOptions::default(), |_, _| {}).unwrap().is_good(),
        "the key is needed for that"
    );
}

#[test]
fn sections_of_the_format_cannot_stand_for_each_other() {
    let recipe = recipe();
    let keys = recipe.keys().unwrap();
    let sealed = keys.section("moor/v1 metadata\0", b"text");
    assert!(keys.open_section("moor/v1 hints\0", &sealed).is_none());
    assert!(keys.open_chunk(0, &sealed).is_none());
    let (leaf, page, root) = (oracle::leaf(0, b"x"), oracle::page(0, b"x"), oracle::root(0, b"x"));
    assert!(leaf != page && page != root && leaf != root);
}
