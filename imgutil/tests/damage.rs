//! `imgutil verify` finds and names every damage; unpacking never goes outside of its directory and never panics.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::cli::{finish, imgutil, names, pack, run};
use common::mount::run as tool;
use common::odd_tree::noise;
use imgutil::progress::Progress;
use imgutil::squashfs::Source;
use imgutil::unpack::unsquash;
use moor_image::{HEADER_LENGTH, Header};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

struct Bytes(Vec<u8>);

impl Source for Bytes {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(self.0.get(start..start + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }
}

fn tree(root: &Path) -> std::path::PathBuf {
    let tree = root.join("tree");
    fs::create_dir_all(tree.join("directory")).unwrap();
    fs::write(tree.join("noise"), noise(1_000_000, 1)).unwrap();
    fs::write(tree.join("directory/text"), "text ".repeat(50_000)).unwrap();
    fs::hard_link(tree.join("noise"), tree.join("directory/twin")).unwrap();
    symlink("target", tree.join("directory/link")).unwrap();
    tree
}

#[test]
fn each_region_is_named_by_its_bytes() {
    let work = tempfile::tempdir().unwrap();
    let files = pack(&tree(work.path()), work.path(), "image", &[]);
    let good = fs::read(&files.image).unwrap();
    let header = Header::parse(good[..HEADER_LENGTH].try_into().unwrap()).unwrap();
    let damaged = work.path().join("damaged.moor");
    let (image, key) = (damaged.to_str().unwrap(), files.key.to_str().unwrap());
    let named =
        |region: String, (start, length): (u64, u64)| format!("{region}, bytes {start} to {}", start + length - 1);
    let last = header.chunks - 1;
    let cases = [
        (0, "header, bytes 0 to 4095".to_owned()),
        (300, "header, bytes 0 to 4095".to_owned()),
        (4095, "header, bytes 0 to 4095".to_owned()),
        (header.chunk_range(0).unwrap().0, named("chunk 0".into(), header.chunk_range(0).unwrap())),
        (header.chunk_range(3).unwrap().0 + 777, named("chunk 3".into(), header.chunk_range(3).unwrap())),
        (header.table_offset - 1, named(format!("chunk {last}"), header.chunk_range(last).unwrap())),
        (header.page_hashes_range().0, named("page hashes".into(), header.page_hashes_range())),
        (header.page_range(0).unwrap().0 + 5, named("table page 0".into(), header.page_range(0).unwrap())),
        (header.metadata_offset, named("metadata".into(), (header.metadata_offset, header.metadata_length))),
        (good.len() as u64 - 1, named("metadata".into(), (header.metadata_offset, header.metadata_length))),
    ];
    for (offset, region) in cases {
        let mut bytes = good.clone();
        bytes[usize::try_from(offset).unwrap()] ^= 0x40;
        fs::write(&damaged, bytes).unwrap();
        for how in [&["--key-file", key][..], &["--public"], &[]] {
            let ran = run(["verify", image].iter().chain(how));
            assert_eq!(ran.status, 1, "byte {offset}, {how:?}: {}{}", ran.stdout, ran.stderr);
            assert!(ran.stdout.contains(&format!("bad: {region}: ")), "byte {offset}: {region}\n{}", ran.stdout);
        }
    }
    // Two damages are both named.
    let mut bytes = good.clone();
    for chunk in [1, 5] {
        bytes[usize::try_from(header.chunk_range(chunk).unwrap().0).unwrap()] ^= 1;
    }
    fs::write(&damaged, bytes).unwrap();
    let ran = run(["verify", image, "--key-file", key]);
    assert_eq!(ran.stdout.lines().count(), 2, "{}", ran.stdout);
    assert!(ran.stdout.contains("chunk 1,") && ran.stdout.contains("chunk 5,"), "{}", ran.stdout);

    for (length, word) in [(good.len() - 1, "truncated"), (100, "shorter than a header"), (0, "shorter")] {
        fs::write(&damaged, &good[..length]).unwrap();
        let ran = run(["verify", image, "--key-file", key]);
        assert_eq!((ran.status, ran.stdout.contains(word)), (1, true), "{length}: {}{}", ran.stdout, ran.stderr);
    }
    fs::write(&damaged, [&good[..], b"x"].concat()).unwrap();
    let ran = run(["verify", image, "--key-file", key]);
    assert_eq!((ran.status, ran.stdout.contains("extended")), (1, true), "{}", ran.stdout);

    // A good image with another's key, and what is no image.
    let other = work.path().join("other.key");
    fs::write(&other, format!("{}\n", "5a".repeat(32))).unwrap();
    fs::write(&damaged, &good).unwrap();
    let ran = run(["verify", image, "--key-file", other.to_str().unwrap()]);
    assert_eq!((ran.status, ran.stdout.lines().count(), ran.stderr.as_str()), (1, 1, ""), "{}", ran.stdout);
    assert!(ran.stdout.contains("bad: key: wrong key: the image wants key id "), "{}", ran.stdout);
    fs::write(&damaged, noise(10_000, 3)).unwrap();
    let ran = run(["verify", image, "--key-file", key]);
    assert_eq!((ran.status, ran.stdout.lines().count(), ran.stderr.as_str()), (1, 1, ""), "{}", ran.stdout);
    assert!(ran.stdout.contains("bad: header, bytes 0 to 4095: not a sealed image"), "{}", ran.stdout);
    assert_eq!(names(work.path()), ["damaged.moor", "image.key", "image.moor", "other.key", "tree"]);

    fs::write(&damaged, &good).unwrap();
    for how in [&["--key-file", key][..], &["--public"], &[]] {
        assert!(run(["verify", image].iter().chain(how)).good().stdout.contains(": good: digest "));
    }
}

#[test]
fn what_cannot_be_looked_at_has_a_status_of_its_own() {
    let work = tempfile::tempdir().unwrap();
    let files = pack(&tree(work.path()), work.path(), "image", &["--plain"]);
    let image = files.image.to_str().unwrap();
    run(["verify", image]).good();
    for args in [
        vec!["verify", "/no/such/image"],
        vec!["verify", "/"],
        vec!["verify", image, "--key-file", "/no/such/key"],
        vec!["verify", image, "--trust", "/no/such/key"],
        vec!["verify", image, "--trust", image],
    ] {
        run(&args).one_line_error(2, &[]);
    }
}

#[test]
fn a_damaged_squashfs_is_an_error_and_never_a_panic() {
    let work = tempfile::tempdir().unwrap();
    let tree = tree(work.path());
    let image = work.path().join("image");
    // Without compression of the tables, so that a flipped bit reaches the parser.
    tool(Command::new("mksquashfs").arg(&tree).arg(&image).args(["-comp", "zstd", "-noI", "-no-progress", "-quiet"]));
    let good = fs::read(&image).unwrap();
    let used = usize::try_from(u64::from_le_bytes(good[40..48].try_into().unwrap())).unwrap();
    let tables = usize::try_from(u64::from_le_bytes(good[64..72].try_into().unwrap())).unwrap();
    let destination = work.path().join("unpacked");
    let mut errors = 0;
    for (count, position) in (0..96).chain(tables..used).enumerate() {
        let mut bytes = good.clone();
        bytes[position] ^= 1 << (count % 8);
        match unsquash(Bytes(bytes), &destination, &Progress::silent()) {
            Ok(_) => fs::remove_dir_all(&destination).unwrap(), // a time, an owner, a mode
            Err(_) => errors += 1,
        }
        assert!(!destination.exists(), "byte {position}");
    }
    assert!(errors > 100, "only {errors} of {} damages were noticed", used - tables + 96);
    let left: Vec<_> = names(work.path());
    assert_eq!(left, ["image", "tree"]);
}

#[test]
fn an_interrupted_unpack_removes_what_it_built() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for index in 0..5000 {
        fs::write(tree.join(format!("file-{index}")), noise(2000, index)).unwrap();
    }
    let directory = work.path().join("image");
    fs::create_dir(&directory).unwrap();
    let files = pack(&tree, &directory, "image", &[]);
    for signal in ["INT", "TERM"] {
        let target = work.path().join("new/tree");
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        let mut child = imgutil(["unpack".as_ref(), files.image.as_os_str(), target.as_os_str()])
            .arg("--key-file")
            .arg(&files.key)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // As soon as it has begun to build.
        while names(target.parent().unwrap()).is_empty() {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it began");
        }
        tool(Command::new("kill").args(["-s", signal, &child.id().to_string()]));
        let ran = finish(&child.wait_with_output().unwrap());
        ran.one_line_error(1, &["interrupted by SIG", signal]);
        assert!(names(target.parent().unwrap()).is_empty());
    }
}

#[test]
fn names_that_lead_out_are_refused() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("QQ"), "content").unwrap();
    fs::write(tree.join("QQQQ"), "content").unwrap();
    let image = work.path().join("image");
    tool(Command::new("mksquashfs").arg(&tree).arg(&image).args(["-noI", "-no-progress", "-quiet"]));
    let good = fs::read(&image).unwrap();
    for (name, evil) in
        [(&b"QQ"[..], &b".."[..]), (b"QQ", b"/x"), (b"QQ", b"x\0"), (b"QQQQ", b"../x"), (b"QQQQ", b"QQ/x")]
    {
        // The name stands behind its length less one, in the directory table.
        let stored = [&u16::try_from(name.len() - 1).unwrap().to_le_bytes()[..], name].concat();
        let at = good.windows(stored.len()).position(|window| window == stored).unwrap() + 2;
        let mut bytes = good.clone();
        bytes[at..at + evil.len()].copy_from_slice(evil);
        let destination = work.path().join("unpacked");
        let error = unsquash(Bytes(bytes), &destination, &Progress::silent()).unwrap_err();
        assert!(format!("{error:#}").contains("a name "), "{error:#}");
        assert_eq!(names(work.path()), ["image", "tree"]);
    }
}
