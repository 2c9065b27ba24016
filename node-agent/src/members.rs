//! The members of the collective as one thing to talk to: one connection at a time, another member when one fails.

use moor_api::client::ClientError;
use moor_api::client::node::NodeConnection;
use moor_api::client::session::SessionKey;
use moor_api::client::tls::member_tls_config;
use moor_api::ids::{BootId, CollectiveId};
use moor_api::node::MemberEndpoint;
use moor_api::trust::{Incarnation, SiteBundle};
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// Bounds a connection with its handshake, and the time to each answer: generous, because an emulated or loaded machine takes
/// seconds for a handshake, and short enough that a dead member costs a boot little.
const TIMEOUT: Duration = Duration::from_secs(15);

/// So long a certificate's word is taken for it that the collective began anew: a node that is up gets the trust bundle that says so with a
/// heartbeat, which is a minute or two.
const ON_TRUST: Duration = Duration::from_mins(15);

/// Which incarnation of the collective members have to be of. The trust bundle says that for good. A certificate says it for a while, once for each
/// bundle: a bundle of before the collective was recovered does not know of that, and would believe members of before as well; but whoever has the
/// keys of the authority, or is a second survivor that was recovered by mistake, could shut a node off from all real members for ever.
struct Belief {
    confirmed: Incarnation,
    /// What a certificate says counts for as long as the process runs: a boot gets no other bundle, and ends.
    is_lasting: bool,
    /// The newest that a certificate named, and until when that counts.
    met: Option<(Incarnation, Instant)>,
}

impl Belief {
    fn of(bundle: &SiteBundle) -> Self {
        Self { confirmed: bundle.incarnation, is_lasting: false, met: None }
    }

    /// Members of earlier ones are of before.
    fn lowest(&self, now: Instant) -> Incarnation {
        let met = self.met.filter(|(_, until)| self.is_lasting || now < *until);
        met.map_or(self.confirmed, |(incarnation, _)| incarnation.max(self.confirmed))
    }

    /// A certificate that is believed names `incarnation`. Another one does not make the while longer, and what has lapsed does not come back.
    fn meet(&mut self, incarnation: Incarnation, now: Instant) {
        if incarnation > self.confirmed {
            let (newest, _) = self.met.get_or_insert((incarnation, now + ON_TRUST));
            *newest = incarnation.max(*newest);
        }
    }
}

/// Addresses of members, the connection in use, and the token it carries.
pub struct Members {
    urls: Vec<String>,
    collective: CollectiveId,
    tls: Arc<ClientConfig>,
    connection: Option<NodeConnection>,
    token: Option<Zeroizing<String>>,
    /// The boot, for the logs of members.
    boot: Option<String>,
    belief: Belief,
    timeout: Duration,
}

impl Members {
    /// Of the bundle's collective. Connections show the certificate of `session`, to which tokens are bound.
    ///
    /// # Errors
    /// The bundle has no usable root; there is no address.
    pub fn new(bundle: &SiteBundle, session: &SessionKey, urls: Vec<String>) -> Result<Self, ClientError> {
        let mut members = Self {
            urls: Vec::new(),
            collective: bundle.collective,
            tls: Arc::new(member_tls_config(bundle, Some(session))?),
            connection: None,
            token: None,
            boot: None,
            belief: Belief::of(bundle),
            timeout: TIMEOUT,
        };
        members.learn(urls);
        if members.urls.is_empty() {
            return Err(ClientError::Config(
                "no address of a member is known: give moor.server=https://ADDRESS:PORT on the kernel command line, or \
                 make the boot files again"
                    .into(),
            ));
        }
        Ok(members)
    }

    /// For a boot, which gets no newer bundle: once it has reached a collective that began anew, it goes back to no member of before until it ends.
    #[must_use]
    pub fn of_a_boot(mut self) -> Self {
        self.belief.is_lasting = true;
        self
    }

    /// Other roots from now on. The token goes: it belongs to connections that were made under the old ones.
    ///
    /// # Errors
    /// The bundle has no usable root; then nothing has changed.
    pub fn trust(&mut self, bundle: &SiteBundle, session: &SessionKey) -> Result<(), ClientError> {
        self.tls = Arc::new(member_tls_config(bundle, Some(session))?);
        // A bundle is newer than the one before. What connections said counts no more: somebody may have said it whom the new roots do not vouch for.
        self.belief = Belief { is_lasting: self.belief.is_lasting, ..Belief::of(bundle) };
        self.forget();
        Ok(())
    }

    /// Their addresses, in the order in which they are tried.
    #[must_use]
    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// Adds addresses of a reply that are not known yet, behind the known ones, whose order stays.
    pub fn add(&mut self, members: &[MemberEndpoint]) {
        self.learn(members.iter().flat_map(|member| member.urls.iter().cloned()).collect());
    }

