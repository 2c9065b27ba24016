//! No plaintext reaches a disk while a tree is packed or a node captured, also when the packer is killed; and memory stays small.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::cli::{imgutil, names};
use common::node::Node;
use common::odd_tree::noise;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Bytes that do not compress, so that a squashfs would store them as they are.
fn marker() -> Vec<u8> {
    noise(64, 4711)
}

/// A tree full of markers. It takes some seconds to pack at a high level.
fn tree(root: &Path) -> PathBuf {
    let tree = root.join("tree");
    fs::create_dir(&tree).unwrap();
    for index in 0..24 {
        let mut bytes = noise(2 << 20, index);
        for at in (0..bytes.len()).step_by(100_000) {
            bytes[at..at + 64].copy_from_slice(&marker());
        }
        fs::write(tree.join(format!("file-{index}")), bytes).unwrap();
    }
    tree
}

struct Packing {
    child: Child,
    output: PathBuf,
    temporary: PathBuf,
}

impl Packing {
    fn start(work: &Path, tree: &Path, more: &[&str]) -> Self {
        let (output, temporary) = (work.join("output"), work.join("temporary"));
        for directory in [&output, &temporary] {
            fs::create_dir_all(directory).unwrap();
        }
        let mut command = imgutil(["pack".as_ref(), tree.as_os_str(), "--level".as_ref(), "19".as_ref()]);
        command.arg("-o").arg(output.join("image.moor")).args(more).env("TMPDIR", &temporary);
        if more.is_empty() {
            command.arg("--key-file").arg(output.join("image.key"));
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { child, output, temporary }
    }

    fn open_files(&self, tree: &Path) -> Vec<PathBuf> {
        open_files(self.child.id(), tree)
    }

    /// Peak of resident memory so far, in KiB.
    fn peak_memory(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
    }
}

/// Open files of a process that are not of the tree.
fn open_files(process: u32, tree: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/fd")) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .filter(|path| fs::read_link(path).is_ok_and(|target| !target.starts_with(tree)))
        .filter(|path| fs::metadata(path).is_ok_and(|meta| meta.is_file()))
        .collect()
}

impl Drop for Packing {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a file has the marker anywhere.
fn has_marker(path: &Path) -> bool {
    let marker = marker();
    let mut bytes = Vec::new();
    // A file may vanish between listing and reading.
    if File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).is_err() {
        return false;
    }
    bytes.windows(marker.len()).any(|window| window[0] == marker[0] && window == marker)
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    names(directory).into_iter().map(|name| directory.join(name)).collect()
}

#[test]
fn no_plaintext_is_written_while_packing() {
    let work = tempfile::tempdir().unwrap();
    let tree = tree(work.path());
    let mut packing = Packing::start(work.path(), &tree, &[]);
    let (mut looks, mut seen, mut memory) = (0, 0, 0);
    let status = loop {
        for path in packing.open_files(&tree) {
            seen = seen.max(fs::metadata(&path).map_or(0, |meta| meta.len()));
            assert!(!has_marker(&path), "plaintext in an open file: {:?}", fs::read_link(&path));
        }
        for path in files_below(&packing.output).into_iter().chain(files_below(&packing.temporary)) {
            assert!(!has_marker(&path), "plaintext in {}", path.display());
        }
        memory = memory.max(packing.peak_memory().unwrap_or(0));
        looks += 1;
        if let Some(status) = packing.child.try_wait().unwrap() {
            break status;
        }
    };
    assert!(status.success());
    assert!(looks > 3 && seen > 1 << 20, "the packer was too fast to be watched: {looks} looks, {seen} bytes seen");
    assert!(memory * 1024 < 150_000_000, "{memory} KiB of memory");
    assert_eq!(names(&packing.output), ["image.key", "image.moor"]);
    assert!(!has_marker(&packing.output.join("image.moor")));
    assert!(names(&packing.temporary).is_empty());
}

/// Of a node on which nobody can write anything, by a builder that is watched. The key is never on the node: not in a file, and in no command
/// line and no environment of the programs that run there.
#[test]
fn no_plaintext_is_staged_while_a_node_is_captured() {
    let work = tempfile::tempdir().unwrap();
    let tree = tree(work.path());
    let plant =
        "mkdir -p srv && cp \"$D\"/tree/* home/op/ && cp \"$D/tree/file-0\" srv/ && cp \"$D/tree/file-1\" var/lib/";
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), work.path(), plant);
    node.make_read_only();
    let mut command = node.capture(&node.target(), &["--level", "19"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let [output, temporary] = ["out", "tmp"].map(|name| work.path().join(name));
    let (mut looks, mut seen, mut on_node, before) = (0, 0, Vec::new(), names(work.path()));
    let status = loop {
        for path in open_files(child.id(), &tree) {
            seen = seen.max(fs::metadata(&path).map_or(0, |meta| meta.len()));
            assert!(!has_marker(&path), "plaintext in an open file: {:?}", fs::read_link(&path));
        }
        for path in files_below(&output).into_iter().chain(files_below(&temporary)) {
            // One is the socket of the connection, which nobody reads.
            assert!(!path.is_file() || !has_marker(&path), "plaintext in {}", path.display());
        }
        assert_eq!(names(work.path()), before, "where the node can write");
        for (id, line) in node.sessions() {
            on_node.extend([line.into_bytes(), fs::read(format!("/proc/{id}/environ")).unwrap_or_default()]);
        }
        looks += 1;
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
    };
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(status.success(), "{said}");
    assert!(looks > 3 && seen > 1 << 20, "it was too fast to be watched: {looks} looks, {seen} bytes seen");
    assert_eq!((names(&output), names(&temporary)), (vec!["node.key".into(), "node.moor".into()], Vec::new()));
    assert!(!has_marker(&output.join("node.moor")));
    let key = fs::read_to_string(output.join("node.key")).unwrap();
    let on_node = String::from_utf8_lossy(&on_node.concat()).into_owned();
    assert!(on_node.contains("tar ") && !on_node.contains(key.trim()), "{on_node}");
    // It was there to be seen: unpacked, the image has it.
    let unpacked = work.path().join("unpacked");
    let mut unpack = imgutil(["unpack".as_ref(), output.join("node.moor").as_os_str(), unpacked.as_os_str()]);
    assert!(unpack.arg("--key-file").arg(output.join("node.key")).output().unwrap().status.success());
    for file in ["home/op/file-7", "srv/file-0", "var/lib/file-1"] {
        assert!(has_marker(&unpacked.join(file)), "{file}");
    }
}

/// Where nothing else can be written, nothing else was written: every file system is read-only to the packer but the directory of
/// its output, and there too only a sealed file appears.
#[test]
fn packing_writes_nowhere_but_beside_its_output() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), [marker(), noise(3 << 20, 5)].concat()).unwrap();
    let output = work.path().join("output");
    fs::create_dir(&output).unwrap();
    // In a mount namespace of its own: all mounts read-only, the output's directory put over itself, writable.
    let script = r#"mount --bind "$1" "$1"
        while read -r _ _ _ _ point _; do
            case $(printf %b "$point") in "$1") ;; *) mount -o remount,bind,ro "$(printf %b "$point")" 2>/dev/null || true ;; esac
        done </proc/self/mountinfo
        for place in /tmp /var/tmp /dev/shm "$2"; do
            if touch "$place/probe" 2>/dev/null; then echo "$place can be written" >&2; exit 99; fi
        done
        exec "$3" pack "$2" --level 3 -o "$1/image.moor" --key-file "$1/image.key""#;
    let status = std::process::Command::new("unshare")
        .args(["-m", "bash", "-ec", script, "bash"])
        .args([&output, &tree])
        .arg(env!("CARGO_BIN_EXE_imgutil"))
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(names(&output), ["image.key", "image.moor"]);
    assert!(!has_marker(&output.join("image.moor")));
}

