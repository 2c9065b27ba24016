//! Who is refused before he is known, and what is kept of it.

use crate::machine::Machine;
use crate::node_api::prepared;
use crate::support::{TIMEOUT, refusal};
use anyhow::ensure;
use moor_api::deploy::PhaseName;
use moor_api::ids::NodeId;
use moor_api::node::Stage;
use moor_api::problem::Code;
use moord::node::token::mint;
use moord::secrets::Ring;
use std::time::{Duration, Instant};
use uuid::Uuid;

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

    // A window that closed is none.
    member.arm("n1", "2020-01-01T00:00:00Z").await?;
    let reply = connection.hello(&machine.hello()).await?;
    assert_eq!(reply.refusal.expect("refused").code, Code::NotArmed);
    // `moor why` is kept over a restart.
    let mut member = member;
    assert!(member.terminate()?);
    member.run()?;
    assert!(member.why("n1").await?.contains("not armed"));
    Ok(())
}

#[tokio::test]
async fn what_a_stranger_makes_up_is_kept_once() -> anyhow::Result<()> {
    let (member, machine) = prepared().await?;
    let mut connection = machine.connect().await?;
    for _ in 0..3 {
        // Any node id, any path.
        let request = machine.session_request(&connection, NodeId::random(), &[0; 88], Stage::Boot)?;
        assert_eq!(refusal(connection.session(&request).await).0, Code::UnknownNode);
        let path = Uuid::new_v4().to_string();
        assert_eq!(refusal(connection.file(&path, 10).await).0, Code::TokenInvalid);
        assert_eq!(refusal(connection.script(PhaseName::Pre, &path, 10).await).0, Code::TokenInvalid);
    }
    // All of it under the address that it came from.
    let why = member.why("127.0.0.1").await?;
    let mut calls: Vec<&str> = why.lines().filter_map(|line| line.split_once(':')).map(|(call, _)| call).collect();
    calls.sort_unstable();
    calls.dedup();
    assert_eq!(calls, ["GET files", "GET scripts", "POST session"], "{why}");
    Ok(())
}

#[tokio::test]
async fn a_node_whose_token_was_made_void_is_no_stranger() -> anyhow::Result<()> {
    let (member, machine) = prepared().await?;
    member.arm("n1", "once").await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    member.admin().await?.rotate_key().await?;
    let end = Instant::now() + TIMEOUT;
    while connection.config().await.is_ok() {
        ensure!(Instant::now() < end, "a token of before is good:\n{}", member.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(refusal(connection.config().await).0, Code::TokenInvalid);
    let why = member.why("n1").await?;
    ensure!(why.contains("its keys were rotated since"), "{why}");
    let nobody = refusal(member.admin().await?.why("127.0.0.1").await);
    assert_eq!(nobody.0, Code::NotFound, "{nobody:?}");
    // Who makes up a node is one.
    let foreign = Ring::first(machine.bundle.collective)?;
    let claims = machine.claims(connection.member(), NodeId::random(), 1);
    connection.set_token(&mint(foreign.token()?, &claims)?)?;
    assert_eq!(refusal(connection.config().await).0, Code::TokenInvalid);
    ensure!(member.why("127.0.0.1").await?.contains("is not one of this collective"));
    Ok(())
}
