//! The table of leaf hashes: fetched page by page, verified, and held within a bound. A page covers 2,048 chunks.

use moor_image::LeafPage;
use std::sync::Arc;

/// Pages held: 2 MiB, enough for 4 GiB of image at the default chunk size.
const PAGES: usize = 32;

pub(super) struct Table {
    /// The page that was used last stands at the end.
    pages: Vec<Arc<LeafPage>>,
}

impl Table {
    pub(super) fn new() -> Self {
        Self { pages: Vec::with_capacity(PAGES) }
    }

    pub(super) fn get(&mut self, index: u64) -> Option<Arc<LeafPage>> {
        let at = self.pages.iter().position(|page| page.index() == index)?;
        let page = self.pages.remove(at);
        self.pages.push(page.clone());
        Some(page)
    }

    pub(super) fn insert(&mut self, page: Arc<LeafPage>) {
        if self.pages.iter().any(|held| held.index() == page.index()) {
            return;
        }
        if self.pages.len() >= PAGES {
            self.pages.remove(0);
        }
        self.pages.push(page);
    }
}
