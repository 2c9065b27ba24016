//! `imgutil build` of RPM systems by recipe: what a lock, a date and a warm cache of base trees promise, what an interruption leaves,
//! and recipes of which no image can be made.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;
mod rpm_repo;

use build_tree::{
    error, imgutil, imgutil_alone, mounts, names, payload, payload_elsewhere, processes, scratch, text, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rpm_repo::{Key, Package, Server, describe, signed};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const BACKENDS: [&str; 2] = ["dnf", "zypper"];

/// Takes longer than anybody waits, and says when it has begun. RPM lets no signal end a transaction.
const WAITS: &str = "%post -n waits -p <lua>\nio.open(\"/var/begun\", \"w\"):close()\nposix.sleep(600)\n";

/// `hello` needs four others, which may be installed in any order.
const PACKAGES: [Package; 11] = [
    Package { files: &[("/var/lib/base/list", "one\n", "0640,root,root")], ..Package::empty("base") },
    Package {
        header: "Requires: base, west, north, south, east",
        files: &[("/usr/share/hello", "hello\n", "0644,root,root")],
        ..Package::empty("hello")
    },
    Package { header: "Requires: base", ..Package::empty("north") },
    Package { header: "Requires: base", ..Package::empty("east") },
    Package { files: &[("/usr/share/south", "south\n", "0644,root,root")], ..Package::empty("south") },
    Package { files: &[("/usr/share/west", "west\n", "0644,root,root")], ..Package::empty("west") },
    Package { scripts: WAITS, files: &[("/var/lib/waits", "", "0644,root,root")], ..Package::empty("waits") },
    // What a node of the one and of the other family gets without asking.
    Package::empty("kernel"),
    Package::empty("kernel-default"),
    Package { files: &[("/boot/vmlinuz-1", "kernel\n", "0644,root,root")], ..Package::empty("vmlinuz") },
    Package { files: &[("/sbin/init", "init\n", "0755,root,root")], ..Package::empty("init") },
];

/// A repository that a web server gives out, and a folder with a recipe.
struct Kitchen {
    work: tempfile::TempDir,
    server: Server,
    key: std::path::PathBuf,
    _repository: tempfile::TempDir,
}

impl Kitchen {
    fn new() -> Self {
        let (work, repository) = (scratch(), scratch());
        let key = Key::new();
        let key_file = repository.path().join("key.asc");
        key.export(&key_file);
        signed(&repository.path().join("repo"), &PACKAGES, &key);
        let server = Server::start(&repository.path().join("repo"));
        let kitchen = Self { work, server, key: key_file, _repository: repository };
        fs::create_dir(kitchen.path().join("site")).unwrap();
        kitchen.write("site/banner", "welcome\n");
        // What lies beside a recipe is run by nobody: dnf's history is tidied by Python, as root and on the host.
        kitchen.write("sqlite3.py", "raise SystemExit('a file beside the recipe was run')\n");
        kitchen
    }

    fn path(&self) -> &Path {
        self.work.path()
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.path().join(name), content).unwrap();
    }

    /// Begins with one of the back ends.
    fn begin(&self, backend: &str, recipe: &str) {
        describe(self.path(), backend, &self.server.url, &self.key, "");
        self.write("recipe.toml", &format!("os = \"{}/os.toml\"\n{recipe}", self.path().display()));
    }

    fn build(&self, mut imgutil: Command, args: &[&str], date: Option<i64>) -> Output {
        imgutil.args(["build", "-f", "recipe.toml"]).args(args).env("TMPDIR", self.path().join("logs"));
        imgutil.envs(date.map(|seconds| ("SOURCE_DATE_EPOCH", seconds.to_string())));
        imgutil.current_dir(self.path()).output().unwrap()
    }

    /// The digest of the image of a good build.
    fn payload(&self, built: &Output) -> String {
        assert!(built.status.success(), "{}", text(&built.stderr));
        payload(&self.path().join("tree"))
    }
}

