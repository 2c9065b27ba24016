//! `SELinux` labels of an image, from the policy in its own tree: the machine that packs need not have `SELinux`, and its labels, if it
//! has any, are of another policy.

mod contexts;

use super::scan::Tree;
use crate::in_root;
use crate::inodes::{InodeIndex, Kind, XattrSet};
use anyhow::{Context as _, Result};
use contexts::Contexts;
use rustix::fs::FileType;
use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

const NAME: &std::ffi::CStr = c"security.selinux";
/// A large policy's `file_contexts` has 500 KB.
const LIMIT: u64 = 64 << 20;

/// What was labelled.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Labels {
    /// Name of the policy.
    pub policy: String,
    /// Inodes that have a label of it.
    pub labelled: u64,
    /// Inodes of which the policy says nothing: they keep what they had.
    pub others: u64,
}

/// Gives every inode the label that the tree's policy has for it. `None`: the tree has no policy, or `SELinux` is disabled in it.
pub(super) fn label(tree: &mut Tree, root: BorrowedFd<'_>) -> Result<Option<Labels>> {
    let Some(name) = policy(root)? else { return Ok(None) };
    let directory = format!("etc/selinux/{name}/contexts/files");
    let read = |end: &str| in_root::read(root, &format!("{directory}/file_contexts{end}"), LIMIT);
    let mut files = Vec::new();
    for end in ["", ".homedirs", ".local"] {
        if let Some(text) = read(end)? {
            files.push((format!("/{directory}/file_contexts{end}"), text));
        }
    }
    let (subs, dist) = (read(".subs")?.unwrap_or_default(), read(".subs_dist")?.unwrap_or_default());
    let contexts = Contexts::parse(&files, &subs, &dist).context("cannot read the tree's SELinux policy")?;

    let mut labeller = Labeller {
        sets: tree.xattrs.drain(..).zip(0..).collect(),
        done: vec![false; tree.inodes.len()],
        labels: Labels { policy: name, labelled: 0, others: 0 },
        by_label: HashMap::new(),
        old: Vec::new(),
    };
    labeller.old = vec![XattrSet::new(); labeller.sets.len()];
    for (set, index) in &labeller.sets {
        labeller.old[*index as usize].clone_from(set);
    }
    labeller.inode(tree, &contexts, InodeIndex(0), &mut b"/".to_vec())?;
    let mut sets: Vec<(XattrSet, u32)> = labeller.sets.into_iter().collect();
    sets.sort_unstable_by_key(|(_, index)| *index);
    tree.xattrs = sets.into_iter().map(|(set, _)| set).collect();
    Ok(Some(labeller.labels))
}

/// The name of the policy that the tree uses: that of its configuration, or the only one that is there.
fn policy(root: BorrowedFd<'_>) -> Result<Option<String>> {
    let config = in_root::read(root, "etc/selinux/config", LIMIT)?.unwrap_or_default();
    let setting = |key: &str| {
        config.lines().find_map(|line| Some(line.trim().strip_prefix(key)?.trim().strip_prefix('=')?.trim().to_owned()))
    };
    if setting("SELINUX").is_some_and(|mode| mode == "disabled") {
        return Ok(None);
    }
    let mut found = Vec::new();
    for name in in_root::list(root, "etc/selinux")? {
        if in_root::open(root, &format!("etc/selinux/{name}/contexts/files/file_contexts"))?.is_some() {
            found.push(name);
        }
    }
    Ok(match setting("SELINUXTYPE") {
        Some(name) => found.into_iter().find(|known| *known == name),
        None if found.len() == 1 => found.pop(),
        None => None,
    })
}

struct Labeller {
    sets: HashMap<XattrSet, u32>,
    old: Vec<XattrSet>,
    /// The new set of an old one with a label, so that sets are put together once.
    by_label: HashMap<(Option<u32>, Rc<str>), u32>,
    done: Vec<bool>,
    labels: Labels,
}

impl Labeller {
    /// Labels an inode by its first name, and all below it.
    fn inode(&mut self, tree: &mut Tree, contexts: &Contexts, index: InodeIndex, path: &mut Vec<u8>) -> Result<()> {
        let at = index.0 as usize;
        if std::mem::replace(&mut self.done[at], true) {
            return Ok(());
        }
        let kind = FileType::from_raw_mode(tree.inodes[at].mode);
        match contexts.lookup(path, kind)? {
            Some(label) => {
                tree.inodes[at].xattrs = Some(self.set(tree.inodes[at].xattrs, label));
                self.labels.labelled += 1;
            }
            None => self.labels.others += 1,
        }
        let Kind::Directory(entries) = &mut tree.inodes[at].kind else { return Ok(()) };
        let entries = std::mem::take(entries);
        for (name, child) in &entries {
            let length = path.len();
            if length > 1 {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            self.inode(tree, contexts, *child, path)?;
            path.truncate(length);
        }
        tree.inodes[at].kind = Kind::Directory(entries);
        Ok(())
    }

    /// The set `old` with this label.
    fn set(&mut self, old: Option<u32>, label: Rc<str>) -> u32 {
        if let Some(set) = self.by_label.get(&(old, Rc::clone(&label))) {
            return *set;
        }
        let mut set = old.map(|old| self.old[old as usize].clone()).unwrap_or_default();
        set.retain(|(name, _)| name.as_c_str() != NAME);
        // With a zero byte at its end, as setfilecon(3) writes it.
        set.push((NAME.to_owned(), [label.as_bytes(), &[0]].concat()));
        set.sort_unstable();
        let next = u32::try_from(self.sets.len()).unwrap_or(u32::MAX);
        let index = *self.sets.entry(set).or_insert(next);
        self.by_label.insert((old, label), index);
        index
    }
}
