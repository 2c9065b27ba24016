//! `imgutil diff`, `list` and `prune`: what is shown, what is removed, and the exit status.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::cli::{Files, names, pack, run};
use common::mount::run as tool;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

fn status(packages: &[(&str, &str)]) -> String {
    let paragraph = |(name, version): &(&str, &str)| {
        format!("Package: {name}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {version}\n")
    };
    packages.iter().map(paragraph).collect::<Vec<_>>().join("\n")
}

/// A tree, and what became of it.
fn trees(work: &Path) -> (PathBuf, PathBuf) {
    let a = work.join("a");
    for directory in ["etc", "var/lib/dpkg", "gone/deep"] {
        fs::create_dir_all(a.join(directory)).unwrap();
    }
    for (path, text) in [
        ("etc/same", "same"),
        ("etc/content", "before"),
        ("etc/size", "short"),
        ("etc/mode", "m"),
        ("gone/deep/x", "x"),
    ] {
        fs::write(a.join(path), text).unwrap();
    }
    fs::write(a.join(OsStr::from_bytes(b"etc/\xff")), "not utf-8").unwrap();
    symlink("same", a.join("etc/link")).unwrap();
    for name in ["owner", "attribute", "capable", "alone", "joined", "one", "other"] {
        fs::write(a.join("etc").join(name), "equal").unwrap();
    }
    symlink("same", a.join("etc/its-owner")).unwrap();
    tool(Command::new("mknod").arg(a.join("etc/device")).args(["c", "1", "3"]));
    tool(Command::new("setfattr").args(["-n", "user.note", "-v", "before"]).arg(a.join("etc/attribute")));
    // Three names of one file, of which one will be another one's; and two that stay.
    for name in ["etc/also-one", "etc/moved"] {
        fs::hard_link(a.join("etc/one"), a.join(name)).unwrap();
    }
    fs::write(a.join("etc/kind"), "k").unwrap();
    fs::write(a.join("var/lib/dpkg/status"), status(&[("same", "1"), ("old", "2"), ("grown", "3")])).unwrap();

    let b = work.join("b");
    tool(Command::new("cp").arg("-a").arg(&a).arg(&b));
    fs::write(b.join("etc/content"), "after!").unwrap();
    fs::write(b.join("etc/size"), "longer text").unwrap();
    fs::set_permissions(b.join("etc/mode"), fs::Permissions::from_mode(0o4711)).unwrap();
    chown(b.join("etc/owner"), Some(5), Some(6)).unwrap();
    lchown(b.join("etc/its-owner"), Some(7), Some(0)).unwrap();
    fs::remove_file(b.join("etc/device")).unwrap();
    tool(Command::new("mknod").arg(b.join("etc/device")).args(["c", "1", "5"]));
    tool(Command::new("setfattr").args(["-n", "user.note", "-v", "after"]).arg(b.join("etc/attribute")));
    tool(Command::new("setcap").arg("cap_net_raw+ep").arg(b.join("etc/capable")));
    for (name, of) in [("etc/joined", "etc/alone"), ("etc/moved", "etc/other")] {
        fs::remove_file(b.join(name)).unwrap();
        fs::hard_link(b.join(of), b.join(name)).unwrap();
    }
    fs::remove_file(b.join("etc/link")).unwrap();
    symlink("content", b.join("etc/link")).unwrap();
    fs::remove_file(b.join("etc/kind")).unwrap();
    fs::create_dir(b.join("etc/kind")).unwrap();
    fs::remove_dir_all(b.join("gone")).unwrap();
    fs::create_dir_all(b.join("new/below")).unwrap();
    fs::write(b.join("new/below/file"), "n").unwrap();
    fs::write(b.join("var/lib/dpkg/status"), status(&[("same", "1"), ("fresh", "9"), ("grown", "3.1")])).unwrap();
    (a, b)
}