#[test]
fn a_lock_makes_the_same_image_elsewhere_and_without_a_network() {
    let kitchen = Kitchen::new();
    let recipe = "base = \"minimal\"\npackages = [\"hello\"]\n[[file]]\npath = \"/opt/site\"\nsource = \"site\"\n";
    for backend in BACKENDS {
        kitchen.begin(backend, recipe);
        kitchen.write("site/banner", "welcome\n");
        let digest = kitchen.payload(&kitchen.build(imgutil(), &["--cache", "cache", "tree"], None));
        let files = ["recipe.toml", "recipe.lock", "site"];
        let elsewhere = payload_elsewhere(kitchen.path(), &files, &["-f", "recipe.toml", "--no-cache", "--locked"]);
        assert_eq!(elsewhere, digest, "{backend}");

        // Without a network the repository cannot be reached, and need not be.
        let line = error(&kitchen.build(imgutil_alone(), &["--no-cache", "--locked", "tree"], None), 1);
        assert!(line.contains("cannot fetch http://127.0.0.1"), "{backend}: {line}");
        let built = kitchen.build(imgutil_alone(), &["--cache", "cache", "--locked", "tree"], None);
        assert_eq!(kitchen.payload(&built), digest, "{backend}");
        kitchen.write("site/banner", "welcome again\n");
        let line = error(&kitchen.build(imgutil_alone(), &["--cache", "cache", "--locked", "tree"], None), 1);
        assert!(line.contains("'site' has changed"), "{backend}: {line}");
        let built = kitchen.build(imgutil_alone(), &["--cache", "cache", "tree"], None);
        assert!(built.status.success(), "{backend}: {}", text(&built.stderr));
        let banner = fs::read_to_string(kitchen.path().join("tree/opt/site/banner")).unwrap();
        assert_eq!(banner, "welcome again\n", "{backend}");
        assert_ne!(kitchen.payload(&built), digest, "{backend}");

        // A description of the system that says something else asks for something else.
        let locale = "locale = { file = \"/etc/other\", packages = [] }";
        describe(kitchen.path(), backend, &kitchen.server.url, &kitchen.key, locale);
        let line = error(&kitchen.build(imgutil_alone(), &["--cache", "cache", "--locked", "tree"], None), 1);
        assert!(line.contains("does not match its lock"), "{backend}: {line}");
        assert!(line.contains("or the description of its system, have changed"), "{backend}: {line}");
        fs::remove_file(kitchen.path().join("recipe.lock")).unwrap();
    }
}

