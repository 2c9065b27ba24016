//! Tokens that the member's own key signed, and that are refused all the same.

use crate::machine::Machine;
use crate::support::{Member, refusal};
use moor_api::ids::{BootId, NodeId};
use moor_api::node::Stage;
use moor_api::problem::Code;
use moord::node::token::{Claims, mint, thumbprint};

#[tokio::test]
async fn a_good_signature_is_not_enough() -> anyhow::Result<()> {
    let mut member = Member::start()?;
    member.publish().await?;
    let machine = Machine::new(&member).await?;
    member.define("n1", machine.uuid).await?;
    member.deploy("n1").await?;
    member.arm("n1", "once").await?;
    let mut connection = machine.connect().await?;
    machine.log_in(&mut connection, Stage::Boot).await?;
    let node = connection.config().await?.node.id;
    // As the member signs them: its key, with the rest of its state.
    assert!(member.terminate()?);
    let (keys, epoch) = {
        let (keys, store) = member.opened()?;
        (keys, store.view()?.node(node)?.expect("the node").epoch)
    };
    let key = keys.token()?;
    member.run()?;
    let mut connection = machine.connect().await?;
    let good = machine.claims(connection.member(), node, epoch);
    connection.set_token(&mint(key, &good)?)?;
    connection.config().await?;
    for (what, claims, code, says) in [
        ("expired", Claims { expires: moord::state::now() - 1, ..good.clone() }, Code::TokenInvalid, "expired"),
        ("an older epoch", Claims { epoch: epoch - 1, ..good.clone() }, Code::TokenInvalid, "identity of n1 changed"),
        ("no such node", Claims { node: NodeId::random(), ..good.clone() }, Code::TokenInvalid, "removed"),
        ("a boot that never began", Claims { boot: BootId::random(), ..good.clone() }, Code::StageClosed, "is over"),
        ("another key", Claims { key: thumbprint(b"x"), ..good.clone() }, Code::TokenInvalid, "another session key"),
    ] {
        connection.set_token(&mint(key, &claims)?)?;
        let (got, detail) = refusal(connection.config().await);
        assert_eq!(got, code, "{what}");
        assert!(detail.contains(says), "{what}: {detail}");
    }
    assert!(member.why("n1").await?.contains("expired"));
    Ok(())
}
