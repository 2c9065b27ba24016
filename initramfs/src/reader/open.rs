//! Opening: header and page hashes from the first member that has them and passes every check.

use super::fault::Fault;
use super::member::Member;
use super::world::{Path, World};
use moor_image::{HEADER_LENGTH, Header, ImageError, OpenOptions, Verifier};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Pauses between rounds over all members, when nothing but passing faults was met.
const ROUNDS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];

/// No member gave an image that passes.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nobody to ask.
    #[error("no server is given: name at least one with --url")]
    NoMember,
    /// Why each member did not.
    #[error("cannot open the image: {}", Reasons(.0))]
    Members(Vec<(String, Fault)>),
    /// The image is what it should be, but this reader cannot use it.
    #[error("cannot open the image at {url}: {source}")]
    Image {
        /// Where it was read.
        url: String,
        /// What is wrong.
        source: ImageError,
    },
    /// The table is larger than this machine can hold.
    #[error("the image's table does not fit into memory")]
    TooLarge,
}

struct Reasons<'a>(&'a [(String, Fault)]);

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (url, fault)) in self.0.iter().enumerate() {
            write!(f, "{}{url}: {fault}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// Asks the members in order. Returns what the first good one gave, and all members with what was learnt about them.
pub(super) async fn open(
    paths: Vec<Box<dyn Path>>,
    world: &Arc<dyn World>,
    options: &OpenOptions,
) -> Result<(Verifier, Vec<Arc<Member>>), OpenError> {
    if paths.is_empty() {
        return Err(OpenError::NoMember);
    }
    let members: Vec<_> = paths.into_iter().map(|path| Arc::new(Member::new(path, world.clone()))).collect();
    let mut pauses = ROUNDS.iter();
    loop {
        let mut faults = Vec::new();
        for member in &members {
            match from_member(member, options).await {
                Ok(verifier) => {
                    member.passed();
                    return Ok((verifier, members));
                }
                // No other member can mend these: the image is the right one, the key or the trust is not.
                Err(Fault::Wrong(
                    source @ (ImageError::WrongKey { .. }
                    | ImageError::KeyNeeded(_)
                    | ImageError::HeaderMac
                    | ImageError::NotEncrypted
                    | ImageError::SignatureFile(_)),
                )) if options.pinned.is_some() || members.len() == 1 => {
                    return Err(OpenError::Image { url: member.url().to_owned(), source });
                }
                Err(fault) => {
                    member.failed(&fault, true);
                    faults.push((member.url().to_owned(), fault));
                }
            }
        }
        match pauses.next() {
            Some(pause) if faults.iter().all(|(_, fault)| fault.is_passing()) => world.sleep(*pause).await,
            _ => return Err(OpenError::Members(faults)),
        }
    }
}

async fn from_member(member: &Member, options: &OpenOptions) -> Result<Verifier, Fault> {
    let mut answer = member.get(0, HEADER_LENGTH as u64, None).await?;
    let bytes = member.take(&mut answer, HEADER_LENGTH).await?;
    let actual = answer.total;
    let bytes: &[u8; HEADER_LENGTH] =
        bytes.as_slice().try_into().map_err(|_| Fault::Broken("the answer ended early".into()))?;
    let header = Header::parse(bytes).map_err(|error| Fault::Wrong(error.into()))?;
    // Before the digest is compared: a truncated image says so, whichever it is.
    let expected = header.file_length();
    if actual != expected {
        return Err(Fault::Length { expected, actual });
    }
    let mut verifier = Verifier::new(header, options).map_err(Fault::Wrong)?;
    if !verifier.can_read() {
        return Err(Fault::Wrong(ImageError::KeyNeeded(hex::encode(verifier.header().key_id))));
    }
    member.keep(answer);
    let (start, length) = verifier.page_hashes_range();
    if length > 0 {
        let size =
            usize::try_from(length).map_err(|_| Fault::Wrong(ImageError::Argument("the table fits into memory")))?;
        let mut answer = member.get(start, length, Some(expected)).await?;
        let hashes = member.take(&mut answer, size).await?;
        verifier.set_page_hashes(&hashes).map_err(Fault::Wrong)?;
        member.keep(answer);
    } else {
        verifier.set_page_hashes(&[]).map_err(Fault::Wrong)?;
    }
    Ok(verifier)
}
