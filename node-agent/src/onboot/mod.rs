//! The run stage: a session of its own, the phase `onboot`, the report that the system is up, and then, for as long as the node is up,
//! heartbeats, and what is to be done after them: the renewal of host certificates, new trust. Members may come and go: it asks on for ever.

mod renew;
mod system;
mod tether;

use crate::boot::jitter;
use crate::boot::reporter::Reporter;
use crate::handover::{BootRecord, HandoverError, RunDir, Trace};
use crate::identity::{self, Identity, IdentityError};
use crate::members::Members;
use crate::scripts::{Phase, ScriptError};
use crate::{clock, machine};
use moor_api::client::ClientError;
use moor_api::client::node::NodeConnection;
use moor_api::client::session::SessionKey;
use moor_api::deploy::PhaseName;
use moor_api::node::{Heartbeat, MAX_TRACE, Stage, TraceReport};
use moor_api::problem::{Code, Problem};
use moor_api::trust::SiteBundle;
use renew::Renewal;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::{Duration, Instant};
use system::Outcome;
use tokio::signal::unix::{SignalKind, signal};

/// The first and the longest pause after a failure.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_mins(1));

/// A new session is made so long before the token expires.
const RENEW_TOKEN: u64 = 120;

/// How long the system may take to be up.
const UP_LIMIT: Duration = Duration::from_mins(15);

/// A trust bundle, or SSH authorities, that were taken up are acknowledged after this time: somebody may wait for it.
const ACKNOWLEDGE: Duration = Duration::from_secs(2);

/// Heartbeats come no more and no less often than this, whatever a member says.
const HEARTBEAT: (u32, u32) = (5, 3600);

/// The run stage cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OnbootError {
    /// The boot stage left nothing.
    #[error("{0}: the node was not booted by 'moor-agent boot'")]
    Handover(#[from] HandoverError),
    /// The identity does not open.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The session key or the trust is not usable.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The runtime fails.
    #[error("cannot wait for signals: {0}")]
    Signal(#[from] std::io::Error),
}

/// Serves until it is told to end (SIGTERM).
///
/// # Errors
/// It cannot begin.
pub async fn run(run: RunDir) -> Result<(), OnbootError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut duty = Duty::new(run.clone())?;
    tether::tell_that_it_goes_on(&run);
    // In a task of its own: the duty may wait for something else just then, and there is little time.
    let ended = tokio::spawn(async move {
        terminate.recv().await;
        tether::tell_of_shutdown(&run);
    });
    tokio::select! {
        _ = ended => Ok(()),
        never = duty.serve() => match never {},
    }
}

struct Duty {
    run: RunDir,
    record: BootRecord,
    bundle: SiteBundle,
    identity: Identity,
    session: SessionKey,
    members: Members,
    reporter: Reporter,
    /// Unix seconds.
    expires: u64,
    /// Why the root did not take up what changed among the members, as it was last said.
    complaint: Option<String>,
    renewal: Renewal,
    /// Before then the SSH authorities are not tried to be taken up again.
    ssh_again: Option<Instant>,
    /// Servers of the root that serve wrong bytes, as far as the member was told.
    excluded: BTreeSet<String>,
}

impl Duty {
    fn new(run: RunDir) -> Result<Self, OnbootError> {
        let (record, bundle) = (run.boot()?, run.site()?);
        let soft_key = run.soft_key();
        let identity = tokio::task::block_in_place(|| Identity::open(&soft_key, Duration::from_secs(30)))?;
        let session = SessionKey::generate()?;
        let mut members = Members::new(&bundle, &session, record.members.clone())?;
        members.set_boot(record.boot);
        let reporter = Reporter::new(record.boot, record.sequence);
        Ok(Self {
            run,
            record,
            bundle,
            identity,
            session,
            members,
            reporter,
            expires: 0,
            complaint: None,
            renewal: Renewal::default(),
            ssh_again: None,
            excluded: BTreeSet::new(),
        })
    }

    async fn serve(&mut self) -> Infallible {
        if !self.record.is_up {
            self.note("onboot", "the system has started").await;
            match self.come_up().await {
                Ok(()) => {
                    self.record.is_up = true;
                    self.remember();
                }
                Err(reason) => self.note("failed", &reason).await,
            }
        }
        self.accompany().await
    }

