//! A software TPM for one VM. Its state is a folder; the same folder is the same TPM.

use crate::VmError;
use crate::process::{Guard, run, spawn, tied, wait_for};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A running swtpm.
pub struct Swtpm {
    guard: Guard,
    socket: PathBuf,
}

impl Swtpm {
    /// Starts it on `state`; a folder that does not exist yet becomes a newly made TPM with an endorsement key certificate.
    ///
    /// # Errors
    /// swtpm or `swtpm_setup` is missing or fails.
    pub fn start(state: &Path) -> Result<Self, VmError> {
        if !state.join("tpm2-00.permall").exists() {
            manufacture(state)?;
        }
        let socket = state.join("control.sock");
        let guard = Guard::new(spawn(
            tied("swtpm")
                .args(["socket", "--tpm2", "--tpmstate"])
                .arg(format!("dir={}", state.display()))
                .arg("--ctrl")
                .arg(format!("type=unixio,path={}", socket.display()))
                .args(["--log", &format!("file={},level=1", state.join("swtpm.log").display())])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        )?);
        wait_for::<VmError>("swtpm's control socket", Duration::from_secs(10), || Ok(socket.exists()))?;
        Ok(Self { guard, socket })
    }

    /// The control socket for QEMU.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Stops it; the state stays.
    pub fn stop(&mut self) {
        self.guard.kill();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Makes a TPM as its manufacturer would: seed, endorsement keys and their certificates.
fn manufacture(state: &Path) -> Result<(), VmError> {
    // A certificate authority of its own, so that nothing is written under /var/lib of the machine.
    let authority = state.join("ca");
    std::fs::create_dir_all(&authority).map_err(VmError::io("make", &authority))?;
    let write = |name: &str, text: String| {
        let path = state.join(name);
        std::fs::write(&path, text).map_err(VmError::io("write", &path)).map(|()| path)
    };
    let at = |name: &str| authority.join(name).display().to_string();
    let config = write(
        "localca.conf",
        format!(
            "statedir = {}\nsigningkey = {}\nissuercert = {}\ncertserial = {}\n",
            authority.display(),
            at("signkey.pem"),
            at("issuercert.pem"),
            at("certserial")
        ),
    )?;
    let options = write(
        "localca.options",
        "--platform-manufacturer Mooring\n--platform-version 1\n--platform-model lab\n".to_owned(),
    )?;
    let setup = write(
        "setup.conf",
        format!(
            "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {}\ncreate_certs_tool_options = {}\nactive_pcr_banks = sha256\n",
            config.display(),
            options.display()
        ),
    )?;
    run(Command::new("swtpm_setup")
        .arg("--tpm2")
        .arg("--tpmstate")
        .arg(state)
        .args(["--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--overwrite", "--config"])
        .arg(&setup))?;
    Ok(())
}
