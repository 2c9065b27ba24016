//! Whom this member believes to be a member, which authority its own certificate is from, and which SSH authorities there are.
//!
//! The records say what is to be ([`AuthoritiesRecord`](crate::store::authorities::AuthoritiesRecord)); what this member has taken up of it is in
//! its key directory ([`Held`]) and here, and all that it shows and tells follows from that. It takes up a change whole or not at all, and when
//! it is killed in between, the rest when it is started again.

use crate::authority::{self, Held, KeyFiles, SshAuthorities, SshHeld};
use crate::certificate::Certificate;
use crate::state::Member;
use crate::store::Snapshot;
use crate::store::authorities::{AuthoritiesRecord, NodeTrust, Said};
use crate::store::records::{NodeRecord, SiteRecord};
use anyhow::{Context as _, ensure};
use moor_api::admin::{AuthorityKind, SshRole};
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
    ssh: RwLock<Arc<SshAuthorities>>,
    /// One change of the key directory at a time, and none while somebody reads all of it.
    changing: Mutex<Removed>,
}

/// The authorities besides which no keys are left in the key directory, of SSH those before which none are; none: nobody has looked yet.
#[derive(Default)]
struct Removed {
    x509: Option<Vec<u32>>,
    ssh: Option<[u32; 2]>,
}

impl Trust {
    /// As the key directory says.
    ///
    /// # Errors
    /// A file is missing or damaged.
    pub fn open(keys: &Path, site: &SiteRecord) -> anyhow::Result<Self> {
        let taken = RwLock::new(Arc::new(read(keys, site)?));
        let ssh = RwLock::new(Arc::new(SshAuthorities::open(keys)?));
        Ok(Self { keys: keys.to_owned(), taken, ssh, changing: Mutex::default() })
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

    /// The SSH authorities that were taken up.
    #[must_use]
    pub fn ssh(&self) -> Arc<SshAuthorities> {
        self.ssh.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self) -> MutexGuard<'_, Removed> {
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
        incarnation: site.incarnation,
    }
}

/// What a member that holds `held` is to take up of the records; `None`: nothing. It never goes back. Its tables do when it is killed: they may
/// then be older than what it has taken up, and the others may have dropped what it would go back to. Without a `record` there is the authority
/// that the collective began with, and a new version only where it began anew: nodes have to hear of that.
fn due(held: &Held, site: &SiteRecord, record: Option<&AuthoritiesRecord>) -> anyhow::Result<Option<Held>> {
    let version = site.bundle_version;
    let Some(record) = record else {
        let is_newer = !site.incarnation.is_first() && version > held.version;
        return Ok(is_newer.then(|| Held { version, ..held.clone() }));
    };
    let issuing = record.issuing().context("the records name no authority that is in use")?.number;
    let trusted = record.list.iter().map(|authority| authority.number).collect();
    let is_newer = (version, issuing) > (held.version, held.issuing);
    Ok(is_newer.then_some(Held { version, trusted, issuing }))
}

impl Member {
    /// Takes up what the records say of the authorities, and removes the keys of those that were dropped or cancelled.
    ///
    /// # Errors
    /// A new authority does not open by this member's key; the key directory is not writable. What was not done is tried again by the next call.
    pub fn take_up(&self) -> anyhow::Result<()> {
        let mut removed = self.trust.change();
        self.take_up_alone(&self.view()?)?;
        let taken = self.trust.taken();
        let trusted = &taken.held.trusted;
        if removed.x509.as_ref() != Some(trusted) {
            authority::remove_others(&self.trust.keys, trusted)?;
            removed.x509 = Some(trusted.clone());
        }
        let oldest = self.trust.ssh().held.oldest();
        if removed.ssh != Some(oldest) {
            authority::remove_ssh_before(&self.trust.keys, oldest)?;
            removed.ssh = Some(oldest);
        }
        Ok(())
    }

    fn take_up_alone(&self, view: &Snapshot) -> anyhow::Result<()> {
        // Neither has to wait for the other.
        let (x509, ssh) = (self.take_up_x509(view), self.take_up_ssh(view));
        x509.and(ssh)
    }

    /// As for X.509: it never goes back.
    fn take_up_ssh(&self, view: &Snapshot) -> anyhow::Result<()> {
        let (version, record) = view.ssh_authorities()?;
        let keys = &self.trust.keys;
        if version <= self.trust.ssh().held.version {
            return Ok(());
        }
        let wanted = SshHeld::of(version, record.as_ref())?;
        let of = |role| record.iter().flat_map(move |record| record.of(role)).map(move |one| (role, one));
        for (role, one) in SshRole::ALL.into_iter().flat_map(of) {
            let number = one.number;
            if authority::has_ssh(keys, role, number, &one.public) {
                continue;
            }
            let text = self.secrets.open_authority(AuthorityKind::Ssh(role), number, &one.wrapped)?;
            let private = std::str::from_utf8(&text).unwrap_or_default();
            ensure!(
                authority::is_pair(private, &one.public),
                "the key of SSH {role} authority {number} is of another one"
            );
            authority::put_ssh(keys, role, number, private)
                .with_context(|| format!("taking up SSH {role} authority {number}"))?;
        }
        wanted.write(keys)?;
        let taken = SshAuthorities::open(keys)?;
        *self.trust.ssh.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(taken);
        tracing::info!(
            "version {version} of the SSH authorities was taken up: of hosts {:?}, of users {:?}, and host certificates are from {}",
            wanted.host,
            wanted.user,
            wanted.signing
        );
        Ok(())
    }

