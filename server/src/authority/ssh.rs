//! The SSH authorities: one of hosts and one of users, the files that they are in, and which of them this member has taken up.
//!
//! The latter is in `ssh-authorities.json` in the key directory, and as [`Held`](super::Held) it is written after the key of a new authority
//! and before that of an old one goes. Without the file there is the first of each alone.

use super::Files;
use crate::files;
use crate::store::authorities::ssh::SshAuthoritiesRecord;
use anyhow::{Context as _, ensure};
use moor_api::admin::SshRole;
use serde::{Deserialize, Serialize};
use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, LineEnding, PrivateKey};
use std::path::Path;
use zeroize::Zeroizing;

/// The file.
pub(super) const FILE: &str = "ssh-authorities.json";
/// More are never trusted at a time, of either role.
const MAX: usize = 8;

/// The name of an authority's file; it is secret. That of the first has no number.
pub(super) fn name_of(role: SshRole, number: u32) -> String {
    if number > 1 { format!("ssh-{role}-ca-{number}") } else { format!("ssh-{role}-ca") }
}

/// What a member has taken up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshHeld {
    /// The version of the records.
    pub version: u64,
    /// Numbers of the host authorities that are trusted, oldest first.
    pub host: Vec<u32>,
    /// The one that certificates of hosts are from: one of them.
    pub signing: u32,
    /// Numbers of the user authorities that are trusted, oldest first.
    pub user: Vec<u32>,
}

impl Default for SshHeld {
    fn default() -> Self {
        Self { version: 1, host: vec![1], signing: 1, user: vec![1] }
    }
}

impl SshHeld {
    /// What the records say.
    ///
    /// # Errors
    /// They name no host authority that is in use.
    pub fn of(version: u64, record: Option<&SshAuthoritiesRecord>) -> anyhow::Result<Self> {
        let Some(record) = record else { return Ok(Self { version, ..Self::default() }) };
        let numbers = |role| record.of(role).iter().map(|authority| authority.number).collect();
        let signing = record.signing().context("the records name no SSH host authority that is in use")?.number;
        Ok(Self { version, host: numbers(SshRole::Host), signing, user: numbers(SshRole::User) })
    }

    /// Reads it.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn read(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join(FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::from_text(&text).with_context(|| format!("'{}'", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("reading '{}'", path.display())),
        }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn write(&self, dir: &Path) -> anyhow::Result<()> {
        Files(dir.to_owned()).write(FILE, &self.to_text()?, 0o644)
    }

    pub(super) fn to_text(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    pub(super) fn from_text(text: &str) -> anyhow::Result<Self> {
        let held: Self = serde_json::from_str(text).context("it does not say which SSH authorities there are")?;
        let is_good = |list: &[u32]| (1..=MAX).contains(&list.len()) && !list.contains(&0);
        ensure!(
            is_good(&held.host) && is_good(&held.user) && held.host.contains(&held.signing),
            "it names no SSH authority that certificates could be from"
        );
        Ok(held)
    }

    /// Numbers of those of a role that are trusted, oldest first.
    #[must_use]
    pub fn numbers(&self, role: SshRole) -> &[u32] {
        match role {
            SshRole::Host => &self.host,
            SshRole::User => &self.user,
        }
    }

    /// The oldest of hosts and of users that are here.
    #[must_use]
    pub fn oldest(&self) -> [u32; 2] {
        SshRole::ALL.map(|role| self.numbers(role).iter().copied().min().unwrap_or(1))
    }

    /// Names of the files that members share.
    pub(super) fn files(&self) -> Vec<String> {
        let of = |role| self.numbers(role).iter().map(move |number| name_of(role, *number));
        SshRole::ALL.into_iter().flat_map(of).collect()
    }
}

/// The SSH authorities that a member has taken up. No `Debug`.
pub struct SshAuthorities {
    /// Which.
    pub held: SshHeld,
    /// Signs host certificates.
    pub signing: PrivateKey,
    /// `ssh-ed25519 …` lines of those of hosts, oldest first.
    pub hosts: Vec<String>,
    /// The same of users.
    pub users: Vec<String>,
}

