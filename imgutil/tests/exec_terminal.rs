//! `imgutil exec` on a terminal: its own terminal in the image, job control, window size, and the user's settings restored.
#![allow(clippy::unwrap_used)]

mod build_tree;

use build_tree::{minimal_tree, mounts, own_debian, processes, processes_in, text, tied};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// A user at a terminal who has started `imgutil exec`.
struct User {
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
    terminal: OwnedFd,
    child: Child,
}

impl User {
    fn start(tree: &Path, command: &[&str]) -> Self {
        Self::start_with(&[], tree, command, None)
    }

    /// `stderr` may be elsewhere, as after `2>file`.
    fn start_with(options: &[&str], tree: &Path, command: &[&str], stderr: Option<Stdio>) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).unwrap();
        tcsetwinsize(&terminal, Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let stream = || Stdio::from(terminal.try_clone().unwrap());
        // setsid makes the terminal the controlling one, as a login does.
        let mut program = tied("setsid");
        program.args(["--ctty", "--wait", env!("CARGO_BIN_EXE_imgutil"), "exec"]).args(options).arg(tree);
        if !command.is_empty() {
            program.arg("--").args(command);
        }
        let child = program
            .env("TERM", "vt100")
            .stdin(stream())
            .stdout(stream())
            .stderr(stderr.unwrap_or_else(stream))
            .spawn()
            .unwrap();
        let mut output = File::from(master.try_clone().unwrap());
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { keyboard: File::from(master), screen, seen: String::new(), terminal, child }
    }

    fn types(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until `expected` has appeared since the last call.
    fn sees(&mut self, expected: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.seen.contains(expected) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&text(&bytes)),
                Err(error) => panic!("waited for {expected:?}, saw {:?}: {error}", self.seen),
            }
        }
        let end = self.seen.find(expected).unwrap() + expected.len();
        self.seen.drain(..end);
    }

    fn status(mut self) -> Option<i32> {
        build_tree::wait_until("the end of the command", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap().code()
    }

    fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.terminal).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }
}

#[test]
fn the_command_has_a_terminal_of_the_image() {
    let tree = minimal_tree();
    let script = "tty; stty size; echo $TERM; test -c /dev/console && echo console; test -t 2 && echo error too";
    let mut user = User::start(&tree, &["sh", "-c", script]);
    user.sees("/dev/pts/0\r\n33 101\r\nvt100\r\nconsole\r\nerror too\r\n");
    assert_eq!(user.status(), Some(0));
}

#[test]
fn the_status_comes_back_and_the_terminal_is_as_before() {
    let tree = minimal_tree();
    for (command, status) in [
        (&["sh", "-c", "echo ready; exit 9"][..], 9),
        (&["sh", "-c", "echo ready; kill -KILL $$"], 137),
        (&["no-such-command"], 127),
    ] {
        let mut user = User::start(&tree, command);
        if status != 127 {
            user.sees("ready");
        }
        build_tree::wait_until("the end of the command", || user.child.try_wait().unwrap().is_some());
        assert_eq!(user.child.wait().unwrap().code(), Some(status), "{command:?}");
        assert!(user.is_cooked(), "{command:?}");
    }
}

#[test]
fn the_prompt_names_the_image_and_jobs_can_be_stopped() {
    let tree = minimal_tree();
    let mut user = User::start(&tree, &[]);
    user.sees("(image minimal)");
    assert!(!user.is_cooked(), "keys go to the image as they are");
    user.types("sleep 1234\n");
    user.sees("sleep 1234");
    std::thread::sleep(Duration::from_millis(300));
    user.types("\x1a");
    user.sees("Stopped");
    user.types("fg\n");
    user.sees("sleep 1234");
    std::thread::sleep(Duration::from_millis(300));
    user.types("\x03");
    user.sees("#");
    user.types("echo status $?\n");
    user.sees("status 130");
    user.types("exit 5\n");
    assert_eq!(user.status(), Some(5));
    assert_eq!(mounts(&tree), Vec::<String>::new());
}

#[test]
fn packages_install_with_somebody_watching() {
    let (_scratch, tree) = own_debian();
    let mut user =
        User::start(&tree, &["sh", "-c", "apt-get -q update && apt-get install --no-install-recommends hello"]);
    user.sees("Setting up hello");
    assert_eq!(user.status(), Some(0));
    assert!(tree.join("usr/bin/hello").exists() && !tree.join("usr/sbin/policy-rc.d").exists());
    assert_eq!((processes_in(&tree), mounts(&tree)), (Vec::new(), Vec::new()));
}

