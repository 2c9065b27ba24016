//! `imgutil build --from IMAGE` with a recipe: a Debian tree as a container image becomes what the recipe says, by its own package
//! manager, and what each mistake is answered with.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;
mod deb_archive;
mod oci_image;
mod rpm_repo;

use build_tree::{
    error, exec, imgutil, mounts, names, processes, rpm_tree, scratch, shell, text, tied, untouched_tree, wait_until,
};
use deb_archive::{archive, signing_key};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oci_image::{Compression, Entry, Layout, file, link, tar};
use rpm_repo::{Key, Package, signed};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// An image, what is said besides, and parts of the answer.
type Case<'a> = (&'a Layout, &'a [&'a str], &'a [&'a str]);

/// An image of the minimal Debian tree and a layer upon it.
fn debian_image(upper: &[Entry]) -> Layout {
    image_of(&untouched_tree(), upper)
}

fn image_of(tree: &Path, upper: &[Entry]) -> Layout {
    let mut command = Command::new("tar");
    command.arg("-C").arg(tree).args(["--format=posix", "--numeric-owner", "-cf", "-", "."]);
    let packed = command.output().unwrap();
    assert!(packed.status.success(), "{}", text(&packed.stderr));
    let mut layout = Layout::new();
    layout.add("latest", "amd64", &[packed.stdout, tar(upper)], Compression::None);
    layout
}

/// An image of one small layer.
fn small_image(entries: &[Entry]) -> Layout {
    let mut layout = Layout::new();
    layout.add("latest", "amd64", &[tar(entries)], Compression::Gzip);
    layout
}

/// Builds `tree` from the image, in `work`.
fn build(work: &Path, image: &Layout, args: &[&str]) -> Output {
    // Where it keeps the log of a failure: beside the work, which tests list.
    let logs = work.with_extension("logs");
    std::fs::create_dir_all(&logs).unwrap();
    let mut command = imgutil();
    command.args(["build", "--from", &format!("oci:{}", image.path().display())]).args(args).arg("tree");
    let output = command.current_dir(work).env("TMPDIR", &logs).output().unwrap();
    std::fs::remove_dir_all(&logs).unwrap();
    output
}

