//! The main path, as the demo and the boot test walk it: tree, sealed image, member, profile, node, VM.

use crate::bins::Bins;
use crate::member::Member;
use crate::process::{run, run_shown, text, tied, wait_for};
use crate::tree::{self, Initramfs};
use anyhow::Context as _;
use moor_api::admin::StatusEvent;
use moor_vm::{Namespace, Swtpm, Vm, VmOptions};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The profile, the image and the node of the scenario.
pub const PROFILE: &str = "demo";
/// The node's name.
pub const NODE: &str = "n1";
/// Its SMBIOS UUID.
pub const UUID: &str = "5f1e7a52-30a3-4f6c-9d3e-6c2f9a1b0c01";
/// Its MAC.
pub const MAC: &str = "52:54:00:6d:6f:01";

/// From power on to `booted`, in emulation on a busy machine.
pub const BOOT_LIMIT: Duration = Duration::from_mins(10);

/// One step that took a while.
#[derive(Debug, Clone)]
pub struct Step {
    /// What was done.
    pub name: String,
    /// How long it took.
    pub took: Duration,
}

/// Everything that is up. Fields are dropped in order: the VM, its TPM, the member, the namespace.
pub struct Scenario {
    /// Programs.
    pub bins: Bins,
    /// Files of this run.
    pub dir: PathBuf,
    /// The member.
    pub member: Member,
    /// The network.
    pub namespace: Namespace,
    /// Steps so far.
    pub steps: Vec<Step>,
    /// Size of the sealed image in bytes.
    pub image_size: u64,
    /// The image file and its key.
    pub image: PathBuf,
    /// The key file.
    pub key: PathBuf,
    /// Memory of VMs in MiB.
    pub memory: u32,
    /// Whether VMs run on KVM; off until somebody proved that it works here.
    pub kvm: bool,
}

impl Scenario {
    /// From nothing to a node that is defined and may be switched on. `say` is told each step as it begins.
    ///
    /// # Errors
    /// A step failed; with what it printed.
    pub fn prepare(dir: &Path, say: &mut dyn FnMut(&str)) -> anyhow::Result<Self> {
        Self::with_initramfs(Initramfs::InitramfsTools, dir, say)
    }

    /// The same with an initramfs made by another tool.
    ///
    /// # Errors
    /// A step failed; with what it printed.
    pub fn with_initramfs(initramfs: Initramfs, dir: &Path, say: &mut dyn FnMut(&str)) -> anyhow::Result<Self> {
        let bins = Bins::find()?;
        let begin = Instant::now();
        let tree = tree::debian(&bins, initramfs, say)?;
        let took = begin.elapsed();
        let mut scenario = Self::of_tree(bins, &tree, 9, dir, say)?;
        scenario.steps.insert(0, Step { name: "root tree (imgutil build)".to_owned(), took });
        Ok(scenario)
    }

