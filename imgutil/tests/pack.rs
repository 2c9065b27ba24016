//! `imgutil pack`, `unpack` and `inspect` as a user runs them: what comes out, and what each mistake answers.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;
mod common;

use common::cli::{Files, finish, imgutil, names, pack, run};
use common::mount::{Mounted, own_mounts, run as tool};
use common::odd_tree;
use common::snapshot::{assert_same, snapshot};
use moor_image::{Dek, Image, OpenOptions};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small tree with a kernel, a release file and a package.
fn small_tree(root: &Path) -> PathBuf {
    let tree = root.join("tree");
    for directory in ["boot", "etc", "usr/lib", "var/lib/dpkg", "lib/modules/6.1.0-10-amd64"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    for release in ["6.1.0-9-amd64", "6.1.0-10-amd64"] {
        fs::write(tree.join(format!("boot/vmlinuz-{release}")), format!("kernel {release}")).unwrap();
        fs::write(tree.join(format!("boot/initrd.img-{release}")), format!("initramfs {release}")).unwrap();
    }
    fs::create_dir_all(tree.join("sbin")).unwrap();
    fs::write(tree.join("usr/lib/init"), "init").unwrap();
    symlink("/usr/lib/init", tree.join("sbin/init")).unwrap();
    fs::write(tree.join("usr/lib/os-release"), "ID=debian\nVERSION_ID=\"12\"\n").unwrap();
    // Absolute, as some systems have it: it must be read inside of the tree.
    symlink("/usr/lib/os-release", tree.join("etc/os-release")).unwrap();
    let status = "Package: dpkg\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1.21.22\n";
    fs::write(tree.join("var/lib/dpkg/status"), status).unwrap();
    fs::write(tree.join("data"), odd_tree::noise(700_000, 5)).unwrap();
    tree
}

fn open(files: &Files) -> Image<File> {
    let key = Dek::from_hex(&fs::read(&files.key).unwrap()).unwrap();
    Image::open(File::open(&files.image).unwrap(), &OpenOptions { key: Some(key), ..OpenOptions::default() }).unwrap()
}

/// Writes an image's plaintext to a file, which only a test may do.
fn extract(image: &Image<File>, path: &Path) {
    let mut file = File::create(path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        let length = image.read_at(offset, &mut buffer).unwrap();
        if length == 0 {
            return;
        }
        file.write_all(&buffer[..length]).unwrap();
        offset += length as u64;
    }
}

#[test]
fn a_sealed_tree_comes_back_the_same() {
    own_mounts();
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    odd_tree::fill(&tree, 300);
    let mut expected = snapshot(&tree);
    expected.get_mut(Path::new("links/outside")).unwrap().links = 1;

    let files = pack(&tree, work.path(), "odd", &["--no-scrub"]);
    assert_eq!(fs::metadata(&files.key).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::read(&files.key).unwrap().len(), 65);

    let plain = work.path().join("plain");
    extract(&open(&files), &plain);
    assert_same("source", &expected, "mounted", &snapshot(Mounted::new(&plain).path()));

    let unpacked = work.path().join("unpacked");
    let key = File::open(&files.key).unwrap();
    let mut command = imgutil(["unpack".as_ref(), files.image.as_os_str(), unpacked.as_os_str()]);
    finish(&command.args(["--key-file", "-"]).stdin(key).output().unwrap()).good();
    assert_same("source", &expected, "unpacked", &snapshot(&unpacked));
}

#[test]
fn a_debian_tree_comes_back_the_same() {
    // A tree of its own: what others execute in the shared one meanwhile leaves marks for a moment.
    let (work, tree) = build_tree::own_debian();
    let files = pack(&tree, work.path(), "debian", &["--no-scrub"]);
    let (image, key) = (files.image.to_str().unwrap(), files.key.to_str().unwrap());
    assert!(run(["verify", image, "--key-file", key]).good().stdout.contains("hashes, key and contents"));
    assert!(run(["verify", image, "--public"]).good().stdout.contains("without the key"));
    let inspected = run(["inspect", image, "--key-file", key, "--json"]).good().stdout;
    let inspected: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["metadata"]["os"], "debian-12");
    assert!(inspected["metadata"]["packages"].as_array().unwrap().len() > 80);
    let unpacked = work.path().join("unpacked");
    run(["unpack", image, unpacked.to_str().unwrap(), "--key-file", key]).good();
    assert_same("source", &snapshot(&tree), "unpacked", &snapshot(&unpacked));
}

