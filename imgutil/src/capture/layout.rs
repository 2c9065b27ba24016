//! How a file system lay on its node's disks: enough to make the same again. Goes into the image's metadata, as JSON.

use super::survey::{Block, Mount, Survey};
use serde::Serialize;
use std::collections::BTreeMap;

/// The layout of one file system, or of swap.
#[derive(Debug, Serialize)]
pub(super) struct Layout {
    /// `ext4`, `xfs`, `vfat`, `swap`…
    #[serde(rename = "type")]
    kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    options: Option<String>,
    /// The part of a btrfs that is mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    subvolume: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    used: Option<u64>,
    /// What tools say of a file system with parts (subvolumes and profiles of a btrfs).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    details: Vec<String>,
    /// What it lies on.
    on: Vec<Device>,
}

/// A device and what it lies on in turn, down to the disks.
#[derive(Debug, Serialize)]
struct Device {
    name: String,
    /// `disk`, `part`, `lvm`, `crypt`, `raid1`…
    #[serde(rename = "type")]
    kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    /// What there is to say of this kind: partition type, volume group, RAID level, cipher.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    properties: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    on: Vec<Device>,
}

impl Layout {
    /// Of a mounted file system.
    pub(super) fn of(survey: &Survey, mount: &Mount) -> Self {
        let source = mount.source.as_deref().unwrap_or_default();
        let details = survey.details.get(&format!("btrfs {}", mount.target)).cloned();
        Self {
            kind: mount.fstype.clone(),
            uuid: mount.uuid.clone(),
            label: mount.label.clone(),
            options: mount.options.clone(),
            subvolume: mount.fsroot.clone().filter(|_| mount.fstype == "btrfs"),
            size: mount.size.as_ref().map(super::survey::Number::value),
            used: mount.used.as_ref().map(super::survey::Number::value),
            details: details.unwrap_or_default(),
            on: Devices::new(survey).chain(source),
        }
    }

    /// Of every swap space: it has no files, and belongs to the system all the same.
    pub(super) fn swaps(survey: &Survey) -> Vec<Self> {
        let devices = Devices::new(survey);
        let swaps = devices.blocks.values().filter(|block| block.column("fstype").as_deref() == Some("swap"));
        swaps
            .map(|block| Self {
                kind: "swap".to_owned(),
                uuid: block.column("uuid"),
                label: block.column("label"),
                options: None,
                subvolume: None,
                size: block.size.as_ref().map(super::survey::Number::value),
                used: None,
                details: Vec::new(),
                on: devices.chain(&block.name),
            })
            .collect()
    }

    pub(super) fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }
}

/// lsblk's tree, read from the leaves.
struct Devices<'a> {
    survey: &'a Survey,
    blocks: BTreeMap<&'a str, &'a Block>,
    parents: BTreeMap<&'a str, Vec<&'a Block>>,
}

impl<'a> Devices<'a> {
    fn new(survey: &'a Survey) -> Self {
        let mut all = Self { survey, blocks: BTreeMap::new(), parents: BTreeMap::new() };
        for block in &survey.blocks {
            all.add(block, None);
        }
        all
    }

    fn add(&mut self, block: &'a Block, parent: Option<&'a Block>) {
        self.blocks.insert(&block.kname, block);
        let parents = self.parents.entry(&block.kname).or_default();
        // A RAID and its members: the tree shows it once below each.
        if let Some(parent) = parent
            && !parents.iter().any(|known| known.kname == parent.kname)
        {
            parents.push(parent);
        }
        for child in &block.children {
            self.add(child, Some(block));
        }
    }

    fn chain(&self, name: &str) -> Vec<Device> {
        let found = self.blocks.values().find(|block| block.name == name || block.kname == name);
        found.map(|block| vec![self.device(block)]).unwrap_or_default()
    }

    fn device(&self, block: &Block) -> Device {
        let below = self.parents.get(block.kname.as_str()).into_iter().flatten();
        Device {
            name: block.name.clone(),
            kind: block.kind.clone(),
            size: block.size.as_ref().map(super::survey::Number::value),
            properties: self.properties(block),
            on: below.map(|parent| self.device(parent)).collect(),
        }
    }

