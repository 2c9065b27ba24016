//! Mounts and background processes of a test vanish with it: it runs in a mount and a PID namespace of its own. Memory disks are of no
//! namespace: a warden outside takes out the one that was left, whether the test fails or its whole program is killed.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::process::{Command, Output, Stdio};

/// Set in the inner run.
const MARK: &str = "MOOR_TETHER_TEST_IN_NAMESPACE";

/// Reads the number of the memory disk that the test has, or nothing once it has none any more. When nobody can write any more, the
/// test is over, and so is the disk. Its mounts may take a moment to end.
const WARDEN: &str = r#"
    while read -r number; do disk=$number; done
    [ -n "$disk" ] || exit 0
    for try in $(seq 600); do
        [ -e /sys/block/zram$disk ] || exit 0
        echo 1 >/sys/block/zram$disk/reset && echo $disk >/sys/class/zram-control/hot_remove && exit 0
        sleep 0.05
    done
"#;

/// Runs `body` in new namespaces, by starting this test program once more for the test `name` alone.
pub(crate) fn in_namespace(name: &str, body: impl FnOnce()) {
    passed(apart(name, body));
}

/// Fails unless the one test ran and passed; inside there is nothing to look at.
pub(crate) fn passed(inner: Option<Output>) {
    if let Some(output) = inner {
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).join("\n");
        assert!(output.status.success() && said.contains("1 passed"), "{}\n{said}", output.status);
    }
}

/// The same, however `body` ends; `None` inside.
pub(crate) fn apart(name: &str, body: impl FnOnce()) -> Option<Output> {
    if std::env::var_os(MARK).is_some() {
        body();
        return None;
    }
    // In a session of its own: what ends the test program must not end it.
    let mut warden = Command::new("setsid")
        .args(["sh", "-c", WARDEN])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .args(["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(MARK, "1")
        .stdin(warden.stdin.take().unwrap())
        .output()
        .unwrap();
    warden.wait().unwrap();
    Some(output)
}

/// Inside: tells the warden which memory disk this test has now.
pub(crate) fn has_memory_disk(number: Option<u32>) {
    let mut warden = File::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    warden.write_all(format!("{}\n", number.map_or_else(String::new, |number| number.to_string())).as_bytes()).unwrap();
}
