//! `imgutil build` with real archives: what a recipe makes, and what each mistake, signal and kill leaves behind.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;
mod deb_archive;

use build_tree::{
    error, exec, imgutil, imgutil_alone, mounts, names, payload, payload_elsewhere, processes, scratch, shell, text,
    tied, wait_until,
};
use deb_archive::{archive, signing_key, unsigned_archive};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::JoinHandle;

fn build(work: &Path, args: &[&str]) -> Output {
    // Where it keeps the log of a failure: beside the work, which some tests list, and not in the machine's /tmp.
    let logs = work.with_extension("logs");
    std::fs::create_dir_all(&logs).unwrap();
    let output = imgutil().arg("build").args(args).current_dir(work).env("TMPDIR", &logs).output().unwrap();
    std::fs::remove_dir_all(&logs).unwrap();
    output
}

/// A recipe with everything in it, and the directory it is built in.
struct Kitchen {
    work: tempfile::TempDir,
    recipe: String,
    key: String,
}

impl Kitchen {
    fn new() -> Self {
        let work = scratch();
        let home = work.path().join("gnupg");
        let key = signing_key(&home);
        archive(&work.path().join("archive"), &home);
        unsigned_archive(&work.path().join("unsigned"), ("own-free", "3.1"), "free");
        std::fs::create_dir_all(work.path().join("site/skeleton/deep")).unwrap();
        let recipe = format!(
            r#"
            include = ["site/common.toml"]
            os = "debian-12"
            base = "minimal"
            packages = ["-ca-certificates", {{ name = "no-such-package", arch = "arm64" }}]
            locale = "C.UTF-8"
            timezone = "Europe/Berlin"
            run = ["echo ran > /etc/ran", "test \"$(cat /etc/secret)\" = x"]
            [[repository]]
            uri = "copy:{0}/archive"
            suites = ["./"]
            key = """
{key}"""
            [[repository]]
            uri = "copy:{0}/unsigned"
            suites = ["./"]
            unsigned = true
            [[file]]
            path = "/etc/secret"
            content = "x\n"
            mode = "0600"
            owner = "op:adm"
            [[file]]
            path = "/var/lib/data"
            directory = true
            mode = "0750"
            [[file]]
            path = "/etc/alias"
            link = "issue"
            [[group]]
            name = "crew"
            gid = 2345
            [[user]]
            name = "op"
            uid = 1234
            groups = ["adm", "crew"]
            ssh-keys = ["ssh-ed25519 AAAA op"]
            "#,
            work.path().display()
        );
        let kitchen = Self { work, recipe, key };
        kitchen.write("site/banner", "welcome\n");
        kitchen.write("site/skeleton/deep/tool", "#!/bin/sh\n");
        let tool = kitchen.path().join("site/skeleton/deep/tool");
        std::fs::set_permissions(tool, std::fs::Permissions::from_mode(0o700)).unwrap();
        kitchen.write(
            "site/common.toml",
            r#"
            packages = ["hello", { name = "less", version = ">=13" }, "own-hello", "own-free"]
            [[file]]
            path = "/etc/issue"
            source = "banner"
            [[file]]
            path = "/opt/skeleton"
            source = "skeleton"
            "#,
        );
        kitchen.write("recipe.toml", &kitchen.recipe);
        kitchen
    }

    fn path(&self) -> &Path {
        self.work.path()
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path().join(name), content).unwrap();
    }

    fn lock(&self) -> String {
        std::fs::read_to_string(self.path().join("recipe.lock")).unwrap()
    }

    fn build(&self, args: &[&str]) -> Output {
        build(self.path(), &[&["-f", "recipe.toml"], args].concat())
    }

    /// Builds with the cache where there is no network at all.
    fn build_alone(&self, args: &[&str]) -> Output {
        let mut command = imgutil_alone();
        command.args(["build", "--cache", "cache", "-f", "recipe.toml"]).args(args);
        command.current_dir(self.path()).output().unwrap()
    }

    /// The digest of what `imgutil pack` makes of a good build's tree, which is removed.
    fn payload(&self, built: &Output, tree: &str) -> String {
        assert!(built.status.success(), "{}", text(&built.stderr));
        payload(&self.path().join(tree))
    }
}

