//! `imgutil exec` from a script: status, streams, signals, packages, and what is left behind (nothing).
#![allow(clippy::unwrap_used)]

mod build_tree;

use build_tree::{
    exec, imgutil, listing, minimal_tree, mounts, own_debian, own_tree, processes, processes_in, scratch, shell, text,
    wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

#[test]
fn the_status_is_the_commands() {
    let tree = minimal_tree();
    for (command, status) in [
        (&["true"][..], 0),
        (&["false"], 1),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "exit 255"], 255),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["sh", "-c", "kill -KILL $$"], 137),
        (&["no-such-command"], 127),
        (&["/etc/passwd"], 126),
        (&["/etc"], 126),
        (&["/usr/bin/id"], 0),
    ] {
        let output = exec(&tree, command);
        assert_eq!(output.status.code(), Some(status), "{command:?}: {}", text(&output.stderr));
    }
    let unknown = text(&exec(&tree, &["no-such-command"]).stderr);
    assert_eq!(unknown, "imgutil: error: there is no command 'no-such-command' in the image\n");
}

#[test]
fn trees_that_are_none_are_refused_in_one_line() {
    let scratch = scratch();
    let file = scratch.path().join("file");
    std::fs::write(&file, "").unwrap();
    for (tree, reason) in [
        (Path::new("/no/such/tree"), "No such file or directory"),
        (file.as_path(), "not a directory"),
        (Path::new("/"), "'/' is the running system, not an image tree"),
    ] {
        let output = exec(tree, &["true"]);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.starts_with("imgutil: error: ") && message.contains(reason), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
    let empty = scratch.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let output = exec(&empty, &["true"]);
    assert_eq!(output.status.code(), Some(127));
    assert_eq!(std::fs::read_dir(&empty).unwrap().count(), 0, "mount points that were made are removed");
}

#[test]
fn streams_pass_through_a_pipe_unchanged() {
    let tree = minimal_tree();
    let mut child = imgutil()
        .arg("exec")
        .arg(&tree)
        .args(["--", "sh", "-c", "cat; echo problem >&2"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || stdin.write_all(&sent).unwrap()
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    assert!(output.stdout == sent, "3 MB came back changed");
    assert_eq!(text(&output.stderr), "problem\n");
}

/// Starts a script in the tree and waits for its first line.
fn start(tree: &Path, script: &str) -> Child {
    let mut child =
        imgutil().arg("exec").arg(tree).args(["--", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"ready\n");
    child
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

#[test]
fn signals_reach_the_command_and_its_children() {
    let tree = minimal_tree();
    for (signal, trap, status) in [
        (Signal::SIGTERM, "TERM", 41),
        (Signal::SIGINT, "INT", 42),
        (Signal::SIGHUP, "HUP", 43),
        (Signal::SIGUSR1, "USR1", 44),
    ] {
        // `sleep` is a child: the shell's trap runs only if the signal ends the sleep too.
        let script = format!("trap 'exit {status}' {trap}; echo ready; sleep 1000; sleep 1000");
        let mut child = start(&tree, &script);
        // A shell that is between two commands when the signal comes may first start the next one: so more than once.
        wait_until("the end of the command", || {
            send(&child, signal);
            std::thread::sleep(std::time::Duration::from_millis(100));
            child.try_wait().unwrap().is_some()
        });
        assert_eq!(child.wait().unwrap().code(), Some(status), "{signal}");
    }
    let mut child = start(&tree, "echo ready; exec sleep 1000");
    send(&child, Signal::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

/// Whenever it comes: before anything is set up, while the command is about to start, and when it runs.
#[test]
fn a_signal_is_never_lost() {
    let tree = minimal_tree();
    for step in 0..120 {
        let mut child = imgutil().arg("exec").arg(&tree).args(["--", "sleep", "1000"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_micros(step * 500));
        send(&child, Signal::SIGTERM);
        wait_until(&format!("the end after {} us", step * 500), || child.try_wait().unwrap().is_some());
        let status = child.wait().unwrap();
        assert!(status.code() == Some(143) || status.signal() == Some(15), "{status} after {} us", step * 500);
    }
}

#[test]
fn what_the_command_left_running_ends_with_it() {
    let tree = minimal_tree();
    shell(&tree, "setsid sleep 91823 >/dev/null 2>&1 & sleep 0.2; nohup sleep 91823 >/dev/null 2>&1 & exit 0");
    assert_eq!(processes("91823"), Vec::<u32>::new());
    assert_eq!(mounts(&tree), Vec::<String>::new());
}

/// A test that fails leaves its commands behind, as a test program does that is killed: the kernel ends them.
#[test]
fn commands_end_with_the_test_that_started_them() {
    let tree = minimal_tree();
    std::thread::scope(|scope| {
        scope.spawn(|| drop(start(&tree, "setsid sleep 91827 & echo ready; sleep 91827")));
    });
    wait_until("the end of all processes", || processes("91827").is_empty());
    assert_eq!(mounts(&tree), Vec::<String>::new());
}

#[test]
fn nothing_is_left_when_imgutil_is_killed() {
    let (_scratch, tree) = own_tree();
    std::fs::remove_file(tree.join("etc/resolv.conf")).unwrap();
    let before = listing(&tree);
    for round in 0..5_u64 {
        let mut child = start(&tree, "setsid sleep 91824 & echo ready; sleep 91824");
        assert_ne!(processes("91824"), Vec::<u32>::new());
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until("the end of all processes", || processes("91824").is_empty());
        wait_until("the removal of the mount points", || listing(&tree) == before);
        assert_eq!(mounts(&tree), Vec::<String>::new());

        // Also at any moment of the set-up.
        let mut child = imgutil().arg("exec").arg(&tree).args(["--", "sleep", "91824"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(round * 4));
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until("the end of all processes", || processes("91824").is_empty());
        wait_until("the removal of the mount points", || listing(&tree) == before);
    }
    assert_eq!(shell(&tree, "echo fine"), "fine\n");
}

#[test]
fn the_tree_is_the_same_afterwards() {
    let (_scratch, tree) = own_tree();
    std::fs::remove_file(tree.join("etc/resolv.conf")).unwrap();
    let before = listing(&tree);
    let output = imgutil()
        .args(["exec", "-v", "/usr/share:/new/place", "-v", "/etc/hostname:/etc/new/hostname"])
        .arg(&tree)
        .args(["--", "sh", "-ec", "test -d /new/place/doc; test -f /etc/new/hostname; cat /etc/resolv.conf"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(output.stdout, std::fs::read("/etc/resolv.conf").unwrap());
    let after = listing(&tree);
    assert_eq!(before.symmetric_difference(&after).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn a_file_left_by_a_hard_kill_is_taken_away_by_the_next_run() {
    let (_scratch, tree) = own_tree();
    let stub = tree.join("usr/sbin/policy-rc.d");
    std::fs::write(&stub, "").unwrap();
    std::fs::set_permissions(&stub, std::fs::Permissions::from_mode(0o000)).unwrap();
    shell(&tree, "test -x /usr/sbin/policy-rc.d");
    assert!(!stub.exists());

    std::fs::write(&stub, "#!/bin/sh\nexit 0\n").unwrap();
    assert_eq!(exec(&tree, &["sh", "/usr/sbin/policy-rc.d"]).status.code(), Some(101), "ours covers the image's");
    assert_eq!(std::fs::read_to_string(&stub).unwrap(), "#!/bin/sh\nexit 0\n");
}

#[test]
fn commands_in_one_tree_do_not_disturb_each_other() {
    let (_scratch, tree) = own_tree();
    let mut first = start(&tree, "echo ready; exec sleep 1000");
    let mut second = start(&tree, "echo ready; exec sleep 1000");
    send(&first, Signal::SIGTERM);
    first.wait().unwrap();
    assert_eq!(exec(&tree, &["/usr/sbin/policy-rc.d"]).status.code(), Some(101));
    assert!(tree.join("usr/sbin/policy-rc.d").exists(), "the second command still needs the place");
    send(&second, Signal::SIGTERM);
    second.wait().unwrap();
    assert!(!tree.join("usr/sbin/policy-rc.d").exists());
}

#[test]
fn commands_that_come_and_go_in_one_tree_do_not_refuse_each_other() {
    let (_scratch, tree) = own_tree();
    std::fs::remove_file(tree.join("etc/resolv.conf")).unwrap();
    std::fs::remove_dir(tree.join("sys")).unwrap();
    let before = listing(&tree);
    // All start at once, and find each other's places half made; they end in any order.
    for round in 0..10 {
        let running: Vec<Child> = (0..4)
            .map(|id| {
                let script = format!("sleep 0.0{id}; cat /new/a/b; exit 4");
                let mut command = imgutil();
                command.args(["exec", "-v", "/etc/hostname:/new/a/b"]).arg(&tree).args(["--", "sh", "-c", &script]);
                command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        for child in running {
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(4), "round {round}: {}", text(&output.stderr));
            assert_eq!(output.stdout, std::fs::read("/etc/hostname").unwrap());
        }
        assert_eq!(names(&listing(&tree)), names(&before), "round {round}");
    }
}

#[test]
fn a_place_that_the_command_has_filled_stays() {
    let (_scratch, tree) = own_tree();
    let script = "echo kept >/new/file";
    let output = imgutil()
        .args(["exec", "-v", "/usr/share:/new/place"])
        .arg(&tree)
        .args(["--", "sh", "-c", script])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_to_string(tree.join("new/file")).unwrap(), "kept\n");
    assert_eq!(tree.join("new").metadata().unwrap().mode() & 0o7777, 0o755);
    assert!(!tree.join("new/place").exists());
}

/// The paths of a listing.
fn names(listing: &std::collections::BTreeSet<String>) -> Vec<String> {
    listing.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

#[test]
fn a_tree_that_is_held_for_long_is_said_to_be_in_use() {
    let (_scratch, tree) = own_tree();
    let held = std::fs::File::open(&tree).unwrap();
    held.lock().unwrap();
    let output = exec(&tree, &["true"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("is in use by another imgutil"), "{}", text(&output.stderr));
    // One that is let go of meanwhile is waited for.
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| exec(&tree, &["true"]));
        std::thread::sleep(std::time::Duration::from_millis(500));
        held.unlock().unwrap();
        waiting.join().unwrap()
    });
    assert_eq!(waiting.status.code(), Some(0), "{}", text(&waiting.stderr));
}

fn install(tree: &Path, packages: &str) -> Command {
    let mut command = imgutil();
    let script = format!("apt-get -q install -y --no-install-recommends {packages}");
    command.arg("exec").arg(tree).args(["--", "sh", "-c", &script]);
    command
}

#[test]
fn packages_install_from_a_script_start_no_service_and_a_kill_in_the_middle_leaves_nothing() {
    let (_scratch, tree) = own_debian();
    let host = host_files();
    shell(&tree, "apt-get -q update");
    let output = install(&tree, "hello cron").output().unwrap();
    let printed = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{printed}");
    assert!(printed.contains("policy-rc.d denied execution of start"), "{printed}");
    assert_eq!(shell(&tree, "hello"), "Hello, world!\n");
    assert_eq!(processes("/usr/sbin/cron"), Vec::<u32>::new());
    assert_eq!(install(&tree, "no-such-package").output().unwrap().status.code(), Some(100), "apt-get's own status");
    nothing_left(&tree, &host);

    // SIGKILL to imgutil while dpkg unpacks, and while it sets up.
    for (moment, packages) in [("Unpacking", "tree less"), ("Setting up", "bc rsync")] {
        let mut child = install(&tree, packages).stdout(Stdio::piped()).spawn().unwrap();
        let mut printed = Vec::new();
        let mut output = child.stdout.take().unwrap();
        while !text(&printed).contains(moment) {
            let mut part = [0; 256];
            let length = output.read(&mut part).unwrap();
            assert!(length > 0, "it ended before {moment:?}: {}", text(&printed));
            printed.extend_from_slice(&part[..length]);
        }
        assert_ne!(processes_in(&tree), Vec::<u32>::new());
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until("the end of all processes", || processes_in(&tree).is_empty());
        wait_until("the removal of the mount points", || !tree.join("usr/sbin/policy-rc.d").exists());
        nothing_left(&tree, &host);
        // The tree is as after any power cut: dpkg goes on where it was.
        shell(&tree, "dpkg --configure -a");
        let output = install(&tree, packages).output().unwrap();
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    }
    nothing_left(&tree, &host);
}

/// Files of the host that package scripts write when they are let out.
fn host_files() -> Vec<(String, std::time::SystemTime, u64)> {
    let files = [
        "/etc/passwd",
        "/etc/group",
        "/etc/shadow",
        "/etc/resolv.conf",
        "/etc/hosts",
        "/etc/ld.so.cache",
        "/var/lib/dpkg/status",
    ];
    let seen = files.iter().filter_map(|file| {
        let metadata = std::fs::metadata(file).ok()?;
        Some((String::from(*file), metadata.modified().unwrap(), metadata.ino()))
    });
    seen.collect()
}

fn nothing_left(tree: &Path, host: &[(String, std::time::SystemTime, u64)]) {
    assert_eq!(mounts(tree), Vec::<String>::new());
    assert!(!tree.join("usr/sbin/policy-rc.d").exists());
    assert_eq!(host_files(), host);
}

#[test]
fn it_works_without_standard_streams() {
    let tree = minimal_tree();
    let marker = scratch();
    for closed in ["<&-", "<&- >&-", "<&- >&- 2>&-", ">&- 2>&-"] {
        let bind = format!("{}:/mnt:rw", marker.path().display());
        let script = format!("\"$1\" exec -v \"$2\" \"$3\" -- sh -c 'echo here >/mnt/file; exit 9' {closed}");
        let status = Command::new("sh")
            .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_imgutil"), &bind])
            .arg(&tree)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(9), "{closed}");
        assert_eq!(std::fs::read_to_string(marker.path().join("file")).unwrap(), "here\n", "{closed}");
        std::fs::remove_file(marker.path().join("file")).unwrap();
    }
}