impl SshAuthorities {
    /// Opens them.
    ///
    /// # Errors
    /// A key file is missing or damaged.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let held = SshHeld::read(dir)?;
        let files = Files(dir.to_owned());
        let lines = |role| -> anyhow::Result<Vec<String>> {
            held.numbers(role).iter().map(|number| line(&files, role, *number)).collect()
        };
        let (hosts, users) = (lines(SshRole::Host)?, lines(SshRole::User)?);
        let signing = key(&files, SshRole::Host, held.signing)?;
        Ok(Self { held, signing, hosts, users })
    }

    /// `ssh-ed25519 …` lines of those of a role, oldest first.
    #[must_use]
    pub fn lines(&self, role: SshRole) -> &[String] {
        match role {
            SshRole::Host => &self.hosts,
            SshRole::User => &self.users,
        }
    }
}

fn key(files: &Files, role: SshRole, number: u32) -> anyhow::Result<PrivateKey> {
    let name = name_of(role, number);
    let key = PrivateKey::from_openssh(&*files.read(&name)?)
        .with_context(|| format!("'{}' is not an SSH key", files.path(&name).display()))?;
    let is_ed25519 = key.algorithm() == Algorithm::Ed25519;
    ensure!(is_ed25519, "'{}' is not an Ed25519 key", files.path(&name).display());
    Ok(key)
}

fn line(files: &Files, role: SshRole, number: u32) -> anyhow::Result<String> {
    Ok(key(files, role, number)?.public_key().to_openssh()?)
}

/// Makes an authority: its private half in OpenSSH's form, and the line of its public half.
///
/// # Errors
/// No randomness.
pub fn make_ssh(name: &str, role: SshRole, number: u32) -> anyhow::Result<(Zeroizing<String>, String)> {
    let mut key = PrivateKey::random(&mut OsRng, Algorithm::Ed25519).context("making an SSH authority")?;
    // People tell them apart by it.
    key.set_comment(if number == 1 {
        format!("{name} {role} authority")
    } else {
        format!("{name} {role} authority {number}")
    });
    Ok((key.to_openssh(LineEnding::LF)?, key.public_key().to_openssh()?))
}

/// Writes the private half of an authority.
///
/// # Errors
/// The directory is not writable.
pub fn put_ssh(dir: &Path, role: SshRole, number: u32, private: &str) -> anyhow::Result<()> {
    Files(dir.to_owned()).write(&name_of(role, number), private, 0o600)
}

/// Whether the file of an authority is there, and is of the one with this public half.
#[must_use]
pub fn has_ssh(dir: &Path, role: SshRole, number: u32, public: &str) -> bool {
    line(&Files(dir.to_owned()), role, number).is_ok_and(|line| line == public)
}

/// Whether `private` is the private half of the authority with this public half.
#[must_use]
pub fn is_pair(private: &str, public: &str) -> bool {
    let line = PrivateKey::from_openssh(private).and_then(|key| key.public_key().to_openssh());
    line.is_ok_and(|line| line == public)
}

/// The role and number of the authority that a file is of, also one that was being written when its writer ended ([`files::write`]).
fn authority_of(file: &str) -> Option<(SshRole, u32)> {
    let stem = match file.split_once('.') {
        None => file,
        Some((stem, extension)) if extension.starts_with("part-") => stem,
        Some(_) => return None,
    };
    SshRole::ALL.into_iter().find_map(|role| match stem.strip_prefix(&name_of(role, 1))? {
        "" => Some((role, 1)),
        rest => Some((role, rest.strip_prefix('-')?.parse().ok()?)),
    })
}

