//! A software TPM for one VM. Its state is a folder; the same folder is the same TPM.

use crate::process::{Guard, run, tied, wait_for};
use anyhow::Context as _;
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
    pub fn start(state: &Path) -> anyhow::Result<Self> {
        if !state.join("tpm2-00.permall").exists() {
            manufacture(state)?;
        }
        let socket = state.join("control.sock");
        let guard = Guard::new(
            tied("swtpm")
                .args(["socket", "--tpm2", "--tpmstate"])
                .arg(format!("dir={}", state.display()))
                .arg("--ctrl")
                .arg(format!("type=unixio,path={}", socket.display()))
                .args(["--log", &format!("file={},level=1", state.join("swtpm.log").display())])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .context("starting swtpm")?,
        );
        wait_for("swtpm's control socket", Duration::from_secs(10), || Ok(socket.exists()))?;
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
fn manufacture(state: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(state).with_context(|| format!("making '{}'", state.display()))?;
    // A certificate authority of its own, so that nothing is written under /var/lib of the machine.
    let authority = state.join("ca");
    std::fs::create_dir_all(&authority)?;
    let config = state.join("localca.conf");
    let at = |name: &str| authority.join(name).display().to_string();
    std::fs::write(
        &config,
        format!(
            "statedir = {}\nsigningkey = {}\nissuercert = {}\ncertserial = {}\n",
            authority.display(),
            at("signkey.pem"),
            at("issuercert.pem"),
            at("certserial")
        ),
    )?;
    let options = state.join("localca.options");
    std::fs::write(&options, "--platform-manufacturer Mooring\n--platform-version 1\n--platform-model lab\n")?;
    let setup = state.join("setup.conf");
    std::fs::write(
        &setup,
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
        .arg(&setup))
    .context("making a TPM with swtpm_setup")?;
    Ok(())
}