#[test]
fn what_differs_is_shown_for_images_and_trees_alike() {
    let work = tempfile::tempdir().unwrap();
    let (a, b) = trees(work.path());
    let (image_a, image_b) = (pack(&a, work.path(), "one", &[]), pack(&b, work.path(), "two", &[]));
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let keys = ["--key-file".to_owned(), text(&image_b.key), "--key-file".to_owned(), text(&image_a.key)];
    let mut outputs = Vec::new();
    for (from, to) in [(&a, &b), (&image_a.image, &image_b.image), (&image_a.image, &b), (&a, &image_b.image)] {
        let args = [vec!["diff".to_owned(), text(from), text(to)], keys.to_vec()].concat();
        let ran = run(&args);
        assert_eq!((ran.status, ran.stderr.as_str()), (1, ""));
        outputs.push(ran.stdout);
    }
    let lines: Vec<&str> = outputs[0].lines().collect();
    for line in [
        "packages: 1 added, 1 removed, 1 changed",
        "+ fresh 9 amd64",
        "- old 2 amd64",
        "~ grown 3 -> 3.1",
        "+ /new/ (2 files below it, 1 B)",
        "- /gone/ (2 files below it, 1 B)",
        "~ /etc/content: content",
        "~ /etc/kind: size 1 B -> 0 B, mode 0644 -> 0755, file -> directory",
        "~ /etc/link: target same -> content",
        "~ /etc/owner: owner 0:0 -> 5:6",
        "~ /etc/its-owner: owner 0:0 -> 7:0",
        "~ /etc/device: device",
        "~ /etc/attribute: xattrs",
        "~ /etc/capable: xattrs",
        "~ /etc/joined: links",
        "~ /etc/moved: links",
        "~ /etc/other: links",
        "~ /etc/mode: mode 0644 -> 4711",
        "~ /etc/size: size 5 B -> 11 B",
    ] {
        // The order of what changed is not the matter here.
        let sorted = |line: &str| {
            let mut parts: Vec<&str> = line.split([':', ',']).map(str::trim).collect();
            parts.sort_unstable();
            parts.join(",")
        };
        assert!(lines.iter().any(|seen| sorted(seen) == sorted(line)), "'{line}' is missing in\n{}", outputs[0]);
    }
    for same in ["/etc/same", "/new/below/file", "/etc/one", "/etc/also-one", "/etc/alone"] {
        assert!(!outputs[0].contains(same), "'{same}' is in\n{}", outputs[0]);
    }
    for output in &outputs[1..] {
        assert_eq!(output, &outputs[0], "images and trees are compared alike");
    }

    let json = run(["diff", &text(&a), &text(&b), "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["packages"]["changed"][0]["to"][0], "3.1");
    assert_eq!(json["added"].as_array().unwrap().len(), 3);
    let changed = json["changed"].as_array().unwrap();
    let mode = changed.iter().find(|changed| changed["path"] == "/etc/mode").unwrap();
    assert_eq!(
        (&mode["what"][0], mode["from"]["mode"].as_u64(), mode["to"]["mode"].as_u64()),
        (&"mode".into(), Some(0o644), Some(0o4711))
    );
}

#[test]
fn nothing_and_trouble_have_their_own_status() {
    let work = tempfile::tempdir().unwrap();
    let (a, _) = trees(work.path());
    let image = pack(&a, work.path(), "one", &[]);
    let (tree, file, key) = (a.to_str().unwrap(), image.image.to_str().unwrap(), image.key.to_str().unwrap());
    let same = run(["diff", tree, file, "--key-file", key]).good().stdout;
    assert!(same.contains("packages: 0 added, 0 removed, 0 changed") && same.contains("files: 0 added"), "{same}");
    // A time counts if it is asked for.
    tool(Command::new("touch").args(["-d", "2001-01-01"]).arg(a.join("etc/same")));
    run(["diff", tree, file, "--key-file", key]).good();
    let times = run(["diff", tree, file, "--key-file", key, "--times"]);
    assert!(times.status == 1 && times.stdout.contains("~ /etc/same: mtime"), "{}", times.stdout);

    fs::write(a.join("etc/ssh_host_x"), "").unwrap();
    fs::create_dir(a.join("tmp")).unwrap();
    fs::write(a.join("tmp/left"), "").unwrap();
    let scrubbed = run(["diff", file, tree, "--key-file", key, "--scrub"]);
    assert!(!scrubbed.stdout.contains("left") && scrubbed.stdout.contains("+ /tmp/"), "{}", scrubbed.stdout);

    run(["diff", tree, file]).one_line_error(2, &["encrypted with the key", "--key-file"]);
    let other = work.path().join("other.key");
    fs::write(&other, format!("{}\n", "5a".repeat(32))).unwrap();
    let (other, list) = (other.to_str().unwrap(), work.path().join("list.json"));
    let wrong = ["one.moor", "wrong key: the image wants key id ", "none of the given keys"];
    run(["diff", tree, file, "--key-file", other]).one_line_error(2, &wrong);
    run(["sbom", file, "--key-file", other, "-o", list.to_str().unwrap()]).one_line_error(1, &wrong);
    assert!(!list.exists());
    run(["diff", tree, work.path().join("none").to_str().unwrap()]).one_line_error(2, &["none", "No such file"]);
    run(["diff", key, tree]).one_line_error(2, &["one.key", "fewer than"]);
}

fn generations(work: &Path) -> Vec<Files> {
    let tree = work.join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "f").unwrap();
    let images = work.join("images");
    fs::create_dir(&images).unwrap();
    let web = "0d8b1d5e-5a3f-4a3d-9d6c-0a4f0c6a1b2c";
    let mut files = Vec::new();
    for serial in ["1", "2", "10", "9"] {
        let more = ["--lineage", web, "--serial", serial, "--name", "web"];
        files.push(pack(&tree, &images, &format!("web-{serial}"), &more));
    }
    files.push(pack(&tree, &images, "db", &[]));
    fs::write(images.join("other.moor"), "no image").unwrap();
    fs::write(images.join("web-1.moor.sig"), "signature").unwrap();
    files
}

#[test]
fn generations_are_listed_and_old_ones_pruned() {
    let work = tempfile::tempdir().unwrap();
    generations(work.path());
    let images = work.path().join("images");
    let directory = images.to_str().unwrap();
    let ran = run(["list", directory]).good();
    assert!(ran.stderr.contains("other.moor' is left alone"), "{}", ran.stderr);
    let first = |text: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| Path::new(name).extension().is_some_and(|end| end == "moor"))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(first(&ran.stdout), ["db.moor", "web-1.moor", "web-2.moor", "web-9.moor", "web-10.moor"]);
    let json: serde_json::Value = serde_json::from_str(&run(["list", directory, "--json"]).good().stdout).unwrap();
    assert_eq!(
        (&json[1]["file"], &json[1]["serial"], &json[1]["signed"]),
        (&"web-1.moor".into(), &1.into(), &true.into())
    );

    let before = names(&images);
    let ran = run(["prune", directory, "--keep", "2", "--dry-run"]).good();
    assert_eq!(first(&ran.stdout), ["web-1.moor", "web-2.moor"]);
    assert!(ran.stdout.contains("would remove 2 of 5 images"), "{}", ran.stdout);
    assert_eq!(names(&images), before);
    let ran = run(["prune", directory, "--keep", "2"]).good();
    assert!(ran.stdout.contains("removed 2 of 5 images"), "{}", ran.stdout);
    let gone = ["web-1.moor", "web-1.moor.sig", "web-2.moor"];
    let wanted: Vec<String> = before.into_iter().filter(|name| !gone.contains(&name.as_str())).collect();
    assert_eq!(names(&images), wanted, "keys, other images and what is no image stay");
    assert!(run(["prune", directory, "--keep", "2"]).good().stdout.contains("removed 0 of 3 images"));
    run(["prune", directory, "--keep", "0"]).one_line_error(1, &["--keep 0 would remove every generation"]);
    assert_eq!(run(["prune", "--keep", "1"]).status, 2, "a directory or --cache");
    run(["list", work.path().join("none").to_str().unwrap()]).one_line_error(1, &["cannot list", "none"]);
}

