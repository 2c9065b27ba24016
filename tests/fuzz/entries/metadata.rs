//! The small texts beside an image: metadata, signature file, key file, list of trusted keys.

use moor_image::{Dek, Metadata, PublicKey, SignatureFile};

pub fn run(data: &[u8]) {
    if let Ok(metadata) = Metadata::from_bytes(data) {
        let bytes = metadata.to_bytes().expect("what was read can be written");
        let again = Metadata::from_bytes(&bytes).expect("and read again");
        assert_eq!(again, metadata);
        assert_eq!(again.to_bytes().expect("written"), bytes, "canonical");
    }
    if let Ok(file) = SignatureFile::parse(data) {
        let again = SignatureFile::parse(&file.to_bytes().expect("written")).expect("read again");
        assert_eq!(again, file);
        assert!(!file.is_signed_by(&[0; 32], &[PublicKey([1; 32])]), "nobody signed this");
    }
    if let Ok(key) = Dek::from_hex(data) {
        assert!(key.to_hex().as_bytes().eq_ignore_ascii_case(data) || !data.ends_with(b"\n"));
    }
    if let Ok(text) = std::str::from_utf8(data) {
        drop(PublicKey::parse_list(text));
    }
}
