//! `imgutil exec` as a border: what a command in an image sees of the host, what it can change there, and where links of a hostile
//! tree lead.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;

use build_tree::{exec, imgutil, listing, minimal_tree, own_tree, scratch, shell, text};
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn read_only_binds_stay_read_only() {
    let tree = minimal_tree();
    let host = scratch();
    std::fs::create_dir(host.path().join("sub")).unwrap();
    std::fs::write(host.path().join("file"), "host").unwrap();
    let bind = format!("{}:/mnt", host.path().display());
    // A mount below the source, in a mount namespace of the test's own.
    let script = "mount -t tmpfs none \"$1/sub\" && exec \"$2\" exec -v \"$3\" \"$4\" -- sh -c \"$5\"";
    let attempts = "
        cat /mnt/file; echo
        for try in 'echo x >/mnt/file' 'touch /mnt/new' 'touch /mnt/sub/new' 'rm /mnt/file' 'chmod 777 /mnt/file' \
            'mount -o remount,rw /mnt' 'mount -o remount,bind,rw /mnt' 'umount /mnt' 'mount --bind /mnt /media' \
            'unshare -m true' 'unshare -Urm sh -c \"mount -o remount,bind,rw /mnt && touch /mnt/new\"' \
            'unshare -Urm sh -c \"umount /mnt\"'; do
            sh -c \"$try\" >/dev/null 2>&1 && echo \"could: $try\"
        done
        exit 0";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script, "sh"])
        .arg(host.path())
        .arg(env!("CARGO_BIN_EXE_imgutil"))
        .arg(&bind)
        .arg(&tree)
        .arg(attempts)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "host\n");
    assert_eq!(std::fs::read_to_string(host.path().join("file")).unwrap(), "host");
    assert!(!host.path().join("new").exists());
}

#[test]
fn a_bind_can_be_written_when_it_says_so() {
    let tree = minimal_tree();
    let host = scratch();
    let output = imgutil()
        .args(["exec", "-v", &format!("{}:/mnt:rw", host.path().display())])
        .arg(&tree)
        .args(["--", "sh", "-c", "echo from the image >/mnt/file"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_to_string(host.path().join("file")).unwrap(), "from the image\n");

    let missing = imgutil().args(["exec", "-v", "/no/such:/mnt"]).arg(&tree).args(["--", "true"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).contains("'/no/such'"), "{}", text(&missing.stderr));
}

#[test]
fn the_image_sees_itself_and_nothing_of_the_host() {
    let tree = minimal_tree();
    let seen = shell(&tree, "echo $$; ls /proc | grep -c '^[0-9]'; cat /proc/1/mountinfo");
    let mut lines = seen.lines();
    assert_eq!(lines.next(), Some("2"), "the command is the second process");
    // init, sh, ls, grep
    assert!(lines.next().unwrap().parse::<u32>().unwrap() <= 4);
    let points: Vec<&str> = lines.map(|line| line.split(' ').nth(4).unwrap()).collect();
    assert!(points.contains(&"/") && points.contains(&"/proc") && points.contains(&"/dev/pts"));
    assert!(!points.iter().any(|point| point.contains("cgroup")), "{points:?}");
    for (script, expected) in [
        ("ls -A /dev", "fd\nfull\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n"),
        ("ls -A /run /dev/shm", "/dev/shm:\n\n/run:\nlock\n"),
        ("hostname; echo $container", "minimal\nimgutil\n"),
        ("echo $HOME $USER; pwd; umask", "/root root\n/\n0022\n"),
        ("env | grep -c CARGO || true", "0\n"),
        ("ls /proc/self/fd", "0\n1\n2\n3\n"),
    ] {
        assert_eq!(shell(&tree, script), expected, "{script}");
    }
    for kind in ["cgroup", "ipc", "mnt", "pid", "uts"] {
        let seen = shell(&tree, &format!("readlink /proc/self/ns/{kind}"));
        assert!(seen.starts_with(&format!("{kind}:[")), "{seen}");
        assert_ne!(seen.as_bytes(), host_namespace(kind), "{kind}");
    }
}

fn host_namespace(kind: &str) -> Vec<u8> {
    format!("{}\n", std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display()).into_bytes()
}

#[test]
fn root_in_the_image_cannot_change_the_host() {
    let (_scratch, tree) = own_tree();
    // A device file that lies in the image.
    let device = tree.join("disk");
    assert!(Command::new("mknod").arg(&device).args(["c", "1", "5"]).status().unwrap().success());
    let host = |path: &str| {
        let metadata = std::fs::metadata(path).unwrap();
        (metadata.mode(), metadata.uid(), metadata.mtime(), metadata.size())
    };
    let watched = ["/dev/null", "/etc/hostname", "/etc/resolv.conf", "/etc", "/root", "/usr/sbin"];
    let before = watched.map(host);
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let attempts = "
        hostname changed 2>/dev/null
        chmod 600 /dev/null; chown daemon /dev/null
        for try in 'head -c1 /disk' 'mknod /x b 254 0' 'date -s 2001-01-01' 'mount -t tmpfs none /mnt' 'mount -o remount,rw /sys' \
            'echo x >/proc/sys/kernel/hostname' 'echo 1 >/proc/sys/vm/drop_caches' 'echo x >/etc/resolv.conf' \
            'echo 0 >/proc/irq/default_smp_affinity' 'test -w /proc/sysrq-trigger' 'rm /etc/resolv.conf' 'dmesg -C' \
            'test -e /dev/kmsg' 'test -e /dev/vda' 'ls -d /sys/fs/cgroup/*' 'touch /sys/x' \
            'nsenter -t 1 -m true' 'chroot /proc/1/root mount -t tmpfs none /mnt'; do
            sh -c \"$try\" >/dev/null 2>&1 && echo \"could: $try\"
        done
        exit 0";
    let output = exec(&tree, &["sh", "-c", attempts]);
    assert_eq!(text(&output.stdout), "");
    assert_eq!(watched.map(host), before);
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), name);
}