#[test]
fn a_recipe_becomes_a_tree_and_its_lock_makes_the_same_again() {
    let kitchen = Kitchen::new();
    let built = kitchen.build(&["--cache", "cache", "tree"]);
    assert!(built.status.success(), "{}", text(&built.stderr));
    assert!(text(&built.stdout).contains("debian-12 amd64, kernel none, in "), "{}", text(&built.stdout));
    // A log has its lines from the start.
    assert!(text(&built.stderr).starts_with("imgutil: fetching the lists of packages\n"), "{}", text(&built.stderr));
    let expected = ["archive", "cache", "gnupg", "recipe.lock", "recipe.toml", "site", "tree", "unsigned"];
    assert_eq!(names(kitchen.path()), expected);
    has_what_the_recipe_says(&kitchen, &kitchen.path().join("tree"));
    let again = kitchen.build(&["--no-cache", "tree"]);
    assert!(error(&again, 1).contains("tree' exists: build makes a new tree"), "{}", text(&again.stderr));
    let digest = kitchen.payload(&built, "tree");

    // The same again, installed anew, on another machine and at another time.
    let files = ["recipe.toml", "recipe.lock", "site"];
    let elsewhere = payload_elsewhere(kitchen.path(), &files, &["-f", "recipe.toml", "--no-cache", "--locked"]);
    assert_eq!(elsewhere, digest);
    // Out of the cache no network is needed, nor the archives.
    let built = kitchen.build_alone(&["--locked", "third"]);
    assert!(text(&built.stdout).contains(", packages as locked on 2"), "{}", text(&built.stdout));
    assert_eq!(kitchen.payload(&built, "third"), digest);

    the_date_decides_the_times(&kitchen, &digest);
    another_command_keeps_the_packages(&kitchen);
    versions_that_are_gone_are_named(&kitchen);
    a_damaged_entry_is_not_used(&kitchen);

    // A key that did not sign: nothing of the archive is used.
    let other = signing_key(&kitchen.path().join("gnupg2"));
    kitchen.write("recipe.toml", &kitchen.recipe.replace(kitchen.key.trim(), other.trim()));
    let before = names(kitchen.path());
    let line = error(&kitchen.build(&["--no-cache", "tree"]), 1);
    assert!(line.contains("is not signed by its key, so nothing of it was used"), "{line}");
    assert_eq!(names(kitchen.path()), before);
}

/// With a kernel, and an initramfs that each build makes by itself.
#[test]
#[ignore = "two nodes take minutes: `make test-full` runs it"]
fn two_locked_builds_of_a_node_are_the_same_image() {
    let work = scratch();
    let write = |name: &str, content: &str| std::fs::write(work.path().join(name), content).unwrap();
    std::fs::create_dir_all(work.path().join("node-files/usr/lib/site")).unwrap();
    write("node-files/usr/lib/site/agent", "the agent\n");
    write("recipe.toml", "os = \"debian-12\"\npackages = [\"hello\"]\n");
    let recipe = ["-f", "recipe.toml", "--no-cache", "--node-files", "node-files"];
    let built = build(work.path(), &[&recipe[..], &["tree"]].concat());
    assert!(built.status.success(), "{}", text(&built.stderr));
    assert!(text(&built.stdout).contains(", kernel 6."), "{}", text(&built.stdout));
    let digest = payload(&work.path().join("tree"));
    let files = ["recipe.toml", "recipe.lock", "node-files"];
    let elsewhere = payload_elsewhere(work.path(), &files, &[&recipe[..], &["--locked"]].concat());
    assert_eq!(elsewhere, digest);
}

