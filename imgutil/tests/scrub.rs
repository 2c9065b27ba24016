//! What `imgutil pack` leaves out of an image, what it refuses, and what it says of both; the tree itself stays as it is.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::cli::{Files, Ran, finish, imgutil, names};
use common::odd_tree::noise;
use common::snapshot::{Snapshot, assert_same, snapshot};
use moor_image::{Dek, Image, OpenOptions};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Writes files with their directories.
fn fill(tree: &Path, files: &[(&str, &str)]) {
    for (path, text) in files {
        let path = tree.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

fn pack(tree: &Path, work: &Path, more: &[&str]) -> (Ran, Files) {
    let files = Files { image: work.join("image.moor"), key: work.join("image.key") };
    let _ = fs::remove_file(&files.key);
    let mut command = imgutil(["pack".as_ref(), tree.as_os_str(), "-o".as_ref(), files.image.as_os_str()]);
    command.arg("--key-file").arg(&files.key).args(["--level", "1"]).args(more);
    (finish(&command.output().unwrap()), files)
}

fn unpacked(files: &Files, work: &Path, name: &str) -> (PathBuf, Snapshot) {
    let tree = work.join(name);
    let mut command = imgutil(["unpack".as_ref(), files.image.as_os_str(), tree.as_os_str()]);
    finish(&command.arg("--key-file").arg(&files.key).output().unwrap()).good();
    let seen = snapshot(&tree);
    (tree, seen)
}

/// One file for each category, which must go; and beside them what must stay.
const GOES: &[(&str, &str)] = &[
    ("/etc/ssh/ssh_host_ed25519_key", "host key"),
    ("/var/lib/dbus/machine-id", "0123"),
    ("/var/lib/systemd/random-seed", "seed"),
    ("/var/lib/systemd/credential.secret", "secret"),
    ("/root/.ssh/id_ed25519", "personal"),
    ("/home/u/.gnupg/private-keys-v1.d/AB.key", "personal"),
    ("/root/.netrc", "machine x password y"),
    ("/home/u/.aws/credentials", "aws"),
    ("/root/.docker/config.json", "{\"auths\":{}}"),
    ("/home/u/.kube/config", "users:"),
    ("/etc/krb5.keytab", "keytab"),
    ("/var/lib/tpm2-tss/system/keystore/x", "tpm"),
    ("/var/lib/cloud/instances/i-1/user-data.txt", "cloud"),
    ("/etc/NetworkManager/system-connections/wifi.nmconnection", "[wifi-security]\npsk=secret\n"),
    ("/etc/wpa_supplicant/wpa_supplicant.conf", "network={\n psk=\"x\"\n}\n"),
    ("/var/log/apt/term.log", "log"),
    ("/var/cache/apt/archives/x.deb", "deb"),
    ("/var/lib/apt/lists/deb.debian.org_x_Packages", "list"),
    ("/root/.bash_history", "ls"),
    ("/var/lib/dhcp/dhclient.leases", "lease"),
    ("/etc/.fstab.swp", "swap"),
    ("/tmp/x/y", "tmp"),
    ("/var/mail/root", "mail"),
    ("/etc/shadow-", "root:$6$old"),
];
const STAYS: &[(&str, &str)] = &[
    ("/etc/ssh/sshd_config", "config"),
    ("/root/.ssh/authorized_keys", "ssh-ed25519 AAAA"),
    ("/etc/NetworkManager/system-connections/wired.nmconnection", "[ipv4]\nmethod=auto\n"),
    ("/etc/shadow", "root:*:"),
    ("/etc/fstab", "/dev/sda1 /"),
    ("/usr/share/doc/x/tmp/file", "doc"),
    ("/var/lib/apt/extended_states", "states"),
];

#[test]
fn what_does_not_belong_into_an_image_is_left_out_and_named() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fill(&tree, GOES);
    fill(&tree, STAYS);
    fill(&tree, &[("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")]);
    // A link is kept: it names no machine.
    symlink("/etc/machine-id", tree.join("etc/machine-id-link")).unwrap();
    let before = snapshot(&tree);

    let (ran, files) = pack(&tree, work.path(), &["--json"]);
    let report: serde_json::Value = serde_json::from_str(&ran.good().stdout).unwrap();
    assert_same("before", &before, "after", &snapshot(&tree));
    let (_, seen) = unpacked(&files, work.path(), "unpacked");
    for (path, _) in GOES {
        assert!(!seen.contains_key(Path::new(&path[1..])), "{path} is in the image");
    }
    for (path, _) in STAYS {
        assert!(seen.contains_key(Path::new(&path[1..])), "{path} is missing");
    }
    assert_eq!(seen[Path::new("etc/machine-id")].size, 0, "emptied, not missing");
    assert!(seen.contains_key(Path::new("var/log/apt")), "directories of packages stay");
    assert!(seen.contains_key(Path::new("tmp")) && !seen.contains_key(Path::new("tmp/x")));

    let scrubbed = report["scrubbed"].as_array().unwrap();
    let named = |path: &str| scrubbed.iter().any(|entry| entry["path"] == path);
    for (path, _) in GOES.iter().filter(|(path, _)| !path.starts_with("/tmp/") && !path.contains("/cloud/")) {
        assert!(named(path), "{path} is not in the report: {report:#}");
    }
    assert!(named("/tmp/x") && named("/var/lib/cloud/instances"), "{report:#}");
    let machine_id = scrubbed.iter().find(|entry| entry["path"] == "/etc/machine-id").unwrap();
    assert_eq!((&machine_id["emptied"], &machine_id["category"]), (&true.into(), &"machine-identity".into()));

    let (ran, _) = pack(&tree, work.path(), &[]);
    let text = ran.good().stderr;
    assert!(text.contains("scrubbed: host keys 1") && text.contains("histories 1"), "{text}");
}

#[test]
fn without_scrubbing_all_is_kept_and_it_is_said_loudly() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fill(&tree, GOES);
    fill(&tree, &[("/etc/site.key", &pem())]);
    let (ran, files) = pack(&tree, work.path(), &["--no-scrub"]);
    assert!(ran.good().stderr.contains("warning: --no-scrub"));
    assert_same("source", &snapshot(&tree), "unpacked", &unpacked(&files, work.path(), "unpacked").1);
}

