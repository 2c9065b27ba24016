//! New host certificates for the host keys of this boot, and the SSH authorities, which may be other ones than when it booted.

use super::Duty;
use crate::child;
use crate::render;
use crate::ssh;
use crate::tree::Tree;
use moor_api::node::{HostCertificateRequest, HostCertificates, SshTrust};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// What failed is tried again after this time: members write a line and two numbers down for each try.
const AGAIN: Duration = Duration::from_mins(5);

/// So long at least after certificates have come no others are asked for: a member that wants that at once would be asked without pause.
const NEXT: Duration = Duration::from_mins(1);

/// When certificates are renewed: after the time of day that the record has from a member, and some time after the last try. The latter is not
/// measured by the clock, which may show any time until it is set: what it shows then must not be waited for.
#[derive(Debug, Default)]
pub(super) struct Renewal {
    not_before: Option<Instant>,
}

impl Renewal {
    /// Whether it is time. `clock`: what that shows now, in Unix seconds; `renew_after`: 0 where nothing is to be renewed.
    pub(super) fn is_due(&self, renew_after: u64, clock: u64, now: Instant) -> bool {
        renew_after != 0 && clock >= renew_after && self.not_before.is_none_or(|then| now >= then)
    }

    /// It was tried. What has come says when the next are due.
    fn tried(&mut self, renew_after: &mut u64, come: Option<&HostCertificates>, now: Instant) {
        let pause = match come {
            Some(come) => {
                // 0 is none.
                *renew_after = come.renew_after.max(1);
                NEXT
            }
            None => AGAIN,
        };
        self.not_before = Some(now + pause);
    }
}

impl Duty {
    /// New certificates, and when the next are due.
    pub(super) async fn renew(&mut self) {
        let come = self.try_renew().await;
        self.renewal.tried(&mut self.record.renew_after, come.as_ref().ok(), Instant::now());
        match come {
            Ok(_) => crate::console::say("onboot", "the host certificates were renewed"),
            Err(reason) => {
                crate::console::say("onboot", &format!("the host certificates were not renewed: {reason}"));
            }
        }
        self.remember();
    }

    async fn try_renew(&mut self) -> Result<HostCertificates, String> {
        let (keys, answer) = self.certified().await?;
        // From an authority that nobody may trust any more.
        if answer.version < self.record.ssh_version {
            return Err("the member that answered has not heard of the newest SSH authorities yet".into());
        }
        install(&keys, &answer).await.map_err(|error| format!("{error:#}"))?;
        Ok(answer)
    }

    /// The host keys of this boot, and certificates for them.
    async fn certified(&mut self) -> Result<(Vec<Public>, HostCertificates), String> {
        let keys = public_keys().map_err(|error| error.to_string())?;
        let request = request(&keys);
        let answer = self.ask(async |member| member.host_certificates(&request).await).await;
        Ok((keys, answer.map_err(|problem| problem.to_string())?))
    }

    /// Takes up the SSH authorities where `newest` is a newer version of them than this node has; returns whether it did.
    pub(super) async fn follow_ssh(&mut self, newest: u64) -> bool {
        if newest <= self.record.ssh_version || self.ssh_again.is_some_and(|then| Instant::now() < then) {
            return false;
        }
        let taken = self.take_up_ssh().await;
        self.ssh_again = taken.is_err().then(|| Instant::now() + AGAIN);
        match &taken {
            Ok(()) => {
                let version = self.record.ssh_version;
                crate::console::say("onboot", &format!("version {version} of the SSH authorities was taken up"));
            }
            Err(reason) => self.complain(format!("version {newest} of the SSH authorities was not taken up: {reason}")),
        }
        taken.is_ok()
    }

    async fn take_up_ssh(&mut self) -> Result<(), String> {
        let trust = self.ask(async |member| member.ssh_trust().await).await.map_err(|problem| problem.to_string())?;
        let (keys, answer) = self.certified().await?;
        // Two members may have answered.
        let version = trust.version.min(answer.version);
        if version <= self.record.ssh_version {
            return Err("the member that answered has not heard of it yet".into());
        }
        take_up(&trust).map_err(|error| format!("{error:#}"))?;
        install(&keys, &answer).await.map_err(|error| format!("{error:#}"))?;
        self.record.ssh_version = version;
        self.renewal.tried(&mut self.record.renew_after, Some(&answer), Instant::now());
        self.remember();
        Ok(())
    }
}

