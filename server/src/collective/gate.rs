//! Who may use `/member/v1`. A certificate of the member authority is the least of it: every member holds that authority's key, also one
//! that was removed, and can issue itself what it likes. Who calls has to be in the records, with the key that they say; or, where the records
//! lag behind, be vouched for by somebody who is.

use super::voucher::{Acquaintance, Known, introduces};
use crate::http::{Connection, Failure, Peer};
use crate::state::Member;
use crate::store::records::MemberRecord;
use axum::Extension;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use moor_api::client::tls::Named;
use moor_api::ids::MemberId;
use moor_api::problem::{Code, Problem};
use moor_api::trust::Incarnation;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

/// To a member that is none any more.
pub(crate) const REMOVED: &str = "this member was removed from the collective: `moor collective join --set-aside` with a new invitation lets it in anew";
/// To one that stands in no record here, and that nobody who does has vouched for.
const UNKNOWN: &str =
    "the member that was asked has not heard of this one: if it is a member, that one is behind; try again";
/// To one that calls itself as somebody else does.
const ANOTHER: &str = "this is another key than the member of this id has: a member whose key is lost is replaced by `moor collective replace`";

/// What the one who calls is in the collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Caller {
    Member,
    /// Its removal is not through: its vote may be needed for that.
    Leaving,
    /// Not heard of yet, but vouched for: this member may be behind, and the caller may lead those who know more.
    Introduced,
}

/// What is known here of a member. As long as this member has no record of itself, its records are older than itself: it knows those that
/// were members when it joined, and those that were none any more, whoever vouches for them.
fn known(member: &Member, records: &BTreeMap<u64, MemberRecord>, id: MemberId) -> Known {
    let of = |id| records.values().find(|record| record.id == id);
    if of(member.identity.id).is_none() {
        if member.identity.removed.contains(&id) || of(id).is_some_and(|record| record.removed) {
            return Known::Removed;
        }
        let met = member.identity.met.iter().find(|met| met.id == id);
        return met.map_or(Known::Not, |met| Known::Present(met.key.clone()));
    }
    match of(id) {
        Some(record) if !record.removed => Known::Present(record.key.clone()),
        Some(_) => Known::Removed,
        None => Known::Not,
    }
}

fn refused(detail: &str) -> Failure {
    Problem::new(Code::Forbidden, detail).into()
}

/// To one that is no member any more: it ends its service to nodes by this.
fn removed(detail: &str) -> Failure {
    Problem::new(Code::Removed, detail).into()
}

/// Who is being removed may answer, and lead, for a moment still. It makes no keys and no authority for the others: it would know them.
///
/// # Errors
/// This member is none any more, as far as it knows.
pub(super) fn check_present(member: &Member) -> Result<(), Problem> {
    let records = member.view()?.members()?;
    let is_present = records.get(&member.identity.number).is_some_and(|own| !own.removed);
    if is_present { Ok(()) } else { Err(Problem::new(Code::Removed, REMOVED)) }
}

/// The member that the certificate names, with the key that the handshake has proven; and the incarnation of the collective that it is of.
fn named(connection: &Connection) -> Result<(Acquaintance, Incarnation), Failure> {
    match &connection.peer {
        Peer::Tls { member: Some(Ok(Named { member, incarnation })), client_key: Some(key), .. } => {
            Ok((Acquaintance { id: *member, key: key.clone().into() }, *incarnation))
        }
        Peer::Tls { member: Some(Err(why)), .. } => {
            Err(refused(&format!("members only, and the certificate that was shown is not believed: {why}")))
        }
        _ => Err(refused("members only: no member's certificate was shown")),
    }
}

/// The member that the certificate names, with the key that the handshake has proven.
pub(super) fn shown(connection: &Connection) -> Result<Acquaintance, Failure> {
    named(connection).map(|(member, _)| member)
}

/// Refuses a member of another incarnation: of the same authorities, and of another collective since.
fn check_incarnation(own: Incarnation, shown: Incarnation) -> Result<(), Failure> {
    match shown.cmp(&own) {
        Ordering::Equal => Ok(()),
        Ordering::Less => Err(removed(&format!(
            "this member is of incarnation {shown} of the collective, which was recovered or restored since and is at {own}: stop it; `moor \
             collective join --set-aside` with a new invitation lets it in anew"
        ))),
        Ordering::Greater => Err(refused(&format!(
            "the member that was asked is of incarnation {own} of the collective, and this one of {shown}: that one is of before, and has to be \
             stopped"
        ))),
    }
}

fn caller(member: &Member, connection: &Connection) -> Result<Caller, Failure> {
    let (caller, incarnation) = named(connection)?;
    check_incarnation(member.site.incarnation, incarnation)?;
    let records = member.view().and_then(|view| view.members())?;
    match known(member, &records, caller.id) {
        // No key is empty, so that a record without one is nobody's.
        Known::Present(key) if key == caller.key => Ok(Caller::Member),
        Known::Present(_) => Err(refused(ANOTHER)),
        Known::Removed => {
            let key = records.values().find(|record| record.id == caller.id).map(|record| &record.key);
            let is_named = || member.store.standing().members.values().any(|(peer, _)| peer.id == caller.id);
            match key {
                Some(key) if *key != caller.key => Err(refused(ANOTHER)),
                Some(_) if is_named() => Ok(Caller::Leaving),
                _ => Err(removed(REMOVED)),
            }
        }
        Known::Not => {
            let vouchers = connection.vouchers.get().map(Vec::as_slice).unwrap_or_default();
            if introduces(vouchers, member.site.collective, &caller, |id| known(member, &records, id)) {
                Ok(Caller::Introduced)
            } else {
                Err(refused(UNKNOWN))
            }
        }
    }
}

/// Who may use a route.
#[derive(Debug, Clone, Copy)]
pub(super) enum Gate {
    /// For what a member does because it is one.
    Members,
    /// For what keeps the collective going: also who is about to leave, and who is not heard of yet.
    Replication,
}

/// Whether who is at the other end may use what stands behind this gate.
///
/// # Errors
/// It may not.
pub(super) fn check(member: &Member, connection: &Connection, gate: Gate) -> Result<(), Failure> {
    match (caller(member, connection)?, gate) {
        (Caller::Member, _) | (_, Gate::Replication) => Ok(()),
        (Caller::Leaving, Gate::Members) => Err(removed(REMOVED)),
        (Caller::Introduced, Gate::Members) => Err(refused(UNKNOWN)),
    }
}

pub(super) async fn guard(
    State((member, gate)): State<(Arc<Member>, Gate)>,
    Extension(connection): Extension<Connection>,
    request: Request,
    next: Next,
) -> Response {
    match check(&member, &connection, gate) {
        Ok(()) => next.run(request).await,
        Err(failure) => failure.into_response(),
    }
}

/// Answers no node, with the reason, once this member knows that it was removed: it hears of no change any more, and nobody would take what nodes report
/// to it. They ask another member.
pub(crate) async fn refuse_removed(State(member): State<Arc<Member>>, request: Request, next: Next) -> Response {
    match member.calls.removed() {
        None => next.run(request).await,
        Some(why) => Failure(Problem { status: 503, code: Code::Removed, detail: why.to_owned() }).into_response(),
    }
}