#[test]
fn links_in_a_hostile_tree_do_not_lead_out() {
    let outside = scratch();
    let target = outside.path().join("target");
    std::fs::write(&target, "host").unwrap();
    let target_text = target.to_str().unwrap();

    // A resolver file that is a link: to the host by its absolute path, upwards, to itself, into /run, to nowhere.
    let (_scratch, tree) = own_tree();
    let resolver = tree.join("etc/resolv.conf");
    for (link, resolves) in [
        (target_text, false),
        ("../../../../../../../../../../../etc/resolv.conf", false),
        ("resolv.conf", false),
        ("/etc/passwd/x", false),
        ("../run/systemd/resolve/stub-resolv.conf", true),
        ("/run/resolv.conf", true),
        ("/var/run/a/b/resolv.conf", true),
        ("/var/run/a/../b/resolv.conf", false),
        ("real", true),
    ] {
        std::fs::remove_file(&resolver).unwrap();
        symlink(link, &resolver).unwrap();
        let before = listing(&tree);
        let output = exec(&tree, &["cat", "/etc/resolv.conf"]);
        let same = output.stdout == std::fs::read("/etc/resolv.conf").unwrap();
        assert_eq!(same, resolves, "{link}: {}{}", text(&output.stdout), text(&output.stderr));
        let said = text(&output.stderr);
        assert_eq!(said.contains("imgutil: warning: /etc/resolv.conf"), !resolves, "{link}: {said}");
        assert_eq!(listing(&tree), before, "{link}");
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "host");
    }

    // Places that must be directories.
    for place in ["run", "dev", "proc", "sys"] {
        let (_scratch, tree) = own_tree();
        assert!(Command::new("rm").arg("-rf").arg(tree.join(place)).status().unwrap().success());
        symlink("/etc", tree.join(place)).unwrap();
        let before = listing(&tree);
        let output = exec(&tree, &["true"]);
        assert_eq!(output.status.code(), Some(1), "{place}");
        let message = text(&output.stderr);
        assert!(message.contains(&format!("'/{place}' in the image is a symbolic link")), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert_eq!(listing(&tree), before, "{place}");
    }

    // The place of a bind.
    symlink(outside.path(), tree.join("out")).unwrap();
    let output =
        imgutil().args(["exec", "-v", "/usr/share:/out/new"]).arg(&tree).args(["--", "true"]).output().unwrap();
    assert_ne!(output.status.code(), Some(0), "the link's target is not in the tree");
    let message = text(&output.stderr);
    assert!(message.contains("'/out' in the image is a symbolic link that leads nowhere in the image"), "{message}");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
}