    fn properties(&self, block: &Block) -> BTreeMap<String, String> {
        let mut properties = BTreeMap::new();
        let columns: &[&str] = match block.kind.as_str() {
            "part" => &["parttype", "partuuid", "partlabel", "partflags", "pttype"],
            "disk" | "loop" => &["pttype", "ptuuid", "model"],
            _ => &["uuid"],
        };
        for name in columns {
            properties.extend(block.column(name).map(|value| ((*name).to_owned(), value)));
        }
        let kernel_name = block.kname.rsplit('/').next().unwrap_or_default();
        if let Some(start) = self.survey.starts.get(kernel_name) {
            properties.insert("start".to_owned(), start.to_string());
        }
        if block.kind == "lvm"
            && let Some(volume) = self.volume(&block.name)
        {
            properties.extend(volume.iter().map(|(name, value)| (name.clone(), value.clone())));
        }
        for kind in ["md", "crypt"] {
            let details = self.survey.details.get(&format!("{kind} {}", block.kname)).into_iter().flatten();
            properties.extend(details.filter_map(|line| {
                let (name, value) = line.split_once([':', '='])?;
                Some((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
            }));
        }
        properties
    }

    /// `/dev/mapper/VG-LV`, where hyphens of a name are doubled (dmsetup(8), lvm(8)).
    fn volume(&self, name: &str) -> Option<&BTreeMap<String, String>> {
        let name = name.strip_prefix("/dev/mapper/")?;
        self.survey.lvm.iter().find_map(|(known, fields)| {
            let (group, volume) = known.split_once('/')?;
            let mapped = format!("{}-{}", group.replace('-', "--"), volume.replace('-', "--"));
            // A thin pool with volumes has a second device for its own.
            (mapped == name || format!("{mapped}-tpool") == name).then_some(fields)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a node with LVM on LUKS on a RAID 1 of two partitions, an ESP, swap and a btrfs answers (columns that nobody reads left out).
    const ANSWER: &str = include_str!("testdata/survey.txt");

    fn layout(place: &str) -> serde_json::Value {
        let survey = Survey::parse(ANSWER).expect("parses");
        let captured = survey.captured("/").expect("is captured");
        let (_, mount) = captured.iter().find(|(known, _)| known == place).expect("is there");
        serde_json::from_str(&Layout::of(&survey, mount).to_json().expect("writes")).expect("reads")
    }

    #[test]
    fn only_file_systems_of_the_nodes_own_disks_are_captured() {
        let survey = Survey::parse(ANSWER).expect("parses");
        let captured = survey.captured("/").expect("is captured");
        let places: Vec<&str> = captured.iter().map(|(place, _)| place.as_str()).collect();
        assert_eq!(places, ["/", "/boot/efi", "/srv", "/srv/snapshots", "/var"]);
        assert_eq!(survey.arch, "x86_64");
        assert_eq!(survey.packages.len(), 2);
        // A part of it can be captured for itself.
        assert_eq!(survey.captured("/srv").expect("is captured").len(), 2);
        assert!(survey.captured("/nowhere").is_err());
    }

    #[test]
    fn the_way_down_to_the_disks_is_kept() {
        let root = layout("/");
        let volume = &root["on"][0];
        assert_eq!((volume["type"].as_str(), volume["properties"]["segtype"].as_str()), (Some("lvm"), Some("thin")));
        assert_eq!(volume["properties"]["pool_lv"], "pool");
        let pool = &volume["on"][0];
        assert_eq!(pool["properties"]["segtype"], "thin-pool");
        let crypt = &pool["on"][0]["on"][0];
        assert_eq!(
            (crypt["type"].as_str(), crypt["properties"]["cipher"].as_str()),
            (Some("crypt"), Some("aes-xts-plain64"))
        );
        let raid = &crypt["on"][0];
        assert_eq!((raid["type"].as_str(), raid["properties"]["md_level"].as_str()), (Some("raid1"), Some("raid1")));
        let members = raid["on"].as_array().expect("a list");
        assert_eq!(members.len(), 2);
        assert_eq!(members[0]["properties"]["parttype"], "a19d880f-05fc-4d3b-a006-743f0f84911e");
        assert_eq!(members[0]["properties"]["start"], "1050624");
        assert_eq!(members[0]["on"][0]["properties"]["pttype"], "gpt");
        assert_eq!(layout("/boot/efi")["on"][0]["properties"]["parttype"], "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
        assert_eq!(layout("/srv/snapshots")["subvolume"], "/snapshots");
        assert!(layout("/srv")["details"].as_array().is_some_and(|lines| {
            lines.iter().any(|line| line.as_str() == Some("Data, single: total=8388608, used=131072"))
        }));
        let survey = Survey::parse(ANSWER).expect("parses");
        let swaps = Layout::swaps(&survey);
        assert_eq!(swaps.len(), 1);
        assert_eq!(swaps[0].label.as_deref(), Some("SWAP"));
    }

    #[test]
    fn subvolumes_that_nobody_has_mounted_are_named() {
        let last = "257\t9\t5\t\t<FS_TREE>/snapshots\n";
        let further =
            "258\t9\t256\t\tdata/inner\n259\t9\t5\t\t<FS_TREE>/database\n260\t9\t257\t\t<FS_TREE>/snapshots/of today\n";
        let more = ANSWER.replace(last, &format!("{last}{further}"));
        assert_ne!(more, ANSWER);
        for (answer, expected) in [(ANSWER, &[][..]), (&more, &["/srv/inner"])] {
            let survey = Survey::parse(answer).expect("parses");
            let found = survey.unmounted_subvolumes(&survey.captured("/").expect("is captured"));
            let expected: Vec<_> = expected.iter().map(std::path::PathBuf::from).collect();
            assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn file_systems_that_cannot_be_captured_are_named() {
        let survey = Survey::parse(ANSWER).expect("parses");
        let named = |survey: &Survey| {
            let found = survey.of_other_kinds("/").into_iter();
            found.map(|path| path.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(named(&survey), ["/media/cdrom (iso9660)"]);
        let other = ANSWER.replacen("\"fstype\": \"xfs\"", "\"fstype\": \"ntfs3\"", 1);
        let survey = Survey::parse(&other).expect("parses");
        assert_eq!(named(&survey), ["/media/cdrom (iso9660)", "/var (ntfs3)"]);
        assert!(survey.captured("/").expect("is captured").iter().all(|(place, _)| place != "/var"));
        assert_eq!(survey.of_other_kinds("/srv"), Vec::<std::path::PathBuf>::new());
    }

    #[test]
    fn what_changed_is_told_from_what_cannot_be_read() {
        let survey = Survey::parse(ANSWER).expect("parses");
        let said = "tar: ./srv: file changed as we read it\n\ntar: ./srv/x: file changed as we read it\n\
                    tar: ./run/s: socket ignored\ntar: ./var: Cannot stat: No\ntar: ./a: File removed before we read it\n\
                    tar: ./b: File shrank by 5 bytes; padding with zeros\n\
                    tar: ./c: Read error at byte 0, while reading 512 bytes: Input/output error\n\
                    tar: Exiting with failure status due to previous errors\n";
        let said = survey.said_by_tar("/", said);
        let changes = [
            "tar: ./srv/x: file changed as we read it",
            "tar: ./a: File removed before we read it",
            "tar: ./b: File shrank by 5 bytes; padding with zeros",
        ];
        let failures = [
            "tar: ./var: Cannot stat: No",
            "tar: ./c: Read error at byte 0, while reading 512 bytes: Input/output error",
        ];
        assert_eq!((said.changes, said.failures), (changes.to_vec(), failures.to_vec()));
        let changes = |said| survey.said_by_tar("/srv", said).changes.len();
        assert_eq!(changes("tar: ./snapshots: file changed as we read it\n"), 0);
        assert_eq!(changes("tar: ./srv: file changed as we read it\n"), 1);
    }

    #[test]
    fn an_answer_that_is_cut_off_is_refused() {
        let cut = ANSWER.trim_end().strip_suffix("=== end").expect("ends");
        assert!(Survey::parse(cut).is_err());
        assert!(Survey::parse("").is_err());
    }
}
