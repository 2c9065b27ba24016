//! One VM: QEMU by emulation (or KVM where a probe proved it), a serial log, ssh, and a time limit on every wait.

use crate::VmError;
use crate::namespace::Namespace;
use crate::process::{Guard, spawn, tail, tied, wait_for};
use crate::swtpm::Swtpm;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// The way from a VM to its namespace's loopback.
pub const HOST_FROM_GUEST: &str = "10.0.2.2";

const QEMU: &str = "qemu-system-x86_64";

/// What the machine is.
#[derive(Debug, Clone)]
pub struct VmOptions {
    /// Kernel and initramfs as the member gives them out.
    pub kernel: PathBuf,
    /// One file: the image's initramfs with the site cpio behind it.
    pub initramfs: PathBuf,
    /// Kernel command line.
    pub command_line: String,
    /// SMBIOS UUID.
    pub uuid: String,
    /// MAC of its one network card.
    pub mac: String,
    /// Memory in MiB.
    pub memory: u32,
    /// Port on the namespace's loopback that leads to the guest's sshd.
    pub ssh_port: u16,
    /// Files that are its disks (raw), in order: `/dev/vda` and so on.
    pub disks: Vec<PathBuf>,
    /// Use /dev/kvm; only after [`kvm_works`].
    pub kvm: bool,
}

/// A running VM; killed on drop.
pub struct Vm {
    guard: Guard,
    console: PathBuf,
    errors: PathBuf,
    ssh_port: u16,
    tpm: Option<Swtpm>,
}

impl Vm {
    /// Switches it on. The console goes to `dir/console.log`.
    ///
    /// # Errors
    /// QEMU is missing.
    pub fn start(namespace: &Namespace, dir: &Path, options: &VmOptions, tpm: Option<&Swtpm>) -> Result<Self, VmError> {
        std::fs::create_dir_all(dir).map_err(VmError::io("make", dir))?;
        let (console, errors) = (dir.join("console.log"), dir.join("qemu.log"));
        let log = std::fs::File::create(&errors).map_err(VmError::io("write", &errors))?;
        let mut qemu = tied(QEMU);
        // `max`: the plain model lacks AES and SSSE3, and then every TLS record is computed byte by byte.
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35"]);
        if options.kvm {
            qemu.args(["-accel", "kvm", "-cpu", "host"]);
        } else {
            // Without erms: string moves are emulated byte by byte, and the kernel then clears pages by larger ones.
            qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm"]);
        }
        qemu.args(["-smp", "2", "-m", &options.memory.to_string()]);
        qemu.arg("-kernel").arg(&options.kernel).arg("-initrd").arg(&options.initramfs);
        qemu.args(["-append", &options.command_line, "-uuid", &options.uuid]);
        qemu.args(["-smbios", &format!("type=1,manufacturer=Mooring,product=Lab,serial=LAB-{}", options.ssh_port)]);
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        qemu.args(["-netdev", &format!("user,id=net0,hostfwd=tcp:127.0.0.1:{}-:22", options.ssh_port)]);
        qemu.args(["-device", &format!("virtio-net-pci,netdev=net0,mac={},romfile=", options.mac)]);
        qemu.args(["-device", "virtio-rng-pci"]);
        for (index, disk) in options.disks.iter().enumerate() {
            qemu.arg("-drive").arg(format!("file={},if=none,id=disk{index},format=raw,cache=unsafe", disk.display()));
            qemu.args(["-device", &format!("virtio-blk-pci,drive=disk{index}")]);
        }
        if let Some(tpm) = tpm {
            qemu.arg("-chardev").arg(format!("socket,id=tpm0,path={}", tpm.socket().display()));
            qemu.args(["-tpmdev", "emulator,id=tpm0,chardev=tpm0", "-device", "tpm-crb,tpmdev=tpm0"]);
        }
        let guard = Guard::new(spawn(namespace.enter(&qemu).stdout(Stdio::null()).stderr(log))?);
        Ok(Self { guard, console, errors, ssh_port: options.ssh_port, tpm: None })
    }

    /// Takes over the TPM of a machine that nobody else needs it for: they end together.
    pub fn keep(&mut self, tpm: Swtpm) {
        self.tpm = Some(tpm);
    }

