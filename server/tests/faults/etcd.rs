//! etcd in the place of members: the same networks, faults, clients and judge. What they judge etcd to be is known, so this tells whether they are right.

use crate::net::address;
use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::net::UnixStream;

/// A socket of this name in its folder: etcd wants something like HOST:PORT.
pub(crate) const SOCKET: &str = "localhost:1";

/// What it keeps, in its folder.
pub(crate) const DATA: &str = "state/etcd";

/// What it says when its disk is full, and ends.
pub(crate) const FULL: &str = "no space left on device";

/// How the others reach member `at`.
fn peer(at: usize) -> String {
    format!("http://{}:2380", address(at))
}

/// The words that run member `at` of `count` in its folder. `joins`: there are others already, and it is new to them.
pub(crate) fn words(at: usize, count: usize, joins: bool) -> anyhow::Result<Vec<String>> {
    let (name, peers, client) = (format!("m{at}"), peer(at), format!("unix://{SOCKET}"));
    let mut cluster = String::new();
    for other in 0..count {
        write!(cluster, "{}m{other}={}", if other == 0 { "" } else { "," }, peer(other))?;
    }
    let words = ["etcd", "--log-level", "warn", "--name", &name, "--data-dir", DATA]
        .into_iter()
        .chain(["--initial-cluster", &cluster, "--initial-cluster-state", if joins { "existing" } else { "new" }])
        .chain(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
        .chain(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    Ok(words.map(str::to_owned).collect())
}

/// What a member is to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seat {
    None,
    /// It is told all, and has no vote.
    Learner,
    Voter,
}

/// A connection to the JSON gateway of one member.
pub(crate) struct Gateway(http1::SendRequest<Full<Bytes>>);

impl Gateway {
    pub(crate) async fn new(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            // An error of the connection reaches the call that waits on it.
            let _ = connection.await;
        });
        Ok(Self(sender))
    }

    async fn answer(&mut self, path: &str, body: &Value) -> anyhow::Result<(HeaderMap, Value)> {
        self.0.ready().await?;
        let request = Request::post(path).header("host", "localhost").body(Full::from(body.to_string()))?;
        let (head, body) = self.0.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        ensure!(head.status.is_success(), "{path}: {}: {}", head.status, String::from_utf8_lossy(&body));
        Ok((head.headers, serde_json::from_slice(&body)?))
    }

    async fn call(&mut self, path: &str, body: &Value) -> anyhow::Result<Value> {
        Ok(self.answer(path, body).await?.1)
    }

    pub(crate) async fn put(&mut self, key: &str, value: u64) -> anyhow::Result<()> {
        let body = json!({ "key": BASE64.encode(key), "value": BASE64.encode(value.to_string()) });
        self.call("/v3/kv/put", &body).await.map(drop)
    }

    /// Linearizable, as is etcd's default; 0: there is none.
    pub(crate) async fn get(&mut self, key: &str) -> anyhow::Result<u64> {
        let answer = self.call("/v3/kv/range", &json!({ "key": BASE64.encode(key) })).await?;
        let Some(value) = answer["kvs"][0]["value"].as_str() else { return Ok(0) };
        Ok(std::str::from_utf8(&BASE64.decode(value)?)?.parse()?)
    }

    /// Whether this member says that it leads.
    pub(crate) async fn leads(&mut self) -> anyhow::Result<bool> {
        let status = self.call("/v3/maintenance/status", &json!({})).await?;
        let leader = status["leader"].as_str().context("no leader")?;
        Ok(leader != "0" && status["header"]["member_id"].as_str() == Some(leader))
    }

    /// Whether member `at` is what it is to be; if it is not, it is asked for.
    pub(crate) async fn seat(&mut self, at: usize, wanted: Seat) -> anyhow::Result<bool> {
        let list = self.call("/v3/cluster/member/list", &json!({})).await?;
        let members = list["members"].as_array().context("a list of no members")?;
        // One that has not started yet has no name.
        let url = peer(at);
        let member = members.iter().find(|member| member["peerURLs"][0].as_str() == Some(url.as_str()));
        let is = match member {
            None => Seat::None,
            Some(member) if member["isLearner"].as_bool() == Some(true) => Seat::Learner,
            Some(_) => Seat::Voter,
        };
        let id = member.map(|member| member["ID"].clone());
        match (is, wanted) {
            _ if is == wanted => return Ok(true),
            (_, Seat::None) => self.call("/v3/cluster/member/remove", &json!({ "ID": id })).await?,
            (Seat::None, Seat::Learner) => {
                self.call("/v3/cluster/member/add", &json!({ "peerURLs": [url], "isLearner": true })).await?
            }
            (Seat::Learner, Seat::Voter) => self.call("/v3/cluster/member/promote", &json!({ "ID": id })).await?,
            _ => bail!("etcd has no way from {is:?} to {wanted:?}"),
        };
        Ok(false)
    }

    /// What time it is there, to the second.
    pub(crate) async fn time(&mut self) -> anyhow::Result<OffsetDateTime> {
        let (headers, _) = self.answer("/v3/maintenance/status", &json!({})).await?;
        let date = headers.get("date").context("an answer without a date")?.to_str()?;
        OffsetDateTime::parse(date, &Rfc2822).with_context(|| format!("reading the date '{date}'"))
    }
}
