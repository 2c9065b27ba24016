//! `imgutil capture` of a real system's disks in a VM: LVM with a thin volume, plain partitions, an ESP and swap. The host has no
//! device-mapper, so the disks are laid out in the VM, and the system on them is captured from there, as from a rescue system.

use anyhow::{Context as _, ensure};
use moor_lab::process::{run, run_shown, tied};
use moor_lab::scenario::{NODE, Scenario};
use moor_lab::tree::{self, Initramfs};
use moor_lab::{Bins, Swtpm};
use serde_json::Value;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// Lays out two disks, and puts a small system on them: root on LVM, /var on a thin volume, /home and /root on plain partitions. Secrets
/// lie on each.
const LAY_OUT: &str = r"
set -eu
cd /
printf 'label: gpt\n,64M,U\n,64M,S\n,,V\n' | sfdisk -q /dev/vda
printf 'label: gpt\n,200M,L,name=homes\n,100M,L\n' | sfdisk -q /dev/vdb
udevadm settle
mkfs.vfat -n ESP /dev/vda1 > /dev/null
mkswap -L SWAP /dev/vda2 > /dev/null
pvcreate -q /dev/vda3 > /dev/null
vgcreate -q vg-0 /dev/vda3 > /dev/null
lvcreate -q -n root -L 600M vg-0 > /dev/null
lvcreate -q --type thin-pool -n pool -L 300M vg-0 > /dev/null
lvcreate -q --thin -n var -V 400M vg-0/pool > /dev/null
mkfs.ext4 -q -L ROOT /dev/vg-0/root
mkfs.ext4 -q /dev/vg-0/var
mkfs.ext4 -q /dev/vdb1
mkfs.ext4 -q /dev/vdb2
mkdir /target
mount /dev/vg-0/root /target
mkdir -p /target/var /target/home /target/root /target/boot/efi
mount /dev/vg-0/var /target/var
mount /dev/vdb1 /target/home
mount /dev/vdb2 /target/root
mount /dev/vda1 /target/boot/efi
mkdir -p /target/usr/bin /target/usr/lib /target/proc /target/dev
cp -a /etc /target/
cp -a /usr/bin/[a-d]* /target/usr/bin/
cp -a /var/lib/dpkg /target/var/dpkg
mkdir -p /target/var/lib && mv /target/var/dpkg /target/var/lib/
echo loader > /target/boot/efi/loader.txt
ln /target/usr/bin/cat /target/usr/bin/cat-by-another-name
truncate -s 40M /target/home/sparse && echo end >> /target/home/sparse
setfattr -n user.note -v kept /target/usr/bin/cat 2> /dev/null || true
# Secrets, one on each file system.
ssh-keygen -q -t ed25519 -N '' -f /target/etc/ssh/ssh_host_ed25519_key_planted
cp /target/etc/ssh/ssh_host_ed25519_key_planted /target/etc/ssh/ssh_host_ed25519_key
mkdir -p /target/root/.ssh /target/home/op/.ssh /target/var/log
cp /target/etc/ssh/ssh_host_ed25519_key_planted /target/root/.ssh/id_ed25519
cp /target/etc/ssh/ssh_host_ed25519_key_planted /target/home/op/.ssh/id_ed25519
rm /target/etc/ssh/ssh_host_ed25519_key_planted*
echo 'mysql -ppassword' > /target/root/.bash_history
echo 'a line with a planted token' > /target/var/log/planted.log
sync
";

/// What was planted, by its path in the captured system.
const PLANTED: [&str; 5] = [
    "etc/ssh/ssh_host_ed25519_key",
    "root/.ssh/id_ed25519",
    "root/.bash_history",
    "home/op/.ssh/id_ed25519",
    "var/log/planted.log",
];

fn filesystem<'a>(inspection: &'a Value, mount: &str) -> anyhow::Result<&'a Value> {
    let all = inspection["metadata"]["filesystems"].as_array().context("no filesystems")?;
    all.iter()
        .find(|filesystem| filesystem["mount"] == mount)
        .with_context(|| format!("no '{mount}' in {inspection:#}"))
}

fn layout(filesystem: &Value) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(filesystem["layout"].as_str().context("no layout")?)?)
}

