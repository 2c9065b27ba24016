//! What a server can do wrong, from the reader's point of view.

use moor_image::ImageError;
use std::time::Duration;

/// A request did not give what it should. The other members are asked; this one rests for a while.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// No TCP connection.
    #[error("no connection: {0}; is the server running, and is the address right?")]
    Connect(String),
    /// No TCP connection, and no refusal either.
    #[error("no connection within {:.1} s; is the server running, and is the network up?", .0.as_secs_f32())]
    Unreachable(Duration),
    /// Its certificate was not issued by an authority that counts.
    #[error(
        "its certificate is not of the expected authority ({0}): give the authority of this server, or the URL of another server"
    )]
    Authority(String),
    /// Its certificate is good at another time.
    #[error(
        "its certificate is not {0}, and this machine's clock says {1}: set the clock, or have the certificate renewed"
    )]
    Validity(&'static str, String),
    /// TLS failed otherwise.
    #[error("TLS failed: {0}")]
    Tls(String),
    /// It stopped sending.
    #[error("no byte for {:.1} s", .0.as_secs_f32())]
    Silent(Duration),
    /// It takes much longer than another member.
    #[error("no chunk for {:.1} s, while another server answers", .0.as_secs_f32())]
    Slow(Duration),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// No connection more than there are, of which one delivers. The server has not failed.
    #[error("it takes no further connection now ({0})")]
    Crowded(Box<Fault>),
    /// Another status than 206.
    #[error("HTTP status {0}{advice}", advice = if *.0 == 404 { ": there is no image at this URL; correct it" } else { "" })]
    Status(u16),
    /// 200: it sends the whole file.
    #[error("it does not serve ranges (HTTP status 200 instead of 206): an image needs a server that does")]
    NoRanges,
    /// The answer is for other bytes than those asked for.
    #[error("it answered with other bytes than were asked for ({0})")]
    OtherRange(String),
    /// The file has another length than the image.
    #[error("the file there has {actual} bytes, the image has {expected}: it is {}; put the whole image there",
        if actual < expected { "truncated" } else { "another file, or extended" })]
    Length {
        /// By the header.
        expected: u64,
        /// By the server.
        actual: u64,
    },
    /// The entity tag is another than before.
    #[error("the file there was replaced (its entity tag changed)")]
    Replaced,
    /// Bytes that do not verify.
    #[error("{0}")]
    Wrong(ImageError),
}

impl Fault {
    /// Whether it is over time: then the member gets more of it.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Silent(_) | Self::Slow(_))
    }

    /// Whether it shows that other bytes are there than the image's. A file that is too short may be on its way there.
    #[must_use]
    pub fn is_of_another_image(&self) -> bool {
        match self {
            Self::Wrong(_) => true,
            Self::Length { expected, actual } => actual > expected,
            _ => false,
        }
    }

    /// Whether a server that refuses a connection may look so. A certificate that is not accepted is news about all of them.
    pub(super) fn is_of_a_connection(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Unreachable(_) | Self::Tls(_) | Self::Silent(_) | Self::Broken(_))
    }

    /// Whether the next attempt may well succeed without anybody's doing.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        self.is_timeout()
            || matches!(self, Self::Connect(_) | Self::Broken(_) | Self::Crowded(_) | Self::Status(429 | 500..))
    }
}
