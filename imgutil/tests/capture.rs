//! `imgutil capture` over a real sshd, of a system on three file systems (ext4, XFS, btrfs) in files. What device-mapper makes is captured
//! in a VM, because the host has none (tests/lab).
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
mod rpm_repo;

use common::cli::{Ran, finish, names, run};
use common::mount::{own_mounts, run as tool};
use common::node::Node;
use rpm_repo::{Key, Package, build as build_packages};
use serde_json::Value;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is odd and what is secret, on each file system.
const PLANT: &str = r#"
for place in etc/ssh/ssh_host_ed25519_key root/.ssh/id_ed25519 home/op/.ssh/id_ed25519; do cp "$D/planted" "$place"; done
ln home/op/.ssh/id_ed25519 home/op/.ssh/same
echo 'mysql -ppassword' > root/.bash_history
echo 'a token' > var/log/app.log
echo 0123456789abcdef0123456789abcdef > etc/machine-id
cp /bin/true usr/bin/true
ln usr/bin/true usr/bin/same
ln -s true usr/bin/link
setfattr -n user.note -v kept usr/bin/true
setcap cap_net_raw+ep usr/bin/true
mknod dev/null c 1 3
truncate -s 40M home/sparse
echo end >> home/sparse
head -c 3000000 /dev/urandom > home/op/large
printf x > "home/op/$(printf 'not\377utf-8')"
chown -R 1000:1000 home/op
# An example that a package ships, with its sum.
mkdir -p usr/share/doc/example
cp "$D/planted" usr/share/doc/example/key.pem
md5sum usr/share/doc/example/key.pem > var/lib/dpkg/info/example.md5sums
printf 'Package: example\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n' > var/lib/dpkg/status
"#;

/// Those of them that no image may have.
const PLANTED: [&str; 6] = [
    "etc/ssh/ssh_host_ed25519_key",
    "root/.ssh/id_ed25519",
    "root/.bash_history",
    "home/op/.ssh/id_ed25519",
    // Another name of the same.
    "home/op/.ssh/same",
    "var/log/app.log",
];

/// Where the node's image comes out, and where it is unpacked.
struct Results {
    image: PathBuf,
    key: PathBuf,
    tree: PathBuf,
}

impl Results {
    fn of(dir: &Path) -> Self {
        let out = dir.join("out");
        Self { image: out.join("node.moor"), key: out.join("node.key"), tree: dir.join("unpacked") }
    }

    fn imgutil(&self, arguments: &[&str]) -> Ran {
        let image = [self.image.as_os_str(), "--key-file".as_ref(), self.key.as_os_str()];
        run(arguments.iter().map(OsStr::new).chain(image)).good()
    }

    fn inspect(&self) -> Value {
        serde_json::from_str(&self.imgutil(&["inspect", "--json"]).stdout).unwrap()
    }

    fn unpack(&self) {
        run([
            "unpack".as_ref(),
            self.image.as_os_str(),
            self.tree.as_os_str(),
            "--key-file".as_ref(),
            self.key.as_os_str(),
        ])
        .good();
    }
}

fn capture(node: &Node, root: &str, more: &[&str]) -> Ran {
    finish(&node.capture(root, more).args(["--level", "1"]).output().unwrap())
}

