//! `SELinux` labels of an image, from the policy in its tree.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::cli::{finish, imgutil, pack, run};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// The label of a file that was unpacked.
fn label(path: &Path) -> Option<String> {
    let mut value = vec![0; 4096];
    let length = rustix::fs::lgetxattr(path, "security.selinux", value.as_mut_slice()).ok()?;
    assert_eq!(value[length - 1], 0, "as setfilecon(3) writes it");
    Some(String::from_utf8(value[..length - 1].to_vec()).unwrap())
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[test]
fn a_policy_in_the_tree_labels_the_image() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    let files = tree.join("etc/selinux/site/contexts/files");
    write(
        &files.join("file_contexts"),
        "/.*\tsystem_u:object_r:default_t:s0\n/etc(/.*)?  system_u:object_r:etc_t:s0\n/etc/exact -- system_u:object_r:exact_t:s0\n\
         /run/.*  <<none>>\n/dev/.* -c system_u:object_r:device_t:s0\n",
    );
    write(&files.join("file_contexts.homedirs"), "/home/[^/]+ -d system_u:object_r:user_home_dir_t:s0\n");
    write(&files.join("file_contexts.local"), "/etc/local.* system_u:object_r:local_t:s0\n");
    write(&files.join("file_contexts.subs_dist"), "/opt/etc /etc\n");
    for path in ["etc/exact", "etc/other", "etc/local-file", "home/u/file", "opt/etc/exact", "srv/x"] {
        write(&tree.join(path), path);
    }
    fs::create_dir_all(tree.join("run/keep")).unwrap();
    symlink("exact", tree.join("etc/link")).unwrap();
    fs::hard_link(tree.join("etc/exact"), tree.join("srv/second-name")).unwrap();
    // A label of the builder's own policy is replaced; another attribute stays.
    for (name, value) in [("security.selinux", b"builder_t\0".as_slice()), ("user.kept", b"kept")] {
        rustix::fs::lsetxattr(tree.join("srv/x"), name, value, rustix::fs::XattrFlags::empty()).unwrap();
    }

    let image = pack(&tree, work.path(), "labelled", &["--no-scrub"]);
    let unpacked = work.path().join("unpacked");
    run([
        "unpack",
        image.image.to_str().unwrap(),
        unpacked.to_str().unwrap(),
        "--key-file",
        image.key.to_str().unwrap(),
    ])
    .good();
    for (path, wanted) in [
        ("", Some("default_t")),
        ("etc", Some("etc_t")),
        ("etc/exact", Some("exact_t")),
        ("etc/link", Some("etc_t")),
        ("etc/other", Some("etc_t")),
        ("etc/local-file", Some("local_t")),
        ("opt/etc/exact", Some("exact_t")),
        ("opt/etc", Some("etc_t")),
        ("home/u", Some("user_home_dir_t")),
        ("home/u/file", Some("default_t")),
        ("srv/x", Some("default_t")),
        ("srv/second-name", Some("exact_t")),
        ("run/keep", None),
    ] {
        let wanted = wanted.map(|name| format!("system_u:object_r:{name}:s0"));
        assert_eq!(label(&unpacked.join(path)), wanted, "{path}");
    }
    let mut kept = [0; 16];
    assert_eq!(rustix::fs::lgetxattr(unpacked.join("srv/x"), "user.kept", kept.as_mut_slice()).unwrap(), 4);

    // What was done is said; and nothing is done where SELinux is off, or the policy is another one.
    let args = ["pack".as_ref(), tree.as_os_str(), "--plain".as_ref(), "-o".as_ref()];
    let pack_plain = || {
        let image = work.path().join("plain.moor");
        finish(&imgutil(args).arg(image).output().unwrap()).good().stderr
    };
    assert!(pack_plain().contains("SELinux labels of the tree's policy 'site'"));
    for config in ["SELINUX=disabled\nSELINUXTYPE=site\n", "SELINUX=enforcing\nSELINUXTYPE=other\n"] {
        write(&tree.join("etc/selinux/config"), config);
        assert!(!pack_plain().contains("SELinux labels"), "{config}");
    }
}
