//! `imgutil exec --try`: the tree stays as it was until its changes are kept, and is then what it would have become without.
#![allow(clippy::unwrap_used)]

mod build_tree;
mod common;

use build_tree::{imgutil, listing, mounts, own_debian, own_tree, text, wait_until};
use common::snapshot::{Snapshot, assert_same, snapshot};
use serde_json::Value;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn attempt(options: &[&str], tree: &Path, script: &str) -> Output {
    imgutil().args(["exec", "--try"]).args(options).arg(tree).args(["--", "sh", "-ec", script]).output().unwrap()
}

fn layer(tree: &Path) -> PathBuf {
    tree.with_file_name(format!(".{}.imgutil-try", tree.file_name().unwrap().to_str().unwrap()))
}

/// Removes what two runs of the same commands cannot have in common.
fn without_times(mut snapshot: Snapshot) -> Snapshot {
    for object in snapshot.values_mut() {
        object.mtime = 0;
    }
    snapshot
}

/// A tree with something of each kind that can be changed or go away.
fn prepare(tree: &Path) {
    let script = "cd \"$1\"
        mkdir -p etc/conf.d/deep old/inside keep/sub links swap
        for name in a b c d; do echo $name >etc/conf.d/$name; done
        echo deep >etc/conf.d/deep/file; echo x >old/inside/x; echo y >old/y; ln -s y old/link
        echo one >links/one; ln links/one links/two; ln links/one keep/three; echo solo >links/solo
        echo s >swap/was-file; mkdir swap/was-dir; echo in >swap/was-dir/in
        echo e >etc/conf.d/e; echo m >keep/marked
        setfattr -n user.mark -v before etc/conf.d/e; setfattr -n user.mark -v after keep/marked
        setfattr -n user.mark -v before etc/conf.d/a; mknod keep/pipe p; echo dated >keep/dated";
    assert!(Command::new("sh").args(["-ec", script, "sh"]).arg(tree).status().unwrap().success());
}

/// Every kind of change, with programs that the small tree has.
const CHANGES: &str = "
    cd /etc/conf.d; cp --attributes-only --preserve=xattr /keep/marked e; echo more >>a; chmod 600 b; chown 5:6 c; rm d; touch -d @1000000000 /keep/dated
    rm -r /old; mkdir /old; echo fresh >/old/fresh
    rm -r deep; mkdir -p /new/dir/below; echo n >/new/dir/below/n; chmod 4711 /new/dir/below/n; chmod 1777 /new
    ln /new/dir/below/n /new/hard; ln -s /nowhere /new/soft
    echo changed >>/links/one; rm /keep/pipe
    rm /swap/was-file; mkdir /swap/was-file; echo i >/swap/was-file/i
    rm -r /swap/was-dir; echo f >/swap/was-dir
    mv /keep/sub /keep/renamed";

#[test]
fn without_a_terminal_changes_are_shown_and_dropped() {
    let (_scratch, tree) = own_tree();
    prepare(&tree);
    let before = listing(&tree);
    let output = attempt(&[], &tree, &format!("{CHANGES}\necho out"));
    let shown = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "out\n".to_owned()), "{shown}");
    assert_eq!(listing(&tree), before);
    assert!(!layer(&tree).exists());
    for line in [
        "~ 0644 /etc/conf.d/a (2 -> 7 bytes, time)",
        "~ 0600 /etc/conf.d/b (mode 0644 -> 0600)",
        "~ 0644 /etc/conf.d/c (owner 0:0 -> 5:6)",
        "~ 0644 /etc/conf.d/e (attributes)",
        "- 0644 /etc/conf.d/d (2 bytes)",
        "- 0755 /etc/conf.d/deep/ (1 entries, 5 bytes)",
        "~ 0644 /keep/dated (time)",
        "- 0644 /keep/pipe (fifo)",
        "- 0755 /keep/sub/ (0 entries, 0 bytes)",
        "+ 0755 /keep/renamed/",
        "~ 0644 /keep/three (4 -> 12 bytes, time)",
        "~ 0644 /links/one (4 -> 12 bytes, time)",
        "~ 0644 /links/two (4 -> 12 bytes, time)",
        "+ 4711 /new/dir/below/n (2 bytes)",
        "+ 0777 /new/soft (symlink)",
        "+ 0644 /old/fresh (6 bytes)",
        "- 0755 /old/inside/ (1 entries, 2 bytes)",
        "- 0777 /old/link (symlink)",
        "~ 0644 /swap/was-dir (directory -> file)",
        "~ 0755 /swap/was-file (file -> directory)",
        "imgutil: the changes are dropped",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line:?} is missing in:\n{shown}");
    }
    assert!(!shown.contains("/links/solo") && !shown.contains("/dev") && !shown.contains("policy-rc.d"), "{shown}");
    assert_eq!(mounts(&tree), Vec::<String>::new());

    let nothing = attempt(&[], &tree, "cat /etc/passwd >/dev/null");
    assert_eq!(text(&nothing.stderr), "imgutil: 0 added, 0 changed, 0 removed\n");
}

