//! One read: the chunks that it needs, each where it is or on its way, and the parts of them that it gets.

use super::cache::Lookup;
use super::{ReadError, Reader};
use bytes::Bytes;
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

/// A read that has begun.
pub struct Read {
    pub(super) reader: Reader,
    pub(super) offset: u64,
    pub(super) end: u64,
    /// What was found, from the chunk of the offset on.
    pub(super) chunks: Vec<Lookup>,
}

impl Read {
    /// What is read, in parts, if all of it is there already.
    #[must_use]
    pub fn now(&self) -> Option<Vec<Bytes>> {
        let cached = |lookup: &Lookup| if let Lookup::Cached(bytes) = lookup { Some(bytes.clone()) } else { None };
        let chunks: Vec<_> = self.chunks.iter().map(cached).collect::<Option<_>>()?;
        Some((self.first()..).zip(chunks).map(|(chunk, bytes)| self.part(chunk, &bytes)).collect())
    }

    /// What is read, in parts. Waits as long as no member serves it.
    ///
    /// # Errors
    /// The image itself is bad there; or [`Reader::end`] was called, and no member answers.
    pub async fn wait(self) -> Result<Vec<Bytes>, ReadError> {
        let fleet = self.reader.0.fleet.clone();
        let (mut all, mut end) = (pin!(self.all()), pin!(fleet.given_up()));
        poll_fn(|context| match all.as_mut().poll(context) {
            Poll::Ready(result) => Poll::Ready(result),
            Poll::Pending => end.as_mut().poll(context).map(|()| Err(ReadError::GaveUp)),
        })
        .await
    }

    async fn all(mut self) -> Result<Vec<Bytes>, ReadError> {
        let chunks = std::mem::take(&mut self.chunks);
        let mut parts = Vec::with_capacity(chunks.len());
        for (chunk, lookup) in (self.first()..).zip(chunks) {
            let bytes = self.reader.0.arrive(chunk, lookup).await?;
            parts.push(self.part(chunk, &bytes));
        }
        Ok(parts)
    }

    fn first(&self) -> u64 {
        self.offset / self.reader.header().chunk_size()
    }

    /// The part of a chunk that is read.
    fn part(&self, chunk: u64, bytes: &Bytes) -> Bytes {
        let start = chunk * self.reader.header().chunk_size();
        bytes.slice(within(self.offset.saturating_sub(start), bytes)..within(self.end - start, bytes))
    }
}

/// An offset relative to a chunk, at most its end.
fn within(offset: u64, chunk: &Bytes) -> usize {
    usize::try_from(offset).map_or(chunk.len(), |offset| offset.min(chunk.len()))
}