fn pem() -> String {
    let body = "MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC";
    format!("-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n")
}

#[test]
fn a_private_key_that_is_left_is_refused_by_name() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fill(&tree, &[("/etc/issue", "node"), ("/usr/lib/libx.so", "\0-----BEGIN PRIVATE KEY-----\0")]);
    fill(
        &tree,
        &[
            ("/srv/keys/site.pem", &pem()),
            ("/opt/app/config.json", &format!("{{\"key\": \"{}\"}}", pem().replace('\n', "\\n"))),
        ],
    );
    fill(&tree, &[("/srv/store.p12", "whatever")]);
    // A key of a real tool, in the middle of a file that is larger than what is read at once.
    let ssh = work.path().join("ssh");
    common::mount::run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&ssh));
    let large = "x".repeat(300_000) + "\n" + &fs::read_to_string(&ssh).unwrap() + &"y".repeat(3_000_000);
    fill(&tree, &[("/home/u/backup.tar", &large), ("/home/u/.ssh/id_ed25519", &fs::read_to_string(&ssh).unwrap())]);

    let keys = ["/home/u/backup.tar", "/opt/app/config.json", "/srv/keys/site.pem", "/srv/store.p12"];
    let before = names(work.path());
    let (ran, _) = pack(&tree, work.path(), &[]);
    ran.one_line_error(1, &keys);
    assert!(!ran.stderr.contains("libx") && !ran.stderr.contains("id_ed25519'"), "{}", ran.stderr);
    assert_eq!(names(work.path()), before, "nothing is left of a pack that was refused");

    // Each allowed or left out: it packs, with what was allowed in it.
    fs::write(work.path().join("exclude"), "# the keys\n/srv/keys/\n*.p12\n").unwrap();
    let exclude = work.path().join("exclude");
    let more = ["--exclude", exclude.to_str().unwrap(), "--allow-key", "/home/u/backup.tar", "--allow-key", "/opt/**"];
    let (ran, files) = pack(&tree, work.path(), &more);
    ran.good();
    let (_, seen) = unpacked(&files, work.path(), "unpacked");
    assert!(seen.contains_key(Path::new("home/u/backup.tar")) && seen.contains_key(Path::new("opt/app/config.json")));
    assert!(!seen.contains_key(Path::new("srv/keys")) && !seen.contains_key(Path::new("srv/store.p12")));
}

