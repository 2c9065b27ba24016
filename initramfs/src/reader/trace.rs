//! What a boot reads: two boots of one generation read the same chunks, so what the first one wrote down is fetched ahead in the next.

use moor_image::Verifier;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::time::Duration;

/// How long it is written down.
const LASTS: Duration = Duration::from_mins(2);
/// Most chunks: 64 times what a boot reads, and still no burden.
const MOST: usize = 20_000;

/// The chunks that were read, in the order of their first read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Digest of the image.
    pub digest: String,
    /// Bytes of a chunk.
    pub chunk_size: u64,
    /// Chunk, and milliseconds since the image was opened.
    pub reads: Vec<(u64, u32)>,
    /// Whether nothing more will be added.
    pub is_whole: bool,
}

/// Writes it.
pub(super) struct Recorder {
    begun: Duration,
    seen: HashSet<u64>,
    reads: Vec<(u64, u32)>,
}

impl Recorder {
    pub(super) fn new(begun: Duration) -> Self {
        Self { begun, seen: HashSet::new(), reads: Vec::new() }
    }

    /// Somebody wants chunks `first` to `last`.
    pub(super) fn wanted(&mut self, first: u64, last: u64, now: Duration) {
        let since = now.saturating_sub(self.begun);
        if since > LASTS {
            // The set has served; the list may still be asked for.
            self.seen = HashSet::new();
            return;
        }
        for chunk in first..=last {
            if self.reads.len() < MOST && self.seen.insert(chunk) {
                self.reads.push((chunk, u32::try_from(since.as_millis()).unwrap_or(u32::MAX)));
            }
        }
    }

    pub(super) fn trace(&self, verifier: &Verifier, now: Duration) -> Trace {
        let header = verifier.header();
        Trace {
            digest: hex::encode(header.digest()),
            chunk_size: header.chunk_size(),
            reads: self.reads.clone(),
            is_whole: now.saturating_sub(self.begun) > LASTS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_reads_count_and_only_for_two_minutes() {
        let mut recorder = Recorder::new(Duration::from_secs(5));
        recorder.wanted(3, 4, Duration::from_secs(6));
        recorder.wanted(4, 5, Duration::from_secs(7));
        recorder.wanted(9, 9, Duration::from_secs(126));
        assert_eq!(recorder.reads, [(3, 1000), (4, 1000), (5, 2000)]);
    }
}
