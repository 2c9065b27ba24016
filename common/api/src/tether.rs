//! What the control socket of a running tether understands: one JSON object in one line, answered by one line. The tether serves the root
//! file system, so it takes up a change whole or not at all, and goes on as before in the second case.

use crate::trust::SiteBundle;
use serde::{Deserialize, Serialize};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where it is unless told otherwise; root alone may use it.
pub const SOCKET: &str = "/run/mooring/tether.sock";

/// Longest request or answer in bytes, with the end of its line.
pub const MAX_LINE: u64 = 256 << 10;

/// Most servers of a list.
pub const MAX_SERVERS: usize = 256;

/// How long an answer may take: the tether tries new servers before it believes in them.
const LIMIT: Duration = Duration::from_mins(1);

/// What to change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The image is on these servers from now on, and on no other.
    Members(Vec<Server>),
    /// Servers have to be vouched for by this from now on, and by nothing else.
    Trust(Trust),
    /// Whether the machine shuts down: then an outage of all servers ends reads after a while.
    Ends(bool),
}

/// A server of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// `https://HOST[:PORT]/PATH` of the image.
    pub url: String,
    /// What HOST resolves to: the tether itself has no resolver any more. May be empty where HOST is an address,
    /// or where the tether reads from this URL already: it stays where it is.
    #[serde(default)]
    pub addresses: Vec<SocketAddr>,
}

/// Who vouches for servers. It has to be of the kind that the tether was started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Trust {
    /// The collective of this bundle, which is newer than the one in use.
    Site(SiteBundle),
    /// The authorities in this PEM text.
    Authority(String),
}

/// The answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Why nothing was changed; absent: it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The tether did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TetherError {
    /// Nobody listens.
    #[error("no tether answers at '{}': {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The conversation broke off, or made no sense.
    #[error("the tether at '{}' gave no answer: {source}", path.display())]
    Talk {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// It refuses.
    #[error("the tether refuses: {0}")]
    Refused(String),
}

/// Asks the tether behind the socket at `path`, and waits until it has done it.
///
/// # Errors
/// It is not there, or refuses; then nothing has changed.
pub fn ask(path: &Path, request: &Request) -> Result<(), TetherError> {
    let connect = |source| TetherError::Connect { path: path.to_owned(), source };
    let talk = |source| TetherError::Talk { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).map_err(connect)?;
    stream.set_read_timeout(Some(LIMIT)).and_then(|()| stream.set_write_timeout(Some(LIMIT))).map_err(talk)?;
    let mut line = serde_json::to_vec(request).map_err(|error| talk(error.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(talk)?;
    let mut answer = String::new();
    BufReader::new(stream).take(MAX_LINE).read_line(&mut answer).map_err(talk)?;
    let reply: Reply = serde_json::from_str(&answer).map_err(|error| talk(error.into()))?;
    match reply.error {
        None => Ok(()),
        Some(reason) => Err(TetherError::Refused(reason)),
    }
}
