//! Where the kernel and the firmware show a TPM.

use super::super::IdentityError;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The TPM behind the kernel's resource manager.
const DEVICE: &str = "dev/tpmrm0";

/// The firmware's record of what it measured. `securityfs` is mounted by the caller of the agent.
const EVENT_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";

/// Longest event log that is sent (the API's bound).
const MAX_EVENT_LOG: u64 = 512 << 10;

/// The device of the TPM 2.0, `None` where the machine has none. `root` is `/`, except in tests.
///
/// # Errors
/// The firmware announces one, and no driver made the device within `wait`.
pub(crate) fn wait_for(root: &Path, wait: Duration) -> Result<Option<PathBuf>, IdentityError> {
    let device = root.join(DEVICE);
    let end = Instant::now() + wait;
    loop {
        if device.exists() {
            return Ok(Some(device));
        }
        if !is_announced(root) {
            return Ok(None);
        }
        if Instant::now() >= end {
            return Err(IdentityError::NoDriver { device, seconds: wait.as_secs() });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether firmware or kernel know of a TPM 2.0: its ACPI table, or a driver that is bound. (A TPM 1.2 has the table "TCPA".)
fn is_announced(root: &Path) -> bool {
    let version = std::fs::read_to_string(root.join("sys/class/tpm/tpm0/tpm_version_major"));
    root.join("sys/firmware/acpi/tables/TPM2").exists() || version.is_ok_and(|version| version.trim() == "2")
}

/// The firmware's event log; `None` where there is none, and where it is longer than may be sent: half a log replays to nothing.
pub(super) fn event_log() -> Option<moor_api::node::Base64> {
    read_bounded(Path::new(EVENT_LOG)).map(moor_api::node::Base64)
}

fn read_bounded(path: &Path) -> Option<Vec<u8>> {
    let mut log = Vec::new();
    File::open(path).ok()?.take(MAX_EVENT_LOG + 1).read_to_end(&mut log).ok()?;
    if log.len() as u64 > MAX_EVENT_LOG {
        tracing::warn!(path = %path.display(), limit = MAX_EVENT_LOG, "the TPM's event log is longer than may be sent: it is left out");
        return None;
    }
    (!log.is_empty()).then_some(log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn a_machine_without_a_tpm_is_not_waited_for() {
        let start = Instant::now();
        for files in
            [&[][..], &[("sys/class/tpm/tpm0/tpm_version_major", "1\n")], &[("sys/firmware/acpi/tables/TCPA", "")]]
        {
            assert_eq!(wait_for(machine(files).path(), Duration::from_mins(1)).unwrap(), None, "{files:?}");
        }
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_tpm_that_is_announced_and_has_no_driver_is_an_error() {
        for file in [("sys/firmware/acpi/tables/TPM2", ""), ("sys/class/tpm/tpm0/tpm_version_major", "2\n")] {
            let error = wait_for(machine(&[file]).path(), Duration::from_millis(10)).unwrap_err().to_string();
            assert!(error.contains("tpm_crb") && error.contains("dev/tpmrm0"), "{error}");
        }
    }

    #[test]
    fn the_device_is_found_also_when_it_comes_late() {
        let root = machine(&[("sys/firmware/acpi/tables/TPM2", ""), ("dev/null", "")]);
        let device = root.path().join(DEVICE);
        let found = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| wait_for(root.path(), Duration::from_mins(1)));
            fs::write(&device, "").unwrap();
            waiter.join().unwrap()
        });
        assert_eq!(found.unwrap(), Some(device));
    }

    #[test]
    fn a_log_is_sent_whole_or_not_at_all() {
        let root = machine(&[("log", "events"), ("empty", "")]);
        fs::write(root.path().join("long"), vec![1; 512 << 10]).unwrap();
        fs::write(root.path().join("too-long"), vec![1; (512 << 10) + 1]).unwrap();
        let length = |name: &str| read_bounded(&root.path().join(name)).map(|log| log.len());
        assert_eq!(length("log"), Some(6));
        assert_eq!(length("long"), Some(512 << 10));
        assert_eq!(length("too-long"), None);
        assert_eq!(length("empty"), None);
        assert_eq!(length("absent"), None);
    }
}
