//! What a node may ask, in which order, and what it is refused.

use crate::support::{Machine, Member, refusal};
use moor_api::node::{EnvelopeKind, KeyRequest, Stage, StageClosed, StatusReport};
use moor_api::problem::Code;

/// A member with a published profile and a node that is to boot it.
async fn prepared() -> anyhow::Result<(Member, Machine)> {
    let member = Member::start()?;
    member.publish().await?;
    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.deploy("n1").await?;
    Ok((member, machine))
}

fn status(machine: &Machine, sequence: u64, state: &str) -> StatusReport {
    StatusReport {
        boot: machine.boot,
        sequence,
        state: state.into(),
        detail: String::new(),
        uptime_ms: 1234,
        figures: [("image.bytes_fetched".to_owned(), 5)].into(),
    }
}

#[tokio::test]
async fn a_node_with_a_soft_key_boots() -> anyhow::Result<()> {
    let member = Member::start()?;
    let (image, dek) = member.publish().await?;
    let mut machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.deploy("n1").await?;
    member.arm("n1", "once").await?;

    let mut connection = machine.connect().await?;
    let token = machine.log_in(&mut connection, Stage::Boot).await?;
    assert_eq!(token.stage, Stage::Boot);
    let config = connection.config().await?;
    assert_eq!(config.node.name.as_str(), "n1");
    assert_eq!(config.profile.name.as_str(), "p");
    let offer = connection.image().await?;
    assert_eq!((offer.digest, offer.size, offer.token_required), (image.digest, image.size, false));
    let envelope = connection.image_key(&KeyRequest { digest: offer.digest }).await?;
    assert_eq!((envelope.kind, envelope.recipient), (EnvelopeKind::Plain, config.node.id));
    assert_eq!(envelope.wrapped.0, dek.as_bytes());
    assert_eq!(envelope.key_id.0, dek.key_id());
    connection.status(&status(&machine, 1, "image")).await?;
    connection.stage_closed(&StageClosed { boot: machine.boot }).await?;

    // The run stage, as the agent in the running system.
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Run).await?;
    connection.status(&status(&machine, 2, "booted")).await?;
    connection.status(&status(&machine, 2, "booted")).await?;
    let mut admin = member.admin().await?;
    let mut events = admin.status(Some("n1"), true, false).await?;
    let mut states = Vec::new();
    while let Some(event) = events.next().await? {
        states.push(event.state);
    }
    assert_eq!(states, ["pending", "image", "booted"], "a report that is sent twice is taken once");

    // The next boot needs no arming.
    machine.reboot()?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    assert_eq!(connection.config().await?.node.machine_id, config.node.machine_id);
    let view = &member.admin().await?.nodes(Some("n1")).await?[0];
    assert_eq!((view.pin, view.trust), (Some(image.digest), moor_api::admin::TrustState::Soft));
    assert_eq!(view.attributes["deployment.profile"], "p");
    Ok(())
}

#[tokio::test]
async fn who_is_unknown_or_not_armed_is_told_and_shown() -> anyhow::Result<()> {
    let (member, machine) = prepared().await?;
    let mut connection = machine.connect().await?;
    let reply = connection.hello(&machine.hello()).await?;
    let problem = reply.refusal.expect("refused");
    assert_eq!((problem.code, reply.node.is_none()), (Code::NotArmed, true));
    assert!(problem.detail.contains("not armed"), "{problem}");
    assert!(member.why("n1").await?.contains("not armed"));

    let stranger = Machine::new(&member).await?;
    let reply = stranger.connect().await?.hello(&stranger.hello()).await?;
    let problem = reply.refusal.expect("refused");
    assert_eq!(problem.code, Code::UnknownNode);
    assert!(problem.detail.contains(&stranger.uuid.to_string()), "{problem}");
    assert!(member.why(&stranger.uuid.to_string()).await?.contains("no node is this machine"));
    Ok(())
}
