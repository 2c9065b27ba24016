//! `imgutil build` of RPM systems, by dnf and by zypper, from repositories that are made here: what is installed and what is
//! left behind, and what each mistake and each missing or wrong signature is answered with.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;
mod rpm_repo;

use build_tree::{imgutil, mounts, processes, scratch, text};
use rpm_repo::{Key, Package, Server, build as build_packages, describe, files, index, signed};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Output;

const BACKENDS: [&str; 2] = ["dnf", "zypper"];

/// Writes down what the script of a package finds in the tree: devices that are real, processes, and no way to the host's kernel.
const SCRIPT: &str = r#"%post -n scripted -p <lua>
local out = io.open("/var/found", "w")
local function say(...) out:write(table.concat({...}, " "), "\n") end
say("null", posix.stat("/dev/null", "type"))
say("self", posix.stat("/proc/self/status", "type"))
say("sysctl", tostring(io.open("/proc/sys/kernel/domainname", "w") ~= nil))
say("sys", tostring(posix.stat("/sys/kernel") ~= nil))
out:close()
"#;

/// What the tests install: `base` needs nothing, `hello` needs `base` and recommends `weak`.
const PACKAGES: [Package; 5] = [
    Package { files: &[("/var/lib/base/list", "one\n", "0640,root,root")], ..Package::empty("base") },
    Package {
        version: ("2.0", "3.el9"),
        header: "Epoch: 1\nRequires: base\nRecommends: weak",
        files: &[("/usr/share/hello", "hello\n", "0644,root,root"), ("/usr/bin/Hello_x", "#!\n", "4755,root,root")],
        ..Package::empty("hello")
    },
    Package::empty("weak"),
    Package { scripts: SCRIPT, files: &[("/var/found", "", "0644,root,root")], ..Package::empty("scripted") },
    Package { header: "Requires: not-anywhere", ..Package::empty("broken") },
];

fn build(work: &Path, args: &[&str]) -> Output {
    let mut command = imgutil();
    // Where it keeps the log of a failure.
    command.env("TMPDIR", work.join("logs"));
    command.args(["build", "--os", "./os.toml", "--minimal", "--no-cache"]).args(args).current_dir(work);
    command.output().unwrap()
}

/// The one error, which is the last line.
fn error(output: &Output) -> String {
    let printed = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    let last = printed.lines().last().unwrap_or_default();
    assert!(last.starts_with("imgutil: error: build 'tree': "), "{printed}");
    last.to_owned()
}

/// All paths below a tree, without directories.
fn paths(tree: &Path) -> Vec<String> {
    let output =
        std::process::Command::new("find").arg(tree).args(["!", "-type", "d", "-printf", "/%P\n"]).output().unwrap();
    let mut paths: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    paths.sort();
    paths
}

/// Directories below a tree that are empty.
fn empty_directories(tree: &Path) -> Vec<String> {
    let output =
        std::process::Command::new("find").arg(tree).args(["-type", "d", "-empty", "-printf", "/%P\n"]).output();
    let mut paths: Vec<String> = text(&output.unwrap().stdout).lines().map(str::to_owned).collect();
    paths.sort();
    paths
}

