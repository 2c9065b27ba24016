//! A boot that stands still: the node was refused, and asks again for as long as it takes (docs/boot.md). On a site somebody mends the
//! cause and the boot goes on; in a test nobody does, so that the reason is known long before the time is over.

use moor_api::admin::{Refusal, StatusEvent};
use std::time::{Duration, Instant};

/// The state of a node that was refused.
const WAITING: &str = "wait";
/// For so long a node has to have come no further. One that was sent away by the second server, which does not know that it has enrolled,
/// is back at the first one before that, in emulation too.
const PATIENCE: Duration = Duration::from_secs(45);

/// Watches a boot.
#[derive(Debug, Default)]
pub(super) struct Standstill {
    /// Since when, and how many states the node had reported then.
    since: Option<(Instant, usize)>,
}

impl Standstill {
    /// Takes what is known at `now`: states in order, refusals newest first. The reason once the node has stood still for too long.
    pub(super) fn look(&mut self, states: &[StatusEvent], refusals: &[Refusal], now: Instant) -> Option<String> {
        let Some(reason) = reason(states, refusals) else {
            self.since = None;
            return None;
        };
        match self.since {
            Some((since, count)) if count == states.len() => (now.duration_since(since) >= PATIENCE).then_some(reason),
            _ => {
                self.since = Some((now, states.len()));
                None
            }
        }
    }
}

/// Why the node waits, if it does.
fn reason(states: &[StatusEvent], refusals: &[Refusal]) -> Option<String> {
    let last = states.last();
    // Without a token it cannot say that it waits; the server knows whom it refused.
    let refusal = refusals.first().filter(|refusal| last.is_none_or(|last| refusal.time_ms > last.time_ms));
    // The reason is reported first, the state itself behind it.
    let waits = states.iter().rev().take_while(|event| event.state == WAITING).last();
    waits.map(|event| event.detail.clone()).or_else(|| refusal.map(|refusal| refusal.problem.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::problem::{Code, Problem};

    fn states(words: &[(&str, &str)]) -> Vec<StatusEvent> {
        let event = |(time, (state, detail)): (u64, &(&str, &str))| StatusEvent {
            node: "test-node".parse().expect("a name"),
            boot: None,
            state: (*state).to_owned(),
            detail: (*detail).to_owned(),
            time_ms: time * 1000,
            uptime_ms: 0,
            figures: std::collections::BTreeMap::new(),
        };
        (1..).zip(words).map(event).collect()
    }

    fn refusal(time_ms: u64) -> Refusal {
        Refusal {
            time_ms,
            peer: "127.0.0.1:1".into(),
            call: "hello".into(),
            uuid: None,
            macs: Vec::new(),
            problem: Problem::new(Code::NotArmed, "it is not armed"),
            count: 1,
        }
    }

    /// What is said after standing still for long enough.
    fn verdict(states: &[StatusEvent], refusals: &[Refusal]) -> Option<String> {
        let (mut standstill, begin) = (Standstill::default(), Instant::now());
        assert_eq!(standstill.look(states, refusals, begin), None);
        assert_eq!(standstill.look(states, refusals, begin + PATIENCE / 2), None);
        standstill.look(states, refusals, begin + PATIENCE)
    }

    #[test]
    fn a_node_that_waits_says_why() {
        let refused = [("mount", "opening"), ("wait", "no signature"), ("wait", "waiting for the administrator")];
        for (name, states, refusals, expected) in [
            ("nothing was heard", states(&[]), vec![], None),
            ("refused before it has a token", states(&[]), vec![refusal(7)], Some("it is not armed")),
            ("it says so itself", states(&refused), vec![], Some("no signature")),
            ("refused after its last word", states(&refused[..1]), vec![refusal(1001)], Some("it is not armed")),
            ("refused once, and went on", states(&refused[..1]), vec![refusal(999)], None),
            ("slow", states(&[("wait", "no signature"), ("root", "assembling")]), vec![], None),
        ] {
            assert_eq!(verdict(&states, &refusals).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn whoever_goes_on_has_all_the_time_again() {
        let (mut standstill, begin) = (Standstill::default(), Instant::now());
        let (first, more) = (states(&[("wait", "a")]), states(&[("wait", "a"), ("image", "b"), ("wait", "a")]));
        assert_eq!(standstill.look(&first, &[], begin), None);
        assert_eq!(standstill.look(&more, &[], begin + PATIENCE), None);
        assert_eq!(standstill.look(&more[..2], &[], begin + PATIENCE * 2), None);
        assert_eq!(standstill.look(&more, &[], begin + PATIENCE * 3), None);
        assert_eq!(standstill.look(&more, &[], begin + PATIENCE * 4).as_deref(), Some("a"));
    }
}
