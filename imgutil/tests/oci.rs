//! Root trees from container images: what layers come to, and what a hostile image is stopped at.
#![allow(clippy::unwrap_used)]

mod common;
mod oci_image;

use common::snapshot::snapshot;
use imgutil::oci::{Image, Limits, OciError, Source};
use oci_image::{Compression, Entry, Layout, directory, file, hard_link, link, tar};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A tree made of an image, or why not.
struct Unpacked {
    scratch: tempfile::TempDir,
    result: Result<(), OciError>,
}

impl Unpacked {
    fn tree(&self) -> PathBuf {
        self.scratch.path().join("tree")
    }

    fn good(self) -> Self {
        if let Err(error) = &self.result {
            panic!("{error}");
        }
        self
    }

    fn error(&self) -> String {
        self.result.as_ref().unwrap_err().to_string()
    }

    fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.tree().join(path)).ok()
    }

    /// All paths, sorted.
    fn paths(&self) -> Vec<String> {
        let found = snapshot(&self.tree());
        found.into_keys().map(|path| path.display().to_string()).filter(|path| !path.is_empty()).collect()
    }
}

fn unpack(source: &str) -> Unpacked {
    unpack_for(source, "amd64", Limits::default())
}

fn unpack_for(source: &str, architecture: &str, limits: Limits) -> Unpacked {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let tree = scratch.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    let root = std::fs::File::open(&tree).unwrap();
    let result = source
        .parse::<Source>()
        .and_then(|source| Image::open(&source, architecture))
        .and_then(|image| image.unpack(root.as_fd(), limits, &mut |_| true));
    // Whatever an image says, nothing appears beside the tree.
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 1);
    Unpacked { scratch, result }
}

/// An image of layers that are given as entries.
fn image(layers: &[&[Entry]]) -> Layout {
    let mut layout = Layout::new();
    layout.add("latest", "amd64", &layers.iter().map(|entries| tar(entries)).collect::<Vec<_>>(), Compression::Gzip);
    layout
}

fn source(layout: &Layout) -> String {
    format!("oci:{}", layout.path().display())
}

#[test]
fn layers_of_every_compression_come_to_the_tree_that_tar_makes() {
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let made = work.path().join("made");
    let script = "mkdir -p \"$1/etc/deep\" \"$1/bin\"; cd \"$1\"
        echo content >etc/file; chmod 4711 etc/file; chown 12:34 etc/file; ln etc/file etc/hard; ln -s ../bin etc/deep/soft
        mkfifo -m 600 etc/pipe; mknod -m 640 etc/device b 259 1048575; mknod etc/char c 5 1; chmod 1777 etc/deep
        setfattr -n user.mark -v value etc/file; setfattr -n trusted.mark -v t etc/deep
        touch -d @1000000000.5 etc/file; touch -h -d @1000000001 etc/deep/soft; truncate -s 3000000 bin/zeros
        long=$(printf 'n%.0s' $(seq 200)); echo long >\"etc/$long\"; ln -s \"/$long/$long\" etc/long-target
        printf x >\"$(printf 'etc/not-\\377-utf8')\"; touch -d @5 etc/deep etc bin .";
    assert!(Command::new("bash").args(["-ec", script, "sh"]).arg(&made).status().unwrap().success());
    let pack = |format: &str| {
        let mut command = Command::new("tar");
        if format == "posix" {
            command.args(["--xattrs", "--xattrs-include=*"]);
        }
        command.args(["--numeric-owner", "-C"]).arg(&made).args(["-cf", "-"]);
        let output = command.arg(format!("--format={format}")).arg(".").output().unwrap();
        assert!(output.status.success());
        output.stdout
    };
    let expected = snapshot(&made);
    for (compression, format) in [
        (Compression::None, "posix"),
        (Compression::Gzip, "posix"),
        (Compression::Zstd, "posix"),
        (Compression::Gzip, "gnu"),
    ] {
        let mut layout = Layout::new();
        layout.add("latest", "amd64", &[pack(format)], compression);
        let unpacked = unpack(&source(&layout)).good();
        let mut expected = expected.clone();
        if format == "gnu" {
            // This format has no attributes.
            for object in expected.values_mut() {
                object.xattrs.clear();
            }
        }
        common::snapshot::assert_same("tar's", &expected, "ours", &snapshot(&unpacked.tree()));
    }
}