    /// All that the console showed so far.
    #[must_use]
    pub fn console(&self) -> String {
        std::fs::read(&self.console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until the console shows `text` after byte `from`; returns the offset behind it.
    ///
    /// # Errors
    /// It did not, or QEMU ended; then with the console's last lines.
    pub fn wait_console(&mut self, text: &str, from: usize, limit: Duration) -> Result<usize, VmError> {
        let mut found = 0;
        wait_for(&format!("'{text}' on the console"), limit, || {
            let console = self.console();
            let at = console.get(from..).and_then(|rest| rest.find(text));
            found = at.map_or(0, |at| from + at + text.len());
            if at.is_none() {
                self.check_running()?;
            }
            Ok(at.is_some())
        })
        .map_err(|error: VmError| match error {
            VmError::TimedOut { what, seconds } => VmError::TimedOut {
                what: format!("{what}, which ends with\n{}\n, and that", self.console_tail(40)),
                seconds,
            },
            other => other,
        })?;
        Ok(found)
    }

    /// The last lines of the console.
    #[must_use]
    pub fn console_tail(&self, lines: usize) -> String {
        tail(&self.console(), lines)
    }

    /// Whether QEMU still runs.
    pub fn is_running(&mut self) -> bool {
        self.guard.is_running()
    }

    /// That QEMU still runs.
    ///
    /// # Errors
    /// It ended; with what it said and the end of the console.
    pub fn check_running(&mut self) -> Result<(), VmError> {
        if self.guard.is_running() {
            return Ok(());
        }
        let said = std::fs::read_to_string(&self.errors).unwrap_or_default();
        Err(VmError::Ended { what: "the VM".into(), said: format!("{}{}", said, self.console_tail(40)) })
    }

    /// Switches it off, as if the plug were pulled.
    pub fn power_off(&mut self) {
        self.guard.kill();
        if let Some(mut tpm) = self.tpm.take() {
            tpm.stop();
        }
    }

    /// A command for `ssh root@NODE COMMAND…` with strict host key checking against `known_hosts` alone.
    #[must_use]
    pub fn ssh(
        &self,
        namespace: &Namespace,
        node: &str,
        known_hosts: &Path,
        identity: &Path,
        command: &[&str],
    ) -> Command {
        let mut ssh = tied("ssh");
        ssh.args(["-F", "none", "-p", &self.ssh_port.to_string(), "-l", "root", "-i"]).arg(identity);
        ssh.arg("-o").arg(format!("UserKnownHostsFile={}", known_hosts.display()));
        ssh.args(["-o", "GlobalKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes"]);
        // The certificate's principal is the node's name; the address is the tunnel's.
        ssh.args(["-o", &format!("HostKeyAlias={node}"), "-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=30"]);
        // A guest that hangs is noticed.
        ssh.args(["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8"]);
        ssh.arg("127.0.0.1").args(command);
        namespace.enter(&ssh)
    }

    /// Runs a command in the guest by ssh.
    ///
    /// # Errors
    /// ssh is missing; the status of the command is the caller's to judge.
    pub fn ssh_output(
        &self,
        namespace: &Namespace,
        node: &str,
        known_hosts: &Path,
        identity: &Path,
        command: &[&str],
    ) -> Result<Output, VmError> {
        self.ssh(namespace, node, known_hosts, identity, command)
            .output()
            .map_err(|source| VmError::Start { program: "ssh".into(), source })
    }
}

/// Whether /dev/kvm runs a guest: it may exist and open, and its guests hang all the same. Boots `kernel` without anything
/// and waits 5 s for the first line of its console.
#[must_use]
pub fn kvm_works(namespace: &Namespace, dir: &Path, kernel: &Path) -> bool {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return false;
    }
    let log = dir.join("kvm-probe.log");
    let mut qemu = tied(QEMU);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35"]);
    qemu.args(["-accel", "kvm", "-cpu", "host", "-m", "256"]);
    qemu.arg("-kernel").arg(kernel).args(["-append", "console=ttyS0 earlyprintk=serial panic=-1"]);
    qemu.arg("-serial").arg(format!("file:{}", log.display()));
    let Ok(child) = spawn(namespace.enter(&qemu).stdout(Stdio::null()).stderr(Stdio::null())) else { return false };
    let _guard = Guard::new(child);
    wait_for::<VmError>("the probe's first line", Duration::from_secs(5), || {
        Ok(std::fs::read(&log).is_ok_and(|bytes| bytes.windows(13).any(|window| window == b"Linux version")))
    })
    .is_ok()
}
