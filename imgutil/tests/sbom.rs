//! `imgutil sbom`: SPDX that the validator of the SPDX project takes, from the databases that dpkg and RPM really write.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;
mod common;

use common::cli::{pack, run};
use common::mount::run as tool;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The validator of the SPDX project (`spdx-tools`), in an environment of its own that stays for the next run.
fn validator() -> PathBuf {
    const VERSION: &str = "0.8.3";
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("spdx-tools-{VERSION}"));
    let lock = fs::File::create(place.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    let program = place.join("bin/pyspdxtools");
    if !place.join("complete").exists() {
        let _ = fs::remove_dir_all(&place);
        tool(Command::new("python3").args(["-m", "venv"]).arg(&place));
        let pip = place.join("bin/pip");
        tool(Command::new(pip).args([
            "install",
            "--quiet",
            "--disable-pip-version-check",
            &format!("spdx-tools=={VERSION}"),
        ]));
        fs::write(place.join("complete"), "").unwrap();
    }
    program
}

fn validated(path: &Path) -> Value {
    tool(Command::new(validator()).arg("--infile").arg(path).args(["--version", "SPDX-2.3"]));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn package<'a>(document: &'a Value, name: &str) -> &'a Value {
    let packages = document["packages"].as_array().unwrap();
    packages.iter().find(|package| package["name"] == name).unwrap_or_else(|| panic!("no package {name}"))
}

#[test]
fn the_validator_would_see_a_mistake() {
    let work = tempfile::tempdir().unwrap();
    fs::create_dir(work.path().join("tree")).unwrap();
    let path = work.path().join("tree.spdx.json");
    run(["sbom", work.path().join("tree").to_str().unwrap(), "-o", path.to_str().unwrap()]).good();
    let mut document = validated(&path);
    document["packages"][0]["licenseDeclared"] = "no such licence".into();
    fs::write(&path, document.to_string()).unwrap();
    let output = Command::new(validator()).arg("--infile").arg(&path).args(["--version", "SPDX-2.3"]).output().unwrap();
    assert!(!output.status.success());
}

#[test]
fn a_debian_image_has_all_its_packages() {
    let work = build_tree::scratch();
    let tree = build_tree::untouched_tree();
    let files = pack(&tree, work.path(), "debian", &[]);
    let (image, key) = (files.image.to_str().unwrap(), files.key.to_str().unwrap());
    let path = work.path().join("debian.spdx.json");
    run(["sbom", image, "--key-file", key, "-o", path.to_str().unwrap()]).good();
    let document = validated(&path);

    // What dpkg itself lists.
    let admin = format!("--admindir={}", tree.join("var/lib/dpkg").display());
    let listed =
        tool(Command::new("dpkg-query").args([&admin, "-W", "-f", "${Package} ${Version} ${Architecture}\\n"]));
    let listed: Vec<&str> = listed.lines().collect();
    assert_eq!(document["packages"].as_array().unwrap().len(), listed.len() + 1, "and the image itself");
    for line in listed {
        let [name, version, arch] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let package = package(&document, name);
        assert_eq!(package["versionInfo"], version, "{name}");
        let purl = package["externalRefs"][0]["referenceLocator"].as_str().unwrap();
        assert!(purl.starts_with("pkg:deb/debian/") && purl.ends_with(&format!("arch={arch}")), "{purl}");
    }
    let dpkg = package(&document, "dpkg");
    assert!(dpkg["supplier"].as_str().unwrap().starts_with("Organization: Dpkg Developers ("), "{dpkg}");
    let licensed =
        document["packages"].as_array().unwrap().iter().filter(|package| package["licenseDeclared"] != "NOASSERTION");
    assert!(licensed.count() > 5, "some licences are known");
    let digest =
        serde_json::from_str::<Value>(&run(["inspect", image, "--json"]).good().stdout).unwrap()["digest"].clone();
    assert!(document["documentNamespace"].as_str().unwrap().ends_with(digest.as_str().unwrap()));

    // The same of the tree, and the image's is the same each time.
    let of_tree = run(["sbom", tree.to_str().unwrap()]).good().stdout;
    let of_tree: Value = serde_json::from_str(&of_tree).unwrap();
    assert_eq!(of_tree["packages"].as_array().unwrap()[1..], document["packages"].as_array().unwrap()[1..]);
    let again = run(["sbom", image, "--key-file", key]).good().stdout;
    assert_eq!(again, fs::read_to_string(&path).unwrap());
}

