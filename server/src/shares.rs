//! Who is sent bytes next. Images and boot files go out in blocks, and a client has a turn for each: from when it asks until the connection has
//! taken the bytes. Who is alone has as many turns as it asks for, and waits for nothing. Beside others a client has two at a time, whatever its
//! connections, which take them one after the other. So one with a single connection, which uses up to two as well, is not held off by one with
//! hundreds. Other members can wait: they come after nodes.
//!
//! No turn depends on somebody else's: who takes nothing keeps its own only, and those for a second at most.

use crate::addresses::client;
use crate::http::Peer;
use moor_api::ids::{MemberId, NodeId};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Bytes of one turn.
pub(crate) const BLOCK: usize = 256 << 10;
/// Turns of a client at a time, beside others: with one the connection would wait for each block.
const BESIDE_OTHERS: usize = 2;
/// Who asked for nothing in this time is no company any more: longer than the pause between two requests.
const COMPANY: Duration = Duration::from_secs(1);
/// A turn counts for so long, and none is waited for longer: what was not taken by then waits for the client, and not for this member.
const LAPSE: Duration = Duration::from_secs(1);
/// For one block a member waits so long where nodes want something all the time: it comes to 12 MB/s over each of its connections at least.
const AFTER_NODES: Duration = Duration::from_millis(20);

/// Who has a share of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Client {
    /// All that come from one address.
    Address(IpAddr),
    /// A node, where its token was checked.
    Node(NodeId),
    /// Another member; it comes after all others.
    Member(MemberId),
    /// Users of this machine.
    Local,
}

impl Client {
    /// The client at the other end of a connection.
    #[must_use]
    pub fn of(peer: &Peer) -> Self {
        match peer {
            Peer::Tls { member: Some(Ok(named)), .. } => Self::Member(named.member),
            Peer::Tls { address, .. } => Self::Address(client(address.ip())),
            Peer::Socket { .. } => Self::Local,
        }
    }

    fn is_member(self) -> bool {
        matches!(self, Self::Member(_))
    }
}

/// The turns of one client, by their numbers, with when they began; and who waits for one, the first first.
#[derive(Default)]
struct Held {
    turns: BTreeMap<u64, Instant>,
    waiting: VecDeque<oneshot::Sender<Turn>>,
}

#[derive(Default)]
struct State {
    /// Number of the next turn.
    next: u64,
    /// When somebody last asked; one clock for all.
    now: Option<Instant>,
    /// Of those that have turns or wait for one, but for members.
    clients: HashMap<Client, Held>,
    /// Turns in `clients`.
    count: usize,
    /// Who had the last turn, and when.
    latest: Option<(Client, Instant)>,
    /// When another one than that had its last.
    before: Option<Instant>,
    /// Members that wait for nodes.
    members: VecDeque<(Client, oneshot::Sender<Turn>)>,
}

impl State {
    /// Whether another one is served.
    fn has_company(&self, client: Client) -> bool {
        let other = match self.latest {
            Some((latest, _)) if latest == client => self.before,
            latest => latest.map(|(_, at)| at),
        };
        other.zip(self.now).is_some_and(|(at, now)| now.saturating_duration_since(at) < COMPANY)
    }

    /// It is `now`: counts what the client was sent long ago no longer, and who does not wait any more.
    fn tidy(&mut self, client: Client, now: Instant) {
        self.now = Some(now);
        let Some(held) = self.clients.get_mut(&client) else { return };
        while let Some(first) = held.turns.first_entry()
            && now.saturating_duration_since(*first.get()) >= LAPSE
        {
            first.remove();
            self.count -= 1;
        }
        while held.waiting.front().is_some_and(oneshot::Sender::is_closed) {
            held.waiting.pop_front();
        }
    }

    /// The same before a member asks: it waits for nodes that are being served, and for none that takes nothing. Of members only those are kept
    /// that still wait.
    fn tidy_all(&mut self, now: Instant) {
        self.now = Some(now);
        while self.members.front().is_some_and(|(_, waiting)| waiting.is_closed()) {
            self.members.pop_front();
        }
        if self.count == 0 {
            return;
        }
        for held in self.clients.values_mut() {
            let before = held.turns.len();
            held.turns.retain(|_, begun| now.saturating_duration_since(*begun) < LAPSE);
            self.count -= before - held.turns.len();
        }
    }

