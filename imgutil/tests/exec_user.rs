//! `imgutil exec` as an ordinary user: root of a tree of his own, and of nothing else.
//!
//! The user and his subordinate ids exist only in a mount namespace of each test, whose /etc/passwd, /etc/subuid and
//! /etc/subgid are its own: the host's are not touched.
#![allow(clippy::unwrap_used)]

mod build_tree;

use build_tree::{listing, mounts, own_tree, processes, text, tied, wait_until};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const UID: u32 = 61_234;
const FIRST: u32 = 2_000_000_000;

/// An ordinary user with a tree.
struct User {
    scratch: tempfile::TempDir,
    tree: PathBuf,
}

impl User {
    /// A user whose tree belongs to him (root's files) and to his subordinate ids (all others).
    fn new() -> Self {
        let (scratch, tree) = own_tree();
        let user = Self { scratch, tree };
        let open = Command::new("chmod").arg("755").arg(user.scratch.path()).status().unwrap();
        assert!(open.success());
        // The directory is his, as a home would be.
        std::os::unix::fs::chown(user.scratch.path(), Some(UID), Some(UID)).unwrap();
        for entry in walk(&user.tree) {
            let stat = entry.symlink_metadata().unwrap();
            let shifted = |id: u32, own: u32| if id == 0 { own } else { FIRST + id - 1 };
            std::os::unix::fs::lchown(&entry, Some(shifted(stat.uid(), UID)), Some(shifted(stat.gid(), UID))).unwrap();
        }
        // chown takes setuid bits away; nothing here depends on them.
        let file = |name: &str, content: String| std::fs::write(user.scratch.path().join(name), content).unwrap();
        file("passwd", format!("root:x:0:0::/root:/bin/sh\nann:x:{UID}:{UID}::/nonexistent:/bin/sh\n"));
        file("subuid", format!("ann:{FIRST}:65536\n"));
        file("subgid", format!("ann:{FIRST}:65536\n"));
        // Where an ordinary user may read it: the target directory may be below /root.
        let program = user.scratch.path().join("imgutil");
        std::fs::copy(env!("CARGO_BIN_EXE_imgutil"), program).unwrap();
        user
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// `imgutil` as this user, with `before` run as root in the namespace first.
    fn imgutil(&self, before: &str) -> Command {
        self.command(before, "/mnt/imgutil \"$@\"")
    }

    /// A shell command as this user, after others as root.
    fn command(&self, before: &str, line: &str) -> Command {
        let scratch = self.scratch.path().display();
        let script = format!(
            "set -e; for name in passwd subuid subgid; do mount --bind '{scratch}'/$name /etc/$name; done; \
             mount --bind '{scratch}' /mnt; {before}\n\
             exec setpriv --reuid={UID} --regid={UID} --clear-groups --pdeathsig KILL -- {line}"
        );
        let mut command = tied("unshare");
        command.args(["-m", "sh", "-c", &script, "sh"]).stdin(Stdio::null()).env_remove("HOME");
        command
    }

    fn exec(&self, options: &[&str], script: &str) -> Output {
        let mut command = self.imgutil("");
        command.arg("exec").args(options).args(["/mnt/image", "--", "sh", "-c", script]).output().unwrap()
    }

    fn shell(&self, script: &str) -> String {
        let output = self.exec(&[], script);
        assert!(output.status.success(), "{script}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }
}

fn walk(path: &Path) -> Vec<PathBuf> {
    let mut found = vec![path.to_owned()];
    if path.symlink_metadata().unwrap().is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            found.extend(walk(&entry.unwrap().path()));
        }
    }
    found
}

#[test]
fn a_user_is_root_of_his_own_tree() {
    let user = User::new();
    std::fs::remove_file(user.tree.join("etc/resolv.conf")).unwrap();
    let before = listing(&user.tree);
    let seen = user.shell(
        "id -u; id -G; cat /etc/resolv.conf >/dev/null && echo resolver; readlink /proc/self; hostname; \
         echo x >/dev/null; head -c2 /dev/zero >/dev/full 2>/dev/null || echo full; ls /dev /run; ls -d /sys/class/net/lo",
    );
    assert_eq!(
        seen,
        "0\n0\nresolver\n6\nimage\nfull\n/dev:\nfd\nfull\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\n\
         zero\n\n/run:\nlock\n/sys/class/net/lo\n"
    );
    assert_eq!(listing(&user.tree), before, "the tree is as it was");

    // Other users of the image are the user's subordinate ids on the host.
    user.shell("echo x >/new; chown 33:34 /new; chmod 4755 /new");
    let stat = user.tree.join("new").metadata().unwrap();
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (FIRST + 32, FIRST + 33, 0o4755));
    assert_eq!(user.exec(&[], "exit 7").status.code(), Some(7));
    assert_eq!(user.exec(&[], "kill -TERM $$").status.code(), Some(143));
    assert_eq!(user.exec(&["--net", "none"], "[ \"$(ls /sys/class/net)\" = lo ]").status.code(), Some(0));
    assert_eq!(mounts(&user.tree), Vec::<String>::new());
}

