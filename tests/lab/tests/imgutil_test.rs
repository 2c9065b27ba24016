//! `imgutil test`, as a user runs it: a good image passes, one that is broken in many places is bad in each of them and the log of the unit
//! that failed is shown, a signature by a trusted key is asked for, and nothing is left behind, also of a test that is interrupted.

use anyhow::{Context as _, ensure};
use moor_lab::Bins;
use moor_lab::process::{run, run_shown, tied};
use moor_lab::tree::{self, Initramfs};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A unit that fails and says so, in the way of an administrator who mistyped a path.
const FAILING_UNIT: &str = "[Unit]\nDescription=A unit that fails\n[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo no licence \
                            server for $HOSTNAME; exit 3'\n[Install]\nWantedBy=multi-user.target\n";

/// What else may be wrong with an image: its log files and caches lie on a file system of their own, which is no part of the writable layer;
/// a service takes nearly all memory; the tether speaks of another image.
const BROKEN: &str = r#"
set -e
echo 'tmpfs /var tmpfs mode=755 0 0' >> /etc/fstab
cat > /etc/systemd/system/leak.service <<X
[Unit]
Description=A service that takes all memory
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/leak
[Install]
WantedBy=multi-user.target
X
cat > /usr/local/sbin/leak <<'X'
#!/bin/sh -e
mount -t tmpfs -o size=100% leak /mnt
while read -r name free unit; do
    [ "$name" != MemAvailable: ] || head -c $((free - 130000))K /dev/zero > /mnt/leak
done < /proc/meminfo
X
mv /usr/bin/moor-tether /usr/bin/moor-tether.real
cat > /usr/bin/moor-tether <<'X'
#!/bin/sh
/usr/bin/moor-tether.real "$@" | sed 's/"digest": *"[0-9a-f]*"/"digest":"00"/'
X
chmod 755 /usr/local/sbin/leak /usr/bin/moor-tether
systemctl enable licence.service leak.service
"#;

fn pack(bins: &Bins, tree: &Path, image: &Path, signer: Option<&Path>) -> anyhow::Result<PathBuf> {
    let key = image.with_extension("key");
    let mut command = tied(bins.path("imgutil"));
    command.arg("pack").arg(tree).arg("-o").arg(image).arg("--key-file").arg(&key).args(["--level", "1"]);
    if let Some(signer) = signer {
        command.arg("--sign-key").arg(signer);
    }
    run_shown(&mut command)?;
    Ok(key)
}

/// `imgutil test`, with its own folders in `scratch`.
fn command(bins: &Bins, image: &Path, key: &Path, scratch: &Path) -> std::process::Command {
    let mut command = tied(bins.path("imgutil"));
    command.arg("test").arg(image).arg("--key-file").arg(key).args(["--json", "--keep"]).env("TMPDIR", scratch);
    command
}

fn test(bins: &Bins, image: &Path, key: &Path, scratch: &Path) -> anyhow::Result<Output> {
    command(bins, image, key, scratch).output().context("starting imgutil")
}

/// A key pair for signatures; the public one is beside it.
fn signing_key(path: PathBuf) -> anyhow::Result<PathBuf> {
    run(tied("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "signer", "-f"]).arg(&path))?;
    Ok(path)
}

/// Starts a test, and ends it by a signal some time after it has said `stage`.
fn interrupted(
    mut test: std::process::Command,
    stage: &str,
    after: Duration,
    signal: Signal,
) -> anyhow::Result<Option<i32>> {
    let mut child = test.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stderr.take().context("no standard error")?).lines();
    loop {
        let line = lines.next().with_context(|| format!("it ended before '{stage}'"))??;
        if line.contains(stage) {
            break;
        }
    }
    // Whoever reads the lines goes on to read them.
    let reader = std::thread::spawn(move || lines.count());
    std::thread::sleep(after);
    kill(Pid::from_raw(i32::try_from(child.id())?), signal)?;
    let begin = Instant::now();
    let status = child.wait()?;
    ensure!(begin.elapsed() < Duration::from_secs(20), "it took {:?} to end", begin.elapsed());
    // The other end of its standard error is closed: nobody is left who holds it.
    ensure!(reader.join().is_ok(), "its standard error could not be read");
    Ok(status.code())
}

fn check<'a>(verdict: &'a Value, name: &str) -> anyhow::Result<&'a Value> {
    let checks = verdict["checks"].as_array().context("no checks")?;
    checks.iter().find(|check| check["name"] == name).with_context(|| format!("no check '{name}' in {verdict:#}"))
}

