//! What the boot stage leaves to the run stage: `/run/mooring`, a tmpfs that `switch_root` moves along. Nothing secret but a soft key.

use moor_api::ids::{BootId, CollectiveId, NodeId, NodeName, Sha256Digest};
use moor_api::trust::SiteBundle;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// The directory, mode 0700.
pub const RUN_DIR: &str = "/run/mooring";

/// A file of `/run/mooring` cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} '{}': {cause}", .path.display())]
pub struct HandoverError {
    /// "read", "write", "make".
    pub action: &'static str,
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub cause: String,
}

fn failed(action: &'static str, path: &Path, cause: &impl ToString) -> HandoverError {
    HandoverError { action, path: path.to_owned(), cause: cause.to_string() }
}

/// `boot.json`: this boot, as the run stage has to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRecord {
    /// The collective.
    pub collective: CollectiveId,
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub name: NodeName,
    /// This boot.
    pub boot: BootId,
    /// `https://ADDRESS:PORT` of members, the one that booted the node first.
    pub members: Vec<String>,
    /// The profile generation that booted.
    pub generation: Sha256Digest,
    /// The last status report's number; the run stage counts on.
    pub sequence: u64,
    /// When the host certificates are due, Unix seconds.
    pub renew_after: u64,
    /// Version of the SSH authorities that was taken up.
    #[serde(default)]
    pub ssh_version: u64,
    /// The interface the node booted over.
    pub interface: String,
    /// Whether the run stage reported that the system is up: an agent that is started again does not do it twice.
    #[serde(default)]
    pub is_up: bool,
    /// Whether a member has taken what this boot read of its image: told twice, it would count for two boots.
    #[serde(default)]
    pub is_trace_told: bool,
}

/// The directory of one boot. Tests use another than [`RUN_DIR`].
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

/// The part of the tether's trace that is reported.
#[derive(Debug, Deserialize)]
pub struct Trace {
    /// The image.
    pub digest: Sha256Digest,
    /// Chunk, and milliseconds since the image was opened.
    pub reads: Vec<(u64, u32)>,
    /// Whether nothing more will be added.
    pub is_whole: bool,
}

/// The part of the tether's state that tells where it reads from.
#[derive(Debug, Deserialize)]
pub struct Tether {
    /// The image.
    pub digest: Sha256Digest,
    /// Whether all of it is in memory.
    #[serde(default)]
    pub is_whole: bool,
    /// How much of it is, where all of it is to be.
    #[serde(default)]
    pub arrived: Option<Arrived>,
    /// Its servers.
    pub members: Vec<TetherMember>,
    /// Its cache on a disk, where there is to be one.
    #[serde(default)]
    pub disk: Option<TetherDisk>,
}

/// How much of an image is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Arrived {
    /// Verified bytes that are there.
    pub bytes: u64,
    /// Bytes that are to be there.
    pub of: u64,
    /// Seconds until they are; `None`: nothing came lately.
    pub seconds_left: Option<u64>,
}

/// A cache on a disk.
#[derive(Debug, Deserialize)]
pub struct TetherDisk {
    /// Why it is not used.
    #[serde(default)]
    pub error: Option<String>,
}

/// One of them.
#[derive(Debug, Deserialize)]
pub struct TetherMember {
    /// Where it serves the image.
    pub url: String,
    /// How it stands.
    pub state: String,
    /// What it did wrong last.
    #[serde(default)]
    pub last_fault: Option<String>,
}

impl TetherMember {
    /// Whether it serves, as far as the tether knows.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.state == "good"
    }

    /// Whether it served wrong bytes twice.
    #[must_use]
    pub fn is_excluded(&self) -> bool {
        self.state == "excluded"
    }
}