/// Builds two packages and installs them with `rpm` into a tree, with its database (sqlite: Debian's RPM writes no other) at `place`.
fn rpm_tree(work: &Path, name: &str, place: &str) -> PathBuf {
    let tree = work.join(name);
    let database = tree.join(place);
    fs::create_dir_all(&database).unwrap();
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/os-release"), "ID=\"rocky\"\nVERSION_ID=\"9.4\"\nPRETTY_NAME=\"Rocky Linux 9.4\"\n")
        .unwrap();
    let top = format!("_topdir {}", work.join("rpmbuild").display());
    let mut packages = Vec::new();
    // The second one's header does not fit on a page of the database.
    let many: Vec<String> = (0..600).map(|index| format!("/usr/share/many/some-file-{index:05}")).collect();
    let many = many.join("\n") + "\n";
    for (name, epoch, files, fill) in [
        ("one", "Epoch: 3\n", "/etc/one.key\n", "mkdir -p %{buildroot}/etc; cp $RPM_SOURCE_KEY %{buildroot}/etc/one.key".to_owned()),
        ("many", "", many.as_str(), "mkdir -p %{buildroot}/usr/share/many; for i in $(seq -f %05g 0 599); do echo $i > %{buildroot}/usr/share/many/some-file-$i; done".to_owned()),
    ] {
        let spec = work.join(format!("{name}.spec"));
        let text = format!(
            "Name: {name}\nVersion: 1.2\nRelease: 3.el9\n{epoch}Summary: s\nLicense: GPLv2+ and MIT\nVendor: Mooring Tests\n\
             URL: https://mooring.example/{name}\nBuildArch: noarch\n%description\nd\n%install\n{fill}\n%files\n{files}"
        );
        fs::write(&spec, text).unwrap();
        tool(Command::new("rpmbuild").args(["-bb", "--define", &top]).arg(&spec).env("RPM_SOURCE_KEY", work.join("key.pem")));
        packages.push(work.join(format!("rpmbuild/RPMS/noarch/{name}-1.2-3.el9.noarch.rpm")));
    }
    let path = format!("_dbpath /{place}");
    tool(
        Command::new("rpm")
            .args(["--define", &path, "--define", "_pkgverify_level none", "-i", "--nodeps", "--noscripts", "--root"])
            .arg(&tree)
            .args(&packages),
    );
    tree
}