#[test]
fn the_watch_would_see_plaintext() {
    let work = tempfile::tempdir().unwrap();
    let tree = tree(work.path());
    let mut packing = Packing::start(work.path(), &tree, &["--plain"]);
    assert!(packing.child.wait().unwrap().success());
    assert!(has_marker(&packing.output.join("image.moor")), "a plain image has the marker as it is");
}

#[test]
fn a_killed_packer_leaves_nothing() {
    let work = tempfile::tempdir().unwrap();
    let tree = tree(work.path());
    for target in [1, 4 << 20, 20 << 20] {
        let mut packing = Packing::start(work.path(), &tree, &[]);
        let begun = Instant::now();
        // Until so many bytes of the image are there.
        while packing.open_files(&tree).iter().all(|path| fs::metadata(path).map_or(0, |meta| meta.len()) < target) {
            assert!(packing.child.try_wait().unwrap().is_none(), "the packer ended before it had {target} bytes");
            assert!(begun.elapsed() < Duration::from_mins(5), "the packer does not write");
            std::thread::sleep(Duration::from_millis(1));
        }
        packing.child.kill().unwrap();
        packing.child.wait().unwrap();
        assert_eq!(names(&packing.output), Vec::<String>::new(), "after {target} bytes");
        assert_eq!(names(&packing.temporary), Vec::<String>::new(), "after {target} bytes");
    }
}