impl RunDir {
    /// At `path`; it is made, and its mode set, by [`Self::create`].
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Makes the directory, for root alone.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(&self) -> Result<(), HandoverError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .and_then(|()| std::fs::set_permissions(&self.0, std::fs::Permissions::from_mode(0o700)))
            .map_err(|error| failed("make", &self.0, &error))
    }

    /// The path of a file in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Where a soft key lies when there is no TPM.
    #[must_use]
    pub fn soft_key(&self) -> PathBuf {
        self.path("soft.key")
    }

    /// Writes a file of mode 0600, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf, HandoverError> {
        let path = self.path(name);
        let write = || -> std::io::Result<()> {
            // Made with mode 0600 beside the name, then renamed.
            let mut file = tempfile::NamedTempFile::new_in(&self.0)?;
            file.write_all(content)?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        write().map_err(|error| failed("write", &path, &error))?;
        Ok(path)
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<PathBuf, HandoverError> {
        let text = serde_json::to_vec_pretty(value).map_err(|error| failed("write", &self.path(name), &error))?;
        self.write(name, &text)
    }

    /// Writes `site.json`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_site(&self, bundle: &SiteBundle) -> Result<PathBuf, HandoverError> {
        self.write_json("site.json", bundle)
    }

    /// Writes `boot.json`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_boot(&self, record: &BootRecord) -> Result<PathBuf, HandoverError> {
        self.write_json("boot.json", record)
    }

    /// What the root read of its image: written by the tether, whole once it is two minutes old. `None`: not yet, not at all, or
    /// `record` says that a member has been told.
    #[must_use]
    pub fn untold_trace(&self, record: &BootRecord) -> Option<Trace> {
        if record.is_trace_told {
            return None;
        }
        read_json::<Trace>(&self.path("tether-trace.json")).ok().filter(|trace| trace.is_whole)
    }

    /// What the process says that serves the root; `None` where there is none, or none is needed.
    #[must_use]
    pub fn tether(&self) -> Option<Tether> {
        read_json::<Tether>(&self.path("tether.json")).ok().filter(|tether| !tether.is_whole)
    }

    /// Forgets what an earlier one said of itself; where it said nothing, that is as well.
    pub fn forget_tether(&self) {
        let _ = std::fs::remove_file(self.path("tether.json"));
    }

    /// Reads `site.json`.
    ///
    /// # Errors
    /// It is not there or not what it should be.
    pub fn site(&self) -> Result<SiteBundle, HandoverError> {
        read_json(&self.path("site.json"))
    }

    /// Reads `boot.json`.
    ///
    /// # Errors
    /// It is not there or not what it should be.
    pub fn boot(&self) -> Result<BootRecord, HandoverError> {
        read_json(&self.path("boot.json"))
    }
}

/// Reads a JSON file.
///
/// # Errors
/// It is not there or not what it should be.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, HandoverError> {
    let bytes = std::fs::read(path).map_err(|error| failed("read", path, &error))?;
    serde_json::from_slice(&bytes).map_err(|error| failed("read", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> BootRecord {
        BootRecord {
            collective: CollectiveId::random(),
            node: NodeId::random(),
            name: "n1".parse().unwrap(),
            boot: BootId::random(),
            members: vec!["https://10.0.0.1:8443".into()],
            generation: Sha256Digest([7; 32]),
            sequence: 12,
            renew_after: 1_800_000_000,
            ssh_version: 1,
            interface: "eth0".into(),
            is_up: false,
            is_trace_told: false,
        }
    }

    fn write_trace(run: &RunDir, is_whole: bool) {
        let digest = "07".repeat(32);
        let trace = format!(r#"{{"digest":"{digest}","chunk_size":65536,"reads":[[3,10]],"is_whole":{is_whole}}}"#);
        run.write("tether-trace.json", trace.as_bytes()).unwrap();
    }

    #[test]
    fn what_is_handed_over_is_private_and_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path().join("mooring"));
        run.create().unwrap();
        let record = record();
        let path = run.write_boot(&record).unwrap();
        assert_eq!(run.boot().unwrap(), record);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(run.path("")).unwrap().permissions().mode() & 0o777, 0o700);
        let error = run.site().unwrap_err().to_string();
        assert!(error.starts_with("cannot read '") && error.contains("site.json"), "{error}");
    }

    #[test]
    fn a_trace_is_told_when_it_is_whole_and_once_also_by_an_agent_that_is_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let mut record = record();
        write_trace(&run, false);
        assert!(run.untold_trace(&record).is_none());
        write_trace(&run, true);
        assert!(run.untold_trace(&record).is_some());
        record.is_trace_told = true;
        run.write_boot(&record).unwrap();
        assert!(run.untold_trace(&run.boot().unwrap()).is_none());

        // What an agent before this one wrote does not say it.
        let mut older = serde_json::to_value(&record).unwrap();
        older.as_object_mut().unwrap().remove("is_trace_told");
        run.write("boot.json", older.to_string().as_bytes()).unwrap();
        assert!(run.untold_trace(&run.boot().unwrap()).is_some());
    }
}
