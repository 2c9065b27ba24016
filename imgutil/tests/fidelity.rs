//! What goes into an image comes out of it: our squashfs against `mksquashfs` against the source, all judged by the
//! kernel, and unpacked again by us.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::mount::{Mounted, mksquashfs, own_mounts, run};
use common::odd_tree;
use common::snapshot::{Snapshot, assert_same, snapshot};
use imgutil::pack::{SquashOptions, squash};
use imgutil::progress::Progress;
use imgutil::squashfs::{Compression, Source};
use imgutil::unpack::unsquash;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

struct Plain(File);

impl Source for Plain {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(&self.0, buffer, offset)
    }

    fn size(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }
}

/// Packs into a plain file, which only tests do.
fn pack_plain(tree: &Path, directory: &Path) -> (PathBuf, imgutil::pack::Warnings) {
    pack_with(tree, directory, SquashOptions::default().processors)
}

fn pack_with(tree: &Path, directory: &Path, processors: u32) -> (PathBuf, imgutil::pack::Warnings) {
    let path = directory.join("ours.squashfs");
    let options = SquashOptions { compression: Compression::Zstd(3), processors, ..SquashOptions::default() };
    let squashed = squash(tree, File::create(&path).unwrap(), &options, &Progress::silent()).unwrap();
    squashed.out.write_all_at(&squashed.superblock, 0).unwrap();
    (path, squashed.warnings)
}

/// Allocated size of all regular files, in KiB.
fn allocated(root: &Path, tree: &Snapshot) -> u64 {
    let files = tree.iter().filter(|(path, object)| object.hash.is_some() && object.first_name == **path);
    files.map(|(path, _)| root.join(path).symlink_metadata().unwrap().blocks() / 2).sum()
}

#[test]
fn mounts_of_a_test_are_not_the_host_s() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    let (image, _) = pack_plain(&tree, work.path());
    let all = || std::fs::read_to_string(format!("/proc/{}/mountinfo", std::process::id())).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            own_mounts();
            let mounted = Mounted::new(&image);
            let here = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            assert!(here.contains(mounted.path().to_str().unwrap()), "{here}");
            assert!(!all().contains(mounted.path().to_str().unwrap()));
        });
    });
}

#[test]
fn an_odd_tree_has_no_differences() {
    own_mounts();
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    odd_tree::fill(&tree, 3000);
    let source = snapshot(&tree);
    // Names outside of the tree do not count in an image.
    let mut expected = source.clone();
    expected.get_mut(Path::new("links/outside")).unwrap().links = 1;

    let (ours, warnings) = pack_plain(&tree, work.path());
    assert_eq!(std::fs::metadata(&ours).unwrap().len() % 4096, 0, "padded to pages");
    assert_eq!(warnings.acls, [Path::new("/xattrs/acl")]);
    assert!(warnings.xattrs.is_empty() && warnings.mounts.is_empty() && warnings.times.is_empty(), "{warnings:?}");
    let peer = mksquashfs(&tree, work.path());

    let ours_mounted = Mounted::new(&ours);
    let ours_seen = snapshot(ours_mounted.path());
    assert_same("source", &expected, "ours", &ours_seen);
    let peer_mounted = Mounted::new(&peer);
    assert_same("mksquashfs", &snapshot(peer_mounted.path()), "ours", &ours_seen);

    let statistics = run(Command::new("unsquashfs").arg("-s").arg(&ours));
    assert!(statistics.contains("exportable via NFS"), "{statistics}");

    for (name, image) in [("ours", &ours), ("mksquashfs", &peer)] {
        let unpacked = work.path().join(format!("unpacked-{name}"));
        unsquash(Plain(File::open(image).unwrap()), &unpacked, &Progress::silent()).unwrap();
        let seen = snapshot(&unpacked);
        assert_same("source", &expected, "unpacked", &seen);
        let (before, after) = (allocated(&tree, &source), allocated(&unpacked, &seen));
        // Blocks of zeros come back as holes, so it may take less; more only by the edges of the blocks.
        assert!(after <= before + 2048, "{name}: {before} KiB became {after} KiB: the holes were filled");
    }
}

#[test]
fn a_directory_of_100_000_entries_is_whole() {
    const ENTRIES: usize = 100_000;
    own_mounts();
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    for index in 0..ENTRIES {
        std::os::unix::fs::symlink(format!("{index}"), tree.join(format!("entry-{index:06}"))).unwrap();
    }
    let (image, _) = pack_plain(&tree, work.path());
    let mounted = Mounted::new(&image);
    let mut names: Vec<_> =
        std::fs::read_dir(mounted.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort_unstable();
    assert_eq!(names.len(), ENTRIES);
    for (index, name) in names.iter().enumerate() {
        assert_eq!(name.to_str().unwrap(), format!("entry-{index:06}"));
        // Looking a name up goes by the directory's index. The kernel takes 0.1 ms for each, so a part is enough.
        if index % 40 == 0 {
            let target = std::fs::read_link(mounted.path().join(name)).unwrap();
            assert_eq!(target.to_str().unwrap(), index.to_string());
        }
    }
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    odd_tree::fill(&tree, 10);
    let once = std::fs::read(pack_plain(&tree, work.path()).0).unwrap();
    for processors in [1, 2, 7] {
        let again = std::fs::read(pack_with(&tree, work.path(), processors).0).unwrap();
        assert!(once == again, "{processors} threads give other bytes");
    }
    // A copy has other inode numbers, names in another order, and some holes are filled with zeros.
    let copy = work.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    let mut entries: Vec<PathBuf> = std::fs::read_dir(&tree).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort_unstable();
    entries.reverse();
    run(Command::new("cp").arg("-a").args(entries).arg(&copy));
    for name in ["sparse/only-hole", "sparse/hole-last", "sparse/holes-between"] {
        run(Command::new("cp").args(["-a", "--sparse=never"]).arg(tree.join(name)).arg(copy.join(name)));
    }
    for tool in ["chown", "chmod", "touch"] {
        run(Command::new(tool).arg("--reference").arg(&tree).arg(&copy));
    }
    let again = std::fs::read(pack_plain(&copy, work.path()).0).unwrap();
    assert!(once == again, "a copy gives other bytes");
}

#[test]
fn what_another_mount_holds_is_left_out() {
    own_mounts();
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    let mounted = tree.join("proc");
    std::fs::create_dir_all(&mounted).unwrap();
    std::fs::write(tree.join("file"), b"kept").unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&mounted));
    std::fs::write(mounted.join("foreign"), b"not kept").unwrap();
    let (image, warnings) = pack_plain(&tree, work.path());
    run(Command::new("umount").arg(&mounted));
    assert_eq!(warnings.mounts, [Path::new("/proc")]);
    let mounted = Mounted::new(&image);
    let seen: Vec<PathBuf> = snapshot(mounted.path()).into_keys().collect();
    assert_eq!(seen, [Path::new(""), Path::new("file"), Path::new("proc")]);
}
