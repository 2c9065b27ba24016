//! Metrics and health of a real member.

use crate::support::Member;
use std::collections::BTreeMap;
use uuid::Uuid;

/// The samples of a scrape, by name with labels. Each family has its help and type before it.
fn samples(text: &str) -> BTreeMap<String, String> {
    let (mut samples, mut family) = (BTreeMap::new(), "");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().unwrap();
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name == family || name.starts_with(&format!("{family}{{")), "{line} is of {family}");
            assert!(samples.insert(name.to_owned(), value.to_owned()).is_none(), "{line} twice");
        }
    }
    samples
}

#[tokio::test]
async fn a_member_says_how_it_is() -> anyhow::Result<()> {
    let member = Member::start()?;
    member.define("n1", Uuid::new_v4()).await?;
    member.define("n2", Uuid::new_v4()).await?;
    let mut admin = member.admin().await?;
    let before = samples(&admin.metrics().await?);
    for (name, value) in [
        ("moord_leader", "1"),
        ("moord_majority", "1"),
        ("moord_members", "1"),
        ("moord_voters", "1"),
        ("moord_nodes", "2"),
        ("moord_nodes_enrolled", "0"),
    ] {
        assert_eq!(before.get(name).map(String::as_str), Some(value), "{name}: {before:?}");
    }
    assert_eq!(before["moord_log_last_index"], before["moord_log_applied_index"]);
    let number = |samples: &BTreeMap<String, String>, name: &str| samples[name].parse::<u64>().unwrap();
    assert!(number(&before, "moord_state_free_bytes") > 0);
    assert_eq!(admin.nodes(None).await?.len(), 2);
    assert!(admin.nodes(Some("no-such")).await.is_err());
    let after = samples(&admin.metrics().await?);
    let grown = |name: &str| number(&after, name) - number(&before, name);
    assert_eq!(grown("moord_requests_total{caller=\"admin\",status=\"2xx\"}"), 1);
    assert_eq!(grown("moord_requests_total{caller=\"admin\",status=\"4xx\"}"), 1);
    let time = "moord_request_seconds_total{caller=\"admin\"}";
    assert!(after[time].parse::<f64>()? > before[time].parse::<f64>()?);
    Ok(())
}