/// Runs with options, as a script would.
fn exec_with(options: &[&str], tree: &std::path::Path, script: &str) -> std::process::Output {
    imgutil().arg("exec").args(options).arg(tree).args(["--", "sh", "-c", script]).output().unwrap()
}

#[test]
fn no_path_leads_to_a_device_of_the_host() {
    let (_scratch, tree) = own_tree();
    let disk = std::fs::read_dir("/sys/class/block").unwrap().flatten().find_map(|entry| {
        let path = Path::new("/dev").join(entry.file_name());
        std::fs::File::open(&path).is_ok().then_some(path)
    });
    let disk = disk.expect("a block device of the host that can be opened");
    let number = disk.metadata().unwrap().rdev();
    let (major, minor) = (rustix::fs::major(number).to_string(), rustix::fs::minor(number).to_string());
    // A node that lies in the tree, one in a directory that is bound, the host's /dev itself, one made by the command.
    let host = scratch();
    for place in [tree.join("disk"), host.path().join("disk")] {
        assert!(Command::new("mknod").arg(place).args(["b", &major, &minor]).status().unwrap().success());
    }
    let name = disk.file_name().unwrap().to_str().unwrap();
    let bind = format!("{}:/bound:rw", host.path().display());
    let output = exec_with(
        &["-v", &bind, "-v", "/dev:/host-dev:rw"],
        &tree,
        &format!(
            "for path in /disk /bound/disk /host-dev/{name} /host-dev/kmsg; do \
                 test -e $path || echo \"no $path\"; head -c1 $path >/dev/null 2>&1 && echo \"read $path\"; \
                 (: <>$path) 2>/dev/null && echo \"opened $path\"; \
             done; mknod /made b {major} {minor} 2>/dev/null && echo made; mount -o remount,dev /bound 2>/dev/null && echo remounted; true"
        ),
    );
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!((text(&output.stdout), text(&output.stderr)), (String::new(), String::new()));
}

/// A read-only mount says nothing about the device behind it: the control group does.
#[test]
fn a_device_that_is_bound_by_name_can_be_read_and_written_only_if_said() {
    let tree = minimal_tree();
    // FUSE's device: opening it does nothing, and it is not among those that every image has.
    let tries = "(: </device) 2>/dev/null && echo read; (: >/device) 2>/dev/null && echo written; true";
    for (bind, could) in [("/dev/fuse:/device", "read\n"), ("/dev/fuse:/device:rw", "read\nwritten\n")] {
        let output = exec_with(&["-v", bind], &tree, tries);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout), could, "{bind}");
    }
}

