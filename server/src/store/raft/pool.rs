//! Connections to other members that wait for their next call.

use moor_api::client::member::MemberConnection;
use moor_api::ids::MemberId;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Connections to one member that are kept.
const IDLE: usize = 16;

/// Connections by member. The runtime on which one was made drives it, so who takes it on another one waits for both: those of a pool are all of one.
#[derive(Default)]
pub(super) struct Pool(Mutex<HashMap<MemberId, Vec<MemberConnection>>>);

impl Pool {
    fn idle(&self) -> MutexGuard<'_, HashMap<MemberId, Vec<MemberConnection>>> {
        // A thread that panicked here left it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that still stands.
    pub(super) fn take(&self, member: MemberId) -> Option<MemberConnection> {
        let mut idle = self.idle();
        let connections = idle.get_mut(&member)?;
        while let Some(connection) = connections.pop() {
            if !connection.is_closed() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps it, if it still stands and there is room.
    pub(super) fn put_back(&self, connection: MemberConnection) {
        let mut idle = self.idle();
        let connections = idle.entry(connection.member()).or_default();
        if connections.len() < IDLE && !connection.is_closed() {
            connections.push(connection);
        }
    }
}
