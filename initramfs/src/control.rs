//! The control socket: another list of servers, or other trust in them, while the root is served. The conversation is in
//! [`moor_api::tether`]; only root is heard, a request is one bounded line, and what is refused changes nothing.

use crate::reader::{Address, Https, Reader};
use crate::tls::Trust;
use moor_api::tether::{MAX_LINE, MAX_SERVERS, Reply, Request, Server};
use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore};

/// Conversations at one time.
const SIDE_BY_SIDE: usize = 4;
/// How long a request may take to arrive, and an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait when no connection can be taken, for want of descriptors.
const SHORT_OF: Duration = Duration::from_secs(1);

/// Where the socket is: beside the state file.
#[must_use]
pub fn path(state: &Path) -> PathBuf {
    state.with_extension("sock")
}

/// The servers of a running tether, as they can be changed.
pub struct Servers {
    reader: Reader,
    now: Mutex<(Vec<Address>, Trust)>,
}

impl Servers {
    /// `addresses` and `trust` are those that `reader` was opened with.
    #[must_use]
    pub fn new(reader: Reader, addresses: Vec<Address>, trust: Trust) -> Self {
        Self { reader, now: Mutex::new((addresses, trust)) }
    }

    /// Does what is asked, whole or not at all.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub async fn change(&self, request: Request) -> Result<(), String> {
        // Waits for nobody: who asks has little time.
        if let Request::Ends(ends) = request {
            self.reader.end(ends);
            return Ok(());
        }
        let mut now = self.now.lock().await;
        let (addresses, trust) = &mut *now;
        match request {
            Request::Members(servers) => {
                let wanted = resolved(servers, addresses)?;
                // The agent asks with every heartbeat while a server does not answer.
                if is_same(&wanted, addresses) {
                    return Ok(());
                }
                let paths = Https::all(wanted.clone(), trust.config());
                // A server that is elsewhere now is another one, also under its old name.
                let stayed = |url: &str| {
                    wanted.iter().any(|new| new.url() == url && addresses.iter().any(|old| new.is_where(old)))
                };
                self.reader.set_members(paths, stayed).await.map_err(|error| error.to_string())?;
                *addresses = wanted;
                let names: Vec<_> = addresses.iter().map(Address::url).collect();
                tracing::info!("the image is on these servers from now on: {}", names.join(", "));
            }
            Request::Trust(wanted) => {
                let successor = trust.successor(&wanted).map_err(|error| error.to_string())?;
                let paths = Https::all(addresses.clone(), successor.config());
                self.reader.renew_members(paths).await.map_err(|error| error.to_string())?;
                *trust = successor;
                tracing::info!("servers are trusted by another bundle from now on");
            }
            Request::Ends(_) => {}
        }
        Ok(())
    }
}

/// Whether both lists name the same servers at the same places.
fn is_same(wanted: &[Address], now: &[Address]) -> bool {
    let are_in = |some: &[Address], all: &[Address]| some.iter().all(|one| all.iter().any(|other| one.is_where(other)));
    wanted.len() == now.len() && are_in(wanted, now) && are_in(now, wanted)
}

/// What is asked for without an address is where it is `now`.
fn resolved(servers: Vec<Server>, now: &[Address]) -> Result<Vec<Address>, String> {
    if servers.len() > MAX_SERVERS {
        return Err(format!("the list has {} servers, and at most {MAX_SERVERS} are taken", servers.len()));
    }
    let resolve = |server: Server| match now.iter().find(|old| server.addresses.is_empty() && old.url() == server.url) {
        Some(old) => Ok(old.clone()),
        None => Address::resolved(&server.url, server.addresses).map_err(|error| error.to_string()),
    };
    servers.into_iter().map(resolve).collect()
}

/// The socket. It is removed with the state ([`crate::state::StateFile::remove`]).
pub struct Control(std::os::unix::net::UnixListener);

impl Control {
    /// Listens at `path`, for root alone.
    ///
    /// # Errors
    /// The socket cannot be made there.
    pub fn bind(path: &Path) -> io::Result<Self> {
        // Of a tether that was killed.
        let _ = std::fs::remove_file(path);
        let listener = std::os::unix::net::UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// Answers for as long as the root is served.
    ///
    /// # Errors
    /// There is no runtime.
    pub async fn serve(self, servers: Servers) -> io::Result<Infallible> {
        let listener = UnixListener::from_std(self.0)?;
        let (servers, slots) = (Arc::new(servers), Arc::new(Semaphore::new(SIDE_BY_SIDE)));
        loop {
            let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
            match listener.accept().await {
                Ok((stream, _)) => {
                    let servers = servers.clone();
                    tokio::spawn(async move {
                        if let Err(error) = answer(stream, &servers).await {
                            tracing::debug!("a request on the control socket: {error}");
                        }
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::debug!("the control socket: {error}");
                    tokio::time::sleep(SHORT_OF).await;
                }
            }
        }
    }
}

async fn answer(mut stream: UnixStream, servers: &Servers) -> io::Result<()> {
    let result = match stream.peer_cred()?.uid() {
        0 => match tokio::time::timeout(PATIENCE, request(&mut stream)).await {
            Ok(Ok(request)) => servers.change(request).await,
            Ok(Err(why)) => Err(why),
            Err(_) => Err(format!("no request came within {} s", PATIENCE.as_secs())),
        },
        uid => Err(format!("only root may change the servers of the root, not user {uid}")),
    };
    if let Err(why) = &result {
        tracing::warn!("a change of the servers was refused: {why}");
    }
    let mut line = serde_json::to_vec(&Reply { error: result.err() })?;
    line.push(b'\n');
    tokio::time::timeout(PATIENCE, stream.write_all(&line)).await.map_err(io::Error::other)?
}

async fn request(stream: &mut UnixStream) -> Result<Request, String> {
    let mut line = Vec::new();
    let read = BufReader::new(stream).take(MAX_LINE).read_until(b'\n', &mut line).await;
    read.map_err(|error| format!("the request cannot be read: {error}"))?;
    if line.last() != Some(&b'\n') {
        return Err(format!("a request is one line of at most {} KiB", MAX_LINE >> 10));
    }
    serde_json::from_slice(&line).map_err(|error| format!("it is no request: {error}"))
}
