//! How a member comes back: by a real read, alone and verified.

use super::fault::Fault;
use super::link::Answer;
use super::member::{Member, Standing};
use super::world::World;
use super::{Inner, lock};
use moor_image::ImageError;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// A read in this time is never too slow.
const QUICK: Duration = Duration::from_millis(100);
/// A member may take so many times as long as the best of the others.
const SLOWER: u32 = 4;
/// How often a member that rests is thought of.
const LOOK: Duration = Duration::from_secs(1);
/// When members that nobody has asked yet are tried: a fault is better found before they are needed.
const FIRST_LOOK: Duration = Duration::from_secs(1);

impl Inner {
    /// Notes what a member did wrong, and lets it rest if it has to. One that merely takes no further connection goes on with those that it has.
    pub(super) fn failed(self: &Arc<Self>, member: &Arc<Member>, fault: &Fault) {
        if let Fault::Crowded(_) = fault {
            tracing::debug!("{}: {fault}", member.url());
            return;
        }
        if self.fleet.failed(member, fault, false) {
            self.bring_back(member);
        }
    }

    /// Lets a member rest, then tries it with a real read that is verified, until one succeeds. Ends with the reader.
    pub(super) fn bring_back(self: &Arc<Self>, member: &Arc<Member>) {
        let (reader, member, world): (Weak<Self>, _, _) = (Arc::downgrade(self), member.clone(), self.world.clone());
        self.world.spawn(Box::pin(async move {
            let mut tried = Duration::ZERO;
            loop {
                let Some(inner) = rested(&reader, &member, &*world, tried).await else { return };
                match member.standing() {
                    _ if member.is_retired() => return,
                    Standing::Good => return,
                    // Without any other it is asked all the same: each byte is verified anyway, and the alternative is a root that stands still
                    // although this one may have been mended.
                    Standing::Excluded if !inner.fleet.is_down() => continue,
                    _ => {}
                }
                let begun = world.now();
                match inner.try_out(&member).await {
                    Ok(()) => {
                        inner.fleet.passed(&member);
                        return;
                    }
                    Err(fault) => _ = inner.fleet.failed(&member, &fault, true),
                }
                tried = world.since(begun);
            }
        }));
    }

    /// Reads a chunk from each member that nobody has asked yet, once, after the first rush.
    pub(super) fn look_at_the_others(self: &Arc<Self>) {
        for member in self.fleet.members().iter() {
            let (reader, member, world): (Weak<Self>, _, _) =
                (Arc::downgrade(self), member.clone(), self.world.clone());
            self.world.spawn(Box::pin(async move {
                let spread = world.random() % 1000;
                world.sleep(FIRST_LOOK + Duration::from_millis(spread)).await;
                let Some(inner) = reader.upgrade() else { return };
                if member.standing() == Standing::Good
                    && member.pace().expected().is_none()
                    && let Err(fault) = inner.try_out(&member).await
                {
                    inner.failed(&member, &fault);
                }
            }));
        }
    }

    /// One verified read of a page, if it is needed, and a chunk on this member alone; what it brings is not kept.
    pub(super) async fn try_out(self: &Arc<Self>, member: &Arc<Member>) -> Result<(), Fault> {
        let chunk = self.counts.recent.load(Ordering::Relaxed);
        if chunk >= self.verifier.header().chunks {
            return Ok(());
        }
        let index = self.verifier.page_of_chunk(chunk);
        let held = lock(&self.table).get(index);
        let page = if let Some(page) = held {
            page
        } else {
            let (start, length) = self.verifier.page_range(index).ok_or_else(out_of_reach)?;
            let (bytes, answer) = self.fetch(member, start, length).await?;
            let page = Arc::new(self.verifier.verify_page(index, &bytes).map_err(Fault::Wrong)?);
            member.keep(answer);
            lock(&self.table).insert(page.clone());
            page
        };
        let begun = self.world.now();
        let (start, length) = self.verifier.chunk_range(chunk).ok_or_else(out_of_reach)?;
        let (mut bytes, answer) = self.fetch(member, start, length).await?;
        match self.verifier.open_chunk(chunk, &page, &mut bytes) {
            // A chunk that was sealed badly is none of the member's doing.
            Ok(()) | Err(ImageError::Forged { .. }) => member.keep(answer),
            Err(error) => return Err(Fault::Wrong(error)),
        }
        let took = self.world.since(begun);
        member.pace().first(took, self.world.now());
        match self.fleet.others_expected(member) {
            Some(best) if took > QUICK.max(best * SLOWER) => Err(Fault::Slow(took)),
            _ => Ok(()),
        }
    }

    async fn fetch(&self, member: &Member, start: u64, length: u64) -> Result<(Vec<u8>, Answer), Fault> {
        let size = usize::try_from(length).map_err(|_| out_of_reach())?;
        let mut answer = member.get(start, length, Some(self.verifier.header().file_length())).await?;
        let bytes = member.take(&mut answer, size).await?;
        Ok((bytes, answer))
    }
}

/// Lets a member rest, after a try that took so long. One that rests long since it is not needed is needed when no other is left. `None` once the reader
/// is gone.
async fn rested(reader: &Weak<Inner>, member: &Member, world: &dyn World, tried: Duration) -> Option<Arc<Inner>> {
    let mut is_alone = reader.upgrade()?.fleet.is_down();
    let mut left = member.rest(is_alone, tried);
    while !left.is_zero() {
        let step = left.min(LOOK);
        world.sleep(step).await;
        left -= step;
        if !is_alone && reader.upgrade()?.fleet.is_down() {
            is_alone = true;
            left = left.min(member.rest(true, Duration::ZERO));
        }
    }
    reader.upgrade()
}

fn out_of_reach() -> Fault {
    Fault::Wrong(ImageError::Argument("the image has no such place"))
}