/// An image whose lineage was begun anew under its old name, and one that was packed over an old generation.
#[test]
fn each_lineage_of_a_name_keeps_its_newest_and_what_replaces_an_old_generation_is_the_newest() {
    let work = tempfile::tempdir().unwrap();
    let (tree, images) = (work.path().join("tree"), work.path().join("images"));
    for directory in [&tree, &images] {
        fs::create_dir(directory).unwrap();
    }
    let (first, second) = ("0d8b1d5e-5a3f-4a3d-9d6c-0a4f0c6a1b2c", "7f2c1d5e-5a3f-4a3d-9d6c-0a4f0c6a1b2d");
    let made = [(first, "1", "a"), (first, "2", "b"), (first, "3", "c"), (second, "1", "d"), (second, "2", "e")];
    for (lineage, serial, file) in made {
        let more = ["--lineage", lineage, "--serial", serial, "--name", "web", "--plain"];
        pack(&tree, &images, file, &more);
    }
    // The third one was not good, and the second is made again.
    pack(&tree, &images, "b", &["--plain", "--name", "web"]);
    let directory = images.to_str().unwrap();
    let listed: serde_json::Value = serde_json::from_str(&run(["list", directory, "--json"]).good().stdout).unwrap();
    let listed: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["file"].as_str().unwrap(), one["lineage"].as_str().unwrap(), one["serial"].as_u64().unwrap()))
        .collect();
    let expected = [
        ("a.moor", first, 1),
        ("c.moor", first, 3),
        ("b.moor", first, 4),
        ("d.moor", second, 1),
        ("e.moor", second, 2),
    ];
    assert_eq!(listed, expected);
    let ran = run(["prune", directory, "--keep", "1"]).good();
    assert!(ran.stdout.contains("removed 3 of 5 images"), "{}", ran.stdout);
    assert_eq!(names(&images), ["b.moor", "e.moor"]);
}