#[test]
fn kept_changes_make_the_tree_that_the_command_would_have_made() {
    let (_one, kept) = own_tree();
    let (_two, plain) = own_tree();
    for tree in [&kept, &plain] {
        prepare(tree);
    }
    let output = attempt(&["--keep"], &kept, CHANGES);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let output = build_tree::exec(&plain, &["sh", "-ec", CHANGES]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let snapshots = [&kept, &plain].map(|tree| without_times(snapshot(tree)));
    assert_same("kept", &snapshots[0], "without a trial", &snapshots[1]);
    assert!(!layer(&kept).exists());
    let dated = kept.join("keep/dated").metadata().unwrap().modified().unwrap();
    assert_eq!(dated.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(), 1_000_000_000);
}

#[test]
fn a_command_that_fails_is_not_kept() {
    let (_scratch, tree) = own_tree();
    let before = listing(&tree);
    for (script, status) in [("touch /x; exit 3", 3), ("touch /x; kill -TERM $$", 143)] {
        let output = attempt(&["--keep"], &tree, script);
        assert_eq!(output.status.code(), Some(status));
        assert!(text(&output.stderr).contains("+ 0644 /x (0 bytes)\n"), "{}", text(&output.stderr));
        assert!(text(&output.stderr).ends_with("imgutil: the changes are dropped\n"));
        assert_eq!(listing(&tree), before);
    }
    let output = imgutil().args(["exec", "--try", "--keep"]).arg(&tree).args(["--", "no-such"]).output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert_eq!((listing(&tree), layer(&tree).exists()), (before, false));
}

#[test]
fn json_is_a_document_of_its_own() {
    let (_scratch, tree) = own_tree();
    prepare(&tree);
    let output =
        attempt(&["--json", "--drop"], &tree, "echo noise; echo more >>/etc/conf.d/a; rm /links/solo; mkdir /n");
    assert_eq!(text(&output.stderr), "noise\n");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        document,
        serde_json::json!({
            "changes": [
                { "path": "/etc/conf.d/a", "change": "changed", "what": ["content", "time"],
                  "before": { "type": "file", "mode": "0644", "uid": 0, "gid": 0, "size": 2 },
                  "after": { "type": "file", "mode": "0644", "uid": 0, "gid": 0, "size": 7 } },
                { "path": "/links/solo", "change": "removed", "after": null,
                  "before": { "type": "file", "mode": "0644", "uid": 0, "gid": 0, "size": 5 } },
                { "path": "/n", "change": "added", "before": null,
                  "after": { "type": "directory", "mode": "0755", "uid": 0, "gid": 0, "size": 0 } },
            ],
            "added": 1, "changed": 1, "removed": 1, "kept": false,
        })
    );
}

#[test]
fn a_trial_that_is_killed_leaves_a_tree_that_was_not_touched() {
    let (_scratch, tree) = own_tree();
    let before = listing(&tree);
    let mut child = imgutil()
        .args(["exec", "--try"])
        .arg(&tree)
        .args(["--", "sh", "-c", "touch /x; echo ready; sleep 91837"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    let busy = attempt(&["--drop"], &tree, "true");
    assert!(text(&busy.stderr).contains("is in use by another imgutil, and a trial wants it alone"));
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the end of the command", || build_tree::processes("91837").is_empty());
    assert_eq!(listing(&tree), before);
    assert!(layer(&tree).exists(), "nobody was there to remove it");
    wait_until("the next trial", || attempt(&["--drop"], &tree, "test ! -e /x").status.success());
    assert!(!layer(&tree).exists());
}

/// Keeping is a list of renames: ended after any of them, the next run comes to the same end.
#[test]
fn keeping_that_was_ended_in_the_middle_is_finished() {
    let (_one, whole) = own_tree();
    prepare(&whole);
    assert!(attempt(&["--keep"], &whole, CHANGES).status.success());
    let expected = without_times(snapshot(&whole));
    let mut ended = 0;
    for step in (1..60).step_by(3) {
        let (_two, tree) = own_tree();
        prepare(&tree);
        // strace makes the nth rename of imgutil, after the one that writes the journal, kill it.
        let output = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=renameat,unlinkat"])
            .arg(format!("--inject=renameat:signal=KILL:when={step}"))
            .arg(env!("CARGO_BIN_EXE_imgutil"))
            .args(["exec", "--try", "--keep"])
            .arg(&tree)
            .args(["--", "sh", "-ec", CHANGES])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        if output.status.success() {
            break;
        }
        if layer(&tree).join("keeping").exists() {
            ended += 1;
            let next = imgutil().arg("exec").arg(&tree).args(["--", "true"]).output().unwrap();
            assert_eq!(
                text(&next.stderr),
                "imgutil: warning: a trial was ended while it kept its changes: that is finished now\n"
            );
            assert_same("finished", &without_times(snapshot(&tree)), "kept at once", &expected);
            assert!(!layer(&tree).exists());
        }
    }
    assert!(ended > 3, "{ended} runs were ended while they kept changes");
}

#[test]
fn packages_can_be_tried() {
    let (_scratch, tree) = own_debian();
    let before = listing(&tree);
    let script = "apt-get -q update && apt-get -q install -y --no-install-recommends hello";
    let output = attempt(&["--drop"], &tree, script);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stderr).contains("+ 0755 /usr/bin/hello ("), "{}", text(&output.stderr));
    assert_eq!(listing(&tree), before);
    let output = attempt(&["--keep"], &tree, script);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(build_tree::shell(&tree, "hello; dpkg --audit"), "Hello, world!\n");
}