/// Turns a tree's database into the format of SUSE (`lib/backend/ndb/rpmpkg.c`), which Debian's RPM cannot write: a header, slots in
/// pages of 4 KiB, blobs in units of 16 bytes.
fn as_ndb(database: &Path) {
    const SCRIPT: &str = r"
import sqlite3, struct, sys, os
rows = sqlite3.connect(sys.argv[1] + '/rpmdb.sqlite').execute('SELECT hnum, blob FROM Packages').fetchall()
slots, blobs, place = b'', b'', 4096 // 16
for number, blob in rows:
    data = struct.pack('<4sIII', b'BlbS', number, 1, len(blob)) + blob + b'\0' * 12
    data += b'\0' * (-len(data) % 16)
    slots += struct.pack('<4sIII', b'Slot', number, place, len(data) // 16)
    blobs += data
    place += len(data) // 16
slots += struct.pack('<4sIII', b'Slot', 0, 0, 0)
head = struct.pack('<4sIIII', b'RpmP', 0, 7, 1, len(rows) + 1).ljust(32, b'\0')
open(sys.argv[1] + '/Packages.db', 'wb').write((head + slots).ljust(4096, b'\0') + blobs)
for name in os.listdir(sys.argv[1]):
    if name.startswith('rpmdb.sqlite'):
        os.unlink(sys.argv[1] + '/' + name)
";
    tool(Command::new("python3").args(["-c", SCRIPT]).arg(database));
}

/// Turns a tree's database into the format of EL 8: Berkeley DB, written by Berkeley DB itself (Debian's Perl has it).
fn as_berkeley(database: &Path) {
    const DUMP: &str = r"
import sqlite3, sys, os
rows = sqlite3.connect(sys.argv[1] + '/rpmdb.sqlite').execute('SELECT hnum, blob FROM Packages').fetchall()
with open(sys.argv[1] + '/dump', 'w') as dump:
    # Number 0 has the highest number that was given.
    dump.write('0 %s\n' % len(rows).to_bytes(4, 'little').hex())
    for number, blob in rows:
        dump.write('%d %s\n' % (number, blob.hex()))
for name in os.listdir(sys.argv[1]):
    if name.startswith('rpmdb.sqlite'):
        os.unlink(sys.argv[1] + '/' + name)
";
    const FILL: &str = r#"use DB_File; my (%h, $dump);
tie %h, "DB_File", "$ARGV[0]/Packages", O_RDWR|O_CREAT, 0644, $DB_HASH or die "$!";
open($dump, "<", "$ARGV[0]/dump") or die "$!";
while (<$dump>) { chomp; my ($number, $hex) = split / /; $h{pack("V", $number)} = pack("H*", $hex); }
untie %h; unlink "$ARGV[0]/dump";"#;
    tool(Command::new("python3").args(["-c", DUMP]).arg(database));
    tool(Command::new("perl").args(["-e", FILL]).arg(database));
}

#[test]
fn rpm_s_databases_are_read_as_rpm_reads_them() {
    let work = tempfile::tempdir().unwrap();
    let key = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
    fs::write(work.path().join("key.pem"), key).unwrap();
    for (backend, place) in [("sqlite", "usr/lib/sysimage/rpm"), ("ndb", "var/lib/rpm"), ("berkeley", "var/lib/rpm")] {
        let tree = rpm_tree(work.path(), backend, place);
        let database = match backend {
            "ndb" => {
                as_ndb(&tree.join(place));
                "Packages.db"
            }
            "berkeley" => {
                as_berkeley(&tree.join(place));
                "Packages"
            }
            _ => "rpmdb.sqlite",
        };
        assert!(names_of(&tree.join(place)).iter().any(|name| name == database), "{backend}");
        let path = work.path().join(format!("{backend}.spdx.json"));
        run(["sbom", tree.to_str().unwrap(), "-o", path.to_str().unwrap()]).good();
        let document = validated(&path);
        assert_eq!(document["packages"].as_array().unwrap().len(), 3, "{backend}");
        let one = package(&document, "one");
        assert_eq!(one["versionInfo"], "3:1.2-3.el9");
        assert_eq!(one["licenseDeclared"], "GPL-2.0-or-later AND MIT");
        assert_eq!(one["supplier"], "Organization: Mooring Tests");
        assert_eq!(one["externalRefs"][0]["referenceLocator"], "pkg:rpm/rocky/one@1.2-3.el9?arch=noarch&epoch=3");
        assert_eq!(package(&document, "many")["homepage"], "https://mooring.example/many");

        // A key that the package ships is public, until somebody changes it.
        let files = pack(&tree, work.path(), backend, &[]);
        let inspected =
            run(["inspect", files.image.to_str().unwrap(), "--key-file", files.key.to_str().unwrap(), "--json"]);
        let inspected: Value = serde_json::from_str(&inspected.good().stdout).unwrap();
        assert_eq!(inspected["metadata"]["packages"].as_array().unwrap().len(), 2);
        fs::write(tree.join("etc/one.key"), key.replace("MC4C", "MC4D")).unwrap();
        let image = work.path().join("refused.moor");
        run(["pack", tree.to_str().unwrap(), "--plain", "-o", image.to_str().unwrap()])
            .one_line_error(1, &["/etc/one.key"]);
    }
}

#[test]
fn a_damaged_database_is_an_error_that_names_it() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    let place = tree.join("var/lib/rpm");
    fs::create_dir_all(&place).unwrap();
    let ran = |name: &str, bytes: &[u8]| {
        fs::write(place.join(name), bytes).unwrap();
        let ran = run(["sbom", tree.to_str().unwrap()]);
        fs::remove_file(place.join(name)).unwrap();
        ran
    };
    ran("rpmdb.sqlite", b"no database").one_line_error(1, &["/var/lib/rpm/rpmdb.sqlite", "no SQLite database"]);
    ran("Packages.db", b"RpmP\0\0\0\0\0\0\0\0\xff\xff\xff\xff").one_line_error(1, &["Packages.db", "damaged"]);
    ran("Packages", b"no database").one_line_error(1, &["/var/lib/rpm/Packages", "no hash of Berkeley DB"]);
    // None at all: an empty list is no list.
    let empty = run(["sbom", tree.to_str().unwrap()]).good();
    assert!(empty.stderr.contains("tree' has no packages that dpkg or rpm knows of"), "{}", empty.stderr);
    // Every byte that can be changed in a header page: an answer, never a panic or a wait.
    fs::write(work.path().join("key.pem"), "k").unwrap();
    let good = rpm_tree(work.path(), "sqlite", "var/lib/rpm");
    let bytes = fs::read(good.join("var/lib/rpm/rpmdb.sqlite")).unwrap();
    for at in (0..bytes.len().min(6000)).step_by(211) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x55;
        let ran = ran("rpmdb.sqlite", &bytes);
        assert!(
            ran.status == 0 || (ran.status == 1 && ran.stderr.starts_with("imgutil: error: ")),
            "{at}: {}",
            ran.stderr
        );
    }
}

fn names_of(directory: &Path) -> Vec<String> {
    common::cli::names(directory)
}
