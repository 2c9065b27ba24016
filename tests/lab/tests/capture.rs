//! `imgutil capture` of machines that run Debian from their own disks, in VMs: one on LVM, with a thin volume, LUKS and a RAID beside, and
//! one on plain partitions with btrfs subvolumes.

use anyhow::{Context as _, ensure};
use moor_lab::process::{run, text, tied, wait_for};
use moor_lab::tree;
use moor_lab::{Bins, Namespace, Vm, VmOptions};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const DISK: &str = include_str!("capture/disk.sh");
const MORE: &str = include_str!("capture/more.sh");
/// A loader on the EFI system partition, and its secret.
const FILL_ESP: &str = "mkdir -p /boot/efi/EFI/debian /boot/efi/loader && echo loader > /boot/efi/EFI/debian/loader.txt && \
                        echo MOOR-PLANTED > /boot/efi/loader/random-seed && sync";

/// From power on to ssh, in emulation on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_mins(8);
const SSH_PORT: u16 = 2231;
/// The UUIDs that the disks are made with.
const PTUUID: &str = "6d6f6f72-0000-4000-8000-000000000001";
const MACHINE_ID: &str = "6d6f6f72000040008000000000000099";
const ESP: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
const LINUX: &str = "0fc63daf-8483-4772-8e79-3d69d8477de4";

fn uuid(end: &str) -> String {
    format!("6d6f6f72-0000-4000-8000-0000000000{end}")
}

/// A machine that runs. Its VM is dropped first.
struct Machine {
    vm: Vm,
    namespace: Namespace,
    bins: Bins,
    dir: PathBuf,
    /// What no image of it may have, by path.
    secrets: Vec<String>,
}

impl Machine {
    /// Makes its disk and waits until it answers ssh.
    fn start(dir: &Path, layout: &str, command_line: &str, further_disks: &[PathBuf]) -> anyhow::Result<Self> {
        let bins = Bins::find()?;
        let tree = tree::on_disks(&bins, &mut |what| println!("{what}"))?;
        let (disk, work) = (dir.join("disk"), dir.join("work"));
        std::fs::create_dir(&work)?;
        for key in ["host", "login", "personal"] {
            run(tied("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"]).arg(work.join(key)))?;
        }
        let mut make = tied("unshare");
        make.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--", "sh", "-c", DISK, "sh", layout]);
        run(make.arg(&tree).arg(&disk).arg(&work)).context("making the disk")?;
        let secrets = std::fs::read_to_string(work.join("secrets"))? + "boot/efi/loader/random-seed\n";
        let secrets = secrets.lines().map(str::to_owned).collect();