#[test]
fn a_user_at_a_terminal_has_a_terminal_of_the_image() {
    let user = User::new();
    let before = listing(&user.tree);
    // `script` is the terminal's program, as this user: what it starts has that as its controlling terminal.
    std::fs::write(
        user.file("session"),
        "readlink /proc/self/fd/0; test -c /dev/console && echo console; test -t 1 && test -t 2 && echo output; exit 7\n",
    )
    .unwrap();
    let line = "script -qec '/mnt/imgutil exec -v /mnt:/binds /mnt/image -- sh /binds/session' /dev/null";
    let mut session = user.command("", line);
    session.env("SHELL", "/bin/sh").env("TERM", "vt100").stdin(Stdio::piped());
    let mut session = session.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Nobody types, and the keyboard stays: its end would be typed as a character.
    let keyboard = session.stdin.take();
    let output = session.wait_with_output().unwrap();
    drop(keyboard);
    let shown = text(&output.stdout);
    let lines: Vec<&str> = shown.lines().map(str::trim_end).collect();
    assert_eq!(lines, ["/dev/pts/0", "console", "output"], "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((listing(&user.tree), mounts(&user.tree)), (before, Vec::new()));
}

#[test]
fn a_user_does_not_get_out() {
    let user = User::new();
    let secret = user.file("secret");
    std::fs::write(&secret, "secret").unwrap();
    std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let shared = user.file("shared");
    std::fs::create_dir(&shared).unwrap();
    std::os::unix::fs::chown(&shared, Some(UID), Some(UID)).unwrap();
    assert!(Command::new("mknod").arg(user.tree.join("disk")).args(["c", "1", "5"]).status().unwrap().success());
    let attempts = "
        for try in 'cat /binds/secret' 'echo x >/binds/shared/x' 'touch /binds/shared/x' 'mount -o remount,rw,bind /binds' \
            'umount /binds' 'head -c1 /disk' 'mknod /null2 c 1 3' 'chmod 600 /dev/null' 'mount -t tmpfs none /mnt' \
            'hostname changed' 'echo x >/proc/sys/kernel/hostname' 'touch /sys/x' 'ls -d /sys/fs/cgroup/*' \
            'nsenter -t 1 -m true' 'chroot /proc/1/root mount -t tmpfs none /mnt' 'test -e /dev/kmsg' 'kill -0 \"$HOST\"' \
            'head -c1 /binds/null-device' 'unshare -Urm sh -c \"umount /binds\"' \
            'unshare -Urm sh -c \"mount -o remount,bind,rw /binds && touch /binds/shared/x\"'; do
            sh -c \"$try\" >/dev/null 2>&1 && echo \"could: $try\"
        done
        exit 0";
    assert!(Command::new("mknod").arg(user.file("null-device")).args(["c", "1", "3"]).status().unwrap().success());
    let attempts = attempts.replace("$HOST", &std::process::id().to_string());
    let output = user.exec(&["-v", "/mnt:/binds"], &attempts);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "");
    assert!(!shared.join("x").exists());

    // What is given is given: a writable bind, with the user's own rights.
    let output = user.exec(&["-v", "/mnt/shared:/shared:rw"], "echo from the image >/shared/file");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(shared.join("file").metadata().unwrap().uid(), UID);
}