#[test]
fn an_image_becomes_what_the_recipe_says_by_its_own_package_manager() {
    let work = scratch();
    let home = work.path().join("gnupg");
    let key = signing_key(&home);
    archive(&work.path().join("archive"), &home);
    let recipe = format!(
        r#"
        base = "minimal"
        packages = ["hello", "own-hello", "-tzdata", {{ name = "no-such-package", os = "ubuntu" }}]
        locale = "de_DE.UTF-8"
        run = ["echo ran > /etc/ran", "test \"$(cat /etc/motd)\" = image"]
        [[repository]]
        uri = "copy:{}/archive"
        suites = ["./"]
        key = """
{key}"""
        [[file]]
        path = "/etc/secret"
        content = "x\n"
        mode = "0600"
        owner = "op"
        [[file]]
        path = "/root/.netrc"
        content = "meant to be there\n"
        [[file]]
        path = "/opt/up/laid-by-recipe"
        content = "inside\n"
        [[user]]
        name = "op"
        uid = 1234
        ssh-keys = ["ssh-ed25519 AAAA op"]
        "#,
        work.path().display()
    );
    std::fs::write(work.path().join("recipe.toml"), recipe).unwrap();
    let image = debian_image(&[
        file("etc/motd", "image\n"),
        file("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
        file("etc/ssh/ssh_host_ed25519_key", "secret"),
        file("home/dev/.docker/config.json", "{\"auths\": \"token\"}"),
        // Of the tree's own root there is nothing above.
        link("opt/up", "../../../../../../../../../../etc"),
    ]);
    let before = names(work.path());
    let built = build(work.path(), &image, &["-f", "recipe.toml"]);
    assert!(built.status.success(), "{}", text(&built.stderr));
    let said = text(&built.stdout);
    assert!(
        said.contains(": debian-12 amd64, from sha256:") && said.contains("taken out of it: host keys 1"),
        "{said}"
    );
    assert_eq!(names(work.path()), [before, vec!["tree".to_owned()]].concat(), "no lock: it would not be kept to");

    let tree = work.path().join("tree");
    assert_eq!(shell(&tree, "hello; cat /usr/share/own; id -u op"), "Hello, world!\nown\n1234\n");
    let read = |path: &str| std::fs::read_to_string(tree.join(path)).unwrap();
    assert_eq!((read("etc/ran"), read("etc/motd")), ("ran\n".to_owned(), "image\n".to_owned()));
    assert_eq!(read("etc/default/locale"), "LANG=de_DE.UTF-8\n");
    assert!(shell(&tree, "locale -a").lines().any(|made| made == "de_DE.utf8"));
    let secret = tree.join("etc/secret").metadata().unwrap();
    assert_eq!((secret.uid(), secret.permissions().mode() & 0o7777), (1234, 0o600));
    assert_eq!(read("etc/laid-by-recipe"), "inside\n");
    assert!(!Path::new("/etc/laid-by-recipe").exists());
    assert!(read("home/op/.ssh/authorized_keys").starts_with("ssh-ed25519 AAAA"));
    // The image's own repositories stay, and the recipe's is beside them with its key.
    assert!(read("etc/apt/sources.list.d/image.sources").contains("deb.debian.org"));
    let added = read("etc/apt/sources.list.d/recipe.sources");
    assert!(added.contains("Signed-By: /etc/apt/keyrings/recipe-0.asc") && !added.contains("deb.debian"), "{added}");
    // Taken away, and not let in again; nothing of how that was done is left.
    assert!(!tree.join("usr/share/zoneinfo/Europe").exists());
    assert!(!tree.join("etc/apt/preferences.d/imgutil-build").exists());
    // What belongs to one machine or person is gone, what the recipe lays in is not.
    assert_eq!((read("etc/machine-id"), read("root/.netrc")), (String::new(), "meant to be there\n".to_owned()));
    for gone in ["etc/ssh/ssh_host_ed25519_key", "home/dev/.docker/config.json", "var/log/dpkg.log"] {
        assert!(!tree.join(gone).exists(), "{gone}");
    }
    assert!(!tree.join(work.path().strip_prefix("/").unwrap()).exists(), "the archive was merely shown");
    let lists = Command::new("find").arg(tree.join("var/lib/apt/lists")).args(["-type", "f"]).output().unwrap();
    assert_eq!(text(&lists.stdout), "");
    assert_eq!(exec(&tree, &["dpkg", "--audit"]).stdout, b"");
    assert_eq!(mounts(&tree), Vec::<String>::new());
}

#[test]
fn mistakes_are_answered_in_one_line_and_leave_nothing() {
    let work = scratch();
    let other = signing_key(&work.path().join("gnupg2"));
    let home = work.path().join("gnupg");
    let key = signing_key(&home);
    archive(&work.path().join("archive"), &home);
    let write = |name: &str, recipe: &str| std::fs::write(work.path().join(name), recipe).unwrap();
    let repository = |uri: &str, key: &str| {
        format!("base = \"minimal\"\n[[repository]]\nuri = \"{uri}\"\nsuites = [\"./\"]\nkey = \"\"\"\n{key}\"\"\"\n")
    };
    let own = format!("copy:{}/archive", work.path().display());
    write("own.toml", &repository(&own, &key));
    write("other.toml", &repository(&own, &other));
    write("away.toml", &repository("http://127.0.0.1:9/x", &key));
    write("ubuntu.toml", "os = \"ubuntu-24.04\"\nbase = \"minimal\"\n");
    write("link.toml", "base = \"minimal\"\n[[file]]\npath = \"/out/file\"\ncontent = \"x\"\n");
    write("command.toml", "base = \"minimal\"\nrun = [\"exit 3\"]\n");
    // Only the repositories of the recipe.
    let debian = debian_image(&[file("etc/apt/sources.list.d/.wh.image.sources", "")]);
    let example = small_image(&[file("etc/os-release", "ID=example\nVERSION_ID=\"9\"\n")]);
    let bare = small_image(&[file("etc/os-release", "ID=debian\nVERSION_ID=\"12\"\n")]);
    let astray = small_image(&[
        file("etc/os-release", "ID=debian\nVERSION_ID=\"12\"\n"),
        link("out", work.path().to_str().unwrap()),
    ]);
    let silent = small_image(&[file("etc/motd", "x")]);
    let before = names(work.path());
    let cases: [Case<'_>; 11] = [
        (
            &debian,
            &["-f", "own.toml", "-p", "own-helo,none-such"],
            &["build 'tree' from '", "unknown package 'own-helo'", "did you mean own-hello?", "nor 'none-such'"],
        ),
        (&debian, &["-f", "other.toml", "-p", "own-hello"], &["is not signed by its key, so nothing of it was used"]),
        (&debian, &["-f", "away.toml", "-p", "own-hello"], &["cannot fetch http://127.0.0.1:9/x", "check the mirror"]),
        (&debian, &["-f", "ubuntu.toml"], &["the image is of debian-12, the recipe for ubuntu-24.04"]),
        (&debian, &["-f", "command.toml"], &["the command 'exit 3' failed: exit status 3"]),
        (&astray, &["-f", "link.toml"], &["'/out' is a symbolic link that leads to nothing in the tree"]),
        (&example, &["--minimal", "-p", "vim"], &["the image is of 'example-9', of which nothing is known", "--os"]),
        (&silent, &["--minimal", "-p", "vim"], &["the image is of 'unknown'", "leave the recipe out"]),
        (&bare, &["--minimal", "-p", "vim"], &["the image has no apt, which installs the packages of debian-12"]),
        (&bare, &["-p", "vim", "--node-files", "none"], &["cannot read the node's files in 'none'"]),
        (&bare, &["--minimal", "-p", "Vim"], &["'Vim' is no package name"]),
    ];
    for (image, args, parts) in cases {
        let line = error(&build(work.path(), image, args), 1);
        for part in parts {
            assert!(line.contains(part), "{args:?}: '{part}' is not in: {line}");
        }
        assert_eq!(names(work.path()), before, "{args:?}");
    }
    // There is no lock of what an image's own package manager installs.
    let output = build(work.path(), &bare, &["-f", "own.toml", "--locked"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}

#[test]
fn a_build_that_is_stopped_in_the_image_leaves_nothing() {
    let work = scratch();
    let mark = work.path().to_str().unwrap();
    std::fs::write(work.path().join("recipe.toml"), "base = \"minimal\"\nrun = [\"echo; sleep 98765\"]\n").unwrap();
    let image = debian_image(&[]);
    let mut child = imgutil()
        .args(["build", "--from", &format!("oci:{}", image.path().display()), "-f", "recipe.toml", "tree"])
        .current_dir(work.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    while !lines.next().expect("it ended before it began").unwrap().contains("running the recipe's commands") {}
    let last = std::thread::spawn(move || lines.map(Result::unwrap).last());
    wait_until("the command to run", || !processes("sleep\u{0}98765").is_empty());
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let said = last.join().unwrap().unwrap();
    assert!(said.ends_with("interrupted by SIGTERM: nothing is left of it, and the next build begins anew"), "{said}");
    assert_eq!(names(work.path()), ["recipe.toml"]);
    assert_eq!((processes(mark), mounts(work.path())), (Vec::new(), Vec::new()));
}

/// Too small for the layers, and too small for what a command writes.
#[test]
fn a_full_disk_is_one_line_and_nothing_is_left() {
    let outside = scratch();
    let recipe = outside.path().join("recipe.toml");
    std::fs::write(&recipe, "base = \"minimal\"\nrun = [\"head -c 2G /dev/zero >/large\"]\n").unwrap();
    let image = debian_image(&[]);
    // In the second the log may be what finds no room.
    for (size, says) in [("40m", "' is full: make room there, or build elsewhere"), ("300m", "make room there, or ")] {
        let work = scratch();
        // Gone with the namespace, whatever happens.
        let script = format!(
            "mount -t tmpfs -o size={size} none {0} && {1} build --from oci:{2} -f {3} {0}/tree; code=$?; ls -A {0}; exit $code",
            work.path().display(),
            env!("CARGO_BIN_EXE_imgutil"),
            image.path().display(),
            recipe.display()
        );
        let output = tied("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
        let line = error(&output, 1);
        assert!(line.contains(says), "{size}: {line}");
        let unpacked = text(&output.stderr).contains("running the recipe's commands");
        assert_eq!((text(&output.stdout), unpacked), (String::new(), size == "300m"), "nothing is left");
    }
}

/// dnf and zypper in an image, as Debian packs them: the ways of each are its own, the distribution around it is not.
#[test]
#[ignore = "installing both takes minutes: `make test-full` runs it"]
fn dnf_and_zypper_install_in_an_image() {
    const PACKAGES: [Package; 6] = [
        Package { files: &[("/var/lib/base/list", "one\n", "0640,root,root")], ..Package::empty("base") },
        Package {
            header: "Requires: base\nRecommends: weak",
            files: &[("/usr/share/hello", "hello\n", "0644,root,root")],
            ..Package::empty("hello")
        },
        Package::empty("weak"),
        // What of the two it needs is for others to say.
        Package { header: "Requires: editor", ..Package::empty("desk") },
        Package { header: "Provides: editor", ..Package::empty("first") },
        Package { header: "Provides: editor", ..Package::empty("second") },
    ];
    let work = scratch();
    let (key, other) = (Key::new(), Key::new());
    for (name, key) in [("key.asc", &key), ("other.asc", &other)] {
        key.export(&work.path().join(name));
    }
    signed(&work.path().join("repo"), &PACKAGES, &key);
    let image = image_of(
        &rpm_tree(),
        &[
            file("etc/os-release", "ID=own\nVERSION_ID=\"1\"\n"),
            // Debian's RPM has its database in the home directory, where libzypp does not look.
            file("root/.rpmmacros", "%_dbpath /var/lib/rpm\n"),
        ],
    );
    let repository = |key: &str| {
        format!(
            "base = \"minimal\"\n[[repository]]\nuri = \"file://{}/repo\"\nkey = \"{key}\"\n",
            work.path().display()
        )
    };
    std::fs::write(work.path().join("recipe.toml"), repository("key.asc")).unwrap();
    std::fs::write(work.path().join("other.toml"), repository("other.asc")).unwrap();
    for (backend, family) in [("dnf", "el-9"), ("zypper", "suse-15")] {
        let os = format!(
            "name = \"own-1\"\nfamily = \"{family}\"\nrelease = \"1\"\nmirror = \"http://127.0.0.1:9\"\nrepository = []\n\
             services = {{ node = [] }}\n"
        );
        std::fs::write(work.path().join("os.toml"), os).unwrap();
        let before = names(work.path());
        let args = |recipe, packages| ["--os", "./os.toml", "-f", recipe, "-p", packages];
        let line = error(&build(work.path(), &image, &args("recipe.toml", "helo")), 1);
        assert!(line.contains("unknown package 'helo'") && line.contains("did you mean hello?"), "{backend}: {line}");
        let line = error(&build(work.path(), &image, &args("other.toml", "hello")), 1);
        assert!(line.contains("is not signed by its key, so nothing of it was used"), "{backend}: {line}");
        assert_eq!(names(work.path()), before, "{backend}");

        let built = build(work.path(), &image, &args("recipe.toml", "hello,desk,-first"));
        assert!(built.status.success(), "{backend}: {}", text(&built.stderr));
        let tree = work.path().join("tree");
        let installed = "rpm -qa --qf '%{NAME}\\n' desk first second | sort | xargs";
        assert_eq!(shell(&tree, installed), "desk second\n", "{backend}");
        assert_eq!(shell(&tree, "cat /usr/share/hello /var/lib/base/list"), "hello\none\n");
        assert_eq!(
            shell(&tree, "rpm -q --qf '%{NAME}\\n' hello base; rpm -q weak || true"),
            "hello\nbase\npackage weak is not installed\n"
        );
        let repositories =
            if backend == "dnf" { "etc/yum.repos.d/recipe.repo" } else { "etc/zypp/repos.d/recipe-0.repo" };
        let written = std::fs::read_to_string(tree.join(repositories)).unwrap();
        assert!(written.contains("gpgkey=file:///etc/pki/rpm-gpg/RPM-GPG-KEY-recipe-0"), "{written}");
        for gone in ["var/log/dnf.log", "var/log/zypper.log", &work.path().to_str().unwrap()[1..]] {
            assert!(!tree.join(gone).exists(), "{backend}: {gone}");
        }
        // What an image has of it is taken away; what it has locked itself stays locked.
        let locks = "\ntype: package\nmatch_type: glob\ncase_sensitive: on\nsolvable_name: none\n";
        std::fs::create_dir_all(tree.join("etc/zypp")).unwrap();
        std::fs::write(tree.join("etc/zypp/locks"), locks).unwrap();
        let with_second = image_of(&tree, &[]);
        std::fs::remove_dir_all(&tree).unwrap();
        let built = build(work.path(), &with_second, &args("recipe.toml", "desk,-second"));
        assert!(built.status.success(), "{backend}: {}", text(&built.stderr));
        assert_eq!(shell(&tree, installed), "desk first\n", "{backend}");
        assert_eq!(std::fs::read_to_string(tree.join("etc/zypp/locks")).unwrap(), locks);
        std::fs::remove_dir_all(tree).unwrap();
    }
}
