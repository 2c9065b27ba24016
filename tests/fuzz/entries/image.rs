//! A sealed image from anybody: opened, verified and read, with the key of the test vectors and without, as it is and with a header
//! hash that fits (which everybody can make, and without which nothing behind the hash would ever be reached).

use aws_lc_rs::digest::{SHA256, digest};
use moor_image::{Dek, HEADER_LENGTH, Image, OpenOptions, verify_file};

pub fn run(data: &[u8]) {
    look(data.to_vec());
    if data.len() >= HEADER_LENGTH {
        let mut file = data.to_vec();
        let hash = digest(&SHA256, &[b"moor/v1 header", &file[..HEADER_LENGTH - 32]].concat());
        file[HEADER_LENGTH - 32..HEADER_LENGTH].copy_from_slice(hash.as_ref());
        look(file);
    }
}

fn look(file: Vec<u8>) {
    let dek = std::array::from_fn(|index| u8::try_from(index).unwrap_or_default());
    for key in [None, Some(Dek::from_bytes(dek))] {
        let options = OpenOptions { key, ..OpenOptions::default() };
        let report = verify_file(&file, &options, |_, _| {}).expect("bytes in memory can be looked at");
        let Ok(image) = Image::open(file.clone(), &options) else {
            assert!(!report.is_good(), "good, and cannot be opened");
            continue;
        };
        let mut buffer = vec![0; usize::try_from(image.plaintext_len()).expect("it is in memory")];
        let read = image.read_at(0, &mut buffer);
        let (metadata, hints) = (image.metadata(), image.hints());
        if report.is_good() && report.with_key {
            assert_eq!(read.expect("a good image can be read"), buffer.len());
            metadata.expect("its metadata too");
            hints.expect("and its hints");
        }
        for offset in [1, 16_383, 65_536, u64::MAX] {
            drop(image.read_at(offset, &mut [0; 100]));
        }
    }
}