    fn may_have(&self, client: Client) -> bool {
        if client.is_member() {
            return self.count == 0;
        }
        let held = self.clients.get(&client).map_or(0, |held| held.turns.len());
        held < BESIDE_OTHERS || !self.has_company(client)
    }

    /// Counts one more; its number.
    fn begin(&mut self, client: Client) -> u64 {
        let number = self.next;
        self.next += 1;
        let Some(now) = self.now.filter(|_| !client.is_member()) else { return number };
        self.clients.entry(client).or_default().turns.insert(number, now);
        self.count += 1;
        if let Some((latest, at)) = self.latest
            && latest != client
        {
            self.before = Some(at);
        }
        self.latest = Some((client, now));
        number
    }

    /// Counts one less; who has waited for that, and the numbers of their turns.
    fn end(&mut self, client: Client, number: u64) -> Vec<(Client, u64, oneshot::Sender<Turn>)> {
        let mut next = Vec::new();
        let Some(held) = self.clients.get_mut(&client) else { return next };
        if held.turns.remove(&number).is_some() {
            self.count -= 1;
        }
        while self.may_have(client)
            && let Some(waiting) = self.clients.get_mut(&client).and_then(|held| held.waiting.pop_front())
        {
            if !waiting.is_closed() {
                next.push((client, self.begin(client), waiting));
            }
        }
        if self.clients.get(&client).is_some_and(|held| held.turns.is_empty() && held.waiting.is_empty()) {
            self.clients.remove(&client);
        }
        if self.count == 0 {
            let members = std::mem::take(&mut self.members).into_iter().filter(|(_, waiting)| !waiting.is_closed());
            next.extend(members.map(|(member, waiting)| (member, number, waiting)));
        }
        next
    }
}

/// The turns of all clients of this member.
#[derive(Default)]
pub struct Shares {
    state: Mutex<State>,
    /// Microseconds that turns of clients took, but for members.
    spent: AtomicU64,
}

/// One client's leave to be sent [`BLOCK`] bytes; it is over when this is dropped.
pub struct Turn {
    shares: Arc<Shares>,
    client: Client,
    number: u64,
    began: Instant,
}

impl Shares {
    /// Time that turns which are over took, members' apart. One counts for a second at most: a client that takes nothing makes nobody busy.
    #[must_use]
    pub fn spent(&self) -> Duration {
        Duration::from_micros(self.spent.load(Ordering::Relaxed))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn given(self: &Arc<Self>, client: Client, number: u64) -> Turn {
        Turn { shares: self.clone(), client, number, began: Instant::now() }
    }

    /// A turn, or where it will come.
    fn ask(self: &Arc<Self>, client: Client, now: Instant) -> Result<Turn, oneshot::Receiver<Turn>> {
        let mut state = self.state();
        if client.is_member() {
            state.tidy_all(now);
        } else {
            state.tidy(client, now);
        }
        let is_first = state.clients.get(&client).is_none_or(|held| held.waiting.is_empty());
        if is_first && state.may_have(client) {
            let number = state.begin(client);
            return Ok(self.given(client, number));
        }
        let (sender, receiver) = oneshot::channel();
        if client.is_member() {
            state.members.push_back((client, sender));
        } else {
            state.clients.entry(client).or_default().waiting.push_back(sender);
        }
        Err(receiver)
    }

    /// The client's next turn, as soon as it is due: after a second at the latest.
    pub async fn turn(self: &Arc<Self>, client: Client) -> Turn {
        let mut coming = match self.ask(client, Instant::now()) {
            Ok(turn) => return turn,
            Err(coming) => coming,
        };
        let patience = if client.is_member() { AFTER_NODES } else { LAPSE };
        if let Ok(Ok(turn)) = tokio::time::timeout(patience, &mut coming).await {
            return turn;
        }
        coming.close();
        // It may have come in this very moment.
        coming.try_recv().unwrap_or_else(|_| {
            let mut state = self.state();
            state.tidy(client, Instant::now());
            let number = state.begin(client);
            self.given(client, number)
        })
    }
}

impl Turn {
    /// Leaves this turn to the bytes that are sent in it, and takes the same client's next.
    pub(crate) async fn next(self: Arc<Self>) -> Self {
        let (shares, client) = (self.shares.clone(), self.client);
        drop(self);
        shares.turn(client).await
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn").field("client", &self.client).field("number", &self.number).finish_non_exhaustive()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.client.is_member() {
            return;
        }
        let took = u64::try_from(self.began.elapsed().min(LAPSE).as_micros()).unwrap_or(0);
        self.shares.spent.fetch_add(took, Ordering::Relaxed);
        let next = self.shares.state().end(self.client, self.number);
        for (client, number, waiting) in next {
            // Who has left meanwhile gives it back at once.
            let _ = waiting.send(self.shares.given(client, number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: Client = Client::Address(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)));
    const MODEST: Client = Client::Address(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)));

