//! etcd in the place of members: the same networks, faults, clients and judge. What they judge etcd to be is known, so this tells whether they are right.

use crate::net::address;
use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use tokio::net::UnixStream;

/// A socket of this name in its folder: etcd wants something like HOST:PORT.
pub(crate) const SOCKET: &str = "localhost:1";

/// Adds the words that run member `at` of `count`, with its folder `dir`, to a command.
pub(crate) fn words(command: &mut Command, at: usize, count: usize, dir: &Path) -> anyhow::Result<()> {
    let (peer, client) = (|at| format!("http://{}:2380", address(at)), format!("unix://{SOCKET}"));
    let mut cluster = String::new();
    for other in 0..count {
        write!(cluster, "{}m{other}={}", if other == 0 { "" } else { "," }, peer(other))?;
    }
    command.arg("env").arg(format!("--chdir={}", dir.display())).args(["etcd", "--log-level", "warn"]);
    command.args(["--name", &format!("m{at}"), "--data-dir", "state/etcd", "--initial-cluster", &cluster]);
    command.args(["--listen-peer-urls", &peer(at), "--initial-advertise-peer-urls", &peer(at)]);
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    Ok(())
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

    async fn call(&mut self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.0.ready().await?;
        let request = Request::post(path).header("host", "localhost").body(Full::from(body.to_string()))?;
        let response = self.0.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "{path}: {status}: {}", String::from_utf8_lossy(&body));
        Ok(serde_json::from_slice(&body)?)
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
}