#[test]
fn a_user_can_try_and_keep_what_his_images_users_have_changed() {
    let user = User::new();
    let before = listing(&user.tree);
    // Files that only the image's other users may read or replace.
    let script = "mkdir /own; echo secret >/own/file; chmod 600 /own/file; chown -R 33:33 /own; chmod 700 /own; rm /etc/group; \
                  echo more >>/etc/passwd";
    let output = user.exec(&["--try"], script);
    let shown = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{shown}");
    for line in ["+ 0700 /own/", "+ 0600 /own/file (7 bytes)", "- 0644 /etc/group (", "~ 0644 /etc/passwd ("] {
        assert!(shown.contains(line), "{line:?} is missing in: {shown}");
    }
    assert_eq!(listing(&user.tree), before);

    let output = user.exec(&["--try", "--keep"], script);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let stat = user.tree.join("own/file").metadata().unwrap();
    assert_eq!((stat.uid(), stat.mode() & 0o7777), (FIRST + 32, 0o600));
    assert!(!user.tree.join("etc/group").exists());
    assert!(std::fs::read_to_string(user.tree.join("etc/passwd")).unwrap().ends_with("more\n"));
    assert_eq!(user.shell("cat /own/file"), "secret\n");
    let attributes = Command::new("getfattr").args(["-R", "-d", "-m", "-"]).arg(&user.tree).output().unwrap();
    assert!(!text(&attributes.stdout).contains("overlay"), "{}", text(&attributes.stdout));
    assert!(!user.file(".image.imgutil-try").exists());
}

#[test]
fn nothing_is_left_when_imgutil_is_killed() {
    let user = User::new();
    std::fs::remove_file(user.tree.join("etc/resolv.conf")).unwrap();
    let before = listing(&user.tree);
    let mut command = user.imgutil("");
    command.args(["exec", "/mnt/image", "--", "sh", "-c", "setsid sleep 91834 & echo ready; sleep 91834"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_ne!(processes("91834"), Vec::<u32>::new());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the end of all processes", || processes("91834").is_empty());
    wait_until("the removal of the mount points", || listing(&user.tree) == before);
    assert_eq!(mounts(&user.tree), Vec::<String>::new());
}

#[test]
fn what_is_missing_is_named_with_the_command_that_mends_it() {
    let user = User::new();
    for (before, words) in [
        ("echo eve:100:1 >/etc/subuid", "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 ann"),
        (
            "echo eve:5:900000 >/etc/subgid",
            "'ann' has no subordinate gids in /etc/subgid, which the users of an image need: \
          sudo usermod --add-subuids 900005-965540",
        ),
        ("echo root:x:0:0::/:/bin/sh >/etc/passwd", "uid 61234 has no entry in /etc/passwd"),
        (
            "mount --bind /dev/null /usr/bin/newuidmap",
            "'newuidmap' is not installed, which gives an ordinary user the ids of an image: sudo apt-get install uidmap",
        ),
        ("chown 5 /mnt/image", "belongs to uid 5, whom 'ann' cannot stand for: use sudo"),
    ] {
        let output = user.imgutil(before).args(["exec", "/mnt/image", "--", "true"]).output().unwrap();
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{before}: {message}");
        assert!(message.contains(words), "{before}: {message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        std::fs::write(user.file("subuid"), format!("ann:{FIRST}:65536\n")).unwrap();
        std::fs::write(user.file("subgid"), format!("ann:{FIRST}:65536\n")).unwrap();
        std::fs::write(
            user.file("passwd"),
            format!("root:x:0:0::/root:/bin/sh\nann:x:{UID}:{UID}::/nonexistent:/bin/sh\n"),
        )
        .unwrap();
    }
    let few = user
        .imgutil(&format!("chown {UID} /mnt/image; echo ann:{FIRST}:1000 >/etc/subuid"))
        .args(["exec", "/mnt/image", "--", "true"])
        .output()
        .unwrap();
    assert_eq!(
        text(&few.stderr),
        "imgutil: warning: there are only 1001 ids for the image's users: packages that use ids above \
         will fail to install\n"
    );
}