    /// The phase `onboot`, then the report of a system that is up.
    async fn come_up(&mut self) -> Result<(), String> {
        let document =
            self.ask(async |member| member.config().await).await.map_err(|problem| format!("config: {problem}"))?;
        let mut done = 0;
        loop {
            let phase = Phase { name: PhaseName::Onboot, document: &document, root: None };
            match phase.run(&mut self.members, &mut self.reporter, &mut done).await {
                Ok(()) => break,
                // It did not begin to run: a member away, a token that expired while the script before it ran.
                Err(ScriptError::Fetch { cause, .. }) if retries(&cause) => self.after_failure(&cause, 1).await,
                Err(error) => return Err(error.to_string()),
            }
        }
        if done > 0 {
            self.note("onboot", &format!("{done} scripts done")).await;
        }
        match system::wait_up(UP_LIMIT).await {
            Outcome::Running => self.booted("the system is running").await,
            Outcome::Degraded(units) => {
                self.reporter.log(None, &system::journal(&units).await);
                self.booted(&format!("the system is up, but degraded: failed units: {}", units.join(", "))).await;
            }
            Outcome::NotUp(reason) => return Err(reason),
        }
        Ok(())
    }

    async fn booted(&mut self, sentence: &str) {
        crate::console::say("booted", sentence);
        self.reporter.report("booted", sentence, system::figures(&self.run));
        self.deliver().await;
    }

    async fn note(&mut self, word: &str, sentence: &str) {
        self.reporter.note(word, sentence);
        self.deliver().await;
    }

    /// Sends what is to be reported, for as long as it takes.
    async fn deliver(&mut self) {
        self.remember();
        let mut attempt = 0;
        loop {
            self.ensure_session().await;
            self.reporter.flush(&mut self.members).await;
            if self.reporter.is_empty() {
                return;
            }
            attempt += 1;
            if attempt > 1 {
                // A token that no member takes is as good as none.
                self.members.forget();
            }
            self.rest(attempt).await;
        }
    }

    /// A restart of the agent counts on from here.
    fn remember(&mut self) {
        self.record.sequence = self.reporter.sequence();
        self.record.members = self.members.urls().to_vec();
        if let Err(error) = self.run.write_boot(&self.record) {
            crate::console::say("onboot", &error.to_string());
        }
    }

    /// Heartbeats and certificates.
    async fn accompany(&mut self) -> Infallible {
        let mut beat = Instant::now();
        loop {
            if Instant::now() >= beat {
                beat = Instant::now() + self.heartbeat().await;
            }
            self.tell_excluded().await;
            if let Some(trace) = self.run.untold_trace(&self.record) {
                self.tell_trace(trace).await;
                self.record.is_trace_told = true;
                self.remember();
            }
            // Taking up SSH authorities, with a heartbeat, has them renewed as well.
            if self.renewal.is_due(self.record.renew_after, clock::now(), Instant::now()) {
                self.renew().await;
            }
            // The clock may be set meanwhile, so the renewal is looked at with each heartbeat, and at least once a minute.
            let wait = beat.saturating_duration_since(Instant::now()).min(Duration::from_mins(1));
            tokio::time::sleep(wait).await;
        }
    }

    /// Later boots fetch ahead what this one read. A member that does not take it changes nothing for this node.
    async fn tell_trace(&mut self, trace: Trace) {
        let chunks = trace.reads.into_iter().map(|(chunk, _)| chunk).take(MAX_TRACE).collect();
        let report = TraceReport { boot: self.record.boot, digest: trace.digest, chunks };
        if let Err(problem) = self.ask(async |member| member.trace(&report).await).await {
            crate::console::say("onboot", &format!("the trace of this boot was not taken: {problem}"));
        }
    }

