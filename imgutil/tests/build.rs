//! `imgutil build` with real archives: what a recipe makes, and what each mistake, signal and kill leaves behind.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;

use build_tree::{exec, imgutil, mounts, processes, scratch, shell, text, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Output, Stdio};

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn build(work: &Path, args: &[&str]) -> Output {
    imgutil().arg("build").args(args).current_dir(work).output().unwrap()
}

/// The last line, which must be the only error.
fn error(output: &Output, status: i32) -> String {
    let printed = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{printed}");
    let errors: Vec<&str> = printed.lines().filter(|line| line.starts_with("imgutil: error: ")).collect();
    assert_eq!(errors.len(), 1, "{printed}");
    assert_eq!(printed.lines().last(), Some(errors[0]), "{printed}");
    errors[0].to_owned()
}

#[test]
fn a_recipe_becomes_a_tree() {
    let work = scratch();
    std::fs::write(work.path().join("banner"), "welcome\n").unwrap();
    let recipe = r#"
        os = "debian-12"
        base = "minimal"
        packages = ["hello"]
        locale = "C.UTF-8"
        run = ["echo ran > /etc/ran", "test \"$(cat /etc/secret)\" = x"]
        [[file]]
        path = "/etc/issue"
        source = "banner"
        [[file]]
        path = "/etc/secret"
        content = "x\n"
        mode = "0600"
        [[user]]
        name = "op"
        uid = 1234
        groups = ["adm"]
    "#;
    std::fs::write(work.path().join("recipe.toml"), recipe).unwrap();
    let output = build(work.path(), &["-f", "recipe.toml", "tree"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("debian-12 amd64, kernel none"), "{}", text(&output.stdout));
    // A log has its lines from the start.
    assert!(text(&output.stderr).starts_with("imgutil: fetching the lists of packages\n"), "{}", text(&output.stderr));
    let tree = work.path().join("tree");
    assert_eq!(names(work.path()), ["banner", "recipe.toml", "tree"]);
    assert_eq!(tree.metadata().unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(std::fs::read_to_string(tree.join("etc/issue")).unwrap(), "welcome\n");
    assert_eq!(std::fs::read_to_string(tree.join("etc/ran")).unwrap(), "ran\n");
    assert_eq!(std::fs::read_to_string(tree.join("etc/default/locale")).unwrap(), "LANG=C.UTF-8\n");
    assert_eq!(tree.join("etc/secret").metadata().unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(shell(&tree, "hello; id -u op; id -Gn op"), "Hello, world!\n1234\nop adm\n");
    assert_eq!(tree.join("home/op").metadata().unwrap().uid(), 1234);
    // Nothing of one machine or of the build.
    assert_eq!(std::fs::read(tree.join("etc/machine-id")).unwrap(), b"");
    for gone in ["etc/hostname", "var/log/dpkg.log", "etc/apt/sources.list", "usr/sbin/policy-rc.d"] {
        assert!(!tree.join(gone).exists(), "{gone}");
    }
    assert_eq!(names(&tree.join("var/lib/apt/lists")), ["partial"]);
    let sources = std::fs::read_to_string(tree.join("etc/apt/sources.list.d/image.sources")).unwrap();
    assert!(sources.contains("bookworm-security") && sources.matches("Signed-By: ").count() == 2, "{sources}");
    // What was built can be built upon.
    assert_eq!(exec(&tree, &["dpkg", "--audit"]).stdout, b"");
    assert_eq!(mounts(&tree), Vec::<String>::new());

    let again = build(work.path(), &["-f", "recipe.toml", "tree"]);
    assert!(error(&again, 1).contains("tree' exists: build makes a new tree"), "{}", text(&again.stderr));
}

#[test]
fn mistakes_are_answered_in_one_line_and_leave_nothing() {
    let work = scratch();
    let write = |name: &str, recipe: &str| std::fs::write(work.path().join(name), recipe).unwrap();
    write("unknown.toml", "base = \"minimal\"\npackages = [\"vimm\", \"no-such-package\"]\n");
    write("typo.toml", "os = \"debian-12\"\npackges = []\n");
    write(
        "key.toml",
        "base = \"minimal\"\n[[repository]]\nuri = \"http://127.0.0.1/x\"\nsuites = [\"a\"]\nkey = \"none.asc\"\n",
    );
    let before = names(work.path());
    let cases: [(&[&str], &[&str]); 9] = [
        (
            &["-f", "unknown.toml", "tree"],
            &["build 'tree': unknown package 'vimm'", "vim", "nor 'no-such-package'", "correct the name"],
        ),
        (&["-f", "typo.toml", "tree"], &["recipe 'typo.toml', line 2: unknown field `packges`"]),
        (&["-f", "none.toml", "tree"], &["cannot read the recipe 'none.toml'", "No such file"]),
        (
            &["-f", "key.toml", "tree"],
            &["none.asc' that signs 'http://127.0.0.1/x' is missing", "check the recipe's 'key'"],
        ),
        (&["--os", "debian-1", "tree"], &["unknown operating system 'debian-1': known are debian-12"]),
        (
            &["--arch", "vax", "--minimal", "tree"],
            &["debian-12 is not known for architecture 'vax': known are amd64, arm64"],
        ),
        (&["--node-files", "none", "tree"], &["cannot read the node's files in 'none'", "--minimal"]),
        (
            &["--minimal", "--mirror", "http://127.0.0.1:9/debian", "tree"],
            &["cannot fetch http://127.0.0.1:9/debian", "check the mirror's address"],
        ),
        (&["--minimal", "no/such/directory/tree"], &["no/such/directory", "No such file or directory"]),
    ];
    for (args, parts) in cases {
        let output = build(work.path(), args);
        let line = error(&output, 1);
        for part in parts {
            assert!(line.contains(part), "{args:?}: '{part}' is not in: {line}");
        }
        assert_eq!(names(work.path()), before, "{args:?}");
    }
}

/// A build that has begun to unpack.
fn begun(work: &Path) -> Child {
    let mut child =
        imgutil().args(["build", "--minimal", "tree"]).current_dir(work).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    while !lines.next().expect("it ended before it began").unwrap().contains("unpacking essential packages") {}
    // Whoever reads the lines goes on to read them.
    std::thread::spawn(move || lines.count());
    child
}

#[test]
fn a_build_that_is_stopped_leaves_nothing_and_one_that_is_killed_is_cleaned_up_by_the_next() {
    let work = scratch();
    let mark = work.path().to_str().unwrap();
    for (signal, status) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let mut child = begun(work.path());
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(status));
        assert_eq!(names(work.path()), Vec::<String>::new(), "{signal}");
        assert_eq!((processes(mark), mounts(work.path())), (Vec::new(), Vec::new()), "{signal}");
    }
    let mut child = begun(work.path());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the end of all processes", || processes(mark).is_empty());
    wait_until("the end of all mounts", || mounts(work.path()).is_empty());
    assert_eq!(names(work.path()), [".tree.imgutil-build"], "hidden, and nothing under the tree's name");
    // The next one removes what is left, and two at once do not meet.
    let mut child = begun(work.path());
    let output = build(work.path(), &["--minimal", "tree"]);
    assert!(error(&output, 1).contains("another build of"), "{}", text(&output.stderr));
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(names(work.path()), Vec::<String>::new());
}