/// Nothing in an image is newer than its date, and the date alone decides: not whether its base tree was in the cache already.
#[test]
fn the_date_decides_the_times_in_an_image() {
    let kitchen = Kitchen::new();
    for backend in BACKENDS {
        kitchen.begin(backend, "base = \"minimal\"\npackages = [\"hello\"]\n");
        let with = |cache: &[&str], date: Option<i64>| {
            let built = kitchen.build(imgutil(), &[cache, &["tree"]].concat(), date);
            assert!(built.status.success(), "{backend}: {}", text(&built.stderr));
        };
        let tree = kitchen.path().join("tree");
        with(&["--cache", "cache"], None);
        let locked = payload(&tree);
        // Later than everything that the first build wrote, and earlier than what the next ones do.
        std::thread::sleep(Duration::from_millis(1100));
        let later = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
        with(&["--cache", "cache", "--locked"], Some(later));
        let fresh = payload(&tree);
        // Now out of the cache, and without it.
        with(&["--cache", "cache", "--locked"], Some(later));
        let cached = payload(&tree);
        with(&["--no-cache", "--locked"], Some(later));
        assert_eq!((payload(&tree) == fresh, cached == fresh, fresh == locked), (true, true, false), "{backend}");

        let early = 1_500_000_000;
        with(&["--cache", "cache", "--locked"], Some(early));
        let newer = Command::new("find").arg(&tree).args(["-newermt", &format!("@{early}")]).output().unwrap();
        assert_eq!(text(&newer.stdout), "", "{backend}");
        let database = if backend == "dnf" { "/var/lib/rpm" } else { "/usr/lib/sysimage/rpm" };
        let mut query = Command::new("rpm");
        query.arg("--root").arg(&tree).args(["--dbpath", database, "-qa", "--qf", "%{INSTALLTIME} %{INSTALLTID}\\n"]);
        let times = text(&query.output().unwrap().stdout);
        // Six packages and the key: of one transaction, and RPM counts a second for each package.
        let numbers = |line: &str| line.split(' ').map(|word| word.parse::<i64>().unwrap()).collect::<Vec<_>>();
        let times: Vec<Vec<i64>> = times.lines().map(numbers).collect();
        assert_eq!(times.len(), 7, "{backend}");
        assert!(times.iter().all(|of| (early..early + 7).contains(&of[0]) && of[1] == early), "{backend}: {times:?}");
        if backend == "dnf" {
            // What dnf says of its history: which packages were asked for, and nothing of the builder.
            assert_eq!(names(&tree.join("var/lib/dnf")), ["history.sqlite"]);
            let query = "SELECT dt_begin, dt_end, user_id, cmdline, (SELECT group_concat(name) FROM (SELECT name FROM rpm JOIN trans_item \
                 USING (item_id) WHERE reason = 2 ORDER BY name)) FROM trans";
            let ask =
                "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchone(), sep='|')";
            let mut python = Command::new("/usr/bin/python3");
            python.args(["-c", ask]).arg(tree.join("var/lib/dnf/history.sqlite")).arg(query);
            let said = python.output().unwrap();
            assert_eq!(text(&said.stdout), format!("{early}|{early}|0|imgutil build|base,hello\n"));
        }
        fs::remove_dir_all(&tree).unwrap();
        fs::remove_file(kitchen.path().join("recipe.lock")).unwrap();
    }
}

/// Each repository by its own key, which the recipe holds itself.
#[test]
fn a_recipe_adds_a_repository_with_a_key_of_its_own() {
    const OWN: [Package; 1] =
        [Package { files: &[("/usr/share/own", "own\n", "0644,root,root")], ..Package::empty("own") }];
    let (kitchen, beside) = (Kitchen::new(), scratch());
    let key = Key::new();
    signed(&beside.path().join("repo"), &OWN, &key);
    key.export(&beside.path().join("key.asc"));
    let (own, other) = (fs::read_to_string(beside.path().join("key.asc")), fs::read_to_string(&kitchen.key));
    let (own, other) = (own.unwrap(), other.unwrap());
    let recipe = |key: &str| {
        format!(
            "base = \"minimal\"\npackages = [\"own\", \"hello\"]\n[[repository]]\nuri = \"file://{}/repo\"\nkey = \"\"\"\n{key}\"\"\"\n",
            beside.path().display()
        )
    };
    for backend in BACKENDS {
        kitchen.begin(backend, &recipe(&other));
        let line = error(&kitchen.build(imgutil(), &["--no-cache", "tree"], None), 1);
        assert!(line.contains("is not signed by its key, so nothing of it was used"), "{backend}: {line}");
        kitchen.begin(backend, &recipe(&own));
        let built = kitchen.build(imgutil(), &["--no-cache", "tree"], None);
        assert!(built.status.success(), "{backend}: {}", text(&built.stderr));
        let tree = kitchen.path().join("tree");
        let read = |path: &str| fs::read_to_string(tree.join(path)).unwrap();
        assert_eq!((read("usr/share/own"), read("usr/share/hello")), ("own\n".to_owned(), "hello\n".to_owned()));
        // Updates in the image come from both, by the same keys.
        for (name, key) in [("recipe-0", &own), ("own-1-main", &other)] {
            assert_eq!(read(&format!("etc/pki/rpm-gpg/RPM-GPG-KEY-{name}")).trim(), key.trim(), "{backend}: {name}");
        }
        fs::remove_dir_all(&tree).unwrap();
        fs::remove_file(kitchen.path().join("recipe.lock")).unwrap();
    }
}

