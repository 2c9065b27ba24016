//! What nodes read of an image while they booted, merged into the list that later boots fetch ahead. Each boot of a node counts once.
//!
//! It is advice, and never more: a list that is wrong costs a node a few megabytes, because each chunk is verified like any other and
//! no node fetches far beyond what it reads of the list. So it is kept by each member for itself, in a file per image, and a boot costs
//! no entry in the log.

use crate::files;
use moor_api::ids::{BootId, ImageDigest, NodeId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Traces that count as much as one another; older ones count for less and less.
const TRACES: u32 = 32;

/// All lists of this member.
pub struct Traces {
    dir: PathBuf,
    /// One at a time merges, or reads what was merged.
    merging: Mutex<()>,
    memory: Mutex<Memory>,
}

#[derive(Default)]
struct Memory {
    /// Lists as they are in the files, of images that were asked for.
    lists: HashMap<ImageDigest, Vec<u64>>,
    /// Boots that have told, by their nodes.
    told: HashMap<NodeId, BTreeSet<BootId>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The traces of one image, added up.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Merged {
    traces: u32,
    chunks: BTreeMap<u64, Seen>,
}

/// How often a chunk was read, and the sum of its places.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    count: u32,
    places: u64,
}

impl Merged {
    fn add(&mut self, chunks: &[u64]) {
        if self.traces >= TRACES {
            self.traces /= 2;
            self.chunks.retain(|_, seen| {
                *seen = Seen { count: seen.count / 2, places: seen.places / 2 };
                seen.count > 0
            });
        }
        self.traces += 1;
        let mut new = BTreeSet::new();
        for (place, chunk) in (0..).zip(chunks) {
            if new.insert(*chunk) {
                let seen = self.chunks.entry(*chunk).or_default();
                seen.count += 1;
                seen.places += place;
            }
        }
    }

    /// What at least half of the boots read, in the order of the mean place.
    fn list(&self) -> Vec<u64> {
        let usual = self.chunks.iter().filter(|(_, seen)| seen.count * 2 >= self.traces);
        // In parts of a place: two chunks that lead in some boots each would else count as equal.
        let mean = |seen: &Seen| seen.places.saturating_mul(1 << 10) / u64::from(seen.count.max(1));
        let mut list: Vec<_> = usual.map(|(chunk, seen)| (mean(seen), *chunk)).collect();
        list.sort_unstable();
        list.into_iter().map(|(_, chunk)| chunk).collect()
    }
}

impl Traces {
    /// Lists are in `dir`, which has to exist when one is merged.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, merging: Mutex::default(), memory: Mutex::default() }
    }

    fn path(&self, digest: ImageDigest) -> PathBuf {
        self.dir.join(format!("{digest}.json"))
    }

    /// Whether this is the first time that this boot of the node tells; it has told from now on. Of its boots those are remembered that `is_known`
    /// knows: what nobody can tell of any more takes no memory.
    pub fn begins(&self, node: NodeId, boot: BootId, is_known: impl Fn(BootId) -> bool) -> bool {
        let mut memory = locked(&self.memory);
        let told = memory.told.entry(node).or_default();
        told.retain(|boot| is_known(*boot));
        told.insert(boot)
    }

    /// Adds what one boot read, in order.
    ///
    /// # Errors
    /// The list cannot be written.
    pub fn merge(&self, digest: ImageDigest, chunks: &[u64]) -> io::Result<()> {
        let _merging = locked(&self.merging);
        let path = self.path(digest);
        let mut merged = read(&path).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!("begins the list of image {digest} anew: '{}': {error}", path.display());
            }
            Merged::default()
        });
        merged.add(chunks);
        std::fs::create_dir_all(&self.dir)?;
        files::write(&path, &serde_json::to_vec(&merged)?, 0o640)?;
        locked(&self.memory).lists.insert(digest, merged.list());
        Ok(())
    }

    /// What boots of this image read, in order, if it is in memory.
    #[must_use]
    pub fn at_hand(&self, digest: ImageDigest) -> Option<Vec<u64>> {
        locked(&self.memory).lists.get(&digest).cloned()
    }

    /// What boots of this image read, in order. Empty where none has told yet. It may wait for a disk.
    #[must_use]
    pub fn list(&self, digest: ImageDigest) -> Vec<u64> {
        // A list that is merged meanwhile must not be followed by an older one; and of many who ask at once, one reads.
        let _merging = locked(&self.merging);
        if let Some(list) = self.at_hand(digest) {
            return list;
        }
        let list = read(&self.path(digest)).map(|merged| merged.list()).unwrap_or_default();
        locked(&self.memory).lists.insert(digest, list.clone());
        list
    }

    /// Removes the lists of images that are gone.
    ///
    /// # Errors
    /// The directory cannot be read, or a file not be removed.
    pub fn retain(&self, images: &BTreeSet<String>) -> io::Result<()> {
        let _merging = locked(&self.merging);
        locked(&self.memory).lists.retain(|digest, _| images.contains(&digest.to_string()));
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            if path.file_stem().and_then(|stem| stem.to_str()).is_none_or(|stem| !images.contains(stem)) {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<Merged> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::ids::Sha256Digest;

    #[test]
    fn what_half_of_the_boots_read_is_listed_in_their_order() {
        let mut merged = Merged::default();
        merged.add(&[5, 9, 1, 1, 7]);
        assert_eq!(merged.list(), [5, 9, 1, 7]);
        merged.add(&[9, 5, 1, 8]);
        merged.add(&[9, 1, 2]);
        assert_eq!(merged.list(), [9, 5, 1], "7, 8 and 2 were read once in three boots");
        for _ in 0..100 {
            merged.add(&[2, 3]);
        }
        assert_eq!(merged.list(), [2, 3], "the image is used in another way now");
        assert!(merged.traces <= TRACES);
    }

    #[test]
    fn lists_are_kept_as_long_as_their_image() {
        let dir = tempfile::tempdir().unwrap();
        let traces = Traces::new(dir.path().join("traces"));
        let [one, two] = [Sha256Digest([1; 32]), Sha256Digest([2; 32])];
        assert!(traces.list(one).is_empty());
        traces.merge(one, &[3, 4]).unwrap();
        traces.merge(two, &[4]).unwrap();
        assert_eq!((traces.list(one), traces.list(two)), (vec![3, 4], vec![4]));
        traces.retain(&[one.to_string()].into()).unwrap();
        assert_eq!((traces.list(one), traces.list(two)), (vec![3, 4], vec![]));
        assert_eq!(Traces::new(dir.path().join("traces")).list(one), [3, 4], "after a restart");
    }

    #[test]
    fn a_list_is_read_once_and_is_always_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let traces = Traces::new(dir.path().join("traces"));
        let image = Sha256Digest([1; 32]);
        assert_eq!(traces.at_hand(image), None);
        assert_eq!(traces.list(image), [0; 0]);
        assert_eq!(traces.at_hand(image), Some(vec![]));
        traces.merge(image, &[3, 4]).unwrap();
        assert_eq!(traces.at_hand(image), Some(vec![3, 4]));
        std::fs::remove_file(traces.path(image)).unwrap();
        assert_eq!(traces.list(image), [3, 4], "it was read again");
    }

    #[test]
    fn a_boot_tells_once() {
        let traces = Traces::new("nowhere".into());
        let nodes = [NodeId::random(), NodeId::random()];
        let boots = [(); 3].map(|()| BootId::random());
        for node in nodes {
            for boot in boots {
                assert!(traces.begins(node, boot, |_| true));
                assert!(!traces.begins(node, boot, |_| true));
            }
        }
        let newest = boots[2];
        assert!(!traces.begins(nodes[0], newest, |boot| boot == newest));
        assert_eq!(
            locked(&traces.memory).told[&nodes[0]],
            [newest].into(),
            "of boots that are forgotten something is left"
        );
    }
}