#[test]
fn acls_are_left_out_with_a_warning() {
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    tool(Command::new("setfacl").args(["-m", "u:1000:r"]).arg(tree.join("data")).arg(tree.join("boot")));
    let image = work.path().join("image.moor");
    let ran = run(["pack".as_ref(), tree.as_os_str(), "--plain".as_ref(), "-o".as_ref(), image.as_os_str()]).good();
    let warnings: Vec<&str> = ran.stderr.lines().filter(|line| line.contains("warning")).collect();
    assert_eq!(
        warnings,
        ["imgutil: warning: left out POSIX ACLs, which a squashfs cannot hold: /boot /data"],
        "{}",
        ran.stderr
    );
}

#[test]
fn inspect_says_what_is_known_without_and_with_the_key() {
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    let lineage = "0d8b1d5e-5a3f-4a3d-9d6c-0a4f0c6a1b2c";
    let files = pack(&tree, work.path(), "web", &["--lineage", lineage, "--serial", "41", "--name", "web-node"]);
    let inspect = |more: &[&str]| {
        let args = ["inspect", files.image.to_str().unwrap(), "--json"];
        let ran = run(args.iter().chain(more)).good();
        serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()
    };
    let without = inspect(&[]);
    assert_eq!(without["lineage"], lineage);
    assert_eq!(without["serial"], 41);
    assert_eq!(without["encrypted"], true);
    assert_eq!(without["payload"], "squashfs");
    assert_eq!(without["size"], fs::metadata(&files.image).unwrap().len());
    assert!(without["metadata"].is_null());

    let with = inspect(&["--key-file", files.key.to_str().unwrap()]);
    assert_eq!(with["digest"], without["digest"]);
    let metadata = &with["metadata"];
    for (field, value) in [("name", "web-node"), ("os", "debian-12"), ("arch", "x86_64"), ("kernel", "6.1.0-10-amd64")]
    {
        assert_eq!(metadata[field], value, "{metadata}");
    }
    assert_eq!(metadata["packages"][0]["name"], "dpkg");
    assert_eq!(metadata["packages"][0]["version"], "1.21.22");
    assert_eq!(metadata["filesystems"][0]["mount"], "/");

    let text = run(["inspect", files.image.to_str().unwrap()]).good().stdout;
    assert!(text.contains(lineage) && text.contains("give --key-file"), "{text}");
}

#[test]
fn the_same_tree_has_the_same_payload_under_another_key() {
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    let (one, two) = (pack(&tree, work.path(), "one", &[]), pack(&tree, work.path(), "two", &[]));
    assert_ne!(fs::read(&one.key).unwrap(), fs::read(&two.key).unwrap());
    assert_ne!(open(&one).header().digest, open(&two).header().digest);
    assert_eq!(open(&one).metadata().unwrap().payload_sha256, open(&two).metadata().unwrap().payload_sha256);
}

#[test]
fn boot_files_are_of_the_newest_kernel() {
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    let boot = work.path().join("new/boot");
    pack(&tree, work.path(), "image", &["--boot-dir", boot.to_str().unwrap()]);
    assert_eq!(names(&boot), ["initrd.img", "vmlinuz"]);
    assert_eq!(fs::read(boot.join("vmlinuz")).unwrap(), b"kernel 6.1.0-10-amd64");
    assert_eq!(fs::read(boot.join("initrd.img")).unwrap(), b"initramfs 6.1.0-10-amd64");
}

#[test]
fn a_signature_is_made_and_a_stale_one_does_not_stay() {
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    let signer = work.path().join("signer");
    tool(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&signer));
    let files = pack(&tree, work.path(), "image", &["--sign-key", signer.to_str().unwrap()]);
    let signature = work.path().join("image.moor.sig");
    assert!(signature.exists());
    let trust = signer.with_extension("pub");
    let verify = ["verify", files.image.to_str().unwrap(), "--public", "--trust", trust.to_str().unwrap()];
    assert!(run(verify).good().stdout.contains("signed by a trusted key"));

    fs::remove_file(&files.key).unwrap();
    pack(&tree, work.path(), "image", &[]);
    assert!(!signature.exists(), "the old image's signature would only be wrong");
    let ran = run(verify);
    assert_eq!((ran.status, ran.stdout.contains("signature")), (1, true), "{}{}", ran.stdout, ran.stderr);
}

