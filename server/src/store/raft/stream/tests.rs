//! What a leader sends to a follower, and which answers count, with a follower that answers as the test says.

use super::*;
use crate::store::raft::network::tests::{Follower, id, scripted};
use crate::store::raft::{Command, Entry, Vote};
use futures_util::stream;
use openraft::EntryPayload;
use openraft::network::RaftNetworkFactory as _;
use std::pin::pin;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;

/// A call with the entry `last`, or with none after it, that tells of commits up to `commit`.
fn call(last: u64, is_empty: bool, commit: u64) -> AppendEntriesRequest<Raft> {
    let entry = Entry { log_id: id(last), payload: EntryPayload::Normal(Command::NextCertificate) };
    AppendEntriesRequest {
        vote: Vote::new_committed(1, 1),
        prev_log_id: Some(id(if is_empty { last } else { last - 1 })),
        entries: if is_empty { Vec::new() } else { vec![entry] },
        leader_commit: Some(id(commit)),
    }
}

fn option() -> RPCOption {
    RPCOption::new(Duration::from_secs(5))
}

/// What the follower saw: the last entry of each call, and what it was told of commits.
fn seen(follower: &Follower) -> Vec<(u64, u64)> {
    follower.seen().into_iter().map(|(last, commit)| (last, commit.unwrap_or(0))).collect()
}

#[tokio::test]
async fn commits_are_told_of_several_at_a_time_and_the_last_one_soon() {
    let keys = tempfile::tempdir().unwrap();
    let (follower, mut network) = scripted(keys.path(), Vec::new()).await;
    let mut link = network.new_client(2, &follower.peer).await;
    let (give, calls) = mpsc::unbounded_channel();
    let mut answers = pin!(Session::new(&mut link, UnboundedReceiverStream::new(calls), option()).answers());
    // As one client makes them: each is committed before the next one comes, with a call that says only so.
    for last in 2..100 {
        give.send(call(last, false, last - 1)).unwrap();
        let mut answer = answers.next().await.unwrap().unwrap();
        if answer == Ok(Some(id(last - 1))) {
            // To what was told when no entry came for long.
            answer = answers.next().await.unwrap().unwrap();
        }
        assert_eq!(answer, Ok(Some(id(last))));
        give.send(call(last, true, last)).unwrap();
    }
    while seen(&follower).last() != Some(&(99, 99)) {
        let answer = tokio::time::timeout(Duration::from_secs(5), answers.next()).await;
        assert_eq!(answer.expect("the last commit is told").unwrap().unwrap(), Ok(Some(id(99))));
    }
    let told: Vec<u64> = seen(&follower).into_iter().map(|(_, commit)| commit).collect();
    assert!(told.is_sorted(), "{told:?}");
    let with_news = told.windows(2).filter(|pair| pair[0] < pair[1]).count();
    // Each change took less than TELL, or this machine is slower than any: then there is nothing to put off.
    println!("98 changes, told of in {with_news} calls");
    assert!(seen(&follower).len() < 2 * 98, "each commit had a call of its own");
}

#[tokio::test]
async fn a_follower_that_waits_for_its_own_change_is_told_at_once() {
    let keys = tempfile::tempdir().unwrap();
    let (follower, mut network) = scripted(keys.path(), Vec::new()).await;
    network.calls().asks(follower.peer.id);
    let mut link = network.new_client(2, &follower.peer).await;
    let calls = [call(2, false, 1), call(2, true, 2), call(3, false, 2), call(3, true, 3)];
    let answers = Session::new(&mut link, stream::iter(calls), option()).answers();
    let answers: Vec<_> = answers.map(|answer| answer.unwrap()).collect().await;
    assert_eq!(answers, [2, 2, 3, 3].map(|last| Ok(Some(id(last)))));
    assert_eq!(seen(&follower), [(2, 1), (2, 2), (3, 2), (3, 3)]);
}

#[tokio::test]
async fn an_answer_that_comes_late_is_not_taken_for_one_to_a_newer_call() {
    for (delay, expected) in [(Duration::ZERO, 2), (OLD + Duration::from_millis(100), 1)] {
        let keys = tempfile::tempdir().unwrap();
        // The first call of all makes sure that there is a connection.
        let (follower, mut network) = scripted(keys.path(), vec![Duration::ZERO, delay]).await;
        let mut link = network.new_client(2, &follower.peer).await;
        let (give, calls) = mpsc::unbounded_channel();
        let mut answers = pin!(Session::new(&mut link, UnboundedReceiverStream::new(calls), option()).answers());
        give.send(call(2, false, 1)).unwrap();
        assert_eq!(answers.next().await.unwrap().unwrap(), Ok(Some(id(2))));
        give.send(call(3, false, 1)).unwrap();
        give.send(call(3, true, 2)).unwrap();
        drop(give);
        let began = Instant::now();
        let late: Vec<_> = answers.map(|answer| answer.unwrap()).collect().await;
        // Where this machine stood still for so long, one that came at once is late as well.
        let expected = if began.elapsed() < OLD { expected } else { 1 };
        assert_eq!(late, vec![Ok(Some(id(3))); expected], "{delay:?}");
        assert_eq!(seen(&follower).last(), Some(&(3, 2)), "it is told all the same");
    }
}

#[tokio::test]
async fn nor_is_one_to_a_call_that_was_parted() {
    let keys = tempfile::tempdir().unwrap();
    let (soon, late) = (Duration::from_millis(300), OLD * 4);
    let (follower, mut network) = scripted(keys.path(), vec![Duration::ZERO, late]).await;
    let mut link = network.new_client(2, &follower.peer).await;
    // A session before has left a connection.
    let before: Vec<_> = Session::new(&mut link, stream::iter([call(2, false, 1)]), option()).answers().collect().await;
    assert_eq!(before.len(), 1);
    let (give, calls) = mpsc::unbounded_channel();
    let mut session = Session::new(&mut link, UnboundedReceiverStream::new(calls), option());
    // It is soon that he is to be told again, so that the news of commits go later, by a call of the session's own.
    session.told = Some((Some(id(1)), Instant::now() + soon));
    give.send(call(3, false, 2)).unwrap();
    let seen_by = follower.clone();
    tokio::spawn(async move {
        while seen(&seen_by).last() != Some(&(3, 2)) {
            tokio::time::sleep(TELL).await;
        }
        give.send(call(3, true, 3)).unwrap();
    });
    let began = Instant::now();
    let answers: Vec<_> = session.answers().map(|answer| answer.unwrap()).collect().await;
    assert!(began.elapsed() >= late);
    // Of three calls, the answers to the first and to the second were too old.
    assert_eq!(answers, [Ok(Some(id(3)))]);
    assert_eq!(seen(&follower), [(2, 1), (3, 1), (3, 2), (3, 3)]);
}