#[test]
fn a_secret_that_a_cluster_shares_is_refused_by_its_place() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    // Packages and people prepare the places.
    fill(
        &tree,
        &[("/etc/munge/munge.key", ""), ("/etc/slurm/slurm.conf", "ClusterName=x"), ("/etc/ceph/ceph.conf", "x")],
    );
    fill(&tree, &[("/etc/wireguard/README", "x"), ("/usr/share/sums/x.sha256", &"5d".repeat(32))]);
    pack(&tree, work.path(), &[]).0.good();
    let keys = [
        ("/etc/munge/munge.key", "a MUNGE key"),
        ("/etc/slurm/jwt_hs256.key", "a key of Slurm"),
        ("/var/spool/slurmctld/state/jwt_hs256.key", "a key of Slurm"),
        ("/etc/ceph/ceph.client.admin.keyring", "a key of Ceph"),
        ("/etc/corosync/authkey", "a key of Corosync"),
        ("/etc/cryptsetup-keys.d/home.key", "a key of an encrypted disk"),
        ("/crypto_keyfile.bin", "a key of an encrypted disk"),
        ("/var/lib/mooring/store/keys/data.key", "a key of a member of Mooring"),
        ("/etc/wireguard/privatekey", "a WireGuard private key"),
    ];
    for (path, _) in keys {
        fill(&tree, &[(path, "\u{1}secret")]);
    }
    fill(&tree, &[("/srv/node.key", &("5d".repeat(32) + "\n"))]);
    let (ran, _) = pack(&tree, work.path(), &[]);
    let named: Vec<String> = keys.iter().map(|(path, what)| format!("'{path}' ({what})")).collect();
    ran.one_line_error(1, &named.iter().map(String::as_str).collect::<Vec<_>>());
    ran.one_line_error(1, &["'/srv/node.key' (the key of an image)", "10 private keys"]);
    let allowed: Vec<&str> = keys.iter().map(|(path, _)| *path).chain(["/srv/node.key"]).collect();
    let allowed: Vec<&str> = allowed.into_iter().flat_map(|path| ["--allow-key", path]).collect();
    pack(&tree, work.path(), &allowed).0.good();
}

#[test]
fn a_key_that_a_package_ships_is_public_unless_it_was_changed() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fill(&tree, &[("/usr/share/doc/x/test.pem", &pem()), ("/etc/issue", "node")]);
    let sum = common::mount::run(Command::new("md5sum").arg(tree.join("usr/share/doc/x/test.pem")));
    let line = format!("{}  usr/share/doc/x/test.pem\n", sum.split(' ').next().unwrap());
    fill(&tree, &[("/var/lib/dpkg/info/x.md5sums", &line)]);
    pack(&tree, work.path(), &[]).0.good();
    fill(&tree, &[("/usr/share/doc/x/test.pem", &pem().replace("MC4C", "MC4D"))]);
    pack(&tree, work.path(), &[]).0.one_line_error(1, &["/usr/share/doc/x/test.pem", "PEM private key", "--allow-key"]);
}

#[test]
fn excluded_files_are_left_out_and_a_pattern_that_matches_nothing_is_named() {
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fill(
        &tree,
        &[("/a/keep", "1"), ("/a/drop.o", "2"), ("/b/c/drop.o", "3"), ("/b/only/file", "4"), ("/x/b/only/f", "5")],
    );
    let exclude = work.path().join("exclude");
    fs::write(&exclude, "# objects\n*.o\n\n/b/only/\n/no/such\n").unwrap();
    let (ran, files) = pack(&tree, work.path(), &["--exclude", exclude.to_str().unwrap()]);
    assert!(ran.good().stderr.contains("warning: patterns that match nothing: /no/such"));
    let seen: Vec<PathBuf> = unpacked(&files, work.path(), "unpacked").1.into_keys().collect();
    let wanted = ["", "a", "a/keep", "b", "b/c", "x", "x/b", "x/b/only", "x/b/only/f"];
    assert_eq!(seen, wanted.map(PathBuf::from));

    fs::write(&exclude, "ok\n- /b\n").unwrap();
    let (ran, _) = pack(&tree, work.path(), &["--exclude", exclude.to_str().unwrap()]);
    ran.one_line_error(1, &["exclude", "line 2", "plain patterns"]);
    fs::write(&exclude, "[a\n").unwrap();
    pack(&tree, work.path(), &["--exclude", exclude.to_str().unwrap()]).0.one_line_error(1, &["line 1", "not closed"]);
}

