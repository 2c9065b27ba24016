//! Everything that a tree is, in a form that can be compared: what differs is named.

use rustix::fs::{AtFlags, CWD, StatxFlags};
use sha::hash_file;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub links: u32,
    pub rdev: (u32, u32),
    pub size: u64,
    pub target: Option<PathBuf>,
    pub hash: Option<Vec<u8>>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode: equal link groups have equal first paths.
    pub first_name: PathBuf,
}

/// Objects by path from the root of the tree.
pub type Snapshot = BTreeMap<PathBuf, Object>;

/// Looks at a whole tree.
pub fn snapshot(root: &Path) -> Snapshot {
    let mut result = Snapshot::new();
    let mut groups = BTreeMap::new();
    let mut hashes: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(relative) = waiting.pop() {
        let path = root.join(&relative);
        let stat = rustix::fs::statx(CWD, &path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS).unwrap();
        let kind = stat.stx_mode & 0o170_000;
        let is_directory = kind == 0o040_000;
        if is_directory {
            for entry in std::fs::read_dir(&path).unwrap() {
                waiting.push(relative.join(entry.unwrap().file_name()));
            }
        }
        let first: &mut PathBuf = groups.entry(stat.stx_ino).or_insert_with(|| relative.clone());
        if relative < *first {
            first.clone_from(&relative);
        }
        let object = Object {
            mode: stat.stx_mode,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mtime: stat.stx_mtime.tv_sec,
            links: stat.stx_nlink,
            rdev: (stat.stx_rdev_major, stat.stx_rdev_minor),
            size: if is_directory { 0 } else { stat.stx_size },
            target: (kind == 0o120_000).then(|| std::fs::read_link(&path).unwrap()),
            // A large file with many names is read once.
            hash: (kind == 0o100_000).then(|| hashes.entry(stat.stx_ino).or_insert_with(|| hash_file(&path)).clone()),
            xattrs: xattrs(&path),
            first_name: PathBuf::from(stat.stx_ino.to_string()),
        };
        result.insert(relative, object);
    }
    for object in result.values_mut() {
        let inode: u64 = object.first_name.to_string_lossy().parse().unwrap();
        object.first_name.clone_from(&groups[&inode]);
    }
    result
}

/// The xattrs that a squashfs can hold.
fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65_536];
    let length = match rustix::fs::llistxattr(path, names.as_mut_slice()) {
        Err(rustix::io::Errno::NOTSUP) => 0, // a squashfs in which nothing has any
        length => length.unwrap(),
    };
    let mut result = BTreeMap::new();
    for name in names[..length].split_inclusive(|byte| *byte == 0) {
        if name.starts_with(b"system.") {
            continue;
        }
        let mut value = vec![0; 65_536];
        let name = CStr::from_bytes_with_nul(name).unwrap();
        let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
        value.truncate(length);
        result.insert(name.to_bytes().to_vec(), value);
    }
    result
}

/// Fails with a list of what differs between two trees.
pub fn assert_same(left_name: &str, left: &Snapshot, right_name: &str, right: &Snapshot) {
    let mut differences = Vec::new();
    for path in left.keys().chain(right.keys().filter(|path| !left.contains_key(*path))) {
        let (a, b) = (left.get(path), right.get(path));
        if a != b {
            let name = String::from_utf8_lossy(path.as_os_str().as_bytes()).chars().take(80).collect::<String>();
            differences.push(format!("{name:?}:\n   {left_name}: {a:?}\n   {right_name}: {b:?}"));
        }
    }
    assert!(
        differences.is_empty(),
        "{} differences, the first ones:\n{}",
        differences.len(),
        differences[..differences.len().min(5)].join("\n")
    );
}

mod sha {
    use aws_lc_rs::digest::{Context, SHA256};
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;

    /// SHA-256 of a file; of one larger than 1 GiB, of every 64th MiB and the last one.
    pub(super) fn hash_file(path: &Path) -> Vec<u8> {
        const STEP: usize = 1 << 20;
        let file = std::fs::File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        let stride = if size > 1 << 30 { 64 } else { 1 };
        let mut context = Context::new(&SHA256);
        let mut buffer = vec![0; STEP];
        let last = size.saturating_sub(STEP as u64);
        for offset in (0..size).step_by(STEP * stride).chain([last]) {
            let length = usize::try_from((size - offset).min(STEP as u64)).unwrap();
            file.read_exact_at(&mut buffer[..length], offset).unwrap();
            context.update(&buffer[..length]);
        }
        context.finish().as_ref().to_vec()
    }
}