        let namespace = Namespace::new()?;
        let host_key = std::fs::read_to_string(work.join("host.pub"))?;
        std::fs::write(dir.join("known_hosts"), format!("n1 {host_key}"))?;
        let options = VmOptions {
            kernel: boot_file(&tree, "vmlinuz-")?,
            initramfs: boot_file(&tree, "initrd.img-")?,
            command_line: format!("{command_line} ro noresume net.ifnames=0 loglevel=4 console=ttyS0 panic=-1"),
            uuid: uuid("11"),
            mac: "52:54:00:6d:6f:31".into(),
            memory: 1024,
            ssh_port: SSH_PORT,
            disks: [&[disk], further_disks].concat(),
            kvm: false,
        };
        let vm = Vm::start(&namespace, &dir.join("vm"), &options, None)?;
        let mut machine = Self { vm, namespace, bins, dir: dir.to_owned(), secrets };
        machine.wait_for_ssh().with_context(|| format!("console:\n{}", machine.vm.console_tail(60)))?;
        machine.on_it(FILL_ESP).context("filling its EFI system partition")?;
        Ok(machine)
    }

    fn wait_for_ssh(&mut self) -> anyhow::Result<()> {
        self.vm.wait_console("login:", 0, BOOT_LIMIT)?;
        wait_for("ssh to the machine", BOOT_LIMIT, || {
            ensure!(self.vm.is_running(), "the VM ended");
            Ok(self.ssh("true").output()?.status.success())
        })
    }

    fn ssh(&self, command: &str) -> Command {
        let (known_hosts, login) = (self.dir.join("known_hosts"), self.dir.join("work/login"));
        self.vm.ssh(&self.namespace, "n1", &known_hosts, &login, &[command])
    }

    /// Runs a shell script on it.
    fn on_it(&self, script: &str) -> anyhow::Result<String> {
        Ok(text(&mut self.ssh(script))?)
    }

    /// Captures it, checks that nothing of that is left on either side, and verifies the image.
    fn capture(&self) -> anyhow::Result<Image> {
        let out = self.dir.join("out");
        let (image, key, temporary) = (out.join("n1.moor"), out.join("n1.key"), self.dir.join("tmp"));
        for directory in [&out, &temporary] {
            std::fs::create_dir(directory)?;
        }
        let config = self.dir.join("ssh_config");
        std::fs::write(
            &config,
            format!(
                "Host n1\n  HostName 127.0.0.1\n  Port {SSH_PORT}\n  HostKeyAlias n1\n  IdentityFile {0}/work/login\n  IdentitiesOnly yes\n  \
                 UserKnownHostsFile {0}/known_hosts\n  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n  BatchMode yes\n",
                self.dir.display()
            ),
        )?;
        self.on_it("touch /run/before")?;
        let mut capture = tied(self.bins.path("imgutil"));
        capture.args(["capture", "n1", "--level", "1", "--ssh-config"]).arg(config);
        capture.arg("-o").arg(&image).arg("--key-file").arg(&key).env("TMPDIR", &temporary);
        let said = run(&mut self.namespace.enter(&capture)).context("imgutil capture")?;
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        println!("{said}");
        ensure!(!said.contains("changed while they were read"), "nothing changes on this machine: {said}");

        let names = |directory: &Path| -> anyhow::Result<Vec<_>> {
            let entries = std::fs::read_dir(directory)?;
            let mut names: Vec<_> = entries.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?;
            names.sort();
            Ok(names)
        };
        ensure!(names(&out)? == ["n1.key", "n1.moor"], "{:?}", names(&out)?);
        ensure!(names(&temporary)?.is_empty(), "{:?}", names(&temporary)?);
        // Neither a file nor the key nor a program is left on the machine; the system itself writes logs meanwhile.
        let hex = std::fs::read_to_string(&key)?;
        let left = self.on_it(&format!(
            "for mount in $(findmnt -rno TARGET -t ext4,xfs,btrfs,vfat); do \
               find $mount -xdev -type f -newer /run/before ! -path '/var/log/*' ! -path '/var/lib/systemd/*'; done; \
             grep -rlF {} /run /tmp /var/tmp /root /dev/shm; pgrep -x 'tar|cat'; true",
            hex.trim()
        ))?;
        ensure!(left.is_empty(), "left on the machine: {left}");

        let image = Image { bins: self.bins.clone(), file: image, key, said };
        run(&mut image.imgutil("verify"))?;
        Ok(image)
    }

    /// Unpacks the image of it: no secret may be there, and the rest is as it is on the machine.
    fn compare(&self, image: &Image, more_secrets: &[&str], compared: &str) -> anyhow::Result<PathBuf> {
        let tree = self.dir.join("unpacked");
        let mut unpack = tied(self.bins.path("imgutil"));
        run(unpack.arg("unpack").arg(&image.file).arg(&tree).arg("--key-file").arg(&image.key))?;
        let secrets: Vec<&str> = self.secrets.iter().map(String::as_str).chain(more_secrets.iter().copied()).collect();
        let missing =
            self.on_it(&format!("cd /; for path in {}; do test -s $path || echo $path; done", secrets.join(" ")))?;
        ensure!(missing.is_empty(), "not on the machine: {missing}");
        for secret in secrets {
            ensure!(tree.join(secret).symlink_metadata().is_err(), "'{secret}' is in the image");
        }
        assert_eq!(std::fs::read_to_string(tree.join("etc/machine-id"))?, "");
        // Nor does what they hold stand anywhere else.
        let key = std::fs::read_to_string(self.dir.join("work/personal"))?;
        let line = key.lines().nth(2).context("a key of three lines")?;
        for text in ["MOOR-PLANTED", "MOOR-PASSPHRASE", MACHINE_ID, line] {
            let found = tied("grep").args(["-rlF", "-e", text]).arg(&tree).output()?;
            ensure!(found.status.code() == Some(1), "{text}: {}", String::from_utf8_lossy(&found.stdout));
        }
        let sums = |root: &str| {
            format!(
                "cd {root} && find {compared} -type f -exec sha256sum {{}} + | sort && find {compared} -printf '%p %U %G %m %l %T@\\n' | sed 's/\\.[0-9]*$//' | sort"
            )
        };
        let there = self.on_it(&sums("/"))?;
        let here = text(tied("sh").args(["-c", &sums(&tree.display().to_string())]))?;
        ensure!(there.lines().count() > 100 && there == here, "{there}\nand here:\n{here}");
        Ok(tree)
    }
}