/// What is in a folder, and which processes have it on their command line.
fn left(scratch: &Path) -> anyhow::Result<Vec<String>> {
    let mut left: Vec<String> = std::fs::read_dir(scratch)?
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, _>>()?;
    let name = scratch.display().to_string();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    left.extend(mounts.lines().filter(|line| line.contains(&name)).map(str::to_owned));
    for process in std::fs::read_dir("/proc")?.flatten() {
        let words = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        if words.contains(&name) && !words.contains("imgutil_test") {
            left.push(words);
        }
    }
    Ok(left)
}

/// A folder for a test, and in it the one for imgutil's own folders, whose servers run as another user.
fn folders() -> anyhow::Result<(TempDir, PathBuf)> {
    let work = tempfile::Builder::new().prefix("moor-test-").tempdir()?;
    let scratch = work.path().join("tmp");
    std::fs::create_dir(&scratch)?;
    for path in [work.path(), &scratch] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    }
    Ok((work, scratch))
}

#[test]
fn a_good_image_passes_and_a_failing_unit_is_named_with_its_log() -> anyhow::Result<()> {
    let bins = Bins::find()?;
    let (work, scratch) = folders()?;
    let good = tree::debian(&bins, Initramfs::InitramfsTools, &mut |what| println!("{what}"))?;
    let image = work.path().join("good.moor");
    let signer = signing_key(work.path().join("signer"))?;
    let key = pack(&bins, &good, &image, Some(&signer))?;

    // Interrupted while servers are made, and while the machine boots.
    for (stage, after, signal, code) in [
        ("making a collective", Duration::ZERO, Signal::SIGTERM, 143),
        ("switching a machine on", Duration::from_secs(8), Signal::SIGINT, 130),
    ] {
        let ended = interrupted(command(&bins, &image, &key, &scratch), stage, after, signal)?;
        let logs = left(&scratch)?;
        assert!(logs.iter().all(|name| name.starts_with("imgutil-test-logs-")), "{signal}: {logs:?}");
        for name in logs {
            std::fs::remove_dir_all(scratch.join(name))?;
        }
        assert_eq!(ended, Some(code), "{signal}");
    }

    // The node asks for a signature by the key that is trusted, and gets it.
    let mut trusting = command(&bins, &image, &key, &scratch);
    trusting.arg("--trust").arg(signer.with_extension("pub"));
    let output = trusting.output().context("starting imgutil")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(0), "{}\n{said}", String::from_utf8_lossy(&output.stdout));
    let verdict: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(verdict["good"], true);
    for name in ["boot", "failover", "ssh", "root", "overlay", "services", "memory"] {
        assert_eq!(check(&verdict, name)?["good"], true, "{verdict:#}");
    }
    // The killed server is one of two that the root came from.
    let root = check(&verdict, "root")?["detail"].as_str().unwrap_or_default();
    assert!(root.contains(":8443") && root.contains(":8444"), "{root}");
    // The logs were asked for; nothing else is left, neither processes nor keys.
    let kept: Vec<String> = left(&scratch)?;
    assert!(matches!(&kept[..], [logs] if logs.starts_with("imgutil-test-logs-")), "{kept:?}");
    let logs = scratch.join(&kept[0]);
    assert!(std::fs::read_to_string(logs.join("console.log"))?.contains("moor-agent: done"));
    std::fs::remove_dir_all(&logs)?;

    // Signed, and not by the one who is trusted: the node waits for somebody to mend that, and the test does not wait with it.
    let stranger = signing_key(work.path().join("stranger"))?;
    let mut trusting = command(&bins, &image, &key, &scratch);
    let output = trusting.arg("--trust").arg(stranger.with_extension("pub")).output().context("starting imgutil")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{}\n{said}", String::from_utf8_lossy(&output.stdout));
    let verdict: Value = serde_json::from_slice(&output.stdout)?;
    let boot = check(&verdict, "boot")?;
    let why = boot["detail"].as_str().unwrap_or_default();
    ensure!(why.contains("the node was refused, and waits") && why.contains("sign"), "{verdict:#}");
    assert_eq!((&verdict["good"], &boot["logs"][0]["of"]), (&false.into(), &"console".into()));
    // The root was never there.
    assert!(verdict["states"].as_array().is_some_and(|states| states.iter().all(|state| state[0] != "root")));
    for logs in left(&scratch)? {
        assert!(logs.starts_with("imgutil-test-logs-"), "{logs}");
        std::fs::remove_dir_all(scratch.join(logs))?;
    }

    // A copy of the same tree with a unit that fails, and more.
    let bad = copy(&good, &work.path().join("bad"))?;
    std::fs::write(bad.join("etc/systemd/system/licence.service"), FAILING_UNIT)?;
    run_shown(tied(bins.path("imgutil")).arg("exec").arg(&bad).args(["--", "sh", "-c", BROKEN]))?;
    let image = work.path().join("bad.moor");
    let key = pack(&bins, &bad, &image, None)?;
    let verdict = bad_verdict(&test(&bins, &image, &key, &scratch)?)?;
    for (name, detail) in [
        ("root", "the root is another image, 00"),
        ("overlay", "32.0 MiB written took "),
        ("services", "systemd says 'degraded'; failed: licence.service"),
        ("memory", " are free for programs"),
    ] {
        let check = check(&verdict, name)?;
        let found = check["detail"].as_str().unwrap_or_default();
        assert!(check["good"] == false && found.contains(detail), "{verdict:#}");
    }
    for name in ["boot", "failover", "ssh"] {
        assert_eq!(check(&verdict, name)?["good"], true, "{verdict:#}");
    }
    let services = check(&verdict, "services")?;
    assert_eq!(services["logs"][0]["of"], "licence.service", "{services:#}");
    let log = services["logs"][0]["text"].as_str().unwrap_or_default();
    assert!(log.contains("no licence server"), "{log}");
    Ok(())
}

