//! Feature levels: what a release knows, as a number, so that members one release apart work together.
//!
//! A level is all that lies in the log, the tables and the snapshots: kinds of commands, their fields, and fields of records. What is newer than
//! the collective's level is not proposed, or done as before; the leader raises the level once every member's release knows the next one.
//! A release that does not know a field drops it without a word, and holds something else than the others from then on: so an entry or a
//! snapshot of a level that a release does not know is never taken, and the member ends and says why.
//!
//! Nothing gets into the log that is above the level which was reached. The rise itself every release takes, because it may be refused, and
//! finds out when it is applied: who does not know a level that was reached does not apply that, and ends.

use super::command::{Command, Outcome};
use super::records::MemberRecord;
use super::tables::{self, Snapshot, Write};
use super::{StoreError, apply};
use moor_api::problem::{Code, Problem};
use serde::{Deserialize, Serialize};

/// A feature level, from 1 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Level(pub u32);

impl Level {
    /// What every release knows.
    pub const FIRST: Self = Self(1);
    /// Members say which networks they are near to.
    pub const NEAR: Self = Self(2);
    /// Authorities are rotated; members and nodes acknowledge trust bundles.
    pub const AUTHORITIES: Self = Self(3);
    /// Authorities of SSH are rotated; nodes acknowledge them.
    pub const SSH_AUTHORITIES: Self = Self(4);
    /// The collective has an incarnation, which certificates and tokens name; a rotation of the authority can be cancelled.
    pub const INCARNATIONS: Self = Self(5);
    /// What this release knows.
    pub const NEWEST: Self = Self::INCARNATIONS;
}

