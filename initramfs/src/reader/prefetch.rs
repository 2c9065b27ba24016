//! Chunks that earlier boots read, fetched before anybody asks: in their order, and never far beyond what this boot has read of them.

use std::collections::HashMap;
use std::ops::Range;

/// Within so many chunks, order counts less than that neighbours come in one range.
const WINDOW: usize = 8;
/// How far is looked where neighbours on the list end: nobody reads ahead further.
const FURTHEST: u64 = 1024;

pub(super) struct Prefetch {
    list: Vec<u64>,
    next: usize,
    /// The chunks of the list, and whether each was not read yet.
    chunks: HashMap<u64, bool>,
    /// How many of them were read.
    read: usize,
    /// How many may be fetched and unread: they have to fit into the cache beside what is read without a list.
    most: usize,
}

impl Prefetch {
    /// `chunks`: how many the image has. `cache`: how many the cache holds.
    pub(super) fn new(list: &[u64], chunks: u64, cache: u64) -> Self {
        let mut known = HashMap::new();
        let mut is_new = |chunk: u64| chunk < chunks && known.insert(chunk, true).is_none();
        let mut list: Vec<_> = list.iter().copied().filter(|chunk| is_new(*chunk)).collect();
        for window in list.chunks_mut(WINDOW) {
            window.sort_unstable();
        }
        Self { list, next: 0, chunks: known, read: 0, most: usize::try_from(cache / 2).unwrap_or(usize::MAX) }
    }

    /// Whether there is anything to prefetch at all.
    pub(super) fn has_list(&self) -> bool {
        !self.list.is_empty()
    }

    /// Somebody wants chunks `first` to `last`.
    pub(super) fn wanted(&mut self, first: u64, last: u64) {
        if self.read == self.list.len() {
            return;
        }
        for chunk in first..=last {
            if let Some(is_unread) = self.chunks.get_mut(&chunk)
                && std::mem::take(is_unread)
            {
                self.read += 1;
            }
        }
    }

    /// Whether a chunk is on the list and was not read yet.
    pub(super) fn expects(&self, chunk: u64) -> bool {
        self.chunks.get(&chunk).is_some_and(|is_unread| *is_unread)
    }

    /// Where a guess has to end that somebody who wants chunks `first` to `last` goes on: if all of them are on the list, it says how far
    /// earlier boots went on from there. `None`: it says nothing.
    pub(super) fn end(&self, first: u64, last: u64) -> Option<u64> {
        let is_listed = |chunk: u64| self.chunks.contains_key(&chunk);
        if !(first..=last).all(is_listed) {
            return None;
        }
        let mut end = last + 1;
        while end - last < FURTHEST && is_listed(end) {
            end += 1;
        }
        Some(end)
    }

    /// The next chunks to fetch, neighbours and at most so many.
    pub(super) fn take(&mut self, most: u64) -> Option<Range<u64>> {
        let limit = self.read.saturating_add(self.most).min(self.list.len());
        while self.list.get(self.next).is_some_and(|chunk| !self.expects(*chunk)) {
            self.next += 1;
        }
        if most == 0 || self.next >= limit {
            return None;
        }
        let first = self.list[self.next];
        let mut end = first;
        while self.next < limit && self.list[self.next] == end && self.expects(end) && end - first < most {
            end += 1;
            self.next += 1;
        }
        Some(first..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_come_together_and_no_more_than_the_cache_holds() {
        let mut prefetch = Prefetch::new(&[7, 5, 6, 100, 5, 2, 999], 200, 8);
        assert_eq!(prefetch.take(16), Some(2..3));
        assert_eq!(prefetch.take(2), Some(5..7));
        assert_eq!(prefetch.take(0), None);
        assert_eq!(prefetch.take(16), Some(7..8));
        assert_eq!(prefetch.take(16), None, "four are there and unread");
        prefetch.wanted(1, 2);
        assert_eq!(prefetch.take(16), Some(100..101));
        assert_eq!(prefetch.take(16), None);
    }

    #[test]
    fn what_was_read_already_is_passed_over() {
        let mut prefetch = Prefetch::new(&[1, 2, 3, 4], 200, 100);
        prefetch.wanted(0, 1);
        prefetch.wanted(3, 3);
        assert_eq!(prefetch.take(16), Some(2..3));
        assert_eq!(prefetch.take(16), Some(4..5));
        assert_eq!(prefetch.take(16), None);
    }
    #[test]
    fn the_list_says_how_far_earlier_boots_went_on() {
        let mut prefetch = Prefetch::new(&[5, 6, 7, 20], 200, 100);
        assert_eq!(prefetch.end(5, 5), Some(8));
        assert_eq!(prefetch.end(6, 7), Some(8));
        assert_eq!((prefetch.end(7, 8), prefetch.end(4, 5), prefetch.end(30, 30)), (None, None, None));
        assert_eq!(Prefetch::new(&[], 200, 100).end(5, 5), None);
        assert!(prefetch.expects(5) && !prefetch.expects(8));
        prefetch.wanted(4, 6);
        assert!(!prefetch.expects(5) && prefetch.expects(7));
        assert_eq!(prefetch.end(5, 5), Some(8), "it was read, and stays on the list");
    }
}
