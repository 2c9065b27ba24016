//! Commands as they are written into the log.

use super::*;
use crate::store::records::Evidence;
use moor_api::ids::Sha256Digest;

/// The replicated store will write commands into its log.
#[test]
fn a_command_reads_back() {
    let (id, boot) = (NodeId::from_bytes([1; 16]), BootId::from_bytes([2; 16]));
    let evidence = Evidence {
        pcrs: vec![(15, "00".into())],
        event_log: Some(Sha256Digest([3; 32])),
        reset_count: 1,
        firmware_version: 2,
    };
    let event = StatusEvent {
        node: "n1".parse().unwrap(),
        boot: Some(boot),
        state: "booted".into(),
        detail: String::new(),
        time_ms: 1,
        uptime_ms: 2,
        figures: [("a".to_owned(), 3)].into(),
    };
    let wrapped = WrappedKey { encapsulated: vec![1].into(), ciphertext: vec![2].into() };
    let keys = KeyVersion { version: 7, wrapped: [(MemberId::from_bytes([4; 16]), wrapped)].into() };
    let soft = Identity::Soft { public_key: vec![1].into(), unproven: true };
    for command in [
        Command::Boot { id, boot, evidence: Some(evidence) },
        Command::Status { id, sequence: Some(1), event },
        Command::Arm { id, armed: Armed::Until(7) },
        Command::RotateKeys { new: keys.clone() },
        Command::Join {
            invite: Uuid::nil(),
            member: MemberId::from_bytes([4; 16]),
            key: vec![1].into(),
            unwrap: vec![2].into(),
            keys: keys.wrapped.into_values().map(|wrapped| (7, wrapped)).collect(),
            urls: Vec::new(),
            now: 1,
            level: Level::FIRST,
            trust: 2,
            ssh: 2,
        },
        Command::Audited { entry: serde_json::json!({ "what": "x" }), change: Box::new(Command::Rearm { id }) },
        Command::Bind { id, identity: soft, boot, now: 1 },
        Command::Refuse {
            nodes: vec![id],
            strangers: vec!["x".into()],
            refusal: Refusal {
                time_ms: 1,
                peer: "p".into(),
                call: "c".into(),
                uuid: None,
                macs: Vec::new(),
                problem: Problem::new(moor_api::problem::Code::NotArmed, "no"),
                count: 1,
            },
        },
    ] {
        let text = serde_json::to_string(&command).unwrap();
        let back: Command = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
    }
}
