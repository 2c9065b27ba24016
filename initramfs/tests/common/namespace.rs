//! Mounts and background processes of a test vanish with it: it runs in a mount and a PID namespace of its own.

use std::process::{Command, Stdio};

/// Set in the inner run.
const MARK: &str = "MOOR_TETHER_TEST_IN_NAMESPACE";

/// Runs `body` in new namespaces, by starting this test program once more for the test `name` alone.
pub(crate) fn in_namespace(name: &str, body: impl FnOnce()) {
    if std::env::var_os(MARK).is_some() {
        body();
        return;
    }
    let output = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .args(["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(MARK, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).join("\n");
    assert!(output.status.success() && said.contains("1 passed"), "{}\n{said}", output.status);
}
