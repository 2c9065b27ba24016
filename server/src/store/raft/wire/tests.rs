use super::*;
use moor_api::ids::NodeId;

const NEWER: Level = Level(Level::NEWEST.0 + 1);

fn entry(command: Command) -> Entry {
    Entry { log_id: LogId::new(1_u64.into(), 7), payload: EntryPayload::Normal(command) }
}

fn moved() -> Command {
    Command::MoveMember { number: 1, urls: Vec::new(), near: vec!["10.0.0.0/8".parse().unwrap()] }
}

#[test]
fn an_entry_of_a_level_that_is_not_known_is_refused_and_not_read_without_what_is_new() {
    let bytes = entry_bytes(&entry(moved())).unwrap();
    assert!(entry_from(&bytes, Level::NEAR).is_ok());
    // It parses, and would even without the field that is new: only the level says that this release must not apply it.
    let error = entry_from(&bytes, Level::FIRST).unwrap_err().to_string();
    assert!(error.contains("has reached feature level 2, and this release of moord knows 1 at most"), "{error}");
    let rearm = Command::Rearm { id: NodeId::from_bytes([1; 16]) };
    assert!(entry_from(&entry_bytes(&entry(rearm)).unwrap(), Level::FIRST).is_ok());
}

#[test]
fn a_command_that_is_not_known_is_said_to_be_a_newer_release_s() {
    let text = |level: &str| {
        format!(r#"{{"version":1,{level}"id":{{"term":1,"index":7}},"payload":{{"command":{{"command":"x"}}}}}}"#)
    };
    let newer = text(&format!(r#""level":{NEWER},"#));
    let error = entry_from(newer.as_bytes(), Level::NEWEST).unwrap_err();
    assert!(matches!(error, WireError::TooOld(_)), "{error}");
    let append = format!(
        r#"{{"vote":{{"term":1,"candidate":1,"committed":true}},"previous":null,"commit":null,"entries":[{newer}]}}"#
    );
    let error = append_from(append.as_bytes(), Level::NEWEST).unwrap_err();
    assert!(matches!(error, WireError::TooOld(_)), "{error}");
    // Where the level is one that this release knows, it is damage.
    let error = entry_from(text("").as_bytes(), Level::NEWEST).unwrap_err();
    assert!(matches!(error, WireError::Json(_)), "{error}");
}

#[test]
fn entries_of_other_members_are_refused_all_together() {
    let request = AppendEntriesRequest::<Raft> {
        vote: Vote::new_committed(1, 1),
        prev_log_id: None,
        leader_commit: None,
        entries: vec![entry(Command::NextCertificate), entry(moved())],
    };
    let bytes = serde_json::to_vec(&WireAppend::new(&request, Some(Duration::from_secs(3)))).unwrap();
    let (read, unheard) = append_from(&bytes, Level::NEAR).unwrap();
    assert_eq!((read.entries.len(), unheard), (2, Duration::from_secs(3)));
    assert!(matches!(append_from(&bytes, Level::FIRST), Err(WireError::TooOld(_))));
}
