//! The states of a boot as data: what comes next, how long each may take, how often it is tried, and how it ends when it cannot.
//!
//! Nothing but [`TABLE`] and [`decide`] says when a boot retries, waits, or gives up; [`table_text`] prints it for the documentation.

use std::fmt::Write as _;
use std::time::Duration;

/// A state of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Reads the site bundle and the kernel command line, opens the identity.
    Start,
    /// PCR 15 is closed although the boot has just begun.
    Closed,
    /// Waits for network interfaces.
    Links,
    /// Waits for an address.
    Address,
    /// Looks for a member that answers.
    Member,
    /// Says which machine this is.
    Hello,
    /// Refused or not armed: asks again, patiently.
    Wait,
    /// Binds its identity.
    Enroll,
    /// Proves its identity.
    Session,
    /// Fetches the deploy document.
    Config,
    /// Takes the static addresses of the document in place of the ones it came by.
    Network,
    /// Makes host keys and has them certified.
    HostKeys,
    /// Runs the admin's `pre` scripts.
    Pre,
    /// Asks which image it boots, and for its key.
    Image,
    /// Starts the tether.
    Tether,
    /// Assembles the root file system.
    Root,
    /// Writes the node's own configuration into it.
    Render,
    /// Runs the admin's `post` scripts on it.
    Post,
    /// Closes the boot stage.
    Close,
    /// The root may be switched to.
    Done,
}

/// How often a state is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tries {
    /// So often, the first time included.
    Times(u32),
    /// For as long as it takes: nothing is lost by waiting, and somebody may mend the cause.
    ForEver,
}

/// What happens when the tries are used up, or at once when trying again cannot help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndAction {
    /// Goes back to an earlier state.
    Back(State),
    /// Closes the boot stage and gives control back to the initramfs, which shows a shell or reboots (`panic=`).
    Hold,
    /// Closes the boot stage and reboots.
    Reboot,
    /// The boot goes on in the new root.
    Ready,
}