#[test]
fn disks_of_a_node_are_captured_without_its_secrets() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("moor-capture-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
    let bins = Bins::find()?;
    let mut say = |what: &str| println!("{what}");
    let tree = tree::with_packages(
        &bins,
        Initramfs::InitramfsTools,
        "disks",
        &["lvm2", "thin-provisioning-tools", "fdisk", "dosfstools", "attr"],
        &mut say,
    )?;
    let scenario = Scenario::of_tree(bins, &tree, 1, dir.path(), &mut say)?;
    let tpm = Swtpm::start(&dir.path().join("tpm"))?;
    scenario.member.moor_ok(&["arm", NODE])?;
    let disks = ["vda", "vdb"].map(|name| dir.path().join(name));
    for disk in &disks {
        std::fs::File::create(disk)?.set_len(1400 << 20)?;
    }
    let mut vm = scenario.power_on_with("vm", &tpm, 2231, &disks)?;
    scenario.wait_booted(&mut vm, &BTreeSet::new())?;
    scenario.on_node(&vm, LAY_OUT).context("laying out the disks")?;

    let config = dir.path().join("ssh_config");
    std::fs::write(
        &config,
        format!(
            "Host {NODE}\n  HostName 127.0.0.1\n  Port 2231\n  HostKeyAlias {NODE}\n  IdentityFile {0}/login\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {0}/known_hosts\n  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n  BatchMode yes\n",
            dir.path().display()
        ),
    )?;
    let (image, key) = (dir.path().join("n1.moor"), dir.path().join("n1.key"));
    let capture = |image: &Path, key: &Path, root: &str| {
        let mut command = tied(scenario.bins.path("imgutil"));
        command.args(["capture", NODE, "--level", "1", "--root", root, "--ssh-config"]).arg(&config);
        command.arg("-o").arg(image).arg("--key-file").arg(key);
        scenario.namespace.enter(&command)
    };
    // The node itself is diskless: there is nothing of its own, and nothing is left here of the try.
    let refused = capture(&image, &key, "/").output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("its root is overlay"), "{said}");
    ensure!(!image.exists() && !key.exists(), "an image or key of a capture that failed");

    let output = run(&mut capture(&image, &key, "/target"))?;
    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // Nothing of the capture is on the node: neither a key nor a program.
    let text = std::fs::read_to_string(&key)?;
    let found =
        scenario.on_node(&vm, &format!("grep -rl {} /run /tmp /root /var/tmp 2>/dev/null | wc -l", text.trim()))?;
    assert_eq!(found, "0");

    let imgutil = |arguments: &[&str]| {
        let mut command = tied(scenario.bins.path("imgutil"));
        command.arg(arguments[0]).arg(&image).arg("--key-file").arg(&key).args(&arguments[1..]);
        command
    };
    run(&mut imgutil(&["verify"]))?;
    let inspection: Value = serde_json::from_slice(&run(&mut imgutil(&["inspect", "--json"]))?.stdout)?;
    for mount in ["/", "/boot/efi", "/home", "/root", "/var"] {
        let part = filesystem(&inspection, mount)?;
        assert_eq!(part["offset"].as_u64().unwrap_or(1) % (1 << 20), 0, "{part:#}");
    }
    let root = layout(filesystem(&inspection, "/")?)?;
    assert_eq!(root["on"][0]["properties"]["vg_name"], "vg-0", "{root:#}");
    assert_eq!(root["on"][0]["on"][0]["properties"]["pttype"], "gpt", "{root:#}");
    let var = layout(filesystem(&inspection, "/var")?)?;
    assert_eq!(var["on"][0]["properties"]["segtype"], "thin", "{var:#}");
    let esp = layout(filesystem(&inspection, "/boot/efi")?)?;
    assert_eq!(esp["on"][0]["properties"]["parttype"], "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "{esp:#}");
    let home = layout(filesystem(&inspection, "/home")?)?;
    assert_eq!(home["on"][0]["properties"]["partlabel"], "homes", "{home:#}");
    let swap = layout(filesystem(&inspection, "")?)?;
    assert_eq!((swap["type"].as_str(), swap["label"].as_str()), (Some("swap"), Some("SWAP")));

    let out = dir.path().join("out");
    run_shown(tied(scenario.bins.path("imgutil")).arg("unpack").arg(&image).arg(&out).arg("--key-file").arg(&key))?;
    for planted in PLANTED {
        ensure!(!out.join(planted).exists(), "'{planted}' is in the image");
    }
    assert_eq!(std::fs::read_to_string(out.join("boot/efi/loader.txt"))?, "loader\n");
    assert_eq!(std::fs::metadata(out.join("home/sparse"))?.len(), (40 << 20) + 4);
    let links = |name: &str| {
        std::fs::metadata(out.join("usr/bin").join(name)).map(|meta| std::os::unix::fs::MetadataExt::ino(&meta))
    };
    assert_eq!(links("cat")?, links("cat-by-another-name")?);
    // What is not secret is as it is on the node, to the byte.
    let sums =
        "cd /target && find usr/bin home/sparse var/lib/dpkg/status boot/efi -type f -exec sha256sum {} + | sort";
    let there = scenario.on_node(&vm, sums)?;
    let here = run(tied("sh").args(["-c", &sums.replace("/target", &out.display().to_string())]))?;
    assert_eq!(String::from_utf8_lossy(&here.stdout).trim_end(), there);
    Ok(())
}