/// What the superblock of the squashfs in an image says: compression and block size (Documentation/filesystems/squashfs.rst;
/// `squashfs_fs.h` has the numbers of the compressions).
fn method_and_block_size(files: &Files) -> (u16, u32) {
    let key = Some(Dek::from_hex(&fs::read(&files.key).unwrap()).unwrap());
    let options = OpenOptions { key, ..OpenOptions::default() };
    let image = Image::open(File::open(&files.image).unwrap(), &options).unwrap();
    let mut superblock = [0; 96];
    assert_eq!(image.read_at(0, &mut superblock).unwrap(), superblock.len());
    let block_size = u32::from_le_bytes(superblock[12..16].try_into().unwrap());
    (u16::from_le_bytes(superblock[20..22].try_into().unwrap()), block_size)
}

/// Words in any order: text that compresses, and the better the harder one tries.
fn words(count: usize) -> String {
    let letters = |byte: &u8| ["mo", "ring", "ship", "s", "an", "chor", "har", "bour"][usize::from(byte % 8)];
    let word = |bytes: &[u8]| bytes.iter().map(letters).chain([" "]).collect();
    let vocabulary: Vec<String> = noise(800, 1).chunks(4).map(word).collect();
    noise(count, 2).iter().map(|byte| vocabulary[usize::from(byte % 200)].as_str()).collect()
}

#[test]
fn every_level_block_size_and_method_gives_back_the_tree() {
    const XZ: u16 = 4;
    const ZSTD: u16 = 6;
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fill(&tree, &[("/small", "s"), ("/large", &"some text, ".repeat(300_000)), ("/d/zeros", &"\0".repeat(2_000_000))]);
    fill(&tree, &[("/text", &words(200_000))]);
    let source = snapshot(&tree);
    let cases: [(&[&str], u16, u32); 6] = [
        (&["--level", "22", "--block-size", "1M"], ZSTD, 1 << 20),
        (&["--level", "1", "--block-size", "1M"], ZSTD, 1 << 20),
        (&["--level", "1", "--block-size", "4096"], ZSTD, 4096),
        (&["--xz"], XZ, 128 << 10),
        (&["--compression", "xz", "--block-size", "512K", "--processors", "1"], XZ, 512 << 10),
        (&["--processors", "5"], ZSTD, 128 << 10),
    ];
    let mut sizes = Vec::new();
    for (index, (more, method, block_size)) in cases.into_iter().enumerate() {
        let files =
            Files { image: work.path().join(format!("{index}.moor")), key: work.path().join(format!("{index}.key")) };
        let mut command = imgutil(["pack".as_ref(), tree.as_os_str(), "-o".as_ref(), files.image.as_os_str()]);
        finish(&command.arg("--key-file").arg(&files.key).args(more).output().unwrap()).good();
        assert_same(
            "source",
            &source,
            &format!("{more:?}"),
            &unpacked(&files, work.path(), &format!("tree-{index}")).1,
        );
        assert_eq!(method_and_block_size(&files), (method, block_size), "{more:?}");
        sizes.push(fs::metadata(&files.image).unwrap().len());
    }
    assert!(sizes[0] * 20 < sizes[1] * 19, "level 22 makes it smaller than level 1: {sizes:?}");
    for (more, reason) in [
        (["--block-size", "3000"], "power of two"),
        (["--block-size", "2M"], "power of two"),
        (["--processors", "0"], "1..=256"),
    ] {
        let (ran, _) = pack(&tree, work.path(), &more);
        assert!(ran.status == 2 && ran.stderr.contains(reason), "{}", ran.stderr);
    }
}