/// The rules of a state.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Which.
    pub state: State,
    /// Its word on the console and in status reports.
    pub word: &'static str,
    /// What is done in it, for people.
    pub sentence: &'static str,
    /// States that may follow when it succeeds.
    pub next: &'static [State],
    /// How long one try may take.
    pub limit: Duration,
    /// How often it is tried.
    pub tries: Tries,
    /// The first and the longest pause between tries; it doubles between, with jitter.
    pub pause: (Duration, Duration),
    /// The end of it.
    pub end: EndAction,
}

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// All states, in the order of a boot without trouble.
#[rustfmt::skip]
pub const TABLE: &[Rule] = &[
    Rule { state: State::Start, word: "start", sentence: "reading the site bundle and opening the node's identity",
        next: &[State::Links, State::Closed], limit: s(60), tries: Tries::Times(2), pause: (s(1), s(1)), end: EndAction::Hold },
    Rule { state: State::Closed, word: "closed", sentence: "the TPM says that a boot stage was closed before: only a cold reboot opens it again",
        next: &[], limit: s(60), tries: Tries::Times(1), pause: (s(1), s(1)), end: EndAction::Hold },
    Rule { state: State::Links, word: "links", sentence: "bringing up the network interfaces",
        next: &[State::Address], limit: s(60), tries: Tries::ForEver, pause: (s(1), s(10)), end: EndAction::Hold },
    Rule { state: State::Address, word: "address", sentence: "waiting for an address on any interface",
        next: &[State::Member], limit: s(90), tries: Tries::ForEver, pause: (ms(100), s(5)), end: EndAction::Back(State::Links) },
    Rule { state: State::Member, word: "member", sentence: "looking for a member of the collective",
        next: &[State::Hello], limit: s(300), tries: Tries::Times(3), pause: (ms(500), s(4)), end: EndAction::Back(State::Address) },
    Rule { state: State::Hello, word: "hello", sentence: "asking who this machine is",
        next: &[State::Wait, State::Enroll, State::Session], limit: s(60), tries: Tries::Times(6), pause: (ms(500), s(10)), end: EndAction::Back(State::Member) },
    Rule { state: State::Wait, word: "wait", sentence: "waiting for the administrator",
        next: &[State::Enroll, State::Session], limit: s(60), tries: Tries::ForEver, pause: (s(2), s(10)), end: EndAction::Back(State::Hello) },
    Rule { state: State::Enroll, word: "enroll", sentence: "binding this machine's identity to the node",
        next: &[State::Session], limit: s(120), tries: Tries::Times(1), pause: (s(1), s(1)), end: EndAction::Back(State::Hello) },
    Rule { state: State::Session, word: "session", sentence: "proving this machine's identity",
        next: &[State::Config], limit: s(120), tries: Tries::Times(1), pause: (s(1), s(1)), end: EndAction::Back(State::Hello) },
    Rule { state: State::Config, word: "config", sentence: "fetching the node's configuration",
        next: &[State::Network, State::HostKeys], limit: s(60), tries: Tries::Times(4), pause: (ms(500), s(8)), end: EndAction::Back(State::Hello) },
    Rule { state: State::Network, word: "network", sentence: "taking the addresses of the node's configuration",
        next: &[State::HostKeys], limit: s(120), tries: Tries::Times(2), pause: (s(2), s(2)), end: EndAction::Back(State::Member) },
    Rule { state: State::HostKeys, word: "host-keys", sentence: "making SSH host keys and having them certified",
        next: &[State::Pre, State::Image], limit: s(60), tries: Tries::Times(4), pause: (ms(500), s(8)), end: EndAction::Back(State::Hello) },
    Rule { state: State::Pre, word: "pre", sentence: "running the scripts of phase 'pre'",
        next: &[State::Image], limit: s(3600), tries: Tries::Times(1), pause: (s(1), s(1)), end: EndAction::Hold },
    Rule { state: State::Image, word: "image", sentence: "asking for the image and its key",
        next: &[State::Tether], limit: s(60), tries: Tries::Times(6), pause: (ms(500), s(10)), end: EndAction::Back(State::Hello) },
    Rule { state: State::Tether, word: "mount", sentence: "opening the root image on its servers",
        next: &[State::Root], limit: s(3600), tries: Tries::Times(5), pause: (s(1), s(15)), end: EndAction::Hold },
    Rule { state: State::Root, word: "root", sentence: "assembling the root file system and its writable layer",
        next: &[State::Render], limit: s(3600), tries: Tries::Times(1), pause: (s(1), s(1)), end: EndAction::Hold },
    Rule { state: State::Render, word: "render", sentence: "writing the node's configuration into the root",
        next: &[State::Post, State::Close], limit: s(180), tries: Tries::Times(1), pause: (s(1), s(1)), end: EndAction::Hold },
    Rule { state: State::Post, word: "post", sentence: "running the scripts of phase 'post'",
        next: &[State::Close], limit: s(3600), tries: Tries::Times(1), pause: (s(1), s(1)), end: EndAction::Hold },
    Rule { state: State::Close, word: "switch-root", sentence: "closing the boot stage before the system starts",
        next: &[State::Done], limit: s(120), tries: Tries::Times(6), pause: (s(1), s(15)), end: EndAction::Reboot },
    Rule { state: State::Done, word: "done", sentence: "handing over to the system",
        next: &[], limit: s(10), tries: Tries::Times(1), pause: (s(1), s(1)), end: EndAction::Ready },
];

impl State {
    /// Its rules.
    #[must_use]
    pub fn rule(self) -> &'static Rule {
        // The test below shows that every state has its row at its own place.
        &TABLE[self as usize]
    }
}

/// What kind of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The same may succeed later.
    Again,
    /// The member refuses for now: ask again from `wait`.
    Refused,
    /// Token or connection are of no use any more: begin again with `hello`.
    Restart,
    /// Who has the image is away, and others are there: ask for the image again, and where it is, as long as it takes.
    Away,
    /// Trying again cannot help.
    Fatal,
}

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Goes to a state after a pause.
    Go(State, Duration),
    /// Ends the boot.
    End(EndAction),
}

/// Failures of a state since it last succeeded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Failures {
    /// All of them: the pauses grow with these.
    pub all: u32,
    /// Those that use up its tries.
    pub tries: u32,
}