#[test]
fn a_signed_repository_becomes_a_tree_and_nothing_else_is_in_it() {
    let work = scratch();
    let key = Key::new();
    let key_file = work.path().join("RPM-GPG-KEY-tests");
    key.export(&key_file);
    signed(&work.path().join("repo"), &PACKAGES, &key);
    let server = Server::start(&work.path().join("repo"));
    for backend in BACKENDS {
        for uri in [server.url.clone(), format!("file://{}/repo", work.path().display())] {
            describe(work.path(), backend, &uri, &key_file, "");
            let tree = work.path().join("tree");
            let output = build(work.path(), &["-p", "hello,scripted", "tree"]);
            assert!(output.status.success(), "{backend}: {}", text(&output.stderr));
            assert!(text(&output.stderr).contains("imgutil: installing the packages\n"), "{}", text(&output.stderr));

            assert_eq!(std::fs::read_to_string(tree.join("usr/share/hello")).unwrap(), "hello\n");
            let mode = |path: &str| tree.join(path).metadata().unwrap().permissions().mode() & 0o7777;
            assert_eq!((mode("usr/bin/Hello_x"), mode("var/lib/base/list"), mode("proc")), (0o4755, 0o640, 0o555));
            assert_eq!(tree.join("usr/bin/Hello_x").metadata().unwrap().uid(), 0);
            let found = std::fs::read_to_string(tree.join("var/found")).unwrap();
            assert_eq!(found, "null character device\nself regular\nsysctl false\nsys false\n");

            let all = paths(&tree);
            let (database, own): (Vec<&String>, Vec<&String>) =
                all.iter().partition(|path| path.contains("/rpmdb.sqlite") || path.ends_with("/.rpm.lock"));
            let place = if backend == "dnf" { "/var/lib/rpm/" } else { "/usr/lib/sysimage/rpm/" };
            assert!(!database.is_empty() && database.iter().all(|path| path.starts_with(place)), "{database:?}");
            let expected: &[&str] = if backend == "dnf" {
                &[
                    "/etc/machine-id",
                    "/etc/pki/rpm-gpg/RPM-GPG-KEY-own-1-main",
                    "/etc/resolv.conf",
                    "/etc/yum.repos.d/image.repo",
                    "/usr/bin/Hello_x",
                    "/usr/share/hello",
                    "/var/found",
                    "/var/lib/base/list",
                    "/var/lib/dnf/history.sqlite",
                ]
            } else {
                &[
                    "/etc/machine-id",
                    "/etc/pki/rpm-gpg/RPM-GPG-KEY-own-1-main",
                    "/etc/resolv.conf",
                    "/etc/zypp/repos.d/own-1-main.repo",
                    "/usr/bin/Hello_x",
                    "/usr/share/hello",
                    "/var/found",
                    "/var/lib/base/list",
                    "/var/lib/rpm",
                    "/var/lib/zypp/AutoInstalled",
                ]
            };
            assert_eq!(own, expected, "{backend} {uri}");
            let empty = empty_directories(&tree);
            let first = work.path().components().nth(1).unwrap().as_os_str().to_str().unwrap();
            assert!(!empty.iter().any(|path| path.starts_with(&format!("/{first}"))), "{empty:?}");
            let repositories = std::fs::read_to_string(tree.join(own[3].trim_start_matches('/'))).unwrap();
            for line in [
                &format!("baseurl={uri}"),
                "gpgcheck=1",
                "repo_gpgcheck=1",
                "gpgkey=file:///etc/pki/rpm-gpg/RPM-GPG-KEY-own-1-main",
            ] {
                assert!(repositories.lines().any(|found| found == line), "{line}: {repositories}");
            }
            if backend == "zypper" {
                assert!(repositories.contains("pkg_gpgcheck=1"), "{repositories}");
                let automatic = std::fs::read_to_string(tree.join("var/lib/zypp/AutoInstalled")).unwrap();
                assert!(!automatic.contains("hello") && !automatic.contains("base"), "{automatic}");
            }
            assert_eq!(
                (processes(work.path().to_str().unwrap()).len(), mounts(work.path())),
                (1, Vec::new()),
                "the server is left"
            );
            std::fs::remove_dir_all(&tree).unwrap();
        }
    }
}

#[test]
fn mistakes_are_answered_in_one_line_and_leave_nothing() {
    let work = scratch();
    let key = Key::new();
    let key_file = work.path().join("key.asc");
    key.export(&key_file);
    signed(&work.path().join("repo"), &PACKAGES, &key);
    let here = format!("file://{}", work.path().display());
    std::fs::write(work.path().join("no-key.asc"), "not a key\n").unwrap();
    for backend in BACKENDS {
        let repository = format!("{here}/repo");
        let cases: [(&str, &str, &[&str], &[&str]); 6] = [
            (
                &repository,
                "key.asc",
                &["-p", "helo,nothing-like-it"],
                &["unknown package 'helo'", "did you mean hello?", "nor 'nothing-like-it'"],
            ),
            (&repository, "key.asc", &["-p", "broken"], &["not-anywhere"]),
            (
                "http://127.0.0.1:9/x",
                "key.asc",
                &[],
                &["cannot fetch http://127.0.0.1:9/x", "onnect", "check the mirror's address"],
            ),
            (&format!("{here}/none"), "key.asc", &[], &["cannot fetch file:/", "/none"]),
            (&repository, "missing.asc", &[], &["missing.asc' that signs", "is missing"]),
            (&repository, "no-key.asc", &[], &["taking the keys of the repositories failed", "no-key.asc"]),
        ];
        for (uri, key, args, parts) in cases {
            describe(work.path(), backend, uri, &work.path().join(key), "");
            let before = listing(work.path());
            let args: Vec<&str> = args.iter().copied().chain(["tree"]).collect();
            let output = build(work.path(), &args);
            let line = error(&output);
            for part in parts {
                assert!(line.contains(part), "{backend} {uri} {args:?}: '{part}' is not in: {}", text(&output.stderr));
            }
            assert_eq!(listing(work.path()), before, "{backend} {uri} {args:?}");
        }
    }
}