fn copy(tree: &Path, to: &Path) -> anyhow::Result<PathBuf> {
    run(tied("cp").args(["-a", "--reflink=auto"]).arg(tree).arg(to))?;
    Ok(to.to_owned())
}

/// The verdict of a test that found something bad.
fn bad_verdict(output: &Output) -> anyhow::Result<Value> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{}\n{said}", String::from_utf8_lossy(&output.stdout));
    let verdict: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(verdict["good"], false);
    Ok(verdict)
}

/// A node that is up and lets nobody in, and a second server that accepts connections and never answers: what it had to give came from
/// the first, so that nothing was shown by killing it.
#[test]
#[ignore = "minutes of emulation: make test-full"]
fn a_node_without_ssh_and_a_server_that_gives_nothing_are_bad() -> anyhow::Result<()> {
    let bins = Bins::find()?;
    let (work, scratch) = folders()?;
    let good = tree::debian(&bins, Initramfs::InitramfsTools, &mut |what| println!("{what}"))?;
    let bad = copy(&good, &work.path().join("bad"))?;
    let mask = "systemctl mask ssh.service ssh.socket";
    run_shown(tied(bins.path("imgutil")).arg("exec").arg(&bad).args(["--", "sh", "-c", mask]))?;
    let image = work.path().join("bad.moor");
    let key = pack(&bins, &bad, &image, None)?;

    let mut test = command(&bins, &image, &key, &scratch);
    let mut child = test.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stderr.take().context("no standard error")?).lines();
    while !lines.next().context("it ended before it began")??.contains("switching a machine on") {}
    let reader = std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| println!("{line}")));
    let servers = processes_with(&format!("{}/", scratch.display()), "server-2")?;
    ensure!(!servers.is_empty(), "there is no second server");
    for server in servers {
        kill(Pid::from_raw(server), Signal::SIGSTOP)?;
    }
    let output = child.wait_with_output()?;
    ensure!(reader.join().is_ok(), "its standard error could not be read");
    let verdict = bad_verdict(&output)?;
    assert_eq!(check(&verdict, "boot")?["good"], true, "{verdict:#}");
    for (name, part) in [("failover", "the second server had served next to nothing"), ("ssh", "'uname -n' ended with")]
    {
        let check = check(&verdict, name)?;
        let found = check["detail"].as_str().unwrap_or_default();
        assert!(check["good"] == false && found.contains(part), "{verdict:#}");
    }
    Ok(())
}