#[test]
fn a_build_that_is_stopped_while_packages_are_installed_leaves_nothing() {
    let kitchen = Kitchen::new();
    for backend in BACKENDS {
        kitchen.begin(backend, "base = \"minimal\"\npackages = [\"waits\"]\n");
        let before = names(kitchen.path());
        let mut command = imgutil();
        command.args(["build", "--no-cache", "-f", "recipe.toml", "tree"]).current_dir(kitchen.path());
        let child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let begun = kitchen.path().join(".tree.imgutil-build/root/var/begun");
        wait_until("the script of a package", || begun.exists());
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
        let line = error(&child.wait_with_output().unwrap(), 143);
        assert!(
            line.ends_with("interrupted by SIGTERM: nothing is left of it, and the next build begins anew"),
            "{backend}: {line}"
        );
        assert_eq!(names(kitchen.path()), before, "{backend}");
        let mark = kitchen.path().to_str().unwrap();
        assert_eq!((processes(mark), mounts(kitchen.path())), (Vec::new(), Vec::new()), "{backend}");
    }
}

#[test]
fn recipes_that_make_no_image_are_answered_in_one_line_and_leave_nothing() {
    let kitchen = Kitchen::new();
    let outside = scratch();
    fs::create_dir_all(kitchen.path().join("node-files/usr/lib")).unwrap();
    let file = "[[file]]\npath = \"/out/file\"\ncontent = \"x\"\n";
    let out = format!("base = \"minimal\"\n[[file]]\npath = \"/out\"\nlink = \"{}\"\n{file}", outside.path().display());
    let up = format!("base = \"minimal\"\n[[file]]\npath = \"/out\"\nlink = \"../../../../../../../etc\"\n{file}");
    let cases = [
        ("", "the packages brought no kernel into /boot: add one"),
        ("packages = [\"vmlinuz\"]\n", "the packages brought no /sbin/init: add one that does"),
        ("packages = [\"vmlinuz\", \"init\"]\n", "the packages brought neither update-initramfs nor dracut"),
        (out.as_str(), "'/out' is a symbolic link that leads to nothing in the tree"),
        (
            "base = \"minimal\"\n[[repository]]\nuri = \"http://127.0.0.1:9/x\"\nunsigned = true\n",
            "repository 'http://127.0.0.1:9/x': packages of RPM are installed only if they are signed",
        ),
    ];
    let build = || kitchen.build(imgutil(), &["--no-cache", "--node-files", "node-files", "tree"], None);
    for backend in BACKENDS {
        for (recipe, part) in cases {
            kitchen.begin(backend, recipe);
            let before = names(kitchen.path());
            let line = error(&build(), 1);
            assert!(line.contains(part), "{backend}: '{part}' is not in: {line}");
            assert_eq!(names(kitchen.path()), before, "{backend}");
        }
        assert_eq!(names(outside.path()), Vec::<String>::new(), "{backend}");
        // Upwards of the tree's root there is only itself.
        kitchen.begin(backend, &up);
        let built = build();
        assert!(built.status.success(), "{backend}: {}", text(&built.stderr));
        let laid = kitchen.path().join("tree/etc/file");
        assert_eq!((fs::read_to_string(&laid).unwrap().as_str(), laid.metadata().unwrap().uid()), ("x", 0));
        assert!(!Path::new("/etc/file").exists(), "{backend}");
        fs::remove_dir_all(kitchen.path().join("tree")).unwrap();
        fs::remove_file(kitchen.path().join("recipe.lock")).unwrap();
    }
}
