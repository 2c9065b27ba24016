//! A tree with everything that packers get wrong.

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::process::{Gid, Uid};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};

/// Sizes around the edges of pages, chunks and blocks.
const SIZES: [usize; 14] =
    [0, 1, 4095, 4096, 4097, 65_535, 65_536, 131_071, 131_072, 131_073, 262_143, 262_144, 300_001, 1_200_000];

/// Fills the directory `root`, which exists. `entries` is the size of the big directory.
pub fn fill(root: &Path, entries: usize) {
    contents(&root.join("contents"));
    sparse(&root.join("sparse"));
    links(&root.join("links"));
    names(&root.join("names"));
    special(&root.join("special"));
    owners(&root.join("owners"));
    xattrs(&root.join("xattrs"));
    directories(&root.join("directories"), entries);
    times(&root.join("times"));
    fs::create_dir(root.join("empty")).unwrap();
    chmod(root, 0o751);
    touch(root, 1_234_567_890);
}

fn make(path: &Path) -> &Path {
    fs::create_dir(path).unwrap();
    path
}

/// Bytes that do not compress; the same seed gives the same bytes.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn contents(root: &Path) {
    make(root);
    for (seed, size) in SIZES.into_iter().enumerate() {
        fs::write(root.join(format!("noise-{size}")), noise(size, seed as u64)).unwrap();
        fs::write(root.join(format!("noise-{size}-twin")), noise(size, seed as u64)).unwrap();
        fs::write(root.join(format!("noise-{size}-other")), noise(size, seed as u64 + 100)).unwrap();
        let text = "all work and no play ".repeat(size / 21 + 1);
        fs::write(root.join(format!("text-{size}")), &text[..size]).unwrap();
        fs::write(root.join(format!("zeros-{size}")), vec![0; size]).unwrap();
    }
    // A large pair that differs in its last byte, and one that is equal.
    let mut large = noise(3_000_000, 7);
    fs::write(root.join("large-a"), &large).unwrap();
    fs::write(root.join("large-b"), &large).unwrap();
    *large.last_mut().unwrap() ^= 1;
    fs::write(root.join("large-c"), &large).unwrap();
}

fn sparse(root: &Path) {
    make(root);
    let file = |name: &str, length: u64, data: &[(u64, usize)]| {
        let file = File::create(root.join(name)).unwrap();
        file.set_len(length).unwrap();
        for (offset, size) in data {
            file.write_all_at(&noise(*size, *offset), *offset).unwrap();
        }
    };
    file("only-hole", 10 << 20, &[]);
    file("hole-first", 5 << 20, &[(4 << 20, 1 << 20)]);
    file("hole-last", (5 << 20) + 17, &[(0, 100_000)]);
    file("hole-last-short", 131_072 + 500, &[(0, 131_072)]);
    file("holes-between", 20 << 20, &[(1 << 20, 4096), (7 << 20, 300_000), ((15 << 20) + 4096, 1)]);
    file("large", (4 << 30) + (100 << 20), &[(4 << 30, 10_000)]);
}

fn links(root: &Path) {
    make(root);
    make(&root.join("below"));
    fs::write(root.join("one"), noise(200_000, 1)).unwrap();
    for name in ["two", "below/three", "below/four"] {
        fs::hard_link(root.join("one"), root.join(name)).unwrap();
    }
    // Equal content, another group: must not become links of each other.
    fs::write(root.join("other-one"), noise(200_000, 1)).unwrap();
    fs::hard_link(root.join("other-one"), root.join("below/other-two")).unwrap();
    fs::write(root.join("empty-one"), b"").unwrap();
    fs::hard_link(root.join("empty-one"), root.join("empty-two")).unwrap();
    symlink("one", root.join("soft")).unwrap();
    fs::hard_link(root.join("soft"), root.join("below/soft-twin")).unwrap();
    node(&root.join("pipe"), FileType::Fifo, 0o600, 0, 0);
    fs::hard_link(root.join("pipe"), root.join("pipe-twin")).unwrap();
    node(&root.join("device"), FileType::CharacterDevice, 0o600, 5, 1);
    fs::hard_link(root.join("device"), root.join("below/device-twin")).unwrap();
    // A name outside of the tree: it does not count.
    fs::write(root.join("outside"), b"x").unwrap();
    fs::hard_link(root.join("outside"), root.parent().unwrap().with_extension("outside")).unwrap();
}

fn names(root: &Path) {
    make(root);
    let names: [&[u8]; 9] = [
        b"\xff\xfe not utf-8 \x80",
        b"new\nline",
        b" leading and trailing ",
        b"-rf",
        b"\x01\x1b[31m",
        "für ☃".as_bytes(),
        b"...",
        b"back\\slash\"quote'",
        &[b'n'; 255],
    ];
    for name in names {
        fs::write(root.join(OsStr::from_bytes(name)), name).unwrap();
    }
    for (name, target) in [
        ("dangling", b"/no/such/place".to_vec()),
        ("not-utf8", b"\xff\xfe".to_vec()),
        ("dots", b"../../../../etc/passwd".to_vec()),
        ("long", vec![b'l'; 4095]),
    ] {
        symlink(OsStr::from_bytes(&target), root.join(name)).unwrap();
    }
}

