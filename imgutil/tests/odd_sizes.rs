//! Unpack of any image gives back the tree: trees made at random from everything that a file system has. 100 MB and 10,000 files
//! here; 1 GB files and 100,000 small ones in `make test-full`.
//!
//! `MOOR_SEED=N` repeats the trees from seed N on. Otherwise the first seed is taken from the commit, so that every commit tries others.
#![allow(missing_docs, clippy::unwrap_used)]
#![allow(clippy::cast_possible_truncation)] // numbers at random, below a limit each

mod common;
#[path = "../../tests/seed.rs"]
mod seed;

use common::cli::{pack, run};
use common::odd_tree::noise;
use common::snapshot::{assert_same, snapshot};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use seed::first_seed;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

/// `cap_net_raw+ep`, as `ping` has it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Numbers that are the same for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// A tree at random.
struct Grower {
    random: Random,
    directories: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Grower {
    fn name(&mut self) -> Vec<u8> {
        let longest = if self.random.one_in(50) { 240 } else { 14 };
        let length = 1 + self.random.below(longest);
        let odd = self.random.one_in(4);
        let byte = |_| match self.random.below(256) as u8 {
            0 | b'/' => b'_',
            byte if odd => byte,
            byte => b'a' + byte % 26,
        };
        (0..length).map(byte).collect()
    }

    fn place(&mut self) -> PathBuf {
        loop {
            let directory = self.random.below(self.directories.len() as u64) as usize;
            let name = self.name();
            let path = self.directories[directory].join(OsStr::from_bytes(&name));
            if name != b"." && name != b".." && path.symlink_metadata().is_err() {
                return path;
            }
        }
    }

    fn bytes(&mut self, size: usize) -> Vec<u8> {
        let seed = self.random.below(1 << 40);
        match self.random.below(3) {
            0 => noise(size, seed),
            1 => format!("{seed} and again ").into_bytes().into_iter().cycle().take(size).collect(),
            _ => vec![0; size],
        }
    }

    /// Adds one object.
    fn grow(&mut self) {
        let path = self.place();
        match self.random.below(100) {
            0..8 => {
                fs::create_dir(&path).unwrap();
                self.directories.push(path.clone());
            }
            8..14 => symlink(OsStr::from_bytes(&self.name()), &path).unwrap(),
            14..18 => {
                let kinds = [FileType::Fifo, FileType::Socket, FileType::CharacterDevice, FileType::BlockDevice];
                let kind = kinds[self.random.below(4) as usize];
                let (major, minor) = (self.random.below(4096) as u32, self.random.below(1 << 20) as u32);
                rustix::fs::mknodat(CWD, &path, kind, Mode::from_raw_mode(0o600), rustix::fs::makedev(major, minor))
                    .unwrap();
            }
            18..24 if !self.files.is_empty() => {
                let other = self.random.below(self.files.len() as u64) as usize;
                fs::hard_link(&self.files[other], &path).unwrap();
                return;
            }
            24..27 if !self.files.is_empty() => {
                let other = self.random.below(self.files.len() as u64) as usize;
                fs::copy(&self.files[other], &path).unwrap();
                self.files.push(path.clone());
            }
            27..32 => {
                // Holes at any place.
                let file = File::create(&path).unwrap();
                file.set_len(self.random.below(5_000_000)).unwrap();
                for _ in 0..self.random.below(4) {
                    let (size, at) = (self.random.below(70_000) as usize, self.random.below(4_000_000));
                    file.write_all_at(&self.bytes(size), at).unwrap();
                }
                self.files.push(path.clone());
            }
            _ => {
                let limit = [1, 100, 5000, 140_000, 600_000][self.random.below(5) as usize];
                let size = self.random.below(limit) as usize;
                fs::write(&path, self.bytes(size)).unwrap();
                self.files.push(path.clone());
            }
        }
        self.attributes(&path);
    }

    fn attributes(&mut self, path: &Path) {
        let kind = path.symlink_metadata().unwrap().file_type();
        if kind.is_symlink() {
            return;
        }
        if self.random.one_in(3) {
            chown(path, Some(self.random.below(70_000) as u32), Some(self.random.below(70_000) as u32)).unwrap();
        }
        if self.random.one_in(3) {
            fs::set_permissions(path, fs::Permissions::from_mode(self.random.below(0o10000) as u32)).unwrap();
        }
        if kind.is_file() && self.random.one_in(20) {
            rustix::fs::lsetxattr(path, "security.capability", &CAPABILITY, XattrFlags::empty()).unwrap();
        }
        if (kind.is_file() || kind.is_dir()) && self.random.one_in(10) {
            let name = format!("user.{}", self.random.below(40));
            let size = self.random.below(900) as usize;
            let value = self.bytes(size);
            rustix::fs::lsetxattr(path, name.as_str(), &value, XattrFlags::empty()).unwrap();
        }
    }
}

fn random_tree(root: &Path, seed: u64, objects: usize) {
    fs::create_dir(root).unwrap();
    let mut grower = Grower { random: Random(seed), directories: vec![root.to_owned()], files: Vec::new() };
    for _ in 0..objects {
        grower.grow();
    }
}

/// Packs, unpacks, compares.
fn comes_back(work: &Path, tree: &Path, name: &str, more: &[&str]) {
    let more = [&["--no-scrub"], more].concat();
    let files = pack(tree, work, name, &more);
    let unpacked = work.join(format!("{name}-unpacked"));
    run([
        "unpack",
        files.image.to_str().unwrap(),
        unpacked.to_str().unwrap(),
        "--key-file",
        files.key.to_str().unwrap(),
    ])
    .good();
    assert_same("source", &snapshot(tree), name, &snapshot(&unpacked));
    if let Ok(sparse) = unpacked.join("sparse").metadata() {
        assert!(sparse.blocks() * 512 <= 1 << 20, "holes were filled: {} KiB", sparse.blocks() / 2);
    }
    fs::remove_dir_all(unpacked).unwrap();
    fs::remove_file(files.image).unwrap();
}

#[test]
fn any_tree_comes_back_the_same() {
    let work = tempfile::tempdir().unwrap();
    let first = first_seed();
    println!("trees of seed {first} on; MOOR_SEED={first} repeats them");
    let options: [&[&str]; 4] = [&[], &["--block-size", "4K"], &["--block-size", "1M", "--processors", "3"], &["--xz"]];
    for (seed, more) in (first..).zip(options) {
        let tree = work.path().join(format!("tree-{seed}"));
        random_tree(&tree, seed, 400);
        // `pack` of the tests sets a level, which xz has not.
        if more == ["--xz"] {
            let image = work.path().join("xz.moor");
            run(["pack", tree.to_str().unwrap(), "--plain", "--no-scrub", "--xz", "-o", image.to_str().unwrap()])
                .good();
            let unpacked = work.path().join("xz");
            run(["unpack", image.to_str().unwrap(), unpacked.to_str().unwrap()]).good();
            assert_same("source", &snapshot(&tree), "xz", &snapshot(&unpacked));
        } else {
            comes_back(work.path(), &tree, &format!("seed-{seed}"), more);
        }
    }
}

fn large(tree: &Path, size: u64, count: u32) {
    fs::create_dir(tree).unwrap();
    let file = File::create(tree.join("large")).unwrap();
    let piece = noise(1 << 20, 99);
    for at in (0..size).step_by(1 << 20) {
        // Neither equal nor quite different from piece to piece.
        let mut piece = piece.clone();
        piece[..8].copy_from_slice(&at.to_le_bytes());
        file.write_all_at(&piece[..usize::try_from((size - at).min(1 << 20)).unwrap()], at).unwrap();
    }
    fs::copy(tree.join("large"), tree.join("large-twin")).unwrap();
    let sparse = File::create(tree.join("sparse")).unwrap();
    sparse.set_len(size + 4097).unwrap();
    sparse.write_all_at(b"in the middle", size / 2).unwrap();
    for index in 0..count {
        let directory = tree.join(format!("{}", index / 1000));
        if index % 1000 == 0 {
            fs::create_dir(&directory).unwrap();
            odd_company(tree, &directory, index);
        }
        fs::write(directory.join(format!("small-{index}")), format!("small file {index}\n")).unwrap();
    }
}

/// What small files live beside: names of the large ones and of others in other directories, attributes, a capability, a device, a
/// name that is not UTF-8.
fn odd_company(tree: &Path, directory: &Path, index: u32) {
    for name in ["large", "sparse"] {
        fs::hard_link(tree.join(name), directory.join(format!("{name}-link"))).unwrap();
    }
    let odd = directory.join(OsStr::from_bytes(b"\xff\xfe odd \x80"));
    fs::write(&odd, index.to_le_bytes()).unwrap();
    rustix::fs::lsetxattr(&odd, "user.index", &index.to_le_bytes(), XattrFlags::empty()).unwrap();
    rustix::fs::lsetxattr(&odd, "security.capability", &CAPABILITY, XattrFlags::empty()).unwrap();
    fs::hard_link(&odd, tree.join(format!("odd-{index}"))).unwrap();
    let device = rustix::fs::makedev(4095, index + 256);
    rustix::fs::mknodat(CWD, directory.join("device"), FileType::BlockDevice, Mode::from_raw_mode(0o640), device)
        .unwrap();
}

#[test]
fn a_large_file_and_ten_thousand_small_ones_come_back() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    large(&tree, 100 << 20, 10_000);
    comes_back(work.path(), &tree, "large", &[]);
}

/// The full sizes.
#[test]
#[ignore = "of full size: `make test-full` runs it"]
fn a_gigabyte_and_a_hundred_thousand_files_come_back() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    large(&tree, 1 << 30, 100_000);
    comes_back(work.path(), &tree, "full", &[]);
    let first = first_seed();
    println!("a tree of seed {first}; MOOR_SEED={first} repeats it");
    let tree = work.path().join("random");
    random_tree(&tree, first, 10_000);
    comes_back(work.path(), &tree, "random", &[]);
}
