//! Where the tests that draw their faults take the seed from; part of each of them by `#[path]`.

/// A number from the environment.
pub(crate) fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse().ok();
    assert!(number.is_some(), "{variable} is no number: '{text}'");
    number
}

/// `MOOR_SEED`, or else one taken from the commit, so that every commit tries others.
pub(crate) fn first_seed() -> u64 {
    number("MOOR_SEED").unwrap_or_else(|| {
        let head = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output();
        // A tree that is no repository has a seed as well: it is printed like every other.
        let text = head.map(|head| head.stdout).unwrap_or_default();
        text.iter().fold(0, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add((*byte).into())) % 1_000_000_000
    })
}
