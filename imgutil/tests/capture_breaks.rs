//! Captures that are broken off, on one side or the other: nothing gets its final name, and nothing is left on the node.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::node::Node;
use moor_vm::process::wait_for;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Stdio};
use std::time::Duration;

/// Takes many seconds at the highest level.
const PLANT: &str = "head -c 60000000 /dev/urandom > home/op/large; mkdir -p root; echo x > root/file";

fn until(what: &str, limit: u64, mut ready: impl FnMut() -> bool) {
    wait_for::<moor_vm::VmError>(what, Duration::from_secs(limit), || Ok(ready())).unwrap();
}

fn signal(process: i32, signal: Signal) {
    kill(Pid::from_raw(process), signal).unwrap();
}

/// A capture whose node is in the midst of sending its files.
fn begun(node: &Node) -> (Child, i32) {
    let mut command = node.capture(&node.target(), &["--level", "22"]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let sends = |(id, line): &(i32, String)| {
        line.starts_with("tar ")
            && std::fs::read_link(format!("/proc/{id}/cwd")).is_ok_and(|path| path.ends_with("home"))
    };
    until("the node's tar", 60, || node.sessions().iter().any(sends));
    let id = i32::try_from(child.id()).unwrap();
    (child, id)
}

fn nothing_is_left(node: &Node) {
    until("the end of the node's sessions", 20, || node.sessions().is_empty());
    until("the end of what is here", 20, || node.left_here().is_empty());
}

#[test]
fn a_builder_that_is_killed_leaves_nothing_on_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), dir.path(), PLANT);
    for ended_by in [Signal::SIGKILL, Signal::SIGINT, Signal::SIGTERM] {
        let (mut child, id) = begun(&node);
        // The key and the image have no names before the end.
        assert!(node.left_here().iter().all(|left| left.starts_with("ssh ") || left.starts_with("imgutil-capture-")));
        signal(id, ended_by);
        assert_eq!(child.wait().unwrap().signal(), Some(ended_by as i32));
        nothing_is_left(&node);
    }
}

#[test]
fn a_node_that_dies_or_falls_silent_ends_the_capture_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), dir.path(), PLANT);
    // Killed, its connections end; stopped, they stay open and nobody answers.
    let ends = ["closed by remote host", "Broken pipe", "Connection reset"];
    for (fault, reasons) in [(Signal::SIGKILL, &ends[..]), (Signal::SIGSTOP, &["not responding"])] {
        let (mut child, _) = begun(&node);
        let hit: Vec<i32> = node.sessions().into_iter().map(|(id, _)| id).collect();
        for process in &hit {
            signal(*process, fault);
        }
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
        let error = said.lines().find(|line| line.starts_with("imgutil: error: ")).unwrap_or_default();
        assert!(error.contains("cannot capture 'node': '/home': ssh failed: "), "{said}");
        assert!(reasons.iter().any(|reason| error.contains(reason)), "{said}");
        assert_eq!(node.left_here(), Vec::<String>::new());
        if fault == Signal::SIGSTOP {
            for process in &hit {
                signal(*process, Signal::SIGCONT);
            }
        }
        nothing_is_left(&node);
    }
}