fn boot_file(tree: &Path, prefix: &str) -> anyhow::Result<PathBuf> {
    for entry in std::fs::read_dir(tree.join("boot"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("the tree has no {prefix}*")
}

/// A captured image.
struct Image {
    bins: Bins,
    file: PathBuf,
    key: PathBuf,
    /// What the capture said.
    said: String,
}

impl Image {
    fn imgutil(&self, command: &str) -> Command {
        let mut imgutil = tied(self.bins.path("imgutil"));
        imgutil.arg(command).arg(&self.file).arg("--key-file").arg(&self.key);
        imgutil
    }

    /// The layouts of its file systems by mount point; that of swap has none.
    fn layouts(&self) -> anyhow::Result<Vec<(String, Value)>> {
        let inspection: Value = serde_json::from_str(&text(self.imgutil("inspect").arg("--json"))?)?;
        assert_eq!(inspection["metadata"]["os"], "debian-12");
        let parts = inspection["metadata"]["filesystems"].as_array().context("no file systems")?;
        let layout = |part: &Value| -> anyhow::Result<(String, Value)> {
            ensure!(part["offset"].as_u64().context("no offset")? % (1 << 20) == 0, "{part:#}");
            let layout = part["layout"].as_str().context("no layout")?;
            Ok((part["mount"].as_str().context("no mount")?.to_owned(), serde_json::from_str(layout)?))
        };
        parts.iter().map(layout).collect()
    }
}

/// Checks that `found` has all that `expected` has.
fn check(path: &str, found: &Value, expected: &Value) {
    match expected {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| check(&format!("{path}.{name}"), &found[name.as_str()], value));
        }
        Value::Array(items) => {
            assert_eq!(found.as_array().map(Vec::len), Some(items.len()), "{path}: {found:#}");
            items.iter().enumerate().for_each(|(at, item)| check(&format!("{path}[{at}]"), &found[at], item));
        }
        _ => assert_eq!(found, expected, "{path}"),
    }
}

fn check_all(layouts: &[(String, Value)], expected: &[(&str, Value)]) {
    let (found, wanted): (Vec<&str>, Vec<&str>) =
        (layouts.iter().map(|(mount, _)| mount.as_str()).collect(), expected.iter().map(|(mount, _)| *mount).collect());
    assert_eq!(found, wanted);
    for ((mount, found), (_, expected)) in layouts.iter().zip(expected) {
        check(mount, found, expected);
    }
}

/// A partition of the first disk.
fn part(properties: &Value) -> Value {
    let disk = json!({ "type": "disk", "properties": { "pttype": "gpt", "ptuuid": PTUUID }, "on": null });
    json!({ "type": "part", "properties": properties, "on": [disk] })
}

fn esp() -> Value {
    let on = part(&json!({ "parttype": ESP, "partlabel": "esp", "partuuid": uuid("02"), "start": "2048" }));
    json!({ "type": "vfat", "label": "ESP", "uuid": "6D6F-6F72", "on": [on] })
}

