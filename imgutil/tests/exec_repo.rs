//! `imgutil exec --repo`: a repository that the image's package manager uses without set-up, and of which nothing stays.
#![allow(clippy::unwrap_used)]

mod build_tree;
mod rpm_repo;

use build_tree::{imgutil, listing, own_debian, own_rpm, own_tree, scratch, text};
use rpm_repo::{Key, Package, build as build_packages, index, signed};
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

/// dnf and zypper as Debian packs them: how each takes what it is shown is its own.
#[test]
#[ignore = "a tree with both takes minutes: `make test-full` runs it"]
fn dnf_and_zypper_install_from_what_they_are_shown() {
    const PACKAGES: [Package; 2] = [
        Package::empty("base"),
        Package {
            header: "Requires: base",
            files: &[("/usr/share/hello", "hello\n", "0644,root,root")],
            ..Package::empty("hello")
        },
    ];
    let work = scratch();
    let path = |name: &str| work.path().join(name).display().to_string();
    build_packages(&work.path().join("unsigned"), &PACKAGES);
    index(&work.path().join("unsigned"));
    let (key, other) = (Key::new(), Key::new());
    signed(&work.path().join("signed"), &PACKAGES, &key);
    key.export(&work.path().join("key.asc"));
    other.export(&work.path().join("other.asc"));
    for name in ["key", "other"] {
        let source = format!(
            "[own]\nname=own\nbaseurl=file://{}\nenabled=1\ngpgcheck=1\nrepo_gpgcheck=0\ngpgkey=file://{}\n",
            path("signed"),
            path(&format!("{name}.asc"))
        );
        std::fs::write(work.path().join(format!("{name}.repo")), source).unwrap();
    }

    let (_scratch, tree) = own_rpm();
    // Debian's RPM has its database in the home directory, where libzypp does not look.
    std::fs::write(tree.join("root/.rpmmacros"), "%_dbpath /var/lib/rpm\n").unwrap();
    // Debian's zypper comes without the place of its repositories; an image of SUSE has it.
    std::fs::create_dir_all(tree.join("etc/zypp/repos.d")).unwrap();
    let before = listing(&tree);
    let alone = ["--net", "none", "--try", "--drop"];
    let look = "rpm -q --qf '%{NAME} ' base hello; cat /usr/share/hello";
    // A directory is trusted as whoever names it trusts it.
    let zypper = "zypper --non-interactive install hello";
    let output =
        exec_with(&[&["--repo", &path("unsigned")], &alone[..]].concat(), &tree, &format!("{zypper} >&2; {look}"));
    assert!(text(&output.stdout).starts_with("base hello hello\n"), "{}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(listing(&tree), before, "something is left");

    // The other package manager's place comes first where both have one.
    std::fs::remove_dir_all(tree.join("etc/zypp")).unwrap();
    std::fs::create_dir_all(tree.join("etc/yum.repos.d")).unwrap();
    let before = listing(&tree);
    let dnf = "dnf -y --releasever=1 install hello";
    let script = format!("{dnf} >&2; {look}");
    let output = exec_with(&[&["--repo", &path("unsigned")], &alone[..]].concat(), &tree, &script);
    assert!(text(&output.stdout).starts_with("base hello hello\n"), "{}{}", text(&output.stdout), text(&output.stderr));
    // A source file comes with its key, and is held to it.
    let bound = path("signed");
    for (name, good) in [("key", true), ("other", false)] {
        let repository = path(&format!("{name}.repo"));
        let options = [&["--repo", &repository, "-v", &bound], &alone[..]].concat();
        let output = exec_with(&options, &tree, &script);
        let (said, why) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(
            (said.starts_with("base hello hello\n"), output.status.success()),
            (good, good),
            "{name}: {said}{why}"
        );
        assert!(good || why.contains("GPG"), "{why}");
    }
    assert_eq!(listing(&tree), before, "something is left");
}