    fn other_member() -> Client {
        Client::Member(MemberId::from_bytes([1; 16]))
    }

    /// Connections of one client that each ask for block after block.
    struct Crowd {
        client: Client,
        waiting: Vec<oneshot::Receiver<Turn>>,
    }

    impl Crowd {
        fn new(client: Client) -> Self {
            Self { client, waiting: Vec::new() }
        }

        fn ask(&mut self, shares: &Arc<Shares>, now: Instant, sending: &mut VecDeque<Turn>) {
            match shares.ask(self.client, now) {
                Ok(turn) => sending.push_back(turn),
                Err(coming) => self.waiting.push(coming),
            }
        }

        /// What was waited for and has come.
        fn come(&mut self, sending: &mut VecDeque<Turn>) {
            self.waiting.retain_mut(|coming| match coming.try_recv() {
                Ok(turn) => {
                    sending.push_back(turn);
                    false
                }
                Err(_) => true,
            });
        }
    }

    /// Blocks that each of two clients is sent of so many, by a member that sends one after the other; the first is at it alone before.
    fn sent(greedy: usize, modest: usize, blocks: usize) -> [usize; 2] {
        let shares = Arc::new(Shares::default());
        let now = Instant::now();
        let mut sending = VecDeque::new();
        let mut crowds = [(GREEDY, greedy), (MODEST, modest)].map(|(client, count)| (Crowd::new(client), count));
        for (crowd, count) in &mut crowds {
            for _ in 0..*count {
                crowd.ask(&shares, now, &mut sending);
            }
        }
        // What was under way when the second came is sent.
        let mut done = [0; 2];
        for number in 0..greedy + blocks {
            let turn = sending.pop_front().expect("nobody is sent anything");
            let at = usize::from(turn.client == MODEST);
            drop(turn);
            done[at] += usize::from(number >= greedy);
            // The connection asks for its next.
            crowds[at].0.ask(&shares, now, &mut sending);
            for (crowd, _) in &mut crowds {
                crowd.come(&mut sending);
            }
        }
        done
    }

    #[test]
    fn who_has_one_connection_gets_a_third_beside_any_number_and_two_get_half() {
        for greedy in [1, 2, 32, 1000] {
            let [most, one] = sent(greedy, 1, 3000);
            assert!(one >= 999, "{greedy} connections: {most}, one: {one}");
            let [most, two] = sent(greedy, 2, 3000);
            assert!(two >= 1499, "{greedy} connections: {most}, two: {two}");
        }
    }