fn special(root: &Path) {
    make(root);
    node(&root.join("null"), FileType::CharacterDevice, 0o666, 1, 3);
    for (major, minor) in [(8, 255), (8, 256), (259, 1_048_575), (4095, 0), (4095, 65_536), (0, 300)] {
        node(&root.join(format!("block-{major}-{minor}")), FileType::BlockDevice, 0o660, major, minor);
        node(&root.join(format!("char-{major}-{minor}")), FileType::CharacterDevice, 0o620, major, minor);
    }
    node(&root.join("pipe"), FileType::Fifo, 0o1622, 0, 0);
    node(&root.join("socket"), FileType::Socket, 0o777, 0, 0);
}

fn node(path: &Path, kind: FileType, mode: u32, major: u32, minor: u32) {
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(mode), device).unwrap();
    rustix::fs::chmod(path, Mode::from_raw_mode(mode)).unwrap();
}

fn owners(root: &Path) {
    make(root);
    for (index, mode) in [0o000, 0o400, 0o644, 0o4755, 0o2755, 0o6711, 0o1777, 0o7777].into_iter().enumerate() {
        for (uid, gid) in [(0, 0), (1000, 100), (65_534, 65_534), (70_000, 4_294_967_294)] {
            let path = root.join(format!("{mode:o}-{uid}-{gid}"));
            if index % 2 == 0 {
                fs::write(&path, b"x").unwrap();
            } else {
                make(&path);
            }
            own(&path, uid, gid);
            chmod(&path, mode);
        }
    }
    symlink("target", root.join("link")).unwrap();
    own(&root.join("link"), 12, 34);
}

fn own(path: &Path, uid: u32, gid: u32) {
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    rustix::fs::chownat(CWD, path, uid, gid, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn chmod(path: &Path, mode: u32) {
    rustix::fs::chmod(path, Mode::from_raw_mode(mode)).unwrap();
}

fn xattrs(root: &Path) {
    make(root);
    let set = |path: &Path, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
    };
    let file = |name: &str| -> PathBuf {
        let path = root.join(name);
        fs::write(&path, name).unwrap();
        path
    };
    // cap_net_raw+ep, as `ping` has it: VFS_CAP_REVISION_2 with the effective bit.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set(&file("ping"), "security.capability", &capability);
    set(&file("ping-too"), "security.capability", &capability);
    let many = file("many");
    for index in 0..20 {
        set(&many, &format!("user.number-{index}"), format!("value {index}").repeat(index).as_bytes());
    }
    set(&many, "trusted.overlay.opaque", b"y");
    set(&many, "security.other", b"\0\xff binary \0");
    set(&file("empty-value"), "user.empty", b"");
    set(&file("large-value"), "user.large", &noise(3500, 3));
    set(&file("large-value-again"), "user.large", &noise(3500, 3));
    set(&file("large-value-other"), "user.large", &noise(3500, 4));
    set(&file("long-name"), &format!("user.{}", "n".repeat(200)), b"v");
    let directory = root.join("directory");
    set(make(&directory), "user.on-directory", b"d");
    let link = root.join("link");
    symlink("nowhere", &link).unwrap();
    set(&link, "trusted.on-link", b"l");
    for (name, kind) in [
        ("device", FileType::CharacterDevice),
        ("block", FileType::BlockDevice),
        ("pipe", FileType::Fifo),
        ("socket", FileType::Socket),
    ] {
        node(&root.join(name), kind, 0o644, 1, 7);
        set(&root.join(name), "trusted.on-special", name.as_bytes());
    }
    // Several hundred different sets, so that the tables are longer than one block.
    for index in 0..900 {
        set(&file(&format!("set-{index}")), "user.set", &noise(50, index));
    }
    let acl = file("acl");
    // Version 2; user::rw-, user:1000:r--, group::r--, mask::r--, other::r--.
    let mut value = vec![2, 0, 0, 0];
    for (tag, permission, id) in
        [(1_u16, 6_u16, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 4, u32::MAX)]
    {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permission.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    set(&acl, "system.posix_acl_access", &value);
}

fn directories(root: &Path, entries: usize) {
    make(root);
    let big = root.join("big");
    make(&big);
    for index in 0..entries {
        File::create(big.join(format!("entry-{index:06}"))).unwrap();
    }
    // Listings of all lengths around 64 KiB, where the format changes to another kind of inode: a header of 12 bytes for
    // each 256 entries (less where a block ends), 8 bytes and the name for each entry.
    for length in (65_500..65_540).step_by(3) {
        let path = root.join(format!("listing-{length}"));
        make(&path);
        let mut rest = length;
        let mut index = 0;
        while rest > 270 {
            let name = format!("{index:0>242}");
            File::create(path.join(&name)).unwrap();
            rest -= 8 + name.len();
            index += 1;
        }
        File::create(path.join("z".repeat(rest.clamp(9, 255) - 8))).unwrap();
    }
    let mut deep = root.join("deep");
    make(&deep);
    for level in 0..120 {
        deep = deep.join(format!("level-{level}"));
        make(&deep);
    }
    fs::write(deep.join("bottom"), b"bottom").unwrap();
}

fn times(root: &Path) {
    make(root);
    for time in [0, 1, 1_000_000_000, 2_147_483_647, 2_147_483_648, 4_294_967_295] {
        let file = root.join(format!("file-{time}"));
        fs::write(&file, b"t").unwrap();
        touch(&file, time);
        let directory = root.join(format!("directory-{time}"));
        fs::write(make(&directory).join("inside"), b"i").unwrap();
        touch(&directory, time);
        let link = root.join(format!("link-{time}"));
        symlink("t", &link).unwrap();
        touch(&link, time);
    }
}

fn touch(path: &Path, seconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}
