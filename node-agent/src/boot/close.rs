//! The end of the boot stage, in order: PCR 15 closed and read back, secrets wiped, the member told, `/run/mooring` written.
//! Every way out of a boot comes through here.

use super::engine::Fault;
use super::states::{Class, EndAction, State};
use super::{Boot, call_fault, missing};
use crate::handover::BootRecord;
use moor_api::client::ClientError;
use moor_api::node::{Stage, StageClosed};
use moor_api::problem::Code;
use std::time::Duration;

/// How long a boot that failed tries to tell a member.
const LAST_WORDS: Duration = Duration::from_secs(30);

impl Boot {
    pub(super) async fn close(&mut self) -> Result<State, Fault> {
        if !self.is_closed {
            self.ensure_token().await?;
        }
        // Before the token is void.
        self.flush().await;
        self.close_pcr()?;
        self.wipe();
        self.post_closed().await?;
        self.hand_over()?;
        if let Some(members) = &mut self.members {
            members.forget();
        }
        Ok(State::Done)
    }

    /// Extends PCR 15, once: a second time would change nothing for the better.
    fn close_pcr(&mut self) -> Result<(), Fault> {
        if self.is_closed {
            return Ok(());
        }
        let identity = self.identity.as_mut().ok_or_else(|| missing("identity"))?;
        tokio::task::block_in_place(|| identity.close_boot_stage())
            .map_err(|error| Fault::again(format!("the boot stage cannot be closed: {error}")))?;
        self.is_closed = true;
        Ok(())
    }

    /// What the run stage must not have. All of these wipe themselves.
    fn wipe(&mut self) {
        self.key = None;
        self.host_keys.clear();
        if let Some(document) = &mut self.document {
            document.secrets = None;
        }
    }

    /// Tells a member, which refuses this boot's tokens from now on. All failures are of the class `Again`: nothing leads back from here.
    async fn post_closed(&mut self) -> Result<(), Fault> {
        let mut told = self.say_closed().await;
        if told.as_ref().is_err_and(|fault| fault.class == Class::Restart) {
            // A token that is void (expired, the collective's keys rotated, none yet) says nothing about the stage: a session by the
            // soft key would still open it. PCR 15 is closed, so this one is of the run stage, which ends the boot stage as well.
            told = match self.renew_session(Stage::Run).await {
                Ok(()) => self.say_closed().await,
                Err(fault) => Err(fault),
            };
        }
        told.map_err(|fault| Fault::again(fault.reason))
    }

    async fn say_closed(&mut self) -> Result<(), Fault> {
        let report = StageClosed { boot: self.id };
        let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
        match members.call(async |member| member.stage_closed(&report).await).await {
            Ok(()) => Ok(()),
            // A first try was heard although its answer was lost.
            Err(ClientError::Problem(problem)) if problem.code == Code::StageClosed => Ok(()),
            Err(error) => Err(call_fault(&error)),
        }
    }

    fn hand_over(&mut self) -> Result<(), Fault> {
        let (Some(bundle), Some(known), Some(document), Some(members), Some(way)) =
            (&self.bundle, &self.known, &self.document, &self.members, &self.way)
        else {
            return Err(missing("boot record"));
        };
        self.options.run.write_site(bundle).map_err(Fault::again)?;
        let record = BootRecord {
            collective: bundle.collective,
            node: known.id,
            name: known.name.clone(),
            boot: self.id,
            members: members.urls().to_vec(),
            generation: document.profile.generation,
            sequence: self.reporter.sequence(),
            renew_after: self.certificates.as_ref().map_or(0, |certificates| certificates.renew_after),
            // Two members may have answered, one of which had not heard of the newest yet.
            ssh_version: self
                .certificates
                .as_ref()
                .map_or(0, |certificates| certificates.version.min(self.trust.version)),
            interface: way.link.name.clone(),
            is_up: false,
            is_trace_told: false,
        };
        self.options.run.write_boot(&record).map_err(Fault::again)?;
        Ok(())
    }

    /// The end of a boot that failed: the reason is told, and the stage closed, before anybody gets a shell. A stage that cannot be
    /// closed leaves a reboot only.
    pub(super) async fn give_up(mut self, end: EndAction, reason: &str) -> (EndAction, String) {
        self.reporter.note("failed", reason);
        let _ = tokio::time::timeout(LAST_WORDS, self.flush()).await;
        self.wipe();
        let mut reason = reason.to_owned();
        let end = match self.close_pcr() {
            Ok(()) => end,
            Err(fault) => {
                reason = format!("{reason}; and {}", fault.reason);
                EndAction::Reboot
            }
        };
        let told = tokio::time::timeout(LAST_WORDS, self.post_closed()).await;
        let is_soft = self.identity.as_ref().is_some_and(|identity| !identity.is_tpm());
        if is_soft && !matches!(told, Ok(Ok(()))) {
            // Nothing else keeps a shell from opening a boot session with it.
            let _ = std::fs::remove_file(self.options.run.soft_key());
        }
        if end == EndAction::Hold {
            self.drop_whole_image().await;
        }
        (end, reason)
    }
}