fn has_what_the_recipe_says(kitchen: &Kitchen, tree: &Path) {
    assert_eq!(tree.metadata().unwrap().permissions().mode() & 0o7777, 0o755);
    let read = |path: &str| std::fs::read_to_string(tree.join(path)).unwrap();
    assert_eq!((read("etc/issue"), read("etc/ran")), ("welcome\n".to_owned(), "ran\n".to_owned()));
    assert_eq!((read("etc/default/locale"), read("usr/share/own")), ("LANG=C.UTF-8\n".to_owned(), "own\n".to_owned()));
    // From a repository of which the recipe says that nobody signs it.
    assert_eq!(read("usr/share/free"), "free\n");
    let seen = |path: &str| {
        let metadata = tree.join(path).symlink_metadata().unwrap();
        (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
    };
    assert_eq!((seen("etc/secret"), seen("var/lib/data")), ((0o600, 1234, 4), (0o750, 0, 0)));
    assert_eq!((seen("opt/skeleton/deep"), seen("opt/skeleton/deep/tool")), ((0o755, 0, 0), (0o755, 0, 0)));
    assert_eq!(seen("home/op/.ssh/authorized_keys"), (0o600, 1234, 1234));
    assert_eq!(tree.join("etc/alias").read_link().unwrap(), Path::new("issue"));
    assert_eq!(tree.join("etc/localtime").read_link().unwrap(), Path::new("/usr/share/zoneinfo/Europe/Berlin"));
    assert_eq!(shell(tree, "hello; id -u op; id -Gn op"), "Hello, world!\n1234\nop adm crew\n");
    // Left out, and not wanted here.
    for gone in ["usr/sbin/update-ca-certificates", "usr/bin/less"] {
        assert!(!tree.join(gone).exists(), "{gone}");
    }
    // Nothing of one machine or of the build.
    assert_eq!(std::fs::read(tree.join("etc/machine-id")).unwrap(), b"");
    for gone in ["etc/hostname", "var/log/dpkg.log", "etc/apt/sources.list", "usr/sbin/policy-rc.d"] {
        assert!(!tree.join(gone).exists(), "{gone}");
    }
    assert_eq!(names(&tree.join("var/lib/apt/lists")), ["partial"]);
    let sources = read("etc/apt/sources.list.d/image.sources");
    assert!(sources.contains("bookworm-security") && sources.matches("Signed-By: ").count() == 3, "{sources}");
    assert_eq!(sources.matches("Trusted: yes").count(), 1, "{sources}");
    assert_eq!(read("etc/apt/keyrings/recipe-0.asc").trim(), kitchen.key.trim());
    // What was built can be built upon.
    assert_eq!(exec(tree, &["dpkg", "--audit"]).stdout, b"");
    assert_eq!(mounts(tree), Vec::<String>::new());
    // The lock names every package that is there, with version and digest, and everything that the recipe brings.
    let lock = kitchen.lock();
    let installed = shell(tree, "dpkg-query -W -f '${Package}\\n'");
    assert_eq!(lock.matches("[[package]]").count(), installed.lines().count());
    assert!(lock.contains("name = \"own-hello\"\nversion = \"1:2.0\"\narch = \"all\"\nsha256 = \""), "{lock}");
    for source in ["recipe.toml", "site/common.toml", "site/banner", "site/skeleton"] {
        assert!(lock.contains(&format!("path = \"{source}\"")), "{source}: {lock}");
    }
    // Nothing is newer than the lock.
    let date = lock.lines().find_map(|line| line.strip_prefix("date = ")).unwrap();
    let newer = Command::new("find").arg(tree).args(["-newermt", &format!("@{date}")]).output().unwrap();
    assert_eq!(text(&newer.stdout), "");
}

/// Nothing is newer than `SOURCE_DATE_EPOCH`, and the date alone decides: not whether its base tree was in the cache already.
fn the_date_decides_the_times(kitchen: &Kitchen, locked: &str) {
    const EARLY: u64 = 1_500_000_000;
    let tree = kitchen.path().join("tree");
    let build = || {
        let mut command = imgutil();
        command.args(["build", "--cache", "dated", "-f", "recipe.toml", "--locked", "tree"]);
        let built = command.env("SOURCE_DATE_EPOCH", EARLY.to_string()).current_dir(kitchen.path()).output().unwrap();
        assert!(built.status.success(), "{}", text(&built.stderr));
    };
    build();
    let newer = Command::new("find").arg(&tree).args(["-newermt", &format!("@{EARLY}")]).output().unwrap();
    assert_eq!(text(&newer.stdout), "");
    // The days of password changes (shadow(5)), of packages' users and of the recipe's.
    let shadow = std::fs::read_to_string(tree.join("etc/shadow")).unwrap();
    let days = shadow.lines().map(|line| line.split(':').nth(2).unwrap().parse::<u64>().unwrap());
    assert!(days.clone().count() > 10 && days.max() <= Some(EARLY / 86_400), "{shadow}");
    let fresh = payload(&tree);
    build();
    let cached = payload(&tree);
    assert_eq!((cached == fresh, fresh == locked), (true, false));
    std::fs::remove_dir_all(kitchen.path().join("dated")).unwrap();
}

fn another_command_keeps_the_packages(kitchen: &Kitchen) {
    let lock = kitchen.lock();
    kitchen.write("recipe.toml", &kitchen.recipe.replace("echo ran", "echo ran again"));
    let line = error(&kitchen.build(&["--cache", "cache", "--locked", "tree"]), 1);
    assert!(line.contains("does not match its lock") && line.contains("'recipe.toml' has changed"), "{line}");
    assert_eq!(kitchen.lock(), lock);
    let built = kitchen.build_alone(&["tree"]);
    assert!(built.status.success(), "{}", text(&built.stderr));
    assert_eq!(std::fs::read_to_string(kitchen.path().join("tree/etc/ran")).unwrap(), "ran again\n");
    std::fs::remove_dir_all(kitchen.path().join("tree")).unwrap();
    // Stopped in a command, it leaves no tree; the packages are not installed again.
    kitchen.write("recipe.toml", &kitchen.recipe.replace("echo ran", "sleep 98765; echo ran again"));
    let args = ["--cache", "cache", "-f", "recipe.toml", "tree"];
    let (ended, said) = Begun::new(kitchen.path(), &args, "running the recipe's commands").end(Signal::SIGTERM);
    let expected = "interrupted by SIGTERM: nothing is left but the installed packages in the cache, and the next build goes on from there";
    assert!(ended == Some(143) && said.last().is_some_and(|line| line.ends_with(expected)), "{said:?}");
    assert!(!kitchen.path().join("tree").exists());
    kitchen.write("recipe.toml", &kitchen.recipe.replace("echo ran", "echo ran again"));
    let packages = |lock: &str| lock[lock.find("[[package]]").unwrap()..].to_owned();
    let after = kitchen.lock();
    assert!(after != lock && packages(&after) == packages(&lock), "only the sources' digests are new");
}

fn versions_that_are_gone_are_named(kitchen: &Kitchen) {
    let (before, lock) = (names(kitchen.path()), kitchen.lock());
    let digest_of = |name: &str| {
        let part = &lock[lock.find(&format!("name = \"{name}\"\n")).unwrap()..];
        part.split("sha256 = \"").nth(1).unwrap()[..64].to_owned()
    };
    let (own, other) = (digest_of("own-hello"), digest_of("hello"));
    for (from, to, part) in [
        (
            "version = \"1:2.0\"",
            "version = \"1:1.0\"",
            "own-hello 1:1.0 is gone from the repositories: they have 1:2.0; build with --update-lock",
        ),
        ("name = \"hello\"", "name = \"hellooo\"", "is gone from the repositories: they have no version of it"),
        (own.as_str(), other.as_str(), "own-hello 1:2.0 in the repositories is not the file that the lock names"),
    ] {
        kitchen.write("recipe.lock", &lock.replace(from, to));
        let line = error(&kitchen.build(&["--no-cache", "tree"]), 1);
        assert!(line.contains(part), "{line}");
        assert_eq!(names(kitchen.path()), before);
    }
    kitchen.write("recipe.lock", &lock);
}

fn a_damaged_entry_is_not_used(kitchen: &Kitchen) {
    let base = kitchen.path().join("cache/base");
    let listed = imgutil().args(["list", "--cache"]).arg(kitchen.path().join("cache")).output().unwrap();
    let packages = kitchen.lock().matches("[[package]]").count();
    let listed = text(&listed.stdout);
    assert!(listed.contains(&format!("debian-12 amd64, {packages} packages")), "{listed}");
    let entry = base.join(names(&base).iter().find(|name| name.ends_with(".tar.zst")).unwrap());
    let mut bytes = std::fs::read(&entry).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&entry, bytes).unwrap();
    // It has to be built again, and that takes the archives.
    let output = kitchen.build_alone(&["tree"]);
    let said = text(&output.stderr);
    assert!(error(&output, 1).contains("cannot fetch http"), "{said}");
    assert!(said.contains("\nimgutil: warning: the base tree in '") && said.contains("' is damaged: "), "{said}");
    assert_eq!(names(&base), Vec::<String>::new());
}