impl Failures {
    /// One more. What waits for somebody or something else to come back is no try: however long an outage was, the state has all of its tries after it.
    pub fn count(&mut self, rule: &Rule, class: Class) {
        let is_try = match class {
            Class::Again | Class::Fatal => true,
            // Closing is tried on the spot whatever keeps it from that, and not for ever.
            Class::Restart => rule.end == EndAction::Reboot,
            Class::Refused | Class::Away => false,
        };
        self.all = self.all.saturating_add(1);
        self.tries = self.tries.saturating_add(u32::from(is_try));
    }
}

/// Decides after a failure of a state, which is counted. `jitter` is from 0 to 1.
#[must_use]
pub fn decide(rule: &Rule, failures: Failures, class: Class, jitter: f64) -> Decision {
    let pause = pause(rule.pause, failures.all, jitter);
    let exhausted = matches!(rule.tries, Tries::Times(times) if failures.tries >= times);
    match (class, rule.end) {
        // Every state that is refused goes round by `wait`, in its rhythm.
        (Class::Refused, _) => Decision::Go(State::Wait, self::pause(State::Wait.rule().pause, failures.all, jitter)),
        // Closing is the one thing that is not begun again from elsewhere.
        (Class::Restart, EndAction::Reboot) if exhausted => Decision::End(EndAction::Reboot),
        (Class::Restart, EndAction::Reboot) => Decision::Go(rule.state, pause),
        (Class::Restart, _) => Decision::Go(State::Hello, pause),
        // Not by `hello`: the scripts of phase `pre` have run.
        (Class::Away, _) => Decision::Go(State::Image, pause),
        (Class::Fatal, EndAction::Back(_)) => Decision::End(EndAction::Hold),
        (Class::Fatal, end) => Decision::End(end),
        (Class::Again, EndAction::Back(state)) if exhausted => Decision::Go(state, pause),
        (Class::Again, end) if exhausted => Decision::End(end),
        (Class::Again, _) => Decision::Go(rule.state, pause),
    }
}

/// Doubles from the first to the longest; between half of it and the whole, so that a thousand nodes do not come at once.
fn pause((first, longest): (Duration, Duration), attempt: u32, jitter: f64) -> Duration {
    let doubled = first.saturating_mul(1 << attempt.saturating_sub(1).min(16)).min(longest);
    doubled.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
}