#[test]
fn no_control_group_is_left() {
    let tree = minimal_tree();
    let groups = || {
        let found = Command::new("find").args(["/sys/fs/cgroup", "-name", "imgutil-exec.*"]).output().unwrap();
        text(&found.stdout)
    };
    // While a command runs there is one: the search finds what it is to miss afterwards.
    let mut running = build_tree::tied(env!("CARGO_BIN_EXE_imgutil"))
        .arg("exec")
        .arg(&tree)
        .args(["--", "sh", "-c", "setsid sleep 91835 & echo started; read -r _; exit 0"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(running.stdout.take().unwrap()), &mut line).unwrap();
    assert_eq!(line, "started\n");
    let seen = groups();
    let holds = |group: &str| {
        let processes = std::fs::read_to_string(Path::new(group).join("cgroup.procs")).unwrap_or_default();
        processes.lines().any(|id| {
            std::fs::read(format!("/proc/{id}/cmdline")).is_ok_and(|line| line.windows(5).any(|word| word == b"91835"))
        })
    };
    assert!(seen.lines().any(holds), "no group has what runs: {seen}");
    drop(running.stdin.take());
    assert!(running.wait().unwrap().success());
    // Other tests run beside this one: the groups that were there must all go.
    build_tree::wait_until("the removal of the control groups", || {
        let now = groups();
        !seen.lines().any(|group| now.lines().any(|other| other == group))
    });
    assert_eq!(shell(&tree, "grep -c : /proc/self/cgroup >/dev/null; cut -d: -f3 /proc/self/cgroup | sort -u"), "/\n");
}

#[test]
fn the_hosts_processes_shared_memory_and_mounts_are_out_of_reach() {
    let tree = minimal_tree();
    // Shared memory of the host, of this process' own namespace, by both of its names.
    let shared = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let made = Command::new("ipcmk").args(["-M", "4096"]).output().unwrap();
    let id = text(&made.stdout).trim().rsplit(' ').next().unwrap().to_owned();
    let sleeper = build_tree::tied("sleep").arg("91836").spawn().map(Sleeper).unwrap();
    let seen = shell(
        &tree,
        &format!(
            "ipcs -m | grep -c ' {id} ' || true; ls /dev/shm | wc -l; kill -0 {pid} 2>/dev/null && echo signalled; \
             cut -d' ' -f5 /proc/self/mountinfo | grep -c '^/work\\|^/home\\|^/sys/fs' || true",
            pid = sleeper.0.id()
        ),
    );
    let removed = Command::new("ipcrm").args(["-m", &id]).status().unwrap();
    assert!(removed.success() && shared.path().exists());
    assert_eq!(seen, "0\n0\n0\n");
}

/// A process that ends with its test.
struct Sleeper(std::process::Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn without_a_network_there_is_only_loopback() {
    let tree = minimal_tree();
    let script = "ls /sys/class/net; bash -c 'exec 3<>/dev/tcp/127.0.0.1/9' 2>&1 | grep -o 'Connection refused' | head -n1; \
                  cat /etc/resolv.conf | grep -c nameserver || true";
    let output = exec_with(&["--net", "none"], &tree, script);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "lo\nConnection refused\n0\n");
    let host = exec_with(&["--net", "host"], &tree, "readlink /proc/self/ns/net");
    assert_eq!(host.stdout, host_namespace("net"));
}

/// The classic way out of a root directory: a second chroot leaves the working directory above its root, from where one goes up. It is
/// tried in a plain chroot too, where it leads out: else it would prove nothing of `exec`.
#[test]
fn a_way_out_of_a_plain_chroot_ends_at_the_images_root() {
    let tree = minimal_tree();
    let host = scratch();
    let marker = host.path().join("marker");
    std::fs::write(&marker, "host").unwrap();
    // Says whether the file of the host's that is named is reached.
    let out = r#"perl -e 'chroot "/mnt" or die "chroot: $!"; chdir ".." for 1..64; chroot "." or die "chroot: $!";
        print -e $ARGV[0] ? "outside\n" : "inside\n"' "$0""#;
    let plain = build_tree::tied("chroot").arg(&tree).args(["sh", "-c", out]).arg(&marker).output().unwrap();
    assert_eq!(text(&plain.stdout), "outside\n", "{}", text(&plain.stderr));
    // Started where the file is: neither the first process' root nor a working directory leads there.
    let script = format!(
        "{out}; for path in marker ../marker /proc/1/cwd/marker \"/proc/1/root$0\" \"/proc/1/root/../../..$0\"; do \
             test -e \"$path\" && echo \"reached $path\"; done; true"
    );
    let mut confined = imgutil();
    confined.current_dir(host.path()).arg("exec").arg(&tree).args(["--", "sh", "-c", &script]).arg(&marker);
    let confined = confined.output().unwrap();
    assert!(confined.status.success(), "{}", text(&confined.stderr));
    assert_eq!((text(&confined.stdout), text(&confined.stderr)), ("inside\n".to_owned(), String::new()));
}
