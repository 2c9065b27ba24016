//! Opening: header and page hashes from the first member that has them and passes every check. Members are asked one beside the other:
//! one that is dead must not cost its time limits before anything runs.

use super::fault::Fault;
use super::member::Member;
use super::world::{Boxed, Path, World};
use moor_image::{HEADER_LENGTH, Header, ImageError, OpenOptions, Verifier};
use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

/// Pauses between rounds over all members, when nothing but passing faults was met.
const ROUNDS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];
/// A member that has not answered after so long is not waited for alone. All at once would cost every member a handshake for every node
/// that boots, and most of them for nothing.
const NEXT_AFTER: Duration = Duration::from_millis(100);

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

impl OpenError {
    /// Whether it may well pass without anybody's doing: a server that would have the image is away, or busy.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Members(faults) if faults.iter().any(|(_, fault)| fault.is_passing()))
    }

    /// Whether the image is none that may be used, whoever is asked, until somebody mends that.
    #[must_use]
    pub fn is_of_another_image(&self) -> bool {
        match self {
            Self::Image { .. } => true,
            Self::Members(faults) => faults.iter().all(|(_, fault)| fault.is_of_another_image()),
            Self::NoMember | Self::TooLarge => false,
        }
    }
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

/// Asks the members, beginning with any. Returns what the first good one gave, and all members with what was learnt about them.
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
        match round(&members, &**world, options).await? {
            Ok(verifier) => return Ok((verifier, members)),
            Err(faults) => match pauses.next() {
                Some(pause) if faults.iter().all(|(_, fault)| fault.is_passing()) => world.sleep(*pause).await,
                _ => return Err(OpenError::Members(faults)),
            },
        }
    }
}

type Asked<'a> = (&'a Member, Boxed<'a, Result<Verifier, Fault>>);

/// Asks each member once, the next one when one fails or takes long. The first that passes counts, and the others are given up; if none
/// does, what each did wrong.
async fn round(
    members: &[Arc<Member>],
    world: &dyn World,
    options: &OpenOptions,
) -> Result<Result<Verifier, Vec<(String, Fault)>>, OpenError> {
    let first = usize::try_from(world.random() % members.len() as u64).unwrap_or(0);
    let mut rest: VecDeque<_> = members[first..].iter().chain(&members[..first]).collect();
    let (mut asked, mut faults) = (Vec::<Asked<'_>>::new(), Vec::new());
    loop {
        if let Some(member) = rest.pop_front() {
            asked.push((member, Box::pin(from_member(member, options))));
        } else if asked.is_empty() {
            return Ok(Err(faults));
        }
        // Until there is reason to ask the next one.
        loop {
            match event(&mut asked, (!rest.is_empty()).then(|| world.sleep(NEXT_AFTER))).await {
                None => break,
                Some((member, Ok(verifier))) => {
                    member.passed();
                    return Ok(Ok(verifier));
                }
                // No other member can mend these: the image is the right one, the key or the trust is not.
                Some((
                    member,
                    Err(Fault::Wrong(
                        source @ (ImageError::WrongKey { .. }
                        | ImageError::KeyNeeded(_)
                        | ImageError::HeaderMac
                        | ImageError::NotEncrypted
                        | ImageError::Untrusted { .. }
                        | ImageError::SignatureFile(_)),
                    )),
                )) if options.pinned.is_some() || members.len() == 1 => {
                    return Err(OpenError::Image { url: member.url().to_owned(), source });
                }
                Some((member, Err(fault))) => {
                    member.failed(&fault, true);
                    faults.push((member.url().to_owned(), fault));
                    if !rest.is_empty() || asked.is_empty() {
                        break;
                    }
                }
            }
        }
    }
}

/// The next answer, of whom is taken out; `None`: the next member is due.
async fn event<'a>(
    asked: &mut Vec<Asked<'a>>,
    mut due: Option<Boxed<'static, ()>>,
) -> Option<(&'a Member, Result<Verifier, Fault>)> {
    poll_fn(|context| {
        for at in 0..asked.len() {
            if let Poll::Ready(result) = asked[at].1.as_mut().poll(context) {
                return Poll::Ready(Some((asked.swap_remove(at).0, result)));
            }
        }
        match &mut due {
            Some(due) => due.as_mut().poll(context).map(|()| None),
            None => Poll::Pending,
        }
    })
    .await
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