    /// Adds addresses that are not known yet, behind the known ones.
    fn learn(&mut self, urls: Vec<String>) {
        for url in urls {
            let url = url.trim_end_matches('/').to_owned();
            if !self.urls.contains(&url) {
                self.urls.push(url);
            }
        }
    }

    /// Takes up the order of a reply or a deploy document, in which this node is to try members: it spreads nodes over them. What else is
    /// known stays behind. An open connection stays; returns whether it is with another member than the first.
    pub fn prefer(&mut self, members: &[MemberEndpoint]) -> bool {
        let known = std::mem::take(&mut self.urls);
        self.add(members);
        self.learn(known);
        let first = members.first().map(|member| member.id);
        self.connection.as_ref().is_some_and(|connection| first.is_some_and(|first| connection.member() != first))
    }

    /// The boot that all calls from now on belong to: by its id they are found in the logs of members.
    pub fn set_boot(&mut self, boot: BootId) {
        self.boot = Some(boot.to_string());
    }

    /// The token for calls from now on, on this connection and those to come.
    ///
    /// # Errors
    /// It has characters that no header may have.
    pub fn set_token(&mut self, token: String) -> Result<(), ClientError> {
        let token = Zeroizing::new(token);
        if let Some(connection) = &mut self.connection {
            connection.set_token(&token)?;
        }
        self.token = Some(token);
        Ok(())
    }

    /// Whether calls carry a token.
    #[must_use]
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Ends the connection, keeps the token.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// Ends the connection and forgets the token: a new session is due.
    pub fn forget(&mut self) {
        self.connection = None;
        self.token = None;
    }

    /// The connection: the open one, or a new one to the first member that answers. The order turns, so that the next try after a
    /// failure begins with another member.
    ///
    /// # Errors
    /// No member answers: the reasons of all.
    pub async fn connection(&mut self) -> Result<&mut NodeConnection, ClientError> {
        if self.connection.as_ref().is_none_or(NodeConnection::is_closed) {
            self.connection = None;
            self.connection = Some(self.connect().await?);
        }
        self.connection.as_mut().ok_or_else(|| ClientError::Config("no connection".into()))
    }

    async fn connect(&mut self) -> Result<NodeConnection, ClientError> {
        let (mut reasons, mut has_expired) = (Vec::new(), false);
        for _ in 0..self.urls.len() {
            match NodeConnection::connect(&self.urls[0], self.collective, self.tls.clone(), self.timeout).await {
                Ok(connection) if connection.incarnation() < self.belief.lowest(Instant::now()) => {
                    reasons.push(format!(
                        "{} is of incarnation {} of the collective, and another member of {}: it is one of before",
                        self.urls[0],
                        connection.incarnation(),
                        self.belief.lowest(Instant::now())
                    ));
                }
                Ok(mut connection) => {
                    self.belief.meet(connection.incarnation(), Instant::now());
                    if let Some(token) = &self.token {
                        connection.set_token(token)?;
                    }
                    if let Some(boot) = &self.boot {
                        connection.set_request_id(boot);
                    }
                    return Ok(connection);
                }
                Err(error) => {
                    has_expired |= error.has_expired();
                    reasons.push(error.to_string());
                }
            }
            self.urls.rotate_left(1);
        }
        Err(ClientError::Connect { to: "any member".into(), cause: reasons.join("; "), has_expired })
    }

    /// Turns to the next member, as after a failure of the current one.
    pub fn turn(&mut self) {
        let used = self.connection.take().map(|connection| connection.url().to_owned());
        self.put_last(used.as_deref());
    }

    /// Turns to the next member, if there is another address, from the one in use. Without a connection the last failure has turned
    /// already.
    pub fn move_on(&mut self) {
        if self.urls.len() > 1 && self.connection.is_some() {
            self.turn();
        }
    }

    /// Leaves the connection, which stays open for [`Self::go_back`]. The next call opens another, to the first of the order.
    pub fn leave(&mut self) -> Option<NodeConnection> {
        self.connection.take()
    }

    /// Goes back to a connection that was left. The address that was tried instead comes last from now on.
    pub fn go_back(&mut self, connection: NodeConnection) {
        // Without one, the failure has turned the order already.
        if self.connection.is_some() {
            self.turn();
        }
        self.connection = Some(connection);
    }

    /// It has failed: this address, or the first one.
    fn put_last(&mut self, url: Option<&str>) {
        let at = url.and_then(|url| self.urls.iter().position(|known| known == url)).unwrap_or(0);
        self.urls[at..].rotate_left(1);
    }