/// Writes whom ssh and sshd believe: before a certificate is shown that others may believe already.
fn take_up(trust: &SshTrust) -> anyhow::Result<()> {
    let tree = Tree::open(Path::new("/"))?;
    for file in render::authorities(trust)? {
        file.write(&tree)?;
    }
    Ok(())
}

/// A host key's public half: the word in its file's name, and its line.
struct Public {
    word: &'static str,
    line: String,
}

/// The public keys of this boot, as the boot stage wrote them.
fn public_keys() -> std::io::Result<Vec<Public>> {
    public_keys_in(Path::new("/etc/ssh"))
}

fn public_keys_in(directory: &Path) -> std::io::Result<Vec<Public>> {
    let mut keys = Vec::new();
    for word in ["ed25519", "ecdsa"] {
        match std::fs::read_to_string(directory.join(format!("ssh_host_{word}_key.pub"))) {
            Ok(line) => keys.push(Public { word, line: line.trim().to_owned() }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (),
            Err(error) => return Err(error),
        }
    }
    if keys.is_empty() {
        return Err(std::io::Error::other("there is no host key in /etc/ssh"));
    }
    Ok(keys)
}

fn request(keys: &[Public]) -> HostCertificateRequest {
    HostCertificateRequest { public_keys: keys.iter().map(|key| key.line.clone()).collect() }
}

/// Writes the certificates and has sshd read them; connections that are open stay.
async fn install(keys: &[Public], answer: &HostCertificates) -> anyhow::Result<()> {
    write(&Tree::open(Path::new("/"))?, keys, answer)?;
    let mut reload = Command::new("systemctl");
    // Debian calls it ssh, others sshd. As patterns both are looked for among what runs only, so that it is no error that there is but one
    // (systemctl(1)). Socket-activated or stopped, it reads them at its next start.
    reload.args(["try-reload-or-restart", "ssh.servic[e]", "sshd.servic[e]"]);
    child::run(reload, b"", Duration::from_mins(1)).await?;
    Ok(())
}

fn write(tree: &Tree, keys: &[Public], answer: &HostCertificates) -> anyhow::Result<()> {
    let lines: Vec<&str> = keys.iter().map(|key| key.line.as_str()).collect();
    ssh::check_certificates(&lines, &answer.certificates)?;
    for (key, certificate) in keys.iter().zip(&answer.certificates) {
        let path = format!("/etc/ssh/ssh_host_{}_key-cert.pub", key.word);
        tree.write(&path, 0o644, format!("{}\n", certificate.trim()).as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the clock shows until it is set, and then.
    const WRONG: u64 = 4_000_000_000;
    const RIGHT: u64 = 1_800_000_000;

    #[test]
    fn what_was_tried_while_the_clock_was_wrong_is_due_when_it_is_right() {
        let (begun, due) = (Instant::now(), RIGHT - 10);
        let another = HostCertificates { certificates: Vec::new(), renew_after: RIGHT + 86_400, version: 1 };
        for (name, come, pause, renew_after) in
            [("it failed", None, AGAIN, due), ("others came", Some(&another), NEXT, another.renew_after)]
        {
            let (mut renewal, mut kept) = (Renewal::default(), due);
            assert!(renewal.is_due(kept, WRONG, begun));
            renewal.tried(&mut kept, come, begun);
            assert_eq!(kept, renew_after, "{name}");
            let almost = begun + pause.mul_f64(0.99);
            for clock in [WRONG, renew_after] {
                assert!(!renewal.is_due(kept, clock, almost), "{name}: no pause");
                assert!(
                    renewal.is_due(kept, clock, begun + pause),
                    "{name}: it is waited for what a wrong clock showed"
                );
            }
            assert!(!renewal.is_due(kept, renew_after - 1, begun + pause), "{name}: too early");
        }
        assert!(!Renewal::default().is_due(0, RIGHT, begun), "there is nothing to renew");
    }

    #[test]
    fn a_member_that_names_no_time_is_asked_again_after_a_pause() {
        let (begun, mut kept) = (Instant::now(), RIGHT);
        let mut renewal = Renewal::default();
        let come = HostCertificates { certificates: Vec::new(), renew_after: 0, version: 1 };
        renewal.tried(&mut kept, Some(&come), begun);
        assert!(!renewal.is_due(kept, RIGHT, begun) && renewal.is_due(kept, RIGHT, begun + NEXT));
    }
}
