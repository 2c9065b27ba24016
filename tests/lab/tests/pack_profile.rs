//! `imgutil pack TREE PROFILE`: the image, its kernel and its initramfs reach a real member, and the profile is made from another one
//! with its scripts.
#![allow(missing_docs, clippy::unwrap_used)]

use moor_lab::process::{run, text, tied};
use moor_lab::{Bins, Member, Namespace};
use std::fs;
use std::path::Path;
use std::process::Command;

fn tree(root: &Path) {
    for directory in ["boot", "etc", "sbin", "srv"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::write(root.join("boot/vmlinuz-6.1.0-1-amd64"), "the kernel").unwrap();
    fs::write(root.join("boot/initrd.img-6.1.0-1-amd64"), "the initramfs").unwrap();
    fs::write(root.join("sbin/init"), "the init").unwrap();
    fs::write(root.join("etc/os-release"), "ID=debian\nVERSION_ID=12\n").unwrap();
}

/// Shim and GRUB go with the image to the profile, by either way, and come out for a boot server.
#[test]
fn signed_boot_loaders_of_the_tree_reach_the_profile() {
    let work = tempfile::tempdir().unwrap();
    let (bins, namespace) = (Bins::find().unwrap(), Namespace::new().unwrap());
    let member = Member::start_in(work.path(), &bins, &namespace).unwrap();
    let path = |name: &str| work.path().join(name);
    tree(&path("tree"));
    let loaders = [
        ("usr/lib/shim/shimx64.efi.signed", "shimx64.efi"),
        ("usr/lib/grub/x86_64-efi-signed/grubnetx64.efi.signed", "grubx64.efi"),
    ];
    for (file, name) in loaders {
        let file = path("tree").join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, format!("the {name}")).unwrap();
    }
    let boots = |profile: &str| {
        let out = path("boot-files").join(profile);
        member.moor_ok(&["profile", "boot-files", profile, "--out", out.to_str().unwrap()]).unwrap();
        for (_, name) in loaders {
            assert_eq!(fs::read_to_string(out.join(name)).unwrap(), format!("the {name}"), "{profile}");
        }
    };
    let mut pack = tied(bins.path("imgutil"));
    pack.arg("pack").arg(path("tree")).args(["web", "-b", "debian-diskless", "--socket"]).arg(member.socket());
    run(pack.env("TMPDIR", work.path())).unwrap();
    boots("web");

    let mut pack = tied(bins.path("imgutil"));
    pack.arg("pack").arg(path("tree")).arg("-o").arg(path("image.moor")).arg("--key-file").arg(path("image.key"));
    run(pack.arg("--boot-dir").arg(path("boot"))).unwrap();
    let [image, key, boot] = ["image.moor", "image.key", "boot"].map(|name| path(name).display().to_string());
    member.moor_ok(&["image", "import", "db", &image, "--key-file", &key, "--boot-dir", &boot]).unwrap();
    member.moor_ok(&["profile", "create", "db", "--image", "db"]).unwrap();
    member.moor_ok(&["profile", "publish", "db"]).unwrap();
    boots("db");
}

#[test]
fn a_profile_is_made_from_another_with_its_scripts_and_gets_each_new_image() {
    let work = tempfile::tempdir().unwrap();
    let (bins, namespace) = (Bins::find().unwrap(), Namespace::new().unwrap());
    let member = Member::start_in(work.path(), &bins, &namespace).unwrap();
    let root = work.path().join("tree");
    tree(&root);
    let pack = |more: &[&str]| -> Command {
        let mut command = tied(bins.path("imgutil"));
        command.arg("pack").arg(&root).args(more).arg("--socket").arg(member.socket()).env("TMPDIR", work.path());
        command
    };
    let refused = |more: &[&str], reason: &str| {
        let output = pack(more).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(reason), "{error}");
        assert!(!member.moor_ok(&["image", "list"]).unwrap().contains("web@3"), "refused before anything was sent");
    };

    // A new profile from a shipped one.
    let said = text(&mut pack(&["web", "-b", "debian-diskless"])).unwrap();
    assert!(said.contains("web: serial 1") && said.contains("profile web: @1 published"), "{said}");
    let boot = work.path().join("boot-files");
    member.moor_ok(&["profile", "boot-files", "web", "--out", boot.to_str().unwrap()]).unwrap();
    assert_eq!(fs::read(boot.join("vmlinuz")).unwrap(), b"the kernel");
    assert!(fs::read(boot.join("initrd.img")).unwrap().starts_with(b"the initramfs"));
    assert!(!boot.join("shimx64.efi").exists());

    // Another one from that, with a script of the administrator's.
    let scripts = member.profiles().join("web/scripts/onboot");
    fs::create_dir_all(&scripts).unwrap();
    fs::write(scripts.join("10-mine"), "#!/bin/sh\necho mine\n").unwrap();
    let said = text(&mut pack(&["db", "-b", "web"])).unwrap();
    assert!(said.contains("profile db: @1 published"), "{said}");
    assert_eq!(
        fs::read_to_string(member.profiles().join("db/scripts/onboot/10-mine")).unwrap(),
        "#!/bin/sh\necho mine\n"
    );
    let settings = fs::read_to_string(member.profiles().join("db/profile.yaml")).unwrap();
    assert!(settings.lines().any(|line| line == "image: db"), "{settings}");

    // The next generation: nodes get it when it is published.
    let said = text(&mut pack(&["web"])).unwrap();
    assert!(said.contains("web: serial 2") && said.contains("moor profile publish web"), "{said}");
    let image = |profile: &str| -> String {
        let list = member.moor_ok(&["--json", "profile", "list"]).unwrap();
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let view = list.as_array().unwrap().iter().find(|view| view["name"] == profile).unwrap();
        view["image"].as_str().unwrap().to_owned()
    };
    let before = image("web");
    fs::write(root.join("srv/new"), "new").unwrap();
    let said = text(&mut pack(&["db", "--publish"])).unwrap();
    assert!(said.contains("db: serial 2") && said.contains("profile db: @2 published"), "{said}");
    assert_eq!(image("web"), before, "not published, not changed");
    run(&mut member.moor(&["profile", "publish", "web"])).unwrap();
    assert_ne!(image("web"), before);

    refused(&["web", "-b", "debian-diskless"], "exists already");
    refused(&["new", "--publish"], "there is no profile 'new'");
    for (path, reason) in [
        ("boot/vmlinuz-6.1.0-1-amd64", "the tree has no kernel (boot/vmlinuz-*)"),
        ("sbin/init", "has no init (sbin/init)"),
    ] {
        let (path, aside) = (root.join(path), work.path().join("aside"));
        fs::rename(&path, &aside).unwrap();
        refused(&["web"], reason);
        fs::rename(aside, path).unwrap();
    }
    let output = pack(&["other", "-b", "no-such"]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("no profile 'no-such'") && error.contains("the image is there"), "{error}");
}