    async fn heartbeat(&mut self) -> Duration {
        let (trust_version, ssh_version) = (self.bundle.version, self.record.ssh_version);
        let beat = Heartbeat { boot: self.record.boot, trust_version, ssh_version };
        match self.ask(async |member| member.heartbeat(&beat).await).await {
            Ok(reply) => {
                if reply.generation.is_some_and(|generation| generation != self.record.generation) {
                    crate::console::say("onboot", "another generation is to be run: the next boot takes it");
                }
                self.follow(&reply).await;
                let has_new_ssh = self.follow_ssh(reply.ssh_version).await;
                if self.bundle.version != trust_version || has_new_ssh {
                    return ACKNOWLEDGE.mul_f64(0.5 + jitter());
                }
                let seconds = reply.interval.clamp(HEARTBEAT.0, HEARTBEAT.1);
                // A thousand nodes that booted together come apart.
                Duration::from_secs(u64::from(seconds)).mul_f64(0.9 + jitter() / 5.0)
            }
            Err(problem) => {
                crate::console::say("onboot", &format!("heartbeat: {problem}"));
                Duration::from_mins(1)
            }
        }
    }

    /// A call that is made until a member answers; a refusal is an answer.
    async fn ask<T>(
        &mut self,
        call: impl AsyncFn(&mut NodeConnection) -> Result<T, ClientError>,
    ) -> Result<T, Problem> {
        let mut attempt = 0;
        loop {
            self.ensure_session().await;
            match self.members.call(&call).await {
                Ok(answer) => return Ok(answer),
                Err(error) if retries(&error) => {
                    attempt += 1;
                    self.after_failure(&error, attempt).await;
                }
                Err(ClientError::Problem(problem)) => return Err(problem),
                Err(error) => return Err(Problem::new(Code::Other, error.to_string())),
            }
        }
    }

    async fn after_failure(&mut self, error: &ClientError, attempt: u32) {
        if is_token_void(error) {
            self.members.forget();
            // A member that gives tokens which it does not take would be asked without pause.
            if attempt == 1 {
                return;
            }
        }
        crate::console::say("onboot", &error.to_string());
        self.rest(attempt).await;
    }

    async fn rest(&mut self, attempt: u32) {
        let pause = PAUSE.0.saturating_mul(1 << attempt.saturating_sub(1).min(8)).min(PAUSE.1);
        tokio::time::sleep(pause.mul_f64(0.5 + jitter() / 2.0)).await;
    }

    /// A token that is good for a while, however long it takes to get one.
    async fn ensure_session(&mut self) {
        let mut attempt = 0;
        while !self.members.has_token() || clock::now().saturating_add(RENEW_TOKEN) >= self.expires {
            match self.open_session().await {
                Ok(()) => return,
                Err(reason) => {
                    self.members.turn();
                    attempt += 1;
                    crate::console::say("onboot", &format!("no session: {reason}"));
                    self.rest(attempt).await;
                }
            }
        }
    }

    async fn open_session(&mut self) -> Result<(), String> {
        self.members.forget();
        let hello = machine::describe(self.record.boot, self.identity.capabilities());
        let connection = self.members.connection().await.map_err(|error| error.to_string())?;
        let reply = connection.hello(&hello).await.map_err(|error| error.to_string())?;
        if let Some(refusal) = reply.refusal {
            return Err(refusal.to_string());
        }
        let known = reply.node.ok_or("the member does not know this machine")?;
        if known.id != self.record.node || reply.collective != self.record.collective {
            return Err(format!("the member takes this machine for node '{}' ({})", known.name, known.id));
        }
        let (collective, stage) = (reply.collective, Stage::Run);
        let (identity, boot) = (&mut self.identity, self.record.boot);
        let session =
            identity::session(connection, identity, collective, &known, &known.nonce, boot, stage, &self.session);
        let session = session.await.map_err(|error| error.to_string())?;
        self.expires = session.expires;
        self.members.set_token(session.token).map_err(|error| error.to_string())?;
        self.members.prefer(&reply.members);
        Ok(())
    }
}

/// Whether to ask again: after a fault of a member, of the way to it, or with a token that is void.
fn retries(error: &ClientError) -> bool {
    error.is_transient() || is_token_void(error)
}

fn is_token_void(error: &ClientError) -> bool {
    error.problem().is_some_and(|problem| problem.code == Code::TokenInvalid)
}
