//! `SELinux` labels of an image: each inode gets what libselinux itself says of its path, by Debian's real policy.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;
mod common;

use common::cli::{finish, imgutil, pack, run};
use common::mount::run as tool;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// What an image of the tree gives back.
fn packed_and_unpacked(tree: &Path, work: &Path) -> PathBuf {
    let image = pack(tree, work, "labelled", &["--no-scrub"]);
    let unpacked = work.join("unpacked");
    let [unpack, key_file] = ["unpack", "--key-file"].map(Path::new);
    run([unpack, &image.image, &unpacked, key_file, &image.key]).good();
    unpacked
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

    let unpacked = packed_and_unpacked(&tree, work.path());
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

/// Debian's `selinux-policy-default`, only unpacked: the rules of all its modules as one `file_contexts`; kept for the next run.
/// (semanage would sort them, which is the same to both who read them here.)
fn policy() -> PathBuf {
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("selinux-policy");
    let lock = fs::File::create(place.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if !place.exists() {
        let new = place.with_extension("new");
        let _ = fs::remove_dir_all(&new);
        fs::create_dir_all(&new).unwrap();
        // `_apt` may not enter the directory, and need not.
        tool(
            Command::new("apt-get")
                .args(["-q", "-o", "APT::Sandbox::User=root", "download", "selinux-policy-default"])
                .current_dir(&new),
        );
        let deb = fs::read_dir(&new).unwrap().next().unwrap().unwrap().path();
        tool(Command::new("dpkg-deb").arg("-x").arg(deb).arg(new.join("root")));
        let package = new.join("root");
        let files = new.join("files");
        fs::create_dir(&files).unwrap();
        let listed = fs::read_dir(package.join("usr/share/selinux/default")).unwrap();
        let mut modules: Vec<PathBuf> = listed
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|end| end == "bz2"))
            .collect();
        modules.sort_unstable();
        let rules: String = modules.iter().map(|module| file_contexts(module)).collect();
        fs::write(files.join("file_contexts"), rules).unwrap();
        let subs = package.join("etc/selinux/default/contexts/files/file_contexts.subs_dist");
        fs::copy(subs, files.join("file_contexts.subs_dist")).unwrap();
        fs::rename(new, &place).unwrap();
    }
    place.join("files")
}

/// The rules of a policy module (libsepol, `module.c`: a magic number, a version, the places of sections; the one with file
/// contexts begins with a number of its own). Homes of users, which semanage fills in, are left out.
fn file_contexts(module: &Path) -> String {
    const SECTION: u32 = 0xf97c_ff90;
    let unpacked = Command::new("bzcat").arg(module).output().unwrap();
    assert!(unpacked.status.success(), "{}: {}", module.display(), String::from_utf8_lossy(&unpacked.stderr));
    let bytes = unpacked.stdout;
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let count = number(8) as usize;
    let places: Vec<usize> = (0..count).map(|index| number(12 + 4 * index) as usize).chain([bytes.len()]).collect();
    let section = places.windows(2).find(|place| number(place[0]) == SECTION);
    let text = section.map_or("", |place| std::str::from_utf8(&bytes[place[0] + 4..place[1]]).unwrap());
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with('/')).collect();
    lines.join("\n") + "\n"
}

/// What libselinux says of paths of one type, asked through its own tool.
fn oracle(contexts: &Path, kind: &str, paths: &[String]) -> Vec<Option<String>> {
    let mut command = Command::new("matchpathcon");
    command.args(["-n", "-m", kind, "-f"]).arg(contexts).args(paths);
    let text = tool(&mut command);
    let said: Vec<_> = text.lines().map(|line| (line != "<<none>>").then(|| line.to_owned())).collect();
    assert_eq!(said.len(), paths.len(), "{text}");
    said
}

#[test]
fn labels_are_those_of_libselinux() {
    let work = build_tree::scratch();
    let contexts = policy();
    assert!(fs::read_to_string(contexts.join("file_contexts")).unwrap().lines().count() > 5000, "a whole policy");
    let tree = work.path().join("tree");
    let place = tree.join("etc/selinux/default/contexts");
    fs::create_dir_all(&place).unwrap();
    tool(Command::new("cp").arg("-a").arg(&contexts).arg(place.join("files")));
    write(&tree.join("etc/selinux/config"), "SELINUX=permissive\nSELINUXTYPE=default\n");

    // The names of a Debian tree, empty; and some that packages of other kinds would have.
    let debian = build_tree::untouched_tree();
    let listed = tool(Command::new("find").arg(&debian).args(["-printf", "%y %P\n"]));
    for (index, line) in listed.lines().enumerate() {
        let (kind, path) = line.split_once(' ').unwrap();
        let to = tree.join(path);
        // All that is not deep, and a part of the rest.
        if path.is_empty() || (path.matches('/').count() > 2 && index % 17 != 0) {
            continue;
        }
        match kind {
            "d" => fs::create_dir_all(&to).unwrap(),
            "f" if !to.exists() => write(&to, ""),
            "l" if fs::symlink_metadata(&to).is_err() && to.parent().unwrap().is_dir() => {
                symlink("target", &to).unwrap();
            }
            _ => {}
        }
    }
    for path in [
        "var/lib/mysql/ibdata1",
        "var/www/html/index.html",
        "var/www/cgi-bin/x",
        "home/user/.ssh/authorized_keys",
        "root/.bashrc",
        "usr/lib64/libx.so.1",
        "usr/local/lib/libx.so",
        "opt/app/bin/run",
        "srv/www/x",
        "etc/cups/ppd/x.ppd",
        "var/log/httpd/error_log",
        "usr/sbin/sshd",
        "usr/bin/podman",
        "var/lib/docker/x",
        "boot/grub2/grub.cfg",
        "usr/libexec/qemu-kvm",
        "etc/resolv.conf.bak",
        "usr/lib/systemd/system/ssh.service",
        "var/spool/cron/crontabs/root",
        "usr/lib/modules/6.1.0/modules.dep",
        "a b/c",
        "etc/f[x]*",
    ] {
        if !tree.join(path).exists() {
            write(&tree.join(path), "");
        }
    }

    let unpacked = packed_and_unpacked(&tree, work.path());
    let mut by_kind: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut waiting = vec![unpacked.clone()];
    while let Some(path) = waiting.pop() {
        let kind = path.symlink_metadata().unwrap().file_type();
        if kind.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let kind = if kind.is_dir() {
            "dir"
        } else if kind.is_symlink() {
            "link"
        } else {
            "file"
        };
        by_kind.entry(kind).or_default().push(format!("/{}", path.strip_prefix(&unpacked).unwrap().display()));
    }
    let (mut compared, mut different) = (0, Vec::new());
    for (kind, paths) in &by_kind {
        for (path, wanted) in paths.iter().zip(oracle(&contexts.join("file_contexts"), kind, paths)) {
            let seen = label(&unpacked.join(&path[1..]));
            if seen != wanted {
                different.push(format!("{path} ({kind}): {seen:?}, libselinux says {wanted:?}"));
            }
            compared += 1;
        }
    }
    assert!(different.is_empty(), "{} of {compared} differ:\n{}", different.len(), different.join("\n"));
    assert!(compared > 1000 && by_kind.len() == 3, "only {compared} paths were compared");
}
