//! Chunks that earlier boots read, fetched before anybody asks: in their order, and never far beyond what this boot has read of them.

use std::collections::HashSet;
use std::ops::Range;

/// Within so many chunks, order counts less than that neighbours come in one range.
const WINDOW: usize = 8;

pub(super) struct Prefetch {
    list: Vec<u64>,
    next: usize,
    /// Chunks of the list that were not read yet.
    unread: HashSet<u64>,
    /// How many may be fetched and unread: they have to fit into the cache beside what is read without a list.
    most: usize,
}

impl Prefetch {
    /// `chunks`: how many the image has. `cache`: how many the cache holds.
    pub(super) fn new(list: &[u64], chunks: u64, cache: u64) -> Self {
        let mut unread = HashSet::new();
        let mut list: Vec<_> = list.iter().copied().filter(|chunk| *chunk < chunks && unread.insert(*chunk)).collect();
        for window in list.chunks_mut(WINDOW) {
            window.sort_unstable();
        }
        Self { list, next: 0, unread, most: usize::try_from(cache / 2).unwrap_or(usize::MAX) }
    }

    /// Whether there is anything to prefetch at all.
    pub(super) fn has_list(&self) -> bool {
        !self.list.is_empty()
    }

    /// Somebody wants chunks `first` to `last`.
    pub(super) fn wanted(&mut self, first: u64, last: u64) {
        if !self.unread.is_empty() {
            for chunk in first..=last {
                self.unread.remove(&chunk);
            }
        }
    }

    /// The next chunks to fetch, neighbours and at most so many.
    pub(super) fn take(&mut self, most: u64) -> Option<Range<u64>> {
        let read = self.list.len() - self.unread.len();
        let limit = read.saturating_add(self.most).min(self.list.len());
        while self.list.get(self.next).is_some_and(|chunk| !self.unread.contains(chunk)) {
            self.next += 1;
        }
        if most == 0 || self.next >= limit {
            return None;
        }
        let first = self.list[self.next];
        let mut end = first;
        while self.next < limit && self.list[self.next] == end && self.unread.contains(&end) && end - first < most {
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
}
