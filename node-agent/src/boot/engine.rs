//! Runs the table of [`super::states`]: one state after the other, each within its limit, failures as [`decide`] says.

use super::states::{Class, Decision, EndAction, Failures, State, decide};
use std::collections::BTreeMap;
use std::time::Duration;

/// A state failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// What kind.
    pub(super) class: Class,
    /// Why, in one line, with what to do where that is known.
    pub(super) reason: String,
}

#[expect(clippy::needless_pass_by_value, reason = "so that it can stand in `map_err(Fault::again)`")]
impl Fault {
    /// The same may succeed later.
    pub(super) fn again(reason: impl ToString) -> Self {
        Self { class: Class::Again, reason: reason.to_string() }
    }

    /// Who has the image is away.
    pub(super) fn away(reason: impl ToString) -> Self {
        Self { class: Class::Away, reason: reason.to_string() }
    }

    /// Trying again cannot help.
    pub(super) fn fatal(reason: impl ToString) -> Self {
        Self { class: Class::Fatal, reason: reason.to_string() }
    }

    /// The member refuses for now.
    pub(super) fn refused(reason: impl ToString) -> Self {
        Self { class: Class::Refused, reason: reason.to_string() }
    }

    /// A new session is due.
    pub(super) fn restart(reason: impl ToString) -> Self {
        Self { class: Class::Restart, reason: reason.to_string() }
    }
}

/// What the table is run on: the real machine, or a test's.
pub(super) trait Machine {
    /// Does what the state is for; returns the state that follows.
    async fn step(&mut self, state: State) -> Result<State, Fault>;
    /// A state begins.
    async fn entered(&mut self, state: State);
    /// A state failed, and this follows.
    async fn failed(&mut self, state: State, fault: &Fault, decision: Decision);
    /// Waits.
    async fn pause(&mut self, pause: Duration);
    /// A random number from 0 to 1.
    fn jitter(&mut self) -> f64;
}

/// Runs from [`State::Start`] to an end, and returns the end with the reason when it is not [`EndAction::Ready`].
pub(super) async fn run(machine: &mut impl Machine) -> (EndAction, String) {
    let mut state = State::Start;
    let mut failures: BTreeMap<State, Failures> = BTreeMap::new();
    loop {
        let rule = state.rule();
        machine.entered(state).await;
        let result = tokio::time::timeout(rule.limit, machine.step(state)).await;
        let fault = match result {
            Ok(Ok(_)) if state == State::Done => return (rule.end, String::new()),
            Ok(Ok(next)) if rule.next.contains(&next) => {
                failures.remove(&state);
                state = next;
                continue;
            }
            Ok(Ok(next)) => Fault::fatal(format!("'{}' does not lead to '{}'", rule.word, next.rule().word)),
            Ok(Err(fault)) => fault,
            Err(_) => Fault::again(format!("{}: not within {} s", rule.sentence, rule.limit.as_secs())),
        };
        let failures_here = failures.entry(state).or_default();
        failures_here.count(rule, fault.class);
        let decision = decide(rule, *failures_here, fault.class, machine.jitter());
        machine.failed(state, &fault, decision).await;
        match decision {
            Decision::Go(next, pause) => {
                if next != state && fault.class == Class::Again {
                    // The tries are used up; when it comes back here, it has all of them again.
                    failures.remove(&state);
                }
                machine.pause(pause).await;
                state = next;
            }
            Decision::End(end) => return (end, fault.reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Succeeds on the shortest way; fails as `faults` says, each once, in order.
    struct Scripted {
        faults: Vec<(State, Fault)>,
        seen: Vec<State>,
        paused: Duration,
    }

    impl Machine for Scripted {
        async fn step(&mut self, state: State) -> Result<State, Fault> {
            if self.faults.first().is_some_and(|(at, _)| *at == state) {
                return Err(self.faults.remove(0).1);
            }
            Ok(match state {
                State::Hello | State::Wait => State::Session,
                State::Done => State::Done,
                other => other.rule().next[0],
            })
        }

        async fn entered(&mut self, state: State) {
            self.seen.push(state);
        }

        async fn failed(&mut self, _: State, _: &Fault, _: Decision) {}

        async fn pause(&mut self, pause: Duration) {
            self.paused += pause;
        }

        fn jitter(&mut self) -> f64 {
            1.0
        }
    }

    async fn play(faults: Vec<(State, Fault)>) -> (EndAction, String, Scripted) {
        let mut machine = Scripted { faults, seen: Vec::new(), paused: Duration::ZERO };
        let (end, reason) = run(&mut machine).await;
        (end, reason, machine)
    }

    #[tokio::test]
    async fn a_boot_without_trouble_pauses_nowhere() {
        let (end, _, machine) = play(vec![]).await;
        assert_eq!((end, machine.paused), (EndAction::Ready, Duration::ZERO));
        assert_eq!(machine.seen.len(), 17);
    }

    #[tokio::test]
    async fn an_unarmed_node_waits_and_the_same_boot_goes_on() {
        let refused = || Fault::refused("not armed");
        let mut faults = vec![(State::Hello, refused())];
        faults.extend((0..50).map(|_| (State::Wait, refused())));
        let (end, _, machine) = play(faults).await;
        assert_eq!(end, EndAction::Ready);
        assert_eq!(machine.seen.iter().filter(|state| **state == State::Wait).count(), 51);
        assert!(machine.paused > Duration::from_secs(400), "{:?}", machine.paused);
    }

    #[tokio::test]
    async fn tries_that_are_used_up_end_or_go_back() {
        let (end, reason, _) = play(vec![(State::Post, Fault::again("script 'x' failed"))]).await;
        assert_eq!((end, reason.as_str()), (EndAction::Hold, "script 'x' failed"));
        let (end, _, machine) = play((0..3).map(|_| (State::Member, Fault::again("no answer"))).collect()).await;
        assert_eq!(end, EndAction::Ready);
        assert_eq!(machine.seen.iter().filter(|state| **state == State::Address).count(), 2);
        let (end, _, _) = play((0..6).map(|_| (State::Close, Fault::again("no member"))).collect()).await;
        assert_eq!(end, EndAction::Reboot);
    }

    #[tokio::test]
    async fn an_outage_of_the_image_is_waited_out_and_uses_no_try_up() {
        let mut faults: Vec<_> = (0..40).map(|_| (State::Tether, Fault::away("503"))).collect();
        faults.extend((0..40).map(|_| (State::Tether, Fault::restart("no member"))));
        faults.extend((0..4).map(|_| (State::Tether, Fault::again("broken"))));
        let (end, _, machine) = play(faults.clone()).await;
        assert_eq!(end, EndAction::Ready);
        assert_eq!(
            machine.seen.iter().filter(|state| **state == State::Pre).count(),
            41,
            "by hello where no member is"
        );
        // Nobody is asked all the time.
        assert!(machine.paused > Duration::from_mins(15), "{:?}", machine.paused);
        faults.push((State::Tether, Fault::again("broken")));
        let (end, reason, _) = play(faults).await;
        assert_eq!((end, reason.as_str()), (EndAction::Hold, "broken"));
    }

    #[tokio::test]
    async fn a_fatal_fault_ends_at_once() {
        let (end, _, machine) = play(vec![(State::Start, Fault::fatal("no site bundle"))]).await;
        assert_eq!((end, machine.seen.len()), (EndAction::Hold, 1));
    }
}
