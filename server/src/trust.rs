//! Whom this member believes to be a member, and which authority its own certificate is from.
//!
//! The records say what is to be ([`AuthoritiesRecord`](crate::store::authorities::AuthoritiesRecord)); what this member has taken up of it is in
//! its key directory ([`Held`]) and here, and all that it shows and tells follows from that. It takes up a change whole or not at all, and when
//! it is killed in between, the rest when it is started again.

use crate::authority::{self, Held, KeyFiles};
use crate::certificate::Certificate;
use crate::state::Member;
use crate::store::Snapshot;
use crate::store::authorities::{AuthoritiesRecord, NodeTrust, Said};
use crate::store::records::{NodeRecord, SiteRecord};
use anyhow::{Context as _, ensure};
use moor_api::client::tls::{MemberVerifier, peer_tls_config};
use moor_api::ids::{BootId, NodeId};
use moor_api::trust::SiteBundle;
use rustls::ClientConfig;
use rustls::crypto::aws_lc_rs;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use zeroize::Zeroizing;

/// What was taken up.
pub struct Taken {
    /// Which authorities.
    pub held: Held,
    /// Their root certificates, PEM.
    pub roots: Vec<String>,
    /// Knows members by certificates from them.
    pub verifier: MemberVerifier,
}

/// What this member trusts now.
pub struct Trust {
    keys: PathBuf,
    taken: RwLock<Arc<Taken>>,
    /// One change of the key directory at a time, and none while somebody reads all of it.
    changing: Mutex<()>,
}

impl Trust {
    /// As the key directory says.
    ///
    /// # Errors
    /// A file is missing or damaged.
    pub fn open(keys: &Path, site: &SiteRecord) -> anyhow::Result<Self> {
        let taken = RwLock::new(Arc::new(read(keys, site)?));
        Ok(Self { keys: keys.to_owned(), taken, changing: Mutex::default() })
    }

