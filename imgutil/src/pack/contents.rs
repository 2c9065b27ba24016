//! Stores the contents of a scanned tree's files, each different content once. A thread of its own reads them ahead of the
//! compression ([`super::read`]).

use super::read::{Batch, Op, Reading};
use super::scan::Tree;
use crate::progress::Progress;
use crate::scrub::KeyGuard;
use crate::squashfs::{ContentId, DataWriter};
use anyhow::{Context as _, Result, bail};
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::sync::mpsc;

/// Batches that wait to be compressed, of 1 MiB each: so much bridges a disk that is slow for a while.
const AHEAD: usize = 12;

/// Stores the contents of all regular files, in the order of the tree. Fails if `guard` finds a private key.
pub(super) fn store<W: Write>(
    tree: &Tree,
    root: BorrowedFd<'_>,
    guard: Option<KeyGuard<'_>>,
    writer: &mut DataWriter<W>,
    progress: &Progress,
) -> Result<Vec<Option<ContentId>>> {
    let (batches, incoming) = mpsc::sync_channel(AHEAD);
    let (used, reuse) = mpsc::channel();
    let mut store = Store { tree, writer, progress, contents: vec![None; tree.inodes.len()], zeros: vec![0; 1 << 17] };
    std::thread::scope(|scope| {
        let reading = Reading::new(tree, guard, batches, reuse);
        let reader = std::thread::Builder::new()
            .name("read-ahead".into())
            .spawn_scoped(scope, move || reading.run(root))
            .context("cannot start the thread that reads ahead")?;
        let mut stored = Ok(());
        for batch in &incoming {
            stored = store.batch(&batch);
            if stored.is_err() {
                break;
            }
            // The reader may have ended already: then nobody wants the buffer.
            let _ = used.send(batch);
        }
        drop(incoming); // a reader that waits for room ends
        let read = reader.join().map_err(|_| anyhow::anyhow!("the thread that reads ahead failed"))?;
        stored?;
        read
    })?;
    Ok(store.contents)
}

struct Store<'a, W: Write> {
    tree: &'a Tree,
    writer: &'a mut DataWriter<W>,
    progress: &'a Progress,
    contents: Vec<Option<ContentId>>,
    zeros: Vec<u8>,
}

impl<W: Write> Store<'_, W> {
    fn batch(&mut self, batch: &Batch) -> Result<()> {
        for op in &batch.ops {
            match op {
                Op::Begin(index) => {
                    let content = self.writer.begin_file(self.tree.size(*index))?;
                    self.contents[index.0 as usize] = Some(content);
                }
                Op::Data(range) => self.writer.append(&batch.bytes[range.clone()])?,
                Op::Zeros(length) => {
                    let mut rest = *length;
                    while rest > 0 {
                        let step = usize::try_from(rest.min(self.zeros.len() as u64))?;
                        self.writer.append(&self.zeros[..step])?;
                        rest -= step as u64;
                    }
                }
                Op::End(index) => {
                    self.writer.end_file()?;
                    self.progress.advance(self.tree.size(*index));
                }
                Op::Same(index, other) => {
                    let Some(content) = self.contents[other.0 as usize] else {
                        bail!("a file shares a content that was not stored");
                    };
                    self.contents[index.0 as usize] = Some(content);
                    self.progress.advance(self.tree.size(*index));
                }
            }
        }
        Ok(())
    }
}
