//! Private keys in what a node sends: none that a person has put there gets into an image unless the user says so. What packages ship
//! (a test's key, an example) is public, and known by the sums that the node's package managers keep.

use super::node::Node;
use crate::scrub::{KEY_BOUND, KeyRules, OWNED_BOUND, Owned, ViewOptions};
use crate::tar::Piece;
use anyhow::{Context as _, Result};
use std::path::Path;

/// Looks at each file of a node, once for all of its file systems.
pub(super) struct Guard<'a> {
    rules: KeyRules,
    node: &'a Node,
    root: &'a str,
    /// Asked for when the first key is found: many nodes have none.
    owned: Option<Owned>,
}

/// A large file that is looked at while it passes.
pub(super) struct Look<'a> {
    path: &'a Path,
    /// Its first bytes; all of them, if it looks like a key and is not too large to be compared.
    start: Vec<u8>,
    what: Option<&'static str>,
    is_decided: bool,
}

impl<'a> Guard<'a> {
    /// Guards what comes from the system at `root` of a node.
    pub(super) fn new(node: &'a Node, root: &'a str, options: &ViewOptions) -> Result<Self> {
        Ok(Self { rules: KeyRules::new(options)?, node, root, owned: None })
    }

    /// Looks at a whole file.
    pub(super) fn look(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        match self.rules.suspect(path, bytes) {
            Some(what) => self.judge(path, what, bytes),
            None => Ok(()),
        }
    }

    /// Looks at a piece of a file, in order.
    pub(super) fn pass(&self, look: &mut Look<'_>, piece: Piece<'_>) {
        let rest = look.fill(piece, KEY_BOUND);
        if look.start.len() == KEY_BOUND {
            self.decide(look);
        }
        if let (Some(_), Some(rest)) = (look.what, rest) {
            look.fill(rest, usize::try_from(OWNED_BOUND).unwrap_or(usize::MAX));
        }
    }

    /// The file has passed.
    pub(super) fn passed(&mut self, mut look: Look<'_>) -> Result<()> {
        self.decide(&mut look);
        match look.what {
            Some(what) => self.judge(look.path, what, &look.start),
            None => Ok(()),
        }
    }

    fn decide(&self, look: &mut Look<'_>) {
        if !std::mem::replace(&mut look.is_decided, true) {
            look.what = self.rules.suspect(look.path, &look.start);
        }
    }

    fn judge(&mut self, path: &Path, what: &'static str, bytes: &[u8]) -> Result<()> {
        let owned = match self.owned.take() {
            Some(owned) => owned,
            None => self.node.package_sums(self.root).context("cannot learn which files came with packages")?,
        };
        if !owned.ships(path, bytes) {
            self.rules.refuse(path, what);
        }
        self.owned = Some(owned);
        Ok(())
    }

    /// See [`KeyRules::refuses`].
    pub(super) fn refuses(&self) -> bool {
        self.rules.refuses()
    }

    /// See [`KeyRules::finish`].
    pub(super) fn finish(self) -> Result<()> {
        self.rules.finish("the node")
    }
}

impl<'a> Look<'a> {
    /// At the file of this name.
    pub(super) fn at(path: &'a Path) -> Self {
        Self { path, start: Vec::new(), what: None, is_decided: false }
    }

    /// Keeps what there is room for up to `bound`. What is left over.
    fn fill<'b>(&mut self, piece: Piece<'b>, bound: usize) -> Option<Piece<'b>> {
        let room = bound.saturating_sub(self.start.len());
        match piece {
            Piece::Data(bytes) => {
                let (taken, rest) = bytes.split_at(bytes.len().min(room));
                self.start.extend_from_slice(taken);
                (!rest.is_empty()).then_some(Piece::Data(rest))
            }
            Piece::Hole(length) => {
                let taken = usize::try_from(length).unwrap_or(usize::MAX).min(room);
                self.start.resize(self.start.len() + taken, 0);
                let rest = length - taken as u64;
                (rest > 0).then_some(Piece::Hole(rest))
            }
        }
    }
}