    /// Calls a member; when the connection breaks or the member has a fault of its own, the others, each once.
    ///
    /// # Errors
    /// A refusal, at once; the last failure, when no member could answer.
    pub async fn call<T>(
        &mut self,
        mut call: impl AsyncFnMut(&mut NodeConnection) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        // A kept connection may have died unnoticed: that costs one more try.
        let mut tries = self.urls.len() + usize::from(self.connection.is_some());
        loop {
            let result = match self.connection().await {
                Ok(connection) => call(connection).await,
                // All members were tried just now.
                Err(error) => return Err(error),
            };
            tries = tries.saturating_sub(1);
            match result {
                Err(error) if error.is_transient() && tries > 0 => self.turn(),
                Err(error) if error.is_transient() => {
                    self.turn();
                    return Err(error);
                }
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::ids::MemberId;

    fn members(urls: &[&str]) -> Members {
        Members {
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            collective: CollectiveId::from_bytes([1; 16]),
            tls: Arc::new(
                ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                    .with_safe_default_protocol_versions()
                    .unwrap()
                    .with_root_certificates(rustls::RootCertStore::empty())
                    .with_no_client_auth(),
            ),
            connection: None,
            token: None,
            boot: None,
            belief: Belief { confirmed: Incarnation::FIRST, is_lasting: false, met: None },
            timeout: TIMEOUT,
        }
    }

    #[test]
    fn a_certificate_is_believed_for_a_while_and_a_bundle_for_good() {
        let second = Incarnation::FIRST.next();
        let (begun, third) = (Instant::now(), second.next());
        let (almost, over) = (begun + ON_TRUST.mul_f64(0.99), begun + ON_TRUST);
        let mut belief = Belief { confirmed: Incarnation::FIRST, is_lasting: false, met: None };
        belief.meet(Incarnation::FIRST, begun);
        assert_eq!(belief.lowest(begun), Incarnation::FIRST);
        belief.meet(second, begun);
        assert_eq!(
            (belief.lowest(begun), belief.lowest(almost)),
            (second, second),
            "it went back to members of before"
        );
        // Nobody stands in for it: whoever was shut out may be right.
        assert_eq!(belief.lowest(over), Incarnation::FIRST);
        // Whoever counts on, or comes again, has no more time for that.
        belief.meet(third, almost);
        belief.meet(second, almost);
        assert_eq!((belief.lowest(almost), belief.lowest(over)), (third, Incarnation::FIRST));
        belief.meet(third.next(), over);
        assert_eq!(belief.lowest(over), Incarnation::FIRST, "it can be shut off again and again");
        // A boot has nobody to ask, and ends.
        let mut belief = Belief { confirmed: Incarnation::FIRST, is_lasting: true, met: None };
        belief.meet(second, begun);
        assert_eq!(belief.lowest(over + ON_TRUST), second, "a boot went back to members of before");
        // With a bundle that says so it is for good, and what comes then is met anew.
        let mut belief = Belief { confirmed: second, is_lasting: false, met: None };
        assert_eq!(belief.lowest(over + ON_TRUST), second);
        belief.meet(Incarnation::FIRST, over);
        belief.meet(third, over);
        assert_eq!((belief.lowest(over), belief.lowest(over + ON_TRUST)), (third, second));
    }

    fn endpoint(number: u8, urls: &[&str]) -> MemberEndpoint {
        MemberEndpoint {
            id: MemberId::from_bytes([number; 16]),
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
        }
    }

    #[test]
    fn the_order_of_a_reply_is_taken_up_and_nothing_is_forgotten() {
        let mut members = members(&["https://boot", "https://a", "https://b"]);
        let order =
            [endpoint(2, &["https://b/", "https://b2"]), endpoint(3, &["https://c"]), endpoint(1, &["https://a"])];
        assert!(!members.prefer(&order), "there is no connection to give up");
        assert_eq!(members.urls(), ["https://b", "https://b2", "https://c", "https://a", "https://boot"]);
        // A reply that says nothing changes nothing.
        assert!(!members.prefer(&[]));
        assert_eq!(members.urls()[0], "https://b");
    }

    #[test]
    fn addresses_that_are_added_change_no_order() {
        let mut members = members(&["https://b", "https://a"]);
        members.add(&[endpoint(1, &["https://a/"]), endpoint(2, &["https://b"]), endpoint(3, &["https://c"])]);
        assert_eq!(members.urls(), ["https://b", "https://a", "https://c"]);
        // A failure has turned already: another turn would pass one by.
        members.move_on();
        assert_eq!(members.urls()[0], "https://b");
    }

    #[test]
    fn what_failed_is_tried_last() {
        let mut members = members(&["https://a", "https://b", "https://c"]);
        members.turn();
        assert_eq!(members.urls(), ["https://b", "https://c", "https://a"]);
        // The connection in use need not be the first of the order: the preferred one has not failed.
        members.put_last(Some("https://c"));
        assert_eq!(members.urls(), ["https://b", "https://a", "https://c"]);
        members.put_last(Some("https://unknown"));
        assert_eq!(members.urls(), ["https://a", "https://c", "https://b"]);
    }
}
