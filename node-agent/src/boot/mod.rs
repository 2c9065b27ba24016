//! The boot stage: from the initramfs to a root that may be switched to (DESIGN.md §6).
//!
//! [`states`] is the table of states, [`engine`] runs it, and [`Boot`] is the machine it runs on: [`find`] looks for the way to a
//! member, [`identify`] says who the node is, [`settings`] fetches and renders what it is made from, [`image`] brings its root,
//! all of it at once with [`whole`], [`close`] ends the stage. Whatever happens, the stage is closed before anything else gets control.

mod close;
mod engine;
mod find;
mod identify;
mod image;
pub mod kernel_arguments;
pub mod reporter;
mod settings;
pub mod states;
mod whole;

use crate::handover::RunDir;
use crate::identity::Identity;
use crate::members::Members;
use crate::network::{Candidate, Netlink, Search};
use crate::ssh::HostKey;
use engine::{Fault, Machine};
use kernel_arguments::KernelArguments;
use moor_api::client::ClientError;
use moor_api::client::session::SessionKey;
use moor_api::deploy::{DeployDocument, OnFailure, PhaseName};
use moor_api::ids::BootId;
use moor_api::node::{Base64, HostCertificates, ImageOffer, KnownNode, SshTrust};
use moor_api::problem::{Code, Problem};
use moor_api::trust::SiteBundle;
use moor_image::Dek;
use reporter::Reporter;
use states::{Decision, EndAction, State};
use std::path::PathBuf;
use std::time::Duration;
use whole::Schedule;

/// Where things are. Tests use other places.
#[derive(Debug, Clone)]
pub struct Options {
    /// The root to be made.
    pub root: PathBuf,
    /// The site bundle.
    pub site: PathBuf,
    /// `/run/mooring`.
    pub run: RunDir,
    /// The kernel command line.
    pub command_line: PathBuf,
    /// The tether program.
    pub tether: PathBuf,
}

/// One boot.
pub struct Boot {
    options: Options,
    id: BootId,
    reporter: Reporter,
    state: Option<State>,
    identity: Option<Identity>,
    bundle: Option<SiteBundle>,
    arguments: KernelArguments,
    session: Option<SessionKey>,
    netlink: Option<Netlink>,
    search: Option<Search>,
    candidates: Vec<Candidate>,
    way: Option<Candidate>,
    members: Option<Members>,
    known: Option<KnownNode>,
    nonce: Option<Base64>,
    /// Unix seconds after which the token is refused.
    expires: u64,
    document: Option<DeployDocument>,
    host_keys: Vec<HostKey>,
    certificates: Option<HostCertificates>,
    trust: SshTrust,
    offer: Option<ImageOffer>,
    key: Option<Dek>,
    /// Of the reports about a whole image, since the first try to fetch one.
    schedule: Option<Schedule>,
    clock_was_reset: bool,
    /// It has gone to the member that it is to talk to, or tried.
    has_moved: bool,
    is_closed: bool,
}

/// Boots; returns what the initramfs has to do, and the reason when it is not [`EndAction::Ready`]. The boot stage is closed then, or
/// the answer is [`EndAction::Reboot`].
pub async fn run(options: Options) -> (EndAction, String) {
    let mut boot = Boot::new(options);
    let (end, reason) = engine::run(&mut boot).await;
    if end == EndAction::Ready {
        return (end, reason);
    }
    let end = as_the_profile_says(end, boot.document.as_ref().map(|document| document.profile.on_failure));
    boot.give_up(end, &reason).await
}

/// How a boot ends that has failed, by the profile if it has come that far.
fn as_the_profile_says(end: EndAction, on_failure: Option<OnFailure>) -> EndAction {
    match (end, on_failure) {
        (EndAction::Hold, Some(OnFailure::Reboot)) => EndAction::Reboot,
        _ => end,
    }
}

impl Boot {
    fn new(options: Options) -> Self {
        let id = BootId::random();
        Self {
            options,
            id,
            reporter: Reporter::new(id, 0),
            state: None,
            identity: None,
            bundle: None,
            arguments: KernelArguments::default(),
            session: None,
            netlink: None,
            search: None,
            candidates: Vec::new(),
            way: None,
            members: None,
            known: None,
            nonce: None,
            expires: 0,
            document: None,
            host_keys: Vec::new(),
            certificates: None,
            trust: SshTrust::default(),
            offer: None,
            key: None,
            schedule: None,
            clock_was_reset: false,
            has_moved: false,
            is_closed: false,
        }
    }

    async fn flush(&mut self) {
        if let Some(members) = &mut self.members {
            self.reporter.flush(members).await;
        }
    }
}