#[test]
fn a_system_on_several_file_systems_becomes_one_image_without_its_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), dir.path(), PLANT);
    let excluded = dir.path().join("exclude");
    std::fs::write(&excluded, "/home/op/large\n/no/such/file\n").unwrap();
    let ran = capture(&node, &node.target(), &["--exclude", excluded.to_str().unwrap()]).good();
    assert!(ran.stderr.contains("patterns that match nothing: /no/such/file"), "{}", ran.stderr);
    assert_eq!(names(&dir.path().join("out")), ["node.key", "node.moor"]);
    let results = Results::of(dir.path());
    results.imgutil(&["verify"]);

    let inspection = results.inspect();
    let filesystems = inspection["metadata"]["filesystems"].as_array().unwrap();
    let mounts: Vec<&str> = filesystems.iter().map(|part| part["mount"].as_str().unwrap()).collect();
    assert_eq!(mounts, ["/", "/home", "/var"], "{inspection:#}");
    for (part, kind) in filesystems.iter().zip(["ext4", "xfs", "btrfs"]) {
        assert_eq!(part["offset"].as_u64().unwrap() % (1 << 20), 0);
        let layout: Value = serde_json::from_str(part["layout"].as_str().unwrap()).unwrap();
        assert_eq!(
            (layout["type"].as_str(), layout["on"][0]["type"].as_str()),
            (Some(kind), Some("loop")),
            "{layout:#}"
        );
    }
    assert_eq!(inspection["metadata"]["os"], "debian-12");

    results.unpack();
    let out = &results.tree;
    for planted in PLANTED {
        assert!(std::fs::symlink_metadata(out.join(planted)).is_err(), "'{planted}' is in the image");
    }
    assert!(!out.join("home/op/large").exists(), "what was excluded is in the image");
    assert_eq!(std::fs::read(out.join("etc/machine-id")).unwrap(), b"", "the machine's id is in the image");
    let stat = |name: &str| std::fs::symlink_metadata(out.join(name)).unwrap();
    assert_eq!(std::fs::read(out.join("usr/bin/true")).unwrap(), std::fs::read("/bin/true").unwrap());
    assert_eq!((stat("usr/bin/true").ino(), stat("usr/bin/true").nlink()), (stat("usr/bin/same").ino(), 2));
    assert_eq!(std::fs::read_link(out.join("usr/bin/link")).unwrap(), PathBuf::from("true"));
    assert_eq!(
        (stat("home/sparse").len(), stat("home/op").uid(), stat("dev/null").rdev()),
        ((40 << 20) + 4, 1000, 0x103)
    );
    let mut value = [0; 64];
    for (name, expected) in [("user.note", 4), ("security.capability", 20)] {
        let length = rustix::fs::getxattr(out.join("usr/bin/true"), name, &mut value).unwrap();
        assert_eq!(length, expected, "{name}");
    }
    // Image and tree are the same also to those who look into an image without unpacking it.
    let compared = results.imgutil(&["diff", out.to_str().unwrap()]);
    assert!(compared.stdout.ends_with(" packages (+0 B)\n"), "{}", compared.stdout);
    let sbom: Value = serde_json::from_str(&results.imgutil(&["sbom"]).stdout).unwrap();
    let packages = sbom["packages"].as_array().unwrap();
    assert!(packages.iter().any(|package| package["name"] == "example"), "{sbom:#}");
    // Everything else of the system is there.
    let files = std::fs::read(dir.path().join("files")).unwrap();
    for name in files.split(|byte| *byte == b'\n').filter(|name| !name.is_empty()) {
        let path = Path::new(OsStr::from_bytes(name));
        let known = |name: &str| path == Path::new(".").join(name);
        if !PLANTED.iter().any(|planted| known(planted)) && !known("home/op/large") {
            assert!(std::fs::symlink_metadata(out.join(path)).is_ok(), "'{}' is missing", path.display());
        }
    }
}

/// Keys where no rule removes them: in a small file, behind a megabyte of holes and text, by a name, and one that a package has shipped
/// and somebody has changed.
const KEYS: &str = r#"
mkdir -p etc/app var/lib/app usr/share/doc/example
cp "$D/planted" etc/app/tls.key
(cat "$D/planted"; head -c 2000000 /dev/zero | tr '\0' '#') > var/lib/app/large
truncate -s 500K home/op/backup
cat "$D/planted" >> home/op/backup
truncate -s 3M home/op/backup
echo store > home/op/login.kdbx
cp "$D/planted" usr/share/doc/example/key.pem
echo '00000000000000000000000000000000  usr/share/doc/example/key.pem' > var/lib/dpkg/info/example.md5sums
"#;

