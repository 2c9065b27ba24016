//! Killed at any moment: an image that is replaced never loses its signature, and an unpack that was killed is cleaned up by the next.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::cli::{finish, names, pack, run};
use common::mount::run as tool;
use common::odd_tree::noise;
use common::snapshot::{assert_same, snapshot};
use nix::sys::signal::Signal;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs `imgutil` and kills it at the `nth` call of one of these system calls. Whether it was.
fn killed_at(calls: &str, nth: usize, args: &[&str]) -> bool {
    ended_at(&[], calls, nth, (Signal::SIGKILL, "KILL"), args)
}

/// The same with another signal, behind another command.
fn ended_at(behind: &[&str], calls: &str, nth: usize, (signal, name): (Signal, &str), args: &[&str]) -> bool {
    let inject = format!("inject={calls}:signal={name}:when={nth}");
    let words = [behind, &["strace"]].concat();
    let status = Command::new(words[0])
        .args(&words[1..])
        .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={calls}"), "-e", &inject])
        .arg(env!("CARGO_BIN_EXE_imgutil"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    // strace ends as its tracee did.
    let number = signal as i32;
    assert!(status.success() || status.signal() == Some(number) || status.code() == Some(128 + number), "{status}");
    !status.success()
}

#[test]
fn an_image_that_is_replaced_is_signed_at_every_moment() {
    let work = tempfile::tempdir().unwrap();
    let (tree, output) = (work.path().join("tree"), work.path().join("output"));
    fs::create_dir(&tree).unwrap();
    fs::create_dir(&output).unwrap();
    let signer = work.path().join("signer");
    tool(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&signer));
    let trust = signer.with_extension("pub");
    let (signer, trust) = (signer.to_str().unwrap(), trust.to_str().unwrap());
    fs::write(tree.join("file"), "generation 0").unwrap();
    let files = pack(&tree, &output, "image", &["--sign-key", signer]);
    let image = files.image.to_str().unwrap();
    let digest = || {
        let ran = run(["verify", image, "--public", "--trust", trust]).good().stdout;
        assert!(ran.contains("signed by a trusted key"), "{ran}");
        ran
    };
    let mut before = digest();
    let (mut kills, mut replaced) = (0, 0);
    for nth in 1.. {
        fs::write(tree.join("file"), format!("generation {nth}")).unwrap();
        let key = work.path().join(format!("{nth}.key"));
        let args =
            ["pack", tree.to_str().unwrap(), "-o", image, "--key-file", key.to_str().unwrap(), "--sign-key", signer];
        let was_killed = killed_at("renameat,renameat2,rename,linkat,unlinkat,unlink,fsync", nth, &args);
        let after = digest();
        replaced += usize::from(after != before);
        before = after;
        if !was_killed {
            break;
        }
        kills += 1;
    }
    assert!(kills >= 5 && replaced >= 2, "killed {kills} times, replaced {replaced} times");
    // In the end the signature file is that of the last image alone.
    let signatures: serde_json::Value =
        serde_json::from_slice(&fs::read(output.join("image.moor.sig")).unwrap()).unwrap();
    assert_eq!(signatures["signatures"].as_array().unwrap().len(), 1);
}

/// A kernel must not be newer than the image that has its modules.
#[test]
fn boot_files_are_never_newer_than_their_image() {
    let work = tempfile::tempdir().unwrap();
    let (tree, boot) = (work.path().join("tree"), work.path().join("boot"));
    for directory in ["boot", "sbin"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    fs::write(tree.join("sbin/init"), "init").unwrap();
    let image = work.path().join("image.moor");
    let (mut kills, mut before) = (0, None);
    for nth in 1.. {
        for name in ["vmlinuz-1", "initrd.img-1"] {
            fs::write(tree.join("boot").join(name), format!("{name} {nth}")).unwrap();
        }
        let key = work.path().join(format!("{nth}.key"));
        let args = [
            "pack",
            tree.to_str().unwrap(),
            "-o",
            image.to_str().unwrap(),
            "--key-file",
            key.to_str().unwrap(),
            "--boot-dir",
            boot.to_str().unwrap(),
        ];
        let was_killed = killed_at("renameat,renameat2,linkat", nth, &args);
        let after = fs::read(&image).ok().map(|bytes| bytes[..4096].to_vec());
        for (name, content) in [("vmlinuz", "vmlinuz-1"), ("initrd.img", "initrd.img-1")] {
            let is_new = fs::read_to_string(boot.join(name)).is_ok_and(|text| text == format!("{content} {nth}"));
            assert!(!is_new || after != before, "{name} is there before the image, killed at {nth}");
            assert!(is_new || was_killed, "{name} is missing");
        }
        before = after;
        if !was_killed {
            break;
        }
        kills += 1;
    }
    assert!(kills >= 4, "killed {kills} times");
}

/// Runs a command as on NFS, which has no files without names: a filter of system calls (seccomp(2)) says so of `O_TMPFILE`.
const AS_ON_NFS: &str = r#"
import ctypes, os, platform, struct, sys
number = {"x86_64": 257, "aarch64": 56}[platform.machine()]
# struct seccomp_data: the number at 0, the low half of the third argument at 32. LD, JEQ, JSET, RET of classic BPF.
code = [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 32), (0x45, 0, 1, 0o20000000),
        (0x06, 0, 0, 0x00050000 | 95), (0x06, 0, 0, 0x7fff0000)]
code = b"".join(struct.pack("HBBI", *one) for one in code)
buffer = ctypes.create_string_buffer(code)
program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execvp(sys.argv[1], sys.argv[1:])
"#;

#[test]
fn without_nameless_files_a_signal_leaves_nothing_and_a_kill_what_the_next_run_removes() {
    let work = tempfile::tempdir().unwrap();
    let (tree, output) = (work.path().join("tree"), work.path().join("output"));
    fs::create_dir(&tree).unwrap();
    fs::create_dir(&output).unwrap();
    fs::write(tree.join("file"), noise(3_000_000, 1)).unwrap();
    let (image, key) = (output.join("image.moor"), output.join("image.key"));
    let args = ["pack", tree.to_str().unwrap(), "-o", image.to_str().unwrap(), "--key-file", key.to_str().unwrap()];
    let on_nfs = ["python3", "-c", AS_ON_NFS];
    // When the key is written out.
    assert!(ended_at(&on_nfs, "fsync", 1, (Signal::SIGKILL, "KILL"), &args));
    let left = names(&output);
    assert!(left.len() == 1 && left[0].starts_with(".image.key."), "{left:?}");
    // When both are there: the fourth lock.
    assert!(ended_at(&on_nfs, "flock", 4, (Signal::SIGKILL, "KILL"), &args));
    let left = names(&output);
    assert!(left.len() == 2 && left.iter().all(|name| name.starts_with(".image.")), "{left:?}");
    // Only a run that comes as far as the image itself removes what is left of one, and a signal may end it before.
    for name in left {
        fs::remove_file(output.join(name)).unwrap();
    }

    for name in ["TERM", "INT", "HUP"] {
        let signal: Signal = format!("SIG{name}").parse().unwrap();
        for (call, nth) in [("fsync", 1), ("flock", 4)] {
            assert!(ended_at(&on_nfs, call, nth, (signal, name), &args), "{name} at {call}");
            assert_eq!(names(&output), Vec::<String>::new(), "{name} at {call}");
        }
    }
    assert!(ended_at(&on_nfs, "flock", 4, (Signal::SIGKILL, "KILL"), &args));
    assert_eq!(names(&output).len(), 2);
    tool(Command::new(on_nfs[0]).args(&on_nfs[1..]).arg(env!("CARGO_BIN_EXE_imgutil")).args(args));
    assert_eq!(names(&output), ["image.key", "image.moor"]);

    // The next generation has another name, and so would nobody come by who removes it.
    let next = output.join("next.moor");
    let key = work.path().join("next.key");
    let args = ["pack", tree.to_str().unwrap(), "-o", next.to_str().unwrap(), "--key-file", key.to_str().unwrap()];
    assert!(ended_at(&on_nfs, "flock", 4, (Signal::SIGKILL, "KILL"), &args));
    let left = names(&output);
    assert!(left.len() == 3 && left[0].starts_with(".next.moor."), "{left:?}");
    let prune = |more: &[&str]| run([&["prune", output.to_str().unwrap()], more].concat()).good().stdout;
    let said = prune(&["--dry-run"]);
    assert!(said.contains("would remove 1 file that killed runs have left, "), "{said}");
    assert_eq!(names(&output), left);
    // Not while somebody is making it.
    let held = fs::File::open(output.join(&left[0])).unwrap();
    held.lock().unwrap();
    prune(&[]);
    assert_eq!(names(&output), left);
    held.unlock().unwrap();
    let said: serde_json::Value = serde_json::from_str(&prune(&["--json"])).unwrap();
    assert_eq!(said["left_over"], serde_json::json!([output.join(&left[0])]));
    assert_eq!(names(&output), ["image.key", "image.moor"]);
}

/// Between an image and its signatures, where a program that knows nothing of signals would end.
#[test]
fn a_signal_does_not_part_an_image_that_is_pruned_from_its_signatures() {
    let work = tempfile::tempdir().unwrap();
    let (tree, images) = (work.path().join("tree"), work.path().join("images"));
    fs::create_dir(&tree).unwrap();
    for (name, signal) in [("TERM", Signal::SIGTERM), ("INT", Signal::SIGINT)] {
        fs::create_dir(&images).unwrap();
        for serial in ["1", "2", "3"] {
            let lineage = "0d8b1d5e-5a3f-4a3d-9d6c-0a4f0c6a1b2c";
            pack(&tree, &images, serial, &["--lineage", lineage, "--serial", serial, "--name", "web", "--plain"]);
            fs::write(images.join(format!("{serial}.moor.sig")), "signatures").unwrap();
        }
        let output = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=unlink,unlinkat"])
            .args(["-e", &format!("inject=unlink,unlinkat:signal={name}:when=1")])
            .args([env!("CARGO_BIN_EXE_imgutil"), "prune", images.to_str().unwrap(), "--keep", "1"])
            .output()
            .unwrap();
        let said = format!("interrupted by {signal}: 1 of 2 images were removed, each with its signatures");
        finish(&output).one_line_error(1, &[&said]);
        assert_eq!(names(&images), ["2.moor", "2.moor.sig", "3.moor", "3.moor.sig"]);
        run(["prune", images.to_str().unwrap(), "--keep", "1"]).good();
        assert_eq!(names(&images), ["3.moor", "3.moor.sig"]);
        fs::remove_dir_all(&images).unwrap();
    }
}

#[test]
fn what_a_killed_unpack_left_is_removed_by_the_next_one() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir_all(tree.join("directory")).unwrap();
    for index in 0..20_u64 {
        fs::write(tree.join(format!("directory/file-{index}")), noise(50_000, index)).unwrap();
    }
    std::os::unix::fs::chown(&tree, Some(1000), Some(1000)).unwrap();
    let files = pack(&tree, work.path(), "image", &[]);
    let output = work.path().join("output");
    fs::create_dir(&output).unwrap();
    let to = output.join("unpacked");
    let args =
        ["unpack", files.image.to_str().unwrap(), to.to_str().unwrap(), "--key-file", files.key.to_str().unwrap()];
    // In the middle of the files, and when the root has its attributes already.
    for (calls, nth) in [("fchown", 10), ("renameat2", 1)] {
        assert!(killed_at(calls, nth, &args));
        assert_eq!(names(&output), [".unpacked.imgutil-unpack"], "{calls}");
        // Whoever the tree's root belongs to: nobody else gets in before all is in its place.
        let staging = output.join(".unpacked.imgutil-unpack").metadata().unwrap();
        assert_eq!((staging.mode() & 0o7777, staging.uid()), (0o700, 0), "{calls}");
        // Another name is not its business.
        let other = output.join("other");
        run(["unpack", args[1], other.to_str().unwrap(), "--key-file", args[4]]).good();
        assert_eq!(names(&output), [".unpacked.imgutil-unpack", "other"]);
        run(args).good();
        assert_eq!(names(&output), ["other", "unpacked"]);
        assert_same("source", &snapshot(&tree), "unpacked", &snapshot(&to));
        fs::remove_dir_all(&to).unwrap();
        fs::remove_dir_all(&other).unwrap();
    }
}

#[test]
fn two_unpacks_to_one_name_do_not_meet() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let files = pack(&tree, work.path(), "image", &[]);
    let staging = work.path().join(".to.imgutil-unpack");
    fs::create_dir(&staging).unwrap();
    fs::write(staging.join("of-the-other"), "").unwrap();
    let held = fs::File::open(&staging).unwrap();
    held.lock().unwrap();
    let to = work.path().join("to");
    let args =
        ["unpack", files.image.to_str().unwrap(), to.to_str().unwrap(), "--key-file", files.key.to_str().unwrap()];
    run(args).one_line_error(1, &["another imgutil unpacks to", "/to'"]);
    assert!(Path::exists(&staging.join("of-the-other")));
    // Closing is not enough: what another test starts at this moment holds the file too, until it executes its program.
    held.unlock().unwrap();
    run(args).good();
    assert!(to.is_dir() && !staging.exists());
}
