//! What one side writes, the other reads.

use moor_api::ids::{BootId, NodeId};
use moor_api::node::{Base64, HexBytes, Quote, SessionProof, SessionRequest, Stage};

/// Its values have numbers as keys, and it stands inside a tagged enum.
#[test]
fn a_session_with_a_quote_reads_back() {
    let quote = Quote {
        attest: Base64(vec![1, 2]),
        signature: Base64(vec![3]),
        pcrs: [(0, HexBytes(vec![0; 32])), (15, HexBytes(vec![1; 32]))].into(),
        event_log: None,
    };
    let request = SessionRequest {
        node: NodeId::from_bytes([1; 16]),
        boot: BootId::from_bytes([2; 16]),
        nonce: Base64(vec![4; 88]),
        stage: Stage::Boot,
        proof: SessionProof::Tpm { quote },
    };
    let text = serde_json::to_string(&request).unwrap();
    assert!(text.contains(r#""15":"0101"#), "{text}");
    assert_eq!(serde_json::from_str::<SessionRequest>(&text).unwrap(), request);
    for bad in ["256", "-1", "x", ""] {
        assert!(
            serde_json::from_str::<SessionRequest>(&text.replace(r#""15":"#, &format!(r#""{bad}":"#))).is_err(),
            "{bad}"
        );
    }
}