impl Default for Level {
    fn default() -> Self {
        Self::FIRST
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The key of the collective's level in [`tables::SITE`]; not there: [`Level::FIRST`].
const KEY: &str = "level";

impl Snapshot {
    /// The collective's level.
    ///
    /// # Errors
    /// The database is damaged.
    pub fn level(&self) -> Result<Level, StoreError> {
        Ok(self.get(tables::SITE, KEY)?.unwrap_or_default())
    }
}

/// The collective's level, while it changes.
pub(super) fn of(write: &Write<'_>) -> Result<Level, StoreError> {
    Ok(write.get(tables::SITE, KEY)?.unwrap_or_default())
}

/// A collective of this level is no place for a release that knows less.
///
/// # Errors
/// It is.
pub(super) fn check(level: Level, known: Level) -> Result<(), StoreError> {
    if level > known { Err(StoreError::TooOld { level, known }) } else { Ok(()) }
}

/// Why a command is not for a collective of the level `of`, if it is not.
fn refusal(command: &Command, of: impl FnOnce() -> Result<Level, StoreError>) -> Result<Option<Problem>, StoreError> {
    let needed = command.level();
    // Nearly all are of the first.
    if needed == Level::FIRST {
        return Ok(None);
    }
    let level = of()?;
    let detail = || {
        format!(
            "'{}' as it was asked for needs feature level {needed}, and the collective is at {level}: it rises once every member runs a \
             release that knows it (`moor collective show`)",
            command.kind()
        )
    };
    Ok((needed > level).then(|| Problem::new(Code::Conflict, detail())))
}

/// What of a command may be written into the log of a collective of the level `of`, with the refusal of the rest; or the refusal of all. Of one that
/// is audited the line of the audit log may always. What is above the level would lock out releases that do not know it, although
/// nothing comes of it.
///
/// # Errors
/// The database is damaged.
pub(super) fn within(
    command: Command,
    of: impl FnOnce() -> Result<Level, StoreError>,
) -> Result<Result<(Command, Option<Problem>), Problem>, StoreError> {
    Ok(match (refusal(&command, of)?, command) {
        (None, command) => Ok((command, None)),
        (refused, Command::Audited { entry, .. }) => Ok((Command::Audit { entry }, refused)),
        (Some(problem), _) => Err(problem),
    })
}

/// Raises the collective's level. It never falls.
pub(super) fn raise(write: &Write<'_>, level: Level) -> Result<Outcome, StoreError> {
    let now = of(write)?;
    if level <= now {
        return Ok(apply::refused(Code::Conflict, format!("the collective is at feature level {now} already")));
    }
    // Said by each member itself: one may have gone back to an older release since the leader looked.
    let members = write.all::<MemberRecord>(tables::MEMBERS)?;
    if let Some(old) = members.iter().find(|member| !member.removed && member.level < level) {
        return Ok(apply::refused(
            Code::Conflict,
            format!("member {} runs a release that knows feature levels up to {}, not {level}", old.name, old.level),
        ));
    }
    write.put(tables::SITE, KEY, &level)?;
    Ok(Outcome::Done)
}

/// What is written of this level needs no agreement: the collective is one member, whose release does it.
pub(super) fn lift(write: &Write<'_>, level: Level) -> Result<(), StoreError> {
    if of(write)? < level {
        write.put(tables::SITE, KEY, &level)?;
    }
    Ok(())
}

/// The level that all these members are able to, if it is above the one that they are at.
#[must_use]
pub fn next<'a>(now: Level, members: impl IntoIterator<Item = &'a MemberRecord>) -> Option<Level> {
    let able = members.into_iter().filter(|member| !member.removed).map(|member| member.level).min()?;
    (able > now).then_some(able)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::members;
    use redb::Database;
    use redb::backends::InMemoryBackend;

    fn member(name: &str, level: Level) -> MemberRecord {
        MemberRecord {
            level,
            ..MemberRecord::only(vec![1].into(), vec![1].into(), name.into(), vec!["https://10.0.0.1".into()])
        }
    }

    /// Tables with members of these levels, in memory.
    fn with_members(levels: &[Level], then: impl FnOnce(&Write<'_>)) {
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let transaction = database.begin_write().unwrap();
        tables::create(&transaction).unwrap();
        let write = Write::new(&transaction);
        for (number, level) in (1..).zip(levels) {
            assert_eq!(
                members::found(&write, &member(&format!("m{number}"), *level)).unwrap(),
                Outcome::Number(number)
            );
        }
        then(&write);
    }

    fn near(number: u64) -> Command {
        Command::MoveMember {
            number,
            urls: vec!["https://10.0.0.9".into()],
            near: vec!["10.0.0.0/24".parse().unwrap()],
        }
    }

    fn records(write: &Write<'_>) -> Vec<MemberRecord> {
        write.all(tables::MEMBERS).unwrap()
    }

    fn is_refused(outcome: &Outcome, why: &str) -> bool {
        matches!(outcome, Outcome::Refused(problem) if problem.detail.contains(why))
    }

    #[test]
    fn an_entry_above_the_level_is_refused_and_changes_nothing() {
        with_members(&[Level::NEAR, Level::FIRST], |write| {
            let before = records(write);
            let audited = Command::Audited { entry: serde_json::json!({ "what": "x" }), change: Box::new(near(1)) };
            for command in [near(1), audited] {
                let outcome = apply::apply(write, command).unwrap();
                assert!(is_refused(&outcome, "needs feature level 2, and the collective is at 1"), "{outcome}");
                assert_eq!(records(write), before);
            }
            assert_eq!(write.count(tables::AUDIT).unwrap(), 1, "that it was asked for is in the audit log");
        });
    }

    #[test]
    fn what_is_above_the_level_leaves_its_line_of_the_audit_log_and_nothing_else() {
        let audited = |change| Command::Audited { entry: serde_json::json!({ "what": "x" }), change: Box::new(change) };
        let within = |command, level| within(command, || Ok(level)).unwrap();
        assert!(within(near(1), Level::FIRST).is_err());
        let (left, refused) = within(audited(near(1)), Level::FIRST).unwrap();
        assert!(matches!(left, Command::Audit { .. }) && refused.is_some(), "{left}");
        for (command, level) in
            [(near(1), Level::NEAR), (audited(near(1)), Level::NEAR), (Command::NextCertificate, Level::FIRST)]
        {
            let kind = command.kind();
            let (left, refused) = within(command, level).unwrap();
            assert!(left.kind() == kind && refused.is_none(), "{kind}");
        }
    }

    #[test]
    fn the_level_rises_when_all_are_able_to_and_never_falls() {
        with_members(&[Level::NEAR, Level::FIRST], |write| {
            let raise = || apply::apply(write, Command::RaiseLevel { level: Level::NEAR }).unwrap();
            let tell = |level| apply::apply(write, Command::TellLevel { number: 2, level }).unwrap();
            assert!(is_refused(&raise(), "member m2 runs a release that knows feature levels up to 1, not 2"));
            assert_eq!(of(write).unwrap(), Level::FIRST);
            // Up, back, and up again: nothing is lost by going back before the level has risen.
            assert_eq!(tell(Level::NEAR), Outcome::Done);
            assert_eq!(tell(Level::FIRST), Outcome::Done);
            assert!(is_refused(&raise(), "member m2"));
            assert_eq!(tell(Level::NEAR), Outcome::Done);
            assert_eq!(raise(), Outcome::Done);
            assert_eq!(of(write).unwrap(), Level::NEAR);
            assert_eq!(apply::apply(write, near(2)).unwrap(), Outcome::Done);
            assert_eq!(records(write)[1].near.len(), 1);
            assert!(is_refused(&tell(Level::FIRST), "has reached feature level 2"), "{:?}", records(write));
            assert!(is_refused(&raise(), "is at feature level 2 already"));
        });
    }

    #[test]
    fn a_member_that_was_removed_keeps_no_level_down() {
        with_members(&[Level::NEAR, Level::FIRST], |write| {
            assert_eq!(next(Level::FIRST, &records(write)), None);
            assert_eq!(apply::apply(write, Command::RemoveMember { number: 2 }).unwrap(), Outcome::Done);
            assert_eq!(next(Level::FIRST, &records(write)), Some(Level::NEAR));
            assert_eq!(next(Level::NEAR, &records(write)), None);
            assert_eq!(apply::apply(write, Command::RaiseLevel { level: Level::NEAR }).unwrap(), Outcome::Done);
        });
    }

    #[test]
    fn every_command_says_what_it_needs() {
        let id = moor_api::ids::NodeId::from_bytes([1; 16]);
        let audited = |change| Command::Audited { entry: serde_json::json!({ "what": "x" }), change: Box::new(change) };
        let moved = Command::MoveMember { number: 1, urls: Vec::new(), near: Vec::new() };
        for (command, level) in [
            (Command::Rearm { id }, Level::FIRST),
            (Command::NextCertificate, Level::FIRST),
            (moved, Level::FIRST),
            (near(1), Level::NEAR),
            (audited(Command::Rearm { id }), Level::FIRST),
            (audited(near(1)), Level::NEAR),
            (Command::TellLevel { number: 1, level: Level(7) }, Level::FIRST),
            // It may be refused: only once the level has risen nobody goes on who does not know it.
            (Command::RaiseLevel { level: Level(7) }, Level::FIRST),
            (audited(Command::RaiseLevel { level: Level(7) }), Level::FIRST),
        ] {
            assert_eq!(command.level(), level, "{command}");
        }
    }
}