    #[test]
    fn who_is_alone_is_not_held_and_company_that_left_is_forgotten() {
        let shares = Arc::new(Shares::default());
        let now = Instant::now();
        let alone: Vec<_> = (0..100).map_while(|_| shares.ask(GREEDY, now).ok()).collect();
        assert_eq!(alone.len(), 100);
        let other = shares.ask(MODEST, now).expect("it waits for the greedy one");
        assert!(shares.ask(GREEDY, now).is_err(), "it has a hundred, and somebody else has come");
        drop((alone, other));
        // Between two requests of the other one it is the same.
        let later = now + COMPANY / 2;
        let held: Vec<_> = (0..9).map_while(|_| shares.ask(GREEDY, later).ok()).collect();
        assert_eq!(held.len(), BESIDE_OTHERS);
        let later = now + COMPANY + COMPANY / 2;
        let held: Vec<_> = (0..9).map_while(|_| shares.ask(GREEDY, later).ok()).collect();
        assert_eq!(held.len(), 9);
    }

    #[test]
    fn connections_of_a_client_have_their_turns_in_order_and_who_left_is_passed_over() {
        let shares = Arc::new(Shares::default());
        let now = Instant::now();
        let _other = shares.ask(MODEST, now).expect("it is the first");
        let mut held: VecDeque<_> = (0..9).map_while(|_| shares.ask(GREEDY, now).ok()).collect();
        let [mut first, second, mut third] = [(); 3].map(|()| shares.ask(GREEDY, now).expect_err("it has two"));
        drop(second);
        drop(held.pop_front());
        let taken = first.try_recv().expect("it was the first to wait");
        assert!(third.try_recv().is_err());
        drop(taken);
        assert!(third.try_recv().is_ok());
    }

    #[test]
    fn a_client_that_takes_nothing_holds_nobody_off_and_itself_for_a_moment() {
        let shares = Arc::new(Shares::default());
        let now = Instant::now();
        let _other = shares.ask(MODEST, now).expect("it is the first");
        let _stuck = [(); BESIDE_OTHERS].map(|()| shares.ask(GREEDY, now).expect("it has less than two"));
        assert!(shares.ask(MODEST, now).is_ok());
        drop(shares.ask(GREEDY, now).expect_err("it has two"));
        let later = now + LAPSE;
        let _again = shares.ask(MODEST, later).expect("it has less than two");
        assert!(shares.ask(GREEDY, later).is_ok(), "what was taken up a second ago still counts");
    }

    #[test]
    fn members_come_when_no_node_has_a_turn() {
        let shares = Arc::new(Shares::default());
        let now = Instant::now();
        let first = shares.ask(other_member(), now);
        assert!(first.is_ok(), "nobody else is there");
        let nodes = [GREEDY, MODEST].map(|client| shares.ask(client, now).expect("members hold no node off"));
        let mut coming = shares.ask(other_member(), now).expect_err("nodes come first");
        let [one, two] = nodes;
        drop(one);
        assert!(coming.try_recv().is_err());
        drop(two);
        assert!(coming.try_recv().is_ok());
        drop((first, coming));
        let state = shares.state();
        assert!(state.clients.is_empty() && state.members.is_empty() && state.count == 0, "something is left");
    }

    #[test]
    fn time_is_counted_that_clients_take_and_not_members() {
        let shares = Arc::new(Shares::default());
        let mut turn = shares.ask(MODEST, Instant::now()).expect("it is the first");
        turn.began -= LAPSE / 2;
        drop(turn);
        let spent = shares.spent();
        assert!((LAPSE / 2..LAPSE).contains(&spent), "{spent:?}");
        // It took nothing for a long time.
        let mut turn = shares.ask(MODEST, Instant::now()).expect("nobody else is there");
        turn.began -= LAPSE * 9;
        drop(turn);
        assert_eq!(shares.spent(), spent + LAPSE);
        let mut turn = shares.ask(other_member(), Instant::now()).expect("nobody else is there");
        turn.began -= LAPSE;
        drop(turn);
        assert_eq!(shares.spent(), spent + LAPSE);
    }

    #[tokio::test]
    async fn whoever_waits_has_a_turn_in_the_end() {
        let shares = Arc::new(Shares::default());
        let _nodes = [MODEST, GREEDY, GREEDY].map(|client| shares.ask(client, Instant::now()).expect("first"));
        assert!(shares.ask(GREEDY, Instant::now()).is_err());
        // The others keep theirs: it is their time that lapses.
        drop((shares.turn(other_member()).await, shares.turn(GREEDY).await));
    }
}
