//! The fuzz corpora of this crate, replayed with mutations.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::pedantic)]

#[path = "../../../tests/fuzz/entries/image.rs"]
mod image;
#[path = "../../../tests/fuzz/entries/metadata.rs"]
mod metadata;
#[path = "../../../tests/fuzz/replay.rs"]
mod replay;

#[test]
fn images_of_any_kind_are_read_or_refused() {
    replay::replay("../..", "image", 20_000, image::run);
}

#[test]
fn texts_of_any_kind_are_read_or_refused() {
    replay::replay("../..", "metadata", 50_000, metadata::run);
}