#[test]
fn upper_layers_replace_and_take_away() {
    let layout = image(&[
        &[
            directory("etc"),
            file("etc/kept", "1"),
            file("etc/changed", "1"),
            file("etc/gone", "1"),
            directory("etc/dir"),
            file("etc/dir/in", "1"),
            directory("opaque"),
            file("opaque/old", "1"),
            directory("opaque/sub"),
            file("opaque/sub/old", "1"),
            file("was-file", "1"),
            directory("was-dir"),
            file("was-dir/in", "1"),
            link("to-etc", "/etc"),
            file("both", "1"),
        ],
        &[
            file("etc/changed", "2"),
            file("etc/.wh.gone", ""),
            file("etc/.wh.dir", ""),
            // What the layer itself brings stays, whether it comes before the mark or after.
            file("opaque/before", "2"),
            directory("opaque/sub"),
            file("opaque/sub/new", "2"),
            file("opaque/.wh..wh..opq", ""),
            file("opaque/after", "2"),
            directory("was-file"),
            file("was-file/in", "2"),
            file("was-dir", "2"),
            file("to-etc/through-link", "2"),
            file("both", "2"),
            file(".wh.both", ""),
            file(".wh..wh.plnk", ""),
            file(".wh.never-was", ""),
        ],
    ]);
    let unpacked = unpack(&source(&layout)).good();
    assert_eq!(
        unpacked.paths(),
        [
            "both",
            "etc",
            "etc/changed",
            "etc/kept",
            "etc/through-link",
            "opaque",
            "opaque/after",
            "opaque/before",
            "opaque/sub",
            "opaque/sub/new",
            "to-etc",
            "was-dir",
            "was-file",
            "was-file/in"
        ]
    );
    assert_eq!((unpacked.text("etc/changed").as_deref(), unpacked.text("both").as_deref()), (Some("2"), Some("2")));
}

