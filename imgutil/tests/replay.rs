//! The fuzz corpora of this crate, replayed with mutations.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::pedantic)]

#[path = "../../tests/fuzz/entries/recipe.rs"]
mod recipe;
#[path = "../../tests/fuzz/replay.rs"]
mod replay;
#[path = "../../tests/fuzz/entries/squashfs.rs"]
mod squashfs;

#[test]
fn a_squashfs_of_any_kind_is_read_or_refused() {
    replay::replay("..", "squashfs", 10_000, squashfs::run);
}

#[test]
fn recipes_of_any_kind_are_read_or_refused() {
    replay::replay("..", "recipe", 10_000, recipe::run);
}
