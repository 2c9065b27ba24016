//! What a node said of itself, parsed: its file systems and what they lie on.

use anyhow::{Context as _, Result, bail};
use moor_image::Package;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The script that asks.
pub(super) const SCRIPT: &str = include_str!("survey.sh");

/// File systems whose files are captured. Others hold nothing of the node's own, or cannot be made again.
const CAPTURED: [&str; 9] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "f2fs", "jfs", "exfat"];

/// What is mounted.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Mount {
    pub(super) target: String,
    #[serde(default)]
    pub(super) source: Option<String>,
    #[serde(default)]
    pub(super) fsroot: Option<String>,
    pub(super) fstype: String,
    #[serde(default)]
    pub(super) options: Option<String>,
    #[serde(default)]
    pub(super) uuid: Option<String>,
    #[serde(default)]
    pub(super) label: Option<String>,
    #[serde(default)]
    pub(super) size: Option<Number>,
    #[serde(default)]
    pub(super) used: Option<Number>,
}

/// A number that older tools give as text.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Number {
    Number(u64),
    Text(String),
}

impl Number {
    pub(super) fn value(&self) -> u64 {
        match self {
            Self::Number(number) => *number,
            Self::Text(text) => text.parse().unwrap_or(0),
        }
    }
}

/// A device as lsblk shows it; `children` lie on it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Block {
    pub(super) name: String,
    pub(super) kname: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) size: Option<Number>,
    #[serde(default)]
    pub(super) children: Vec<Block>,
    /// The columns that differ from kind to kind.
    #[serde(flatten)]
    pub(super) columns: BTreeMap<String, serde_json::Value>,
}

impl Block {
    /// A column that is there and not empty.
    pub(super) fn column(&self, name: &str) -> Option<String> {
        match self.columns.get(name)? {
            serde_json::Value::String(text) if !text.is_empty() => Some(text.trim().to_owned()),
            serde_json::Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }
}

/// What tar said, by lines.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Said<'a> {
    /// Files that changed or went while they were read: those of a running system do.
    pub(super) changes: Vec<&'a str>,
    /// All else: what could not be read.
    pub(super) failures: Vec<&'a str>,
}

/// The parsed answer.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) arch: String,
    pub(super) os_release: String,
    pub(super) mounts: Vec<Mount>,
    pub(super) blocks: Vec<Block>,
    pub(super) packages: Vec<Package>,
    pub(super) kernels: Vec<String>,
    /// Names in /boot.
    pub(super) boot: Vec<String>,
    /// First sector by kernel name.
    pub(super) starts: BTreeMap<String, u64>,
    /// Fields of each logical volume by `VG/LV`.
    pub(super) lvm: BTreeMap<String, BTreeMap<String, String>>,
    /// `KEY=VALUE` or `key: value` lines by device or mount: `md /dev/md0`, `crypt /dev/dm-0`, `btrfs /`.
    pub(super) details: BTreeMap<String, Vec<String>>,
}

impl Survey {
    /// Parses what [`SCRIPT`] printed.
    pub(super) fn parse(answer: &str) -> Result<Self> {
        let mut sections: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut present: Option<&mut Vec<&str>> = None;
        for line in answer.lines() {
            if let Some(name) = line.strip_prefix("=== ") {
                present = Some(sections.entry(name).or_default());
            } else if let Some(lines) = &mut present
                && !line.is_empty()
            {
                lines.push(line);
            }
        }
        if !sections.contains_key("end") {
            bail!("its answer is cut off");
        }
        let text = |name: &str| sections.get(name).map(|lines| lines.join("\n")).unwrap_or_default();
        let mounts: Mounts = serde_json::from_str(&text("mounts")).context("findmnt's answer makes no sense")?;
        let devices: Devices = serde_json::from_str(&text("devices")).context("lsblk's answer makes no sense")?;
        let lines = |name: &str| sections.get(name).cloned().unwrap_or_default();
        Ok(Self {
            arch: text("machine"),
            os_release: text("os-release"),
            mounts: mounts.filesystems,
            blocks: devices.blockdevices,
            packages: lines("packages").into_iter().filter_map(package).collect(),
            kernels: lines("kernels").into_iter().map(str::to_owned).collect(),
            boot: lines("boot").into_iter().map(str::to_owned).collect(),
            starts: lines("starts")
                .into_iter()
                .filter_map(|line| {
                    let (name, start) = line.split_once(' ')?;
                    Some((name.to_owned(), start.parse().ok()?))
                })
                .collect(),
            lvm: volumes(&text("lvm"))?,
            details: sections
                .iter()
                .filter(|(name, _)| ["md ", "crypt ", "btrfs "].iter().any(|kind| name.starts_with(kind)))
                .map(|(name, lines)| ((*name).to_owned(), lines.iter().map(|line| line.trim().to_owned()).collect()))
                .collect(),
        })
    }