#[test]
fn nothing_of_an_image_leads_out_of_its_tree() {
    let outside = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let out = outside.path().to_str().unwrap();
    std::fs::write(outside.path().join("victim"), "host").unwrap();
    let up = "../../../../../../../../..";
    // Refused, with the path.
    for (entries, reason) in [
        (vec![file("../escaped", "x")], "'../escaped' leads upwards"),
        (vec![file("a/../../escaped", "x")], "leads upwards"),
        (vec![link("l", out), hard_link("h", "../victim")], "leads upwards"),
        (vec![hard_link("h", &format!("{out}/victim"))], "is a hard link to a file that the image does not have"),
        (vec![link("l", out), file("l/escaped", "x")], "is below a link that leads nowhere in the image"),
        (
            vec![link("l", &format!("{up}{out}")), hard_link("h", "l/victim")],
            "is a hard link to a file that the image does not have",
        ),
        (vec![file("a/.wh...", "")], "takes away no name"),
        (vec![file("a/.wh.", "")], "takes away no name"),
        (vec![file(&"d/".repeat(600), "")], "is nested too deep"),
    ] {
        let layout = image(&[&entries]);
        let error = unpack(&source(&layout)).error();
        assert!(error.contains(reason) && error.starts_with("cannot unpack layer 1 of the image: "), "{error}");
    }
    // Taken as what it means inside.
    let layout = image(&[
        &[
            directory("etc"),
            file("etc/victim", "image"),
            link("abs", "/etc"),
            link("up", &format!("{up}/etc")),
            link("out", out),
        ],
        &[file("abs/new", "1"), file("up/new2", "1"), file("abs/.wh.victim", ""), file("out/.wh.victim", "")],
    ]);
    let unpacked = unpack(&source(&layout));
    assert!(unpacked.error().contains("leads nowhere in the image"), "{}", unpacked.error());
    assert_eq!(unpacked.text("etc/new").as_deref(), Some("1"));
    assert_eq!(unpacked.text("etc/new2").as_deref(), Some("1"));
    assert_eq!(unpacked.text("etc/victim"), None);
    // A link that is replaced by a file of the same name is not written through.
    let layout = image(&[&[link("f", &format!("{out}/victim"))], &[file("f", "image")]]);
    assert_eq!(unpack(&source(&layout)).good().text("f").as_deref(), Some("image"));
    // overlayfs' own attributes are none of a tree's.
    let layout = image(&[&[file("f", "x").xattr("trusted.overlay.redirect", "/etc").xattr("user.ok", "yes")]]);
    let unpacked = unpack(&source(&layout)).good();
    let xattrs = &snapshot(&unpacked.tree())[Path::new("f")].xattrs;
    assert_eq!(xattrs.keys().map(Vec::as_slice).collect::<Vec<_>>(), [b"user.ok"]);

    assert_eq!(std::fs::read_to_string(outside.path().join("victim")).unwrap(), "host");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn every_part_must_be_what_its_digest_says() {
    let fresh = || image(&[&[file("a", "1")], &[file("b", "2")]]);
    for blob in 0..fresh().blobs().len() {
        let layout = fresh();
        let path = &layout.blobs()[blob];
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
        let unpacked = unpack(&source(&layout));
        assert!(matches!(unpacked.result, Err(OciError::Mismatch(_))), "{:?}", unpacked.result);
        std::fs::remove_file(path).unwrap();
        assert!(matches!(unpack(&source(&layout)).result, Err(OciError::Missing { .. })));
    }
    // The compressed bytes are right, and what they unpack to is not what the configuration says.
    let mut layout = Layout::new();
    layout.add_lying("latest", &tar(&[file("a", "1")]), &tar(&[file("a", "2")]));
    assert!(matches!(unpack(&source(&layout)).result, Err(OciError::Mismatch(_))));
    // A blob that is a link to another file of the host.
    let layout = fresh();
    let path = &layout.blobs()[0];
    std::fs::remove_file(path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", path).unwrap();
    assert!(matches!(unpack(&source(&layout)).result, Err(OciError::Part { .. })));
}

#[test]
fn build_makes_a_tree_of_an_image_or_nothing() {
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let tree = work.path().join("tree");
    let build = |source: &str| common::cli::run(["build", "--from", source, tree.to_str().unwrap()]);
    let layout = image(&[&[
        file("etc/os-release", "ID=example\nVERSION_ID=\"9\"\n"),
        file("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
        file("etc/ssh/ssh_host_ed25519_key", "secret"),
    ]]);
    let built = build(&source(&layout)).good();
    assert!(built.stdout.contains(": example-9 amd64, from sha256:"), "{}", built.stdout);
    assert_eq!(std::fs::read_to_string(tree.join("etc/machine-id")).unwrap(), "");
    assert!(!tree.join("etc/ssh/ssh_host_ed25519_key").exists());
    build(&source(&layout)).one_line_error(1, &["exists: build makes a new tree"]);
    // Nothing is newer than the date that is given; what is older stays.
    std::fs::remove_dir_all(&tree).unwrap();
    let mut command = common::cli::imgutil(["build", "--from", &source(&layout), tree.to_str().unwrap()]);
    common::cli::finish(&command.env("SOURCE_DATE_EPOCH", "700000000").output().unwrap()).good();
    for path in ["", "etc/machine-id", "etc/os-release"] {
        assert_eq!(tree.join(path).metadata().unwrap().mtime(), 700_000_000, "{path}");
    }
    std::fs::remove_dir_all(&tree).unwrap();

    // Half of it was there already.
    let layout = image(&[&[file("a", "1")], &[file("../b", "2")]]);
    let failed = build(&source(&layout));
    assert_eq!(failed.status, 1);
    assert!(failed.stderr.contains("'../b' leads upwards"), "{}", failed.stderr);
    assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 0, "no debris");
}

#[test]
fn damaged_layers_and_bombs_end_with_an_error() {
    let whole = tar(&[file("a", &"x".repeat(100_000))]);
    let mut bad_sum = whole.clone();
    bad_sum[0] ^= 1;
    let mut huge = whole.clone();
    // A binary size of 2^63 bytes, with the sum made right.
    oci_image::set_field(&mut huge, 156..157, b"0");
    oci_image::set_field(&mut huge, 124..136, &[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]);
    let mut records = whole.clone();
    oci_image::set_field(&mut records, 156..157, b"x");
    oci_image::set_field(&mut records, 124..136, b"77777777777\0");
    let mut unknown = whole.clone();
    oci_image::set_field(&mut unknown, 156..157, b"S");
    for (layer, reason) in [
        (whole[..50_000].to_vec(), "unexpected end of file"),
        (bad_sum, "no header of a tar archive at offset 0"),
        (huge, "has a size that is no such"),
        (records, "is longer than 1048576 bytes"),
        (unknown, "has the type 'S'"),
    ] {
        let mut layout = Layout::new();
        layout.add("latest", "amd64", &[layer], Compression::Gzip);
        let error = unpack(&source(&layout)).error();
        assert!(error.contains(reason), "{reason}: {error}");
    }
    for compression in [Compression::Gzip, Compression::Zstd] {
        let mut layout = Layout::new();
        layout.add_truncated("latest", &whole, compression);
        let error = unpack(&source(&layout)).error();
        assert!(error.starts_with("cannot unpack layer 1"), "{error}");
    }

    let mut layout = Layout::new();
    layout.add("latest", "amd64", &[tar(&[file("zeros", &"\0".repeat(50_000_000))])], Compression::Zstd);
    let limits = Limits { bytes: 10_000_000, ..Limits::default() };
    let bomb = unpack_for(&source(&layout), "amd64", limits);
    assert!(bomb.error().contains("unpacks to more than is allowed"), "{}", bomb.error());
    assert!(bomb.tree().join("zeros").metadata().unwrap().size() <= 10_000_000);
    let many: Vec<Entry> = (0..50).map(|index| file(&format!("{index}"), "")).collect();
    let limits = Limits { entries: 40, ..Limits::default() };
    let error = unpack_for(&source(&image(&[&many])), "amd64", limits).error();
    assert!(error.contains("more than 40 entries"), "{error}");
}

#[test]
fn the_image_for_the_machine_and_tag_is_taken() {
    let mut layout = Layout::new();
    for (tag, arch, content) in [("1", "amd64", "one"), ("2", "amd64", "two"), ("arm", "arm64", "arm")] {
        layout.add(tag, arch, &[tar(&[file("which", content)])], Compression::None);
    }
    let base = source(&layout);
    for (tag, arch, content) in [("1", "amd64", "one"), ("2", "amd64", "two"), ("arm", "arm64", "arm")] {
        let unpacked = unpack_for(&format!("{base}:{tag}"), arch, Limits::default()).good();
        assert_eq!(unpacked.text("which").as_deref(), Some(content));
    }
    assert_eq!(unpack(&base).error(), "there are several images: choose one with oci:DIR:TAG (1, 2, arm)");
    assert_eq!(unpack(&format!("{base}:3")).error(), "there is no image '3': there are 1, 2, arm");
    assert_eq!(unpack(&format!("{base}:arm")).error(), "the image is for linux/arm64, not for linux/amd64");

    // One tag, several machines, by an index of its own.
    let mut layout = Layout::new();
    layout.add_index("latest", &[("amd64", tar(&[file("which", "x86")])), ("arm64", tar(&[file("which", "arm")]))]);
    for (arch, content) in [("amd64", "x86"), ("arm64", "arm")] {
        let unpacked = unpack_for(&source(&layout), arch, Limits::default()).good();
        assert_eq!(unpacked.text("which").as_deref(), Some(content));
    }
    let error = unpack_for(&source(&layout), "s390x", Limits::default()).error();
    assert_eq!(error, "the image is for linux/amd64, linux/arm64, not for linux/s390x");
}

#[test]
fn indexes_that_name_each_other_over_and_over_are_not_all_read() {
    let mut layout = Layout::new();
    layout.add_nested("latest", 10, 4);
    let error = unpack(&source(&layout)).error();
    assert_eq!(error, "the number of indexes of the image is larger than 100, which no honest image needs");
    let mut layout = Layout::new();
    layout.add_nested("latest", 2, 4);
    assert_eq!(unpack(&source(&layout)).error(), "the image is for , not for linux/amd64");
}

/// `cap_net_raw+ep` as setcap(8) writes it (capability.h of Linux: `vfs_cap_data`, version 2).
const CAPABILITY: &str = "\u{1}\0\0\u{2}\0\u{20}\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

#[test]
fn names_of_one_file_in_several_layers_are_of_one_file() {
    let layout = image(&[
        &[
            file("ping", "x").xattr("security.capability", CAPABILITY),
            file("one", "1"),
            file("gone", "2"),
            hard_link("stays", "gone"),
            file("replaced", "3"),
            hard_link("kept", "replaced"),
        ],
        &[
            hard_link("also-ping", "ping"),
            directory("deep"),
            hard_link("deep/also-one", "one"),
            file(".wh.gone", ""),
            file("replaced", "4"),
        ],
        &[hard_link("third", "deep/also-one")],
    ]);
    let unpacked = unpack(&source(&layout)).good();
    let identity = |path: &str| {
        let metadata = unpacked.tree().join(path).symlink_metadata().unwrap();
        (metadata.ino(), metadata.nlink())
    };
    assert_eq!(
        unpacked.paths(),
        ["also-ping", "deep", "deep/also-one", "kept", "one", "ping", "replaced", "stays", "third"]
    );
    assert_eq!(identity("ping"), identity("also-ping"));
    assert_eq!((identity("one"), identity("one")), (identity("deep/also-one"), identity("third")));
    assert_eq!((identity("one").1, identity("stays").1, identity("kept").1), (3, 1, 1));
    for (path, text) in [("stays", "2"), ("kept", "3"), ("replaced", "4"), ("third", "1")] {
        assert_eq!(unpacked.text(path).as_deref(), Some(text), "{path}");
    }
    // The tool of the field reads it as that capability.
    let getcap = Command::new("getcap").arg(unpacked.tree().join("also-ping")).output().unwrap();
    let said = String::from_utf8_lossy(&getcap.stdout).into_owned();
    assert!(getcap.status.success() && said.ends_with("also-ping cap_net_raw=ep\n"), "{said}");
}

#[test]
fn archives_of_podman_and_docker_are_read() {
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // An OCI layout in an archive (docker 25 and later, podman save --format oci-archive).
    let layout = image(&[&[file("a", "1")], &[file("b", "2")]]);
    let archive = work.path().join("layout.tar");
    let packed = Command::new("tar").arg("-C").arg(layout.path()).arg("-cf").arg(&archive).arg(".").status().unwrap();
    assert!(packed.success());
    assert_eq!(unpack(archive.to_str().unwrap()).good().paths(), ["a", "b"]);

    // docker-archive, the default of podman save.
    let saved = work.path().join("saved.tar");
    let layers = [tar(&[file("a", "1")]), tar(&[file("b", "2"), file(".wh.a", "")])];
    std::fs::write(&saved, oci_image::saved("example:1", "amd64", &layers)).unwrap();
    assert_eq!(unpack(saved.to_str().unwrap()).good().paths(), ["b"]);
    let changed = [layers[0].clone(), tar(&[file("evil", "2")])];
    std::fs::write(&saved, oci_image::saved_with(&changed, "example:1", "amd64", &layers)).unwrap();
    assert!(matches!(unpack(saved.to_str().unwrap()).result, Err(OciError::Mismatch(_))));

    for (name, content, reason) in [
        ("nothing.tar", tar(&[file("readme", "x")]), "holds no image: it has neither index.json"),
        ("no.tar", b"not an archive at all, and longer than nothing".repeat(40), "no header of a tar archive"),
    ] {
        let path = work.path().join(name);
        std::fs::write(&path, content).unwrap();
        let error = unpack(path.to_str().unwrap()).error();
        assert!(error.contains(reason), "{error}");
    }
    assert!(unpack("/no/such.tar").error().contains("cannot open '/no/such.tar'"));
}
