//! Which member nodes are told to try first when one is busier than the others.

use crate::collective::{joined, until, voters};
use crate::machine::Machine;
use crate::shares::{Connection, connector, large_file};
use crate::support::Member;
use anyhow::ensure;
use moor_api::ids::MemberId;
use std::convert::Infallible;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Nodes that are defined.
const NODES: usize = 12;
/// Connections that fetch all the time.
const MANY: usize = 12;
/// A state is kept for half a minute, and others hear of it within five seconds.
const PATIENCE: Duration = Duration::from_secs(90);

/// What one member tells each machine: the members in their order.
async fn told_by(member: &Member, machines: &mut [Machine]) -> anyhow::Result<Vec<Vec<MemberId>>> {
    let mut orders = Vec::new();
    for machine in machines {
        machine.asks(member);
        let reply = machine.connect().await?.hello(&machine.hello()).await?;
        ensure!(reply.node.is_some() || reply.refusal.is_some(), "{reply:?}");
        orders.push(reply.members.into_iter().map(|member| member.id).collect());
    }
    Ok(orders)
}

/// Waits until each member tells each machine what `is_so` is true of.
async fn until_told(
    members: [&Member; 3],
    machines: &mut [Machine],
    otherwise: &str,
    is_so: impl Fn(&[Vec<MemberId>]) -> bool,
) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    for member in members {
        loop {
            let told = told_by(member, machines).await?;
            if is_so(&told) {
                break;
            }
            ensure!(Instant::now() < end, "{otherwise}: {told:?}\n{}", member.log());
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
    Ok(())
}

/// Fetches the file again and again.
async fn fetch(mut connection: Connection, path: &str) -> anyhow::Result<Infallible> {
    loop {
        connection.ask(path).await?;
        connection.read().await?;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_told_to_try_a_busy_member_last_until_it_is_idle_again() -> anyhow::Result<()> {
    let first = Member::start()?;
    let (path, tls) = (large_file(&first).await?, connector(&first).await?);
    let second = joined(&first, "m2", true).await?;
    let third = joined(&first, "m3", true).await?;
    voters(&first, 3).await?;
    let mut machines = Vec::new();
    for number in 1..=NODES {
        let (name, machine) = (format!("n{number}"), Machine::new(&first).await?);
        first.define(&name, machine.uuid).await?;
        machines.push(machine);
    }
    let members = [&first, &second, &third];
    for member in members {
        until(member, "it has not all nodes", async || Ok(crate::collective::names(member).await?.len() == NODES))
            .await?;
    }
    let busy = first.site().await?.member;
    // Those that would try it early.
    let mut told: Vec<_> = told_by(&first, &mut machines).await?.into_iter().zip(machines).collect();
    told.sort_by_key(|(order, _)| order.iter().position(|id| *id == busy));
    told.truncate(4);
    let (before, mut machines): (Vec<_>, Vec<_>) = told.into_iter().unzip();
    ensure!(before.iter().all(|order| order.len() == 3) && before[0][2] != busy, "{before:?}");
    until_told(members, &mut machines, "members do not agree", |told| told == before).await?;

    let mut load = JoinSet::new();
    for _ in 0..MANY {
        load.spawn(fetch(Connection::new([127, 0, 0, 2], &first, &tls).await?, path));
    }
    // The others stay in their order.
    let is_last = |(order, old): (&Vec<MemberId>, &Vec<MemberId>)| {
        order[2] == busy && old.iter().filter(|id| **id != busy).eq(&order[..2])
    };
    let are_last = |told: &[Vec<MemberId>]| told.iter().zip(&before).all(is_last);
    until_told(members, &mut machines, "it is not put last", are_last).await?;
    ensure!(load.try_join_next().is_none(), "it served nothing any more");
    load.shutdown().await;
    until_told(members, &mut machines, "it does not come back", |told| told == before).await
}