#[test]
fn a_tree_that_cannot_boot_gives_no_boot_files() {
    let work = tempfile::tempdir().unwrap();
    for (files, reason) in [
        (&[][..], "the tree has no kernel (boot/vmlinuz-*)"),
        (&["vmlinuz-1", "initrd.img-1"], "the tree has no init (sbin/init)"),
    ] {
        let tree = work.path().join(format!("tree-{}", files.len()));
        fs::create_dir_all(tree.join("boot")).unwrap();
        for name in files {
            fs::write(tree.join("boot").join(name), "x").unwrap();
        }
        let before = names(work.path());
        let place = |name: &str| work.path().join(name).display().to_string();
        let (image, key, boot) = (place("new.moor"), place("new.key"), place("boot"));
        run(["pack", tree.to_str().unwrap(), "-o", &image, "--key-file", &key, "--boot-dir", &boot])
            .one_line_error(1, &[reason, "imgutil exec"]);
        assert_eq!(names(work.path()), before);
        // An image need not be a node's, and is told from one.
        let ran = run(["pack", tree.to_str().unwrap(), "-o", &image, "--key-file", &key]).good();
        let line = ran.stderr.lines().find(|line| line.starts_with("imgutil: no node can boot this image: "));
        assert!(line.is_some_and(|line| line.contains(reason)), "{}", ran.stderr);
        for file in [&image, &key] {
            fs::remove_file(file).unwrap();
        }
    }
}