#[test]
fn nothing_is_left_when_imgutil_is_killed_at_a_terminal() {
    let tree = minimal_tree();
    let mut user = User::start(&tree, &["sh", "-c", "setsid sleep 91826 & echo ready; sleep 91826"]);
    user.sees("ready");
    assert_ne!(processes("91826"), Vec::<u32>::new());
    let imgutil = i32::try_from(imgutil_of(&user.child)).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(imgutil), nix::sys::signal::Signal::SIGKILL).unwrap();
    user.child.wait().unwrap();
    build_tree::wait_until("the end of all processes", || processes("91826").is_empty());
    build_tree::wait_until("the end of all mounts", || mounts(&tree).is_empty());
}

#[test]
fn control_c_goes_to_the_command_not_to_imgutil() {
    let tree = minimal_tree();
    let mut user =
        User::start(&tree, &["sh", "-c", "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 1; done"]);
    user.sees("ready");
    user.types("\x03");
    user.sees("caught");
    assert_eq!(user.status(), Some(3));
}

#[test]
fn a_new_window_size_arrives() {
    let tree = minimal_tree();
    let mut user = User::start(
        &tree,
        &["bash", "-c", "trap 'stty size' WINCH; echo ready; until read -rsn1 -t 0.1; do :; done; exit 4"],
    );
    user.sees("ready");
    tcsetwinsize(&user.terminal, Winsize { ws_row: 50, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    user.sees("50 132");
    user.types("q");
    assert_eq!(user.status(), Some(4));
}

#[test]
fn standard_error_may_go_elsewhere() {
    let tree = minimal_tree();
    let file = tempfile::NamedTempFile::new().unwrap();
    let stderr = Stdio::from(file.reopen().unwrap());
    let mut user =
        User::start_with(&[], &tree, &["sh", "-c", "echo to the screen; echo to the file >&2"], Some(stderr));
    user.sees("to the screen");
    assert_eq!(user.status(), Some(0));
    assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "to the file\n");
}

#[test]
fn a_trial_asks_what_becomes_of_its_changes() {
    let (_scratch, tree) = build_tree::own_tree();
    for (answer, kept) in [("n\n", false), ("\n", false), ("maybe\ny\n", true)] {
        let mut user =
            User::start_with(&["--try"], &tree, &["sh", "-c", "echo x >/new; test -t 0 && echo terminal"], None);
        user.sees("terminal\r\n");
        user.sees("+ 0644 /new (2 bytes)\r\n");
        user.sees("Keep these changes? [y/N] ");
        assert!(user.is_cooked(), "the answer is typed as at any prompt");
        user.types(answer);
        user.sees(if kept { "the changes are kept" } else { "the changes are dropped" });
        assert_eq!(user.status(), Some(0));
        assert_eq!(tree.join("new").exists(), kept, "{answer:?}");
    }
    // Nothing changed, nothing asked.
    let mut user = User::start_with(&["--try"], &tree, &["true"], None);
    user.sees("0 added, 0 changed, 0 removed");
    assert_eq!(user.status(), Some(0));
}

#[test]
fn much_output_arrives_whole_and_a_closed_window_ends_the_command() {
    let tree = minimal_tree();
    let mut user = User::start(&tree, &["sh", "-c", "seq 1 20000; echo the end"]);
    user.sees("19999\r\n20000\r\nthe end");
    assert_eq!(user.status(), Some(0));

    let mut user = User::start(&tree, &["sh", "-c", "echo ready; exec sleep 91825"]);
    user.sees("ready");
    let User { keyboard, screen, terminal, mut child, .. } = user;
    // The reader thread still holds the host end: the hang-up is what the kernel sends to the session.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(imgutil_of(&child)).unwrap()),
        nix::sys::signal::Signal::SIGHUP,
    )
    .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(129));
    drop((keyboard, screen, terminal));
    assert_eq!(processes("91825"), Vec::<u32>::new());
}

/// The process behind `setsid --wait`: itself, or its child if it had to fork.
fn imgutil_of(child: &Child) -> u32 {
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let name = std::fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap();
    if name.trim() == "imgutil" { child.id() } else { children.split_whitespace().next().unwrap().parse().unwrap() }
}
