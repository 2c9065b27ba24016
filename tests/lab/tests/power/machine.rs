//! A machine as small as can be that runs a member: a kernel, and in its initramfs `moord` and what puts the disk with its state and the network in their
//! places. It is switched off by SIGKILL.

use crate::disk::Disk;
use crate::port::free_ports;
use anyhow::{Context as _, bail, ensure};
use moor_lab::Bins;
use moor_lab::process::{Guard, run, text, tied};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What its kernel needs besides itself.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_net", "ext4"];
/// The programs that its first process calls, and itself.
const PROGRAMS: [&str; 5] = ["sh", "mount", "modprobe", "ip", "setpriv"];
/// What it says when the member begins.
const BEGINS: &str = "init: the member begins";
/// How long it may take to that, in emulation on a busy machine.
const LIMIT: Duration = Duration::from_mins(3);
/// Where the member listens in it.
const PORT: u16 = 8443;

/// An end of this script is one of the machine: the kernel panics, and QEMU ends.
fn init(uid: u32) -> String {
    format!(
        "#!/bin/sh
set -e
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
modprobe -a {}
mount -t ext4 /dev/vda /disk
ip link set lo up
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
echo {BEGINS}
setpriv --reuid {uid} --regid {uid} --clear-groups --inh-caps=-all -- moord run --config /moord.toml
",
        MODULES.join(" ")
    )
}

fn config() -> String {
    format!(
        "name = \"lab\"\nstate_dir = \"/disk/state\"\nsocket = \"/run/api.sock\"\nlisten = [\"0.0.0.0:{PORT}\"]\n\
         urls = [\"https://127.0.0.1:{PORT}\"]\ntemplates = \"/profiles\"\n"
    )
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to.parent().context("no folder")?)?;
    std::fs::copy(from, to).with_context(|| format!("copying '{}'", from.display()))?;
    Ok(())
}

fn find(program: &str) -> anyhow::Result<PathBuf> {
    ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
        .into_iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.exists())
        .with_context(|| format!("there is no '{program}' on this machine"))
}

/// Puts a program into the tree `root`, with the libraries that it is linked with.
fn add(root: &Path, program: &Path) -> anyhow::Result<()> {
    let to = root.join("bin").join(program.file_name().context("no name")?);
    copy(program, &to)?;
    let linked = text(tied("ldd").arg(program)).with_context(|| format!("ldd {}", program.display()))?;
    for library in linked.split_whitespace().filter_map(|word| word.strip_prefix('/')) {
        copy(&Path::new("/").join(library), &root.join(library))?;
    }
    Ok(())
}

/// What machines are made of.
pub(crate) struct Model {
    kernel: PathBuf,
    initramfs: PathBuf,
    dir: PathBuf,
}

impl Model {
    /// With the kernel of a Debian tree; files go to `dir`. The member runs as user `uid`.
    pub(crate) fn new(bins: &Bins, tree: &Path, dir: &Path, uid: u32) -> anyhow::Result<Self> {
        let modules = std::fs::read_dir(tree.join("usr/lib/modules"))?.next().context("a tree without a kernel")??;
        let version = modules.file_name().into_string().ok().context("a kernel without a name")?;
        let root = dir.join("root");
        for folder in ["dev", "proc", "sys", "disk", "run", "tmp"] {
            std::fs::create_dir_all(root.join(folder))?;
        }
        for folder in ["run", "tmp"] {
            std::fs::set_permissions(root.join(folder), std::fs::Permissions::from_mode(0o1777))?;
        }
        for module in MODULES {
            let mut modprobe = tied("modprobe");
            modprobe.arg("--dirname").arg(tree).args(["--set-version", &version, "--show-depends", module]);
            for line in text(&mut modprobe).context("looking for modules")?.lines() {
                let Some(path) = line.strip_prefix("insmod ") else { continue };
                let path = Path::new(path.trim());
                copy(path, &root.join(path.strip_prefix(tree).context("a module outside of the tree")?))?;
            }
        }
        run(tied("depmod").arg("-b").arg(&root).arg(&version)).context("depmod")?;
        for program in PROGRAMS {
            add(&root, &find(program)?)?;
        }
        // With its symbols it is several times as large, and all of it goes into memory.
        let moord = dir.join("moord");
        run(tied("strip").arg("-o").arg(&moord).arg(bins.path("moord"))).context("strip")?;
        add(&root, &moord)?;
        run(tied("cp").arg("-r").arg(bins.workspace.join("profiles")).arg(&root)).context("copying the profiles")?;
        std::fs::write(root.join("moord.toml"), config())?;
        std::fs::write(root.join("init"), init(uid))?;
        std::fs::set_permissions(root.join("init"), std::fs::Permissions::from_mode(0o755))?;
        let initramfs = dir.join("initramfs");
        let mut pack = tied("sh");
        pack.args(["-c", "find . | cpio --quiet -o -H newc >\"$1\"", "sh"]).arg(&initramfs).current_dir(&root);
        run(&mut pack).context("packing the initramfs")?;
        Ok(Self { kernel: tree.join("boot").join(format!("vmlinuz-{version}")), initramfs, dir: dir.to_owned() })
    }

