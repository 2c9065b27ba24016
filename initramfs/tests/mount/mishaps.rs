//! A file that fails its mount: whatever it does with a read, who asked has an answer, and the next one is served.

use super::common::namespace::in_namespace;
use bytes::Bytes;
use moor_tether::apart::Outside;
use moor_tether::mount::{FILE_NAME, Mount, Pieces, ReadOnlyFile, Reply};
use nix::mount::{MntFlags, umount2};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

/// Each page of it is read in another way.
const PAGE: usize = 4096;
const PAGES: u64 = 8;

struct Clumsy;

impl ReadOnlyFile for Clumsy {
    fn size(&self) -> u64 {
        PAGES * PAGE as u64
    }

    fn modified(&self) -> u64 {
        7
    }

    fn read(&self, offset: u64, length: usize, reply: Reply) {
        let bytes = Bytes::from(vec![b'x'; length]);
        match offset / PAGE as u64 {
            0 => panic!("in the thread of the mount"),
            1 => drop(reply),
            2 => drop(std::thread::spawn(move || {
                let _reply = reply;
                panic!("in another thread");
            })),
            3 => reply(Err(io::Error::other("bad"))),
            // The kernel takes 1024 parts at most (`UIO_MAXIOV`), and then looks no further.
            4 => reply(Ok(bytes.chunks(1).map(Bytes::copy_from_slice).collect::<Pieces>())),
            5 => reply(Ok(vec![bytes.clone(), bytes])),
            _ => reply(Ok(vec![bytes])),
        }
    }
}

/// Reads a page; `None` if nothing comes of it.
fn read(file: PathBuf, page: u64) -> Option<io::Result<usize>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; PAGE];
        _ = sender.send(File::open(file).and_then(|file| file.read_at(&mut buffer, page * PAGE as u64)));
    });
    receiver.recv_timeout(Duration::from_secs(20)).ok()
}

#[test]
fn a_read_that_goes_wrong_is_an_error_and_the_mount_goes_on() {
    in_namespace("mishaps::a_read_that_goes_wrong_is_an_error_and_the_mount_goes_on", || {
        let dir = tempfile::tempdir().unwrap();
        let mount = Mount::new(dir.path(), Clumsy, Outside::here()).unwrap();
        let file = dir.path().join(FILE_NAME);
        // More often than the mount has threads.
        for _ in 0..4 {
            for page in 0..6 {
                let Some(read) = read(file.clone(), page) else {
                    // Else this process could not end: it waits for an answer of its own. The mount is in use, and its requests are given up all the same.
                    let _ = umount2(dir.path(), MntFlags::MNT_FORCE);
                    panic!("page {page} hangs");
                };
                let error = read.unwrap_err();
                assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "page {page}");
            }
            assert_eq!(read(file.clone(), 6).expect("it hangs").unwrap(), PAGE);
        }
        drop(mount);
    });
}