    fn take_up_x509(&self, view: &Snapshot) -> anyhow::Result<()> {
        let Some(site) = view.site()? else { return Ok(()) };
        let record = view.authorities()?.map(|(_, record)| record);
        let (keys, before) = (&self.trust.keys, self.trust.taken());
        let Some(wanted) = due(&before.held, &site, record.as_ref())? else { return Ok(()) };
        for authority in record.iter().flat_map(|record| &record.list) {
            if !authority::has(keys, authority.number) {
                let text = self.secrets.open_authority(AuthorityKind::X509, authority.number, &authority.wrapped)?;
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
        tracing::info!(
            "trust bundle {} was taken up: authorities {:?}, and certificates are from authority {}",
            wanted.version,
            wanted.trusted,
            wanted.issuing
        );
        Ok(())
    }

    /// All keys that members share, the version of the trust bundle that they are of, and the records of the same moment.
    ///
    /// # Errors
    /// A new authority does not open by this member's key; the key directory is not writable, or a file is missing in it.
    pub fn export_keys(&self) -> anyhow::Result<(KeyFiles, u64, Snapshot)> {
        let _alone = self.trust.change();
        let view = self.view()?;
        self.take_up_alone(&view)?;
        Ok((authority::export(&self.trust.keys)?, self.trust.version(), view))
    }

    /// Notes which version of the trust bundle, and which of the SSH authorities, a node says that it has, if that is worth writing down.
    pub fn note_trust(&self, node: &NodeRecord, boot: BootId, version: u64, ssh: u64) {
        // Before the first rotation there is one version. Of one that this member has not taken up yet it says nothing.
        let (newest, newest_ssh) = (self.trust.version(), self.trust.ssh().held.version);
        let ssh = if newest_ssh > 1 && ssh <= newest_ssh { ssh } else { 0 };
        if version <= newest && (newest > 1 || ssh > 0) {
            let said = NodeTrust { boot, began: version, now: version, ssh };
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
    use moor_api::ids::CollectiveId;
    use moor_api::trust::Incarnation;
    use std::collections::BTreeMap;

    fn site(bundle_version: u64, incarnation: Incarnation) -> SiteRecord {
        let collective = CollectiveId::from_bytes([1; 16]);
        SiteRecord { collective, name: "x".into(), bundle_version, created: 1, incarnation }
    }

    #[test]
    fn what_is_held_follows_the_records_and_never_goes_back() {
        let held = |version, trusted: &[u32], issuing| Held { version, trusted: trusted.to_vec(), issuing };
        let of = |before: &Held, version, list: &[(u32, bool)]| {
            let list = list.iter().map(|(number, retiring)| AuthorityRecord {
                number: *number,
                root: String::new(),
                made: 1,
                since: 1,
                wrapped: BTreeMap::new(),
                retiring: *retiring,
            });
            due(before, &site(version, Incarnation::FIRST), Some(&AuthoritiesRecord { list: list.collect() }))
        };
        let none = Held::default();
        let rotated: (u64, &[_], _) = (2, &[(1, false), (2, false)], held(2, &[1, 2], 1));
        let retiring: (u64, &[_], _) = (2, &[(1, true), (2, false)], held(2, &[1, 2], 2));
        let dropped: (u64, &[_], _) = (3, &[(2, false)], held(3, &[2], 2));
        // In their order, and one that was missed makes no difference.
        let steps = [&rotated, &retiring, &dropped];
        for (at, (version, list, then)) in steps.iter().enumerate() {
            assert_eq!(of(&none, *version, list).unwrap().as_ref(), Some(then));
            for (_, _, before) in &steps[..at] {
                assert_eq!(of(before, *version, list).unwrap().as_ref(), Some(then), "{before:?}");
            }
            // What is taken up already, or is older than that.
            for (_, _, before) in &steps[at..] {
                assert_eq!(of(before, *version, list).unwrap(), None, "{before:?}");
            }
        }
        // After a restore or a recovery, whatever was taken up before.
        let anew = held(9, &[1], 1);
        assert_eq!(of(&dropped.2, 9, &[(1, false)]).unwrap(), Some(anew));
        assert!(of(&none, 2, &[(2, true)]).is_err());
        // One that was cancelled.
        assert_eq!(of(&rotated.2, 3, &[(1, false)]).unwrap(), Some(held(3, &[1], 1)));
    }

    #[test]
    fn a_collective_that_never_rotated_has_another_bundle_once_it_began_anew() {
        let second = Incarnation::FIRST.next();
        let none = Held::default();
        assert_eq!(due(&none, &site(1, Incarnation::FIRST), None).unwrap(), None);
        // Of a release that did not count incarnations.
        assert_eq!(due(&none, &site(9, Incarnation::FIRST), None).unwrap(), None);
        let anew = Held { version: 9, ..none.clone() };
        assert_eq!(due(&none, &site(9, second), None).unwrap(), Some(anew.clone()));
        assert_eq!(due(&anew, &site(9, second), None).unwrap(), None);
    }

    #[test]
    fn what_was_said_while_it_was_written_stays() {
        let heard = Heard::default();
        let (node, boot) = (NodeId::random(), BootId::random());
        let said = |began, now| NodeTrust { boot, began, now, ssh: 7 };
        heard.note(node, said(1, 1));
        let some = heard.some(10);
        heard.note(node, said(2, 2));
        heard.written(&some);
        assert_eq!(heard.some(10), [Said { node, trust: said(1, 2) }]);
        heard.written(&heard.some(10));
        assert!(heard.some(10).is_empty());
    }
}