    /// The same with a tree that is there, packed at a zstd level.
    ///
    /// # Errors
    /// A step failed; with what it printed.
    pub fn of_tree(bins: Bins, tree: &Path, level: u32, dir: &Path, say: &mut dyn FnMut(&str)) -> anyhow::Result<Self> {
        let mut steps = Vec::new();
        let mut last = Instant::now();
        let mut done = |name: &str, steps: &mut Vec<Step>| {
            steps.push(Step { name: name.to_owned(), took: last.elapsed() });
            last = Instant::now();
        };

        say("packing it into a sealed image: compressed, encrypted, signed (imgutil pack)");
        let signer = dir.join("signer");
        run(tied("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "builder", "-f"]).arg(&signer))?;
        let (image, key, boot) = (dir.join("root.moor"), dir.join("root.key"), dir.join("boot-files"));
        run_shown(
            tied(bins.path("imgutil"))
                .arg("pack")
                .arg(tree)
                .args(["--level", &level.to_string()])
                .arg("-o")
                .arg(&image)
                .arg("--key-file")
                .arg(&key)
                .arg("--boot-dir")
                .arg(&boot)
                .arg("--sign-key")
                .arg(&signer)
                .args(["--name", PROFILE]),
        )
        .context("imgutil pack")?;
        let image_size = std::fs::metadata(&image)?.len();
        done("sealed image (imgutil pack)", &mut steps);

        say("making a collective of one member and starting it as an unprivileged user (moord)");
        let namespace = Namespace::new()?;
        let member = Member::start_in(dir, &bins, &namespace)?;
        done("server (moord init, run)", &mut steps);

        say("importing the image, publishing a profile, defining the node (moor)");
        let path = |path: &Path| path.display().to_string();
        member.moor_ok(&[
            "image",
            "import",
            PROFILE,
            &path(&image),
            "--key-file",
            &path(&key),
            "--boot-dir",
            &path(&boot),
        ])?;
        member.moor_ok(&["profile", "create", PROFILE, "--image", PROFILE])?;
        let login = dir.join("login");
        run(tied("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "demo", "-f"]).arg(&login))?;
        let public = std::fs::read_to_string(login.with_extension("pub"))?;
        member.moor_ok(&["profile", "publish", PROFILE])?;
        member.moor_ok(&[
            "node",
            "define",
            NODE,
            &format!("id.uuid={UUID}"),
            &format!("net.hwaddr={MAC}"),
            "net.ipv4_method=dhcp",
            &format!("pubkeys.ssh={}", public.trim()),
        ])?;
        member.moor_ok(&["deploy", NODE, "-n", PROFILE])?;
        std::fs::write(dir.join("known_hosts"), member.moor_ok(&["site", "--known-hosts"])?)?;
        member.moor_ok(&["profile", "boot-files", PROFILE, "--out", &path(&dir.join("netboot"))])?;
        done("catalogue, profile, node (moor)", &mut steps);
        Ok(Self {
            bins,
            dir: dir.to_owned(),
            member,
            namespace,
            steps,
            image_size,
            image,
            key,
            memory: 2048,
            kvm: false,
        })
    }

    /// The kernel as the member gives it out.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("netboot/vmlinuz")
    }

    /// Switches the node on with the TPM in `dir/TPM`.
    ///
    /// # Errors
    /// swtpm or QEMU failed.
    pub fn power_on(&self, name: &str, tpm: &Swtpm, ssh_port: u16) -> anyhow::Result<Vm> {
        self.power_on_with(name, tpm, ssh_port, &[])
    }

    /// The same with disks in it.
    ///
    /// # Errors
    /// swtpm or QEMU failed.
    pub fn power_on_with(&self, name: &str, tpm: &Swtpm, ssh_port: u16, disks: &[PathBuf]) -> anyhow::Result<Vm> {
        let netboot = self.dir.join("netboot");
        let command_line = std::fs::read_to_string(netboot.join("cmdline"))?;
        let options = VmOptions {
            kernel: self.kernel(),
            initramfs: netboot.join("initrd.img"),
            command_line: format!("{} console=ttyS0 panic=-1", command_line.trim()),
            uuid: UUID.into(),
            mac: MAC.into(),
            memory: self.memory,
            ssh_port,
            disks: disks.to_vec(),
            kvm: self.kvm,
        };
        Ok(Vm::start(&self.namespace, &self.dir.join(name), &options, Some(tpm))?)
    }

    /// The ids of all boots that said `booted`.
    ///
    /// # Errors
    /// The member does not answer.
    pub fn booted_boots(&self) -> anyhow::Result<BTreeSet<String>> {
        let states = self.states()?;
        let booted = states.iter().filter(|event| event.state == "booted");
        Ok(booted.filter_map(|event| event.boot.map(|boot| boot.to_string())).collect())
    }

    /// Waits until one boot more than in `before` says `booted`.
    ///
    /// # Errors
    /// It does not, the boot fails, or the VM ends; with the ends of the console and of the member's log.
    pub fn wait_booted(&self, vm: &mut Vm, before: &BTreeSet<String>) -> anyhow::Result<()> {
        wait_for("the state 'booted'", BOOT_LIMIT, || {
            std::thread::sleep(Duration::from_millis(500));
            anyhow::ensure!(vm.is_running(), "the VM ended");
            let states = self.states()?;
            if let Some(failed) = states.iter().find(|event| event.state == "failed") {
                anyhow::bail!("the node failed: {}", failed.detail);
            }
            Ok(self.booted_boots()?.len() > before.len())
        })
        .with_context(|| format!("console:\n{}\n{}", vm.console_tail(60), self.member.log_tail()))
    }

    /// The node's states so far, oldest first.
    ///
    /// # Errors
    /// The member does not answer.
    pub fn states(&self) -> anyhow::Result<Vec<StatusEvent>> {
        let lines = self.member.moor_ok(&["--json", "status", "--history", NODE])?;
        lines.lines().map(|line| serde_json::from_str(line).context("reading a status event")).collect()
    }

    /// Runs a command on the node by ssh, trusting the SSH host authority alone.
    ///
    /// # Errors
    /// ssh failed, or the command did.
    pub fn on_node(&self, vm: &Vm, command: &str) -> anyhow::Result<String> {
        Ok(text(&mut self.shell_on_node(vm, command))?)
    }

    /// The same as a command that was not started yet.
    #[must_use]
    pub fn shell_on_node(&self, vm: &Vm, command: &str) -> Command {
        let (known_hosts, login) = (self.dir.join("known_hosts"), self.dir.join("login"));
        vm.ssh(&self.namespace, NODE, &known_hosts, &login, &[command])
    }

    /// Checks that PCR 15 is closed: in the run stage no node may prove itself as one that boots.
    ///
    /// # Errors
    /// It is open, or ssh failed.
    pub fn check_closed(&self, vm: &Vm) -> anyhow::Result<()> {
        let value = self.on_node(vm, "cat /sys/class/tpm/tpm0/pcr-sha256/15")?;
        anyhow::ensure!(!value.bytes().all(|byte| byte == b'0'), "PCR 15 is open in the run stage: {value}");
        Ok(())
    }

    /// Has the node power itself off, and waits until it has: its root is served to the last.
    ///
    /// # Errors
    /// It is still on after [`BOOT_LIMIT`]; with the end of its console.
    pub fn power_off_in_order(&self, vm: &mut Vm) -> anyhow::Result<()> {
        // The connection may end before the answer.
        let _ = self.on_node(vm, "systemctl poweroff");
        wait_for("the end of the VM after 'poweroff'", BOOT_LIMIT, || Ok(!vm.is_running()))
            .with_context(|| vm.console_tail(60))
    }
}