#[test]
fn a_node_with_a_private_key_left_is_refused_until_the_user_has_decided() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), dir.path(), KEYS);
    let all = ["/etc/app/tls.key", "/var/lib/app/large", "/home/op/backup", "/home/op/login.kdbx"];
    let example = "/usr/share/doc/example/key.pem";
    let refused = |more: &[&str], keys: &[&str]| {
        let ran = capture(&node, &node.target(), more);
        assert_eq!(ran.status, 1, "{}{}", ran.stdout, ran.stderr);
        let error = ran.stderr.lines().find(|line| line.starts_with("imgutil: error: ")).unwrap_or_default().to_owned();
        for part in
            ["cannot capture 'node': the node holds ", "leave it out with --exclude, or allow it with --allow-key PATH"]
        {
            assert!(error.contains(part), "'{part}' is missing in: {}", ran.stderr);
        }
        for key in all.iter().chain([&example]) {
            assert_eq!(error.contains(&format!("'{key}' (")), keys.contains(key), "{key}: {error}");
        }
        assert_eq!(node.left_here(), Vec::<String>::new());
    };
    // Those on every file system are named at once.
    refused(&[], &[&all[..], &[example]].concat());
    // The user leaves some out and allows others; one is left.
    let excluded = dir.path().join("exclude");
    std::fs::write(&excluded, "/home/op/backup\n*.kdbx\n").unwrap();
    let decided =
        ["--exclude", excluded.to_str().unwrap(), "--allow-key", "/etc/app/*.key", "--allow-key", "/var/lib/app/large"];
    refused(&decided, &[example]);
    let allowed = [&decided[..], &["--allow-key", example]].concat();
    capture(&node, &node.target(), &allowed).good();
    let results = Results::of(dir.path());
    results.unpack();
    let planted = std::fs::read(dir.path().join("planted")).unwrap();
    for (name, length) in [("etc/app/tls.key", planted.len()), ("var/lib/app/large", planted.len() + 2_000_000)] {
        let bytes = std::fs::read(results.tree.join(name)).unwrap();
        assert!(bytes.starts_with(&planted) && bytes.len() == length, "{name}");
    }
    assert!(!results.tree.join("home/op/backup").exists() && !results.tree.join("home/op/login.kdbx").exists());
}

#[test]
fn a_capture_that_fails_says_why_and_leaves_neither_image_nor_key() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), dir.path(), "");
    for (root, reason) in
        [("/nowhere", "nothing is mounted at '/nowhere'"), ("relative", "'relative' is no absolute path")]
    {
        capture(&node, root, &[]).one_line_error(1, &["cannot capture 'node': ", reason]);
        assert_eq!(node.left_here(), Vec::<String>::new());
    }
    // A key that is there belongs to another image.
    let key = dir.path().join("out/node.key");
    std::fs::write(&key, "another image's").unwrap();
    let reasons = ["node.key' exists already: a key belongs to one image, so its file is never overwritten"];
    capture(&node, &node.target(), &[]).one_line_error(1, &reasons);
    assert_eq!(node.left_here(), ["node.key"]);
    assert_eq!(std::fs::read_to_string(&key).unwrap(), "another image's");
    std::fs::remove_file(&key).unwrap();
    // Nobody listens there.
    let config = dir.path().join("ssh_config");
    std::fs::write(&config, "Host node\n  HostName 127.0.0.1\n  Port 1\n  BatchMode yes\n").unwrap();
    let reasons = ["cannot capture 'node': ssh failed: ", "port 1: Connection refused"];
    capture(&node, &node.target(), &[]).one_line_error(1, &reasons);
    assert_eq!(node.left_here(), Vec::<String>::new());
}

/// A file whose bytes on the disk are not those that btrfs has the sums of: reading it is an error of input.
const DAMAGED: &str = r#"
yes MOORING-DAMAGED | head -c 400000 > var/lib/damaged
umount var
at=$(grep -obUa -m 1 MOORING-DAMAGED "$D/var.img" | head -n 1 | cut -d : -f 1)
printf x | dd of="$D/var.img" bs=1 seek="$at" conv=notrunc status=none
mount -o loop "$D/var.img" var
"#;

#[test]
fn a_file_that_the_node_cannot_read_is_missed() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), dir.path(), DAMAGED);
    let reasons = ["'/var': files on it cannot be read", "./lib/damaged", "Input/output error"];
    let ran = capture(&node, &node.target(), &[]);
    assert_eq!(ran.status, 1, "{}{}", ran.stdout, ran.stderr);
    let error = ran.stderr.lines().find(|line| line.starts_with("imgutil: error: ")).unwrap_or_default();
    for reason in reasons {
        assert!(error.contains(reason), "'{reason}' is missing in: {}", ran.stderr);
    }
    assert_eq!(node.left_here(), Vec::<String>::new());
}

/// An example of a key, as packages ship them.
const EXAMPLE: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
                       -----END PRIVATE KEY-----\n";

/// Packages of such a system, one of them with an epoch.
const PACKAGES: [Package; 2] = [
    Package {
        files: &[
            ("/usr/share/doc/example/key.pem", EXAMPLE, "0644,root,root"),
            ("/usr/share/doc/example/changed.pem", EXAMPLE, "0644,root,root"),
        ],
        ..Package::empty("example")
    },
    Package { version: ("2.0", "3.el9"), header: "Epoch: 1", ..Package::empty("hello") },
];

