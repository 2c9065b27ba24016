//! Another list of members, or other trust in them, while reads go on. Nothing is taken up that would leave the root without a server:
//! one member of the new list has to be good already, or serve a chunk of this image that verifies.

use super::fault::Fault;
use super::member::{Member, Standing};
use super::world::{Path, within};
use super::{Inner, Reader};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How long the members of a new list may take until one of them has served a chunk.
const TRIAL: Duration = Duration::from_secs(15);

/// A list was not taken up; all is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// There is nobody in it.
    #[error("the list of servers is empty: name at least one")]
    Empty,
    /// A server is in it twice.
    #[error("'{0}' is in the list of servers twice")]
    Twice(String),
    /// Nobody in it serves the image.
    #[error("no server of the new list serves this image, so the old one stays: {}", Reasons(.0))]
    NoneServes(Vec<(String, Fault)>),
}

struct Reasons<'a>(&'a [(String, Fault)]);

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (url, fault) in self.0 {
            write!(f, "{separator}{url}: {fault}")?;
            separator = "; ";
        }
        Ok(())
    }
}

impl Reader {
    /// From now on the image is read from these. What is known of a server that was in the list before stays known, and so do its
    /// connections, where `stayed` says so of its URL.
    ///
    /// # Errors
    /// The list is empty, names a server twice, or has nobody who serves the image; then nothing has changed.
    pub async fn set_members(
        &self,
        paths: Vec<Box<dyn Path>>,
        stayed: impl Fn(&str) -> bool,
    ) -> Result<(), ChangeError> {
        let known = self.0.fleet.members();
        let keep = |path: Box<dyn Path>| match known.iter().find(|member| member.url() == path.url()) {
            Some(member) if stayed(member.url()) => member.clone(),
            _ => self.0.newcomer(path),
        };
        self.0.take_up(paths, keep).await
    }

    /// The same with nothing of before: each server is met anew, as if it had never been known, because whom to trust has changed.
    ///
    /// # Errors
    /// As [`Self::set_members`].
    pub async fn renew_members(&self, paths: Vec<Box<dyn Path>>) -> Result<(), ChangeError> {
        self.0.take_up(paths, |path| self.0.newcomer(path)).await
    }
}

impl Inner {
    fn newcomer(&self, path: Box<dyn Path>) -> Arc<Member> {
        Arc::new(Member::new(path, self.world.clone()))
    }

    async fn take_up(
        self: &Arc<Self>,
        paths: Vec<Box<dyn Path>>,
        member: impl Fn(Box<dyn Path>) -> Arc<Member>,
    ) -> Result<(), ChangeError> {
        let mut members: Vec<Arc<Member>> = Vec::with_capacity(paths.len());
        for path in paths {
            if members.iter().any(|member| member.url() == path.url()) {
                return Err(ChangeError::Twice(path.url().to_owned()));
            }
            members.push(member(path));
        }
        if members.is_empty() {
            return Err(ChangeError::Empty);
        }
        let known = self.fleet.members();
        let is_known = |member: &Arc<Member>| known.iter().any(|known| Arc::ptr_eq(known, member));
        let serves = |member: &Arc<Member>| is_known(member) && member.standing() == Standing::Good;
        if !members.iter().any(serves)
            && let Err(error) = self.one_serves(&members).await
        {
            for newcomer in members.iter().filter(|member| !is_known(member)) {
                newcomer.retire();
            }
            return Err(error);
        }
        self.fleet.replace(members);
        self.look_at_the_others();
        self.pump();
        Ok(())
    }

    /// Tries all of them at one time, until one has served a chunk that verifies.
    async fn one_serves(self: &Arc<Self>, members: &[Arc<Member>]) -> Result<(), ChangeError> {
        let (sender, mut results) = tokio::sync::mpsc::channel(members.len().max(1));
        for member in members {
            let (inner, member, sender) = (self.clone(), member.clone(), sender.clone());
            self.world.spawn(Box::pin(async move {
                let tried = within(&*inner.world, TRIAL, inner.try_out(&member)).await;
                let result = match tried.unwrap_or(Err(Fault::Silent(TRIAL))) {
                    // Slow is not dead.
                    Ok(()) | Err(Fault::Slow(_)) => {
                        inner.fleet.passed(&member);
                        Ok(())
                    }
                    Err(fault) => {
                        inner.failed(&member, &fault);
                        Err((member.url().to_owned(), fault))
                    }
                };
                // Nobody listens any more once one of them has passed.
                let _ = sender.send(result).await;
            }));
        }
        drop(sender);
        let mut faults = Vec::new();
        while let Some(result) = results.recv().await {
            match result {
                Ok(()) => return Ok(()),
                Err(fault) => faults.push(fault),
            }
        }
        Err(ChangeError::NoneServes(faults))
    }
}