impl Machine for Boot {
    async fn step(&mut self, state: State) -> Result<State, Fault> {
        match state {
            State::Start => self.start().await,
            State::Closed => Err(Fault::fatal(
                "PCR 15 is closed: this kernel was started by another (kexec), or a boot was tried before; switch the machine off and \
                 on again (a cold reboot), then it boots",
            )),
            State::Links => self.links().await,
            State::Address => self.address().await,
            State::Member => self.member().await,
            State::Hello | State::Wait => self.hello().await,
            State::Enroll => self.enroll().await,
            State::Session => self.session().await,
            State::Config => self.config().await,
            State::Network => self.take_addresses().await,
            State::HostKeys => self.make_host_keys().await,
            State::Pre => self.phase(PhaseName::Pre, None, State::Image).await,
            State::Image => self.image().await,
            State::Tether => self.tether().await,
            State::Root => self.root().await,
            State::Render => self.render(),
            State::Post => {
                let root = self.options.root.clone();
                self.phase(PhaseName::Post, Some(&root), State::Close).await
            }
            State::Close => self.close().await,
            State::Done => Ok(State::Done),
        }
    }

    async fn entered(&mut self, state: State) {
        if self.state.replace(state) != Some(state) {
            let rule = state.rule();
            if state == State::Done {
                // No token is left: the console alone.
                crate::console::say(rule.word, rule.sentence);
                return;
            }
            self.reporter.note(rule.word, rule.sentence);
            self.flush().await;
        }
    }

    async fn failed(&mut self, state: State, fault: &Fault, decision: Decision) {
        let word = state.rule().word;
        match decision {
            Decision::Go(next, pause) => {
                // The seconds change from try to try: they would make every line a new one.
                self.reporter.note(if next == State::Wait { next.rule().word } else { word }, &fault.reason);
                tracing::debug!(word, next = next.rule().word, ?pause, "failed");
            }
            // `give_up` says it.
            Decision::End(_) => (),
        }
        self.flush().await;
    }

    async fn pause(&mut self, pause: Duration) {
        tokio::time::sleep(pause).await;
    }

    fn jitter(&mut self) -> f64 {
        jitter()
    }
}

/// A random number from 0 to 1. Without randomness all nodes would come at once, and that is all.
#[must_use]
pub fn jitter() -> f64 {
    let mut bytes = [0; 4];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

/// What a failed call means for the boot.
fn call_fault(error: &ClientError) -> Fault {
    match error {
        ClientError::Problem(problem) => problem_fault(problem),
        ClientError::Config(_) => Fault::fatal(error),
        ClientError::Connect { .. } | ClientError::Broken { .. } | ClientError::Answer { .. } => Fault::again(error),
    }
}

/// What a refusal means for the boot.
fn problem_fault(problem: &Problem) -> Fault {
    match problem.code {
        Code::TokenInvalid => Fault::restart(problem),
        // This boot id is used up; only a new boot has another.
        Code::StageClosed | Code::StageForbidden => Fault::fatal(problem),
        Code::RateLimited | Code::Internal | Code::Other => Fault::again(problem),
        // Somebody may arm it, publish a profile, approve the machine: the same boot then goes on.
        _ => Fault::refused(problem),
    }
}

/// A value that an earlier state has to have left.
fn missing(what: &str) -> Fault {
    Fault::fatal(format!("the agent lost its {what}: please report this"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use states::Class;

    #[test]
    fn refusals_wait_faults_retry_and_tokens_start_anew() {
        let cases = [
            (Code::NotArmed, Class::Refused),
            (Code::UnknownNode, Class::Refused),
            (Code::IdentityMismatch, Class::Refused),
            (Code::NoProfile, Class::Refused),
            (Code::ProofInvalid, Class::Refused),
            (Code::TokenInvalid, Class::Restart),
            (Code::StageClosed, Class::Fatal),
            (Code::RateLimited, Class::Again),
            (Code::Internal, Class::Again),
        ];
        for (code, class) in cases {
            assert_eq!(problem_fault(&Problem::new(code, "x")).class, class, "{code:?}");
        }
    }

    #[test]
    fn jitter_stays_between_0_and_1() {
        for _ in 0..1000 {
            assert!((0.0..=1.0).contains(&jitter()));
        }
    }

    #[test]
    fn a_profile_makes_reboots_of_holds_and_of_nothing_else() {
        for (end, on_failure, expected) in [
            (EndAction::Hold, None, EndAction::Hold),
            (EndAction::Hold, Some(OnFailure::Hold), EndAction::Hold),
            (EndAction::Hold, Some(OnFailure::Reboot), EndAction::Reboot),
            (EndAction::Reboot, Some(OnFailure::Hold), EndAction::Reboot),
            (EndAction::Ready, Some(OnFailure::Reboot), EndAction::Ready),
        ] {
            assert_eq!(as_the_profile_says(end, on_failure), expected, "{end:?} {on_failure:?}");
        }
    }
}
