//! The scripts of the initramfs in the kernel that runs after a crash. Each runs in namespaces of its own, in which there is a dump and a
//! reboot is but a word.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

const INITRAMFS_TOOLS: &str = "initramfs-tools/usr/share/initramfs-tools/scripts/moor; mountroot";
const DRACUT: &str = "dracut/usr/lib/dracut/modules.d/90moor/moor-root.sh";

/// What the initramfs has. Nothing may come after a reboot.
const AROUND: &str = r#"
    touch /proc/vmcore
    getarg() { return 1; }
    sleep() { echo "sleep $*"; }
    reboot() { echo "reboot $*"; exit 0; }
"#;

/// What a script says where `tool` was done before.
fn said(script: &str, tool: &str) -> String {
    let folder = env!("CARGO_MANIFEST_DIR");
    let text = format!("set -e\n{tool}\nmount -t tmpfs none /proc\n{AROUND}\n. {folder}/{script}\n");
    let output =
        Command::new("unshare").args(["--mount", "--pid", "--fork", "--", "sh", "-c", &text]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_dump_that_nobody_saves_is_told_of_and_the_machine_reboots_without_the_agent() {
    for script in [INITRAMFS_TOOLS, DRACUT] {
        let said = said(script, "");
        let lines: Vec<_> = said.lines().collect();
        let [line, "sleep 10", "reboot -f"] = lines[..] else { panic!("{script}: {said}") };
        assert!(line.starts_with("moor: a crash kernel, and nothing in its initramfs save"), "{line}");
    }
}

#[test]
fn a_dump_is_left_to_what_saves_it_under_dracut() {
    for unit in ["kdump-capture.service", "kdump-save.service"] {
        let tool = format!(
            "mount -t tmpfs none /usr/lib/systemd; mkdir /usr/lib/systemd/system; touch /usr/lib/systemd/system/{unit}"
        );
        assert_eq!(said(DRACUT, &tool), "", "{unit}");
    }
}
