//! What a request holds does not stay in this program's memory once it was answered: it may be an image's key, or a passphrase.
#![allow(missing_docs, clippy::unwrap_used)] // a test program; a test may panic

use moor_api::admin::{ImageView, ImportImage};
use moor_api::client::admin::AdminClient;
use moor_api::ids::Sha256Digest;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixListener;
use zeroize::{Zeroize as _, Zeroizing};

/// Bytes of a key in hexadecimal.
const LENGTH: usize = 64;
/// What the test itself knows of the key is masked by this, so that it does not find its own.
const MASK: u8 = 0x80;
/// So much memory is read at a time.
const PIECE: usize = 1 << 20;

/// A new key, and the same masked.
fn new_key() -> (String, [u8; LENGTH]) {
    let mut random = Zeroizing::new([0; LENGTH / 2]);
    File::open("/dev/urandom").unwrap().read_exact(&mut *random).unwrap();
    let mut digits = Zeroizing::new([0; LENGTH]);
    hex::encode_to_slice(*random, &mut *digits).unwrap();
    let mut masked = [0; LENGTH];
    for (masked, digit) in masked.iter_mut().zip(digits.iter()) {
        *masked = digit ^ MASK;
    }
    let mut key = String::with_capacity(LENGTH);
    key.push_str(std::str::from_utf8(&*digits).unwrap());
    (key, masked)
}

/// How often the key, or its first half, stands in what this program can write to.
fn found(masked: &[u8; LENGTH]) -> usize {
    let memory = File::open("/proc/self/mem").unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut piece = vec![0; PIECE + LENGTH];
    let own = piece.as_ptr() as u64;
    let mut count = 0;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|digits| u64::from_str_radix(digits, 16).unwrap());
        if !rights.starts_with("rw") {
            continue;
        }
        let mut at = start;
        while at < end {
            // Pieces overlap: a key may lie across two.
            let length = usize::try_from(end - at).unwrap().min(piece.len());
            // Some of them cannot be read, such as guard pages.
            if memory.read_exact_at(&mut piece[..length], at).is_ok() {
                for (index, window) in piece[..length].windows(LENGTH / 2).enumerate() {
                    let is_key = window.iter().zip(masked).all(|(byte, masked)| byte ^ MASK == *masked);
                    let address = at + index as u64;
                    count += usize::from(is_key && !(own..own + (PIECE + LENGTH) as u64).contains(&address));
                }
            }
            // What was read is searched as well, later.
            piece.zeroize();
            piece.resize(PIECE + LENGTH, 0);
            at += PIECE as u64;
        }
    }
    count
}

/// Reads one request whole, wipes it, and answers. Whether the key was in it.
fn answer(listener: &UnixListener, masked: &[u8; LENGTH], view: &str) -> bool {
    let (stream, _) = listener.accept().unwrap();
    // Without a buffer that could keep a part of the body.
    let mut head = BufReader::with_capacity(1, &stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        head.read_line(&mut line).unwrap();
        if line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = Zeroizing::new(vec![0; length]);
    head.read_exact(&mut body).unwrap();
    let is_there =
        body.windows(LENGTH).any(|window| window.iter().zip(masked).all(|(byte, masked)| byte ^ MASK == *masked));
    drop(body);
    write!(
        &stream,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{view}",
        view.len()
    )
    .unwrap();
    is_there
}

#[test]
fn a_key_is_nowhere_in_memory_once_it_was_sent() {
    let directory = std::env::temp_dir().join(format!("moor-api-wiped-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let socket = directory.join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let (key, masked) = new_key();
    let digest = |byte: u8| Sha256Digest([byte; 32]);
    let mut request = ImportImage {
        name: "web".parse().unwrap(),
        image: digest(1),
        key: Some(key),
        signatures: None,
        kernel: digest(2),
        initramfs: digest(3),
        boot_loaders: BTreeMap::new(),
    };
    let view = serde_json::json!({
        "name": "web", "digest": "01".repeat(32), "lineage": "0d8b1d5e-5a3f-4a3d-9d6c-0a4f0c6a1b2c", "serial": 1, "created": 1, "size": 1,
        "encrypted": true, "pins": 0
    })
    .to_string();
    assert!(found(&masked) > 0, "the search finds what is there");

    let server = std::thread::spawn(move || answer(&listener, &masked, &view));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // The connection stays, and what it keeps with it.
    let (client, view): (AdminClient, ImageView) = runtime.block_on(async {
        let mut client = AdminClient::unix(&socket).await.unwrap();
        let view = client.import_image(&request).await.unwrap();
        (client, view)
    });
    assert!(server.join().unwrap(), "the key was sent");
    assert_eq!(view.serial, 1);
    // The request itself is its owner's to wipe.
    assert!(found(&masked) > 0);
    request.key.zeroize();
    assert_eq!(found(&masked), 0, "copies of the key are left");
    drop(client);
    std::fs::remove_dir_all(directory).unwrap();
}