#[test]
fn mistakes_are_answered_in_one_line_and_leave_nothing() {
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    let files = pack(&tree, work.path(), "good", &[]);
    let path = |name: &str| work.path().join(name).to_str().unwrap().to_owned();
    let (tree_text, image, key) = (tree.to_str().unwrap(), files.image.to_str().unwrap(), files.key.to_str().unwrap());
    fs::write(work.path().join("wrong.key"), format!("{}\n", "5a".repeat(32))).unwrap();
    fs::write(work.path().join("no.key"), "not a key\n").unwrap();
    let mut short = fs::read(&files.image).unwrap();
    short.truncate(short.len() - 700);
    fs::write(work.path().join("short.moor"), short).unwrap();
    fs::write(work.path().join("other.moor"), vec![b'x'; 10_000]).unwrap();
    let bare = work.path().join("bare");
    fs::create_dir_all(bare.join("boot")).unwrap();
    fs::write(bare.join("boot/vmlinuz-1"), "k").unwrap();
    let escaping = work.path().join("escaping");
    fs::create_dir_all(escaping.join("boot")).unwrap();
    symlink("/etc/passwd", escaping.join("boot/vmlinuz-1")).unwrap();
    fs::write(escaping.join("boot/initrd.img-1"), "i").unwrap();
    let before = names(work.path());

    let (out, new_key, new_tree) = (path("new.moor"), path("new.key"), path("new-tree"));
    let pack = |tree: &str, more: &[&str]| -> Vec<String> {
        ["pack", tree, "-o", &out].iter().chain(more).map(|text| (*text).to_owned()).collect()
    };
    let unpack = |image: &str, key: &str| -> Vec<String> {
        ["unpack", image, &new_tree, "--key-file", key].map(str::to_owned).to_vec()
    };
    let (no_tree, no_directory, boot) = (path("no-tree"), path("none/new.key"), path("new-boot"));
    let (bare, escaping) = (bare.to_str().unwrap(), escaping.to_str().unwrap());
    let cases: Vec<(&str, Vec<String>, &[&str])> = vec![
        ("no tree", pack(&no_tree, &["--key-file", &new_key]), &["cannot open the tree", "no-tree"]),
        ("tree is a file", pack(image, &["--key-file", &new_key]), &["cannot open the tree", "Not a directory"]),
        ("key exists", pack(tree_text, &["--key-file", key]), &["good.key", "exists already"]),
        (
            "no directory for the key",
            pack(tree_text, &["--key-file", &no_directory]),
            &["none/new.key", "No such file"],
        ),
        ("key to standard output", pack(tree_text, &["--key-file", "-"]), &["standard output"]),
        ("no signing key", pack(tree_text, &["--key-file", &new_key, "--sign-key", key]), &["signing key", "good.key"]),
        (
            "no initramfs",
            pack(bare, &["--key-file", &new_key, "--boot-dir", &boot]),
            &["initrd.img-1", "update-initramfs"],
        ),
        (
            "kernel outside",
            pack(escaping, &["--key-file", &new_key, "--boot-dir", &boot]),
            &["vmlinuz-1", "regular file"],
        ),
        (
            "no server",
            vec!["pack".into(), tree_text.into(), "web".into(), "--socket".into(), path("no-socket")],
            &["no-socket", "moord"],
        ),
        ("wrong key", unpack(image, &path("wrong.key")), &["good.moor", "wrong key", "key id"]),
        ("no key", unpack(image, &path("no.key")), &["no.key", "64 hexadecimal digits"]),
        ("missing key", unpack(image, &path("none.key")), &["none.key", "No such file"]),
        ("truncated", unpack(&path("short.moor"), key), &["short.moor", "truncated", "fetch it again"]),
        ("not an image", unpack(&path("other.moor"), key), &["other.moor", "not a sealed image"]),
        (
            "tree exists",
            ["unpack", image, tree_text, "--key-file", key].map(str::to_owned).to_vec(),
            &["exists already"],
        ),
        ("key missing", ["unpack", image, &new_tree].map(str::to_owned).to_vec(), &["encrypted", "give its key"]),
        (
            "inspect: wrong key",
            ["inspect", image, "--key-file", &path("wrong.key")].map(str::to_owned).to_vec(),
            &["wrong key"],
        ),
        (
            "inspect: not an image",
            ["inspect", &path("other.moor")].map(str::to_owned).to_vec(),
            &["not a sealed image"],
        ),
    ];
    for (name, args, parts) in cases {
        println!("{name}");
        run(&args).one_line_error(1, parts);
        assert_eq!(names(work.path()), before, "{name}");
    }
    // What clap refuses: no key file, both ways at once, a level that zstd does not have.
    for args in [
        pack(tree_text, &[]),
        pack(tree_text, &["web", "--key-file", &new_key]),
        pack(tree_text, &["--key-file", &new_key, "--level", "23"]),
        pack(tree_text, &["--key-file", &new_key, "--lineage", "0d8b1d5e-5a3f-4a3d-9d6c-0a4f0c6a1b2c"]),
    ] {
        let ran = run(&args);
        assert_eq!(ran.status, 2, "{args:?}: {}", ran.stderr);
        assert_eq!(names(work.path()), before);
    }
}

#[test]
fn a_file_too_short_for_an_image_is_called_that() {
    let work = tempfile::tempdir().unwrap();
    fs::write(work.path().join("short"), "xyz").unwrap();
    let path = |name: &str| work.path().join(name).to_str().unwrap().to_owned();
    for args in
        [vec!["inspect", &path("short")], vec!["sbom", &path("short")], vec!["unpack", &path("short"), &path("new")]]
    {
        run(args).one_line_error(1, &["short", "3 bytes, fewer than a sealed image's header"]);
        assert_eq!(names(work.path()), ["short"]);
    }
}

#[test]
fn what_would_be_in_the_next_image_or_cannot_be_written_is_refused_before_packing() {
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    fs::create_dir(work.path().join("other")).unwrap();
    for (image, key, parts) in [
        ("tree/a.moor", "a.key", ["tree/a.moor", "is in the tree that is packed", "name a place outside"]),
        ("a.moor", "other/../tree/a.key", ["a.key", "is in the tree that is packed", "name a place outside"]),
        ("other", "a.key", ["other", "is a directory", "name a file"]),
    ] {
        let (image, key) = (work.path().join(image), work.path().join(key));
        let mut command = imgutil(["pack".as_ref(), tree.as_os_str(), "-o".as_ref(), image.as_os_str()]);
        finish(&command.arg("--key-file").arg(key).output().unwrap()).one_line_error(1, &parts);
        assert_eq!(names(work.path()), ["other", "tree"]);
        assert!(!tree.join("a.moor").exists() && !tree.join("a.key").exists());
    }
    let before = names(&tree);
    for boot in ["tree/boot", "tree/new/place", "other/../tree/new"] {
        let place = |name: &str| work.path().join(name).display().to_string();
        run([
            "pack",
            tree.to_str().unwrap(),
            "-o",
            &place("a.moor"),
            "--key-file",
            &place("a.key"),
            "--boot-dir",
            &place(boot),
        ])
        .one_line_error(1, &[boot, "is in the tree that is packed"]);
        assert_eq!((names(work.path()), names(&tree)), (vec!["other".to_owned(), "tree".to_owned()], before.clone()));
    }
}