fn listing(directory: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

/// Each way to be without the right signature, and what is said of it.
#[test]
fn what_is_not_signed_by_the_key_is_refused() {
    let work = scratch();
    let (good, other) = (Key::new(), Key::new());
    let key_file = work.path().join("key.asc");
    good.export(&key_file);
    let plain = work.path().join("plain");
    build_packages(&plain, &PACKAGES[..2]);
    let hello = PACKAGES[1].file();
    let repository = |name: &str, sign: &dyn Fn(&Path)| {
        let directory = work.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        for file in files(&plain) {
            std::fs::copy(&file, directory.join(file.file_name().unwrap())).unwrap();
        }
        good.sign(&files(&directory).into_iter().filter(|file| !file.ends_with(&hello)).collect::<Vec<_>>());
        sign(&directory);
    };
    repository("unsigned-package", &|directory| {
        index(directory);
        good.sign_index(directory);
    });
    repository("foreign-package", &|directory| {
        other.sign(&[directory.join(&hello)]);
        index(directory);
        good.sign_index(directory);
    });
    repository("unsigned-index", &|directory| {
        good.sign(&[directory.join(&hello)]);
        index(directory);
    });
    repository("foreign-index", &|directory| {
        good.sign(&[directory.join(&hello)]);
        index(directory);
        other.sign_index(directory);
    });
    repository("changed-index", &|directory| {
        good.sign(&[directory.join(&hello)]);
        index(directory);
        good.sign_index(directory);
        let path = directory.join("repodata/repomd.xml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("<revision>", "<revision>1")).unwrap();
    });
    repository("changed-package", &|directory| {
        good.sign(&[directory.join(&hello)]);
        index(directory);
        good.sign_index(directory);
        let path = directory.join(&hello);
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    });
    // Where the index is not asked for a signature, the packages still are.
    let cases: [(&str, &str, &[&str]); 7] = [
        ("unsigned-package", "", &["package hello-", "2.0-3.el9.noarch", "is not signed"]),
        ("unsigned-package", "signed-metadata = false", &["package hello-", "2.0-3.el9.noarch", "is not signed"]),
        ("foreign-package", "", &["package hello-", "2.0-3.el9.noarch", "signed by"]),
        ("unsigned-index", "", &["the index of file://", "unsigned-index", "signed"]),
        ("foreign-index", "", &["the index of file://", "foreign-index"]),
        ("changed-index", "", &["the index of file://", "changed-index"]),
        ("changed-package", "", &["package hello-", "2.0-3.el9.noarch", "is "]),
    ];
    let server = Server::start(work.path());
    for backend in BACKENDS {
        // A package that is fetched is refused in other words than one that is used where it lies.
        describe(work.path(), backend, &format!("{}/changed-package", server.url), &key_file, "");
        let line = error(&build(work.path(), &["-p", "hello", "tree"]));
        assert!(line.contains("package hello-") && line.contains("2.0-3.el9.noarch"), "{backend}: {line}");
        for (name, more, parts) in cases {
            let uri = format!("file://{}/{name}", work.path().display());
            describe(work.path(), backend, &uri, &key_file, "");
            let path = work.path().join("os.toml");
            let described = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, format!("{described}{more}\n")).unwrap();
            let output = build(work.path(), &["-p", "hello", "tree"]);
            let line = error(&output);
            for part in parts {
                assert!(line.contains(part), "{backend} {name}: '{part}' is not in: {}", text(&output.stderr));
            }
            assert!(!work.path().join("tree").exists());
        }
        // What is signed well is installed though its index is not, if that is said.
        let uri = format!("file://{}/unsigned-index", work.path().display());
        describe(work.path(), backend, &uri, &key_file, "");
        let path = work.path().join("os.toml");
        let described = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{described}signed-metadata = false\n")).unwrap();
        let output = build(work.path(), &["-p", "hello", "tree"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        std::fs::remove_dir_all(work.path().join("tree")).unwrap();
    }
}

/// What a lock holds a build to: exact versions and files, though others are there.
#[test]
fn a_lock_names_every_package_and_is_kept_to() {
    let work = scratch();
    let key = Key::new();
    let key_file = work.path().join("key.asc");
    key.export(&key_file);
    let packages = work.path().join("repo");
    signed(&packages, &PACKAGES[..2], &key);
    let newer = Package { version: ("2.1", "1"), ..PACKAGES[1] };
    for backend in BACKENDS {
        describe(work.path(), backend, &format!("file://{}", packages.display()), &key_file, "");
        let lock = format!("{backend}.lock");
        let locked = |tree: &str| build(work.path(), &["--lock", &lock, "--locked", "-p", "hello", tree]);
        let installed = |tree: &str| std::fs::read_to_string(work.path().join(tree).join("usr/share/hello")).unwrap();
        let output = build(work.path(), &["--lock", &lock, "-p", "hello", "tree"]);
        assert!(output.status.success(), "{backend}: {}", text(&output.stderr));
        std::fs::remove_dir_all(work.path().join("tree")).unwrap();
        let written = std::fs::read_to_string(work.path().join(&lock)).unwrap();
        let digest = std::process::Command::new("sha256sum").arg(packages.join(PACKAGES[1].file())).output().unwrap();
        let digest = text(&digest.stdout)[..64].to_owned();
        for part in ["name = \"base\"", "name = \"hello\"", "version = \"1:2.0-3.el9\"", "arch = \"noarch\"", &digest] {
            assert!(written.contains(part), "{backend}: {part} is not in\n{written}");
        }

        // A newer one comes: what is locked stays.
        build_packages(&packages, &[Package { files: &[("/usr/share/hello", "newer\n", "0644,root,root")], ..newer }]);
        key.sign(&[packages.join(newer.file())]);
        index(&packages);
        key.sign_index(&packages);
        let output = locked("tree");
        assert!(output.status.success(), "{backend}: {}", text(&output.stderr));
        assert_eq!(installed("tree"), "hello\n", "{backend}");
        std::fs::remove_dir_all(work.path().join("tree")).unwrap();

        // The same version as another file, though well signed.
        let kept = work.path().join("kept.rpm");
        let place = packages.join(PACKAGES[1].file());
        std::fs::copy(&place, &kept).unwrap();
        build_packages(
            &packages,
            &[Package { files: &[("/usr/share/hello", "other\n", "0644,root,root")], ..PACKAGES[1] }],
        );
        key.sign(std::slice::from_ref(&place));
        index(&packages);
        key.sign_index(&packages);
        let line = error(&locked("tree"));
        assert!(
            line.contains("hello 1:2.0-3.el9 in the repositories is not the file that the lock names"),
            "{backend}: {line}"
        );

        // It is gone.
        std::fs::remove_file(&place).unwrap();
        index(&packages);
        key.sign_index(&packages);
        let line = error(&locked("tree"));
        assert!(
            line.contains("hello 1:2.0-3.el9 is gone from the repositories: they have 1:2.1-1;"),
            "{backend}: {line}"
        );
        assert!(!work.path().join("tree").exists());

        std::fs::rename(&kept, &place).unwrap();
        std::fs::remove_file(packages.join(newer.file())).unwrap();
        index(&packages);
        key.sign_index(&packages);
    }
}

/// What is not wanted does not come for another package either: a rival that offers the same does, or it is an error that names it.
#[test]
fn what_a_recipe_leaves_out_is_let_in_by_nothing() {
    let rivals = [
        Package::empty("base"),
        Package { header: "Requires: editor\nRecommends: weak", ..Package::empty("desk") },
        Package { header: "Provides: editor", ..Package::empty("first") },
        Package { header: "Provides: editor", ..Package::empty("second") },
        Package::empty("weak"),
    ];
    let work = scratch();
    let key = Key::new();
    let key_file = work.path().join("key.asc");
    key.export(&key_file);
    signed(&work.path().join("repo"), &rivals, &key);
    let tree = work.path().join("tree");
    for backend in BACKENDS {
        let database = if backend == "dnf" { "/var/lib/rpm" } else { "/usr/lib/sysimage/rpm" };
        let more = format!("[rpm]\ndatabase = \"{database}\"\nweak-dependencies = true\n");
        describe(work.path(), backend, &format!("file://{}/repo", work.path().display()), &key_file, "");
        let os = work.path().join("os.toml");
        let described = std::fs::read_to_string(&os).unwrap();
        std::fs::write(&os, described + &more).unwrap();
        for (left_out, expected) in [
            ("-first", "base desk second weak"),
            ("-second", "base desk first weak"),
            ("-first,-weak", "base desk second"),
        ] {
            let lock = format!("{backend}{left_out}.lock");
            let args = ["--lock", &lock, "-p", &format!("desk,{left_out}"), "tree"];
            // Chosen, and as locked.
            for locked in [&[][..], &["--locked"]] {
                let output = build(work.path(), &[&args, locked].concat());
                assert!(output.status.success(), "{backend} {left_out}: {}", text(&output.stderr));
                let written = std::fs::read_to_string(work.path().join(&lock)).unwrap();
                let mut names: Vec<&str> =
                    written.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"')).collect();
                names.retain(|name| rivals.iter().any(|package| package.name == *name));
                assert_eq!(names.join(" "), expected, "{backend} {left_out}");
                assert!(!tree.join("etc/zypp/locks").exists(), "the image would never have it");
                std::fs::remove_dir_all(&tree).unwrap();
            }
        }
        let line = error(&build(work.path(), &["-p", "desk,-first,-second", "tree"]));
        assert!(["desk", "editor"].iter().all(|part| line.contains(part)), "{backend}: {line}");
        assert!(!tree.exists());
    }
}

/// libzypp makes the directory of its cache in the root too, at the path that it has on the builder. Of that path a package may have a part,
/// and the script of a package may put a link in its place, which leads onto the builder for whoever follows it from outside.
#[test]
fn what_zypper_leaves_in_the_root_goes_and_nothing_of_a_package_or_of_the_builder() {
    let work = scratch();
    let key = Key::new();
    let key_file = work.path().join("key.asc");
    key.export(&key_file);
    let mut parts = work.path().components().skip(1).map(|part| part.as_os_str().to_str().unwrap());
    let top = parts.next().unwrap();
    let below: PathBuf = parts.collect();
    // Lists of files and scripts are written into the recipe of the packages as they are.
    let directory = format!("%dir %attr(0711,root,root) /{top}\n").leak();
    let link = format!(
        "%post -n linker -p <lua>\nassert(os.rename(\"/{top}\", \"/moved\"))\nposix.symlink(\"/proc/self/root/{top}\", \"/{top}\")\n"
    )
    .leak();
    let inside = &*format!("/{top}/inside").leak();
    let inside = &*Box::leak(Box::new([(inside, "", "0644,root,root")]));
    let packages = [
        Package::empty("base"),
        Package { scripts: directory, ..Package::empty("owner") },
        Package { scripts: link, ..Package::empty("linker") },
        Package { files: inside, ..Package::empty("filler") },
    ];
    signed(&work.path().join("repo"), &packages, &key);
    describe(work.path(), "zypper", &format!("file://{}/repo", work.path().display()), &key_file, "");
    let tree = work.path().join("tree");
    let built = |package: &str| {
        let output = build(work.path(), &["-p", package, "tree"]);
        assert!(output.status.success(), "{package}: {}", text(&output.stderr));
    };
    for (package, left) in
        [("base", None), ("owner", Some(vec![])), ("filler", Some(vec![tree.join(top).join("inside")]))]
    {
        built(package);
        assert_eq!(tree.join(top).exists().then(|| listing(&tree.join(top))), left, "{package}");
        std::fs::remove_dir_all(&tree).unwrap();
    }

    let before = listing(work.path());
    built("linker");
    assert_eq!(tree.join(top).read_link().unwrap(), Path::new("/proc/self/root").join(top));
    // It was there when the link took its place: the link was in the way of what removes it.
    assert!(tree.join("moved").join(&below).join(".tree.imgutil-build").is_dir());
    std::fs::remove_dir_all(&tree).unwrap();
    assert_eq!(listing(work.path()), before);
}

/// A disk that is full in the middle of it is said so, and nothing is left on it.
#[test]
fn a_full_disk_is_named_and_left_empty() {
    let work = scratch();
    let key = Key::new();
    let key_file = work.path().join("key.asc");
    key.export(&key_file);
    let large = "0123456789abcdef".repeat(1 << 18).leak();
    let files = &*Box::leak(Box::new([("/usr/share/large", &*large, "0644,root,root")]));
    let packages = work.path().join("repo");
    signed(&packages, &[Package { files, ..Package::empty("base") }], &key);
    let disk = work.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    for backend in BACKENDS {
        describe(work.path(), backend, &format!("file://{}", packages.display()), &key_file, "");
        let script = "mount -t tmpfs -o size=3m disk disk && \"$@\"; status=$?; ls -A disk; exit $status";
        let mut command = build_tree::unshared();
        command.args([
            "sh",
            "-c",
            script,
            "sh",
            env!("CARGO_BIN_EXE_imgutil"),
            "build",
            "--os",
            "./os.toml",
            "--minimal",
        ]);
        let output = command.args(["--no-cache", "disk/tree"]).current_dir(work.path()).output().unwrap();
        let printed = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{backend}: {printed}");
        assert_eq!(text(&output.stdout), "", "{backend}: something is left on the disk");
        let last = printed.lines().last().unwrap_or_default();
        assert!(last.contains("disk/tree' is full"), "{backend}: {printed}");
    }
}
