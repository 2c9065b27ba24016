//! How long a connection may go on that is asked for nothing. Who is a member, or has shown a node's token, keeps it between two heartbeats; who has
//! shown neither is sooner gone: anybody can open a connection.

use crate::http::{Connection, Peer};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Who has asked for nothing yet begins within this time after the handshake.
const FIRST: Duration = Duration::from_secs(20);
/// And asks again within this one, until it shows a token. A nonce is good for no longer.
const NEXT: Duration = Duration::from_mins(1);

/// When a connection was asked for something last.
#[derive(Debug)]
pub(crate) struct Asked {
    begun: Instant,
    /// Milliseconds since then, and one; 0: never.
    last: AtomicU64,
    /// Milliseconds that it has from then on.
    patience: AtomicU64,
}

/// What is to become of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is looked at again then.
    Until(Instant),
    /// It was never asked for anything: nothing is lost with it.
    Ends,
    /// It takes no more requests.
    AsksNoMore,
    /// It stays as long as its protocol lets it.
    Stays,
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Default for Asked {
    fn default() -> Self {
        Self { begun: Instant::now(), last: AtomicU64::new(0), patience: AtomicU64::new(milliseconds(NEXT)) }
    }
}

impl Asked {
    /// It is asked for something now.
    pub(crate) fn note(&self) {
        self.last.store(milliseconds(self.begun.elapsed()).saturating_add(1), Ordering::Relaxed);
    }

    /// It has so long for what it asks for next, if that is longer than others have.
    pub(crate) fn wait(&self, time: Duration) {
        self.patience.fetch_max(milliseconds(time), Ordering::Relaxed);
    }

    fn verdict(&self, now: Instant, is_known: bool) -> Verdict {
        if is_known {
            return Verdict::Stays;
        }
        let (until, end) = match self.last.load(Ordering::Relaxed) {
            0 => (self.begun + FIRST, Verdict::Ends),
            last => {
                let patience = Duration::from_millis(self.patience.load(Ordering::Relaxed));
                (self.begun + Duration::from_millis(last) + patience, Verdict::AsksNoMore)
            }
        };
        if now < until { Verdict::Until(until) } else { end }
    }
}

/// What is to become of this connection now.
pub(crate) fn verdict(connection: &Connection) -> Verdict {
    let is_known = match connection.peer {
        Peer::Tls { member: Some(Ok(_)), .. } | Peer::Socket { .. } => true,
        Peer::Tls { .. } => connection.token.is_some(),
    };
    connection.asked.verdict(Instant::now(), is_known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_nothing_goes_and_who_has_shown_a_token_stays() {
        let asked = Asked::default();
        let begun = asked.begun;
        assert_eq!(asked.verdict(begun, false), Verdict::Until(begun + FIRST));
        assert_eq!(asked.verdict(begun + FIRST, false), Verdict::Ends);
        assert_eq!(asked.verdict(begun + FIRST, true), Verdict::Stays);
        asked.note();
        let Verdict::Until(until) = asked.verdict(begun + FIRST, false) else { panic!("it has asked") };
        assert!(until >= begun + NEXT && until < begun + NEXT + FIRST);
        assert_eq!(asked.verdict(until, false), Verdict::AsksNoMore);
        assert_eq!(asked.verdict(until, true), Verdict::Stays);
        // A TPM takes its time.
        asked.wait(NEXT * 2);
        assert_eq!(asked.verdict(until, false), Verdict::Until(until + NEXT));
        asked.wait(Duration::ZERO);
        assert_eq!(asked.verdict(until, false), Verdict::Until(until + NEXT));
    }
}