/// The table as Markdown, for docs/.
#[must_use]
pub fn table_text() -> String {
    let mut out = String::from(
        "| State | What is done | Limit of a try | Tries | Pause between | Then | Followed by |\n|---|---|---|---|---|---|---|\n",
    );
    for rule in TABLE {
        let tries = match rule.tries {
            Tries::Times(1) => "once".to_owned(),
            Tries::Times(times) => times.to_string(),
            Tries::ForEver => "for ever".to_owned(),
        };
        let end = match rule.end {
            _ if rule.tries == Tries::ForEver => String::new(),
            EndAction::Back(state) => format!("back to `{}`", state.rule().word),
            EndAction::Hold => "hold".to_owned(),
            EndAction::Reboot => "reboot".to_owned(),
            EndAction::Ready => "switch root".to_owned(),
        };
        let next: Vec<String> = rule.next.iter().map(|state| format!("`{}`", state.rule().word)).collect();
        let (first, longest) = rule.pause;
        let pause = if rule.tries == Tries::Times(1) { String::new() } else { format!("{first:?} to {longest:?}") };
        let limit = rule.limit.as_secs();
        let _ = writeln!(
            out,
            "| `{}` | {} | {limit} s | {tries} | {pause} | {end} | {} |",
            rule.word,
            rule.sentence,
            next.join(", ")
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_state_has_one_row_at_its_place_and_a_word_of_its_own() {
        for (index, rule) in TABLE.iter().enumerate() {
            assert_eq!(rule.state as usize, index, "{:?}", rule.state);
            assert!(!rule.sentence.contains('\n') && !rule.limit.is_zero(), "{:?}", rule.state);
            assert!(rule.pause.0 <= rule.pause.1, "{:?}", rule.state);
        }
        let words: BTreeSet<&str> = TABLE.iter().map(|rule| rule.word).collect();
        assert_eq!(words.len(), TABLE.len());
        assert_eq!(TABLE.last().map(|rule| rule.state), Some(State::Done));
    }

    #[test]
    fn every_state_is_reached_and_leads_to_the_end() {
        let mut reached = BTreeSet::from([State::Start]);
        loop {
            let more: BTreeSet<State> = reached.iter().flat_map(|state| state.rule().next).copied().collect();
            let before = reached.len();
            reached.extend(more);
            if reached.len() == before {
                break;
            }
        }
        assert_eq!(reached.len(), TABLE.len());
        for rule in TABLE {
            assert_eq!(rule.next.is_empty(), matches!(rule.state, State::Done | State::Closed), "{:?}", rule.state);
            if let EndAction::Back(state) = rule.end {
                assert!(state < rule.state, "{:?} does not go back", rule.state);
            }
        }
    }

    type Check = Box<dyn Fn(Decision) -> bool>;

    #[test]
    fn what_follows_a_failure() {
        let go = |state: State| move |decision: Decision| matches!(decision, Decision::Go(to, _) if to == state);
        let after_seconds =
            |s: u64| move |decision: Decision| matches!(decision, Decision::Go(_, p) if p.as_secs() == s);
        let ends = |end: EndAction| move |decision: Decision| decision == Decision::End(end);
        let cases: Vec<(&str, State, u32, Class, Check)> = vec![
            ("a broken member is tried again", State::Member, 1, Class::Again, Box::new(go(State::Member))),
            ("then other addresses are waited for", State::Member, 3, Class::Again, Box::new(go(State::Address))),
            ("no address is no reason to give up", State::Address, 900, Class::Again, Box::new(go(State::Address))),
            ("not armed: wait", State::Hello, 1, Class::Refused, Box::new(go(State::Wait))),
            ("for as long as it takes", State::Wait, 9999, Class::Again, Box::new(go(State::Wait))),
            ("another TPM: wait", State::Session, 1, Class::Refused, Box::new(go(State::Wait))),
            ("in the rhythm of waiting", State::Session, 9, Class::Refused, Box::new(after_seconds(7))),
            ("a broken enrolment begins anew", State::Enroll, 1, Class::Again, Box::new(go(State::Hello))),
            ("an expired token begins anew", State::Image, 1, Class::Restart, Box::new(go(State::Hello))),
            ("a TPM that fails holds", State::Enroll, 1, Class::Fatal, Box::new(ends(EndAction::Hold))),
            ("a script that fails holds", State::Pre, 1, Class::Again, Box::new(ends(EndAction::Hold))),
            (
                "servers of an image that are away are waited for",
                State::Tether,
                99,
                Class::Away,
                Box::new(go(State::Image)),
            ),
            ("closing is tried again", State::Close, 1, Class::Again, Box::new(go(State::Close))),
            ("closing stays where it is", State::Close, 2, Class::Restart, Box::new(go(State::Close))),
            ("a stage that does not close reboots", State::Close, 6, Class::Again, Box::new(ends(EndAction::Reboot))),
            ("also at once", State::Close, 1, Class::Fatal, Box::new(ends(EndAction::Reboot))),
        ];
        for (name, state, attempt, class, check) in cases {
            let decision = decide(state.rule(), Failures { all: attempt, tries: attempt }, class, 0.5);
            assert!(check(decision), "{name}: {decision:?}");
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest_with_jitter() {
        let span = (Duration::from_secs(1), Duration::from_secs(10));
        let at = |attempt, jitter| pause(span, attempt, jitter).as_millis();
        assert_eq!([at(1, 1.0), at(2, 1.0), at(3, 1.0), at(5, 1.0), at(500, 1.0)], [1000, 2000, 4000, 10000, 10000]);
        assert_eq!([at(1, 0.0), at(1, 0.5)], [500, 750]);
    }

    /// `moor-agent states` prints what stands there.
    #[test]
    fn the_table_prints_itself_and_stands_in_the_documentation() {
        let text = table_text();
        assert_eq!(text.lines().count(), TABLE.len() + 2);
        let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/boot.md")).unwrap();
        assert!(document.contains(&text), "docs/boot.md has another table than this:\n{text}");
        assert!(
            text.contains(
                "| `wait` | waiting for the administrator | 60 s | for ever | 2s to 10s |  | `enroll`, `session` |"
            ),
            "{text}"
        );
    }
}
