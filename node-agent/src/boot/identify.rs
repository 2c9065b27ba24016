//! Who the node is: hello, enrolment, session.

use super::engine::Fault;
use super::states::State;
use super::{Boot, call_fault, missing, problem_fault};
use crate::identity::{self, IdentityError};
use crate::members::Members;
use crate::{clock, machine};
use moor_api::client::ClientError;
use moor_api::node::{Hello, HelloReply, NextStep, Stage};

/// A token is renewed so long before it expires, in seconds: scripts may take that long.
const TOKEN_MARGIN: u64 = 20 * 60;

impl Boot {
    /// Also the state `wait`: there it is the same question again.
    pub(super) async fn hello(&mut self) -> Result<State, Fault> {
        self.refresh_address().await;
        let identity = self.identity.as_ref().ok_or_else(|| missing("identity"))?;
        let mut capabilities = identity.capabilities();
        capabilities.push("tethered".to_owned());
        let hello = machine::describe(self.id, capabilities);
        let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
        let mut reply = say_hello(members, &hello).await?;
        // Nodes begin with whom their boot files name, and spread over all members from there: once in a boot, because that one may not be
        // reached from here. What follows belongs to the member that said hello last.
        if members.prefer(&reply.members) && !std::mem::replace(&mut self.has_moved, true) {
            members.disconnect();
            reply = say_hello(members, &hello).await?;
            members.prefer(&reply.members);
        }
        let bundle = self.bundle.as_ref().ok_or_else(|| missing("site bundle"))?;
        if reply.collective != bundle.collective {
            return Err(Fault::refused(format!("the member belongs to another collective, {}", reply.collective)));
        }
        // The member proved its role; its time is better than a hardware clock's.
        if let Some(time) = clock::correction(clock::now(), reply.time, bundle.built) {
            self.set_clock(time, "the member's time");
        }
        if let Some(refusal) = &reply.refusal {
            return Err(match problem_fault(refusal) {
                fault @ Fault { class: super::states::Class::Again, .. } => fault,
                // Whatever it is, a person may change it.
                fault => Fault::refused(fault.reason),
            });
        }
        let known = reply.node.ok_or_else(|| Fault::refused("the member does not know this machine"))?;
        let next = match known.next {
            NextStep::Enroll => State::Enroll,
            NextStep::SessionTpm | NextStep::SessionSoft => State::Session,
        };
        self.reporter.note("hello", &format!("this machine is node '{}'", known.name));
        self.nonce = Some(known.nonce.clone());
        self.known = Some(known);
        Ok(next)
    }

    pub(super) async fn enroll(&mut self) -> Result<State, Fault> {
        let Self {
            members: Some(members), identity: Some(identity), session: Some(session), known: Some(known), ..
        } = self
        else {
            return Err(missing("session"));
        };
        let collective = self.bundle.as_ref().map(|bundle| bundle.collective).ok_or_else(|| missing("site bundle"))?;
        let result = match members.connection().await {
            Ok(connection) => identity::enroll(connection, identity, collective, known, self.id, session).await,
            Err(error) => Err(IdentityError::from(error)),
        };
        let enrolled = result.map_err(|error| {
            if error.is_transient() {
                members.turn();
            }
            identity_fault(&error)
        })?;
        self.nonce = Some(enrolled.nonce);
        Ok(State::Session)
    }

    pub(super) async fn session(&mut self) -> Result<State, Fault> {
        let Self {
            members: Some(members),
            identity: Some(identity),
            session: Some(session),
            known: Some(known),
            nonce: Some(nonce),
            ..
        } = self
        else {
            return Err(missing("session"));
        };
        let collective = self.bundle.as_ref().map(|bundle| bundle.collective).ok_or_else(|| missing("site bundle"))?;
        let result = match members.connection().await {
            Ok(connection) => {
                let stage = Stage::Boot;
                identity::session(connection, identity, collective, known, nonce, self.id, stage, session).await
            }
            Err(error) => Err(IdentityError::from(error)),
        };
        let reply = result.map_err(|error| {
            if error.is_transient() {
                members.turn();
            }
            identity_fault(&error)
        })?;
        if reply.stage != Stage::Boot {
            return Err(Fault::refused("the member gave a token for another stage"));
        }
        self.expires = reply.expires;
        members.set_token(reply.token).map_err(|error| call_fault(&error))?;
        self.flush().await;
        Ok(State::Config)
    }
}

async fn say_hello(members: &mut Members, hello: &Hello) -> Result<HelloReply, Fault> {
    let result = match members.connection().await {
        Ok(connection) => connection.hello(hello).await,
        Err(error) => Err(error),
    };
    result.map_err(|error| {
        if error.is_transient() {
            members.turn();
        }
        call_fault(&error)
    })
}

impl Boot {
    /// A token that is good for a while: scripts may have taken long. Only while PCR 15 is open; afterwards no member gives one.
    pub(super) async fn ensure_token(&mut self) -> Result<(), Fault> {
        if clock::now().saturating_add(TOKEN_MARGIN) < self.expires {
            return Ok(());
        }
        let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
        members.disconnect();
        match self.hello().await? {
            State::Session => self.session().await.map(drop),
            _ => Err(Fault::fatal("the token expired, and the member wants another enrolment")),
        }
    }
}

/// What a failed enrolment or session means for the boot.
fn identity_fault(error: &IdentityError) -> Fault {
    match error {
        // The identity that is bound may be changed by a person while the machine waits.
        IdentityError::NoTpm(_) | IdentityError::NoSoftKey(_) => Fault::refused(error),
        IdentityError::Connection(ClientError::Config(_)) => Fault::fatal(error),
        IdentityError::Refused(problem) => problem_fault(problem),
        // Connections break; chips answer "retry" and fail once. Another try begins with a new nonce.
        _ => Fault::again(error),
    }
}