/// Processes on whose command line both stand.
fn processes_with(one: &str, other: &str) -> anyhow::Result<Vec<i32>> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc")?.flatten() {
        let Ok(id) = process.file_name().to_string_lossy().parse() else { continue };
        let words = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&words).replace('\0', " ");
        if line.contains(one) && line.contains(other) {
            found.push(id);
        }
    }
    Ok(found)
}

#[test]
fn what_cannot_be_tested_says_why_and_leaves_nothing() -> anyhow::Result<()> {
    let bins = Bins::find()?;
    let work = tempfile::tempdir()?;
    let scratch = work.path().join("tmp");
    std::fs::create_dir(&scratch)?;
    let (tree, image) = (work.path().join("tree"), work.path().join("empty.moor"));
    std::fs::create_dir_all(tree.join("etc"))?;
    let key = pack(&bins, &tree, &image, None)?;
    // Enough for a look at the boot files.
    let (tree_with_kernel, bootable) = (work.path().join("bootable"), work.path().join("bootable.moor"));
    std::fs::create_dir_all(tree_with_kernel.join("boot"))?;
    for name in ["vmlinuz-1", "initrd.img-1"] {
        std::fs::write(tree_with_kernel.join("boot").join(name), "x")?;
    }
    let bootable_key = pack(&bins, &tree_with_kernel, &bootable, None)?;
    let plain = work.path().join("plain.moor");
    run_shown(tied(bins.path("imgutil")).arg("pack").arg(&tree).arg("-o").arg(&plain).arg("--plain"))?;
    let wrong = work.path().join("wrong.key");
    std::fs::write(&wrong, format!("{}\n", "ab".repeat(32)))?;
    let trusted = signing_key(work.path().join("signer"))?.with_extension("pub").display().to_string();
    for (image, key, trust, reason) in [
        (&image, &key, None, "the image has no directory /boot"),
        (&image, &wrong, None, "key"),
        (&plain, &key, None, "the image is not encrypted"),
        (&work.path().join("none.moor"), &key, None, "cannot open image"),
        (&bootable, &bootable_key, Some("/no/such.pub"), "cannot read the trusted keys '/no/such.pub'"),
        (&bootable, &bootable_key, Some("/etc/passwd"), "holds no line 'ssh-ed25519 KEY'"),
        (&bootable, &bootable_key, Some(trusted.as_str()), "cannot read the signatures"),
    ] {
        let mut test = command(&bins, image, key, &scratch);
        let output = test.args(trust.map(|key| ["--trust", key]).into_iter().flatten()).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        let error = said.lines().find(|line| line.starts_with("imgutil: error: ")).unwrap_or_default();
        assert!(error.contains(reason), "{said}");
        assert!(output.stdout.is_empty());
        assert_eq!(left(&scratch)?, Vec::<String>::new());
    }
    Ok(())
}