/// Removes all that there is of authorities of hosts and of users before these.
///
/// # Errors
/// The directory is not writable.
pub fn remove_ssh_before(dir: &Path, oldest: [u32; 2]) -> anyhow::Result<()> {
    let listing = || format!("looking for keys of old SSH authorities in '{}'", dir.display());
    for entry in std::fs::read_dir(dir).with_context(listing)? {
        let entry = entry.with_context(listing)?;
        let Some((role, number)) = entry.file_name().to_str().and_then(authority_of) else { continue };
        let [host, user] = oldest;
        if number < if role == SshRole::Host { host } else { user } {
            let path = entry.path();
            std::fs::remove_file(&path).with_context(|| format!("removing '{}'", path.display()))?;
        }
    }
    files::sync_parent(&dir.join("x")).with_context(|| format!("syncing '{}'", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::{create, export, import};
    use moor_api::ids::CollectiveId;

    #[test]
    fn what_is_held_reads_back_and_what_names_no_authority_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(SshHeld::read(dir.path()).unwrap(), SshHeld::default());
        let held = SshHeld { version: 3, host: vec![1, 2], signing: 2, user: vec![4] };
        held.write(dir.path()).unwrap();
        assert_eq!(SshHeld::read(dir.path()).unwrap(), held);
        assert_eq!(held.oldest(), [1, 4]);
        for bad in [
            "",
            "{}",
            r#"{"version":1,"host":[],"signing":1,"user":[1]}"#,
            r#"{"version":1,"host":[1],"signing":1,"user":[]}"#,
            r#"{"version":1,"host":[2],"signing":1,"user":[1]}"#,
            r#"{"version":1,"host":[0,1],"signing":1,"user":[1]}"#,
            r#"{"version":1,"host":[1],"signing":1,"user":[1,2,3,4,5,6,7,8,9]}"#,
        ] {
            std::fs::write(dir.path().join(FILE), bad).unwrap();
            let error = format!("{:#}", SshHeld::read(dir.path()).unwrap_err());
            assert!(error.contains(FILE), "{error}");
        }
    }

    #[test]
    fn one_comes_beside_another_is_carried_to_other_members_and_the_old_one_goes() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), CollectiveId::random(), "site", 1).unwrap();
        let before = SshAuthorities::open(dir.path()).unwrap();
        let (private, public) = make_ssh("site", SshRole::User, 2).unwrap();
        assert!(public.ends_with("site user authority 2"), "{public}");
        assert!(is_pair(&private, &public) && !is_pair(&private, &before.users[0]) && !is_pair("", &public));
        put_ssh(dir.path(), SshRole::User, 2, &private).unwrap();
        let held = SshHeld { version: 2, host: vec![1], signing: 1, user: vec![1, 2] };
        held.write(dir.path()).unwrap();
        assert!(has_ssh(dir.path(), SshRole::User, 2, &public));
        assert!(!has_ssh(dir.path(), SshRole::User, 1, &public), "another one");
        assert!(!has_ssh(dir.path(), SshRole::Host, 2, &public), "another role");

        let other = tempfile::tempdir().unwrap();
        import(other.path(), &export(dir.path()).unwrap()).unwrap();
        let there = SshAuthorities::open(other.path()).unwrap();
        assert_eq!((&there.held, &there.hosts), (&held, &before.hosts));
        assert_eq!(there.users, [before.users[0].clone(), public]);
        // Also what a write that was interrupted has left of it.
        std::fs::write(other.path().join("ssh-user-ca.part-7"), "a key").unwrap();
        std::fs::write(other.path().join("ssh-user-ca-2.part-7"), "a key").unwrap();
        let names = || -> Vec<String> {
            let entries = std::fs::read_dir(other.path()).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<_> = names.filter(|name| name.starts_with("ssh-") && !name.ends_with("json")).collect();
            names.sort();
            names
        };
        for _ in 0..2 {
            remove_ssh_before(other.path(), [1, 2]).unwrap();
            assert_eq!(names(), ["ssh-host-ca", "ssh-user-ca-2", "ssh-user-ca-2.part-7"]);
        }
        let error = SshAuthorities::open(other.path()).err().unwrap().to_string();
        assert!(error.contains("ssh-user-ca"), "{error}");
    }
}