    /// What it is.
    #[must_use]
    pub fn taken(&self) -> Arc<Taken> {
        // Whoever panicked here had at most replaced it.
        self.taken.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The version of the trust bundle.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.taken().held.version
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(keys: &Path, site: &SiteRecord) -> anyhow::Result<Taken> {
    let held = Held::read(keys)?;
    let roots = held.trusted.iter().map(|number| authority::root(keys, *number));
    let roots = roots.collect::<anyhow::Result<Vec<_>>>()?;
    let bundle = bundle(site, &held, roots.clone(), Vec::new(), Vec::new());
    let verifier = MemberVerifier::new(&bundle, Arc::new(aws_lc_rs::default_provider()))?;
    Ok(Taken { held, roots, verifier })
}

/// How other members are called: with this trust, and with `certificate`.
pub(crate) fn peer_calls(
    site: &SiteRecord,
    taken: &Taken,
    certificate: Arc<Certificate>,
) -> anyhow::Result<Arc<ClientConfig>> {
    let bundle = bundle(site, &taken.held, taken.roots.clone(), Vec::new(), Vec::new());
    Ok(Arc::new(peer_tls_config(&bundle, certificate)?))
}

/// What whoever trusts the collective is given.
#[must_use]
pub fn bundle(
    site: &SiteRecord,
    held: &Held,
    roots: Vec<String>,
    members: Vec<String>,
    ssh_host_authorities: Vec<String>,
) -> SiteBundle {
    SiteBundle {
        version: held.version,
        collective: site.collective,
        name: site.name.clone(),
        roots,
        members,
        ssh_host_authorities,
        built: site.created,
    }
}

/// What a member holds that has taken up the records; `None`: they name no authority that could issue.
fn wanted(version: u64, record: &AuthoritiesRecord) -> Option<Held> {
    let trusted = record.list.iter().map(|authority| authority.number).collect();
    record.issuing().map(|issuing| Held { version, trusted, issuing: issuing.number })
}

impl Member {
    /// Takes up what the records say of the authorities.
    ///
    /// # Errors
    /// A new authority does not open by this member's key; the key directory is not writable. Then all is as it was.
    pub fn take_up(&self) -> anyhow::Result<()> {
        let _alone = self.trust.change();
        self.take_up_alone(&self.view()?)
    }

    fn take_up_alone(&self, view: &Snapshot) -> anyhow::Result<()> {
        let Some((version, record)) = view.authorities()? else { return Ok(()) };
        let (keys, before) = (&self.trust.keys, self.trust.taken());
        let wanted = wanted(version, &record).context("the records name no authority that is in use")?;
        if wanted == before.held {
            return Ok(());
        }
        for authority in &record.list {
            if !authority::has(keys, authority.number) {
                let text = self.secrets.open_authority(authority.number, &authority.wrapped)?;
                let files: KeyFiles =
                    serde_json::from_slice(&text).map_err(|_| anyhow::anyhow!("the keys are not understood"))?;
                ensure!(files.root() == Some(authority.root.as_str()), "the keys are of another authority");
                authority::put(keys, authority.number, &files)
                    .with_context(|| format!("taking up authority {}", authority.number))?;
            }
        }
        wanted.write(keys)?;
        let taken = Arc::new(read(keys, &self.site)?);
        let calls = peer_calls(&self.site, &taken, self.certificate.clone())?;
        if wanted.issuing != before.held.issuing {
            self.certificate.replace(&self.issuer)?;
        }
        // What failed until here is tried again: nothing else says that it was done.
        self.calls.set_tls(calls);
        *self.trust.taken.write().unwrap_or_else(PoisonError::into_inner) = taken;
        for number in before.held.trusted.iter().filter(|number| !wanted.trusted.contains(number)) {
            authority::remove(keys, *number)?;
        }
        tracing::info!(
            "trust bundle {} was taken up: authorities {:?}, and certificates are from authority {}",
            wanted.version,
            wanted.trusted,
            wanted.issuing
        );
        Ok(())
    }

    /// Removes the keys of an authority that was dropped before this member was killed.
    ///
    /// # Errors
    /// The key directory is not writable.
    pub fn sweep_authorities(&self) -> anyhow::Result<()> {
        let _alone = self.trust.change();
        let held = Held::read(&self.trust.keys)?;
        let oldest = held.trusted.iter().copied().min().unwrap_or(1);
        // They are dropped in their order: only the last can have been left.
        match oldest.checked_sub(1) {
            Some(last) if last > 0 => authority::remove(&self.trust.keys, last),
            _ => Ok(()),
        }
    }

    /// All keys that members share, the version of the trust bundle that they are of, and the records of the same moment.
    ///
    /// # Errors
    /// As of [`Member::take_up`]; a file is missing.
    pub fn export_keys(&self) -> anyhow::Result<(KeyFiles, u64, Snapshot)> {
        let _alone = self.trust.change();
        let view = self.view()?;
        self.take_up_alone(&view)?;
        Ok((authority::export(&self.trust.keys)?, self.trust.version(), view))
    }

    /// Notes which version of the trust bundle a node says that it has, if that is worth writing down.
    pub fn note_trust(&self, node: &NodeRecord, boot: BootId, version: u64) {
        // Before the first rotation there is one version. Of one that this member has not taken up yet it says nothing.
        let newest = self.trust.version();
        if newest > 1 && version <= newest {
            let said = NodeTrust { boot, began: version, now: version };
            if node.trust != Some(node.trust.map_or(said, |known| known.and(said))) {
                self.said.note(node.id, said);
            }
        }
    }
}

/// What nodes said of their trust that is not in the records yet.
#[derive(Default)]
pub struct Heard(Mutex<HashMap<NodeId, NodeTrust>>);

impl Heard {
    fn all(&self) -> MutexGuard<'_, HashMap<NodeId, NodeTrust>> {
        // A thread that panicked here left the map whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, node: NodeId, said: NodeTrust) {
        let mut all = self.all();
        let said = all.get(&node).map_or(said, |before| before.and(said));
        all.insert(node, said);
    }

    /// So many of them.
    pub(crate) fn some(&self, count: usize) -> Vec<Said> {
        self.all().iter().take(count).map(|(node, trust)| Said { node: *node, trust: *trust }).collect()
    }

    /// They are in the records; what was said since then stays.
    pub(crate) fn written(&self, some: &[Said]) {
        let mut all = self.all();
        for said in some {
            if all.get(&said.node) == Some(&said.trust) {
                all.remove(&said.node);
            }
        }
    }
}

/// The files of a new authority, as they are encrypted to members.
///
/// # Errors
/// Never, for files that were made.
pub(crate) fn text_of(files: &KeyFiles) -> anyhow::Result<Zeroizing<Vec<u8>>> {
    // Long enough that growing leaves no copy behind.
    let mut text = Zeroizing::new(Vec::with_capacity(64 << 10));
    serde_json::to_writer(&mut *text, files)?;
    Ok(text)
}

/// The record of the authority that the collective began with.
///
/// # Errors
/// The key directory is damaged.
pub(crate) fn first_root(member: &Member) -> anyhow::Result<String> {
    authority::root(&member.trust.keys, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::authorities::AuthorityRecord;
    use std::collections::BTreeMap;

    #[test]
    fn what_is_held_follows_the_records() {
        let of = |list: &[(u32, bool)]| {
            let list = list.iter().map(|(number, retiring)| AuthorityRecord {
                number: *number,
                root: String::new(),
                made: 1,
                since: 1,
                wrapped: BTreeMap::new(),
                retiring: *retiring,
            });
            wanted(7, &AuthoritiesRecord { list: list.collect() })
        };
        let held = |trusted: &[u32], issuing| Some(Held { version: 7, trusted: trusted.to_vec(), issuing });
        assert_eq!(of(&[(1, false), (2, false)]), held(&[1, 2], 1));
        assert_eq!(of(&[(1, true), (2, false)]), held(&[1, 2], 2));
        assert_eq!(of(&[(2, false)]), held(&[2], 2));
        assert_eq!(of(&[(2, true)]), None);
    }

    #[test]
    fn what_was_said_while_it_was_written_stays() {
        let heard = Heard::default();
        let (node, boot) = (NodeId::random(), BootId::random());
        let said = |began, now| NodeTrust { boot, began, now };
        heard.note(node, said(1, 1));
        let some = heard.some(10);
        heard.note(node, said(2, 2));
        heard.written(&some);
        assert_eq!(heard.some(10), [Said { node, trust: said(1, 2) }]);
        heard.written(&heard.some(10));
        assert!(heard.some(10).is_empty());
    }
}