#[test]
fn base_trees_in_the_cache_of_builds_are_listed_and_pruned() {
    let work = tempfile::tempdir().unwrap();
    let base = work.path().join("base");
    let directory = work.path().to_str().unwrap();
    assert!(run(["prune", "--cache", directory]).good().stdout.contains("removed 0 of 0 base trees"));
    fs::create_dir(&base).unwrap();
    for (name, what, day) in [("a1", "debian-12 amd64, 170 packages", 1), ("b2", "old \u{1b}[31m", 0), ("c3", "new", 2)]
    {
        fs::write(base.join(format!("{name}.tar.zst")), vec![0; 3000]).unwrap();
        let note = base.join(format!("{name}.toml"));
        fs::write(&note, format!("what = {what:?}\nsha256 = \"\"\n").replace("\\u{1b}", "\\u001b")).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000 + day * 86_400);
        fs::File::open(&note).unwrap().set_modified(time).unwrap();
    }
    fs::write(base.join("begun.tar.zst"), "not complete").unwrap();
    let listed = run(["list", "--cache", directory]).good().stdout;
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!(lines.len(), 4, "{listed}");
    assert!(lines[0].starts_with("LAST USED") && lines[1].starts_with("2023-11-16T22:13:20Z"), "{listed}");
    assert!(lines[2].contains("debian-12 amd64, 170 packages") && lines[2].ends_with("a1.tar.zst"), "{listed}");
    assert!(!listed.contains('\u{1b}'), "{listed}");
    let json: serde_json::Value =
        serde_json::from_str(&run(["list", "--cache", directory, "--json"]).good().stdout).unwrap();
    assert_eq!((&json[0]["what"], &json[0]["bytes"]), (&"new".into(), &3000.into()));

    let before = names(&base);
    // A build that keeps a tree holds this lock.
    let build = fs::File::open(&base).unwrap();
    build.lock_shared().unwrap();
    let ran = run(["prune", "--cache", directory, "--keep", "2", "--dry-run"]).good();
    let expected = "would remove 1 of 3 base trees";
    assert!(ran.stdout.contains("b2.tar.zst") && ran.stdout.contains(expected), "{}", ran.stdout);
    assert_eq!(names(&base), before);
    let ran = run(["prune", "--cache", directory, "--keep", "2", "--json"]).good();
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&json["bytes"], &json["removed"][0]["what"]), (&3000.into(), &"old \u{1b}[31m".into()));
    assert_eq!(names(&base), ["a1.tar.zst", "a1.toml", "begun.tar.zst", "c3.tar.zst", "c3.toml"]);
    drop(build);
    // Nobody is making it any more.
    let ran = run(["prune", "--cache", directory, "--dry-run"]).good();
    assert!(ran.stdout.contains("not finished") && ran.stdout.contains("would remove 1 of 3"), "{}", ran.stdout);
    run(["prune", "--cache", directory]).good();
    assert_eq!(names(&base), ["a1.tar.zst", "a1.toml", "c3.tar.zst", "c3.toml"]);
    run(["prune", "--cache", directory, "--keep", "0"]).good();
    assert!(names(&base).is_empty());
    assert_eq!(run(["list", directory, "--cache", directory]).status, 2);
}
