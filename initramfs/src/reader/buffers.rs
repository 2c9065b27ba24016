//! Buffers of one chunk, used again and again: memory that goes back to the kernel after each chunk comes from it once more, page by page,
//! and each page is cleared first.

use bytes::Bytes;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Buffers that are kept: 2 MiB at the default chunk size.
const KEPT: usize = 32;
/// The same while memory is short: what a single reader in a row uses in turn.
const KEPT_WHEN_SHORT: usize = 4;

/// The buffers that nobody uses. Each keeps its bytes and its length: whoever gets it writes over all of it, and to clear it first would cost.
#[derive(Clone)]
pub(super) struct Buffers(Arc<Shared>);

struct Shared {
    size: usize,
    kept: AtomicUsize,
    spare: Mutex<Vec<Vec<u8>>>,
}

/// A buffer that is part of [`Bytes`]; it comes back with the last of them.
struct Used {
    buffer: Vec<u8>,
    shared: Arc<Shared>,
}

impl AsRef<[u8]> for Used {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        self.shared.give(std::mem::take(&mut self.buffer));
    }
}

impl Shared {
    fn spare(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, buffer: Vec<u8>) {
        if buffer.capacity() != self.size {
            return;
        }
        let mut spare = self.spare();
        if spare.len() < self.kept.load(Ordering::Relaxed) {
            spare.push(buffer);
        }
    }
}

impl Buffers {
    /// Of `size` bytes.
    pub(super) fn new(size: usize) -> Self {
        Self(Arc::new(Shared { size, kept: KEPT.into(), spare: Mutex::new(Vec::with_capacity(KEPT)) }))
    }

    /// One of `length` bytes, which may be anything.
    pub(super) fn get(&self, length: usize) -> Vec<u8> {
        if length > self.0.size {
            return vec![0; length];
        }
        let spare = self.0.spare().pop();
        let mut buffer = spare.unwrap_or_else(|| vec![0; self.0.size]);
        buffer.resize(length, 0);
        buffer
    }

    /// Its bytes, which many may share.
    pub(super) fn share(&self, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Used { buffer, shared: self.0.clone() })
    }

    /// Keeps only a few, or many again.
    pub(super) fn keep_few(&self, few: bool) {
        let kept = if few { KEPT_WHEN_SHORT } else { KEPT };
        self.0.kept.store(kept, Ordering::Relaxed);
        self.0.spare().truncate(kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_its_last_user_and_has_the_length_that_is_wanted() {
        let buffers = Buffers::new(100);
        let mut first = buffers.get(100);
        first[..6].copy_from_slice(b"secret");
        let at = first.as_ptr();
        let bytes = buffers.share(first);
        let part = bytes.slice(1..3);
        drop(bytes);
        let other = buffers.get(10);
        assert_ne!(other.as_ptr(), at, "it is still read");
        assert_eq!(&part[..], b"ec");
        drop(part);
        let again = buffers.get(50);
        assert_eq!((again.as_ptr(), again.len()), (at, 50));
        drop(buffers.share(again));
        let whole = buffers.get(100);
        assert_eq!((whole.as_ptr(), whole.len()), (at, 100));
        assert_eq!(buffers.get(200).len(), 200);
    }

    #[test]
    fn few_are_kept() {
        let buffers = Buffers::new(10);
        let many: Vec<_> = (0..100).map(|_| buffers.share(buffers.get(10))).collect();
        drop(many);
        assert_eq!(buffers.0.spare().len(), KEPT);
        buffers.keep_few(true);
        assert_eq!(buffers.0.spare().len(), KEPT_WHEN_SHORT);
        let many: Vec<_> = (0..100).map(|_| buffers.share(buffers.get(10))).collect();
        drop(many);
        assert_eq!(buffers.0.spare().len(), KEPT_WHEN_SHORT);
    }
}