/// Too small for the lists of packages, and too small for the packages.
#[test]
fn a_full_disk_is_one_line() {
    for (size, says) in
        [("20m", " MiB free, too few to begin"), ("160m", "' is full: make room there, or build elsewhere")]
    {
        let work = scratch();
        // Gone with the namespace, whatever happens.
        let script = format!(
            "mount -t tmpfs -o size={size} none {0} && {1} build --no-cache --minimal {0}/tree; code=$?; ls -A {0}; exit $code",
            work.path().display(),
            env!("CARGO_BIN_EXE_imgutil")
        );
        let output = tied("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
        let line = error(&output, 1);
        assert!(line.contains(says), "{line}");
        assert_eq!(text(&output.stdout), "", "nothing is left");
    }
}

#[test]
fn a_build_without_a_tree_explains_itself() {
    let work = scratch();
    let output = build(work.path(), &[]);
    assert_eq!(output.status.code(), Some(2));
    let printed = text(&output.stderr);
    assert!(printed.contains("imgutil build TREE") && printed.contains("--list-os"), "{printed}");
    assert!(printed.lines().count() < 20, "{printed}");
    let output = build(work.path(), &["--list-os", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let tested = |name: &str| {
        let os = list.as_array().unwrap().iter().find(|os| os["name"] == name).unwrap();
        os["tested"].as_bool().unwrap()
    };
    assert!(tested("debian-12") && !tested("ubuntu-26.04"));
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
    write("source.toml", "base = \"minimal\"\n[[file]]\npath = \"/a\"\nsource = \"none-such\"\n");
    write("circle.toml", "include = \"circle.toml\"\n");
    write("bare.toml", "base = \"minimal\"\n\n[[repository]]\nuri = \"http://x\"\nsuites = [\"a\"]\n");
    write("out.toml", "base = \"minimal\"\n");
    let before = names(work.path());
    let cases: [(&[&str], &[&str]); 14] = [
        (
            &["-f", "unknown.toml", "tree"],
            &["build 'tree': unknown package 'vimm': ", " (did you mean ", ", nor 'no-such-package'; correct the name"],
        ),
        (&["-f", "typo.toml", "tree"], &["recipe 'typo.toml', line 2: unknown field `packges`"]),
        (&["-f", "none.toml", "tree"], &["cannot read the recipe 'none.toml'", "No such file"]),
        (
            &["-f", "key.toml", "tree"],
            &["none.asc' that signs 'http://127.0.0.1/x' is missing", "check the recipe's 'key'"],
        ),
        (&["-f", "source.toml", "tree"], &["cannot read", "none-such", "No such file"]),
        (&["-f", "circle.toml", "tree"], &["circle.toml' cannot include", "would never end"]),
        (
            &["-f", "bare.toml", "tree"],
            &["recipe 'bare.toml', line 3: repository 'http://x' has no key", "unsigned = true"],
        ),
        (&["-f", "out.toml", "--locked", "tree"], &["lock 'out.lock': it does not exist: build once without --locked"]),
        (&["--locked", "tree"], &["without a recipe there is no lock: name it with --lock"]),
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
        if args.contains(&"unknown.toml") {
            let near = line.split_once("did you mean ").and_then(|(_, rest)| rest.split_once("?)")).unwrap().0;
            assert!(near.split(", ").any(|name| name == "vim"), "{line}");
        }
    }
}

/// A build that has come to a certain stage, and what it says until its end.
struct Begun {
    child: Child,
    said: JoinHandle<Vec<String>>,
}

impl Begun {
    fn new(work: &Path, args: &[&str], stage: &str) -> Self {
        let mut command = imgutil();
        command.arg("build").args(args).current_dir(work).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let mut seen = Vec::new();
        while !seen.last().is_some_and(|line: &String| line.contains(stage)) {
            seen.push(lines.next().expect("it ended before it began"));
        }
        // Whoever reads the lines goes on to read them.
        Self { child, said: std::thread::spawn(move || seen.into_iter().chain(lines).collect()) }
    }

    /// One that unpacks packages.
    fn unpacking(work: &Path) -> Self {
        Self::new(work, &["--no-cache", "--minimal", "tree"], "unpacking essential packages")
    }

    /// Ends it by a signal: its status and all that it said.
    fn end(mut self, signal: Signal) -> (Option<i32>, Vec<String>) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
        (self.child.wait().unwrap().code(), self.said.join().unwrap())
    }
}

#[test]
fn a_build_that_is_stopped_leaves_nothing_and_one_that_is_killed_is_cleaned_up_by_the_next() {
    let work = scratch();
    let mark = work.path().to_str().unwrap();
    for (signal, status) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let (ended, said) = Begun::unpacking(work.path()).end(signal);
        assert_eq!(ended, Some(status));
        let expected = format!("interrupted by {signal}: nothing is left of it, and the next build begins anew");
        assert!(said.last().is_some_and(|line| line.ends_with(&expected)), "{said:?}");
        assert_eq!(names(work.path()), Vec::<String>::new(), "{signal}");
        assert_eq!((processes(mark), mounts(work.path())), (Vec::new(), Vec::new()), "{signal}");
    }
    assert_eq!(Begun::unpacking(work.path()).end(Signal::SIGKILL).0, None);
    wait_until("the end of all processes", || processes(mark).is_empty());
    wait_until("the end of all mounts", || mounts(work.path()).is_empty());
    assert_eq!(names(work.path()), [".tree.imgutil-build"], "hidden, and nothing under the tree's name");
    // The next one removes what is left, and two at once do not meet.
    let begun = Begun::unpacking(work.path());
    let output = build(work.path(), &["--minimal", "tree"]);
    assert!(error(&output, 1).contains("another build of"), "{}", text(&output.stderr));
    let (ended, said) = begun.end(Signal::SIGTERM);
    assert_eq!(ended, Some(143));
    assert!(said[0].contains("a build of this tree was killed: what it left in '"), "{said:?}");
    assert_eq!(names(work.path()), Vec::<String>::new());
}
