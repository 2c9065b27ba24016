//! A software TPM on two TCP ports, as a chip without a resource manager: three objects, no more.

use crate::port::free_ports;
use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tss_esapi::tcti_ldr::{NetworkTPMConfig, TctiNameConf};

/// A TPM of its own. Its state lives as long as this value; [`Swtpm::reset`] is a power cycle.
pub(crate) struct Swtpm {
    state: tempfile::TempDir,
    running: Option<(Child, u16)>,
}

/// How a TPM leaves its factory.
#[derive(Clone, Copy)]
pub(crate) struct Made {
    /// `swtpm_setup --pcr-banks`.
    pub(crate) banks: &'static str,
    /// Whether it has endorsement certificates (RSA-2048 and P-384).
    pub(crate) certified: bool,
}

impl Default for Made {
    fn default() -> Self {
        Self { banks: "sha256", certified: true }
    }
}

impl Swtpm {
    /// Makes one and switches it on.
    pub(crate) fn new(made: Made) -> Self {
        let mut tpm = Self { state: tempfile::tempdir().unwrap(), running: None };
        let path = tpm.state.path().to_owned();
        // An authority of its own, so that nothing is written under /var/lib of the machine.
        let write = |name: &str, text: String| {
            fs::write(path.join(name), text).unwrap();
            path.join(name).display().to_string()
        };
        let at = |name: &str| path.join(name).display().to_string();
        let authority = format!(
            "statedir = {}\nsigningkey = {}\nissuercert = {}\ncertserial = {}\n",
            at(""),
            at("ca-key.pem"),
            at("ca.pem"),
            at("ca-serial")
        );
        let authority = write("localca.conf", authority);
        let options =
            write("localca.options", "--platform-manufacturer M --platform-version 1 --platform-model T\n".into());
        let setup = write(
            "setup.conf",
            format!(
                "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {authority}\ncreate_certs_tool_options = {options}\n"
            ),
        );
        let mut command = Command::new("swtpm_setup");
        command.args(["--tpm2", "--overwrite", "--config", &setup, "--pcr-banks", made.banks, "--tpmstate"]).arg(&path);
        if made.certified {
            command.arg("--create-ek-cert");
        }
        good(&mut command);
        tpm.start();
        tpm
    }

    fn start(&mut self) {
        for _ in 0..20 {
            // libtss2 takes the port after the TPM's for control.
            let port = free_ports(2);
            let mut child = Command::new("setpriv")
                .args([
                    "--pdeathsig",
                    "KILL",
                    "--",
                    "swtpm",
                    "socket",
                    "--tpm2",
                    "--flags",
                    "not-need-init,startup-clear",
                ])
                .args(["--tpmstate", &format!("dir={}", self.state.path().display())])
                .args(["--server", &format!("type=tcp,bindaddr=127.0.0.1,port={port}")])
                .args(["--ctrl", &format!("type=tcp,bindaddr=127.0.0.1,port={}", port + 1)])
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let end = Instant::now() + Duration::from_secs(20);
            while Instant::now() < end && child.try_wait().unwrap().is_none() {
                // The control port only: the other one serves a single client.
                if TcpStream::connect((Ipv4Addr::LOCALHOST, port + 1)).is_ok() {
                    self.running = Some((child, port));
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            // Somebody else took a port meanwhile.
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("swtpm does not start");
    }

    fn stop(&mut self) {
        if let Some((mut child, _)) = self.running.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// A power cycle.
    pub(crate) fn reset(&mut self) {
        self.stop();
        self.start();
    }

    pub(crate) fn port(&self) -> u16 {
        self.running.as_ref().unwrap().1
    }

    /// For tss-esapi.
    pub(crate) fn transport(&self) -> TctiNameConf {
        let text = format!("host=127.0.0.1,port={}", self.port());
        TctiNameConf::Swtpm(text.parse::<NetworkTPMConfig>().unwrap())
    }

    /// A file beside its state.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.state.path().join(name)
    }

    /// A command of tpm2-tools on this TPM, in the folder of its state. It must succeed; its standard output.
    pub(crate) fn tool(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        command.args(words).current_dir(self.state.path());
        command.env("TPM2TOOLS_TCTI", format!("swtpm:host=127.0.0.1,port={}", self.port()));
        String::from_utf8(good(&mut command).stdout).unwrap()
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs a command that must succeed.
pub(crate) fn good(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Writes a file beside the state.
pub(crate) fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
}
