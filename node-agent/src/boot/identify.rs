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
        let is_waiting = self.state == Some(State::Wait);
        let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
        if is_waiting {
            // The one that refused may lag behind the others.
            members.move_on();
        }
        let mut reply = say_hello(members, &hello).await?;
        // Nodes begin with whom their boot files name, and spread over all members from there: once in a boot, because that one may not be
        // reached from here, or have joined so lately that it knows nobody: then the first stays. What follows belongs to the member whose
        // reply is kept.
        if is_waiting && !is_known(&reply) {
            // Their order would lead back to those that were asked before, and never to the last.
            members.add(&reply.members);
        } else if members.prefer(&reply.members)
            && !std::mem::replace(&mut self.has_moved, true)
            && let Some(first) = members.leave()
        {
            match say_hello(members, &hello).await {
                Ok(second) if is_known(&second) => {
                    members.prefer(&second.members);
                    reply = second;
                }
                Ok(_) | Err(_) => members.go_back(first),
            }
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
        self.open_session(Stage::Boot).await?;
        self.flush().await;
        Ok(State::Config)
    }

    async fn open_session(&mut self, stage: Stage) -> Result<(), Fault> {
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
        if reply.stage != stage {
            return Err(Fault::refused("the member gave a token for another stage"));
        }
        self.expires = reply.expires;
        members.set_token(reply.token).map_err(|error| call_fault(&error))
    }
}

/// Whether the member knows the machine and lets it go on.
fn is_known(reply: &HelloReply) -> bool {
    reply.refusal.is_none() && reply.node.is_some()
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
        self.renew_session(Stage::Boot).await
    }

    /// A new session in place of one whose token is void or soon will be. Once PCR 15 is closed, no member gives one of the boot stage.
    pub(super) async fn renew_session(&mut self, stage: Stage) -> Result<(), Fault> {
        let members = self.members.as_mut().ok_or_else(|| missing("members"))?;
        members.disconnect();
        match self.hello().await? {
            State::Session => self.open_session(stage).await,
            _ => Err(Fault::fatal("the token is void, and the member wants another enrolment")),
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

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::ids::{CollectiveId, MemberId, NodeId};
    use moor_api::node::{Base64, KnownNode, PcrRequest};
    use moor_api::problem::{Code, Problem};

    #[test]
    fn only_a_member_that_knows_the_machine_and_refuses_nothing_is_moved_to() {
        let node = KnownNode {
            id: NodeId::random(),
            name: "n1".parse().unwrap(),
            next: NextStep::SessionSoft,
            nonce: Base64(vec![1; 32]),
            quote: PcrRequest { bank: None, pcrs: vec![15] },
        };
        let mut reply = HelloReply {
            collective: CollectiveId::from_bytes([1; 16]),
            member: MemberId::from_bytes([2; 16]),
            node: Some(node),
            refusal: None,
            members: Vec::new(),
            time: 0,
        };
        assert!(is_known(&reply));
        reply.refusal = Some(Problem::new(Code::NotArmed, "arm it"));
        assert!(!is_known(&reply));
        (reply.node, reply.refusal) = (None, None);
        assert!(!is_known(&reply), "a member whose store is empty yet");
    }
}
