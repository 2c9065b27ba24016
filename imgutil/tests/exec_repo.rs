//! `imgutil exec --repo`: a repository that the image's package manager uses without set-up, and of which nothing stays.
#![allow(clippy::unwrap_used)]

mod build_tree;

use build_tree::{imgutil, listing, own_debian, own_tree, scratch, text};
use std::path::Path;
use std::process::{Command, Output};

fn exec_with(options: &[&str], tree: &Path, script: &str) -> Output {
    imgutil().arg("exec").args(options).arg(tree).args(["--", "sh", "-ec", script]).output().unwrap()
}

/// A package without anything but a file.
fn deb(directory: &Path, name: &str) {
    let root = scratch();
    let root = root.path().join("root");
    std::fs::create_dir_all(root.join("DEBIAN")).unwrap();
    std::fs::create_dir_all(root.join("usr/share/own")).unwrap();
    std::fs::write(root.join("usr/share/own").join(name), "own\n").unwrap();
    let control = format!(
        "Package: {name}\nVersion: 1.5\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: own\n"
    );
    std::fs::write(root.join("DEBIAN/control"), control).unwrap();
    let built = Command::new("dpkg-deb").args(["--root-owner-group", "-b"]).arg(&root).arg(directory).output().unwrap();
    assert!(built.status.success(), "{}", text(&built.stderr));
}

/// Only the given sources: no network is needed.
const UPDATE: &str =
    "for file in /etc/apt/sources.list.d/*; do case $file in */imgutil-*) ;; *) >$file;; esac; done; apt-get -q update";

#[test]
fn a_directory_of_packages_is_a_repository() {
    let (_scratch, tree) = own_debian();
    let packages = scratch();
    deb(packages.path(), "own-package");
    let directory = packages.path().to_str().unwrap();
    let script = format!(
        "{UPDATE}; apt-get -q install -y own-package; cat /usr/share/own/own-package; apt-cache policy own-package"
    );
    let output = exec_with(&["--repo", directory, "--net", "none", "--try", "--keep"], &tree, &script);
    let printed = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{printed}");
    assert!(printed.contains("\nown\n") && printed.contains("Installed: 1.5"), "{printed}");
    assert!(!printed.contains("imgutil-0.sources"), "what is shown for the time of a command is no change: {printed}");
    assert!(!tree.join("etc/apt/sources.list.d/imgutil-0.sources").exists());

    // Without the option it is unknown, and nothing of it is left.
    let before = listing(&tree);
    let output = exec_with(&[], &tree, "ls /run; ls /etc/apt/sources.list.d");
    assert!(!text(&output.stdout).contains("imgutil"), "{}", text(&output.stdout));
    assert_eq!(listing(&tree), before);
}

#[test]
fn a_source_file_brings_its_keys_and_must_have_some() {
    let (_scratch, tree) = own_debian();
    let work = scratch();
    let file = |name: &str, content: &str| {
        let path = work.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let key = file("own.asc", "the key\n");
    let sources = file(
        "own.sources",
        &format!("Types: deb\nURIs: http://localhost/x\nSuites: s\nComponents: c\nSigned-By: {key}\n"),
    );
    let list = file("own.list", &format!("deb [signed-by={key}] http://localhost/x s c\n"));
    let script = "cat /etc/apt/sources.list.d/imgutil-0.sources | grep Signed-By; cat /run/imgutil/key-*; grep -o 'signed-by=[^]]*' \
        /etc/apt/sources.list.d/imgutil-1.list";
    let output = exec_with(&["--repo", &sources, "--repo", &list], &tree, script);
    assert_eq!(
        text(&output.stdout),
        "Signed-By: /run/imgutil/key-0-0.asc\nthe key\nthe key\nsigned-by=/run/imgutil/key-1-0.asc\n",
        "{}",
        text(&output.stderr)
    );

    let unsigned = file("unsigned.list", "deb http://localhost/x s c\n");
    let gone = file("gone.list", "deb [signed-by=/no/such.asc] http://localhost/x s c\n");
    let other = file("own.repo", "[x]\nbaseurl=http://localhost/x\ngpgcheck=0\n");
    for (repository, reason) in [
        (unsigned.as_str(), "names no key for a repository: add 'Signed-By:'"),
        (&gone, "the key '/no/such.asc' that"),
        (&other, "is for dnf or zypper, which this image does not have ('etc/yum.repos.d' is missing in it)"),
        ("/etc/hostname", "'/etc/hostname' is no repository: give a directory"),
        ("/no/such", "cannot read the repository '/no/such'"),
    ] {
        let output = exec_with(&["--repo", repository], &tree, "true");
        assert_ne!(output.status.code(), Some(0));
        assert!(text(&output.stderr).contains(reason), "{}", text(&output.stderr));
    }
}

#[test]
fn rpms_are_shown_to_the_manager_that_the_image_has() {
    for (place, other) in [("etc/yum.repos.d", "etc/zypp"), ("etc/zypp/repos.d", "none")] {
        let (_scratch, tree) = own_tree();
        std::fs::create_dir_all(tree.join(place)).unwrap();
        let work = scratch();
        std::fs::create_dir(work.path().join("repodata")).unwrap();
        std::fs::write(work.path().join("repodata/repomd.xml"), "<repomd/>\n").unwrap();
        let script = format!(
            "test ! -e /{other}; cat /{place}/imgutil-0.repo; cat /run/imgutil/repository-0/repodata/repomd.xml"
        );
        let output = exec_with(&["--repo", work.path().to_str().unwrap()], &tree, &script);
        let printed = text(&output.stdout);
        assert!(printed.contains("baseurl=file:///run/imgutil/repository-0\n"), "{printed}{}", text(&output.stderr));
        assert!(printed.ends_with("<repomd/>\n"), "{printed}");
        assert_eq!(std::fs::read_dir(tree.join(place)).unwrap().count(), 0);
    }
}
