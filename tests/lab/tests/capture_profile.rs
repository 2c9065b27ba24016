//! `imgutil capture NODE PROFILE`: the image of a node, its kernel, its initramfs and its boot loaders reach a real member, and the profile
//! is made from another one with its scripts.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../../imgutil/tests/common/node.rs"]
#[allow(dead_code, unreachable_pub)]
mod node;

use moor_lab::{Bins, Member, Namespace};
use node::Node;
use serde_json::Value;
use std::fs;
use std::process::Output;

/// A kernel with its initramfs, a secret on each file system, and a private key where no rule removes it.
const PLANT: &str = r#"
mkdir -p boot srv root/.ssh home/op/.ssh
echo 'the old kernel' > boot/vmlinuz-6.1.0-9-amd64
echo 'the kernel' > boot/vmlinuz-6.1.0-10-amd64
echo 'the initramfs' > boot/initrd.img-6.1.0-10-amd64
cp "$D/planted" root/.ssh/id_ed25519
cp "$D/planted" home/op/.ssh/id_ed25519
echo 'a token' > var/log/app.log
cp "$D/planted" srv/tls.key
# As Ubuntu has it: a link by way of /etc/alternatives.
mkdir -p usr/lib/shim usr/lib/grub/x86_64-efi-signed etc/alternatives
echo 'the shim' > usr/lib/shim/shimx64.efi.signed.latest
ln -s /etc/alternatives/shim usr/lib/shim/shimx64.efi.signed
ln -s /usr/lib/shim/shimx64.efi.signed.latest etc/alternatives/shim
echo 'the GRUB' > usr/lib/grub/x86_64-efi-signed/grubnetx64.efi.signed
"#;

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_captured_image_goes_to_the_server_and_a_profile_is_made_for_it() {
    let work = tempfile::tempdir().unwrap();
    let (bins, namespace) = (Bins::find().unwrap(), Namespace::new().unwrap());
    let member = Member::start_in(work.path(), &bins, &namespace).unwrap();
    let on_node = work.path().join("node");
    fs::create_dir(&on_node).unwrap();
    let node = Node::start(bins.path("imgutil"), &on_node, PLANT);
    let socket = member.socket().display().to_string();
    let capture = |more: &[&str]| {
        let more = [more, &["--level", "1", "--socket", &socket]].concat();
        node.capture_to(&node.target(), &more).output().unwrap()
    };
    let images =
        || -> Vec<Value> { serde_json::from_str(&member.moor_ok(&["--json", "image", "list"]).unwrap()).unwrap() };
    let refused = |more: &[&str], reason: &str| {
        let before = images();
        let output = capture(more);
        assert!(output.status.code() == Some(1) && said(&output).contains(reason), "{}", said(&output));
        assert_eq!(images(), before, "something was imported");
        assert_eq!(node.left_here(), Vec::<String>::new());
    };

    // Nothing goes to the server while a private key is left.
    refused(&["web", "-b", "debian-diskless"], "the node holds a private key: '/srv/tls.key' (an OpenSSH private key)");
    let exclude = work.path().join("exclude");
    fs::write(&exclude, "/srv/tls.key\n").unwrap();
    let exclude = ["--exclude", exclude.to_str().unwrap()];

    let output = capture(&[&["web", "-b", "debian-diskless"], &exclude[..]].concat());
    let text_of = said(&output);
    assert!(output.status.success(), "{text_of}");
    assert!(text_of.contains("web: serial 1, digest ") && text_of.contains("profile web: @1 published"), "{text_of}");
    assert_eq!(node.left_here(), Vec::<String>::new());
    let boot = work.path().join("boot-files");
    member.moor_ok(&["profile", "boot-files", "web", "--out", boot.to_str().unwrap()]).unwrap();
    assert_eq!(fs::read(boot.join("vmlinuz")).unwrap(), b"the kernel\n");
    assert!(fs::read(boot.join("initrd.img")).unwrap().starts_with(b"the initramfs\n"));
    for (name, content) in [("shimx64.efi", "the shim\n"), ("grubx64.efi", "the GRUB\n")] {
        assert_eq!(fs::read_to_string(boot.join(name)).unwrap(), content, "{name}");
    }
    assert_eq!(images()[0]["os"], "debian-12");

    // The next generation of it: of the same lineage, and published only when that is said.
    let text_of = said(&capture(&[&["web"], &exclude[..]].concat()));
    assert!(text_of.contains("web: serial 2") && text_of.contains("moor profile publish web"), "{text_of}");
    let [first, second] = &images()[..] else { panic!("two generations") };
    assert_eq!((&first["lineage"], &second["serial"]), (&second["lineage"], &Value::from(2)));
    refused(&["web", "-b", "debian-diskless"], "the profile 'web' exists already");
    refused(&["new", "--publish"], "there is no profile 'new' to publish");

    // Another profile from that one, with a script of the administrator's.
    let scripts = member.profiles().join("web/scripts/onboot");
    fs::create_dir_all(&scripts).unwrap();
    fs::write(scripts.join("10-mine"), "#!/bin/sh\necho mine\n").unwrap();
    let text_of = said(&capture(&[&["db", "-b", "web"], &exclude[..]].concat()));
    assert!(text_of.contains("profile db: @1 published"), "{text_of}");
    let carried = member.profiles().join("db/scripts/onboot/10-mine");
    assert_eq!(fs::read_to_string(carried).unwrap(), "#!/bin/sh\necho mine\n");
}