#[test]
fn a_machine_on_lvm_is_captured_with_its_layout_and_without_its_secrets() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-capture-").tempdir()?;
    let second = dir.path().join("second");
    std::fs::File::create(&second)?.set_len(128 << 20)?;
    let machine = Machine::start(dir.path(), "lvm", "root=/dev/mapper/vg--0-root", &[second])?;
    machine.on_it(MORE).context("the volumes that need a kernel")?;
    let image = machine.capture()?;

    let pv = part(&json!({ "parttype": "e6d6d379-f507-44c2-a23c-238f2a3df928", "partlabel": "volumes" }));
    let lv = |name: &str, bytes: &str| {
        let properties = json!({ "vg_name": "vg-0", "lv_name": name, "segtype": "linear", "lv_size": bytes,
            "vg_extent_size": "4194304" });
        json!([{ "type": "lvm", "name": format!("/dev/mapper/vg--0-{name}"), "properties": properties, "on": [pv] }])
    };
    // The pool lies on a volume with its data and one with what it knows of them, each on the partition.
    let pool =
        json!({ "type": "lvm", "properties": { "segtype": "thin-pool", "lv_name": "pool", "chunk_size": "65536" } });
    let thin = json!([{ "type": "lvm", "on": [pool],
        "properties": { "segtype": "thin", "pool_lv": "pool", "lv_name": "thin", "lv_size": "209715200" } }]);
    let half = |name: &str| {
        let properties = json!({ "parttype": "a19d880f-05fc-4d3b-a006-743f0f84911e", "partlabel": name });
        json!({ "type": "part", "properties": properties, "on": [{ "type": "disk", "properties": { "pttype": "gpt" } }] })
    };
    let raid = json!({ "type": "raid1", "on": [half("half-1"), half("half-2")],
        "properties": { "md_level": "raid1", "md_devices": "2", "md_metadata": "1.2" } });
    let crypt = json!([{ "type": "crypt", "name": "/dev/mapper/vault", "on": [raid],
        "properties": { "type": "LUKS2", "cipher": "aes-xts-plain64" } }]);
    let boot = part(&json!({ "parttype": LINUX, "partlabel": "boot" }));
    check_all(
        &image.layouts()?,
        &[
            ("/", json!({ "type": "ext4", "label": "ROOT", "uuid": uuid("0a"), "on": lv("root", "671088640") })),
            ("/boot", json!({ "type": "ext4", "label": "BOOT", "uuid": uuid("0b"), "on": [boot] })),
            ("/boot/efi", esp()),
            ("/home", json!({ "type": "xfs", "label": "HOME", "uuid": uuid("0c"), "on": lv("home", "335544320") })),
            ("/srv/thin", json!({ "type": "ext4", "label": "THIN", "on": thin })),
            ("/srv/vault", json!({ "type": "ext4", "label": "VAULT", "on": crypt })),
            ("/var", json!({ "type": "ext4", "label": "VAR", "uuid": uuid("0d"), "on": lv("var", "201326592") })),
            ("", json!({ "type": "swap", "label": "SWAP", "uuid": uuid("0e"), "on": lv("swap", "33554432") })),
        ],
    );
    let more = ["thin", "vault"].map(|place| [format!("srv/{place}/.ssh/id_ed25519"), format!("srv/{place}/.pgpass")]);
    let more: Vec<&str> = more.iter().flatten().map(String::as_str).collect();
    machine.compare(&image, &more, "usr/bin boot/vmlinuz* boot/efi/EFI home/op/numbers srv/thin/numbers srv/vault/numbers etc/fstab var/lib/dpkg/info/lvm2.list")?;
    Ok(())
}

#[test]
fn a_machine_on_plain_partitions_is_captured_with_its_layout_and_without_its_secrets() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-capture-").tempdir()?;
    let machine = Machine::start(dir.path(), "plain", &format!("root=UUID={}", uuid("0a")), &[])?;
    let image = machine.capture()?;
    let subvolumes = "btrfs subvolumes that are not mounted were left out: /home/.snapshots\n";
    ensure!(image.said.contains(subvolumes), "{}", image.said);
    let (root_type, swap_type) = ("4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f");
    let root = part(&json!({ "parttype": root_type, "partlabel": "system", "partflags": "0x800000000000000" }));
    let pool = part(&json!({ "parttype": LINUX, "partlabel": "pool" }));
    let subvolume =
        |name: &str| json!({ "type": "btrfs", "label": "POOL", "uuid": uuid("0f"), "subvolume": name, "on": [pool] });
    check_all(
        &image.layouts()?,
        &[
            ("/", json!({ "type": "ext4", "label": "ROOT", "uuid": uuid("0a"), "on": [root] })),
            ("/boot/efi", esp()),
            ("/home", subvolume("/@home")),
            ("/srv", subvolume("/@srv")),
            (
                "/var",
                json!({ "type": "ext4", "label": "VAR", "uuid": uuid("0d"),
                "on": [part(&json!({ "parttype": LINUX, "partlabel": "var" }))] }),
            ),
            (
                "",
                json!({ "type": "swap", "label": "SWAP", "uuid": uuid("0e"),
                "on": [part(&json!({ "parttype": swap_type, "partlabel": "swap" }))] }),
            ),
        ],
    );
    machine.compare(
        &image,
        &[],
        "usr/bin boot/vmlinuz* boot/efi/EFI home/op/numbers etc/fstab var/lib/dpkg/info/lvm2.list",
    )?;
    Ok(())
}