    /// Switches a machine with this disk on.
    pub(crate) fn start(&self, disk: Arc<Disk>) -> anyhow::Result<Machine> {
        let (socket, console, errors) =
            (self.dir.join("disk.sock"), self.dir.join("console"), self.dir.join("qemu.log"));
        let _ = std::fs::remove_file(&socket);
        std::fs::write(&console, "")?;
        let listener = UnixListener::bind(&socket).context("listening for QEMU")?;
        let port = free_ports(1);
        let mut qemu = tied("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"]);
        // As other machines of the lab: see moor_vm.
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm", "-smp", "2", "-m", "512"]);
        qemu.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initramfs);
        qemu.args(["-append", "console=ttyS0 loglevel=4 mitigations=off panic=-1"]);
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        qemu.arg("-netdev").arg(format!("user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{PORT}"));
        qemu.args(["-device", "virtio-net-pci,netdev=net0,romfile="]);
        // With a cache to the guest, which has to flush it. There is none on this side: a write goes to who serves the disk.
        qemu.arg("-drive")
            .arg(format!("file=nbd+unix:///?socket={},if=none,id=disk,format=raw,cache=writeback", socket.display()));
        qemu.args(["-device", "virtio-blk-pci,drive=disk"]);
        let log = std::fs::File::create(&errors)?;
        let child = qemu.stdout(Stdio::null()).stderr(log).spawn().context("starting QEMU")?;
        let mut guard = Guard::new(child);
        // A QEMU that does not come must not be waited for without an end.
        listener.set_nonblocking(true)?;
        let end = Instant::now() + LIMIT;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("waiting for QEMU"),
            }
            ensure!(guard.is_running(), "QEMU ended: {}", std::fs::read_to_string(&errors).unwrap_or_default());
            ensure!(Instant::now() < end, "QEMU does not come to its disk");
            std::thread::sleep(Duration::from_millis(5));
        };
        stream.set_nonblocking(false)?;
        let server = std::thread::spawn(move || disk.serve(stream));
        Ok(Machine { guard, console, errors, server, port })
    }
}

/// A machine that is on; off when it is dropped.
pub(crate) struct Machine {
    guard: Guard,
    console: PathBuf,
    errors: PathBuf,
    /// Serves its disk.
    server: JoinHandle<io::Result<()>>,
    port: u16,
}

impl Machine {
    /// How its member is reached.
    pub(crate) fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// What it has said so far.
    pub(crate) fn console(&self) -> String {
        let said = std::fs::read(&self.console).unwrap_or_default();
        format!("{}{}", String::from_utf8_lossy(&said), std::fs::read_to_string(&self.errors).unwrap_or_default())
    }

    /// That it is still on.
    pub(crate) fn is_on(&mut self) -> anyhow::Result<()> {
        if self.guard.is_running() {
            return Ok(());
        }
        bail!("the machine ended:\n{}", self.console())
    }

    /// Waits until the member begins.
    pub(crate) async fn begins(&mut self) -> anyhow::Result<()> {
        let end = Instant::now() + LIMIT;
        while !self.console().contains(BEGINS) {
            self.is_on()?;
            ensure!(Instant::now() < end, "the member does not begin:\n{}", self.console());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// SIGKILL. When this returns, all that it wrote has come to its disk or never will.
    pub(crate) fn kill(mut self) -> anyhow::Result<()> {
        self.guard.kill();
        match self.server.join() {
            Ok(served) => served.context("serving the disk"),
            Err(_) => bail!("who serves the disk panicked"),
        }
    }
}