/// They are installed by RPM alone, in the place of EL (Debian's RPM, which stands for the node's, looks somewhere else). Its database has the
/// key of a repository among its packages. One of the two examples was changed since.
const RPM_SYSTEM: &str = r#"
rm -r var/lib/dpkg
mkdir -p var/lib/rpm
place=$(HOME=/root rpm --eval '%_dbpath')
if [ "$place" != /var/lib/rpm ]; then
    mkdir -p ".${place%/*}"
    ln -sr var/lib/rpm ".$place"
fi
rpmkeys --define '_dbpath /var/lib/rpm' --root "$PWD" --import "$D/RPM-GPG-KEY"
rpm --define '_dbpath /var/lib/rpm' --define '_pkgverify_level none' --root "$PWD" -i "$D"/packages/*.rpm
echo changed >> usr/share/doc/example/changed.pem
"#;

#[test]
fn a_system_of_rpms_has_its_packages_with_their_epochs_and_their_own_keys_are_public() {
    let dir = tempfile::tempdir().unwrap();
    build_packages(&dir.path().join("packages"), &PACKAGES);
    Key::new().export(&dir.path().join("RPM-GPG-KEY"));
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), dir.path(), RPM_SYSTEM);
    let ran = capture(&node, &node.target(), &[]);
    let error = ran.stderr.lines().find(|line| line.starts_with("imgutil: error: ")).unwrap_or_default();
    assert!(ran.status == 1 && error.contains("example/changed.pem") && !error.contains("key.pem"), "{}", ran.stderr);

    capture(&node, &node.target(), &["--allow-key", "changed.pem"]).good();
    let results = Results::of(dir.path());
    let expected = serde_json::json!([
        { "name": "example", "version": "1-1", "arch": "noarch" },
        { "name": "hello", "version": "1:2.0-3.el9", "arch": "noarch" },
    ]);
    assert_eq!(results.inspect()["metadata"]["packages"], expected);
    // The same as is read from the database that is in the image.
    let sbom: Value = serde_json::from_str(&results.imgutil(&["sbom"]).stdout).unwrap();
    let versions: Vec<_> = sbom["packages"].as_array().unwrap().iter().map(|package| &package["versionInfo"]).collect();
    assert!(versions.contains(&&"1:2.0-3.el9".into()) && versions.contains(&&"1-1".into()), "{sbom:#}");
}

#[test]
fn a_capture_over_an_image_is_its_next_generation() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), dir.path(), "");
    let results = Results::of(dir.path());
    let generation = || {
        capture(&node, &node.target(), &[]).good();
        let inspection = results.inspect();
        std::fs::remove_file(&results.key).unwrap();
        (inspection["lineage"].clone(), inspection["serial"].clone())
    };
    let (lineage, serial) = generation();
    assert_eq!(serial, 1);
    let signatures = dir.path().join("out/node.moor.sig");
    std::fs::write(&signatures, "of the image before").unwrap();
    assert_eq!(generation(), (lineage, 2.into()));
    assert!(!signatures.exists(), "they would be over another image");
}

#[test]
fn a_full_disk_here_is_not_said_to_be_the_nodes_fault() {
    own_mounts();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    tool(Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "none"]).arg(&out));
    let large = "head -c 150000000 /dev/urandom > home/op/large";
    let node = Node::start(env!("CARGO_BIN_EXE_imgutil"), dir.path(), large);
    let ran = capture(&node, &node.target(), &[]);
    assert_eq!(ran.status, 1, "{}{}", ran.stdout, ran.stderr);
    let error = ran.stderr.lines().find(|line| line.starts_with("imgutil: error: ")).unwrap_or_default();
    let begin = format!("imgutil: error: cannot capture 'node': cannot write '{}'", out.join("node.moor").display());
    assert!(error.starts_with(&begin) && error.ends_with("; make room there, or choose another place"), "{error}");
    // That nobody took what its tar sent came of it.
    let is_blamed = ["ssh failed", "the command ended"].iter().any(|blame| error.contains(blame));
    assert!(error.contains("No space left on device") && !is_blamed, "{error}");
    assert_eq!(node.left_here(), Vec::<String>::new());
    drop(node);
    tool(Command::new("umount").arg(&out));
}