#[test]
fn an_image_that_is_replaced_has_the_next_serial_of_its_lineage() {
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    let generation = |more: &[&str]| {
        let files = pack(&tree, work.path(), "image", more);
        let header = open(&files).header().clone();
        fs::remove_file(&files.key).unwrap();
        (header.lineage, header.serial)
    };
    let (lineage, serial) = generation(&[]);
    assert_eq!(serial, 1);
    assert_eq!(generation(&[]), (lineage, 2));
    let other = "0d8b1d5e-5a3f-4a3d-9d6c-0a4f0c6a1b2c";
    let (given, serial) = generation(&["--lineage", other, "--serial", "7"]);
    assert!(given != lineage && serial == 7);
    assert_eq!(generation(&[]), (given, 8));
    // What is no image has none.
    fs::write(work.path().join("image.moor"), "no image").unwrap();
    let (fresh, serial) = generation(&[]);
    assert!(fresh != given && fresh != lineage && serial == 1);
}

#[test]
fn a_key_file_is_never_where_the_image_or_its_signature_goes() {
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    fs::create_dir(work.path().join("other")).unwrap();
    let image = work.path().join("new.moor");
    for key in ["new.moor", "other/../new.moor", "new.moor.sig"] {
        let key_file = work.path().join(key);
        let mut command = imgutil(["pack".as_ref(), tree.as_os_str(), "-o".as_ref(), image.as_os_str()]);
        let ran = finish(&command.arg("--key-file").arg(key_file).output().unwrap());
        ran.one_line_error(1, &[key, "cannot be the key file", "name another file"]);
        assert_eq!(names(work.path()), ["other", "tree"]);
    }
}

/// A small file system of its own, unmounted when dropped. Call [`own_mounts`] before.
struct SmallDisk {
    directory: tempfile::TempDir,
}

impl SmallDisk {
    fn new(kib: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let size = format!("size={kib}k");
        tool(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(directory.path()));
        Self { directory }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(self.directory.path()).status();
        assert!(status.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
fn a_full_disk_leaves_nothing() {
    own_mounts();
    let work = tempfile::tempdir().unwrap();
    let tree = small_tree(work.path());
    fs::write(tree.join("more"), odd_tree::noise(4 << 20, 9)).unwrap();
    let files = pack(&tree, work.path(), "good", &[]);
    // Full at the first blocks, in the middle, and when the table is written.
    let sealed = fs::metadata(&files.image).unwrap().len() / 1024;
    for kib in [8, 1024, sealed - 2] {
        let disk = SmallDisk::new(kib);
        let mounted = disk.directory.path();
        let (image, key) = (mounted.join("new.moor"), mounted.join("new.key"));
        let ran = run([
            "pack".as_ref(),
            tree.as_os_str(),
            "--level".as_ref(),
            "3".as_ref(),
            "-o".as_ref(),
            image.as_os_str(),
            "--key-file".as_ref(),
            key.as_os_str(),
        ]);
        ran.one_line_error(1, &["new.moor", "No space left on device", "make room there"]);
        assert!(names(mounted).is_empty(), "{:?}", names(mounted));
    }
    let disk = SmallDisk::new(2048);
    let unpacked = disk.directory.path().join("tree");
    let ran = run([
        "unpack".as_ref(),
        files.image.as_os_str(),
        unpacked.as_os_str(),
        "--key-file".as_ref(),
        files.key.as_os_str(),
    ]);
    ran.one_line_error(1, &["good.moor", "No space left on device", "make room there"]);
    assert!(names(disk.directory.path()).is_empty(), "{:?}", names(disk.directory.path()));
}
