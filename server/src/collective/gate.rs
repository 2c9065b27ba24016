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
use moor_api::ids::MemberId;
use moor_api::problem::{Code, Problem};
use std::collections::BTreeMap;
use std::sync::Arc;

/// To a member that is none any more.
pub(super) const REMOVED: &str = "this member was removed from the collective: `moor collective join --set-aside` with a new invitation lets it in anew";
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

/// Who is being removed may answer, and lead, for a moment still. It makes no keys and no authority for the others: it would know them.
///
/// # Errors
/// This member is none any more, as far as it knows.
pub(super) fn check_present(member: &Member) -> Result<(), Problem> {
    let records = member.view()?.members()?;
    let is_present = records.get(&member.identity.number).is_some_and(|own| !own.removed);
    if is_present { Ok(()) } else { Err(Problem::new(Code::Forbidden, REMOVED)) }
}

/// The member that the certificate names, with the key that the handshake has proven.
pub(super) fn shown(connection: &Connection) -> Result<Acquaintance, Failure> {
    match &connection.peer {
        Peer::Tls { member: Some(id), client_key: Some(key), .. } => {
            Ok(Acquaintance { id: *id, key: key.clone().into() })
        }
        _ => Err(refused("members only: no member's certificate was shown")),
    }
}

fn caller(member: &Member, connection: &Connection) -> Result<Caller, Failure> {
    let caller = shown(connection)?;
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
                _ => Err(refused(REMOVED)),
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
        (Caller::Leaving, Gate::Members) => Err(refused(REMOVED)),
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
