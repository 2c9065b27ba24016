//! `imgutil exec` in a tree of another architecture: a program of a few hand-assembled instructions stands for all of it, run by
//! the real qemu, registered in a user namespace of the command's own.
#![allow(clippy::unwrap_used)]

mod build_tree;

use build_tree::{imgutil, listing, scratch, shell, text, tied};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// A static ELF program (elf(5)) for 64-bit Arm: writes a line, and leaves with the number of its arguments.
fn program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let message = b"hello from aarch64\n";
    // Arm ARM, A64: ldr x19,[sp]; mov x0,#1; adr x1,message; mov x2,#length; mov x8,#64 (write); svc #0;
    // mov x0,x19; mov x8,#93 (exit); svc #0
    let code: [u32; 9] = [
        0xf940_03f3,
        0xd280_0020,
        // adr: 7 instructions forward to what follows the code.
        0x1000_0001 | 7 << 5,
        0xd280_0002 | u32::try_from(message.len()).unwrap() << 5,
        0xd280_0808,
        0xd400_0001,
        0xaa13_03e0,
        0xd280_0ba8,
        0xd400_0001,
    ];
    let size = HEADERS + 4 * code.len() as u64 + message.len() as u64;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |out: &mut Vec<u8>, value: u16| out.extend(value.to_le_bytes());
    let word = |out: &mut Vec<u8>, value: u32| out.extend(value.to_le_bytes());
    let long = |out: &mut Vec<u8>, value: u64| out.extend(value.to_le_bytes());
    half(&mut out, 2); // executable
    half(&mut out, 183); // AArch64
    word(&mut out, 1);
    long(&mut out, BASE + HEADERS); // entry
    long(&mut out, 64); // program headers
    long(&mut out, 0);
    word(&mut out, 0);
    for value in [64, 56, 1, 0, 0, 0] {
        half(&mut out, value);
    }
    word(&mut out, 1); // load
    word(&mut out, 5); // readable, executable
    for value in [0, BASE, BASE, size, size, 0x1000] {
        long(&mut out, value);
    }
    for instruction in code {
        word(&mut out, instruction);
    }
    out.extend_from_slice(message);
    out
}

/// A tree with that program as its shell.
fn arm_tree() -> (tempfile::TempDir, PathBuf) {
    let scratch = scratch();
    let tree = scratch.path().join("arm");
    for directory in ["bin", "dev", "proc", "run", "sys"] {
        std::fs::create_dir_all(tree.join(directory)).unwrap();
    }
    let path = tree.join("bin/sh");
    std::fs::write(&path, program()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    (scratch, tree)
}

/// What the host has registered.
fn registered() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/sys/fs/binfmt_misc").into_iter().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

#[test]
fn programs_of_another_architecture_run_and_the_host_is_not_touched() {
    let (_scratch, tree) = arm_tree();
    let before = (registered(), listing(&tree));
    let output = imgutil().arg("exec").arg(&tree).args(["--", "sh", "one", "two"]).output().unwrap();
    assert_eq!(text(&output.stdout), "hello from aarch64\n", "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(3));
    assert_eq!((registered(), listing(&tree)), before);
    // Also with its changes in a layer.
    let output = imgutil().args(["exec", "--try"]).arg(&tree).args(["--", "/bin/sh"]).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), "hello from aarch64\n".to_owned()));
}

/// Starts `imgutil` in a mount namespace in which `before` was done.
fn exec_after(before: &str, tree: &Path) -> std::process::Output {
    let script = format!("{before}; exec \"$0\" exec \"$1\" -- sh");
    let mut command = tied("unshare");
    command.args(["-m", "sh", "-ec", &script, env!("CARGO_BIN_EXE_imgutil")]).arg(tree).stdin(Stdio::null());
    command.output().unwrap()
}

#[test]
fn a_missing_emulator_is_named_with_the_command_that_brings_it() {
    let (_scratch, tree) = arm_tree();
    let output = exec_after("mount --bind /dev/null /usr/bin/qemu-aarch64-static", &tree);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        message.contains(
            "this machine is amd64 and cannot run programs for arm64 without an emulator: sudo apt-get install qemu-user-static"
        ),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1, "{message}");

    // A dynamic emulator would be looked for in the image with all its libraries.
    let output = exec_after("mount --bind /usr/bin/env /usr/bin/qemu-aarch64-static", &tree);
    assert!(text(&output.stderr).contains("without an emulator"), "{}", text(&output.stderr));
}

#[test]
fn build_asks_the_same_before_it_fetches_anything() {
    let scratch = scratch();
    // Also of a container image, which is not even looked for.
    for more in ["--minimal", "--from oci:. -p hello"] {
        let script =
            format!("mount --bind /dev/null /usr/bin/qemu-aarch64-static; exec \"$0\" build --arch arm64 {more} tree");
        let mut command = tied("unshare");
        command.args(["-m", "sh", "-ec", &script, env!("CARGO_BIN_EXE_imgutil")]).current_dir(scratch.path());
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(text(&output.stderr).contains("cannot run programs for arm64"), "{more}: {}", text(&output.stderr));
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "{more}");
    }
}

/// The agent of this machine in an image for another would be found out by the first node.
#[test]
fn node_files_of_another_architecture_are_refused() {
    let scratch = scratch();
    let files = scratch.path().join("files");
    std::fs::create_dir_all(files.join("usr/bin")).unwrap();
    std::fs::copy("/bin/true", files.join("usr/bin/moor-agent")).unwrap();
    let mut build = imgutil();
    build.args(["build", "--no-cache", "--arch", "arm64", "--node-files", "files", "tree"]);
    let output = build.current_dir(scratch.path()).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let reason = "usr/bin/moor-agent' is a program for amd64, and the image for arm64: name a directory";
    assert!(said.starts_with("imgutil: error: build 'tree': ") && said.contains(reason), "{said}");
    assert_eq!(build_tree::names(scratch.path()), ["files"]);
}

/// All of Debian for another processor: its packages' scripts, what a recipe runs, and what is run afterwards.
#[test]
#[ignore = "emulated, a build takes minutes: `make test-full` runs it"]
fn a_tree_of_another_architecture_is_built_and_used() {
    let scratch = scratch();
    let recipe = "arch = \"arm64\"\nbase = \"minimal\"\npackages = [\"hello\", { name = \"no-such\", arch = \"amd64\" }]\n\
                  run = [\"hello > /etc/hello; uname -m >> /etc/hello\"]\n[[user]]\nname = \"op\"\nuid = 1234\n";
    std::fs::write(scratch.path().join("recipe.toml"), recipe).unwrap();
    let before = registered();
    let mut build = imgutil();
    build.args(["build", "--no-cache", "-f", "recipe.toml", "tree"]).current_dir(scratch.path());
    let built = build.output().unwrap();
    assert!(built.status.success(), "{}", text(&built.stderr));
    assert!(text(&built.stdout).contains("debian-12 arm64"), "{}", text(&built.stdout));
    let tree = scratch.path().join("tree");
    assert_eq!(std::fs::read_to_string(tree.join("etc/hello")).unwrap(), "Hello, world!\naarch64\n");
    let script = "uname -m; dpkg --print-architecture; id -u op; dpkg --audit; hello";
    assert_eq!(shell(&tree, script), "aarch64\narm64\n1234\nHello, world!\n");
    let lock = std::fs::read_to_string(scratch.path().join("recipe.lock")).unwrap();
    assert!(lock.contains("arch = \"arm64\"") && !lock.contains("arch = \"amd64\""), "{lock}");
    assert_eq!(registered(), before);
}
