//! The program itself: what it refuses, and scripts in a root of their own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking; its helpers too")]

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output};

fn agent(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moor-agent")).args(arguments).output().unwrap()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_running_system_is_not_booted_over() {
    let output = agent(&["boot", "--root", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(1));
    let said = errors(&output);
    assert!(said.starts_with("moor-agent: error: 'moor-agent boot' runs in an initramfs only"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn the_table_of_states_is_printed() {
    let output = agent(&["states"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("| State |"));
}

/// A root with a shell, its libraries, and the directories of a system.
fn root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for directory in ["bin", "dev", "proc", "sys", "run", "etc"] {
        std::fs::create_dir(root.path().join(directory)).unwrap();
    }
    let copy = |path: &str| {
        let target = root.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(path, target).unwrap();
    };
    copy("/bin/sh");
    let libraries = Command::new("ldd").arg("/bin/sh").output().unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    libraries.split_whitespace().filter(|word| word.starts_with('/')).for_each(copy);
    root
}

fn script(root: &Path, text: &str) {
    let path = root.join("script");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
}

fn run_in(root: &Path, text: &str) -> Output {
    script(root, text);
    agent(&["run-script", "--root", root.to_str().unwrap(), "/script"])
}

#[test]
fn a_script_sees_its_root_and_the_kernel_and_leaves_nothing_mounted() {
    let root = root();
    let output = run_in(
        root.path(),
        "[ -e /proc/self/status ] && [ -c /dev/null ] && [ -d /sys/kernel ] && [ ! -e /usr ] && umask && pwd && : >/etc/written",
    );
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "0022\n/\n");
    assert!(root.path().join("etc/written").is_file());
    assert_eq!(std::fs::read_dir(root.path().join("proc")).unwrap().count(), 0, "something is still mounted");
}

#[test]
fn its_status_is_passed_on_and_what_does_not_start_is_said() {
    let root = root();
    assert_eq!(run_in(root.path(), "exit 41").status.code(), Some(41));
    let output = agent(&["run-script", "--root", root.path().to_str().unwrap(), "/none"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).starts_with("moor-agent: error: executing '/none': No such file"), "{}", errors(&output));
}

/// An image with a link where a directory belongs must not have the kernel's file systems put elsewhere.
#[test]
fn nothing_is_mounted_through_a_link() {
    let (root, outside) = (root(), tempfile::tempdir().unwrap());
    std::fs::remove_dir(root.path().join("proc")).unwrap();
    symlink(outside.path(), root.path().join("proc")).unwrap();
    let output = run_in(root.path(), "[ ! -e /proc/self ] && [ -c /dev/null ]");
    assert!(output.status.success(), "{}", errors(&output));
}