    /// What lies on devices and is mounted in the system at `root`, each with its place in that system.
    fn on_devices(&self, root: &str) -> Vec<(String, &Mount)> {
        let root = root.trim_end_matches('/');
        let mut seen = BTreeSet::new();
        let mut found: Vec<(String, &Mount)> = Vec::new();
        // Of several mounts on one place the last one is seen.
        for mount in self.mounts.iter().rev() {
            let Some(below) = mount.target.strip_prefix(root).filter(|rest| rest.is_empty() || rest.starts_with('/'))
            else {
                continue;
            };
            let place = if below.is_empty() { "/" } else { below };
            // ZFS names its datasets and not the devices they are on.
            let is_device =
                mount.source.as_deref().is_some_and(|source| source.starts_with("/dev/")) || mount.fstype == "zfs";
            // A part of a file system that is mounted elsewhere too; subvolumes are file systems of their own.
            let is_bind = mount.fstype != "btrfs" && mount.fsroot.as_deref().is_some_and(|fsroot| fsroot != "/");
            if seen.insert(place.to_owned()) && is_device && !is_bind {
                found.push((place.to_owned(), mount));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    /// The file systems of the system at `root`, its own first, each with its place in that system.
    pub(super) fn captured(&self, root: &str) -> Result<Vec<(String, &Mount)>> {
        let mut found = self.on_devices(root);
        found.retain(|(_, mount)| CAPTURED.contains(&mount.fstype.as_str()));
        match found.first() {
            Some((place, _)) if place == "/" => Ok(found),
            _ => {
                let root = if root == "/" { root } else { root.trim_end_matches('/') };
                match self.mounts.iter().rev().find(|mount| mount.target == root) {
                    Some(mount) => bail!(
                        "its root is {}, not a file system on a disk: a diskless node is what its image says",
                        mount.fstype
                    ),
                    None => bail!("nothing is mounted at '{root}'"),
                }
            }
        }
    }

    /// Where file systems on devices are mounted whose files are not captured, each with its kind.
    pub(super) fn of_other_kinds(&self, root: &str) -> Vec<PathBuf> {
        let others = self.on_devices(root).into_iter().filter(|(_, mount)| !CAPTURED.contains(&mount.fstype.as_str()));
        others.map(|(place, mount)| PathBuf::from(format!("{place} ({})", mount.fstype))).collect()
    }

    /// The lines of what tar said of the file system at `target`. Not among them is that a mount point in it changed: what is mounted
    /// there (/sys, /proc) is another file system's; nor are sockets, which no archive has.
    pub(super) fn said_by_tar<'a>(&self, target: &str, said: &'a str) -> Said<'a> {
        const CHANGED: &str = ": file changed as we read it";
        let is_mount_point = |line: &str| {
            let path = line.strip_prefix("tar: .").and_then(|rest| rest.strip_suffix(CHANGED));
            path.is_some_and(|path| {
                let path = format!("{}{path}", target.trim_end_matches('/'));
                self.mounts.iter().any(|mount| mount.target == path)
            })
        };
        let is_idle = |line: &str| {
            let its_end = line == "tar: Exiting with failure status due to previous errors";
            line.trim().is_empty() || line.ends_with(": socket ignored") || its_end || is_mount_point(line)
        };
        let is_change = |line: &&str| {
            line.ends_with(CHANGED)
                || line.ends_with(": File removed before we read it")
                || (line.contains(": File shrank by ") && line.ends_with("padding with zeros"))
        };
        let (changes, failures) = said.lines().filter(|line| !is_idle(line)).partition(is_change);
        Said { changes, failures }
    }

    /// Where subvolumes lie in file systems that are captured without being mounted, so that nobody sees them as file systems: their
    /// contents are not captured.
    pub(super) fn unmounted_subvolumes(&self, captured: &[(String, &Mount)]) -> BTreeSet<PathBuf> {
        let btrfs = || captured.iter().filter(|(_, mount)| mount.fstype == "btrfs");
        let mut found = BTreeSet::new();
        for (place, mount) in btrfs() {
            let root = mount.fsroot.as_deref().unwrap_or("/").trim_end_matches('/');
            let lines = self.details.get(&format!("btrfs {}", mount.target)).into_iter().flatten();
            // Numbers in columns, then the path from the top of the file system, behind a word if it is not right below the mount.
            for path in lines
                .filter(|line| line.starts_with(|c: char| c.is_ascii_digit()))
                .filter_map(|line| line.rsplit('\t').next())
            {
                let path = format!("/{}", path.strip_prefix("<FS_TREE>/").unwrap_or(path));
                let Some(below) = path.strip_prefix(root).and_then(|rest| rest.strip_prefix('/')) else { continue };
                let is_captured = btrfs()
                    .any(|(_, other)| other.source == mount.source && other.fsroot.as_deref() == Some(path.as_str()));
                if !is_captured {
                    found.insert(Path::new(place).join(below));
                }
            }
        }
        found
    }
}

#[derive(Deserialize)]
struct Mounts {
    filesystems: Vec<Mount>,
}

#[derive(Deserialize)]
struct Devices {
    blockdevices: Vec<Block>,
}

#[derive(Deserialize)]
struct Reports {
    report: Vec<Report>,
}

#[derive(Deserialize)]
struct Report {
    lv: Vec<BTreeMap<String, String>>,
}

fn volumes(text: &str) -> Result<BTreeMap<String, BTreeMap<String, String>>> {
    if text.is_empty() {
        return Ok(BTreeMap::new());
    }
    let reports: Reports = serde_json::from_str(text).context("lvs' answer makes no sense")?;
    let volumes = reports.report.into_iter().flat_map(|report| report.lv);
    Ok(volumes
        .filter_map(|mut fields| {
            fields.retain(|_, value| !value.is_empty());
            // Parts of others are shown in brackets.
            let name = fields.get("lv_name")?.trim_matches(['[', ']']).to_owned();
            Some((format!("{}/{name}", fields.get("vg_name")?), fields))
        })
        .collect())
}

/// `NAME|VERSION|ARCHITECTURE`. `None` for what is none: RPM lists the keys that it was given among its packages.
fn package(line: &str) -> Option<Package> {
    let mut words = line.split('|');
    let (name, version, arch) = (words.next()?, words.next()?, words.next()?);
    let package = Package { name: name.to_owned(), version: version.to_owned(), arch: arch.to_owned() };
    (name != "gpg-pubkey").then_some(package)
}
